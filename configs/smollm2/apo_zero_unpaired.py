"""APO-zero: SmolLM2-135M-Instruct on rows with a label.

    python train.py --config configs/smollm2/apo_zero_unpaired.py --train_data=kto-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.kto import *

objective = "apo_zero_unpaired"
out_dir = "out/smollm2/apo_zero_unpaired"
