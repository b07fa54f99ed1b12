"""What a run leaves behind is what it reported, and what goes on is the run that was. Real runs on the arithmetic rows."""
import json
import math
import shutil

import pytest
import torch

import config
import model
import reward
import sample
import train
from conftest import ROOT
from test_train import ROWS, SMALL, lines, options, weights


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def go(tmp_path, name="dpo", out="run", **changes):
    train.train(config.load(options(tmp_path, name, out, **changes)))


def folder_of(tmp_path, name: str = "start", dtype=torch.float32, seed: int = 5, heads: dict = model.LANGUAGE):
    """A folder with a small model for the arithmetic rows."""
    decoder = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, seed, heads)
    model.save(decoder, tmp_path / name, dtype, ROOT / "tasks/arithmetic")
    return tmp_path / name


# ---------------------------------------------------------------------------------------------------------------------
# The saved model is the reported one


def eval_of(tmp_path, folder, reference) -> dict:
    """The first eval of a run that begins with a folder: what its weights are worth."""
    go(tmp_path, out="again", init_from=folder, reference=reference, scratch=None, eval_data=ROWS["preference"], dtype="float32", save_dtype="", max_steps=1)
    first = lines(tmp_path / "again", "eval")[0]
    shutil.rmtree(tmp_path / "again")
    return first


SHORT = dict(scratch=None, eval_data=ROWS["preference"], dtype="float32", lr=1e-5, max_steps=3)  # updates below a bf16 ulp


def test_what_was_trained_is_saved_whatever_the_folder_holds(tmp_path):
    start = folder_of(tmp_path, dtype=torch.bfloat16)
    go(tmp_path, init_from=start, **SHORT, save_dtype="")
    saved = weights(tmp_path / "run/model")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "run/model/config.json").read_text())["torch_dtype"] == "float32"
    last, there = lines(tmp_path / "run", "eval")[-1], eval_of(tmp_path, tmp_path / "run/model", start)
    assert last["rewards/margins"] != 0
    for name in ("loss", "rewards/margins"):
        assert there[name] == pytest.approx(last[name], rel=1e-2)


def test_a_narrower_dtype_is_evaluated_as_it_is_saved(tmp_path, capsys):
    start = folder_of(tmp_path, dtype=torch.bfloat16)
    go(tmp_path, init_from=start, **SHORT, save_dtype="bfloat16", save_every=3)
    said = " ".join(capsys.readouterr().out.split())
    first, trained, (saved,) = *lines(tmp_path / "run", "eval"), lines(tmp_path / "run", "saved")
    assert abs(saved["rewards/margins"]) < 0.5 * abs(trained["rewards/margins"])  # rounded away
    margins = f"{trained['rewards/margins']:.4g} -> {saved['rewards/margins']:.4g}"
    assert "saved as bfloat16: " in said and f"rewards/margins {margins}" in said and "; --save_dtype=float32 keeps what was trained" in said
    assert f"rewards/accuracies {first['rewards/accuracies']:.4g} -> {saved['rewards/accuracies']:.4g}" in said  # the summary
    there = eval_of(tmp_path, tmp_path / "run/model", start)
    assert there["rewards/margins"] == pytest.approx(saved["rewards/margins"], rel=1e-2, abs=1e-9)
    held = weights(tmp_path / "run/checkpoint-3")
    assert any(not torch.equal(t, t.bfloat16().float()) for t in held.values())  # a checkpoint is not rounded
    whole = weights(tmp_path / "run/model")
    assert all(torch.equal(held[name].bfloat16(), whole[name]) for name in whole)


def test_an_eval_that_fails_on_rounded_weights_saves_those_that_were_trained(tmp_path, monkeypatch):
    evaluate, calls = train.evaluate, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the third fails")
        return evaluate(*given)
    monkeypatch.setattr(train, "evaluate", failing)
    with pytest.raises(ValueError, match="the third fails"):
        go(tmp_path, init_from=folder_of(tmp_path), **SHORT, save_dtype="bfloat16")
    held = weights(tmp_path / "run/checkpoint-3")
    assert any(not torch.equal(t, t.bfloat16().float()) for t in held.values())


def test_a_merge_keeps_the_wider_dtype(tmp_path):
    one, other = folder_of(tmp_path, "one", torch.bfloat16, 1), folder_of(tmp_path, "other", torch.float32, 2)
    for first, second in ((one, other), (other, one)):
        sample.main(["merge", f"--model={first}", f"--other={second}", f"--out={tmp_path / first.name}-merged", "--device=cpu"])
        assert {t.dtype for t in weights(tmp_path / f"{first.name}-merged").values()} == {torch.float32}
