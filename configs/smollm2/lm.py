"""`sft` computed from logits: SmolLM2-135M.

    python train.py --config configs/smollm2/lm.py --train_data=alpaca-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.sft import *

objective = "lm"
out_dir = "out/smollm2/lm"
