"""Arithmetic sigmoid_norm: log-ratios per token, as in Tulu 3.

    python train.py --config configs/sigmoid_norm.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.96 (seed 0).
"""
from configs.dpo import *

objective = "sigmoid_norm"
beta = 1.0
out_dir = "out/sigmoid_norm"
