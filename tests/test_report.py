"""What a run says and what a file looks like: the summary, trackers, the preview."""
import json
import sys
import types

import pytest
import torch

import config
import data
import losses
import machine
import preview
import report
import train
from conftest import ROOT
from launch import run
from test_train import ROWS, lines, options

CHECK = "def check(prompt, completion, row):\n    return True\n"


def told(capsys, *arguments) -> str:
    train.train(config.load([*arguments]))
    return capsys.readouterr().out


def test_the_summary_says_what_was_learned(tmp_path, monkeypatch, capsys):
    """First and last eval, each metric once; answers before and after; after --resume too; nothing where nothing was evaluated."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "check.py").write_text(CHECK)
    given = dict(config=tmp_path / "check.py", eval_data=ROWS["preference"], eval_prompts=ROWS["prompts"], max_new_tokens=4, samples=2, save_every=2)
    said = told(capsys, *options(tmp_path, "dpo", **given))
    first, last = lines(tmp_path / "run", "eval")
    assert f"loss {first['loss']:.4g} -> {last['loss']:.4g}" in " ".join(said.split()) and said.count("exact_match") == 1
    assert said.count("  prompt  ") == said.count("  before  ") == said.count("  after  ") == 2 and "generate --model=" in said
    assert all(len(line) < 80 for line in said.splitlines() if str(tmp_path) not in line)
    told(capsys, *options(tmp_path, "dpo", "parts", **{**given, "max_steps": 2}))
    resumed = told(capsys, *options(tmp_path, "dpo", "parts", **given), "--resume")
    assert f"loss {first['loss']:.4g} -> {last['loss']:.4g}" in " ".join(resumed.split()) and "  before  " not in resumed and resumed.count("  answer  ") == 2
    told(capsys, *options(tmp_path, "rm", "bare", save_every=2, max_steps=2))
    bare = told(capsys, *options(tmp_path, "rm", "bare", save_every=2), "--resume")
    train_lines = lines(tmp_path / "bare")
    assert len(train_lines) == 4
    (tmp_path / "bare" / "run.json").write_text((tmp_path / "bare" / "run.json").read_text().replace('"finished": true', '"finished": false'))
    assert told(capsys, *options(tmp_path, "rm", "bare", save_every=2), "--resume").endswith(bare[bare.index(f"{tmp_path / 'bare'}: first step"):])
    assert f"{tmp_path / 'bare'}: first step -> last step" in bare and f"loss {train_lines[0]['loss']:.4g} -> {train_lines[-1]['loss']:.4g}" in " ".join(bare.split())
    assert f"score --model={tmp_path / 'bare'} --data={ROWS['preference']}" in bare
    imitating = told(capsys, *options(tmp_path, "rm", "imitating", max_steps=1, nll_coef=0.1))
    assert f"score --model={tmp_path / 'imitating'}" in imitating and "generate" not in imitating
    rolled = told(capsys, *options(tmp_path, "reinforce", "rolled", advantages="reinforce", eval_prompts=ROWS["prompts"]))
    assert rolled.count("  reward ") == 1


@pytest.mark.parametrize("text, ours", [("losses.rloo(torch.zeros(2, 1))", True), ("int('a')", False), ("raise ValueError", False)])
def test_a_slip_is_not_said_as_a_message(text, ours):
    """A `raise` of the project's files is for the user; what Python says of a line of theirs, or of others' files, is a bug."""
    with pytest.raises(ValueError) as caught:
        exec(compile(text, str(ROOT / "mine.py"), "exec"), dict(losses=losses, torch=torch))
    assert machine.on_purpose(caught.value) == ours


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_check_that_fails_loses_nothing(ranks, tmp_path):
    """After the last step, for a prompt of one rank: an error that names its row on every rank, and all steps are saved."""
    row = json.loads(open(ROWS["prompts"]).readlines()[3])
    (tmp_path / "check.py").write_text(f"from pathlib import Path\n\ndef check(prompt, completion, row):\n"
                                       f"    return 1 / (prompt != {row['prompt']!r} or not Path({str(tmp_path / 'run/checkpoint-1')!r}).exists())\n")
    given = options(tmp_path, "dpo", config=tmp_path / "check.py", eval_prompts=ROWS["prompts"], max_new_tokens=2, max_steps=2, save_every=1, samples=0)
    failed = run(given, ranks, check=False)
    assert failed.returncode != 0 and f"error: {ROWS['prompts']}:4: check: ZeroDivisionError: division by zero ({tmp_path / 'check.py'}:4); for the completion" in failed.stderr
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    (tmp_path / "check.py").write_text(CHECK)  # mended: the eval that is missing is made
    done = run([*given, "--resume"], ranks)
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [0, 2] and "exact_match 1 -> 1" in " ".join(done.stdout.split())
    (tmp_path / "run" / "run.json").write_text((tmp_path / "run" / "run.json").read_text().replace('"finished": true', '"finished": false'))
    run([*given, "--resume"], ranks)  # as if it had been killed before it was done: made once
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [0, 2]


def test_a_tracker_gets_every_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="track = 'wandb' is not installed; pip install wandb"):
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name looks like this
        sys.modules["wandb"].__spec__ = types.SimpleNamespace(origin=None)
        train.train(config.load(options(tmp_path, "dpo", track="wandb")))
    assert not (tmp_path / "run").exists()
    seen = []
    monkeypatch.setitem(report.TRACKERS, "wandb", lambda out, config: lambda line: seen.append((line["step"], report.numbers(line))))
    monkeypatch.setattr(report, "check_tracker", lambda track: None)
    train.train(config.load(options(tmp_path, "dpo", track="wandb", eval_data=ROWS["preference"])))
    written = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [step for step, _ in seen] == [line["step"] for line in written] == [0, 1, 2, 3, 4, 4]
    assert seen[1][1]["train/loss"] == written[1]["loss"] and seen[-1][1]["eval/rewards/margins"] == written[-1]["rewards/margins"]


def test_tensorboard_reads_what_is_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "dpo", track="tensorboard")))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path / "run")]


def shown(capsys, *arguments) -> str:
    preview.main([*map(str, arguments)])
    return capsys.readouterr().out


def test_the_preview_marks_what_is_trained(tmp_path, monkeypatch, capsys):
    """Of pairs the responses with their EOS, of steps the step tokens, red where they are wrong; the counts are those of a run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FORCE_COLOR", "1")
    cache = f"--cache_dir={tmp_path}"
    said = shown(capsys, ROWS["preference"], "--config", "configs/dpo.py", "--rows", "1", cache)
    row = json.loads(open(ROWS["preference"]).readline())
    green = lambda text: "".join(part.split("\033[0m")[0] for part in text.split("\033[1;32m")[1:])
    trained = green(said).replace("\u21b5", "\n")
    assert trained == f"{row['chosen']}<eos>{row['rejected']}<eos>" and "500 read, 500 used" in said
    steps = shown(capsys, ROWS["prm"], "--config=configs/prm.py", "--rows=1", cache)
    row = json.loads(open(ROWS["prm"]).readline())
    assert (green(steps), steps.count("\033[1;31m\u21b5-")) == ("\u21b5+" * sum(row["labels"]), row["labels"].count(False))
    (tmp_path / "soft.jsonl").write_text(json.dumps({"prompt": "3+5=", "completions": ["8", "13", "21"], "labels": [0.9, None, False]}) + "\n")
    soft = shown(capsys, tmp_path / "soft.jsonl", "--config=configs/prm.py", cache)
    assert "\u21b50.9" in green(soft) and "\u21b5?" not in green(soft) and "2 trained" in soft and "trained: 2 of" in soft  # null: not trained
    cut = shown(capsys, ROWS["preference"], "--config=configs/dpo.py", "--max_length", "16", cache)
    cfg = config.load(["--config=configs/dpo.py", "--max_length=16", cache])
    dataset = data.load(ROWS["preference"], "preference", data.Tokenizer("tasks/arithmetic"), cfg, False)
    assert f"{dataset.counts['truncated']} truncated" in cut and "max_length = 16; median 16" in cut
    assert sum(int(line.split("| ")[-1]) for line in cut.splitlines() if " to " in line and "|" in line) == 500  # the histogram's
    assert f"of {dataset.lengths.sum():,} tokens" in cut
    prompts = shown(capsys, ROWS["prompts"], "--config=configs/grpo.py", cache)
    assert "trained" not in prompts and "500 used" in prompts
    (tmp_path / "words.jsonl").write_text(json.dumps({"prompt": "3+5=", "completion": "ate"}) + "\n")
    assert "\n3 tokens are <unk>: " in shown(capsys, tmp_path / "words.jsonl", "--config=configs/sft.py", cache) and "<unk>" not in prompts


