"""Slips that users make before the first step, and what they are told: one line each, with the way out."""
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

import checkpoint
import config
import data
import model
import preview
import report
import train
from conftest import ROOT
from launch import run, start
from losses import OBJECTIVES
from test_config import refused
from test_train import REWARD, ROWS, SMALL, lines, options, weights

ARITHMETIC = ROOT / "tasks/arithmetic"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)


def go(tmp_path, name="sft", out="run", **more):
    """A run in this process, without the keys that are None."""
    given = [word for word in options(tmp_path, name, out, **more) if not word.endswith("=None")]
    train.train(config.load(given))
    return tmp_path / out


# Positions


def long_rows(tmp_path) -> str:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "1+" * 12 + "1=", "completion": "13"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_more_positions_than_a_rotary_model_has(tmp_path, capsys):
    """One line in the run, and in the preview; nothing where all rows fit, whatever max_length is."""
    small = {**SMALL, "max_position_embeddings": 20}
    path = long_rows(tmp_path)
    go(tmp_path, train_data=path, scratch=small, max_steps=1)
    warning = f"warning: {path}:2: 29 tokens, and the model has 20 positions; set max_length to at most that"
    assert capsys.readouterr().out.splitlines().count(warning) == 1
    preview.main([path, "--objective=sft", "--init_from=scratch", f"--scratch={small}", f"--tokenizer={ARITHMETIC}"])
    preview.main([path, "--objective=sft", f"--init_from={tmp_path / 'run'}"])
    assert capsys.readouterr().out.splitlines().count(warning) == 2
    go(tmp_path, out="fits", train_data=path, scratch=small, max_steps=1, max_length=20)
    go(tmp_path, out="wide", train_data=path, max_steps=1, max_length=4096)
    preview.main([path, "--objective=sft", f"--init_from={tmp_path / 'run'}", "--max_length=20"])
    assert "warning" not in capsys.readouterr().out


def test_answers_count_as_positions(tmp_path, capsys):
    """A prompt with the answer that it may get."""
    more = dict(scratch={**SMALL, "max_position_embeddings": 20}, max_steps=1)
    go(tmp_path, "ppo", max_new_tokens=3, out="short", **more)
    assert "positions" not in capsys.readouterr().out
    go(tmp_path, "ppo", max_new_tokens=16, **more)
    assert capsys.readouterr().out.count("problems_eval.jsonl:1: 26 tokens, and the model has 20 positions") == 1


# Embeddings


def bigger(folder, tokens=("<a>", "<b>", "<c>")):
    """The task's tokenizer with further tokens."""
    folder.mkdir(exist_ok=True)
    fast = Tokenizer.from_file(str(ARITHMETIC / "tokenizer.json"))
    fast.add_tokens([AddedToken(token) for token in tokens])
    fast.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (ARITHMETIC / name).is_file():
            (folder / name).write_text((ARITHMETIC / name).read_text())
    return folder


