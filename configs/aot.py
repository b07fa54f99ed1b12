"""Arithmetic aot: differences of policy and reference, each sorted over the step.

    python train.py --config configs/aot.py

NUMBER
"""
from configs.dpo import *

objective = "aot"
out_dir = "out/aot"
