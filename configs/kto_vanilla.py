"""Arithmetic kto_vanilla: each class against the other one's mean.

    python train.py --config configs/kto_vanilla.py

NUMBER
"""
from configs.kto import *

objective = "kto_vanilla"
out_dir = "out/kto_vanilla"
