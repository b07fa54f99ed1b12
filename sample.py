"""Use a model folder: answer prompts, talk with it, score rows, or keep the answer that a reward model likes best.

    python sample.py generate --model=out/dpo --prompt=7+25+18+9= --temperature=0
    python sample.py generate --model=out/dpo --data=prompts.jsonl --n=4 --max_new_tokens=64
    python sample.py chat --model=path/to/SmolLM2-135M-Instruct --top_p=0.9
    python sample.py score --model=out/rm/model --data=rows.jsonl --out=scores.jsonl
    python sample.py best --model=out/sft/model --reward=out/rm/model --data=prompts.jsonl --n=8 --check=configs/dpo.py

One JSON object a row, in the input's order. Keys of the config (temperature, top_p, max_length, chat_template, device, ...)
are options here too.
"""
import argparse
import itertools
import json
import sys
import types
from collections import Counter

import torch

import config
import data
import reward
import rollout
import train


def opened(name: str, cfg) -> reward.Scorer:
    return reward.Scorer(name, cfg, train.find_machine(cfg))


def language_model(name: str, cfg) -> reward.Scorer:
    policy = opened(name, cfg)
    if policy.stream != "log_probs":
        raise ValueError(f"{name} is no language model, it gives {policy.stream}; name one that answers")
    policy.decoder = rollout.copied(policy.decoder, None, policy.machine.dtype)
    return policy


def answers_to(prompts: list[list[int]], policy: reward.Scorer, cfg, n: int = 1, **options) -> list[list[rollout.Answer]]:
    """As the config's sampling keys have it; the i-th prompt's are a function of (seed, i)."""
    return rollout.answers_to(
        prompts, policy.decoder, policy.tokenizer, cfg, n=n, sampling=rollout.Sampling.of(cfg),
        keys=[(cfg.seed, i) for i in range(len(prompts))], compiled=policy.machine.compiled,
        longest=cfg.max_length - cfg.max_new_tokens, **options)


def ids_of(prompt: str | list, tokenizer: data.Tokenizer) -> list[int]:
    draft = data.Draft(prompt, [], [])
    return data.tokenize([("", draft, *data.render(draft, tokenizer, "last"))], tokenizer, "joint", Counter())[0].prompt.tolist()


def generate(options, cfg):
    policy = language_model(options.model, cfg)
    if options.prompt:
        asked = [[{"role": "user", "content": options.prompt}] if policy.tokenizer.chat_template else options.prompt]
        ids = [ids_of(prompt, policy.tokenizer) for prompt in asked]
    else:
        examples = data.load(options.data, "prompts", policy.tokenizer, cfg).examples
        asked, ids = [e.row["prompt"] for e in examples], [e.prompt.tolist() for e in examples]
    return [{"prompt": prompt, "answers": [rollout.written(policy.tokenizer, a) for a in some]}
            for prompt, some in zip(asked, answers_to(ids, policy, cfg, options.n))]


def chat(options, cfg):
    """A conversation in the terminal, word by word; without a chat template, each line is a prompt by itself."""
    policy, messages = language_model(options.model, cfg), []
    tokenizer = policy.tokenizer
    for turn in itertools.count():
        try:
            said = input("> ")
        except EOFError:
            return []
        messages.append({"role": "user", "content": said})
        ids, shown = ids_of(messages if tokenizer.chat_template else said, tokenizer), ""

        def watch(row, new):
            nonlocal shown
            text = tokenizer.decode(new).rstrip("\ufffd")  # of a character that is not whole
            print(text[len(shown):], end="", flush=True)
            shown = text
        of_turn = types.SimpleNamespace(**{**vars(cfg), "seed": cfg.seed + turn})
        (answer,), = answers_to([ids], policy, of_turn, check=1, watch=watch)
        print()
        messages.append({"role": "assistant", "content": rollout.written(tokenizer, answer)})


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
    scorer = opened(options.model, cfg)
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


def best(options, cfg):
    """Best of n: sampled answers ranked by a reward model, or by the lowest step of a process reward model."""
    scorer, policy = opened(options.reward, cfg), language_model(options.model, cfg)
    check = config.load([f"--config={options.check}"]).check if options.check else None
    prompts, said = data.load(options.data, "prompts", policy.tokenizer, cfg), []
    rewards_of = reward.by_model(scorer, policy.tokenizer)
    answers = answers_to([e.prompt.tolist() for e in prompts.examples], policy, cfg, options.n)
    written = [[rollout.written(policy.tokenizer, a) for a in mine] for mine in answers]
    trees = [rollout.answered(e, mine) for e, mine in zip(prompts.examples, answers)]
    for e, texts, rewards in zip(prompts.examples, written, rewards_of(trees, written)):
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


COMMANDS = {"generate": generate, "chat": chat, "score": score, "best": best}


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", required=True, help="model folder, run or hub name")
    parser.add_argument("--data", default="", help="file or glob of rows or prompts")
    parser.add_argument("--prompt", default="", help="generate: one prompt, in the place of a file")
    parser.add_argument("--out", default="", help="file to write; default: standard output")
    parser.add_argument("--kind", default="", choices=("", *data.FORMATS), help="kind of rows; default: by their keys")
    parser.add_argument("--normalize", action="store_true", help="score: rewards by the eval rows' mean and deviation")
    parser.add_argument("--reward", default="", help="best: folder of the reward model")
    parser.add_argument("--n", type=int, default=0, help="generate, best: answers to a prompt (1, 8)")
    parser.add_argument("--check", default="", help="best: config file with a check function, for the share of right answers")
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.what == "best" and not options.reward:
            raise ValueError("best needs --reward, the folder of a reward model")
        if options.what != "chat" and not (options.data or options.what == "generate" and options.prompt):
            raise ValueError(f"{options.what} needs --data, a file of rows")
        options.n = options.n or {"best": 8}.get(options.what, 1)
        said = COMMANDS[options.what](options, config.load(["--truncation=error", *rest]))
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
