"""Every config in configs/ runs, and the demo does what its docstring says."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    if given.critic_warmup:
        arguments += ["--critic_warmup=1"]  # the second step trains the policy
    train.train(of(name, arguments))
    assert [line["step"] for line in lines(tmp_path / "out")] == [1, 2]


def test_every_objective_has_its_configs():
    """One on arithmetic, and those that are documented one on a real model, too; the command is in each of these."""
    documented = {name: (ROOT / name).read_text() for name in CONFIGS if (ROOT / name).read_text().startswith('"""')}
    assert not [f"{name}: no '--config {name}' in its docstring" for name, text in documented.items() if f"--config {name}" not in text]
    trained = lambda names: {objective for name in names for objective in of(name).weights}
    assert {*losses.OBJECTIVES} == trained(name for name in CONFIGS if name not in REAL)
    assert trained(documented.keys() - {*REAL}) == trained(REAL)


def test_the_demo_learns(tmp_path):
    """README's first command: the SFT stage, then DPO at least 10 points of exact match above it."""
    printed = start(tmp_path, "--config", "configs/dpo.py", "--device=cpu")
    before, *_, after = (line["exact_match"] for line in lines(tmp_path / "out" / "dpo", "eval"))
    assert after >= before + 0.10
    assert f"exact_match {before:.4g} -> {after:.4g}" in " ".join(printed.split())


# ---------------------------------------------------------------------------------------------------------------------
# README's boxes, as they stand


README = (ROOT / "README.md").read_text()
TINY_RUN = ["--init_from=scratch", f"--scratch={SMALL}", "--tokenizer=tasks/arithmetic", "--max_steps=2", "--eval_prompts=", "--device=cpu"]


def box(first_line: str) -> str:
    """The code of the block that has this first line, without it."""
    return re.search(rf"```python\n{re.escape(first_line)}\n(.+?)```", README, re.S)[1]