def saved(tmp_path, tied: bool, family="llama"):
    """A small model's folder, with a tokenizer that has three tokens more than it has embeddings."""
    shape = {**SMALL, "tie_word_embeddings": tied} if family == "llama" else dict(
        model_type="gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=128)
    decoder = model.scratch({**shape, "vocab_size": 16, "eos_token_id": 0, "bos_token_id": 1}, 5).double()
    model.save(decoder, tmp_path / "model", torch.float64, ARITHMETIC)
    bigger(tmp_path / "model")
    return decoder


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("gpt2", True)])
def test_embeddings_grow_to_the_tokenizer_when_asked(family, tied, tmp_path):
    """The new rows are the mean of the old ones; the folder says so, and is one that transformers loads."""
    old = saved(tmp_path, tied, family)
    more = dict(init_from=tmp_path / "model", scratch=None, tokenizer=None, max_steps=1, lr=0.0)
    with pytest.raises(ValueError, match="16 embeddings are too few: .* has 19 tokens; --resize_embeddings adds rows"):
        go(tmp_path, **more)
    out = go(tmp_path, resize_embeddings=True, **more)
    assert model.read_json(out / "model" / "config.json")["vocab_size"] == 19
    loaded, _ = model.load(out / "model")
    assert loaded.shape.vocab_size == 19 and loaded.shape.tied == tied
    for ours, theirs in ((old.model.embed_tokens, loaded.model.embed_tokens), (old.lm_head, loaded.lm_head)):
        assert torch.equal(theirs.weight[:16], ours.weight)
        assert (theirs.weight[16:] - ours.weight.mean(0)).abs().max() < 1e-12
    go(tmp_path, out="next", **{**more, "init_from": out})  # a stage behind it has nothing to resize
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float64)
    ids = torch.tensor([1, 5, 17, 18, 3])
    with torch.no_grad():
        assert (theirs(ids[None]).logits[0] - loaded.logits(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_and_a_teacher_of_the_same_folder_grow_too(tied, tmp_path):
    """With the folder's own tokenizer, and with a bigger one beside it that the folder's does not know."""
    saved(tmp_path, tied)
    beside, apart = dict(tokenizer=None), tmp_path / "apart"
    model.save(model.load(tmp_path / "model")[0], apart, torch.float64, ARITHMETIC)
    for folder, more in ((tmp_path / "model", beside), (apart, dict(tokenizer=bigger(tmp_path / "tokenizer")))):
        given = dict(init_from=folder, scratch=None, resize_embeddings=True, max_steps=1, **more)
        out = go(tmp_path, "dpo", out=f"dpo-{folder.name}", reference=folder, **given)
        assert abs(lines(out)[0]["loss"] - 0.6931471805599453) < 1e-9  # the reference is the policy
        for top in (0, 17):
            teacher = dict(teacher=folder, teacher_top_k=top)
            out = go(tmp_path, "kd", out=f"kd-{folder.name}-{top}", **given, **teacher)
            assert lines(out)[0]["loss"] >= 0
    other = bigger(tmp_path / "other", ("<x>",))
    with pytest.raises(ValueError, match="token '<x>' has id None there and 16"):
        data.Tokenizer(other).same_ids(data.Tokenizer(tmp_path / "model"), resized=True)


def test_a_cached_reference_knows_how_far_it_has_grown(tmp_path):
    """The same rows and weights, with one new token and with three: another softmax."""
    folder = tmp_path / "model"
    decoder = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0, "bos_token_id": 1}, 5).double()
    model.save(decoder, folder, torch.float64, ARITHMETIC)
    for tokens in (("<a>",), ("<a>", "<b>", "<c>")):
        out = go(tmp_path, "dpo", out=f"run-{len(tokens)}", init_from=folder, scratch=None, resize_embeddings=True,
                 max_steps=1, tokenizer=bigger(tmp_path / "tokenizer", tokens))
        assert abs(lines(out)[0]["loss"] - 0.6931471805599453) < 1e-9


def test_resuming_a_model_that_was_resized(tmp_path):
    saved(tmp_path, False)
    given = dict(init_from=tmp_path / "model", scratch=None, tokenizer=None, resize_embeddings=True, save_every=1)
    whole = go(tmp_path, out="whole", max_steps=2, **given)
    go(tmp_path, max_steps=1, **given)
    resumed = go(tmp_path, max_steps=2, resume=True, **given)
    for name, weight in weights(whole / "model").items():
        assert torch.equal(weight, load_file(resumed / "model" / "model.safetensors")[name])


# Keys


def test_a_critic_that_warms_up_for_the_whole_run(tmp_path):
    more = dict(objective={"ppo": 1.0, "value": 0.5}, advantages="gae", max_steps=4)
    with pytest.raises(ValueError, match="critic_warmup = 4, and the run has 4 steps: the policy would never be trained"):
        go(tmp_path, "ppo", critic_warmup=4, **more)
    assert not (tmp_path / "run").exists()
    go(tmp_path, "ppo", critic_warmup=3, **more)


