"""What a run leaves behind is what it reported, and what goes on is the run that was. Real runs on the arithmetic rows."""
import json
import math
import shutil

import pytest
import torch

import config
import losses
import model
import sample
import train
from conftest import ROOT
from launch import run
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


# ---------------------------------------------------------------------------------------------------------------------
# What may change on --resume (checkpoint.py has the table)


def copied_rows(tmp_path, kind: str = "preference", count: int = 60):
    """A file of our own with the first rows of a kind."""
    rows = open(ROWS[kind]).readlines()[:count]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return tmp_path / "rows.jsonl"


def exchanged(file, one: int, other: int):
    """Two lines of a file change places."""
    rows = file.read_text().splitlines(keepends=True)
    rows[one], rows[other] = rows[other], rows[one]
    file.write_text("".join(rows))


@pytest.mark.parametrize("change", [dict(batch_size=20), dict(batch_size=5), dict(seed=1)])
def test_what_steps_count_by_does_not_change(change, tmp_path):
    given = dict(train_data=copied_rows(tmp_path), batch_size=10, max_steps=0)
    go(tmp_path, **{**given, "max_steps": 2}, save_every=2)
    written = (tmp_path / "run/metrics.jsonl").read_text()
    (key, value), = change.items()
    before = dict(batch_size=10, seed=0)[key]
    with pytest.raises(ValueError, match=f"checkpoint-2: {key} {before} -> {value}. .* Set them back, or begin a new run with its weights: --init_from=.*checkpoint-2"):
        go(tmp_path, **{**given, **change}, resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == written
    go(tmp_path, **given, resume=True, lr=1e-3)
    assert len(lines(tmp_path / "run")) == 6  # one epoch


def test_weights_of_files_do_not_change(tmp_path):
    """Which rows a step has follows from them; that a name is written in another order is no change."""
    first, second = str(copied_rows(tmp_path)), str(tmp_path / "b.jsonl")
    shutil.copy(first, second)
    go(tmp_path, train_data={first: 1.0, second: 3.0}, max_steps=4, save_every=2)
    with pytest.raises(ValueError, match="checkpoint-4: train_data.*b.jsonl 3.0 -> 2.0. .* Set them back"):
        go(tmp_path, train_data={first: 1.0, second: 2.0}, max_steps=6, save_every=2, resume=True)
    go(tmp_path, train_data={second: 3.0, first: 1.0}, max_steps=6, save_every=2, resume=True)
    assert len(lines(tmp_path / "run")) == 6


def test_before_the_first_checkpoint_everything_may_change(tmp_path, capsys):
    go(tmp_path, max_steps=1)
    record = json.loads((tmp_path / "run/run.json").read_text()) | {"finished": False}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    go(tmp_path, max_steps=2, batch_size=13, resume=True)
    assert "continues with changed settings: batch_size 26 -> 13; max_steps 1 -> 2" in capsys.readouterr().out
    assert len(lines(tmp_path / "run")) == 2


def test_the_run_becomes_longer_and_says_so(tmp_path, capsys):
    go(tmp_path, max_steps=0, epochs=0.1, save_every=2, schedule="linear")
    capsys.readouterr()
    go(tmp_path, max_steps=0, epochs=0.2, save_every=2, schedule="linear", resume=True)
    assert "continues with changed settings: epochs 0.1 -> 0.2" in capsys.readouterr().out
    rates = [line["lr"] for line in lines(tmp_path / "run")]
    assert rates == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3])  # the last two of a line over four steps


# ---------------------------------------------------------------------------------------------------------------------
# Rows that changed


def test_a_changed_file_is_said_or_refused(tmp_path, capsys):
    file = copied_rows(tmp_path)
    given = dict(train_data=file, batch_size=10, max_steps=4)
    go(tmp_path, **{**given, "max_steps": 2}, save_every=1)
    exchanged(file, 3, 4)
    capsys.readouterr()
    go(tmp_path, **given, resume=True)
    assert f"continues with changed settings: {file} has other contents" in capsys.readouterr().out
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="checkpoint-2: train_data held 60 examples and holds 59 now, .* --init_from="):
        go(tmp_path, **{**given, "max_steps": 6}, resume=True)


