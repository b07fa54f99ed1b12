"""Use a model folder: score rows with it, or answer prompts and keep the answer that a reward model likes best.

    python sample.py score --model=out/rm/model --data=rows.jsonl --out=scores.jsonl
    python sample.py best --model=out/sft/model --reward=out/rm/model --data=prompts.jsonl --n=8 --check=configs/dpo.py

One JSON object a row, in the input's order. Keys of the config (max_length, truncation, chat_template, device, ...) are
options here too.
"""
import argparse
import json
import math
import sys
import types
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import losses
import model
import rollout
import train


class Scorer:
    """A model folder and what its heads say of the responses of an example."""

    def __init__(self, name: str, cfg):
        self.machine, folder = train.find_machine(cfg), model.find_folder(name)
        described = model.read_json(folder / "config.json")
        self.cfg = types.SimpleNamespace(**{**vars(cfg), "step_token": described.get("step_token", cfg.step_token),
                                            "reward_tokens": tuple(described.get("reward_tokens", ()))})
        self.described, named = described, (described.get("architectures") or [""])[0]
        kind = next(kind for kind in SAY if named.endswith(kind))
        if not kind and model.has_score(folder):  # a value head beside a language model
            kind = "ForSequenceClassification"
        self.stream, self.say = SAY["ForTokenClassification" if self.cfg.reward_tokens else kind]
        self.tokenizer = data.Tokenizer(folder, cfg.chat_template)
        self.decoder = train.load_model(self.cfg, self.machine, name, self.tokenizer, [self.stream])[0].requires_grad_(False)

    def scores(self, dataset: data.Dataset) -> list[dict]:
        """Of each example, in order."""
        train.check_lengths(self.decoder, dataset)
        layout, found = self.machine.layout(data.stream_length([dataset], 64, 0), self.decoder), [None] * len(dataset)
        for rows in tqdm(data.in_order(dataset, 64), desc="scoring", leave=False):
            for batch in data.micro_batches(dataset, rows, layout)[0]:
                with torch.no_grad(), self.machine.autocast():
                    made = self.decoder(batch, [self.stream])[self.stream].double()
                values = [[] for _ in range(batch["num_examples"])]
                for of, value in zip(batch["example"].tolist(), self.say(batch, made)):
                    values[of].append(value)
                for index, row in zip(dict.fromkeys(batch["rows"].tolist()), values):
                    found[index] = row
        return found


def logps_of(batch: dict, log_probs: torch.Tensor) -> list[dict]:
    """Log-probs of each response, summed, and how many tokens they are."""
    sums = losses.by_response(batch, log_probs).sum(-1).tolist()
    return [{"logps": s, "tokens": n} for s, n in zip(sums, batch["lengths"].tolist())]


def steps_of(batch: dict, logits: torch.Tensor) -> list[dict]:
    """Of each response the probability of each step, that they are all good by three readings, and the first that is not."""
    p, said = (logits[:, 1] - logits[:, 0]).sigmoid()[:batch["scored"]].split(batch["lengths"].tolist()), []
    for steps in (part.tolist() for part in p):
        wrong = next((i for i, q in enumerate(steps) if q < 0.5), None)
        said.append({"steps": steps, "min": min(steps), "product": math.prod(steps), "last": steps[-1], "first_wrong": wrong})
    return said


SAY = {"ForSequenceClassification": ("reward", lambda batch, reward: reward.tolist()),
       "ForTokenClassification": ("step_logits", steps_of),
       "": ("log_probs", logps_of)}  # end of an architecture's name -> the stream that is read, and what is said of each response


def lines(found: list[list], dataset: data.Dataset) -> list[dict]:
    """One object a row: chosen and rejected of a pair, score of a single response, scores of several."""
    said = []
    for values, e in zip(found, dataset.examples):
        if e.chosen == [0] and e.rejected == [1]:
            said.append({"chosen": values[0], "rejected": values[1]})
        else:
            said.append({"score": values[0]} if len(values) == 1 else {"scores": values})
    return said


def score(options, cfg):
    scorer = Scorer(options.model, cfg)
    first = next(data.read_rows(options.data), (None, {}))[1]
    first = json.loads(first) if isinstance(first, bytes) else first
    kind = "preference" if {"chosen", "responses"} & first.keys() else "sft"
    kind = options.kind or ("steps" if scorer.stream == "step_logits" else kind)
    dataset = data.load(options.data, kind, scorer.tokenizer, scorer.cfg)
    if len(dataset) != dataset.counts["read"]:
        raise ValueError(f"{options.data}: {dataset.counts['read']} rows, of which {len(dataset)} have a response to score; "
                         f"scores would not be in the rows' order")
    print(f"{options.data}: " + ", ".join(f"{dataset.counts[name]:,} {name}" for name in data.COUNTS), file=sys.stderr)
    found = scorer.scores(dataset)
    if scorer.stream == "step_logits" and {"labels", "label", "value", "mistake_index"} & first.keys():
        report_steps(found, dataset)
    if options.normalize:
        if "reward_mean" not in scorer.described:
            raise ValueError(f"{options.model}: its config.json has no reward_mean; it was trained without eval_data")
        mean, std = scorer.described["reward_mean"], scorer.described["reward_std"]
        found = [[(value - mean) / (std or 1) for value in values] for values in found]
    return lines(found, dataset)


