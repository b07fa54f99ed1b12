"""Arithmetic bco: each response classified against the running mean of rewards.

    python train.py --config configs/bco.py

NUMBER
"""
from configs.kto import *

objective = "bco"
out_dir = "out/bco"
