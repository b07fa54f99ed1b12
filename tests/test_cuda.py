"""On an accelerator: the same numbers as on a CPU, no waiting for the device between log lines, no recompilation after the first steps."""
import numpy as np
import pytest
import torch

import config
import data
import model
import train
from conftest import ROOT, TINY, as_dataset, random_trees
from test_train import SMALL, lines, options

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "qwen2"])
def test_both_attention_paths_agree_with_the_cpu(family):
    """Log-probs of packed trees and the gradient of their sum: grouped SDPA in fp32 and the variable-length kernel in bf16, against
    fp32 on the CPU."""
    dataset = as_dataset(random_trees(np.random.default_rng(0), 12, 97))
    decoder = model.scratch({"model_type": family, **TINY[family]}, 0)
    tokens = int(dataset.lengths.sum())

    def of(device, varlen, dtype):
        (batch,), _ = data.micro_batches(dataset, np.arange(12), data.Layout(tokens, varlen, False, device))
        decoder.to(device).zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            log_probs = decoder(batch, ["log_probs"])["log_probs"]
        log_probs.sum().backward()
        grad = torch.cat([p.grad.flatten() for p in decoder.parameters()])
        return log_probs.detach().cpu(), grad.cpu()
    exact, true = of("cpu", False, torch.float32)
    for varlen, dtype, within, off in ((False, torch.float32, 1e-4, 1e-3), (True, torch.bfloat16, 0.1, 0.05)):
        log_probs, grad = of("cuda", varlen, dtype)
        assert (log_probs - exact).abs().max() < within and (grad - true).norm() < off * true.norm()


@pytest.mark.parametrize("name", ["dpo", "sft", "kto", "rm", "prm", "ppo", "kd"])
def test_a_run_is_that_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for device in ("cpu", "cuda"):
        train.train(config.load(options(tmp_path, name, device, dtype="float32", device=device, lr=1e-3)))
    for ours, theirs in zip(lines(tmp_path / "cuda"), lines(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_no_wait_and_no_recompilation_after_the_first_steps(name, tmp_path, monkeypatch):
    """Steps 6 to 11, compiled, in bf16: a call that waits for the device is an error, and no graph is added."""
    monkeypatch.chdir(ROOT)
    rate, graphs = train.learning_rate, []

    def watched(cfg, peak, step, steps):
        torch.cuda.set_sync_debug_mode("error" if 5 <= step < 11 else "default")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return rate(cfg, peak, step, steps)
    monkeypatch.setattr(train, "learning_rate", watched)
    wide = {**SMALL, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    try:
        train.train(config.load(options(tmp_path, name, scratch=wide, device="cuda", dtype="bfloat16", save_dtype="bfloat16", compile=True,
                                        max_steps=12, log_every=12, micro_batch_tokens=4096)))  # one response alone is a graph
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(graphs) >= 12 and graphs[len(graphs) // 2] == graphs[-1]


def test_the_numbers_of_a_rollout_are_finite_in_bf16(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wide = {**SMALL, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    train.train(config.load(options(tmp_path, "ppo", scratch=wide, device="cuda", dtype="bfloat16", save_dtype="bfloat16", compile=True)))
    assert all(np.isfinite(line["loss"]) and abs(line["policy/rollout_kl"]) < 0.05 for line in lines(tmp_path / "run"))
