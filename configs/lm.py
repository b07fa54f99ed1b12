"""Arithmetic lm: the cross-entropy of `sft`, taken from logits a chunk at a time.

    python train.py --config configs/lm.py

NUMBER
"""
from configs.sft import *

objective = "lm"
out_dir = "out/lm"
