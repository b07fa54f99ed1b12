"""Arithmetic GSPO from the SFT model.

    python train.py --config configs/gspo.py
"""
from configs.grpo import *

objective = {"gspo": 1.0, "kl": 0.01}
rollout_prompts = 128
max_steps = 400
out_dir = "out/gspo"
