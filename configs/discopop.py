"""Arithmetic discopop: logistic and exponential loss, mixed.

    python train.py --config configs/discopop.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.95 (seed 0).
"""
from configs.dpo import *

objective = "discopop"
out_dir = "out/discopop"
