"""What a run reports: progress bars, metrics.jsonl, the tracker that was asked for, and a summary at its end."""
import importlib.util
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def bar(steps=None, what: str = "", show: bool = True, **more) -> tqdm:
    """A progress bar with the time left, shown after one second, that fits 80 columns; in a log, a line every 30 seconds."""
    return tqdm(steps, desc=what[:20], disable=not show, mininterval=0.2 if sys.stderr.isatty() else 30, **{
        "leave": False, "delay": 1, "bar_format": "{desc} |{bar:6}| {n_fmt}/{total_fmt} {remaining} left{postfix}", **more})


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def recorder(out: Path, track: str, config: dict) -> Callable:
    """A function record(line) that appends a line to metrics.jsonl and sends it to the tracker, if there is one."""
    try:
        follow = TRACKERS[track](out, config) if track else lambda line: None
    except Exception as error:  # its own kinds: nobody is logged in, its server cannot be reached
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"track = {track!r}: {reason:.300}; set it up, or leave track out") from error

    def record(line: dict):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        follow(line)
    return record


def check_tracker(track: str):
    spec = importlib.util.find_spec(track) if track else None
    if track and not (spec and spec.origin):  # a folder of that name is no package
        raise ValueError(f"track = {track!r} is not installed; pip install {track}, or leave it out")


def numbers(line: dict) -> dict[str, float]:
    """The numbers of a line under the tracker's names: train/loss, eval/loss, ..."""
    return {f"{line['split']}/{name}": value for name, value in line.items()
            if name not in ("split", "step") and isinstance(value, (int, float))}


def by_wandb(out: Path, config: dict) -> Callable:
    import wandb
    run = wandb.init(project="nanoalign", name=out.name, group=str(out), dir=out, config=config)
    return lambda line: run.log(numbers(line), step=line["step"])


def by_tensorboard(out: Path, config: dict) -> Callable:
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard")

    def follow(line):
        for name, value in numbers(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()
    return follow


TRACKERS = {"wandb": by_wandb, "tensorboard": by_tensorboard}


# ---------------------------------------------------------------------------------------------------------------------
# The end


def written(out: Path) -> tuple[list[dict], list[dict]]:
    """The eval lines and the train lines that a run has written so far, for resuming it."""
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return tuple([line for line in lines if line["split"] == split] for split in ("eval", "train"))


def rounded(dtype: str, master: str, exact: dict, last: dict) -> str:
    """What saving in a dtype changes: the metrics that differ by more than 1 % between the eval of the weights that were
    trained and the eval of those that are saved."""
    names = sorted(name for name in exact.keys() & last.keys() - {"step", "split", "seconds"}
                   if exact[name] is not None and last[name] is not None)
    far = [name for name in names if not abs(exact[name] - last[name]) <= 0.01 * abs(exact[name])]
    numbers = ", ".join(f"{name} {exact[name]:.4g} -> {last[name]:.4g}" for name in far)
    told = numbers or ("no metric of the eval differs by more than 1 %" if names else "the weights are rounded")
    return f"saved as {dtype}: {told}; --save_dtype={master} keeps what was trained"


def summary(out: Path, what: str, first: dict, last: dict, shown: tuple, skipped: tuple, before: list[tuple],
            after: list[tuple], use: str) -> str:
    """The final report: what was learned, how many of the steps were skipped, samples (prompt, answer) from before (if any were
    taken) and after, where the model is, and how to use it."""
    names = [name for name in dict.fromkeys(shown) if first.get(name) is not None and last.get(name) is not None]
    lines = [f"{out}: {what if names else 'done'}"]
    lines += [f"  {name:20} {first[name]:.4g} -> {last[name]:.4g}" for name in names]
    lines.append(f"  {'skipped_steps':20} {skipped[0]:,} of {skipped[1]:,}")
    for i, (prompt, new) in enumerate(after):
        asked = prompt if len(prompt) <= 150 else "... " + prompt[-146:]
        lines += ["", *wrapped("  prompt  ", asked)] + (wrapped("  before  ", before[i][1]) if before else [])
        lines += wrapped("  after   " if before else "  answer  ", new)
    picture = f"python plot.py {shlex.quote(str(out))}"
    return "\n".join([*lines, "", f"  model   {out / 'model'}", f"  try     {use}", f"  picture {picture}"])


def wrapped(label: str, text: str) -> list[str]:
    """The text after a label, wrapped to at most three lines."""
    text = " ".join(text.split()) or "(nothing)"
    return textwrap.wrap(text, 79, initial_indent=label, subsequent_indent=" " * len(label), max_lines=3, placeholder=" ...")
