"""SPPO with hard labels of SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/sppo_hard.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "sppo_hard"
beta = 0.001
lr = 5e-7
out_dir = "out/smollm2/sppo_hard"
