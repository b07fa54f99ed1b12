"""Losses against float64 restatements written from the formulas; the fused head against plain logits."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import losses
from conftest import ROOT

sigmoid = lambda x: 1 / (1 + np.exp(-x))


def pairs(count=7, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(-30, 8, count), dtype=dtype, requires_grad=True) for _ in range(4)]


def restated_dpo(pc, pr, rc, rr, beta, label_smoothing):
    """arXiv:2305.18290 eq. 7, the probability of the label written out, with a share of labels flipped."""
    p = sigmoid(beta * (np.log(np.exp(pc - rc)) - np.log(np.exp(pr - rr))))
    return -(1 - label_smoothing) * np.log(p) - label_smoothing * np.log(1 - p)


def restated_ipo(pc, pr, rc, rr, beta):
    """arXiv:2310.12036 eq. 17: (h - 1/(2 tau))^2."""
    return (pc - pr - rc + rr - 0.5 / beta) ** 2


@pytest.mark.parametrize("loss, restated, options", [
    (losses.dpo, restated_dpo, dict(beta=0.1, label_smoothing=0.0)),
    (losses.dpo, restated_dpo, dict(beta=0.5, label_smoothing=0.2)),
    (losses.ipo, restated_ipo, dict(beta=0.1))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_pairs_against_their_formulas(loss, restated, options, dtype, tolerance):
    inputs = pairs(dtype=dtype)
    values, mask, _ = loss(*inputs, **options)
    numbers = [x.detach().double().numpy() for x in inputs]
    expected = restated(*numbers, **options)
    assert mask is None and np.abs(values.detach().numpy() - expected).max() <= tolerance * (1 + np.abs(expected).max())
    values.sum().backward()
    for i, x in enumerate(inputs):  # central differences of the restatement
        step = np.zeros(len(inputs)) + [1e-5 if j == i else 0 for j in range(4)]
        up, down = (restated(*[n + s * sign for n, s in zip(numbers, step)], **options) for sign in (1, -1))
        slope = (up - down) / 2e-5
        assert np.abs(x.grad.numpy() - slope).max() <= max(tolerance, 1e-7) * (1 + np.abs(slope).max())


def test_gradcheck():
    for loss in (losses.dpo, losses.ipo):
        assert torch.autograd.gradcheck(lambda *x: loss(*x)[0], pairs())


def test_values_at_the_start():
    chosen, rejected = torch.tensor([-40.0, -7.0]), torch.tensor([-39.0, -90.0])
    start = (chosen, rejected, chosen, rejected)
    assert torch.allclose(losses.dpo(*start)[0], torch.tensor(math.log(2)))
    assert torch.allclose(losses.ipo(*start, beta=0.1)[0], torch.tensor(25.0))
    metrics = losses.dpo(*start)[2]
    assert (metrics["rewards/accuracies"][0] == 0.5).all() and (metrics["rewards/margins"][0] == 0).all()


def test_ipo_length_normalized_divides_each_log_ratio():
    pc, pr, rc, rr = pairs(3)
    n, m = torch.tensor([3, 5, 2]), torch.tensor([4, 1, 7])
    values = losses.ipo(pc, pr, rc, rr, n, m, beta=0.2, length_normalized=True)[0]
    assert torch.allclose(values, ((pc - rc) / n - (pr - rr) / m - 2.5) ** 2)


def test_sft_counts_tokens_or_sequences():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, torch.nan, torch.nan], [-9.0, -9.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])  # row 3 is not to be imitated
    values, counted, metrics = losses.sft(logps, mask)
    assert losses.reduced(values, counted) == (10.0, 4.0)
    assert losses.reduced(*losses.sft(logps, mask, per_sequence=True)[:2]) == (6.0, 2.0)
    losses.reduced(values, counted)[0].backward()
    assert torch.equal(logps.grad, -mask.float())  # and no NaN from masked places


def test_losses_need_torch_alone(tmp_path):
    (tmp_path / "losses.py").write_text((ROOT / "losses.py").read_text())
    code = ("import sys; sys.path.insert(0, '.'); import torch; from losses import dpo, ipo, sft\n"
            "x = torch.zeros(3); print(dpo(x, x, x, x)[0][0].item())\n"
            f"assert not any(getattr(m, '__file__', None) and m.__file__.startswith({str(ROOT)!r}) for m in sys.modules.values())")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "0.6931471824645996", done.stderr


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_compiled_equals_eager_without_break_or_recompilation(name):
    """Whole graph, dynamic shapes: one compilation for ten sizes; the same value and gradient."""
    objective = losses.OBJECTIVES[name]
    torch._dynamo.reset()
    compiled = torch.compile(objective.loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for rows, longest in zip(range(3, 13), range(14, 4, -1)):
        generator = torch.Generator().manual_seed(rows)
        inputs = [fake_reading(read, rows, longest, generator) for read in objective.reads]
        grads = []
        for function in (objective.loss, compiled):
            values, mask, _ = function(*inputs)
            total, _ = losses.reduced(values, mask)
            grads.append([total.detach(), *torch.autograd.grad(total, [x for x in inputs if x.requires_grad])])
        for a, b in zip(*grads):
            assert ((a - b).abs() <= 1e-5 * (1 + a.abs())).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def fake_reading(name, rows, longest, generator):
    if name.endswith("_mask"):
        return torch.rand(rows, longest, generator=generator) < 0.7
    if name.endswith("_lengths"):
        return torch.randint(1, 50, (rows,), generator=generator)
    shape = (rows,) if name.endswith("_logps") else (rows, longest)
    return (torch.randn(shape, generator=generator) * 5 - 20).requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# The fused linear -> log-prob


def naive(hidden, weight, target, temperature):
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(1, target[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("rows, chunk, temperature, compiled", [
    (1, 64, 1.0, False), (64, 64, 1.0, False), (200, 64, 1.0, False), (200, 0, 1.0, False), (200, 64, 0.7, False),
    (128, 64, 1.0, True)])
def test_fused_equals_naive(rows, chunk, temperature, compiled):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 24, generator=generator).requires_grad_(True)
    weight = torch.randn(331, 24, generator=generator).requires_grad_(True)
    target, upstream = torch.randint(331, (rows,), generator=generator), torch.randn(2, rows, generator=generator)
    results = []
    for function in (lambda: naive(hidden, weight, target, temperature),
                     lambda: losses.linear_log_probs(hidden, weight, target, temperature=temperature, entropy=True,
                                                     chunk=chunk, compiled=compiled)):
        logps, entropy = function()
        results.append([logps, entropy, *torch.autograd.grad((logps * upstream[0] + entropy * upstream[1]).sum(), (hidden, weight))])
    for expected, found in zip(*results):
        assert (expected - found).norm() <= 1e-5 * expected.norm()


def test_fused_gradcheck_and_frozen_head():
    hidden, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    function = lambda h, w: losses.linear_log_probs(h, w, target, entropy=True, chunk=2)
    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: function(h, weight.detach()), (hidden,))


def test_fused_in_bf16_keeps_fp32_log_probs():
    """bf16 hidden states against a float64 computation on the same rounded values: the log-probs are fp32-exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(128, 64, generator=generator).bfloat16().requires_grad_(True)
    weight = (torch.randn(1000, 64, generator=generator) * 0.3).requires_grad_(True)
    target = torch.randint(1000, (128,), generator=generator)
    logps, _ = losses.linear_log_probs(hidden, weight, target)
    exact = naive(hidden.double(), weight.double(), target, 1.0)[0]
    assert logps.dtype == torch.float32 and (logps - exact).abs().max() < 1e-4
    found, expected = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logps, exact))
    assert (found[0] - expected[0]).norm() < 5e-3 * expected[0].norm()  # rounded to bf16 once
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


MEASURE = """
import sys, torch, losses
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
vocab, rows = int(sys.argv[1]), int(sys.argv[2])
hidden = torch.randn(rows, 32, requires_grad=True)
weight = torch.randn(vocab, 32, requires_grad=True)
before = peak()
losses.linear_log_probs(hidden, weight, torch.zeros(rows, dtype=torch.long))[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_vocabulary_times_tokens():
    def peak(vocab, rows):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(vocab), str(rows)], cwd=ROOT, capture_output=True, text=True, check=True)
        return float(done.stdout)
    table = {(vocab, rows): peak(vocab, rows) for vocab in (32_000, 151_936) for rows in (1024, 4096)}
    print({f"V={v:,} N={n:,}": f"{mb:.0f} MB" for (v, n), mb in table.items()})
    for vocab in (32_000, 151_936):
        full = 3072 * vocab * 4 / 2**20  # what [N, V] logits of the additional rows would take, once
        assert table[vocab, 4096] - table[vocab, 1024] < 0.25 * full, table
