"""A reward model with log(1 + exp(-margin)), from SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/rm_logexp.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.rm import *

objective = "rm_logexp"
out_dir = "out/smollm2/rm_logexp"
