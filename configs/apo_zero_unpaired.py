"""Arithmetic apo_zero_unpaired: desirable up and undesirable down, no baseline.

    python train.py --config configs/apo_zero_unpaired.py

NUMBER
"""
from configs.kto import *

objective = "apo_zero_unpaired"
out_dir = "out/apo_zero_unpaired"
