"""Arithmetic rm_logexp: log(1 + exp(-margin)): the same function as `rm`.

    python train.py --config configs/rm_logexp.py

NUMBER
"""
from configs.rm import *

objective = "rm_logexp"
out_dir = "out/rm_logexp"
