"""Arithmetic DPO from the SFT model: right answers against answers with dropped carries.

    python train.py --config configs/dpo.py

About 10 seconds on two CPU cores after the SFT stage, which it runs first. Exact match: 0.11 -> 0.85 to 0.96.
The NLL term keeps the chosen responses likely; without it (nll_coef = 0) accuracy falls to 0: README says why.
"""
from tasks.arithmetic.task import is_right

objective = "dpo"
init_from = "configs/sft.py"
train_data = "tasks/arithmetic/pairs.jsonl"
eval_data = "tasks/arithmetic/pairs_eval.jsonl"
eval_prompts = "tasks/arithmetic/problems_eval.jsonl"
check = is_right
max_new_tokens = 16
max_length = 64
out_dir = "out/dpo"

beta = 0.1
nll_coef = 1.0
batch_size = 64
epochs = 4
lr = 6e-4
warmup_steps = 10
eval_every = 25
