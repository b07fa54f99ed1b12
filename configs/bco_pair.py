"""Arithmetic bco_pair: each response classified against the running mean of rewards.

    python train.py --config configs/bco_pair.py

NUMBER
"""
from configs.dpo import *

objective = "bco_pair"
out_dir = "out/bco_pair"
