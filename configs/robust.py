"""Arithmetic robust: unbiased if a tenth of the labels is flipped.

    python train.py --config configs/robust.py

NUMBER
"""
from configs.dpo import *

objective = "robust"
label_smoothing = 0.1
out_dir = "out/robust"
