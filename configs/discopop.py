"""Arithmetic discopop: logistic and exponential loss, mixed.

    python train.py --config configs/discopop.py

NUMBER
"""
from configs.dpo import *

objective = "discopop"
out_dir = "out/discopop"
