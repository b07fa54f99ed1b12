"""The demo task: sums written out as running totals. Makes the files beside it: `python tasks/arithmetic/task.py`.

    prompt      7+25+18+9=
    response    32
                50
                59

A demonstrator with a bad habit drops the carry of the units in most of the places where there is one (25+18 -> 33), and
goes on from the slip. A model trained on its answers repeats the slip; pairs of a right answer against a slipped one
teach it out of it. Everything is a function of the seed.
"""
import json
import random
from pathlib import Path

NUMBERS, LARGEST, SLIP_RATE = 4, 29, 0.65


def totals(numbers: list[int], rng: random.Random | None = None, slip_rate: float = 0.0) -> tuple[list[int], list[bool]]:
    """Running totals, and of each whether it follows rightly from the one before: a slip leaves out the units' carry."""
    lines, right, total = [], [], numbers[0]
    for number in numbers[1:]:
        carries = total % 10 + number % 10 >= 10
        slip = carries and rng is not None and rng.random() < slip_rate
        total = total + number - (10 if slip else 0)
        lines.append(total)
        right.append(not slip)
    return lines, right


def written(lines: list[int]) -> str:
    return "\n".join(map(str, lines))


def is_right(prompt: str, completion: str, row: dict) -> bool:
    """Is the last line of the completion the sum? Exact match, nothing forgiven."""
    return completion.rsplit("\n", 1)[-1] == row["answer"]


def exact(prompt: str, completion: str, row: dict) -> float:
    """A reward: 1 for the right sum, else 0."""
    return float(is_right(prompt, completion, row))


def problems(seed: int):
    """Distinct problems without end: splits taken from one stream share none."""
    rng, seen = random.Random(seed), set()
    while True:
        numbers = [rng.randint(0, LARGEST) for _ in range(NUMBERS)]
        if tuple(numbers) not in seen:
            seen.add(tuple(numbers))
            yield numbers, "+".join(map(str, numbers)) + "="


def slipped(numbers: list[int], rng: random.Random) -> list[int] | None:
    """An answer with at least one slip, or None where the problem has no carry to drop."""
    for _ in range(32):
        lines, right = totals(numbers, rng, SLIP_RATE)
        if not all(right):
            return lines
    return None


def main(folder: Path, seed: int = 0, demonstrations: int = 8000, pairs: int = 2000, held_out: int = 500):
    stream, rng = problems(seed), random.Random(seed + 1)

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def demonstration():
        numbers, prompt = next(stream)
        return {"prompt": prompt, "completion": written(totals(numbers, rng, SLIP_RATE)[0])}

    def pair():
        while True:
            numbers, prompt = next(stream)
            wrong = slipped(numbers, rng)
            if wrong:
                return {"prompt": prompt, "chosen": written(totals(numbers)[0]), "rejected": written(wrong)}

    def steps():
        numbers, prompt = next(stream)
        lines, right = totals(numbers, rng, SLIP_RATE)
        return {"prompt": prompt, "completions": list(map(str, lines)), "labels": right}

    def problem():
        numbers, prompt = next(stream)
        return {"prompt": prompt, "answer": str(sum(numbers))}

    write("sft.jsonl", (demonstration() for _ in range(demonstrations)))
    write("sft_eval.jsonl", (demonstration() for _ in range(held_out)))
    write("pairs.jsonl", (pair() for _ in range(pairs)))
    write("pairs_eval.jsonl", (pair() for _ in range(held_out)))
    write("problems_eval.jsonl", (problem() for _ in range(held_out)))
    write("steps.jsonl", (steps() for _ in range(2 * pairs)))
    write("steps_eval.jsonl", (steps() for _ in range(held_out)))
    write("problems.jsonl", (problem() for _ in range(2 * pairs)))
    write_tokenizer(folder)


def write_tokenizer(folder: Path):
    """One token a character, in the layout that transformers loads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    alphabet = ["<eos>", "<bos>", "<unk>", *"0123456789+=\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(alphabet)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in alphabet[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
              "pad_token": "<eos>", "model_max_length": 128, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(__file__).parent)
