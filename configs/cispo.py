"""Arithmetic cispo: the ratio is clipped and the token keeps its gradient.

    python train.py --config configs/cispo.py

NUMBER
"""
from configs.grpo import *

objective = {"cispo": 1.0, "kl": 0.01}
clip_eps_high = 0.28
out_dir = "out/cispo"
