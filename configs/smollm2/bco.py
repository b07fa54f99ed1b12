"""BCO: SmolLM2-135M-Instruct on rows with a label.

    python train.py --config configs/smollm2/bco.py --train_data=kto-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.kto import *

objective = "bco"
beta = 0.05
out_dir = "out/smollm2/bco"
