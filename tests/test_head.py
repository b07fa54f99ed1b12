"""The fused linear -> log-prob against plain logits: values, gradients, precision, memory."""
import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import losses
from conftest import ROOT

def naive(hidden, weight, target, temperature):
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(1, target[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("rows, chunk, temperature, compiled", [
    (1, 64, 1.0, False), (64, 64, 1.0, False), (200, 64, 1.0, False), (200, 0, 1.0, False), (200, 64, 0.7, False),
    (128, 64, 1.0, True), (128, 64, 0.7, True)])
def test_fused_equals_naive(rows, chunk, temperature, compiled):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 24, generator=generator).requires_grad_(True)
    weight = torch.randn(331, 24, generator=generator).requires_grad_(True)
    target, upstream = torch.randint(331, (rows,), generator=generator), torch.randn(2, rows, generator=generator)
    results = []
    for function in (lambda: naive(hidden, weight, target, temperature),
                     lambda: losses.linear_log_probs(hidden, weight, target, temperature=temperature, entropy=True,
                                                     chunk=chunk, compiled=compiled)):
        logps, entropy = function()[:2]
        results.append([logps, entropy, *torch.autograd.grad((logps * upstream[0] + entropy * upstream[1]).sum(), (hidden, weight))])
    for expected, found in zip(*results):
        assert (expected - found).norm() <= 1e-5 * expected.norm()


def test_backward_under_autocast():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    plain = torch.autograd.grad(losses.linear_log_probs(hidden, weight, target)[0].sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(losses.linear_log_probs(hidden, weight, target)[0].sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_fused_gradcheck_and_frozen_head():
    hidden, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, 3, 1])
    function = lambda h, w: losses.linear_log_probs(h, w, target, entropy=True, chunk=2)[:2]
    assert torch.autograd.gradcheck(function, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: function(h, weight.detach()), (hidden,))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_kept_changes_no_gradient(temperature, compiled):
    """Softmax of all chunks, some or none, or of a frozen head: the gradients of the naive head, by fewer FLOPs."""
    hidden = torch.randn(200, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(331, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)
    target, upstream = torch.arange(200), torch.linspace(-1, 1, 200, dtype=torch.float64)
    expected = torch.autograd.grad((naive(hidden, weight, target, temperature)[0] * upstream).sum(), (hidden, weight))
    row = 331 * 8  # bytes; the last of the chunks has 8 rows
    for keep, product in ((0, 8), (10**9, 6), (72 * row, 8 - 2 * 72 / 200), (None, 8 - 2 * 8 / 200), ("frozen", 4)):
        w, options = (weight.detach(), {}) if keep == "frozen" else (weight, {"keep": keep})
        with contextlib.nullcontext() if compiled else FlopCounterMode(display=False) as counter:
            logps = losses.linear_log_probs(hidden, w, target, temperature=temperature, chunk=64, compiled=compiled, **options)[0]
            found = torch.autograd.grad((logps * upstream).sum(), [x for x in (hidden, w) if x.requires_grad])
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, expected)), keep
        uncounted = 0 if keep == "frozen" else 2  # the product that is added to the weight's gradient in place
        assert compiled or counter.get_total_flops() == round((product - uncounted) * 200 * 331 * 24), keep


def test_backward_twice():
    """What was kept is gone after the first backward, and made again."""
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    logps = losses.linear_log_probs(hidden, weight, torch.arange(5))[0]
    first, second = (torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(first, second))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_kept_in_bf16_loses_no_confident_token(temperature):
    """As on CUDA: rounded to bf16 behind the subtraction of the target's one, it has the gradient of fp32 to a bf16 ulp."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 24, generator=generator), torch.randn(331, 24, generator=generator)
    target = (hidden @ weight.T).argmax(-1)  # where the model is sure
    upstream = torch.randn(64, generator=generator)
    p = losses._chunk_logps(hidden, weight, target, temperature, False, False, torch.bfloat16)[3]
    kept = losses._chunk_grad(hidden, weight, target, temperature, upstream, None, p)
    exact = losses._chunk_grad(hidden.double(), weight.double(), target, temperature, upstream.double(), None, None)
    assert p.dtype == kept.dtype == torch.bfloat16
    assert ((kept - exact).norm(dim=1) <= 2**-7 * exact.norm(dim=1)).all()


def test_nothing_is_kept_without_grad(monkeypatch):
    kept, chunk = [], losses._chunk_logps
    monkeypatch.setattr(losses, "_chunk_logps", lambda *given: kept.append(given[-1]) or chunk(*given))
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.no_grad():
        losses.linear_log_probs(hidden, weight, torch.arange(5))
    losses.linear_log_probs(hidden, weight, torch.arange(5), entropy=True)
    assert kept == [None, None]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_in_bf16_keeps_fp32_log_probs(temperature):
    """bf16 hidden states against a float64 computation on the same rounded values: the log-probs are fp32-exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(128, 64, generator=generator).bfloat16().requires_grad_(True)
    weight = (torch.randn(1000, 64, generator=generator) * 0.3).requires_grad_(True)
    target = torch.randint(1000, (128,), generator=generator)
    logps = losses.linear_log_probs(hidden, weight, target, temperature=temperature)[0]
    exact = naive(hidden.double(), weight.double(), target, temperature)[0]
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


@pytest.mark.parametrize("compiled", [False, True])
def test_collision_is_the_log_sum_of_squared_probabilities(compiled):
    """A third output that leaves the other two and their gradient as they are, and has none of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(128, 24, generator=generator, dtype=torch.float64).requires_grad_(True)
    weight, target = torch.randn(331, 24, generator=generator, dtype=torch.float64), torch.randint(331, (128,), generator=generator)
    plain = losses.linear_log_probs(hidden, weight, target, chunk=64)
    logps, entropy, collision = losses.linear_log_probs(hidden, weight, target, collision=True, chunk=64, compiled=compiled)
    expected = (hidden @ weight.T).softmax(-1).square().sum(-1).log()
    assert plain[1] is plain[2] is entropy is None and not collision.requires_grad
    assert (collision - expected).abs().max() < 1e-12 and (logps - plain[0]).abs().max() < 1e-12
    a, b = (torch.autograd.grad(x.sum(), hidden)[0] for x in (logps, plain[0]))
    assert (a - b).abs().max() < 1e-12
