"""Arithmetic apo_down: both down, the rejected ones more: for pairs worse than the policy.

    python train.py --config configs/apo_down.py

NUMBER
"""
from configs.dpo import *

objective = "apo_down"
out_dir = "out/apo_down"
