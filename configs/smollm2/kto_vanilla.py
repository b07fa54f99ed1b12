"""KTO with the other class for a baseline of SmolLM2-135M-Instruct.

    python train.py --config configs/smollm2/kto_vanilla.py --train_data=kto-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.kto import *

objective = "kto_vanilla"
out_dir = "out/smollm2/kto_vanilla"
