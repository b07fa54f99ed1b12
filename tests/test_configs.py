"""Every config in configs/ runs, and the demo does what its docstring says."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from test_train import SMALL, lines

CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py"))


def house(tmp_path):
    """A folder that looks like the repo's root to a config, so that out/ and the cache stay in it."""
    for name in ("configs", "tasks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def start(tmp_path, *arguments):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments, f"--cache_dir={tmp_path / 'cache'}"],
                          cwd=house(tmp_path), capture_output=True, text=True, env=dict(os.environ, PYTHONWARNINGS="error"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_two_steps(name, tmp_path):
    """From a tiny new model, on arithmetic rows where the config wants a file that is not here."""
    rows = [] if "smollm2" not in name else ["--train_data=tasks/arithmetic/pairs_eval.jsonl"]
    start(tmp_path, "--config", f"configs/{name}", "--init_from=scratch", f"--scratch={SMALL}", "--tokenizer=tasks/arithmetic",
          "--max_steps=2", "--out_dir=out", "--device=cpu", *rows)
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2]


def test_the_demo_learns(tmp_path):
    """README's first command: the SFT stage, then DPO at least 10 points of exact match above it."""
    printed = start(tmp_path, "--config", "configs/dpo.py", "--device=cpu")
    before, *_, after = (line["exact_match"] for line in lines(tmp_path / "out" / "dpo", "eval"))
    assert after >= before + 0.10
    assert f"exact_match {before:.4g} -> {after:.4g}" in printed
