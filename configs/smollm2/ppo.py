"""PPO with a critic on the policy's trunk: SmolLM2-135M-Instruct on GSM8K's questions.

    python train.py --config configs/smollm2/ppo.py --train_data=gsm8k-train.jsonl

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.grpo import *

objective = {"ppo": 1.0, "value": 0.1}
advantages = "gae"
filter_groups = False
samples_per_prompt = 4
rollout_prompts = 128
kl_coef = 0.05
out_dir = "out/smollm2/ppo"
