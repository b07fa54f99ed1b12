"""`sft` from logits of SmolLM2-135M.

    python train.py --config configs/smollm2/lm.py --train_data=alpaca-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.sft import *

objective = "lm"
out_dir = "out/smollm2/lm"
