"""Every config in configs/ runs, and the demo does what its docstring says."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from test_train import SMALL, lines

CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py"))


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
STAGES = {"kd.py": ("sft", ["teacher"]), "ppo_rm.py": ("rm", ["reward", "critic"])}  # config -> the stage and the keys that name it


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_two_steps(name, tmp_path):
    """From a tiny new model, on arithmetic rows where the config wants a file that is not here."""
    rows = [f"--train_data=tasks/arithmetic/{file}_eval.jsonl" for part, file in (("smollm2_dpo", "pairs"), ("gsm8k", "problems")) if part in name]
    if name in STAGES:  # what it would run first is test_the_demo_learns
        stage, keys = STAGES[name]
        start(tmp_path, "--config", f"configs/{stage}.py", "--init_from=scratch", f"--scratch={SMALL}", "--tokenizer=tasks/arithmetic",
              "--max_steps=1", "--out_dir=stage", "--device=cpu", *["--eval_prompts="] * (stage == "sft"))
        rows = [f"--{key}=stage" for key in keys]
    start(tmp_path, "--config", f"configs/{name}", "--init_from=scratch", f"--scratch={SMALL}", "--tokenizer=tasks/arithmetic",
          "--max_steps=2", "--out_dir=out", "--device=cpu", *rows)
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2]


def test_the_demo_learns(tmp_path):
    """README's first command: the SFT stage, then DPO at least 10 points of exact match above it."""
    printed = start(tmp_path, "--config", "configs/dpo.py", "--device=cpu")
    before, *_, after = (line["exact_match"] for line in lines(tmp_path / "out" / "dpo", "eval"))
    assert after >= before + 0.10
    assert f"exact_match {before:.4g} -> {after:.4g}" in printed


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
