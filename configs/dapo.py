"""Arithmetic in DAPO's way: a wider clip upwards, a mean over tokens, prompts that teach nothing replaced, long answers priced.

    python train.py --config configs/dapo.py

Exact match of held-out sums after 100 of its 300 steps: 0.10 -> 0.95 (seed 0, 90 seconds on one core).
"""
from configs.grpo import *

clip_eps_low, clip_eps_high = 0.2, 0.28
reduction = "token"
rollout_prompts, rollout_epochs = 128, 2
filter_groups, filter_rounds = True, 4
overlong_buffer = 4
out_dir = "out/dapo"
