"""Arithmetic bco_pair: each response classified against the running mean of rewards.

    python train.py --config configs/bco_pair.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.94 (seed 0).
"""
from configs.dpo import *

objective = "bco_pair"
out_dir = "out/bco_pair"
