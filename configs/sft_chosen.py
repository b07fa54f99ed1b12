"""Arithmetic SFT on the chosen responses of the pairs: what configs/dpo.py has to be compared with, step for step.

    python train.py --config configs/sft_chosen.py

About 10 seconds after the SFT stage. Exact match: 0.11 -> 0.90 to 0.97.
"""
from configs.dpo import *

objective = "sft"
out_dir = "out/sft_chosen"
del beta, nll_coef
