"""Atomic writes, so that a file is complete or absent: temporary name, fsync, rename. Checkpoints, and how a run is resumed.

A checkpoint-<step> is a model folder (it loads wherever out_dir/model does, in the master weights' dtype) that also holds the
optimizer's moments, a critic if there is one, and state.json. Never a pickle.
"""
import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import config
import model
import report


# What --resume does with what has changed since the checkpoint. All that determines the result is compared and said:
#   batch_size, rollout_prompts, rollout_epochs, seed, weights of train_data: refused; steps count rows in these portions
#   number of examples (train_data's rows, keys that leave some out): refused; the order of rows depends on it
#   other rows or tokens of as many examples: the steps to come read them; in the middle of a rollout, other prompts
#     and another temperature are refused, since its answers belong to those that were there
#   objective, model, optimizer: refused (finished_already, read, put_back)
#   max_steps, epochs: the run ends sooner or later, and the schedule is that of the new length
#   all others, such as lr or a loss's hyperparameters: count from the next step (sampling keys: the next rollout)
# The number of ranks, the device, and how a run is logged, evaluated and saved change no result: they are not compared.
COUNTED = ("batch_size", "rollout_prompts", "rollout_epochs", "seed")
ANEW = "or begin a new run with its weights: --init_from={} --out_dir=... (and --reference, if it is to stay the old one)"


class State(NamedTuple):
    """What carries from one step to the next. Fixed rows carry nothing: they are f(seed, step)."""
    decoder: model.Decoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    running: dict  # name -> (2,) sum and count of a metric over all steps
    skipped: torch.Tensor  # (2,) non-finite steps: in total, and the current streak
    supply: object  # of steps: train.Rows or rollout.Rollouts


def write_text(path: Path, text: str):
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        fsync(part)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def write_json(path: Path, value: dict):
    write_text(path, json.dumps(value, indent=1) + "\n")


def publish(folder: Path, write: Callable):
    """Write a folder by write(temporary folder) and a rename, so that it is complete or absent."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    try:
        write(part)
        with contextlib.suppress(OSError):  # there are filesystems without modes
            for path in part.glob("*.safetensors"):
                path.chmod(part.stat().st_mode & 0o666)  # the library writes files that nobody else may read
        for path in [*part.iterdir(), part]:
            fsync(path)
    except Exception:
        shutil.rmtree(part)  # on a full disk the space is needed
        raise
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run


def run_json(out: Path) -> dict:
    """The contents of a run's run.json, if there is one; it is finished only if its model is there too."""
    kept = model.read_json(out / "run.json") if (out / "run.json").is_file() else {}
    return {**kept, "finished": bool(kept.get("finished")) and (out / "model").is_dir()}


UNTRAINED = {"lock", "run.json", "run.json.part", "metrics.jsonl", "predictions.jsonl", "predictions.jsonl.part",
             "checkpoint-0", "tensorboard", "wandb"}  # what a run leaves that ended before its first step


def written_to(out: Path) -> bool:
    """Whether there is anything in the folder that a new run must not overwrite. What a run leaves that ended before
    its first step does not count, nor does a lock file alone."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names <= {"lock"}:
        return False
    if not names <= UNTRAINED or "run.json" not in names or run_json(out)["finished"]:
        return True
    metrics = out / "metrics.jsonl"
    return metrics.is_file() and '"split": "train"' in metrics.read_text()


def start_anew(out: Path):
    """Remove what a run that ended before its first step has left in a folder that is not `written_to`."""
    shutil.rmtree(out / "checkpoint-0", ignore_errors=True)
    for name in ("metrics.jsonl", "predictions.jsonl"):
        (out / name).unlink(missing_ok=True)


def check_free(out: Path, cfg, machine):
    """Raise an error if a new run would overwrite what is in the folder."""
    if machine.any(written_to(out) and not cfg.resume):
        raise ValueError(f"out_dir {cfg.out_dir} is not empty; go on with --resume, name another --out_dir, or remove it")


def hold(out: Path, machine, alone: bool = True):
    """Lock a run's folder until this process ends: as its only writer, or, if not alone, to read it while nobody writes."""
    busy = False
    if machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        try:
            how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            fcntl.lockf(os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o666), how | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
        except OSError:  # a read-only stage folder, or a filesystem without locks
            pass
    if machine.any(busy):
        raise ValueError(f"{out}: another run is writing there or has started from it; wait until it ends or name another out_dir")


