"""Speed and memory side by side on one machine: `python bench.py` with a name of `BENCHES`, each a Markdown table.

Everything compared does the same work on the same tensors, in turn, and the median of the rounds is shown; peak is memory
above what was there before. Liger-Kernel, cut-cross-entropy and transformers are measured where they are installed.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.adamw import adamw

import config
import data
import losses
import model
import optimizers
import reference
import rollout
import train
from machine import Machine
from parts import formats

# ---------------------------------------------------------------------------------------------------------------------
# The clock


def sync(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def resident(key: str) -> float:
    """Resident memory of this process in MB, from Linux's /proc: VmRSS is the current value, VmHWM the peak."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak(function: Callable, device: str) -> float:
    """MB that one call takes at its highest, above what was there before (nan where the system does not say)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak to the current value
        before = resident("VmRSS")
        function()
        return max(0.0, resident("VmHWM") - before)
    return float("nan")


def measure(functions: dict[str, Callable], device: str, rounds: int, least: float = 0.002) -> dict[str, tuple]:
    """name -> (median seconds of a call, peak MB). Functions take turns; a turn lasts at least `least` seconds."""
    repeats = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        for first in (True, False):  # the first call compiles
            sync(device)
            begin = time.perf_counter()
            function()
            sync(device)
            seconds = time.perf_counter() - begin
            if first and seconds > 3:
                break  # one call is enough to warm it up
            repeats[name] = max(1, int(least / max(seconds, 1e-7)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            sync(device)
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: (statistics.median(times[name]), peak(function, device)) for name, function in functions.items()}


def optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Losses: each alone, on made-up tensors

DIFFERENTIABLE = {"policy_chosen_logps", "policy_rejected_logps", "log_probs", "entropy", "values", "logits", "step_logits",
                  "chosen_reward", "reject_reward", "ranked_rewards"}


def reading(name: str, rows: int, longest: int, generator, scale: float = 1.0) -> torch.Tensor:
    """A random tensor for a parameter of a loss, float64 on the host: log-ratios are of the order of scale (per token) or ten
    times that (per response). longest: width of a row; for logits, the vocabulary size."""
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("_lengths"):
        return torch.randint(5, 50, (rows,), generator=generator)
    if name == "step_mask":
        return torch.rand(rows, generator=generator) < 0.7
    if name == "rank_mask":
        return torch.arange(longest) < torch.randint(1, longest + 1, (rows, 1), generator=generator)
    if name.endswith("_mask"):
        return torch.rand(rows, longest, generator=generator) < 0.7
    if name == "label":
        label = torch.randint(longest, (rows,), generator=generator)
        return torch.where(torch.rand(rows, generator=generator) < 0.7, label, -100)
    if name == "step_labels":
        return torch.rand(rows, generator=generator, dtype=torch.float64)
    if name == "running_reward":
        return torch.tensor(0.3, dtype=torch.float64)
    if name.endswith("_logps"):
        return -30 + 8 * scale * normal(rows)
    if name.endswith("log_probs"):
        return -2 + 0.3 * scale * normal(rows, longest)
    if name == "step_logits":
        return 2 * scale * normal(rows, 2)
    if name.endswith("_reward") or name == "margin":
        return 2 * scale * normal(rows)
    return scale * normal(rows, longest)  # logits, rewards of a ranking, advantages, values, returns, entropy


def stepping(loss: Callable, given: dict) -> Callable:
    """A function that runs one forward and backward of the loss's sum."""
    leaves = [x for x in given.values() if x.requires_grad]

    def step():
        result = loss(*given.values())
        total = losses.reduced(*result[:2])[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(total, leaves)
    return step


def liger_losses() -> dict[str, Callable]:
    """The loss functions inside Liger's chunked heads, wrapped to take the same parameters as ours."""
    if not (liger := optional("liger_kernel.chunked_loss")):
        return {}
    part = lambda name: importlib.import_module(f"liger_kernel.chunked_loss.{name}")
    dpo, kto = (part(f"{n}_loss").__dict__[f"LigerFusedLinear{n.upper()}Function"].preference_loss_fn for n in ("dpo", "kto"))
    grpo = part("grpo_loss").LigerFusedLinearGRPOFunction.ppo_loss_fn
    jsd = part("jsd_loss").LigerFusedLinearJSDFunction.distillation_loss_fn
    pairs = lambda kind, **o: lambda pc, pr, rc, rr, *_: dpo(pc, pr, torch.empty(2 * len(pc)), rc, rr, loss_type=kind, **o)[0]

    def labelled(pc, pr, pk, rc, rr, rk):
        labels = torch.arange(len(pc) + len(pr), device=pc.device) < len(pc)
        return kto(torch.cat([pc, pr]), labels, labels, torch.cat([rc, rr]), kl=(pk - rk).mean().clamp(min=0))[0]

    def policy(kind, level="token"):
        return lambda new, old, advantages, mask, *_: grpo(
            new, mask.float(), advantages[:, 0], mask.float(), old_per_token_logps=old, beta=0.0, loss_type=kind,
            importance_sampling_level=level)[0]
    same = ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    return {"dpo": pairs("sigmoid"), **{kind: pairs(kind) for kind in same},
            "robust": pairs("robust", label_smoothing=0.1), "exo_pair": pairs("exo_pair", label_smoothing=1e-3), "kto": labelled,
            "ppo": policy("bnpo"), "gspo": policy("grpo", "sequence"), "sapo": policy("sapo"),
            "kd": lambda logits, teacher, label: jsd(logits, teacher, beta=0.0, target=label)}


def bench_losses(o):
    print(f"Forward and backward of each loss, {where(o.device)}: 256 pairs or responses, 1,024 tokens each; lm and kd: 256 "
          f"tokens of a vocabulary of 32,000; rankings of 8.\n")
    print("| loss | eager, us | compiled, us | Liger, us | eager, MB | compiled, MB | Liger, MB |\n|---|---|---|---|---|---|---|")
    liger = liger_losses()
    for name, objective in losses.OBJECTIVES.items():
        if o.only and name not in o.only.split(","):
            continue
        longest = 32_000 if "logits" in objective.reads else 8 if "ranked_rewards" in objective.reads else 1024
        generator = torch.Generator().manual_seed(0)
        given = {}
        for read in objective.reads:
            x = reading(read, 256, longest, generator).to(o.device)
            given[read] = (x.float() if x.is_floating_point() else x).requires_grad_(read in DIFFERENTIABLE)
        functions = {"eager": stepping(objective.loss, given), "compiled": stepping(losses.compiled(objective.loss), given)}
        if name in liger:
            functions["Liger"] = stepping(liger[name], given)
        found = measure(functions, o.device, o.rounds)
        columns = [f"{found[which][i] * unit:,.0f}" if which in found else ""
                   for i, unit in ((0, 1e6), (1, 1)) for which in ("eager", "compiled", "Liger")]
        print("|", " | ".join([name, *columns]), "|", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The head: log-probs of N targets from hidden states, and their gradient


def heads(device: str) -> dict[str, Callable]:
    """name -> function (hidden, weight, target) -> log-probs (N,); for heads with a loss, its value (SimPO: sequences of 128)."""
    naive = lambda h, w, t: (h @ w.t()).float().log_softmax(-1).gather(1, t[:, None])[:, 0]
    made = {"naive": naive, "naive, compiled": torch.compile(naive),
            "fused (ours)": lambda h, w, t: losses.linear_log_probs(h, w, t)[0],
            "fused, compiled (ours)": lambda h, w, t: losses.linear_log_probs(h, w, t, compiled=True)[0],
            "fused, compiled, 1 GB of softmax kept (ours)":
                lambda h, w, t: losses.linear_log_probs(h, w, t, compiled=True, keep=2**30)[0],
            "fused, compiled, frozen weight (ours)": lambda h, w, t: losses.linear_log_probs(h, w, t, compiled=True)[0]}
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        made["F.linear_cross_entropy"] = lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=chunked)
    if liger := optional("liger_kernel.ops.fused_linear_cross_entropy") if device == "cuda" else None:
        nll = liger.LigerFusedLinearCrossEntropyFunction.apply
        made["Liger"] = lambda h, w, t: -nll(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]
    if cce := optional("cut_cross_entropy"):
        impl = "cce" if device == "cuda" else "torch_compile"
        made[f"cut-cross-entropy ({impl})"] = lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none", impl=impl)

    def simpo(h, w, t):
        chosen, rejected = losses.linear_log_probs(h, w, t, compiled=True)[0].view(2, -1, 128).sum(-1)
        lengths = torch.full_like(chosen, 128)
        return losses.compiled(losses.simpo)(chosen, rejected, lengths, lengths)[0].sum() / len(lengths)
    made["fused with simpo (ours)"] = simpo

    def on_logits(name, logits):
        loss = losses.compiled(losses.OBJECTIVES[name].loss)

        def value(h, w, t):
            teacher = [logits(h.detach().flip(0), w.detach())] * (name == "kd")
            values, mask, _ = losses.by_chunk(loss, logits(h, w), *teacher, t)
            return losses.reduced(values, mask)[0] / len(t)
        return value
    for name in ("lm", "kd"):
        made[f"{name} of whole logits, compiled"] = on_logits(name, lambda h, w: h @ w.t())
        made[f"{name} of logits in chunks, compiled (ours)"] = on_logits(name, losses.Projected)
    if chunked_loss := optional("liger_kernel.chunked_loss"):
        theirs = chunked_loss.LigerFusedLinearSimPOLoss(beta=2.0, gamma=1.0, compute_nll_loss=False)
        made["Liger's chunked SimPO"] = lambda h, w, t: theirs(w, h.view(-1, 128, h.shape[1]), t.view(-1, 128))[0]
    return made


def bench_head(o):
    dtype, width = (torch.bfloat16, 2048) if o.device == "cuda" else (torch.float32, 512)
    print(f"Log-probs and their gradient, width {width}, {str(dtype).split('.')[1]}, {where(o.device)}. Difference: of the hidden "
          f"states' gradient, to that of the first of its kind.\n")
    print("| vocabulary | tokens | head | seconds | against the first | peak, MB | difference |\n|---|---|---|---|---|---|---|")
    for vocab, tokens in itertools.product(numbers(o.vocab), numbers(o.tokens)):
        generator = torch.Generator(o.device).manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator, device=o.device).to(dtype).requires_grad_(True)
        weight = torch.randn(vocab, width, generator=generator, device=o.device) / width**0.5
        weight = weight.to(dtype).requires_grad_(True)
        target = torch.randint(vocab, (tokens,), generator=generator, device=o.device)
        upstream = torch.randn(tokens, generator=generator, device=o.device)

        def step(name, head):
            w = weight.detach() if "frozen" in name else weight
            leaves = [x for x in (hidden, w) if x.requires_grad]
            return torch.autograd.grad((head(hidden, w, target).float() * upstream).sum(), leaves)
        exact, error, functions = {}, {}, {}
        for name, head in heads(o.device).items():
            if o.only and not any(word in name for word in o.only.split(",")):
                continue
            try:
                grad = step(name, head)[0].float()
                kind = next((loss for loss in ("simpo", "lm of", "kd of") if loss in name.lower()), "")
                true = exact.setdefault(kind, grad)  # for heads with a loss: that of the loss's first head
                error[name] = ((grad - true).norm() / true.norm()).item()
                functions[name] = functools.partial(step, name, head)
            except Exception as problem:  # a peer that does not run here: say so and go on
                said = f"{type(problem).__name__}: {str(problem).splitlines()[0][:60]}"
                print(f"| {vocab:,} | {tokens:,} | {name} | {said} | | | |")
        found = measure(functions, o.device, o.rounds)
        base = next(iter(found.values()))[0]
        for name, (seconds, memory) in found.items():
            costs = f"{seconds:.3g} | {base / seconds:.2f}x | {memory:,.0f} | {error[name]:.1e}"
            print(f"| {vocab:,} | {tokens:,} | {name} | {costs} |", flush=True)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def bench_generate(o):
    """Greedy answers of 64 tokens to prompts of 16 to 96; 8 samples each of 4 prompts, as a rollout has them; and samples that end
    by themselves, 32 at a time."""
    transformers = optional("transformers")
    print(f"Tokens a second behind prompts of 16 to 96, {where(o.device)}: 64 new ones each; of 128 x 1, up to 128, the end after "
          f"each as likely as 1 in 20.\n")
    print("| dtype | rows | what | tokens/s | ratio | peak, MB | `[B, T, V]` in fp32, MB |\n|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        path = model.find_folder(o.model)
        decoder = model.load(path)[0].to(o.device, dtype)
        theirs = transformers and transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(o.device)
        for count, n, new in ((1, 1, 64), (32, 1, 64), (4, 8, 64), (128, 1, 128)):
            if o.only and f"{count} x {n}" not in o.only.split(","):
                continue
            rng, vocab, at_once = np.random.default_rng(0), decoder.shape.vocab_size, min(32, count * n)
            prompts = [rng.integers(3, vocab, rng.integers(16, 97)).tolist() for _ in range(count)]
            stop = set(range(5, vocab, 20)) if new > 64 else set()
            draws, longest, made = n > 1 or bool(stop), max(map(len, prompts)), {}
            drawn = dict(sampling=rollout.Sampling(), keys=[(0, i) for i in range(count)], n=n) if draws else {}
            like = dict(temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n) if draws else {}  # the same, for transformers
            like |= dict(eos_token_id=sorted(stop)) if stop else dict(min_new_tokens=new)

            def ours(compiled):
                answers = rollout.generate(decoder, prompts, max_new_tokens=new, stop=stop, batch=at_once, compiled=compiled,
                                           **drawn)
                return sum(len(answer.ids) for some in answers for answer in some)

            def peers():
                tokens = 0
                for start in range(0, count, at_once // n):
                    some = prompts[start:start + at_once // n]
                    ids = torch.tensor([[0] * (longest - len(p)) + p for p in some], device=o.device)
                    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=o.device)
                    rows = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, do_sample=draws,
                                           cache_implementation="static", **like)[:, longest:].tolist()
                    tokens += sum(next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows)
                return tokens
            functions = {"transformers, static cache": peers} if theirs else {}
            functions |= {"ours": lambda: ours(False), "ours, compiled": lambda: ours(True)}
            counted = lambda name, f: lambda: made.update({name: f()})
            found = measure({name: counted(name, f) for name, f in functions.items()}, o.device, o.rounds)
            speed = {name: made[name] / seconds for name, (seconds, _) in found.items()}
            whole = at_once * (longest + new) * vocab * 4 / 2**20
            of = f"{str(dtype).split('.')[1]} | {count} x {n}"
            for name, (_, memory) in found.items():
                times = f"{speed[name]:,.0f} | {speed[name] / next(iter(speed.values())):.2f}x"
                print(f"| {of} | {name} | {times} | {memory:,.0f} | {whole:,.0f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A DPO step, from the usual one to ours


LENGTHS = {"HH-like": (118, 43), "UltraFeedback-like": (180, 300), "TL;DR-like": (350, 35)}  # mean tokens of prompts and responses


def pairs_of(kind: str, count: int, vocab: int) -> data.Dataset:
    """Preference pairs of random ids, with log-normal lengths."""
    rng, (prompt, response) = np.random.default_rng(0), LENGTHS[kind]
    draw = lambda mean: rng.integers(3, vocab, max(4, int(mean * rng.lognormal(-0.18, 0.6)))).astype(np.int32)
    return data.as_dataset([data.Example(draw(prompt), responses := [draw(response), draw(response)],
                                         [np.ones(len(r), bool) for r in responses], [True, False], [0], [1], [0.0], kind)
                            for _ in range(count)], Counter())


def real_pairs(files: str, folder, count: int) -> data.Dataset:
    """Preference rows as a run reads them, cut at 512 tokens: `count` of them, evenly spaced."""
    cfg = config.Config(train_data=files, max_length=512)
    dataset = data.load(files, "preference", data.Tokenizer(folder), cfg, False)
    every = range(0, len(dataset), max(1, len(dataset) // count))
    return data.as_dataset([dataset.examples[i] for i in every][:count], Counter())


def padding(dataset, tokens: int, size: int, steps: int = 8) -> float:
    """The fraction of padding in the streams of the first compiled steps, of `size` rows each."""
    layout, real, whole = data.Layout(tokens, False, True, "cpu"), 0, 0
    for step in range(steps):
        batches, counts = data.micro_batches(dataset, data.step_rows(dataset, step, size, 0), layout)
        real, whole = real + counts["stream_tokens"], whole + sum(len(batch["tokens"]) for batch in batches)
    return 1 - real / whole


def padded_logps(decoder, examples: list) -> torch.Tensor:
    """The usual way, and the oracle: chosen and rejected rows padded to the longest, logits of every token -> sums (2, P)."""
    device = decoder.lm_head.weight.device
    rows = [(e.prompt, e.responses[side]) for side in (0, 1) for e in examples]
    table = lambda make: pad_sequence([torch.from_numpy(make(p, r)) for p, r in rows], batch_first=True).to(device)
    tokens = table(lambda p, r: np.concatenate([p, r]).astype(np.int64))
    scored = table(lambda p, r: np.repeat([False, True], [len(p), len(r)]))

    def attend(layer, q, k, v):
        q, k, v = (x.view(*tokens.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    hidden = decoder.model(tokens.flatten(), torch.arange(tokens.shape[1], device=device).repeat(len(rows)), attend)
    logits = decoder.lm_head(hidden).view(*tokens.shape, -1)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logps * scored[:, 1:]).sum(-1, dtype=torch.float64).view(2, -1)


def packed_logps(decoder, dataset, head: str) -> torch.Tensor:
    """One packed stream -> sums (2, P). head: "all" (logits of every token), "scored" (of scored ones), "fused". Of a dataset of
    single responses, chosen and rejected alternate; of pairs, both share their prompt."""
    weight = decoder.lm_head.weight
    layout = data.Layout(int(dataset.lengths.sum()), data.varlen(weight.device.type, weight.dtype), False, weight.device.type)
    (batch,), _ = data.micro_batches(dataset, np.arange(len(dataset)), layout)
    if head == "fused":
        logps = decoder(batch, ["log_probs"])["log_probs"]
    else:
        hidden, at = decoder.hidden(batch), batch["predict_from"]
        logits = decoder.lm_head(hidden if head == "all" else hidden[at]).log_softmax(-1)
        logps = (logits[at] if head == "all" else logits).gather(1, batch["target"][:, None])[:, 0]
    sums, single = losses.sums(batch, logps), len(dataset.examples[0].responses) == 1
    place = batch["rows"] if single else 2 * batch["rows"] + batch["rank"]
    return torch.zeros_like(sums).index_put((place,), sums).view(-1, 2).t()


def needed(decoder, examples: list) -> float:
    """FLOPs that forward and backward cannot do without: the blocks' matrices on every token, prompts counted once, the head on
    scored tokens, attention between tokens that see each other. No recomputation, no padding, no reference."""
    spans = [(n, seen) for e in examples for n, seen in [(len(e.prompt), 0), *((len(r), len(e.prompt)) for r in e.responses)]]
    matrices = sum(p.numel() for p in decoder.model.layers.parameters() if p.dim() > 1)
    seen = sum(n * before + n * (n + 1) / 2 for n, before in spans)
    attention = 2 * decoder.shape.num_layers * decoder.shape.num_heads * decoder.shape.head_dim * seen
    counts = data.count(examples)
    return 6 * (matrices * counts["stream_tokens"] + attention + decoder.lm_head.weight.numel() * counts["tokens"])


def matmul_speed(dtype: torch.dtype, device: str) -> float:
    """FLOPs a second of one large matrix product."""
    size = 8192 if device == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / measure({"matmul": lambda: x @ x}, device, 9, 0.5)["matmul"][0]


def bench_dpo(o):
    """The ladder: the usual step (forward, backward and AdamW), then with each of our techniques added in turn."""
    count = o.pairs or 8
    speed = o.peak * 1e12 or matmul_speed(getattr(torch, o.dtype), o.device)
    print(f"A DPO step of {count} pairs, {o.model}, {o.dtype}, {where(o.device)}; loss and gradient: against the padded step's; "
          f"MFU: FLOPs that are needed, of {'the device' if o.peak else 'a matmul'}'s {speed / 1e9:,.0f} GFLOP/s.\n")
    print("| lengths | step | seconds | ratio | MFU | peak, MB | loss | gradient |\n|---|---|---|---|---|---|---|---|")
    path = model.find_folder(o.model)
    decoder, frozen = (model.load(path)[0].to(o.device, getattr(torch, o.dtype)) for _ in range(2))
    for p in frozen.requires_grad_(False).parameters():  # another model than the policy, so that the loss is not log 2
        p += 0.02 * p * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, fused=True)
    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its state is there before anything is measured
    optimizer.zero_grad()
    made = {kind: lambda n, kind=kind: pairs_of(kind, n, decoder.shape.vocab_size) for kind in LENGTHS}
    if o.data:
        made["real rows"] = lambda n: real_pairs(o.data, path, n)
    made = {kind: make for kind, make in made.items() if not o.only or any(word in kind for word in o.only.split(","))}
    for kind, make in made.items():
        dataset = make(count)
        single = data.as_dataset([data.with_responses(e, [r])._replace(chosen=[], rejected=[], margin=[])
                                  for e in dataset.examples for r in e.responses], Counter())
        with torch.no_grad():
            table = packed_logps(frozen, dataset, "fused")
        ways = {"padded, as usual": (lambda m: padded_logps(m, dataset.examples), None),
                "+ packing": (lambda m: packed_logps(m, single, "all"), None),
                "+ head on scored tokens": (lambda m: packed_logps(m, single, "scored"), None),
                "+ prefix sharing": (lambda m: packed_logps(m, dataset, "scored"), None),
                "+ cached reference": (lambda m: packed_logps(m, dataset, "scored"), table),
                "+ fused head (ours)": (lambda m: packed_logps(m, dataset, "fused"), table)}

        def step(way, spent):
            begin, (logps, cached) = time.perf_counter(), way
            with torch.no_grad():
                reference = logps(frozen) if cached is None else cached
            loss = losses.dpo(*logps(decoder), *reference, beta=0.1)[0].sum() / count
            loss.backward()
            optimizer.step()
            spent += [loss.item(), time.perf_counter() - begin]
        times, memory, error, true = {name: [] for name in ways}, {}, {}, None
        for name, way in [*ways.items()] * o.rounds:
            spent = []
            memory[name] = peak(lambda: step(way, spent), o.device)
            loss, seconds = spent
            times[name].append(seconds)
            grad = torch.cat([p.grad.flatten() for p in decoder.parameters()])
            true = true or (loss, grad)  # the padded step's
            error[name] = (abs(loss - true[0]), ((grad - true[1]).norm() / true[1].norm()).item())
            optimizer.zero_grad()
        seconds = {name: statistics.median(found) for name, found in times.items()}
        least = needed(decoder, dataset.examples) / speed
        for name, took in seconds.items():
            off = "{:.0e} | {:.0e}".format(*error[name])
            fast = f"{took:.2f} | {seconds['padded, as usual'] / took:.2f}x | {least / took:.0%}"
            print(f"| {kind} | {name} | {fast} | {memory[name]:,.0f} | {off} |", flush=True)
    print("\n| lengths | steps of | padding of compiled streams |\n|---|---|---|")
    for kind, make in made.items():
        dataset = make(1024)
        for size in (8, 64, 256):
            share = padding(dataset, data.stream_length([dataset], size, 0), size)
            print(f"| {kind} | {size} | {share:.2%} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# One epoch of the same rows in TRL and here, in turn, each in a process of its own


class Work(NamedTuple):
    objective: str  # here
    trainer: str  # TRL's
    dtype: str  # of compute; weights are fp32 on both sides
    theirs: dict  # changes to TRL's config
    rows: Callable  # (prompt, chosen, rejected) -> rows of TRL's
    ours: Callable  # the same -> rows here
    here: dict = {}  # changes to the config here


def letters(completion: str) -> float:
    """A reward that costs nothing."""
    return float(completion.count("e"))


as_pair = lambda p, c, r: [{"prompt": p, "chosen": c, "rejected": r}]
as_answer = lambda p, c, r: [{"prompt": p, "completion": c}]
as_labelled = lambda p, c, r: [{"prompt": p, "completion": c, "label": True}, {"prompt": p, "completion": r, "label": False}]
as_prompt = lambda p, c, r: [{"prompt": p}]
GROUPS_THERE = {"num_generations": 8, "max_completion_length": 64,
                "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}  # 8 prompts with 8 answers each a step
GROUPS_HERE = {"samples_per_prompt": 8, "max_new_tokens": 64, "max_length": 512 + 64, "advantages": "group_norm",
               "reward_clip": 0.0, "reward": lambda prompt, completion, row: letters(completion)}
WORK = {"dpo": Work("dpo", "DPO", "float32", {}, as_pair, as_pair),
        "dpo+precomputed": Work("dpo", "DPO", "float32", {"precompute_ref_log_probs": True}, as_pair, as_pair),
        "dpo+bf16": Work("dpo", "DPO", "bfloat16", {}, as_pair, as_pair),
        "reward": Work("rm", "Reward", "float32", {}, as_pair, as_pair),
        "kto": Work("kto", "KTO", "float32", {}, as_labelled, as_pair),  # here it takes pairs, too
        "sft": Work("sft", "SFT", "float32", {}, as_answer, as_answer),
        "sft+packing": Work("sft", "SFT", "float32", {"packing": True}, as_answer, as_answer),
        "sft+packing+bf16": Work("sft", "SFT", "bfloat16", {"packing": True}, as_answer, as_answer),
        "grpo": Work("ppo", "GRPO", "float32", GROUPS_THERE, as_prompt, as_prompt, GROUPS_HERE),
        "grpo+bf16": Work("ppo", "GRPO", "bfloat16", GROUPS_THERE, as_prompt, as_prompt, GROUPS_HERE)}


class Cost(NamedTuple):
    steps: float  # seconds of all steps, as `settled` has them
    reference: float  # seconds of the pass before them
    memory: float  # GB, the process's peak


def in_trl(name: str, folder: str, pairs: list, batch: int, device: str, options: str) -> Cost:
    work = WORK[name]
    os.environ.update(HF_HUB_OFFLINE="1", TRL_TELEMETRY="0", TOKENIZERS_PARALLELISM="false")
    import datasets
    import transformers
    import trl
    spent, steps = {"reference": 0.0}, []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            sync(device)
            steps.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            sync(device)
            steps[-1] += time.perf_counter()
    precompute = trl.DPOTrainer._precompute_ref_logps
    trl.DPOTrainer._precompute_ref_logps = timed(precompute, spent, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    judge = work.trainer == "Reward"
    kind = transformers.AutoModelForSequenceClassification if judge else transformers.AutoModelForCausalLM
    policy = kind.from_pretrained(folder, dtype=torch.float32, **({"num_labels": 1} if judge else {}))
    policy.config.pad_token_id = tokenizer.pad_token_id
    rows = [row for pair in pairs for row in work.rows(*pair)]
    given = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch * len(rows) // len(pairs), num_train_epochs=1,
                 learning_rate=1e-6, lr_scheduler_type="constant", max_length=512, report_to=[], save_strategy="no",
                 logging_steps=1, gradient_checkpointing=False, bf16=work.dtype == "bfloat16", use_cpu=device == "cpu",
                 disable_tqdm=True, optim="adamw_torch_fused", weight_decay=0.0)
    trainer, config_of = getattr(trl, f"{work.trainer}Trainer"), getattr(trl, f"{work.trainer}Config")
    if work.trainer == "GRPO":
        del given["max_length"]
        trainer = functools.partial(trainer, reward_funcs=lambda completions, **_: [*map(letters, completions)])
    trainer(model=policy, args=config_of(**{**given, **work.theirs, **json.loads(options)}), callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer).train()
    return Cost(settled(steps, device), spent["reference"], highest(device))


def in_ours(name: str, folder: str, pairs: list, batch: int, device: str, options: str) -> Cost:
    work = WORK[name]
    spent, out = {"reference": 0.0}, Path(tempfile.mkdtemp())
    if "reward" not in work.here:  # with rollouts, this pass counts as part of the steps
        reference.sweep = timed(reference.sweep, spent, device)
    rows = [row for pair in pairs for row in work.ours(*pair)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict(objective=work.objective, init_from=folder, train_data=str(out / "rows.jsonl"), batch_size=batch, epochs=1,
                 lr=1e-6, schedule="constant", max_length=512, device=device, dtype=work.dtype, out_dir=str(out / "run"),
                 cache_dir=str(out / "cache"))
    train.train(config.load(options.split(), ("bench.py", {**given, **work.here})))
    steps = [line["seconds"] + line.get("rollout/seconds", 0) for line in metrics_of(out / "run")]
    return Cost(settled(steps, device), spent["reference"], max(highest(device), spent.get("memory", 0)))


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def settled(steps: list[float], device: str) -> float:
    """Seconds of all steps; on CUDA, where the first ones compile and tune, extrapolated from the second half."""
    counted = steps[len(steps) // 2:] if device == "cuda" else steps
    return sum(counted) * len(steps) / len(counted)


def timed(function: Callable, spent: dict, device: str) -> Callable:
    """Wrap a function: its seconds are added to spent["reference"], and the peak memory up to its end goes to spent["memory"],
    since a run resets the peak before its steps."""
    def clocked(*given, **named):
        begin = time.perf_counter()
        made = function(*given, **named)
        sync(device)
        spent["reference"] += time.perf_counter() - begin
        spent["memory"] = max(spent.get("memory", 0), highest(device))
        return made
    return clocked


def highest(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resident("VmHWM") / 2**10


def alone(function: Callable, *given) -> Cost:
    """The function's result from a new process, whose output is discarded and whose temporary files are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), silent, (folder,)) as pool:
            return pool.submit(function, *given).result()


def silent(folder: str):
    tempfile.tempdir, nowhere = folder, os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def bench_trl(o):
    """Seconds of a pair and the process's peak, one epoch of --pairs pairs in steps of 8 (on CUDA 256 or more: `settled`)."""
    path, batch = model.find_folder(o.model), 8
    tokenizer, pairs = data.Tokenizer(path), []
    for _, row in data.read_rows(o.data):
        draft = formats.preference_row(json.loads(row), "last", False)
        texts = (draft.prompt, *draft.responses)
        text = all(isinstance(t, str) and t for t in texts)
        if text and max(len(tokenizer.fast.encode(texts[0] + response).ids) for response in texts[1:]) < 510:
            pairs.append(texts)
    count = o.pairs or 16
    pairs = pairs[::max(1, len(pairs) // count)][:count]
    versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in ("trl", "transformers"))
    print(f"{len(pairs)} pairs in steps of {batch}, {where(o.device)}, {versions}; seconds a pair and GB, here with "
          f"`{o.options or 'defaults'}`, there with {o.theirs}.\n")
    print("| work | TRL | here | ratio | TRL, GB | here, GB | ratio |\n|---|---|---|---|---|---|---|")
    for name in WORK:
        if o.only and name not in o.only.split(","):
            continue
        theirs, ours = zip(*((alone(in_trl, name, str(path), pairs, batch, o.device, o.theirs),
                              alone(in_ours, name, str(path), pairs, batch, o.device, o.options)) for _ in range(o.rounds)))
        ways = {"": lambda cost: cost.steps}
        if any(cost.reference for cost in ours):
            ways[", with the reference pass"] = lambda cost: cost.steps + cost.reference
        for way, seconds in ways.items():
            there, here = (statistics.median(map(seconds, costs)) / len(pairs) for costs in (theirs, ours))
            a, b = (statistics.median(cost.memory for cost in costs) for costs in (theirs, ours))
            costs = f"{there:.2f} | {here:.2f} | {there / here:.2f}x | {a:.1f} | {b:.1f} | {a / b:.2f}x"
            print(f"| {name}{way} | {costs} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# How the cost of a step grows

USUAL = {"length": 256, "pairs": 4, "vocabulary": 8192, "layers": 4}
SCALED = {"length": (256, 512, 1024, 2048, 4096), "pairs": (2, 4, 8, 16, 32),
          "vocabulary": (8192, 16_384, 32_768, 65_536, 131_072), "layers": (2, 4, 8, 16)}


def step_of(length: int, pairs: int, vocabulary: int, layers: int, device: str, dtype: str) -> Callable:
    """A function: forward and backward of a DPO step, new Llama of width 256; prompt and response have length / 2 tokens each."""
    shape = dict(model_type="llama", vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
                 num_attention_heads=4, max_position_embeddings=length)
    decoder = model.scratch(shape, 0).to(device)
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(3, vocabulary, length // 2).astype(np.int32)
    mask = np.ones(length // 2, bool)
    dataset = data.as_dataset([data.Example(ids(), [ids(), ids()], [mask, mask], [True, False], [0], [1], [0.0], "made up")
                               for _ in range(pairs)], Counter())
    machine = Machine(0, 1, device, getattr(torch, dtype), False)  # one rank, nothing compiled
    layout = machine.layout(max(4096, 3 * length // 2))

    def step():
        for batch in data.micro_batches(dataset, np.arange(pairs), layout)[0]:
            with machine.autocast():
                chosen, rejected = losses.sums(batch, decoder(batch, ["log_probs"])["log_probs"]).view(-1, 2).t()
            losses.dpo(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen))[0].sum().backward()
        decoder.zero_grad()
    return step


def bench_scaling(o):
    """Seconds and memory as length, pairs, vocabulary and layers grow, one at a time."""
    print(f"A DPO step, forward and backward, width 256, {where(o.device)}; of {USUAL} one grows; exponents: the fit to all "
          f"values, and of the last doubling.\n")
    print("| what grows | values | seconds | exponent | last | peak, MB | exponent |\n|---|---|---|---|---|---|---|")
    for what, values in SCALED.items():
        steps = {value: step_of(**{**USUAL, what: value}, device=o.device, dtype=o.dtype) for value in values}
        found = measure(steps, o.device, o.rounds)
        seconds, memory = zip(*found.values())
        fit = lambda y, last=0: np.polyfit(np.log(values[-last:]), np.log(y[-last:]), 1)[0]
        row = [what, ", ".join(f"{v:,}" for v in values), ", ".join(f"{s:.2f}" for s in seconds), f"{fit(seconds):.2f}",
               f"{fit(seconds, 2):.2f}", ", ".join(f"{m:,.0f}" for m in memory), f"{fit(memory):.2f}"]
        print("|", " | ".join(row), "|", flush=True)


def bench_ranks(o):
    """The same DPO steps by one rank with all cores and by two with half of them each, in turn."""
    if o.device == "cuda" and torch.cuda.device_count() < 2:
        raise SystemExit("ranks needs two GPUs, or --device=cpu")
    cores, found = torch.get_num_threads(), {1: [], 2: []}
    for _ in range(o.rounds):
        for ranks, seconds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                how = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
                run = ["--objective=dpo", f"--init_from={o.model}", f"--train_data={o.data}", f"--device={o.device}",
                       f"--out_dir={folder}/run", f"--cache_dir={folder}", "--max_length=512", "--batch_size=8", "--max_steps=4",
                       "--reference_free=True", *o.options.split()]
                subprocess.run([sys.executable, *how, "train.py", *run], check=True, capture_output=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(cores // ranks)})
                lines = metrics_of(Path(folder) / "run")
                seconds.append(statistics.median(line["seconds"] for line in lines if line["step"] > 1))
    one, two = map(statistics.median, found.values())
    print(f"DPO steps of 8 pairs, {where(o.device)}, medians of {o.rounds} runs of 3 steps: one rank {one:.2f} s, two ranks with "
          f"half of the cores each {two:.2f} s, overhead {two / one - 1:.0%}")


# ---------------------------------------------------------------------------------------------------------------------
# What precision and optimizer cost in loss: configs/sft.py under each


class RoundedAdamW(torch.optim.AdamW):
    """AdamW with bf16 weights and moments and stochastic rounding: up or down, each as likely as it is near."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                new = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state = self.state[p] = self.state[p] or new
                wide = [x.float() for x in (p, state["exp_avg"], state["exp_avg_sq"])]
                given = {key: group[key] for key in ("lr", "weight_decay", "eps")}
                adamw(
                    wide[:1], [p.grad.float()], wide[1:2], wide[2:], [], [state["step"]], foreach=False, amsgrad=False,
                    maximize=False, beta1=group["betas"][0], beta2=group["betas"][1], **given)
                for narrow, x in zip((p, state["exp_avg"], state["exp_avg_sq"]), wide):
                    bits = x.view(torch.int32) + torch.randint(2**16, x.shape, dtype=torch.int32)
                    narrow.copy_((bits & -2**16).view(torch.float32))


def in_precision(how: str, seed: int, steps: int) -> tuple[list, float]:
    """(step, loss, exact match) of the evals, and the median seconds of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out, load = Path(tempfile.mkdtemp()), model.load_model
    if how == "bf16, stochastic rounding":
        def narrow(*given):
            decoder, saved = load(*given)
            return decoder.to(torch.bfloat16), saved
        model.load_model = narrow
        optimizers.Muon = lambda groups, **options: RoundedAdamW(groups, **{**options, "fused": False})
    dtype = "float32" if "fp32" in how and "bf16" not in how else "bfloat16"
    train.train(config.load(["--config", "configs/sft.py", f"--seed={seed}", f"--out_dir={out / 'run'}", f"--dtype={dtype}",
                             f"--optimizer={'muon' if 'Muon' in how else 'adamw'}",
                             "--device=cpu", f"--max_steps={steps}", f"--eval_every={max(1, steps // 4)}", f"--cache_dir={out}"]))
    lines = metrics_of(out / "run")
    return ([(line["step"], line["loss"], line["exact_match"]) for line in lines if line["split"] == "eval"],
            statistics.median(line["seconds"] for line in lines if line["split"] == "train"))


def bench_precision(o):
    """fp32; bf16 compute over fp32 weights, gradients and moments; all of them bf16; Muon."""
    print("configs/sft.py, eval loss of three seeds along the run, exact match at its end, seconds of a step on one core.\n")
    print("| weights and compute | step: losses | exact match | seconds |\n|---|---|---|---|")
    for how in ("fp32", "bf16 over fp32", "bf16, stochastic rounding", "fp32, Muon"):
        if o.only and o.only not in how:
            continue
        runs, seconds = zip(*(alone(in_precision, how, seed, o.steps) for seed in range(3)))
        curves = "; ".join(f"{at[0][0]}: " + ", ".join(f"{loss:.3f}" for _, loss, _ in at) for at in zip(*runs))
        right = ", ".join(f"{found[-1][2]:.3f}" for found in runs)
        print(f"| {how} | {curves} | {right} | {statistics.median(seconds):.3f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# How soon a run runs


def bench_start(o):
    """Import, the first step with and without compiled graphs on disk, and rows a second from text to ids on one core."""
    print(f"Whole commands, {where(o.device)}, medians of {o.rounds}.\n\n| command | seconds |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        def wall(*command, **environment):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env={**os.environ, **environment})
            return time.perf_counter() - begin

        def run(**options):
            shutil.rmtree(f"{folder}/run", ignore_errors=True)
            options |= {"max_steps": 1, "eval_data": "", "eval_prompts": "", "device": o.device, "out_dir": f"{folder}/run"}
            return ["train.py", "--config", "configs/sft.py", *(f"--{key}={value}" for key, value in options.items())]

        def cold():
            shutil.rmtree(f"{folder}/graphs", ignore_errors=True)
            return warm()
        warm = lambda: wall(*run(compile=True), TORCHINDUCTOR_CACHE_DIR=f"{folder}/graphs")
        commands = {"import torch": lambda: wall("-c", "import torch"), "import train": lambda: wall("-c", "import train"),
                    "one step of configs/sft.py": lambda: wall(*run(compile=False)),
                    "one step, compiled, nothing on disk": cold, "one step, compiled, graphs on disk": warm}
        for name, command in commands.items():
            print(f"| {name} | {statistics.median(command() for _ in range(o.rounds)):.1f} |", flush=True)
        print("\n| rows | kind | tokens a row | rows/s | of which the tokenizer alone | MB held |\n|---|---|---|---|---|---|")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        arithmetic = Path("tasks/arithmetic")
        given = [(arithmetic, "sft", str(arithmetic / "sft.jsonl")), (arithmetic, "preference", str(arithmetic / "pairs.jsonl"))]
        for path, kind, files in given + ([(model.find_folder(o.model), "preference", o.data)] if o.model and o.data else []):
            rows = [json.dumps(json.loads(row)) + "\n" for _, row in data.read_rows(files)]
            large, tokenizer = Path(folder) / f"{len(rows)}.jsonl", data.Tokenizer(path)
            large.write_text("".join(rows * -(-100_000 // len(rows))))
            gc.collect()
            before, begin = resident("VmRSS"), time.perf_counter()
            dataset = data.load(str(large), kind, tokenizer, config.Config(cache_dir=folder), False)
            seconds, held = time.perf_counter() - begin, resident("VmRSS") - before
            drafts = [data.FORMATS[kind](json.loads(row), "all", False) for row in rows]
            texts = [text for d in drafts for text in (d.prompt, *(d.prompt + response for response in d.responses))]
            begin = time.perf_counter()
            tokenizer.fast.encode_batch(texts, add_special_tokens=False)
            tokenized = len(rows) / (time.perf_counter() - begin)
            print(f"| {len(dataset):,} of {Path(files).name} | {kind} | {dataset.lengths.mean():.0f} | "
                  f"{len(dataset) / seconds:,.0f} | {tokenized:,.0f} | {held:,.0f} |", flush=True)


def where(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__.split('+')[0]}"


BENCHES = {"losses": bench_losses, "head": bench_head, "generate": bench_generate, "dpo": bench_dpo, "trl": bench_trl,
           "scaling": bench_scaling, "ranks": bench_ranks, "start": bench_start, "precision": bench_precision}
NEEDS = {"generate": ("model",), "dpo": ("model",), "trl": ("model", "data"), "ranks": ("model", "data")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=list(BENCHES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names, or parts of them, separated by commas")
    parser.add_argument("--model", default="", help="a model folder")
    parser.add_argument("--data", default="", help="preference rows")
    parser.add_argument("--vocab", default="32000,151936", help="head: vocabulary sizes")
    parser.add_argument("--tokens", default="1024,4096", help="head: numbers of tokens")
    parser.add_argument("--steps", type=int, default=1000, help="precision: steps of a run")
    parser.add_argument("--pairs", type=int, default=0, help="dpo: of a step (8); trl: of an epoch (16)")
    parser.add_argument("--options", default="", help="trl, ranks: of the runs here, e.g. '--micro_batch_tokens=1024'")
    parser.add_argument("--theirs", default="{}", help="trl: changes to its config, e.g. '{\"use_liger_kernel\": true}'")
    parser.add_argument("--dtype", default="auto", help="dpo: of weights and compute, scaling: of compute; auto: as a run's")
    parser.add_argument("--peak", type=float, default=0, help="dpo: the device's TFLOP/s; default: those of a matmul")
    options = parser.parse_args()
    for key in NEEDS.get(options.what, ()):
        if not getattr(options, key):
            parser.error(f"{options.what} needs --{key}")
    options.device, options.dtype = config.machine(options)
    BENCHES[options.what](options)
