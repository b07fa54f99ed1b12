"""Arithmetic reward model from the SFT model: right answers scored above answers with dropped carries.

    python train.py --config configs/rm.py

About 25 seconds after the SFT stage. It ranks 0.998 to 1.000 of 500 held-out pairs right (three seeds); their scores
are in out/rm/predictions.jsonl.
"""
objective = "rm"
init_from = "configs/sft.py"
train_data = "tasks/arithmetic/pairs.jsonl"
eval_data = "tasks/arithmetic/pairs_eval.jsonl"
max_length = 64
out_dir = "out/rm"

center_coef = 0.01
batch_size = 64
epochs = 10
lr = 1e-3
warmup_steps = 10
eval_every = 50
