"""Arithmetic entropy_bonus: GRPO that is paid for staying undecided.

    python train.py --config configs/entropy_bonus.py

Two to three minutes after the SFT stage. Exact match: 0.10 -> 0.99 (seed 0).
"""
from configs.grpo import *

objective = {"ppo": 1.0, "kl": 0.01, "entropy_bonus": 0.003}
out_dir = "out/entropy_bonus"
