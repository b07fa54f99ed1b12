"""KTO with the mean of the other class as its baseline: SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/kto_vanilla.py --train_data=kto-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.kto import *

objective = "kto_vanilla"
out_dir = "out/smollm2/kto_vanilla"
