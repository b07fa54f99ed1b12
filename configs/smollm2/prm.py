"""A process reward model on Math-Shepherd's, PRM800K's or stepwise rows.

    python train.py --config configs/smollm2/prm.py --train_data=math-shepherd.jsonl

The values are a beginning: a whole run was not made.
"""
objective = "prm"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
train_data = "math-shepherd.jsonl"
out_dir = "out/smollm2/prm"

batch_size = 64
max_length = 1024
lr = 1e-5
warmup_steps = 10
save_every = 100
