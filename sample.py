"""Use a model: any folder that train.py writes (a run, its model/, a
checkpoint), or another in Hugging Face layout.

  python sample.py generate --model=out/dpo --prompt=7+25+18+9= --temperature=0
  python sample.py generate --model=out/dpo --data=prompts.jsonl --n=4
  python sample.py chat --model=path/to/SmolLM2-135M-Instruct --top_p=0.9
  python sample.py score --model=out/rm --data=rows.jsonl --out=scores.jsonl
  python sample.py best --model=out/sft --reward=out/rm --data=prompts.jsonl
  python sample.py compare --model=out/dpo --other=out/sft --data=prompts.jsonl
  python sample.py merge --model=out/dpo --other=out/sft --out=FOLDER
  python sample.py merge --model=out/dpo --save_dtype=bfloat16 --out=FOLDER

One JSON object a row, in the input's order. Keys of the config (temperature,
top_p, max_length, chat_template, device, ...) are options here too.
"""
import argparse
import contextlib
import itertools
import json
import math
import re
import signal
import sys
import textwrap
import types
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import data
import model
import reward
import rollout
from machine import ending, find_machine


def opened(name: str, cfg) -> reward.Scorer:
    return reward.Scorer(name, cfg, find_machine(cfg))


def language_model(name: str, cfg) -> reward.Scorer:
    policy = opened(name, cfg)
    if policy.stream != "log_probs":
        raise ValueError(f"{name} is not a language model, its output is {policy.stream}; name a model that can answer")
    policy.decoder = rollout.copied(policy.decoder, None, policy.machine.dtype)
    return policy


def answers_to(prompts: list[list[int]], policy: reward.Scorer, cfg, n: int = 1, **options) -> list[list[rollout.Answer]]:
    """Answers by the config's sampling keys; the random numbers for the i-th prompt are a function of (seed, i)."""
    return rollout.answers_to(
        prompts, policy.decoder, policy.tokenizer, cfg, n=n, sampling=rollout.Sampling.of(cfg),
        keys=[(cfg.seed, i) for i in range(len(prompts))], compiled=policy.machine.compiled,
        longest=cfg.max_length - cfg.max_new_tokens, **options)


def ids_of(prompt: str | list, tokenizer: data.Tokenizer) -> list[int]:
    draft = data.Draft(prompt, [], [])
    return data.tokenize([("", draft, *data.render(draft, tokenizer, "last"))], tokenizer, "joint", Counter())[0].prompt.tolist()


def asked(options, policy: reward.Scorer, cfg) -> list[data.Example]:
    """The prompts of --data, or the one of --prompt, after --system (with a chat template, as the user's message)."""
    if options.prompt is None:
        return data.load(options.data, "prompts", policy.tokenizer, cfg).examples[:]
    prompt = data.with_system({"system": options.system}, options.prompt, bool(policy.tokenizer.chat_template))
    prompt = data.as_messages("user", prompt) if policy.tokenizer.chat_template else prompt
    ids = np.array(ids_of(prompt, policy.tokenizer), np.int32)
    return [data.Example(ids, [], [], [], [], [], [], "--prompt", row={"prompt": prompt})]


def generate(options, cfg):
    return judged(options, language_model(options.model, cfg), None, None, cfg)


def typed(text: str, column: int) -> int:
    """Print text from a column on, wrapped between words at 79 columns. Returns the column where it ends."""
    for word in re.findall(r"\n|[^\s]+|[^\S\n]+", text):
        if column and column + len(word) > 79:
            print()
            column, word = 0, word.lstrip(" ")
        print(word, end="", flush=True)
        column = 0 if word == "\n" else column + len(word)
    return column


