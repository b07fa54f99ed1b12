"""APO-zero: SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/apo_zero.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "apo_zero"
out_dir = "out/smollm2/apo_zero"
