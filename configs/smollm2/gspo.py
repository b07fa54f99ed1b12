"""GSPO of SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/gspo.py --train_data=gsm8k-train.jsonl

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.grpo import *

objective = "gspo"
clip_eps_high = 4e-4
del reduction
rollout_prompts = 128
out_dir = "out/smollm2/gspo"
