"""Arithmetic exo_pair: the reverse KL to the pair's preference.

    python train.py --config configs/exo_pair.py

NUMBER
"""
from configs.dpo import *

objective = "exo_pair"
out_dir = "out/exo_pair"
