"""DPO of a real model on real pairs: SmolLM2-135M-Instruct on Anthropic's HH transcripts, or any folder and pairs.

    python train.py --config configs/smollm2/dpo.py --init_from=path/to/SmolLM2-135M-Instruct \\
        --train_data=hh-harmless-test.jsonl.gz

With --lr=5e-6 --batch_size=32 --dtype=bfloat16 one epoch over 1,912 pairs took an hour on one CPU core: of 400 held-out pairs 0.50 -> 0.63
ranked right. On a GPU compute is bfloat16 by default.
"""
objective = "dpo"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
train_data = "hh-harmless-test.jsonl.gz"
out_dir = "out/smollm2/dpo"

beta = 0.1
batch_size = 64
max_length = 512
lr = 1e-6
warmup_steps = 10
save_every = 20
