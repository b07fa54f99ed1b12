"""Arithmetic RLOO from the SFT model: REINFORCE whose baseline is the mean reward of the other answers to the prompt.

    python train.py --config configs/rloo.py
"""
from configs.grpo import *

objective = {"reinforce": 1.0, "kl": 0.01}
advantages = "rloo"
out_dir = "out/rloo"