def test_the_preview_of_a_reward_model_and_of_rows_that_were_cut(tmp_path, monkeypatch, capsys):
    """A reward is read at a response's last token; of the rows that do not fit one is shown, which says so."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rows = [dict(prompt="1+2=", chosen="3", rejected="4"), dict(prompt="1+" * 20 + "2=", chosen="22", rejected="9")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [tmp_path / "rows.jsonl", "--init_from=scratch", "--tokenizer=tasks/arithmetic", "--rows=1", "--max_length=24", f"--cache_dir={tmp_path}"]
    preview.main([*map(str, given), "--objective=rm"])
    said = capsys.readouterr().out
    assert said.count(" 1 trained)") == 4 and "trained: 4 of " in said
    assert "rows.jsonl:1\n" in said and "rows.jsonl:2 (truncated)" in said
    preview.main([*map(str, given), "--objective=rm", "--nll_coef=1"])  # then the chosen response's tokens are trained, too
    said = capsys.readouterr().out
    assert said.count("(2 tokens, 2 trained)") == 1 and said.count("(2 tokens, 1 trained)") == 2 and "trained: 7 of " in said
    steps = [dict(prompt="1=", completions=["1"], labels=[1]), dict(prompt="2=", completions=["1" * 60, "2"], labels=[1, 1])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    preview.main([*map(str, given), "--objective=prm"])  # cut, and dropped
    assert "2 read, 1 used, 1 truncated, 1 dropped" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.jsonl", "--config=configs/dpo.py"], "nowhere.jsonl: no such file"), (["tasks", "--config=configs/dpo.py"], "tasks is a folder; name files"),
    ([ROWS["sft"]], "no tokenizer is named"), ([ROWS["sft"], "--config=configs/dpo.py"], "expected chosen and rejected")])
def test_the_preview_refuses(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        preview.main([*arguments, f"--cache_dir={tmp_path}"])


def test_long_texts_are_shown_in_lines(pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = " ".join(f"word{i}" for i in range(400))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": words, "completion": words}) + "\n")
    said = shown(capsys, tmp_path / "rows.jsonl", "--objective=sft", f"--tokenizer={pieces}", "--max_length=4096", f"--cache_dir={tmp_path}")
    lines = [line.rstrip() for line in said.splitlines() if str(tmp_path) not in line and str(pieces) not in line]
    assert max(map(len, lines)) <= 80 and "more tokens" in said
