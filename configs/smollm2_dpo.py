"""DPO of a real model on real pairs: SmolLM2-135M-Instruct on Anthropic's HH transcripts, or any folder and pairs.

    python train.py --config configs/smollm2_dpo.py --init_from=path/to/SmolLM2-135M-Instruct \\
        --train_data=hh-harmless-test.jsonl.gz

2 CPU cores, fp32, 64 pairs a step: about a minute a step. On a GPU drop dtype (bfloat16 is the default there).
"""
objective = "dpo"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
train_data = "hh-harmless-test.jsonl.gz"
out_dir = "out/smollm2_dpo"

beta = 0.1
batch_size = 64
max_length = 512
lr = 1e-6
warmup_steps = 10
save_every = 20
