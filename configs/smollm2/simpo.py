"""SimPO of SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/simpo.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "simpo"
beta = 2.0
gamma = 1.0
out_dir = "out/smollm2/simpo"
