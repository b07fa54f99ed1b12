"""Arithmetic apo_zero: chosen up and rejected down, each by itself.

    python train.py --config configs/apo_zero.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.96 (seed 0).
"""
from configs.dpo import *

objective = "apo_zero"
out_dir = "out/apo_zero"
