"""Arithmetic GSPO from the SFT model: the ratio and its clip are of whole answers.

    python train.py --config configs/gspo.py

Three to five minutes on two CPU cores after the SFT stage. Exact match of held-out sums: 0.10 to 0.13 -> 0.96 to 0.98.
"""
from configs.grpo import *

objective = {"gspo": 1.0, "kl": 0.01}
rollout_prompts = 128
max_steps = 400
out_dir = "out/gspo"
