"""A reward model with a hinge loss, from SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/rm_hinge.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.rm import *

objective = "rm_hinge"
out_dir = "out/smollm2/rm_hinge"
