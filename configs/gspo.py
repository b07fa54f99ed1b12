"""Arithmetic GSPO from the SFT model.

    python train.py --config configs/gspo.py
"""
from configs.grpo import *

objective = "gspo"
del reduction
rollout_prompts = 128
out_dir = "out/gspo"
