"""Arithmetic apo_zero: chosen up and rejected down, each by itself.

    python train.py --config configs/apo_zero.py

NUMBER
"""
from configs.dpo import *

objective = "apo_zero"
out_dir = "out/apo_zero"
