"""What the model will see of a file:

  python data.py FILE --config=configs/dpo.py [--rows=3] [--key=value ...]

A few rows with the tokens that are trained in green (in [brackets] where there
are no colours), how many were cut or dropped and one that was cut, how long
rows are, and how they pack.
Nothing is trained, and no stage is run.
"""
import argparse
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np

import config
import data
import model
from machine import ending

GREEN, RED, FAINT = "1;32", "1;31", "2"
LONG = 240  # most tokens of a text that are shown
WIDTH = 62  # columns of text beside its label


def colours() -> bool:
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def paint(text: str, code: str) -> str:
    if code and text and colours():
        return f"\033[{code}m{text}\033[0m"
    return f"[{text}]" if text.strip() and code in (GREEN, RED) else text


def tokenizer_of(cfg) -> data.Tokenizer:
    """The tokenizer that a run would use, found without running the stages before it."""
    folder, name, stage = cfg.tokenizer, cfg.init_from, cfg
    while not folder and name.endswith(".py"):
        stage = config.load_stage(name, stage)
        folder, name = stage.tokenizer, stage.init_from
    if not folder and not name:
        raise ValueError("no tokenizer is named; give a --config, --init_from=FOLDER or --tokenizer=FOLDER")
    return data.Tokenizer(folder or model.find_folder(name), cfg.chat_template, cfg.chat_template_kwargs)


def shape_of(cfg, tokenizer: data.Tokenizer) -> model.Shape | None:
    """The shape of the model that a run would start from, found without running the stages before it; None if it is not
    here."""
    name, stage = cfg.init_from, cfg
    while name.endswith(".py"):
        stage = config.load_stage(name, stage)
        name = stage.init_from
    if name == "scratch":
        tokens = tokenizer.fast.get_vocab_size()
        return model.read_shape({"vocab_size": tokens, **stage.scratch}, "scratch") if stage.scratch else None
    apart = cfg.tokenizer or stage.tokenizer  # else the tokenizer's folder is the model's, also of one from a hub
    for folder in (Path(name), Path(name, "model"), *([] if apart else [tokenizer.folder])):
        file = folder / "config.json"
        if file.is_file():
            return model.read_shape(model.read_json(file), str(file))
    return None


