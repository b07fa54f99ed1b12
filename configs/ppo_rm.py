"""Arithmetic PPO against the trained reward model, with a critic of its own that starts from it.

    python train.py --config configs/ppo_rm.py
"""
from configs.ppo import *

reward = "configs/rm.py"
critic = "configs/rm.py"
critic_warmup = 8
kl_coef = 0.5
max_steps = 200
out_dir = "out/ppo_rm"
