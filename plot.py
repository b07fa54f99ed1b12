"""metrics.jsonl of one or several runs as a picture (needs matplotlib):

  python plot.py out/sft out/dpo --out=runs.png

A panel for each metric that any of the runs has, those of PANELS first; eval
lines are dots on a line, train lines thin, with their running mean.
--only=reward,kl draws these alone.
"""
import argparse
import itertools
import json
import math
import sys
from pathlib import Path

PANELS = ("loss", "exact_match", "rewards/accuracies", "accuracy", "rewards/margins", "rewards/chosen", "rewards/rejected",
          "logps/chosen", "logps/rejected", "reward", "kl", "entropy", "policy/clip_fraction", "policy/rollout_kl", "value/loss",
          "value/explained_variance", "response_length", "ended", "grad_norm", "lr", "tokens_per_second",
          "rollout/tokens_per_second")
ASIDE = ("step", "split", "tokens", "skipped_steps", "peak_memory_gb")  # no panels


def read(run: str) -> list[dict]:
    """The lines of metrics.jsonl, from a run's folder or the file itself; a line that is still being written is left out."""
    path = Path(run) if Path(run).is_file() else Path(run, "metrics.jsonl")
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.jsonl there; expected the out_dir of a run")
    found = []
    for i, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{i}: {error}") from None
    return found


def points(lines: list[dict], split: str, name: str) -> tuple[list, list]:
    """Steps and values of a metric, from the lines of a split that have it."""
    pairs = [(line["step"], line[name]) for line in lines if line["split"] == split and line.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: list[float]) -> list[float]:
    """Running mean over a window of a twentieth of the run, or of what there is so far at its start."""
    span, sums = max(1, len(values) // 20), [*itertools.accumulate(values, initial=0.0)]
    return [(sums[i + 1] - sums[max(0, i + 1 - span)]) / min(span, i + 1) for i in range(len(values))]


def draw(runs: dict[str, list[dict]], only: list[str], out: str):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    there = dict.fromkeys(name for lines in runs.values() for line in lines for name, value in line.items() if value is not None)
    for name in [name for name in only if name not in there]:
        raise ValueError(f"no metric {name} in {', '.join(runs)}; found {', '.join(there)}")
    others = [name for name in there if name not in (*PANELS, *ASIDE) and not name.endswith("seconds")]
    shown = only or [*(name for name in PANELS if name in there), *others]
    if not shown:
        raise ValueError(f"no metrics in {', '.join(runs)}")
    columns = min(len(shown), 4)
    figure, axes = pyplot.subplots(math.ceil(len(shown) / columns), columns, squeeze=False, layout="constrained",
                                   figsize=(3.6 * columns, 2.6 * math.ceil(len(shown) / columns)))
    for axis, name in zip(axes.flat, shown):
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        for i, (run, lines) in enumerate(runs.items()):
            color, (steps, values) = f"C{i % 10}", points(lines, "train", name)
            if values:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(steps, smooth(values), color=color, linewidth=1.4, label=run)
            steps, values = points(lines, "eval", name)
            if values:
                axis.plot(steps, values, color=color, marker="o", markersize=3, linestyle="--", linewidth=1,
                          label=run if not points(lines, "train", name)[0] else None)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    figure.supxlabel("step; solid: training, dashed: eval", fontsize=9)
    if len(runs) > 1:
        named = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(len(runs), 5), fontsize=9)
    figure.savefig(out, dpi=130)


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="plot.png")
    parser.add_argument("--only", default="", help="metrics, separated by commas")
    options = parser.parse_args(arguments)
    try:
        draw({run: read(run) for run in options.runs}, [name for name in options.only.split(",") if name], options.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: plot.py needs matplotlib: pip install matplotlib")
    print(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
