"""A reward model on rankings {prompt, responses}, best first, or pairs from SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/rm_plackett_luce.py --train_data=hh-harmless-test.jsonl.gz

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.rm import *

objective = "rm_plackett_luce"
del center_coef
out_dir = "out/smollm2/rm_plackett_luce"
