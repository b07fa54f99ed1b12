"""SimPO: SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/simpo.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "simpo"
beta = 2.0
gamma = 1.0
out_dir = "out/smollm2/simpo"
