"""Arithmetic ORPO from the SFT model: NLL of the chosen response and an odds ratio, no reference model.

    python train.py --config configs/orpo.py

About 10 seconds after the SFT stage. Exact match: 0.11 -> 0.89 to 0.97.
"""
from configs.dpo import *

objective = "orpo"
out_dir = "out/orpo"
beta = 0.1
nll_coef = 0.0  # it has its own
