"""Arithmetic dr_grpo: no division by the deviation of a group, nor by lengths.

    python train.py --config configs/dr_grpo.py

NUMBER
"""
from configs.grpo import *

objective = "ppo"
advantages = "group_center"
reduction = "dr_grpo"
out_dir = "out/dr_grpo"
