"""Robust DPO, which takes a tenth of the labels to be flipped: SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/robust.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "robust"
label_smoothing = 0.1
out_dir = "out/smollm2/robust"