def chat(options, cfg):
    """A conversation in the terminal, word by word; without a chat template, each line is a prompt by itself."""
    policy = language_model(options.model, cfg)
    tokenizer, messages = policy.tokenizer, [{"role": "system", "content": options.system}] * bool(options.system)
    memory = "" if tokenizer.chat_template else " It has no chat template: each line is a prompt by itself."
    print(f"{options.model}: Ctrl-C stops an answer, Ctrl-D ends.{memory}", file=sys.stderr)
    for turn in itertools.count():
        try:
            asked = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return print(file=sys.stderr)
        messages.append({"role": "user", "content": asked})
        alone = data.with_system({"system": options.system}, asked, chat=False)
        ids, said, shown, column = ids_of(messages if tokenizer.chat_template else alone, tokenizer), "", 0, 0

        def watch(row, new):
            nonlocal said, shown, column
            said = tokenizer.decode(new).rstrip("\ufffd")  # of a character that is not whole
            whole = max(said.rfind(" ") + 1, said.rfind("\n") + 1, len(said) - 15, shown)  # whole words, or part of a long one
            column, shown = typed(said[shown:whole], column), whole
        with contextlib.suppress(KeyboardInterrupt):  # what was said so far stays
            of_turn = types.SimpleNamespace(**{**vars(cfg), "seed": cfg.seed + turn})
            (answer,), = answers_to([ids], policy, of_turn, check=1, watch=watch)
            said = rollout.written(tokenizer, answer)
        typed(said[shown:] + "\n", column)
        messages.append({"role": "assistant", "content": said})


def lines(found: list[list], dataset: data.Dataset) -> list[dict]:
    """One object a row: chosen and rejected of a pair, score of a single response, scores of several, in the row's order. The turns of a
    conversation that are examples of their own are one row: its log-prob is their sum, its reward that of the last."""
    said = []
    chosen_first = all(e.chosen == [0] and e.rejected == [1] for e in dataset.examples if len(e.responses) == 2)
    for values, e in zip(found, dataset.examples):
        if e.turn > 1:
            before, (value,) = said.pop()["score"], values
            said.append({"score": {key: before[key] + value[key] for key in value} if isinstance(value, dict) else value})
        elif len(e.responses) == 2 and chosen_first:
            said.append({"chosen": values[0], "rejected": values[1]})
        else:
            said.append({"score": values[0]} if len(values) == 1 else {"scores": values})
    return said


def score(options, cfg):
    scorer = opened(options.model, cfg)
    first = next(data.read_rows(options.data), (None, {}))[1]
    with contextlib.suppress(ValueError):
        first = json.loads(first) if isinstance(first, bytes) else first
    first = first if isinstance(first, dict) else {}  # a bad row: loading says so
    kind = options.kind or ("steps" if scorer.stream == "step_logits" else data.kind_of(first))
    dataset = data.load(options.data, kind, scorer.tokenizer, scorer.cfg, train=False)
    usable = len(dataset) - dataset.counts["split"]
    if usable != dataset.counts["read"]:
        raise ValueError(f"{options.data}: {dataset.counts['read']} rows, of which only {usable} have a response to "
                         f"score: scores would not line up with rows; remove the others")
    print(f"{options.data}: {data.counted(dataset.counts)}", file=sys.stderr)
    found = scorer.scores(dataset)
    if scorer.stream == "step_logits" and {"labels", "label", "value", "mistake_index"} & first.keys():
        report_steps(found, dataset)
    if options.normalize:
        if "reward_mean" not in scorer.described:
            raise ValueError(f"{options.model}: no reward_mean in config.json; only training on pairs with eval_data writes one")
        mean, std = scorer.described["reward_mean"], scorer.described["reward_std"]
        found = [[(value - mean) / (std or 1) for value in values] for values in found]
    return lines(found, dataset)


def report_steps(found: list[list], dataset: data.Dataset):
    """Print how often the first wrong step is found in solutions with one, how often the others pass, and the F1 of both."""
    hits = {True: [], False: []}
    for said, e in zip(found, dataset.examples):
        for one, labels, scored in zip(said, e.labels, e.scored):
            wrong = next((i for i, p in enumerate(labels[scored]) if p < 0.5), None)
            hits[wrong is None].append(one["first_wrong"] == wrong)
    wrong, right = (sum(hits[k]) / max(len(hits[k]), 1) for k in (False, True))
    print(f"first wrong step: found in {wrong:.4f} of {len(hits[False])} solutions with one; {right:.4f} of {len(hits[True])} "
          f"without one pass; F1 {2 * wrong * right / max(wrong + right, 1e-9):.4f}", file=sys.stderr)


