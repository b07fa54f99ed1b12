"""Arithmetic bco: each response classified against the running mean of rewards.

    python train.py --config configs/bco.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.50 (seed 0).
"""
from configs.kto import *

objective = "bco"
out_dir = "out/bco"
