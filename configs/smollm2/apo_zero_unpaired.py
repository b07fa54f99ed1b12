"""APO-zero on rows with a label of SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/apo_zero_unpaired.py --train_data=kto-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.kto import *

objective = "apo_zero_unpaired"
out_dir = "out/smollm2/apo_zero_unpaired"