def test_a_finished_run_of_other_rows_is_not_finished_already(tmp_path):
    file = copied_rows(tmp_path)
    go(tmp_path, train_data=file, max_steps=1)
    go(tmp_path, train_data=file, max_steps=1, resume=True)
    exchanged(file, 3, 4)
    with pytest.raises(ValueError, match=f"is finished and holds no checkpoint to go on from .{file} has other contents"):
        go(tmp_path, train_data=file, max_steps=1, resume=True)


def test_a_stage_whose_file_changed_is_run_again(tmp_path, capsys):
    """Its eval rows may change, and its file may be gone."""
    file, held = copied_rows(tmp_path, "sft"), tmp_path / "eval.jsonl"
    held.write_text("".join(open(ROWS["sft"]).readlines()[:9]))
    stage = dict(objective="sft", init_from="scratch", scratch=SMALL, tokenizer="tasks/arithmetic", train_data=str(file), eval_data=str(held),
                 out_dir=str(tmp_path / "first"), max_steps=1, batch_size=8, samples=0)
    (tmp_path / "first.py").write_text("".join(f"{key} = {value!r}\n" for key, value in stage.items()))

    def second(out):
        go(tmp_path, out=out, init_from=tmp_path / "first.py", max_steps=1)
        return capsys.readouterr().out
    second("a")
    assert "already trained" in second("b")
    exchanged(held, 1, 2)
    assert "already trained" in second("c")
    exchanged(file, 1, 2)
    said = second("d")
    assert "already trained" not in said and f"it was made with other settings: {file} has other contents" in said
    assert (tmp_path / "first.old1/model").is_dir()
    assert "already trained" in second("e")
    file.unlink()
    assert "already trained" in second("f")


ROLLED = dict(objective="reinforce", advantages="reinforce", rollout_epochs=2, batch_size=10)


