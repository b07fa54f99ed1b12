"""Arithmetic distillation: a student of half the size, from scratch, imitates the DPO model's distribution on the SFT rows.

    python train.py --config configs/kd.py

About a minute after the SFT and DPO stages, which it runs first. Exact match: 0 -> 0.95; the same student trained on the rows
themselves (configs/sft.py with this scratch): 0.11 (seed 0).
"""
from configs.sft import *

objective = "kd"
teacher = "configs/dpo.py"
out_dir = "out/kd"
alpha = 1.0  # the teacher alone: half of the rows' own answers are wrong
scratch = {**scratch, "hidden_size": 96, "intermediate_size": 256}
