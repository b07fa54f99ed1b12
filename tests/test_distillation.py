"""Distillation: the loss on logits that are made a chunk at a time, and where a teacher's logits come from."""
import os
import subprocess
import sys

import pytest
import torch

import config
import data
import losses
import model
import train
from conftest import ROOT
from launch import run
from machine import find_machine
from test_train import SMALL, assert_close, lines, options, weights


def made(seed=0, n=37, vocab=53):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    student = losses.Projected(draw(n, 8).requires_grad_(True), draw(vocab, 8).requires_grad_(True))
    label = torch.randint(vocab, (n,), generator=generator)
    return student, losses.Projected(draw(n, 6), draw(vocab + 3, 6)), torch.where(torch.arange(n) % 5 == 0, -100, label)


@pytest.mark.parametrize("options", [{}, dict(alpha=1.0, temperature=2.0), dict(alpha=0.7, jsd_beta=0.4), dict(jsd_beta=1.0)])
def test_chunks_are_the_whole(options, monkeypatch):
    """Values, metrics and gradients of a loss by chunks are those of the loss on whole logits; the last chunk is a part of one."""
    student, teacher, label = made()
    monkeypatch.setattr(losses, "head_chunk", lambda vocab, device: 16)
    whole = losses.kd(student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T, label, **options)
    parts = losses.by_chunk(losses.kd, student, teacher, label, **options)
    assert (whole[0] - parts[0]).abs().max() < 1e-12 and torch.equal(whole[1], parts[1])
    for name, (values, mask) in whole[2].items():
        assert (values - parts[2][name][0]).abs().max() < 1e-12 and torch.equal(mask, parts[2][name][1])
    for reduce in (lambda values, mask, _: values.sum(), lambda values, mask, _: losses.reduced(values, mask)[0] / 7):
        for a, b in zip(*(torch.autograd.grad(reduce(*x), tuple(student), retain_graph=x is whole) for x in (whole, parts))):
            assert (a - b).abs().max() < 1e-10
        parts = losses.by_chunk(losses.kd, student, teacher, label, **options)
    plain = losses.by_chunk(losses.kd, student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T, label, **options)
    assert torch.equal(plain[0], whole[0])


def test_gradients_that_are_made_with_the_values(monkeypatch):
    """Of a bf16 head in fp32 until it is whole; none where none is asked for; of what else a loss reads, an error."""
    student, teacher, label = made(n=61)
    monkeypatch.setattr(losses, "head_chunk", lambda vocab, device: 16)
    run = lambda student, label=label: losses.by_chunk(losses.kd, student, teacher, label)[0].sum()
    frozen = losses.Projected(student.hidden, student.weight.detach())
    assert torch.equal(*(torch.autograd.grad(run(s), s.hidden)[0] for s in (student, frozen)))
    low = losses.Projected(*(x.detach().bfloat16().requires_grad_() for x in student))
    of_low = losses.Projected(*(x.detach().double().requires_grad_() for x in low))
    found, expected = (torch.autograd.grad(run(s), s.weight)[0] for s in (low, of_low))
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 3e-3 * expected.norm()
    with torch.no_grad():
        assert not run(student).requires_grad
    assert not run(losses.Projected(*(x.detach() for x in student))).requires_grad
    with pytest.raises(ValueError, match="a loss on logits gives gradients to the logits only, and another of its inputs requires one"):
        losses.by_chunk(lambda logits, more: (logits.sum(-1) * more, None, {}), student, torch.ones(61, requires_grad=True))
    with pytest.raises(TypeError, match="a coupled loss cannot read logits: they exist only in chunks"):
        losses.objective(data="sft", per="tokens", coupled=True)(lambda logits: (logits.sum(-1), None, {}))


def test_gradients_are_there_once_and_of_a_sum():
    """What they cannot be the gradient of makes them NaN, which a run finds, or is an error."""
    student, teacher, label = made()
    values = losses.by_chunk(losses.kd, student, teacher, label)[0]
    weighted = torch.autograd.grad((values * torch.arange(37)).sum(), tuple(student), retain_graph=True)
    assert all(g.isnan().all() for g in weighted)
    with pytest.raises(RuntimeError, match="a loss on logits allows only one backward"):
        values.sum().backward()


