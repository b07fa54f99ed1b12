"""SFT of SmolLM2-135M (the base model) on alpaca rows, or any that sft takes.

    python train.py --config configs/smollm2/sft.py --train_data=alpaca-en.json

Starting values: they have not been tried in a whole run.
"""
objective = "sft"
init_from = "HuggingFaceTB/SmolLM2-135M"
train_data = "alpaca-en.json"
chat_template = "chatml"
out_dir = "out/smollm2/sft"

batch_size = 64
max_length = 1024
epochs = 2
lr = 2e-5
warmup_steps = 20
save_every = 100
