"""Arithmetic aot_unpaired: log-ratios of chosen and rejected, each sorted over the step.

    python train.py --config configs/aot_unpaired.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.95 (seed 0).
"""
from configs.dpo import *

objective = "aot_unpaired"
out_dir = "out/aot_unpaired"
