"""AOT on pairs of SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/aot.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "aot"
out_dir = "out/smollm2/aot"
