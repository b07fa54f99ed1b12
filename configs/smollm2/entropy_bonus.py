"""GRPO with a KL and an entropy term: SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/entropy_bonus.py --train_data=gsm8k-train.jsonl

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.grpo import *

objective = {"ppo": 1.0, "kl": 0.01, "entropy_bonus": 0.001}
out_dir = "out/smollm2/entropy_bonus"
