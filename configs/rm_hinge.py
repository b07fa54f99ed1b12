"""Arithmetic rm_hinge: no loss once a pair is right.

    python train.py --config configs/rm_hinge.py

NUMBER
"""
from configs.rm import *

objective = "rm_hinge"
out_dir = "out/rm_hinge"