@pytest.fixture
def repo(tmp_path):
    """A copy to change."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    for folder in ("configs", "parts", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def python(repo, *arguments) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_loss_in_the_readme_trains(repo):
    loss, recipe = box("# losses.py").split("# configs/focal.py\n")
    assert sum(map(bool, loss.splitlines() + recipe.splitlines())) <= 12
    with open(repo / "losses.py", "a") as file:
        file.write("\n\n" + loss)
    (repo / "configs" / "focal.py").write_text(recipe)
    python(repo, "train.py", "--config=configs/focal.py", "--focus=2.0", f"--cache_dir={repo}/cache", *TINY_RUN)
    first = lines(repo / "out/focal")[0]
    assert {"loss/focal", "rewards/accuracies", "logps/chosen"} <= first.keys() and first["loss/focal"] == pytest.approx(0.25 * 0.693147, rel=1e-4)


def test_the_loop_in_the_readme_is_that_of_a_run(repo):
    """With its rows, seed and steps, it ends in the same metrics."""
    given = [option for option in TINY_RUN if not option.startswith("--max_steps")]
    python(repo, "train.py", "--objective=sft", "--train_data=tasks/arithmetic/sft_eval.jsonl", "--out_dir=out/sft", "--max_steps=1", *given)
    said = python(repo, "-c", box("# own.py"))
    python(repo, "train.py", "--objective=dpo", "--train_data=tasks/arithmetic/pairs.jsonl", "--init_from=out/sft", "--out_dir=out/own2", "--max_steps=10",
           "--lr=1e-4", "--schedule=constant", "--weight_decay=0.01", "--grad_clip=0", f"--cache_dir={repo}/cache", "--device=cpu")
    ours, theirs = [eval(line) for line in said.splitlines()][-1], lines(repo / "out/own2")[-1]
    assert {"rewards/margins", "logps/chosen"} <= ours.keys() <= theirs.keys() and ours["rewards/margins"] > 1e-3
    assert all(value == pytest.approx(theirs[name], rel=1e-3) for name, value in ours.items() if name != "rewards/accuracies")
    assert (repo / "out/own/model.safetensors").is_file()


def test_the_advantage_in_the_readme_is_one(repo):
    with open(repo / "losses.py") as file:
        source = file.read()
    after = source.index("\n\n", source.index("ADVANTAGES = {"))
    (repo / "losses.py").write_text(source[:after] + "\n\n\n" + box("# losses.py, behind ADVANTAGES") + source[after:])
    said = python(repo, "-c", "import losses, torch; print(losses.ADVANTAGES['group_rank'].of(torch.tensor([3.0, -9.0, 5.0, 3.0]), torch.zeros(4, 2), None, "
                              "torch.ones(4, 2).bool(), 4, 1.0, 1.0)[0].tolist())")
    assert eval(said) == [[0.0] * 2, [-0.75] * 2, [0.75] * 2, [0.0] * 2]
    python(repo, "train.py", "--config=configs/grpo.py", "--advantages=group_rank", f"--cache_dir={repo}/cache", *TINY_RUN, "--batch_size=8", "--max_new_tokens=8", "--out_dir=out/rank")
    assert lines(repo / "out/rank")


def test_demonstrations_among_pairs(repo):
    """As README adds them: they are imitated, and are no pairs."""
    line = re.search(r'`(if "completion" in row: .+?)`', README)[1]
    source = (repo / "parts/formats.py").read_text()
    begin = source.index("    missing = ", source.index("def preference_row"))
    (repo / "parts/formats.py").write_text(f"{source[:begin]}    {line}\n{source[begin:]}")
    (repo / "mixed.jsonl").write_text("".join(Path(ROOT / "tasks/arithmetic" / name).read_text() for name in ("sft_eval.jsonl", "pairs_eval.jsonl")))
    python(repo, "train.py", "--objective={'dpo': 1.0, 'sft': 1.0}", "--train_data=mixed.jsonl", "--out_dir=out/mixed", f"--cache_dir={repo}/cache", *TINY_RUN, "--batch_size=1000")
    first = lines(repo / "out/mixed")[0]
    rows = json.loads((repo / "out/mixed/run.json").read_text())["rows"]["train"]
    assert rows["used"] == rows["read"]  # none is left out as a pair without difference
    assert first["loss"] == pytest.approx(math.log(2) + first["nll"], rel=1e-4) and first["loss/dpo"] == pytest.approx(math.log(2), rel=1e-4)


def test_the_format_in_the_readme_is_read(repo):
    source = (repo / "parts/formats.py").read_text()
    begin = source.index("    missing = ", source.index("def preference_row"))
    (repo / "parts/formats.py").write_text(source[:begin] + box("# parts/formats.py, at the top of preference_row, below its docstring") + source[begin:])
    rows = [{"question": "1+2=", "answers": [{"text": "4", "score": -1}, {"text": "3", "score": 7}, {"text": "5", "score": 0}]}, {"question": "2+2=", "answers": [{}]}]
    (repo / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["rows.jsonl", "--objective=dpo", "--tokenizer=tasks/arithmetic", f"--cache_dir={repo}/cache"]
    shown = python(repo, "data.py", *given, "--bad_rows=skip")
    assert "1 used" in shown and re.search(r"chosen +\[3<eos>\]", shown) and re.search(r"rejected +\[4<eos>\]", shown)
    failed = subprocess.run([sys.executable, "data.py", *given], cwd=repo, capture_output=True, text=True)
    assert failed.returncode == 1 and "error: rows.jsonl:2: KeyError: 'score'" in failed.stderr


def test_the_reward_in_the_readme_rewards(repo):
    (repo / "configs" / "brief.py").write_text(box("# configs/brief.py"))
    python(repo, "train.py", "--config=configs/brief.py", f"--cache_dir={repo}/cache", *TINY_RUN, "--batch_size=8", "--max_new_tokens=8")
    assert lines(repo / "out/brief") and all(line["reward"] < 0 for line in lines(repo / "out/brief"))  # nothing is right, and nothing free


def test_the_family_in_the_readme_is_that_of_transformers(repo):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.SeedOssForCausalLM(transformers.SeedOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=128)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    theirs.save_pretrained(repo / "folder")
    torch.save(theirs(torch.arange(20)[None]).logits[0], repo / "logits")
    source = (repo / "model.py").read_text()
    after = re.search(r"^NAMES = .+\n", source, re.M).end()
    (repo / "model.py").write_text(source[:after] + box("# model.py, below FAMILIES and NAMES") + source[after:])
    python(repo, "-c", "import model, torch, pathlib; ours = model.load(pathlib.Path('folder'))[0].logits(torch.arange(20)); "
                       "assert (ours - torch.load('logits')).abs().max() < 1e-5")
