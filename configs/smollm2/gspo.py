"""GSPO: SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/gspo.py --train_data=gsm8k-train.jsonl

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.grpo import *

objective = "gspo"
clip_eps_high = 4e-4
del reduction
rollout_prompts = 128
out_dir = "out/smollm2/gspo"
