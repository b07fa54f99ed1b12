"""Arithmetic SimPO from the SFT model: mean log-probs of responses compared, no reference model.

    python train.py --config configs/simpo.py

About 10 seconds after the SFT stage. Exact match: 0.11 -> 0.74 to 0.96.
"""
from configs.dpo import *

objective = "simpo"
out_dir = "out/simpo"
beta = 2.0
gamma = 1.0
