"""A run outlives what happens to runs: kill -9 at any moment, signals, lost ranks, a full disk, numbers that are not finite.

`python -m pytest tests -m crash` kills sft and ppo 50 times and every other objective 10 times, and more that takes long; the tests that
always run do so less often.
"""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import config
import losses
import model
import optimizers
import train
from conftest import ROOT
from launch import run, start
from test_train import REWARD, ROWS, SMALL, TRAINED, lines, options, weights

def whole(out: Path) -> int:
    """Everything that goes by the name of a checkpoint can be read. Returns the newest one's step."""
    newest = 0
    for folder in checkpoint.found(out):
        state = json.loads((folder / "state.json").read_text())
        labels = json.loads((folder / "config.json").read_text()).get("id2label", {})
        model.load(folder, {"score": len(labels)} if labels else {"lm_head": 0})
        parts = [load_file(file) for file in folder.glob("*.safetensors")]  # model, optimizer, and critic and rollout where there is one
        assert len(parts) >= 2 and all(t.isfinite().all() for part in parts for t in part.values() if t.is_floating_point())
        newest = state["step"]
        assert folder.name == f"checkpoint-{newest}"
    return newest


def same(one: Path, other: Path):
    a, b = weights(one / "model"), weights(other / "model")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for x, y in zip(lines(one), lines(other), strict=True):
        assert (x["step"], x["loss"], x["grad_norm"]) == (y["step"], y["loss"], y["grad_norm"])


def survive(name: str, kills: int, tmp_path: Path, steps: int = 24) -> dict:
    """Kill runs of an objective at random moments, until there were so many kills; each run that gets to its end ends as the one
    that was left alone did."""
    more = dict(save_every=2, max_steps=steps, micro_batch_tokens=256)
    undisturbed = options(tmp_path, name, "whole", **more)
    for _ in range(2):  # the first one starts the server and fills caches
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        begin = time.monotonic()
        process = start(undisturbed)
        process.join()
        assert process.exitcode == 0
    longest, rng, seen = time.monotonic() - begin, random.Random(name), {"kills": 0, "while saving": 0, "runs": 0}
    while seen["kills"] < kills or process.exitcode != 0:
        process = start([*options(tmp_path, name, "run", **more), "--resume"])
        process.join(rng.uniform(0, longest) if seen["kills"] < kills else None)
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            seen["kills"] += 1
            seen["while saving"] += any((tmp_path / "run").glob("checkpoint-*.part"))
            whole(tmp_path / "run")
        else:
            assert process.exitcode == 0
            same(tmp_path / "whole", tmp_path / "run")
            seen["runs"] += 1
            if seen["kills"] < kills:
                shutil.rmtree(tmp_path / "run")
    return seen


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_killed_a_few_times(name, tmp_path):
    survive(name, 4, tmp_path, 8)


@pytest.mark.crash
@pytest.mark.parametrize("name", TRAINED)
def test_killed_many_times(name, tmp_path):
    print(f"{name}:", survive(name, 50 if name in ("sft", "ppo") else 10, tmp_path))


