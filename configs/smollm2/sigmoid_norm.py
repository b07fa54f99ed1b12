"""Length-normalised DPO with Tulu 3's values: SmolLM2-135M-Instruct on pairs.

    python train.py --config configs/smollm2/sigmoid_norm.py --train_data=hh-harmless-test.jsonl.gz

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.dpo import *

objective = "sigmoid_norm"
beta = 5.0
lr = 5e-7
schedule = "linear"
out_dir = "out/smollm2/sigmoid_norm"
