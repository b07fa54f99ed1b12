"""Arithmetic sppo_hard: log-ratios regressed to plus and minus 1 / (2 beta).

    python train.py --config configs/sppo_hard.py

NUMBER
"""
from configs.dpo import *

objective = "sppo_hard"
out_dir = "out/sppo_hard"