def wait_for(condition, process, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def begin(arguments: list[str], ranks: int = 1, restarts: int = 0):
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as README says
    return subprocess.Popen([sys.executable, *(program if ranks > 1 else []), "train.py", *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", **own_store})


def steps_of(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("number, ranks, log_every", [
    (signal.SIGTERM, 1, 7), (signal.SIGINT, 1, 1), pytest.param(signal.SIGTERM, 2, 3, marks=pytest.mark.crash)])
def test_a_signal_ends_the_step_and_saves(number, ranks, log_every, tmp_path):
    """...where the run goes on to the same end. The exit code is 128 + the signal's number (torchrun has its own)."""
    more = dict(max_steps=200, log_every=log_every)
    run(options(tmp_path, "dpo", "whole", **more), ranks)
    process = begin(options(tmp_path, "dpo", **more), ranks)
    wait_for(lambda: steps_of(tmp_path / "run") >= 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number if ranks == 1 else process.returncode, err[-2000:]
    assert f"{signal.Signals(number).name}: finishing this step" in err and "Traceback" not in err or ranks > 1, err[-2000:]
    at = whole(tmp_path / "run")
    assert 3 <= at < 200 and f"checkpoint-{at} is saved, go on with --resume" in out
    run([*options(tmp_path, "dpo", **more), "--resume"], ranks)
    same(tmp_path / "whole", tmp_path / "run")


def test_a_second_signal_stops_at_once(tmp_path):
    given = options(tmp_path, "ppo")
    (tmp_path / "reward.py").write_text(f"import time, pathlib\n{REWARD}\n"
                                        f"def reward(prompt, completion, row):\n"
                                        f"    pathlib.Path({str(tmp_path / 'called')!r}).touch()\n    time.sleep(600)\n")
    process = begin(given)
    wait_for((tmp_path / "called").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # a launcher repeats what the terminal has sent
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


@pytest.mark.crash
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_lost_rank(restarts, tmp_path):
    """The others stop with a message and nothing is half-written; the same command, again, ends where an undisturbed run does. With
    --max_restarts it is torchrun that gives it, each time that a rank is lost."""
    more = dict(max_steps=40, save_every=2)
    run(options(tmp_path, "dpo", "whole", **more), ranks=2)
    process = begin([*options(tmp_path, "dpo", **more), "--resume"], 2, restarts)
    for loss in range(restarts or 1):
        wait_for(lambda: steps_of(tmp_path / "run") >= 5 + 10 * loss, process)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    if restarts:
        assert process.returncode == 0, err[-3000:]
        return same(tmp_path / "whole", tmp_path / "run")
    assert process.returncode and f"Signal 9 (SIGKILL) received by PID {ranks[-1]}" in err, err[-3000:]  # the launcher's
    assert "another rank is gone" in err and "go on with --resume" in err or "exitcode  : -15" in err  # unless it ends the rank first
    assert whole(tmp_path / "run") >= 2 and not (tmp_path / "run" / "model").exists()
    run([*options(tmp_path, "dpo", **more), "--resume"], ranks=2)
    same(tmp_path / "whole", tmp_path / "run")


def mounted(folder: Path, size: str, *more: str) -> bool:
    folder.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs", folder], capture_output=True).returncode == 0


def test_a_full_disk(tmp_path):
    """The run says so and stops; checkpoints that were whole are whole; with room again it goes on to the same end."""
    more = dict(max_steps=12, save_every=2, keep_checkpoints=100)
    run(options(tmp_path, "sft", "whole", **more))
    disk = tmp_path / "disk"
    if not mounted(disk, "600k"):
        pytest.skip("no right to mount a small tmpfs")
    try:
        given = options(tmp_path, "sft", "disk/run", **more)
        for _ in range(2):  # a resumed run finds no room either
            done = run([*given, "--resume"], check=False)
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
            assert "error: the disk is full" in done.stderr and "go on with --resume" in done.stderr
            assert 2 <= whole(disk / "run") < 12 and not list((disk / "run").glob("*.part"))
        assert mounted(disk, "64m", "remount")
        run([*given, "--resume"])
        same(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.crash
def test_killed_on_a_full_disk(tmp_path):
    """Ten kills while there is no room for another checkpoint: those that were whole stay so, and with room the run ends as it should."""
    more = dict(max_steps=12, save_every=2, keep_checkpoints=100)
    run(options(tmp_path, "sft", "whole", **more))
    disk, rng, kills = tmp_path / "disk", random.Random(0), 0
    if not mounted(disk, "600k"):
        pytest.skip("no right to mount a small tmpfs")
    try:
        given = [*options(tmp_path, "sft", "disk/run", **more), "--resume"]
        run(given, check=False)
        newest = whole(disk / "run")
        while kills < 10:
            process = start(given)
            process.join(rng.uniform(0, 1))
            kills += process.exitcode is None
            process.kill()
            process.join()
            assert whole(disk / "run") >= newest
        assert mounted(disk, "64m", "remount")
        run(given)
        same(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def spoiled(tmp_path: Path, digit: str = "7") -> Path:
    """A model that makes NaN of every row with that digit."""
    decoder = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, 5)
    vocab = json.loads((ROOT / "tasks/arithmetic/tokenizer.json").read_text())["model"]["vocab"]
    with torch.no_grad():
        decoder.model.embed_tokens.weight[vocab[digit]] = float("nan")
    (tmp_path / "spoiled").mkdir()
    model.save(decoder, tmp_path / "spoiled", torch.float32, ROOT / "tasks/arithmetic")
    return tmp_path / "spoiled"


def rows_with(tmp_path: Path, bad: list[int], count: int = 48) -> Path:
    """Rows without a 7 but for the bad ones, counted from 1."""
    rows = [line for line in open(ROOT / ROWS["sft"])]
    clean, sevens = ([row for row in rows if ("7" in row) == seven] for seven in (False, True))
    clean = clean * -(-count // len(clean))
    (tmp_path / "rows.jsonl").write_text("".join(sevens[i] if i + 1 in bad else clean[i] for i in range(count)))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(ranks, tmp_path):
    bad = int(np.random.default_rng((0, 0)).permutation(48)[20]) + 1  # of step 3
    given = dict(init_from=spoiled(tmp_path), train_data=rows_with(tmp_path, [bad]), dtype="float32", batch_size=8, save_every=1,
                 keep_checkpoints=9, max_steps=6, micro_batch_tokens=64)
    run(options(tmp_path, "sft", **given), ranks)
    assert [line["skipped_steps"] for line in lines(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
    assert [line["loss"] is None for line in lines(tmp_path / "run")] == [False, False, True, False, False, False]
    parts = [[load_file(tmp_path / "run" / f"checkpoint-{step}" / f"{n}.safetensors") for n in ("model", "optimizer")] for step in (2, 3, 4)]
    for before, skipped, after in zip(*parts):
        same_bits = lambda a, b: all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)
        assert same_bits(before, skipped) and not same_bits(skipped, after)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.crash)])
def test_too_many_of_them_stop_the_run_and_are_named(ranks, tmp_path):
    rows = rows_with(tmp_path, [3, 4, 9, 12, 17, 22, 25, 31, 36, 44])
    given = dict(init_from=spoiled(tmp_path), train_data=rows, dtype="float32", batch_size=48, max_steps=20, max_skipped_steps=3,
                 micro_batch_tokens=64)
    done = run(options(tmp_path, "sft", **given), ranks, check=False)
    assert done.returncode == 1 and "error: 3 steps in a row, up to step 3" in done.stderr, done.stderr[-3000:]
    said = done.stderr[done.stderr.index("error: 3 steps"):].split("checkpoint-3")[0]
    named = {int(word.split(":")[-1].strip(",.")) for word in said.split() if word.startswith(str(rows))}
    assert len(named) == 5 and named < {3, 4, 9, 12, 17, 22, 25, 31, 36, 44} and "and 5 more" in said
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "state.json").read_text())
    assert state["skipped"] == [3, 0] and [line["skipped_steps"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_every_objective_skips(tmp_path, monkeypatch):
    """Whatever a loss reads: one that is not finite changes no weight, and a run of such steps alone ends with an error."""
    monkeypatch.chdir(ROOT)
    for name in ("dpo", "kto", "rm", "prm", "kd"):
        spoil = losses.OBJECTIVES[name].loss

        def bad(*given, **more):
            values, *rest = spoil(*given, **more)
            return values * float("nan"), *rest
        monkeypatch.setitem(losses.OBJECTIVES, name, losses.OBJECTIVES[name]._replace(loss=bad))
        arguments = options(tmp_path, name, name, max_steps=2, save_every=1)
        with pytest.raises(SystemExit, match="error: 2 steps in a row, up to step 2, had a loss or gradient that is not finite"):
            train.main(arguments)
        one, two = (load_file(tmp_path / name / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
        assert all(torch.equal(one[key], two[key]) for key in one) and lines(tmp_path / name)[-1]["skipped_steps"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def test_muon_is_torch_s_and_passes_a_bad_step_by():
    """Ten steps on tall, wide and square matrices against torch.optim.Muon; biases and norms are AdamW's; a step that is not finite
    changes nothing of either."""
    cfg = types.SimpleNamespace(optimizer="muon", lr=0.02, critic_lr=0.0, weight_decay=0.1, betas=(0.9, 0.95))
    ours, theirs = (model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, 3) for _ in range(2))
    mine = optimizers.made(cfg, ours)
    matrices = {name for name, p in ours.named_parameters() if ".layers." in name and p.dim() == 2}
    groups = [[p for name, p in theirs.named_parameters() if (name in matrices, p.dim() > 1) == kind] for kind in ((True, True), (False, True), (False, False))]
    peers = [torch.optim.Muon(groups[0], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")] + [
        torch.optim.AdamW(group, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1 * decays) for group, decays in zip(groups[1:], (1, 0))]
    generator = torch.Generator().manual_seed(0)
    for step in range(11):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            b.grad = torch.randn(b.shape, generator=generator)
            a.grad = b.grad * (float("nan") if step == 10 else 1)
        before = [p.clone() for p in ours.parameters()], [{key: x.clone() for key, x in mine.state[p].items()} for p in ours.parameters()]
        mine.found_inf = torch.tensor(float(step == 10))
        mine.step()
        for peer in peers if step < 10 else ():
            peer.step()
    for name, a in ours.named_parameters():
        b = dict(theirs.named_parameters())[name]
        assert (a - b).abs().max() < (0.03 if name in matrices else 1e-5) * b.abs().max(), name  # bf16 iterations
    assert all(torch.equal(p, old) for p, old in zip(ours.parameters(), before[0]))
    assert all(torch.equal(mine.state[p][key], x) for p, old in zip(ours.parameters(), before[1]) for key, x in old.items())


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: values read, sizes that depend on values, copies to the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_value = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "repeat_interleave.Tensor")
        if by_value or any(name in str(func) for name in waits):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


WIRINGS = ("sft", "dpo", "simpo", "rm", "rm_plackett_luce", "prm", "bco_pair", "kto", "kd", "aot")  # the others under -m slow


@pytest.mark.parametrize("name", [name if name in WIRINGS else pytest.param(name, marks=pytest.mark.slow)
                                  for name, o in losses.OBJECTIVES.items() if o.data != "prompts"])
def test_steps_do_not_ask_the_device(name, tmp_path, monkeypatch):
    """Between two log lines no operation reads a value back, whether a step is finite or not (here every third one is not); at the line one does."""
    monkeypatch.chdir(ROOT)
    rate, asked, spoil, count = train.learning_rate, Asked(), losses.OBJECTIVES[name].loss, []

    def bad(*given, **more):
        values, *rest = spoil(*given, **more)
        count.append(1)
        return values * (float("nan") if len(count) % 3 == 0 else 1), *rest

    def watched(cfg, peak, step, steps):
        if step == 2 and not seen:
            seen.append(asked.__enter__())
        elif step == 11 and len(seen) == 1:
            seen.append(len(asked.calls))
        return rate(cfg, peak, step, steps)
    seen = []
    monkeypatch.setattr(train, "learning_rate", watched)
    monkeypatch.setitem(losses.OBJECTIVES, name, losses.OBJECTIVES[name]._replace(loss=bad))
    train.train(config.load(options(tmp_path, name, max_steps=14, log_every=14, micro_batch_tokens=4096)))
    asked.__exit__(None, None, None)
    assert len(seen) == 2 and asked.calls[:seen[1]] == [] and "aten._local_scalar_dense.default" in asked.calls
    assert lines(tmp_path / "run")[-1]["skipped_steps"] == 4
