"""Arithmetic dr_grpo: no division by the deviation of a group, nor by lengths.

    python train.py --config configs/dr_grpo.py

Two to three minutes after the SFT stage. Exact match: 0.10 -> 0.98 (seed 0).
"""
from configs.grpo import *

objective = "ppo"
advantages = "group_center"
reduction = "dr_grpo"
out_dir = "out/dr_grpo"