@pytest.mark.parametrize("key", [
    "load_best_model_at_end", "metric_for_best_model", "early_stopping", "early_stopping_patience",
    "mask_truncated_completions", "use_vllm", "vllm_gpu_memory_utilization", "vllm_num_engines",
    "colocate_all_models", "use_peft", "peft_config", "lora_r", "lora_alpha", "lora_rank", "load_in_4bit",
    "deepspeed", "zero_stage", "fsdp", "fsdp_config", "ddp_timeout", "packing", "packing_samples", "sample_packing",
    "padding_free", "group_by_length", "flash_attn", "attn_implementation", "use_liger_kernel",
    "neftune_noise_alpha", "disable_dropout", "sync_ref_model", "ref_model_mixup_alpha", "push_to_hub",
    "hub_model_id", "dataset_num_proc", "dataloader_num_workers", "remove_unused_columns", "trust_remote_code",
    "dataset_text_field", "train_on_inputs", "overwrite_output_dir", "shuffle_dataset", "precompute_ref_log_probs"])
def test_keys_without_a_counterpart(key):
    refused(rf"unknown key '{key}'. There is no counterpart here: [^.]{{12}}[^?]*`python train.py", f"--{key}=1")


def test_no_key_of_ours_is_said_to_be_absent():
    hyperparameters = [key for objective in OBJECTIVES.values() for key in objective.hyperparameters]
    for key in (*config.TYPES, *hyperparameters, *config.ELSEWHERE):
        assert not config.absent(key), key


@pytest.mark.parametrize("key, near", [
    ("learnin_rate", "lr"), ("max_lenght", "max_length"), ("bach_size", "batch_size"),
    ("numgenerations", "samples_per_prompt"), ("optim", "optimizer"), ("eval_strategy", "eval_every")])
def test_near_words_are_near(key, near):
    refused(rf"unknown key '{key}'. Did you mean '{near}'\?", f"--{key}=1")


@pytest.mark.parametrize("key", ["quantise", "greedy", "eval_on_each_save", "use_dual", "wandb_log_unique_prompts"])
def test_far_words_are_not_proposed(key):
    refused(rf"unknown key '{key}'. `python", f"--{key}=1")


def test_kto_with_one_prompt_names_the_ways_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+2=", "completion": "3", "label": True}, {"prompt": "1+2=", "completion": "4", "label": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="rows.jsonl:1: every row has this row's prompt.* add rows .*, or .*--objective=bco"):
        go(tmp_path, "kto", train_data=path, max_steps=1)
    for name in ("bco", "apo_zero_unpaired", "kto_vanilla"):
        go(tmp_path, name, out=name, train_data=path, max_steps=1)


# Runs that end before their first step

BROKEN = REWARD.replace("def reward", "def plain") + """
import os
def reward(prompt, completion, row):
    return plain(prompt, completion, row) / float(not os.environ.get("BROKEN"))
"""


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_run_that_failed_before_its_first_step_can_be_started_again(evaluates, tmp_path, monkeypatch):
    """In the first eval, or in the first rollout: the folder does not refuse the retry, which is as if it were empty."""
    def given(out):
        (tmp_path / "broken.py").write_text(BROKEN)
        more = dict(eval_data=ROWS["prompts"]) if evaluates else {}
        return [f"--config={tmp_path / 'broken.py'}" if word.startswith("--config") else word
                for word in options(tmp_path, "ppo", out, max_steps=2, **more)]
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        train.train(config.load([*given("run"), "--lr=0.5"]))
    assert (tmp_path / "run" / "checkpoint-0").is_dir()  # --resume would go on from it, with these settings
    monkeypatch.delenv("BROKEN")
    train.train(config.load(given("run")))
    train.train(config.load(given("whole")))
    assert not (tmp_path / "run" / "checkpoint-0").exists()
    for split in ("eval", "train"):
        again, whole = ([line["step"] for line in lines(tmp_path / out, split)] for out in ("run", "whole"))
        assert again == whole
    one, other = weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_holds_training_is_never_written_over(tmp_path):
    """A line of a step, a checkpoint of one, a model, or anything that is not a run's."""
    out = go(tmp_path, max_steps=2, save_every=1)
    with pytest.raises(ValueError, match="is not empty"):
        go(tmp_path, max_steps=2)
    kept = {"metrics.jsonl": out / "metrics.jsonl", "checkpoint-1": out / "checkpoint-1", "model": out / "model"}
    for name, path in kept.items():
        folder = tmp_path / f"only-{name}"
        folder.mkdir()
        checkpoint.write_json(folder / "run.json", {"finished": False})
        assert not checkpoint.written_to(folder)
        path.rename(folder / name)
        assert checkpoint.written_to(folder), name
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metrics.jsonl").touch()
    assert checkpoint.written_to(tmp_path / "own")


