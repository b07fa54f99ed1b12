"""Arithmetic PPO from the SFT model: a critic on the policy's trunk, two passes over every rollout, a KL penalty in the reward.

    python train.py --config configs/ppo.py
"""
from configs.grpo import *

objective = {"ppo": 1.0, "value": 0.5}
advantages = "gae"
samples_per_prompt = 1
rollout_prompts = 512
rollout_epochs = 2
batch_size = 256
kl_coef = 0.01
reduction = "token"
max_steps = 600
out_dir = "out/ppo"
