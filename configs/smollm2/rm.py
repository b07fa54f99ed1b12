"""A reward model of SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/rm.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "rm"
center_coef = 0.01
lr = 1e-5
del beta
out_dir = "out/smollm2/rm"