def marked(ids: np.ndarray, scored: np.ndarray, labels: np.ndarray | None, tokenizer: data.Tokenizer) -> list[tuple]:
    """(text, colour) of runs of tokens: those that are trained are green, or red where a step's label is bad, the rest faint. If
    there are more than LONG tokens, only the first and the last."""
    if len(ids) > LONG:
        cut = slice(None, LONG - 80), slice(-80, None)
        first, last = (marked(ids[part], scored[part], labels[part] if labels is not None else None, tokenizer) for part in cut)
        return [*first, (f" ... {len(ids) - LONG:,} more tokens ... ", FAINT), *last]
    runs, begin = [], 0
    decode = lambda end: tokenizer.fast.decode(ids[:end].tolist(), skip_special_tokens=False)
    for end in [*(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]:
        text = decode(end)[len(decode(begin)):].replace("\n", "\u21b5\n")
        colour = GREEN if scored[begin] else FAINT
        if labels is not None and scored[begin]:  # a step and its label
            label = labels[end - 1]
            sign = {1.0: "+", 0.0: "-"}.get(float(label), "?" if label != label else f"{label:.2g}")
            text = text.replace("\u21b5", "\u21b5" + sign) if "\u21b5" in text else text + sign
            colour = FAINT if label != label else GREEN if label >= 0.5 else RED
        runs.append((text, colour))
        begin = end
    return runs


def flow(label: str, runs: list[tuple], said: str) -> str:
    """Coloured runs of text, then what is said, after a label, wrapped at 79 columns; an arrow marks each newline of the text."""
    lines, room = [f"  {label:12}"], WIDTH
    for text, code in [*runs, (f"  {said}", "")]:
        brackets = len(paint("x", code)) - 1 if not colours() else 0
        painted, room = [], room - brackets
        for word in re.findall(r"\n|[^\s]+[^\S\n]*|[^\S\n]+", text):
            if word == "\n" or len(word.rstrip()) > room and room < WIDTH - brackets:
                lines[-1] += paint("".join(painted), code)
                painted, room = [], WIDTH - brackets
                lines.append(" " * 14)
            painted.append(word.strip("\n"))
            room -= len(word.strip("\n"))
        lines[-1] += paint("".join(painted), code)
    return "\n".join(lines)


def row(e: data.Example, tokenizer: data.Tokenizer) -> str:
    names = {**dict.fromkeys(e.chosen, "chosen" if e.rejected else "desirable"),
             **{i: "rejected" if e.chosen else "undesirable" for i in e.rejected}}
    nothing = np.zeros(len(e.prompt), bool)
    where = e.where + (f" (turn {e.turn})" if e.turn else "") + (" (truncated)" if e.truncated else "")
    lines = [where, flow("prompt", marked(e.prompt, nothing, None, tokenizer), f"({len(e.prompt)} tokens)")]
    for i, (ids, scored) in enumerate(zip(e.responses, e.scored)):
        runs = marked(ids, scored, e.labels[i] if e.labels else None, tokenizer)
        count = int((scored & ~np.isnan(e.labels[i])).sum() if e.labels else scored.sum())
        lines.append(flow(names.get(i, "response"), runs, f"({len(ids)} tokens, {count} trained)"))
    return "\n".join(lines)


def with_rewards(e: data.Example, imitated: bool) -> data.Example:
    """What is trained where the losses read a reward, at a response's last token, and, if `imitated`, demonstrations."""
    last = [np.arange(len(ids)) == len(ids) - 1 for ids in e.responses]
    masks = zip(last, e.scored, e.demonstrated)
    return e._replace(scored=[at | scored if imitated and shown else at for at, scored, shown in masks])


def histogram(lengths: np.ndarray, most: int) -> str:
    """Tokens of a prompt with its longest response, in up to ten bins."""
    counts, edges = np.histogram(lengths, np.unique(np.linspace(lengths.min(), lengths.max() + 1, 11).astype(int)))
    lines = [f"  {low:>6,} to {high - 1:>6,} |{'#' * round(40 * n / counts.max()):40}| {n:,}"
             for n, low, high in zip(counts, edges, edges[1:])]
    title = f"tokens of a prompt with its longest response (max_length = {most:,}; median {np.median(lengths):,.0f})"
    return "\n".join([title, *lines])


def packing(dataset: data.Dataset, longest: np.ndarray, cfg) -> str:
    """How the first steps of a run pack: into how many streams, how many tokens they have, and how many with padding instead."""
    tokens = data.stream_length([dataset], cfg.batch_size, cfg.micro_batch_tokens, device=config.machine(cfg)[0])
    first = range(min(20, data.steps_per_epoch(dataset, cfg.batch_size)))
    steps = [data.step_rows(dataset, step, cfg.batch_size, cfg.seed) for step in first]
    streams = [len(data.pack(dataset.lengths[rows].tolist(), tokens)) for rows in steps]
    real = sum(int(dataset.lengths[rows].sum()) for rows in steps)
    padded = sum(int(longest[rows].max()) * sum(max(1, len(dataset.examples[i].responses)) for i in rows) for rows in steps)
    return (f"packing: {np.mean([len(rows) for rows in steps]):,.0f} rows a step are {real / len(steps):,.0f} tokens, in "
            f"{np.mean(streams):.1f} streams of up to {tokens:,}\n"
            f"  if padded to the step's longest, with prompts repeated: {padded / len(steps):,.0f} tokens ({padded / real:.1f}x)")


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, prog="data.py [FILE ...]", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of train.py: --config, --objective, --max_length ...")
    parser.add_argument("--rows", type=int, default=3, help="how many rows are shown")
    files = [*itertools.takewhile(lambda word: not word.startswith("-"), arguments)]
    options, rest = parser.parse_known_args(arguments[len(files):])
    with ending():
        cfg = config.load(rest)
        if not files and not cfg.train_data:
            raise ValueError("no FILE, and no --config with train_data; expected python data.py FILE --objective=...")
        kind, tokenizer = config.data_kind(cfg), tokenizer_of(cfg)
        dataset = data.load(files or cfg.train_data, kind, tokenizer, cfg)
        shape = shape_of(cfg, tokenizer)
    examples, counts = dataset.examples, dataset.counts
    reads = {name for term in config.terms(cfg, False) for name in term.reads}
    rewarded = any("reward" in name for name in reads) and not any("logps" in name for name in reads)
    imitated = "demonstration_mask" in reads
    marks = lambda e: with_rewards(e, imitated) if rewarded else e
    print(f"{kind} rows for {'+'.join(cfg.weights)}, tokens of {tokenizer.folder}:")
    print("\n".join([data.counted(counts), *data.sources_said(dataset)]) + "\n")
    beyond = model.too_long(shape, dataset, cfg.max_new_tokens) if shape else ""
    if beyond:
        print(f"warning: {beyond}\n")
    shown = examples[:options.rows]
    if counts["truncated"] and not any(e.truncated for e in shown):
        shown += itertools.islice((e for e in examples if e.truncated), 1)
    for e in shown:
        print(row(marks(e), tokenizer) + "\n")
    longest = np.array([len(e.prompt) + max(map(len, e.responses), default=0) for e in examples])
    total = data.count(map(marks, examples))
    trained = total["steps"] or total["tokens"]
    if total["steps"]:
        print("+, - and ? behind a step: its label (good, bad, none)\n")
    described = model.read_json(tokenizer.folder / "tokenizer.json")["model"]
    unknown = described.get("unk_id", tokenizer.fast.token_to_id(described.get("unk_token") or ""))
    none = unknown in (None, tokenizer.bos, tokenizer.eos)  # GPT-2 names its EOS, and knows every byte
    if found := 0 if none else sum(np.count_nonzero(ids == unknown) for e in examples for ids in (e.prompt, *e.responses)):
        print(f"{found:,} tokens are {tokenizer.fast.id_to_token(unknown)}: the tokenizer does not know these characters\n")
    print(histogram(longest, cfg.max_length))
    if not trained:  # prompts: the answers to train on are not generated yet
        return
    print(f"trained: {trained:,} of {int(dataset.lengths.sum()):,} tokens ({trained / dataset.lengths.sum():.0%})")
    print(packing(dataset, longest, cfg))
