"""Arithmetic apo_zero_unpaired: desirable up and undesirable down, no baseline.

    python train.py --config configs/apo_zero_unpaired.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.50 (seed 0).
"""
from configs.kto import *

objective = "apo_zero_unpaired"
out_dir = "out/apo_zero_unpaired"