@pytest.mark.parametrize("n", [0, 1, 16, 37])
def test_without_a_token_to_train_on_there_is_a_gradient_of_zero(n, monkeypatch):
    monkeypatch.setattr(losses, "head_chunk", lambda vocab, device: 16)
    student, teacher, label = made(n=n)
    values, mask, _ = losses.by_chunk(losses.kd, student, teacher, torch.full_like(label, -100))
    for x, g in zip(student, torch.autograd.grad(losses.reduced(values, mask)[0], tuple(student))):
        assert g.shape == x.shape and not g.any()


@pytest.mark.parametrize("more", ["lm", "sft"])
def test_losses_on_logits_add_up(more, tmp_path, monkeypatch):
    """Two of them, or one beside log-probs, of one head: with ranks that have no row, as micro-batches on one rank."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n{"prompt": "12+2=", "completion": "14"}\n')
    given = dict(objective={"kd": 1.0, more: 0.2}, train_data=tmp_path / "rows.jsonl", batch_size=2, max_steps=2, alpha=0.7)
    for out, tokens, ranks in (("whole", 0, 1), ("parts", 8, 1), ("ranks", 0, 3)):
        run(options(tmp_path, "kd", out, micro_batch_tokens=tokens, **given), ranks)
    whole, parts, ranks = (weights(tmp_path / out / "model") for out in ("whole", "parts", "ranks"))
    assert_close(whole, parts, 1e-9)
    assert_close(whole, ranks, 1e-9)
    assert lines(tmp_path / "whole")[0]["loss"] == pytest.approx(
        lines(tmp_path / "whole")[0]["loss/kd"] + 0.2 * lines(tmp_path / "whole")[0][f"loss/{more}"], rel=1e-9)


def test_top_logits_are_the_teacher_as_k_grows():
    """All of them: the teacher itself. Fewer: its distribution over the best ones, renormalised."""
    student, teacher, label = made()
    logits = teacher.hidden @ teacher.weight.T
    for k in (3, logits.shape[1]):
        top = logits.topk(k)
        found = losses.by_chunk(losses.kd, student, losses.TopLogits(top.values, top.indices.int(), logits.shape[1]), label, alpha=1.0)
        cut = torch.where(logits >= top.values[:, -1:], logits, -float("inf"))
        expected = losses.kd(student.hidden @ student.weight.T, cut, label, alpha=1.0)
        assert (found[0] - expected[0]).abs().max() < 1e-12
        assert all(g.isfinite().all() for g in torch.autograd.grad(found[0].sum(), tuple(student)))


MEASURE = """
import sys, torch, losses
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
n, vocab = int(sys.argv[1]), 32_000
student = losses.Projected(torch.randn(n, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True))
teacher = losses.Projected(torch.randn(n, 16), torch.randn(vocab, 16))
before = peak()
losses.by_chunk(losses.kd, student, teacher, torch.zeros(n, dtype=torch.long))[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_neither_models_logits_exist_whole():
    """glibc keeps freed blocks of this size unless it is told to map each; that is not what is measured."""
    def peak(n):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(n)], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})
        return float(done.stdout)
    few, many = peak(1024), peak(3072)
    one = 2048 * 32_000 * 4 / 2**20  # [N, V] of the additional rows, once
    assert many - few < 0.25 * one, (few, many)