def report_steps(found: list[list], dataset: data.Dataset):
    """How often the first wrong step is found, of solutions that have one, that have none, and the F1 of both."""
    hits = {True: [], False: []}
    for said, e in zip(found, dataset.examples):
        for one, labels, scored in zip(said, e.labels, e.scored):
            wrong = next((i for i, p in enumerate(labels[scored]) if p < 0.5), None)
            hits[wrong is None].append(one["first_wrong"] == wrong)
    wrong, right = (sum(hits[k]) / max(len(hits[k]), 1) for k in (False, True))
    print(f"first wrong step: found in {wrong:.4f} of {len(hits[False])} solutions with one; {right:.4f} of {len(hits[True])} "
          f"without pass; F1 {2 * wrong * right / max(wrong + right, 1e-9):.4f}", file=sys.stderr)


def answered(e: data.Example, answers: list[list[int]], eos: int, most: int) -> data.Example:
    """A prompt with answers as its responses, each closed with EOS unless it was cut off."""
    ids = [np.array([*answer, *([eos] if len(answer) < most or not answer else [])], np.int32) for answer in answers]
    return e._replace(responses=ids, scored=[np.ones(len(i), bool) for i in ids], demonstrated=[False] * len(ids))


def in_steps(e: data.Example, texts: list[str], scorer: Scorer) -> data.Example:
    """A prompt with answers whose lines are steps."""
    if not isinstance(e.row["prompt"], str):
        raise ValueError(f"{e.where}: a process reward model ranks answers to text prompts")
    steps = [[data.Step(line, 0.0) for line in text.split("\n") if line] or [data.Step(" ", 0.0)] for text in texts]
    draft = data.Draft(e.row["prompt"], steps, [False] * len(steps))
    rendered = data.render(draft, scorer.tokenizer, "all")
    return data.tokenize([(e.where, draft, *rendered)], scorer.tokenizer, "joint", Counter(), scorer.cfg.step_token)[0]


def best(options, cfg):
    """Best of n: sampled answers ranked by a reward model, or by the lowest step of a process reward model."""
    scorer, policy = Scorer(options.reward, cfg), Scorer(options.model, cfg)
    check = config.load([f"--config={options.check}"]).check if options.check else None
    prompts, said = data.load(options.data, "prompts", policy.tokenizer, cfg), []
    if scorer.stream == "log_probs" or policy.stream != "log_probs":
        raise ValueError(f"best wants a language model and a reward model; {options.model} gives {policy.stream} and "
                         f"{options.reward} gives {scorer.stream}")
    if scorer.stream == "reward":  # it reads the policy's ids
        policy.tokenizer.same_ids(scorer.tokenizer)
    ids = [e.prompt.tolist() for e in prompts.examples for _ in range(options.n)]
    answers = rollout.generate(policy.decoder, ids, max_new_tokens=cfg.max_new_tokens, stop={policy.tokenizer.eos},
                               temperature=options.temperature, seed=cfg.seed)
    answers = [answers[i * options.n:(i + 1) * options.n] for i in range(len(prompts))]
    written = [[policy.tokenizer.decode(a) for a in mine] for mine in answers]
    by_steps = scorer.stream == "step_logits"
    trees = [in_steps(e, texts, scorer) if by_steps else answered(e, mine, policy.tokenizer.eos, cfg.max_new_tokens)
             for e, mine, texts in zip(prompts.examples, answers, written)]
    for e, texts, scores in zip(prompts.examples, written, scorer.scores(data.as_dataset(trees, prompts.counts))):
        rewards = [score["min"] for score in scores] if by_steps else scores
        line = {"prompt": e.row["prompt"], "best": texts[rewards.index(max(rewards))], "answers": texts, "rewards": rewards}
        if check:
            right = [bool(check(e.row["prompt"], text, e.row)) for text in texts]
            line |= {"right": right, "best_right": right[rewards.index(max(rewards))]}
        said.append(line)
    if check:
        each = [r for line in said for r in line["right"]]
        share = lambda right: sum(right) / len(said)
        print(f"right: {sum(each) / len(each):.4f} of all answers, {share(line['best_right'] for line in said):.4f} of the best "
              f"of {options.n}; {share(any(line['right']) for line in said):.4f} have a right one", file=sys.stderr)
    return said


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("score", "best"))
    parser.add_argument("--model", required=True, help="model folder, run or hub name")
    parser.add_argument("--data", required=True, help="file or glob of rows or prompts")
    parser.add_argument("--out", default="", help="file to write; default: standard output")
    parser.add_argument("--kind", default="", choices=("", *data.FORMATS), help="kind of rows; default: by their keys")
    parser.add_argument("--normalize", action="store_true", help="score: rewards by the eval rows' mean and deviation")
    parser.add_argument("--reward", default="", help="best: folder of the reward model")
    parser.add_argument("--n", type=int, default=8, help="best: answers to a prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="best: of sampling; 0: greedy")
    parser.add_argument("--check", default="", help="best: config file with a check function, for the share of right answers")
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.what == "best" and not options.reward:
            raise ValueError("best needs --reward, the folder of a reward model")
        said = {"score": score, "best": best}[options.what](options, config.load(["--truncation=error", *rest]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    text = "".join(json.dumps(line) + "\n" for line in said)
    if options.out:
        with open(options.out, "w") as file:
            file.write(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
