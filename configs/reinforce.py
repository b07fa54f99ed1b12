"""Arithmetic reinforce: REINFORCE++ with the mean of the group as its baseline.

    python train.py --config configs/reinforce.py

NUMBER
"""
from configs.grpo import *

objective = {"reinforce": 1.0, "kl": 0.01}
advantages = "reinforce_baseline"
reduction = "token"
out_dir = "out/reinforce"
