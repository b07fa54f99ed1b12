"""Arithmetic aot_unpaired: log-ratios of chosen and rejected, each sorted over the step.

    python train.py --config configs/aot_unpaired.py

NUMBER
"""
from configs.dpo import *

objective = "aot_unpaired"
out_dir = "out/aot_unpaired"
