"""Arithmetic nca_pair: the chosen response is held up, whatever the rejected one does.

    python train.py --config configs/nca_pair.py

NUMBER
"""
from configs.dpo import *

objective = "nca_pair"
out_dir = "out/nca_pair"
