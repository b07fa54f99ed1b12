"""PPO, a critic on the trunk of SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/ppo.py --train_data=gsm8k-train.jsonl

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.grpo import *

objective = {"ppo": 1.0, "value": 0.1}
advantages = "gae"
filter_groups = False
samples_per_prompt = 4
rollout_prompts = 128
kl_coef = 0.05
out_dir = "out/smollm2/ppo"
