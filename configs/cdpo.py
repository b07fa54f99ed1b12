"""Arithmetic conservative DPO: a tenth of the labels is taken to be flipped.

    python train.py --config configs/cdpo.py
"""
from configs.dpo import *

label_smoothing = 0.1
out_dir = "out/cdpo"
