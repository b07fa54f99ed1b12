"""Distillation of SmolLM2-360M-Instruct into SmolLM2-135M, on any rows that sft takes.

    python train.py --config configs/smollm2/kd.py --train_data=alpaca-en.json

Starting values: they have not been tried in a whole run.
"""
from configs.smollm2.sft import *

objective = "kd"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
teacher = "HuggingFaceTB/SmolLM2-360M-Instruct"
alpha = 0.9
chat_template = ""  # both have one
out_dir = "out/smollm2/kd"