def test_in_the_middle_of_a_rollout_prompts_stay(tmp_path, capsys):
    file = copied_rows(tmp_path, "prompts", 20)
    given = dict(train_data=file, **ROLLED)
    for out, steps in (("middle", 3), ("between", 2), ("shorter", 3), ("temperature", 3)):
        go(tmp_path, "reinforce", out, **given, max_steps=steps, save_every=steps)
    whole = file.read_text()
    with pytest.raises(ValueError, match="checkpoint-3: step 3 is inside a rollout, whose answers were drawn with temperature = 1.0"):
        go(tmp_path, "reinforce", "temperature", **given, max_steps=4, resume=True, temperature=0.7)
    file.write_text("".join(reversed(whole.splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"rows.jsonl:\d+: this prompt had other tokens in .*checkpoint-3, which is inside a rollout.*--init_from="):
        go(tmp_path, "reinforce", "middle", **given, max_steps=4, resume=True)
    capsys.readouterr()
    go(tmp_path, "reinforce", "between", **given, max_steps=4, resume=True)  # new answers are drawn
    assert f"continues with changed settings: {file} has other contents" in capsys.readouterr().out
    file.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="checkpoint-3: train_data held 20 examples and holds 2 now"):
        go(tmp_path, "reinforce", "shorter", **given, max_steps=4, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def broken(tmp_path, heads: dict = model.LANGUAGE, tensor: str = "model.norm.weight"):
    """A folder of a model whose outputs are NaN."""
    decoder = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, 5, heads)
    with torch.no_grad():
        decoder.get_parameter(tensor).view(-1)[0] = math.nan
    model.save(decoder, tmp_path / "broken", torch.float32, ROOT / "tasks/arithmetic")
    return tmp_path / "broken"


LANGUAGE, SCORE = {}, dict(heads={"score": 1})
FROZEN = {"reference": ("dpo", LANGUAGE, lambda folder: dict(reference=folder)),
          "reference_live": ("dpo", LANGUAGE, lambda folder: dict(reference=folder, reference_live=True)),
          "kto": ("kto", LANGUAGE, lambda folder: dict(reference=folder)),
          "teacher": ("kd", LANGUAGE, lambda folder: dict(teacher=folder)),
          "teacher's head": ("kd", dict(tensor="lm_head.weight"), lambda folder: dict(teacher=folder)),
          "teacher_top_k": ("kd", LANGUAGE, lambda folder: dict(teacher=folder, teacher_top_k=3)),
          "reward model": ("reinforce", SCORE, lambda folder: dict(reward={str(folder): 1.0}, advantages="reinforce")),
          "kl_coef": ("reinforce", LANGUAGE, lambda folder: dict(reference=folder, kl_coef=0.1, advantages="reinforce")),
          "critic": ("value", SCORE, lambda folder: dict(critic=folder, advantages="gae"))}


@pytest.mark.parametrize("what", FROZEN)
def test_a_frozen_model_that_is_not_finite_is_named(what, tmp_path):
    name, how, more = FROZEN[what]
    with pytest.raises(ValueError, match=f"{tmp_path}/broken: .* not finite.*{ROWS[losses.OBJECTIVES[name].data]}:"):
        go(tmp_path, name, **more(broken(tmp_path, **how)))


@pytest.mark.parametrize("live", [False, True])
def test_two_ranks_name_it_too(live, tmp_path):
    given = dict(reference=broken(tmp_path), reference_live=live, max_steps=2)
    done = run(options(tmp_path, "dpo", **given), ranks=2, check=False, timeout=60)
    assert done.returncode == 1 and f"error: {tmp_path}/broken: its " in done.stderr and "Traceback" not in done.stderr


def spoil_steps(monkeypatch, bad: set):
    """Make the loss of these optimizer steps NaN; a step has one micro-batch."""
    count, spoil = [], losses.OBJECTIVES["dpo"].loss

    def loss(*given, **more):
        values, *rest = spoil(*given, **more)
        count.append(1)
        return values * (math.nan if len(count) in bad else 1), *rest
    monkeypatch.setitem(losses.OBJECTIVES, "dpo", losses.OBJECTIVES["dpo"]._replace(loss=loss))


@pytest.mark.parametrize("log_every, bad, ends", [
    (1, {1, 2, 3, 4}, True), (4, {1, 2, 3, 4}, True), (2, {3, 4}, True), (1, {3, 4}, True), (3, {2, 3, 4}, True),
    (1, {2}, False), (1, {4}, False), (4, {2, 3, 4}, False), (2, {1, 4}, False)])
def test_a_run_that_ends_in_skipped_steps_fails(log_every, bad, ends, tmp_path, monkeypatch, capsys):
    """If all steps since the log line before were skipped, and at least two; the summary says how many were in any case."""
    spoil_steps(monkeypatch, bad)
    arguments = options(tmp_path, "dpo", max_steps=4, log_every=log_every, micro_batch_tokens=4096)
    if ends:
        with pytest.raises(SystemExit, match=f"error: {len(bad)} steps in a row, up to step 4, had a loss or gradient that is not finite"):
            train.main(arguments)
        assert not (tmp_path / "run/model").exists()
    else:
        train.main(arguments)
        assert f"skipped_steps {len(bad)} of 4" in " ".join(capsys.readouterr().out.split())
        assert json.loads((tmp_path / "run/run.json").read_text())["skipped_steps"] == len(bad)


def test_a_run_without_a_step_that_trained_has_no_model(tmp_path, monkeypatch):
    """Not after --resume either."""
    spoil_steps(monkeypatch, {1, 2})
    arguments = options(tmp_path, "dpo", max_steps=2, micro_batch_tokens=4096)
    with pytest.raises(SystemExit, match="2 steps in a row"):
        train.main(arguments)
    with pytest.raises(SystemExit, match="error: .*run: all 2 steps had a loss or gradient that is not finite"):
        train.main([*arguments, "--resume"])
    assert not (tmp_path / "run/model").exists()


def test_the_summary_says_that_no_step_was_skipped(tmp_path, capsys):
    go(tmp_path)
    assert "skipped_steps 0 of 4" in " ".join(capsys.readouterr().out.split())
