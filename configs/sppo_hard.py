"""Arithmetic sppo_hard: log-ratios regressed to plus and minus 1 / (2 beta).

    python train.py --config configs/sppo_hard.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.97 (seed 0).
"""
from configs.dpo import *

objective = "sppo_hard"
out_dir = "out/sppo_hard"
