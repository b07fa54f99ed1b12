"""SPPO with hard labels: SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/sppo_hard.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "sppo_hard"
beta = 0.001
lr = 5e-7
out_dir = "out/smollm2/sppo_hard"