def judged(options, policy: reward.Scorer, scorer, check, cfg) -> list[dict]:
    """For each prompt n answers, their rewards (if there is a scorer), and whether they are right (if there is a check)."""
    judge = reward.by_model(scorer, policy.tokenizer) if scorer else None  # an error now, not behind the answers
    prompts = asked(options, policy, cfg)
    answers = answers_to([e.prompt.tolist() for e in prompts], policy, cfg, options.n, show="answers")
    trees, texts = rollout.answered(policy.tokenizer, prompts, answers)
    said = [{"prompt": e.row["prompt"], "answers": mine} for e, mine in zip(trees, texts)]
    for line, rewards in zip(said, judge(trees, texts) if judge else ()):
        line["rewards"] = rewards
    give = reward.by_function(check, what="check", mend="") if check else None
    if give:
        (checked,) = reward.together(policy.machine, lambda: {"right": give(trees, texts)}, "error")
        for line, right in zip(said, checked["right"]):
            line["right"] = [*map(bool, right)]
    return said


def best(options, cfg):
    """Best of n: sampled answers ranked by a reward model, or by the lowest step of a process reward model."""
    scorer, check = opened(options.reward, cfg), check_of(options)
    said = judged(options, language_model(options.model, cfg), scorer, check, cfg)
    for line in said:
        first = line["rewards"].index(max(line["rewards"]))
        line |= {"best": line["answers"][first], **({"best_right": line["right"][first]} if check else {})}
    if check:
        each = [r for line in said for r in line["right"]]
        share = lambda right: sum(right) / len(said)
        print(f"right: {sum(each) / len(each):.4f} of all answers, {share(line['best_right'] for line in said):.4f} of the best "
              f"of {options.n}; {share(any(line['right']) for line in said):.4f} of the prompts have a right one", file=sys.stderr)
    return said


def check_of(options):
    found = config.load([f"--config={options.check}"]).check if options.check else None
    if options.check and not found:
        raise ValueError(f"{options.check}: defines no function check(prompt, completion, row) -> bool")
    return found


def compare(options, cfg):
    """The answers of two models to the same prompts, and which of them a reward model likes better, or which are right."""
    scorer, check = opened(options.reward, cfg) if options.reward else None, check_of(options)
    one, other = (judged(options, language_model(name, cfg), scorer, check, cfg) for name in (options.model, options.other))
    both = [{key: a[key] if key == "prompt" else [a[key][0], b[key][0]] for key in a} for a, b in zip(one, other)]
    for key, verb in (("rewards", "is liked better"), ("right", "is right and the other is not")):
        points = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in (line[key] for line in both if key in line)]
        if points:
            rate = sum(points) / len(points)
            error = 1.96 * math.sqrt(sum((p - rate) ** 2 for p in points) / len(points) / max(len(points) - 1, 1))
            print(f"{options.model} {verb} in {points.count(1)} of {len(points)}, {options.other} in {points.count(0)}, "
                  f"ties {points.count(0.5)}: win rate {rate:.3f} +- {error:.3f} (95 %)", file=sys.stderr)
    return both


def beside(line: dict) -> str:
    """What compare says of a prompt, in two columns."""
    prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"] or ""
    wrapped = lambda text: [part for line in text.splitlines() for part in textwrap.wrap(line, 38) or [""]]
    rows = [f"{left:38} | {right}".rstrip() for left, right in itertools.zip_longest(*map(wrapped, line["answers"]), fillvalue="")]
    notes = [f"{key} {line[key][0]:.4g} | {line[key][1]:.4g}" for key in ("rewards", "right") if key in line]
    return "\n".join([*textwrap.wrap(prompt[-400:], 79), "-" * 79, *rows, *notes, ""])


