"""Arithmetic hinge: a hinge on the difference of log-ratios (SLiC-HF).

    python train.py --config configs/hinge.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.96 (seed 0).
"""
from configs.dpo import *

objective = "hinge"
out_dir = "out/hinge"
