"""Arithmetic hinge: a hinge on the difference of log-ratios (SLiC-HF).

    python train.py --config configs/hinge.py

NUMBER
"""
from configs.dpo import *

objective = "hinge"
out_dir = "out/hinge"
