"""Robust DPO, a tenth of the labels taken to be flipped of SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/robust.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "robust"
label_smoothing = 0.1
out_dir = "out/smollm2/robust"
