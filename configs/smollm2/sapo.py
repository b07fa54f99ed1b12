"""SAPO: SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/sapo.py --train_data=gsm8k-train.jsonl

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.grpo import *

objective = "sapo"
del clip_eps_high
out_dir = "out/smollm2/sapo"