def test_a_run_starts_with_the_loss_of_whole_logits(tmp_path, monkeypatch):
    """The first step's loss and KL from plain forward passes of both models; live and all of the top logits agree, and the
    second use of the table comes from the disk."""
    monkeypatch.chdir(ROOT)
    more = dict(max_steps=2, alpha=0.7, temperature=1.5)
    for out, k in (("live", 0), ("top", 16), ("again", 16), ("few", 2)):
        train.train(config.load(options(tmp_path, "kd", out, teacher_top_k=k, **more)))
    assert_close(weights(tmp_path / "live" / "model"), weights(tmp_path / "top" / "model"), 1e-9)
    assert_close(weights(tmp_path / "top" / "model"), weights(tmp_path / "again" / "model"), 1e-15)
    assert lines(tmp_path / "few")[0]["loss"] != lines(tmp_path / "live")[0]["loss"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    cfg = config.load(options(tmp_path, "kd"))
    tokenizer = data.Tokenizer(ROOT / "tasks/arithmetic")
    dataset = data.load(cfg.train_data, "sft", tokenizer, cfg, False)
    teacher = model.load(tmp_path / "teacher")[0]
    student = model.load_model(cfg, find_machine(cfg), "scratch", tokenizer, ["logits"])[0]
    values, masks, kls = [], [], []
    for i in data.step_rows(dataset, 0, cfg.batch_size, 0):
        e = dataset.examples[i]
        ids = torch.tensor([*e.prompt, *e.responses[0]])
        label = torch.cat([torch.full((len(e.prompt) - 1,), -100), ids[len(e.prompt):], torch.tensor([-100])])
        v, mask, metrics = losses.kd(student.logits(ids), teacher.logits(ids), label, alpha=0.7, temperature=1.5)
        values, masks, kls = [*values, v], [*masks, mask], [*kls, metrics["kl"][0][mask]]
    assert lines(tmp_path / "live")[0]["loss"] == pytest.approx((torch.cat(values)[torch.cat(masks)].mean()).item(), rel=1e-9)
    assert lines(tmp_path / "live")[0]["kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-9)


def test_top_logits_are_those_of_the_live_teacher_under_autocast(tmp_path, monkeypatch):
    """In bf16 compute, too, logits are fp32: kept or made in the step, to fp32's last bits."""
    monkeypatch.chdir(ROOT)
    for out, k in (("live", 0), ("top", 16)):
        train.train(config.load(options(tmp_path, "kd", out, teacher_top_k=k, max_steps=1, dtype="bfloat16")))
    assert lines(tmp_path / "top")[0]["kl"] == pytest.approx(lines(tmp_path / "live")[0]["kl"], abs=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = options(tmp_path, "kd", max_steps=1, alpha=1.0)
    train.train(config.load([*given, f"--init_from={tmp_path / 'teacher'}"]))
    assert abs(lines(tmp_path / "run")[0]["kl"]) < 1e-12 and lines(tmp_path / "run")[0]["grad_norm"] < 1e-12


def test_what_a_teacher_must_be(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="distillation needs teacher"):
        train.train(config.load([*options(tmp_path, "kd"), "--teacher="]))
    with pytest.raises(ValueError, match="teacher = 'x' does nothing in sft without distillation; leave it out"):
        train.train(config.load([*options(tmp_path, "sft"), "--teacher=x"]))
    changed = (ROOT / "tasks/arithmetic/tokenizer.json").read_text().replace('"7": 10', '"7": 11').replace('"8": 11', '"8": 10')
    options(tmp_path, "kd")
    (tmp_path / "teacher" / "tokenizer.json").write_text(changed)
    with pytest.raises(ValueError, match="teacher: token '[78]' has id 1[01] there and 1[01] in .*; models that are used together need the same ids"):
        train.train(config.load(options(tmp_path, "kd")))


def test_reverse_kl_wants_the_whole_teacher(tmp_path, monkeypatch):
    """With the top logits alone it would reward what the teacher never says."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="teacher_top_k with jsd_beta = 1: the reverse KL asks"):
        train.train(config.load(options(tmp_path, "kd", teacher_top_k=4, jsd_beta=1.0)))
    with pytest.raises(ValueError, match="teacher_top_k = 99 and the vocabulary has 16 tokens"):
        train.train(config.load(options(tmp_path, "kd", teacher_top_k=99)))


def test_a_teacher_with_a_padded_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model.save(model.scratch({**SMALL, "vocab_size": 24, "eos_token_id": 0}, 5), tmp_path / "teacher", torch.float32, ROOT / "tasks/arithmetic")
    train.train(config.load(options(tmp_path, "kd", max_steps=2)))
    first, second = lines(tmp_path / "run")
    assert second["kl"] < first["kl"]
