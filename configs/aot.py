"""Arithmetic aot: differences of policy and reference, each sorted over the step.

    python train.py --config configs/aot.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.95 (seed 0).
"""
from configs.dpo import *

objective = "aot"
out_dir = "out/aot"
