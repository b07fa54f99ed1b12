"""Arithmetic process reward model from the SFT model: is each running total right, given the one before?

    python train.py --config configs/prm.py

About 20 seconds after the SFT stage. 0.98 to 0.99 of held-out steps are judged right, and the first wrong one is found in
0.96 to 0.98 of the solutions that have one (seed 0), as this says:

    python sample.py score --model=out/prm --data=tasks/arithmetic/steps_eval.jsonl --out=steps.jsonl
"""
objective = "prm"
init_from = "configs/sft.py"
train_data = "tasks/arithmetic/steps.jsonl"
eval_data = "tasks/arithmetic/steps_eval.jsonl"
max_length = 64
out_dir = "out/prm"

batch_size = 64
epochs = 5
lr = 1e-3
warmup_steps = 10
eval_every = 50
