"""Speed and memory side by side on one machine: `python bench.py losses`, `head`, `generate` or `dpo`, each a Markdown table.

Everything compared does the same work on the same tensors, in turn, and the median of the rounds is shown; peak is memory
above what was there before. Liger-Kernel, cut-cross-entropy and transformers are measured where they are installed.
"""
import argparse
import contextlib
import ctypes
import gc
import importlib
import statistics
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import model
import rollout

# ---------------------------------------------------------------------------------------------------------------------
# The clock


def sync(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def resident(key: str) -> float:
    """MB of this process, of Linux's /proc: VmRSS now, VmHWM at its highest."""
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
            file.write("5")  # the highest so far is now
        before = resident("VmRSS")
        function()
        return max(0.0, resident("VmHWM") - before)
    return float("nan")


def measure(functions: dict[str, Callable], device: str, rounds: int, least: float = 0.002) -> dict[str, tuple]:
    """name -> (median seconds of a call, peak MB). Functions take turns; a turn lasts at least `least` seconds."""
    repeats = {}
    for name, function in functions.items():
        function()  # compiles
        sync(device)
        begin = time.perf_counter()
        function()
        sync(device)
        repeats[name] = max(1, int(least / max(time.perf_counter() - begin, 1e-7)))
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
    """A random tensor for a parameter of a loss, float64 on the host: log-ratios are of the order of scale (tokens) or ten
    times that (responses). longest: also the vocabulary of logits."""
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
    """One forward and backward of the loss's sum."""
    leaves = [x for x in given.values() if x.requires_grad]

    def step():
        result = loss(*given.values())
        total = losses.reduced(*result[:2])[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(total, leaves)
    return step


def liger_losses() -> dict[str, Callable]:
    """Liger's loss functions, which its chunked heads call, with the parameters of ours."""
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


def bench_losses(device: str, rounds: int, only: str):
    print(f"Forward and backward of each loss, {where(device)}: 256 pairs or responses, 1,024 tokens each; lm and kd: 256 "
          f"tokens of a vocabulary of 32,000; rankings of 8.\n")
    print("| loss | eager, us | compiled, us | Liger, us | eager, MB | compiled, MB | Liger, MB |\n|---|---|---|---|---|---|---|")
    liger = liger_losses()
    for name, o in losses.OBJECTIVES.items():
        if only and name not in only.split(","):
            continue
        longest = 32_000 if "logits" in o.reads else 8 if "ranked_rewards" in o.reads else 1024
        generator = torch.Generator().manual_seed(0)
        given = {}
        for read in o.reads:
            x = reading(read, 256, longest, generator).to(device)
            given[read] = (x.float() if x.is_floating_point() else x).requires_grad_(read in DIFFERENTIABLE)
        functions = {"eager": stepping(o.loss, given), "compiled": stepping(losses.compiled(o.loss), given)}
        if name in liger:
            functions["Liger"] = stepping(liger[name], given)
        found = measure(functions, device, rounds)
        columns = [f"{found[which][i] * unit:,.0f}" if which in found else ""
                   for i, unit in ((0, 1e6), (1, 1)) for which in ("eager", "compiled", "Liger")]
        print("|", " | ".join([name, *columns]), "|", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The head: log-probs of N targets from hidden states, and their gradient


def heads(device: str) -> dict[str, Callable]:
    """name -> (hidden, weight, target) -> log-probs (N,); of those with a loss, its value for sequences of 128 tokens."""
    naive = lambda h, w, t: (h @ w.t()).float().log_softmax(-1).gather(1, t[:, None])[:, 0]
    made = {"naive": naive, "naive, compiled": torch.compile(naive),
            "fused (ours)": lambda h, w, t: losses.linear_log_probs(h, w, t)[0],
            "fused, compiled (ours)": lambda h, w, t: losses.linear_log_probs(h, w, t, compiled=True)[0]}
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
    if chunked_loss := optional("liger_kernel.chunked_loss"):
        theirs = chunked_loss.LigerFusedLinearSimPOLoss(beta=2.0, gamma=1.0, compute_nll_loss=False)
        made["Liger's chunked SimPO"] = lambda h, w, t: theirs(w, h.view(-1, 128, h.shape[1]), t.view(-1, 128))[0]
    return made


def bench_head(device: str, rounds: int, only: str):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens, width = (16_384, 2048) if device == "cuda" else (2048, 512)
    print(f"Log-probs of {tokens:,} tokens and their gradient, width {width}, {str(dtype).split('.')[1]}, {where(device)}. "
          f"Difference: of the weight's gradient, to that of the first of its kind.\n")
    print("| vocabulary | head | seconds | against the first | peak, MB | difference |\n|---|---|---|---|---|---|")
    for vocab in (32_000, 151_936):
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype).requires_grad_(True)
        weight = (torch.randn(vocab, width, generator=generator, device=device) / width**0.5).to(dtype).requires_grad_(True)
        target = torch.randint(vocab, (tokens,), generator=generator, device=device)
        upstream = torch.randn(tokens, generator=generator, device=device)

        def step(head):
            return torch.autograd.grad((head(hidden, weight, target).float() * upstream).sum(), (hidden, weight))
        exact, error, functions = {}, {}, {}
        for name, head in heads(device).items():
            if only and not any(word in name for word in only.split(",")):
                continue
            try:
                grad = step(head)[1].float()
                true = exact.setdefault("simpo" in name.lower(), grad)  # of the two with a loss: the first's
                error[name] = ((grad - true).norm() / true.norm()).item()
                functions[name] = lambda head=head: step(head)
            except Exception as problem:  # a peer that does not run here: say so and go on
                print(f"| {vocab:,} | {name} | {type(problem).__name__}: {str(problem).splitlines()[0][:60]} | | | |")
        found = measure(functions, device, rounds)
        base = next(iter(found.values()))[0]
        for name, (seconds, memory) in found.items():
            ratio = f"{base / seconds:.2f}x"
            print(f"| {vocab:,} | {name} | {seconds:.3g} | {ratio} | {memory:,.0f} | {error[name]:.1e} |", flush=True)


def bench_generate(device: str, rounds: int, only: str, folder: str):
    """Greedy answers of 64 tokens to prompts of 16 to 96; and 8 samples each of 4 prompts, as a rollout has them."""
    if not folder:
        raise SystemExit("generate needs --model, a model folder")
    transformers, new = optional("transformers"), 64
    print(f"Tokens a second, {new} new ones behind prompts of 16 to 96, {where(device)}.\n")
    print("| dtype | rows | what | tokens/s | ratio | peak, MB | `[B, T, V]` in fp32, MB |\n|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        path = model.find_folder(folder)
        decoder = model.load(path)[0].to(device, dtype)
        theirs = transformers and transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        for rows, n in ((1, 1), (32, 1), (32, 8)):
            rng, vocab = np.random.default_rng(0), decoder.shape.vocab_size
            prompts = [rng.integers(3, vocab, rng.integers(16, 97)).tolist() for _ in range(rows // n)]
            draw = dict(sampling=rollout.Sampling(), keys=[(0, i) for i in range(len(prompts))], n=n) if n > 1 else {}

            def ours(compiled):
                return rollout.generate(decoder, prompts, max_new_tokens=new, stop=set(), compiled=compiled, **draw)

            def peers():
                longest = max(map(len, prompts))
                ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
                drawn = dict(temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n) if n > 1 else {}
                return theirs.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
                                       cache_implementation="static", do_sample=n > 1, **drawn)
            found = measure({**({"transformers, static cache": peers} if theirs else {}), "ours": lambda: ours(False),
                             "ours, compiled": lambda: ours(True)}, device, rounds)
            base = next(iter(found.values()))[0]
            whole = rows * (max(map(len, prompts)) + new) * vocab * 4 / 2**20
            of = f"{str(dtype).split('.')[1]} | {rows // n} x {n}"
            for name, (seconds, memory) in found.items():
                speed = f"{rows * new / seconds:,.0f} | {base / seconds:.2f}x"
                print(f"| {of} | {name} | {speed} | {memory:,.0f} | {whole:,.0f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A DPO step, from the usual one to ours


LENGTHS = {"HH-like": (118, 43), "UltraFeedback-like": (180, 300), "TL;DR-like": (350, 35)}  # mean tokens of prompts and responses


def pairs_of(kind: str, count: int, vocab: int) -> data.Dataset:
    """Random ids of log-normal lengths."""
    rng, (prompt, response) = np.random.default_rng(0), LENGTHS[kind]
    draw = lambda mean: rng.integers(3, vocab, max(4, int(mean * rng.lognormal(-0.18, 0.6)))).astype(np.int32)
    return data.as_dataset([data.Example(draw(prompt), responses := [draw(response), draw(response)],
                                         [np.ones(len(r), bool) for r in responses], [True, False], [0], [1], [0.0], kind)
                            for _ in range(count)], Counter())


def padded_logps(decoder, examples: list) -> torch.Tensor:
    """The usual way, and the oracle: chosen and rejected rows padded to the longest, logits of every token -> sums (2, P)."""
    device = decoder.lm_head.weight.device
    rows = [(e.prompt, e.responses[side]) for side in (0, 1) for e in examples]
    longest = max(len(p) + len(r) for p, r in rows)
    pad = lambda p, r, made: np.pad(made, (0, longest - len(p) - len(r)))
    table = lambda make: torch.from_numpy(np.stack([pad(p, r, make(p, r)) for p, r in rows])).to(device)
    tokens = table(lambda p, r: np.concatenate([p, r]).astype(np.int64))
    scored = table(lambda p, r: np.concatenate([np.zeros(len(p), bool), np.ones(len(r), bool)]))

    def attend(layer, q, k, v):
        q, k, v = (x.view(*tokens.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    hidden = decoder.model(tokens.flatten(), torch.arange(longest, device=device).repeat(len(rows)), attend)
    logits = decoder.lm_head(hidden).view(*tokens.shape, -1)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (logps * scored[:, 1:]).sum(-1).view(2, -1)


def packed_logps(decoder, dataset, layout, head: str) -> torch.Tensor:
    """One packed stream -> sums (2, P). head: "all" (logits of every token), "scored" (of scored ones), "fused". Of a dataset of
    single responses, chosen and rejected alternate; of pairs, both share their prompt."""
    (batch,), _ = data.micro_batches(dataset, np.arange(len(dataset)), layout)
    if head == "fused":
        logps = decoder(batch, ["log_probs"])["log_probs"]
    else:
        hidden, at = decoder.hidden(batch), batch["predict_from"]
        logits = decoder.lm_head(hidden if head == "all" else hidden[at]).log_softmax(-1)
        logps = (logits[at] if head == "all" else logits).gather(1, batch["target"][:, None])[:, 0]
    sums, single = losses.by_response(batch, logps).sum(-1), len(dataset.examples[0].responses) == 1
    place = batch["rows"] if single else 2 * batch["rows"] + batch["rank"]
    return torch.zeros_like(sums).index_put((place,), sums).view(-1, 2).t()


def bench_dpo(device: str, rounds: int, only: str, folder: str):
    """The ladder: what each of our ways adds to the usual step, forward, backward and AdamW."""
    if not folder:
        raise SystemExit("dpo needs --model, a model folder")
    count = 8
    print(f"A DPO step of {count} pairs, {folder}, fp32, {where(device)}; loss and gradient: against the padded step's.\n")
    print("| lengths | step | seconds | ratio | peak, MB | loss | gradient |\n|---|---|---|---|---|---|---|")
    path = model.find_folder(folder)
    decoder, frozen = (model.load(path)[0].to(device) for _ in range(2))
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, fused=True)
    for kind in LENGTHS:
        if only and not any(word in kind for word in only.split(",")):
            continue
        dataset = pairs_of(kind, count, decoder.shape.vocab_size)
        single = data.as_dataset([data.with_responses(e, [r])._replace(chosen=[], rejected=[], margin=[])
                                  for e in dataset.examples for r in e.responses], Counter())
        layouts = {id(d): data.Layout(sum(e.length for e in d.examples), False, False, losses.head_chunk(
            decoder.shape.vocab_size, device), device) for d in (dataset, single)}
        usual = lambda m: padded_logps(m, dataset.examples)
        ways = {"padded, as usual": (usual, None)}
        ways["+ packing"] = (lambda m: packed_logps(m, single, layouts[id(single)], "all"), None)
        ways["+ head on scored tokens"] = (lambda m: packed_logps(m, single, layouts[id(single)], "scored"), None)
        ways["+ prefix sharing"] = (lambda m: packed_logps(m, dataset, layouts[id(dataset)], "scored"), None)
        with torch.no_grad():
            table = packed_logps(frozen, dataset, layouts[id(dataset)], "fused")
        ways["+ cached reference"] = (ways["+ prefix sharing"][0], table)
        ways["+ fused head (ours)"] = (lambda m: packed_logps(m, dataset, layouts[id(dataset)], "fused"), table)

        def step(way, update=True):
            logps, cached = way
            with torch.no_grad():
                reference = logps(frozen) if cached is None else cached
            loss = losses.dpo(*logps(decoder), *reference, beta=0.1)[0].sum() / count
            loss.backward()
            grad = None if update else torch.cat([p.grad.flatten() for p in decoder.parameters()])
            if update:
                optimizer.step()
            optimizer.zero_grad()
            return loss.item(), grad
        found = {name: step(way, update=False) for name, way in ways.items()}
        true_loss, true_grad = next(iter(found.values()))
        error = {name: (abs(loss - true_loss), ((grad - true_grad).norm() / true_grad.norm()).item())
                 for name, (loss, grad) in found.items()}
        del found, true_grad
        times = measure({name: lambda way=way: step(way) for name, way in ways.items()}, device, rounds)
        base = next(iter(times.values()))[0]
        for name, (seconds, memory) in times.items():
            off = "{:.0e} | {:.0e}".format(*error[name])
            print(f"| {kind} | {name} | {seconds:.2f} | {base / seconds:.2f}x | {memory:,.0f} | {off} |", flush=True)


def where(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__.split('+')[0]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("losses", "head", "generate", "dpo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names, or parts of them, separated by commas")
    parser.add_argument("--model", default="", help="generate, dpo: the model's folder")
    arguments = parser.parse_args()
    given = (arguments.device, arguments.rounds, arguments.only)
    if arguments.what in ("generate", "dpo"):
        {"generate": bench_generate, "dpo": bench_dpo}[arguments.what](*given, arguments.model)
    else:
        {"losses": bench_losses, "head": bench_head}[arguments.what](*given)