# Ctrl-C, and a tracker that does not let a run in

SLOW = """
import pathlib, time
def check(prompt, completion, row):
    pathlib.Path({started!r}).touch()
    time.sleep(60)
"""


def interrupted(arguments, started, tmp_path):
    """Start a run, send it SIGINT when the file is there; its exit status, and what it printed on stderr."""
    texts = [tmp_path / "out.txt", tmp_path / "err.txt"]
    process = start(arguments, texts)
    end = time.monotonic() + 60
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    return process.exitcode, texts[1].read_text()


def test_ctrl_c_in_the_first_eval_is_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(started=str(tmp_path / "started")))
    given = options(tmp_path, "sft", config=tmp_path / "slow.py", eval_prompts=ROWS["prompts"], max_new_tokens=4)
    status, text = interrupted(given, tmp_path / "started", tmp_path)
    assert status == 130 and "Traceback" not in text and text.split("\n")[-2:] == ["stopped by Ctrl-C", ""]
    (tmp_path / "slow.py").write_text("def check(prompt, completion, row):\n    return True\n")
    train.train(config.load(given))  # the folder does not refuse it


def test_ctrl_c_while_a_config_is_read_is_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(started=str(tmp_path / "started")) + "check('', '', {})\n")
    status, text = interrupted([f"--config={tmp_path / 'slow.py'}"], tmp_path / "started", tmp_path)
    assert status == 130 and text.strip() == "stopped by Ctrl-C"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="children are listed in /proc")
def test_ctrl_c_while_reward_workers_start_is_one_line(tmp_path):
    """A terminal's signal reaches every process; those of the pool leave it to the run."""
    given = [sys.executable, "train.py", *options(tmp_path, "ppo", eval_data=ROWS["prompts"], reward_workers=2)]
    process = subprocess.Popen(given, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children, end = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while len(children.read_text().split()) < 3 and time.monotonic() < end:  # two workers, and the pool's tracker
        time.sleep(0.02)
    time.sleep(0.3)  # they are importing torch
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and text.strip() == "stopped by Ctrl-C"


class UsageError(Exception):
    """As wandb's."""


def test_a_tracker_that_is_not_logged_in_is_one_line(tmp_path, monkeypatch):
    """And the same command starts when it is."""
    def closed(out, config):
        (out / "tensorboard").mkdir()
        raise UsageError("No API key configured. Use `wandb login` to log in.\nMore about that\n")
    spec = types.SimpleNamespace(origin=__file__)  # as if it were installed
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setitem(report.TRACKERS, "tensorboard", closed)
    message = "^track = 'tensorboard': No API key configured. Use `wandb login` to log in.; set it up, or leave track out$"
    with pytest.raises(ValueError, match=message):
        go(tmp_path, track="tensorboard", max_steps=1)
    monkeypatch.setitem(report.TRACKERS, "tensorboard", lambda out, config: lambda line: None)
    go(tmp_path, track="tensorboard", max_steps=1)
