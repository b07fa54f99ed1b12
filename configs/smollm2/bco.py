"""BCO on rows with a label of SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/bco.py --train_data=kto-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.kto import *

objective = "bco"
beta = 0.05
out_dir = "out/smollm2/bco"