def finished_already(out: Path, now: dict, machine, say: Callable) -> bool:
    """Whether a run that is to be resumed is finished, with the same settings. Changed settings are reported. Errors: another
    objective; a changed setting that no checkpoint fits (COUNTED); changed settings of a run that is finished and has no
    checkpoint to resume from."""
    folder, kept = newest(out, machine)
    before, over = kept.get("settings", {}), kept["finished"]
    changed = config.changes(before, now) if before else []
    if before and before["weights"].keys() != now["weights"].keys():
        raise ValueError(f"{out}: {'+'.join(before['weights'])} was trained there, and this run trains "
                         f"{'+'.join(now['weights'])}; name another --out_dir")
    weighted = any(isinstance(settings.get("train_data"), dict) for settings in (before, now))
    keys = (*COUNTED, "train_data") if weighted else COUNTED
    counted = config.changes({key: before.get(key) for key in keys}, {key: now[key] for key in keys})
    if before and folder and counted:
        raise ValueError(f"{folder}: {'; '.join(counted)}. Its steps count rows by the values that it was begun with; with "
                         f"others, some rows would be trained twice and some never. Set them back, {ANEW.format(folder)}")
    if over and not changed:
        say(f"{out} is finished already: {out / 'model'}")
    elif over and not folder:
        raise ValueError(f"{out} is finished and holds no checkpoint to go on from ({'; '.join(changed)}); name another --out_dir")
    elif changed:
        say(f"{out} continues with changed settings: {'; '.join(changed)}")
    return over and not changed


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def found(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest(out: Path, machine) -> tuple[Path | None, dict]:
    """The newest checkpoint, if any, and run_json, as rank 0 sees them; an error if another rank cannot see the checkpoint."""
    folder, kept = machine.share(((found(out) or [None])[-1], run_json(out)))[0]
    if machine.any(bool(folder) and not folder.is_dir()):
        raise ValueError(f"{folder}: not every rank can see it; put out_dir on a file system that all machines share")
    return folder, kept


def save(out: Path, step: int, state: State, write_model: Callable, keep: int, config: dict, world: int):
    """Save a checkpoint. write_model(folder, dtype) writes the model; config: the run's, in state.json for information only."""
    if (out / f"checkpoint-{step}").exists():  # it holds the same state
        return
    weights = dict(state.decoder.named_parameters())
    critic = {n: p.detach().contiguous() for n, p in weights.items() if model.of_critic(n)}
    moments = {f"{n}.{key}": value for n, p in weights.items() for key, value in state.optimizer.state[p].items()}
    carried = {"step": step, "world_size": world, "examples": state.supply.examples,
               "scaler": state.scaler.state_dict(), "skipped": state.skipped.tolist(),
               "running": {name: pair.tolist() for name, pair in state.running.items()}, "config": config,
               "reward": {k: v for k, v in state.decoder.config.items() if k in model.REWARD}}

    def write(folder):
        with report.bar(what="saving", total=3) as bar:
            write_model(folder, next(iter(weights.values())).dtype)
            bar.update()
            if critic:
                save_file(critic, folder / "critic.safetensors")
            save_file(moments, folder / "optimizer.safetensors")
            bar.update()
            write_json(folder / "state.json", {**carried, "supply": state.supply.save(folder, step)})
            bar.update()
    clear(out)  # the room may be needed
    publish(out / f"checkpoint-{step}", write)
    for folder in found(out)[:-keep]:
        folder.rename(folder.with_name(folder.name + ".old"))  # half-removed, it must not look like a checkpoint
    clear(out)


def clear(out: Path):
    """Remove what a killed save has left."""
    for folder in out.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+\.(old|part)", folder.name):
            shutil.rmtree(folder)


def resume(out: Path, state: State, machine, say: Callable, steps: int, settings: dict) -> int:
    """Restore the newest checkpoint, if any, and drop the metrics logged after it. steps, settings: those of the run as it is now.
    Returns how many steps are done."""
    folder, kept = newest(out, machine)
    step = int(folder.name.removeprefix("checkpoint-")) if folder else 0
    before = kept.get("settings", {}) | {"save_dtype": settings["save_dtype"]}  # a change of it needs no step
    if step > steps or step == steps and kept["finished"] and config.changes(before, settings):
        raise ValueError(f"{out}: its newest checkpoint is of step {step}, and the run ends at step {steps}: no step is left to "
                         f"train with the settings given; raise max_steps or epochs, or name another --out_dir")
    say(f"resuming from {folder}" if folder else f"{out} holds no checkpoint: starting from step 0")
    if folder:
        put_back(folder, step, state)
    if machine.rank == 0 and (out / "metrics.jsonl").is_file():
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        reached = [line for line, said in whole if step and said["step"] <= step and said["split"] != "saved"]
        write_text(out / "metrics.jsonl", "".join(reached))
    return step


def put_back(folder: Path, step: int, state: State):
    """Load a checkpoint into the state: weights, optimizer moments and all else that carries over."""
    weights, moments, kept = read(folder, state.decoder)
    before, now = kept.get("examples", state.supply.examples), state.supply.examples
    if before != now:
        raise ValueError(f"{folder}: train_data held {before:,} examples and holds {now:,} now, and which of them a step "
                         f"trains depends on their number. Set back its rows and the keys that leave rows out, "
                         f"{ANEW.format(folder)}")
    parameters = dict(state.decoder.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, moment in moments.items():  # none for frozen weights, nor for a policy during critic_warmup
        name, _, which = key.rpartition(".")
        if name in parameters:
            p = parameters[name]
            state.optimizer.state[p][which] = moment.to(p.device, moment.dtype if which == "step" else p.dtype)
    for group in state.optimizer.param_groups:
        if any(("momentum" in state.optimizer.state[p]) != group["muon"] for p in group["params"] if p in state.optimizer.state):
            raise ValueError(f"{folder}: another optimizer was used there; go on with that one, or name another --out_dir")
    state.decoder.config |= kept.get("reward", {})
    for name, pair in state.running.items():
        if name not in kept.get("running", {}):
            raise ValueError(f"{folder / 'state.json'}: {name} is missing; another objective was trained there, name another "
                             f"--out_dir")
        pair.copy_(torch.tensor(kept["running"][name], dtype=pair.dtype))
    state.skipped.copy_(torch.tensor(kept.get("skipped", [0.0, 0.0])))
    if state.scaler.is_enabled() and kept["scaler"]:  # a run in another dtype has none
        state.scaler.load_state_dict(kept["scaler"])
    state.supply.restore(folder, step, kept["supply"])


def read(folder: Path, decoder: model.Decoder) -> list[dict]:
    """A checkpoint's weights, optimizer tensors and state.json; raises an error that names the bad file and the remedy."""
    readers = {"model.safetensors": lambda path: model.read_state(folder, decoder.shape), "optimizer.safetensors": load_file,
               "state.json": model.read_json}
    if any(model.of_critic(name) for name, _ in decoder.named_parameters()):
        readers["critic.safetensors"] = load_file
    parts, file = [], folder
    try:
        for name, of in readers.items():
            file = folder / name
            parts.append(of(file))
        missing = {"supply", "scaler"} - parts[2].keys()
        if missing:
            raise ValueError(f"{' and '.join(sorted(missing))} missing")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}; remove the folder to go on from an older one, or name another --out_dir") from None
    parts[0] |= parts[3] if len(parts) > 3 else {}
    other = [name for name, p in decoder.named_parameters() if name not in parts[0] or parts[0][name].shape != p.shape]
    if other:
        raise ValueError(f"{folder / 'model.safetensors'}: {other[0]} does not fit this model; another model was trained there: "
                         f"name another --out_dir")
    return parts[:3]
