"""Arithmetic reinforce: REINFORCE++ with the mean of the group as its baseline.

    python train.py --config configs/reinforce.py

Two to three minutes after the SFT stage. Exact match: 0.10 -> 0.98 (seed 0).
"""
from configs.grpo import *

objective = {"reinforce": 1.0, "kl": 0.01}
advantages = "reinforce_baseline"
reduction = "token"
out_dir = "out/reinforce"
