"""A reward model, log(1 + exp(-margin)) from SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/rm_logexp.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.rm import *

objective = "rm_logexp"
out_dir = "out/smollm2/rm_logexp"
