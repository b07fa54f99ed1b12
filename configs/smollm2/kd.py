"""Distillation of SmolLM2-360M-Instruct into the 135M model, on rows that sft takes of SmolLM2-135M.

    python train.py --config configs/smollm2/kd.py --train_data=alpaca-en.json

The values are a beginning: a whole run was not made.
"""
from configs.smollm2.sft import *

objective = "kd"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
teacher = "HuggingFaceTB/SmolLM2-360M-Instruct"
alpha = 0.9
chat_template = ""  # both have one
out_dir = "out/smollm2/kd"
