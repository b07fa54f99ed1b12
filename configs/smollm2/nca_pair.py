"""NCA of SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/nca_pair.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "nca_pair"
beta = 0.01
lr = 5e-7
out_dir = "out/smollm2/nca_pair"
