"""Arithmetic from nothing: a 0.6M-parameter Llama imitates a demonstrator who drops most carries.

    python train.py --config configs/sft.py

About a minute on two CPU cores. Exact match of held-out sums: 0 -> 0.10 to 0.13.
"""
from tasks.arithmetic.task import is_right

objective = "sft"
init_from = "scratch"
tokenizer = "tasks/arithmetic"
scratch = dict(model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
               max_position_embeddings=128, initializer_range=0.09)  # 1 / sqrt(hidden_size)
train_data = "tasks/arithmetic/sft.jsonl"
eval_data = "tasks/arithmetic/sft_eval.jsonl"
eval_prompts = "tasks/arithmetic/problems_eval.jsonl"
check = is_right
max_new_tokens = 16
max_length = 64
out_dir = "out/sft"

batch_size = 64
epochs = 8
lr = 2e-3
warmup_steps = 20
betas = (0.9, 0.95)
weight_decay = 0.01
eval_every = 250
