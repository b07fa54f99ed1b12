"""Arithmetic rm_plackett_luce: the likelihood of a ranking, here of two.

    python train.py --config configs/rm_plackett_luce.py

NUMBER
"""
from configs.rm import *

objective = "rm_plackett_luce"
del center_coef
out_dir = "out/rm_plackett_luce"
