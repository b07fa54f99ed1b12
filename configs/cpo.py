"""Arithmetic cpo: no reference model, NLL of the chosen response.

    python train.py --config configs/cpo.py

NUMBER
"""
from configs.dpo import *

objective = "cpo"
alpha = 1.0
nll_coef = 0.0  # it has its own
out_dir = "out/cpo"