def merge(options, cfg):
    """Write a folder with the weighted mean of two models' weights, tensor by tensor (model soups, arXiv:2203.05482); --weight is
    the share of the first. Without --other, a copy, in another dtype if that is asked for."""
    out, one = Path(options.out), opened(options.model, cfg)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={options.out} already exists and is not an empty folder; name another")
    if options.other:
        other = opened(options.other, cfg)
        one.tokenizer.same_ids(other.tokenizer)
        if (one.decoder.shape, one.stream) != (other.decoder.shape, other.stream):
            raise ValueError(f"{options.model} and {options.other} differ in more than their weights: {one.decoder.shape}, "
                             f"{one.stream} and {other.decoder.shape}, {other.stream}")
        for mine, theirs in zip(one.decoder.parameters(), other.decoder.parameters(), strict=True):
            mine.lerp_(theirs, 1 - options.weight)
        one.saved_dtype = torch.promote_types(one.saved_dtype, other.saved_dtype)
    else:
        one.decoder.config |= {key: one.described[key] for key in model.REWARD if key in one.described}
    dtype = getattr(torch, cfg.save_dtype) if cfg.save_dtype else one.saved_dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.publish(out, lambda folder: model.save(one.decoder, folder, dtype, one.tokenizer.folder, ends=one.tokenizer.ends))
    print(out, file=sys.stderr)


COMMANDS = {"generate": generate, "chat": chat, "score": score, "best": best, "compare": compare, "merge": merge}
NEEDS = {"score": ("data",), "best": ("reward",), "compare": ("other",), "merge": ("out",)}
TAKES = {"generate": ("data", "prompt", "system", "n", "out"), "chat": ("system",), "score": ("data", "kind", "normalize", "out"),
         "best": ("data", "prompt", "system", "n", "reward", "check", "out"), "merge": ("other", "weight", "out"),
         "compare": ("data", "prompt", "system", "other", "reward", "check", "out")}  # besides --model


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = config.home  # a shell leaves the ~ of --out=~/file to us
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", required=True, type=home, help="folder of a run, a model or a checkpoint, or hub name")
    parser.add_argument("--data", default="", type=home, help="file or glob of rows or prompts")
    parser.add_argument("--prompt", help="one prompt, in the place of a file")
    parser.add_argument("--out", default="", type=home, help="file to write (merge: folder); default: standard output")
    parser.add_argument("--n", type=int, default=0, help="answers to each prompt; default: 1 in generate, 8 in best")
    parser.add_argument("--system", default="", help="chat, --prompt: the system's message")
    parser.add_argument("--kind", default="", choices=("", *data.FORMATS), help="score: kind of rows; default: by their keys")
    parser.add_argument("--normalize", action="store_true", help="score: rewards less the eval rows' mean, over their std")
    parser.add_argument("--reward", default="", type=home, help="best, compare: folder of the reward model")
    parser.add_argument("--check", default="", type=home, help="best, compare: config with a check function")
    parser.add_argument("--other", default="", type=home, help="compare, merge: the other model")
    parser.add_argument("--weight", type=float, default=0.5, help="merge: share of --model")
    options, rest = parser.parse_known_args(arguments)
    with ending():
        for key in NEEDS.get(options.what, ()):
            if not getattr(options, key):
                raise ValueError(f"{options.what} needs --{key}")
        for key in [key for key, value in vars(options).items() if value != parser.get_default(key)]:
            if key not in ("what", "model", *TAKES[options.what]):
                raise ValueError(f"--{key} does nothing in {options.what}; leave it out")
        if "prompt" in TAKES[options.what] and bool(options.data) == (options.prompt is not None):
            raise ValueError(f"{options.what} needs --data, a file of prompts, or --prompt, and not both")
        if options.what == "merge" and options.weight != 0.5 and not options.other:
            raise ValueError("--weight is the share of --model when two are merged; name the second with --other")
        if options.system and options.data:
            raise ValueError("--system is for --prompt; with --data, a row's system message is in its column 'system'")
        if options.out and options.what != "merge":  # an error now, not behind the work
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            if Path(options.out).is_dir():
                raise ValueError(f"--out={options.out} is a folder; name a file")
        options.n = options.n or {"best": 8}.get(options.what, 1)
        usual = {"truncation": "error", "compile": "auto" if options.data else False}  # for one answer it would not pay
        said = COMMANDS[options.what](options, config.load(rest, ("sample.py", usual))) or []
        beside_each_other = options.what == "compare" and not options.out and sys.stdout.isatty()
        text = "".join((beside(line) if beside_each_other else json.dumps(line, ensure_ascii=False)) + "\n" for line in said)
        if options.out and options.what != "merge":
            Path(options.out).write_text(text, encoding="utf-8")
        else:
            print(text, end="")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
    main(sys.argv[1:])
