"""Arithmetic nca_pair: the chosen response is held up, whatever the rejected one does.

    python train.py --config configs/nca_pair.py

About 15 seconds after the SFT stage. Exact match: 0.10 -> 0.96 (seed 0).
"""
from configs.dpo import *

objective = "nca_pair"
out_dir = "out/nca_pair"
