"""A reward model from SmolLM2-135M-Instruct, on rankings {prompt, responses}, best first, or on pairs.

    python train.py --config configs/smollm2/rm_plackett_luce.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.rm import *

objective = "rm_plackett_luce"
del center_coef
out_dir = "out/smollm2/rm_plackett_luce"
