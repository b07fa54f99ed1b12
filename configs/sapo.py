"""Arithmetic sapo: a soft gate in the place of the clip.

    python train.py --config configs/sapo.py

Two to three minutes after the SFT stage. Exact match: 0.10 -> 0.99 (seed 0).
"""
from configs.grpo import *

objective = {"sapo": 1.0, "kl": 0.01}
sapo_reduction = kl_reduction = reduction
del reduction
out_dir = "out/sapo"
