"""GRPO of a real model on GSM8K's questions, or any rows {question, answer} whose answer ends in the number.

    python train.py --config configs/smollm2/grpo.py --init_from=path/to/SmolLM2-135M-Instruct \\
        --train_data=gsm8k-train.jsonl --eval_data=gsm8k-test.jsonl

Three steps of 4 prompts with 4 answers of 96 tokens took a minute on one CPU core; a whole run was not made. A model of this
size rarely finds the number: groups that agree teach nothing and are left out.
"""
import re


def number(text: str) -> str:
    """The last number of a text, as digits."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return found[-1].replace(",", "").rstrip(".").removesuffix(".0") if found else ""


def check(prompt, completion: str, row: dict) -> bool:
    return number(completion) == number(row["answer"])


def reward(prompt, completion: str, row: dict) -> float:
    return float(check(prompt, completion, row))


objective = "ppo"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
train_data = "gsm8k-train.jsonl"
out_dir = "out/smollm2/grpo"

advantages = "group_norm"
samples_per_prompt = 8
reduction = "token"
clip_eps_high = 0.28
filter_groups = True
max_new_tokens = 256
max_length = 512
batch_size = 32
lr = 1e-6
schedule = "constant"
warmup_steps = 10
save_every = 20
