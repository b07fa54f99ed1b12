"""KTO of SmolLM2-135M-Instruct, on rows with a label or on pairs taken apart.

    python train.py --config configs/smollm2/kto.py --train_data=kto-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.dpo import *

objective = "kto"
train_data = "kto-en.json"
out_dir = "out/smollm2/kto"
