"""A process reward model, on rows of Math-Shepherd or PRM800K, or stepwise ones.

    python train.py --config configs/smollm2/prm.py --train_data=math-shepherd.jsonl

Starting values: they have not been tried in a whole run.
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
