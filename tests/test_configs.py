"""Every config in configs/ runs, and the demo does what its docstring says."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import config
import losses
import model
import train
from conftest import ROOT
from test_train import ROWS, SMALL, lines

CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py"))
REAL = [name for name in CONFIGS if "smollm2" in name]


def house(tmp_path):
    """A folder that looks like the repo's root to a config, so that out/ and the cache stay in it."""
    for name in ("configs", "tasks"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def start(tmp_path, *arguments):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments, f"--cache_dir={tmp_path / 'cache'}"],
                          cwd=house(tmp_path), capture_output=True, text=True, env=dict(os.environ, PYTHONWARNINGS="error"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def of(name: str, arguments: tuple = ()):
    return config.load([f"--config={ROOT / name}", *arguments])


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # files are closed when they are collected
@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_two_steps(name, tmp_path, monkeypatch):
    """From a tiny new model; on arithmetic rows, where the config names a file that is not here."""
    monkeypatch.chdir(house(tmp_path))
    given, kind = of(name), config.data_kind(of(name))
    arguments = ["--init_from=scratch", f"--scratch={SMALL}", "--tokenizer=tasks/arithmetic", "--max_steps=2", "--out_dir=out", "--device=cpu",
                 "--samples=1", f"--cache_dir={tmp_path / 'cache'}"] + [f"--train_data={ROWS[kind]}"] * (name in REAL)
    for key in ("teacher", "reward", "critic"):  # models that it would train or fetch first
        if isinstance(getattr(given, key), str) and getattr(given, key):
            tiny = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, 5, {"lm_head": 0} if key == "teacher" else {"score": 1})
            model.save(tiny, tmp_path / key, torch.float32, ROOT / "tasks/arithmetic")
            arguments.append(f"--{key}={key}")
    if config.rolls(given):
        arguments += ["--batch_size=8", "--rollout_prompts=16", "--max_new_tokens=8"]
    train.train(of(name, arguments))
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2]


@pytest.mark.parametrize("configs", [REAL, [name for name in CONFIGS if name not in REAL]])
def test_every_objective_has_a_config(configs):
    """One on arithmetic and one on a real model."""
    assert {*losses.OBJECTIVES} == {name for path in configs for name in of(path).weights}
    assert all(f"--config {path}" in (ROOT / path).read_text() for path in configs)  # the command is there


def test_the_demo_learns(tmp_path):
    """README's first command: the SFT stage, then DPO at least 10 points of exact match above it."""
    printed = start(tmp_path, "--config", "configs/dpo.py", "--device=cpu")
    before, *_, after = (line["exact_match"] for line in lines(tmp_path / "out" / "dpo", "eval"))
    assert after >= before + 0.10
    assert f"exact_match {before:.4g} -> {after:.4g}" in " ".join(printed.split())


def test_the_loss_in_the_readme_trains(tmp_path):
    """README's box, as it stands: a function at the end of losses.py, a config, and no other change."""
    box = re.search(r"```python\n# losses.py\n(.+?)\n# configs/focal.py\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    assert sum(map(bool, box[1].splitlines() + box[2].splitlines())) <= 12
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    for folder in ("configs", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    with open(tmp_path / "losses.py", "a") as file:
        file.write("\n\n" + box[1])
    (tmp_path / "configs" / "focal.py").write_text(box[2])
    done = subprocess.run([sys.executable, "train.py", "--config=configs/focal.py", "--focus=2.0", "--init_from=scratch", f"--scratch={SMALL}",
                           "--tokenizer=tasks/arithmetic", "--max_steps=2", "--eval_prompts=", "--device=cpu", f"--cache_dir={tmp_path}/cache"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in open(tmp_path / "out/focal/metrics.jsonl")]
    assert {"loss/focal", "rewards/accuracies", "logps/chosen"} <= lines[1].keys() and lines[1]["loss/focal"] == pytest.approx(0.25 * 0.693147, rel=1e-4)
