"""Arithmetic PPO against the trained reward model, with a critic of its own that starts from it.

    python train.py --config configs/ppo_rm.py

About three minutes after the SFT and the reward stage. Exact match of held-out sums: 0.10 -> 0.93 (seed 0), the reward model's
score -2.7 -> 3.0. With kl_coef = 0.05 and 400 steps the score rises to 3.3 and exact match falls to 0.58: the reward model has
seen dropped carries only, and the policy learns to add some that are not there.
"""
from configs.ppo import *

reward = "configs/rm.py"
critic = "configs/rm.py"
critic_warmup = 8
kl_coef = 0.5
max_steps = 200
out_dir = "out/ppo_rm"
