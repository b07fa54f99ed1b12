"""KTO: SmolLM2-135M-Instruct on rows with a label, or on pairs, each split into its two responses.

    python train.py --config configs/smollm2/kto.py --train_data=kto-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "kto"
train_data = "kto-en.json"
out_dir = "out/smollm2/kto"
