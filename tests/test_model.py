"""The decoder equals transformers' models, folders go there and back, and packing changes nothing."""
import contextlib
import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from conftest import ROOT, TINY, as_dataset, layout, random_trees, tiny

FAMILIES = sorted(TINY)


def close(ours, theirs, tolerance):
    assert ((ours - theirs).abs() <= tolerance * (1 + theirs.abs())).all(), (ours - theirs).abs().max()


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def same_logits(folder, vocab, tolerance=1e-4, length=100):
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocab, length))
    ours, _ = model.load(folder)
    with torch.no_grad():
        close(ours.logits(tokens), theirs(folder)(tokens[None]).logits[0], tolerance)
    return ours, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **TINY[family])
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in made.parameters():  # transformers starts norms at 1 and biases at 0, which would hide mistakes
            p.add_(torch.randn_like(p) * 0.1)
    made.save_pretrained(tmp_path / "theirs")
    decoder, tokens = same_logits(tmp_path / "theirs", 97)
    model.save(decoder, tmp_path / "ours", torch.float32, tmp_path)
    with torch.no_grad():
        close(theirs(tmp_path / "ours")(tokens[None]).logits[0], decoder.logits(tokens), 1e-4)


def test_logits_of_stories260k(stories):
    same_logits(stories, 512, length=200)


def test_logits_of_smollm2(smollm2):
    same_logits(smollm2, 49152, length=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise_and_tied_weights_are_stored_once(family, tmp_path):
    decoder = tiny(family)
    model.save(decoder, tmp_path, torch.float32, tmp_path)
    again, saved = model.load(tmp_path)
    assert saved == torch.float32
    for (name, a), (other, b) in zip(decoder.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name
    names = model.read_weights(tmp_path).keys()
    assert ("lm_head.weight" in names) == (not decoder.shape.tied)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == decoder.shape.tied


def test_sharded_folder_loads(tmp_path):
    from safetensors.torch import save_file
    decoder = tiny("llama")
    model.save(decoder, tmp_path, torch.float32, tmp_path)
    state, where = model.read_weights(tmp_path), {}
    (tmp_path / "model.safetensors").unlink()
    for part in range(2):
        names = sorted(state)[part::2]
        save_file({n: state[n] for n in names}, tmp_path / f"model-{part}.safetensors")
        where.update(dict.fromkeys(names, f"model-{part}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again, _ = model.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("break_it, message", [
    (lambda c, s: c.update(model_type="mamba"), "known: llama"),
    (lambda c, s: s.pop("model.norm.weight"), "1 tensors of a llama model are missing: model.norm.weight$"),
    (lambda c, s: s.update({"score.weight": s.pop("lm_head.weight")}), "are missing: lm_head.weight; it has a score head: is it a reward model?"),
    (lambda c, s: s.update(extra=torch.zeros(1)), "are not known: extra"),
    (lambda c, s: c.update(vocab_size=98), r"is \[97, 32\], config.json says \[98, 32\]"),
    (lambda c, s: c.update(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn' is not implemented"),
    (lambda c, s: c.pop("hidden_size"), "needs the key 'hidden_size'")])
def test_broken_folders_are_clear_errors(tmp_path, break_it, message):
    from safetensors.torch import save_file
    model.save(tiny("llama"), tmp_path, torch.float32, tmp_path)
    config, state = json.loads((tmp_path / "config.json").read_text()), model.read_weights(tmp_path)
    break_it(config, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        model.load(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no config.json there; expected a model folder"):
        model.find_folder(str(tmp_path))
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match=r"no config.json there \(did you mean its checkpoint-7\?\); expected a model folder"):
        model.find_folder(str(tmp_path))


def one_at_a_time(decoder, example):
    """Log-probs of the scored tokens of each response, from full logits of one sequence at a time: the oracle."""
    out = []
    for ids, scored in zip(example.responses, example.scored):
        sequence = torch.from_numpy(np.concatenate([example.prompt, ids])).long()
        logps = decoder.logits(sequence)[:-1].log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
        out.append(logps[len(example.prompt) - 1:][torch.from_numpy(scored)])
    return torch.cat(out)


def relative(a, b):
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_response_at_a_time(family, static):
    decoder, rng = tiny(family), np.random.default_rng(3)
    examples = random_trees(rng, 12, 97)
    dataset = as_dataset(examples)
    batches, _ = data.micro_batches(dataset, np.arange(12), layout(256, static))
    assert len(batches) > 1
    found = torch.empty(int(dataset.offsets[-1]))
    weight = torch.from_numpy(rng.normal(size=len(found))).float()
    expected = torch.cat([one_at_a_time(decoder, e) for e in examples])
    (expected * weight).sum().backward()
    grads = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    for batch in batches:
        logps = decoder(batch, ["log_probs"])["log_probs"]
        at = batch["scored_index"]
        found[at] = logps.detach()
        (logps * weight[at]).sum().backward()
    assert (found - expected).abs().max() < 1e-5
    assert relative([p.grad for p in decoder.parameters()], grads) < 1e-5


@pytest.mark.parametrize("stream, labels", [("reward", 1), ("step_logits", 2)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_packed_stream_are_those_of_plain_sequences(family, static, stream, labels):
    """A reward at each response's last token, step logits at each scored token's own place: value and gradient."""
    trunk, rng = tiny(family, torch.float64), np.random.default_rng(3)
    decoder = model.Decoder(trunk.config, heads={"score": labels}).double()
    decoder.model.load_state_dict(trunk.model.state_dict())
    examples = random_trees(rng, 12, 97)
    expected = []
    for e in examples:
        for ids, scored in zip(e.responses, e.scored):
            tokens = torch.from_numpy(np.concatenate([e.prompt, ids])).long()
            hidden = plain_hidden(decoder, tokens)[len(e.prompt):]
            expected.append(decoder.score(hidden[-1:] if stream == "reward" else hidden[torch.from_numpy(scored)]))
    weights = [torch.from_numpy(rng.normal(size=tuple(x.shape))) for x in expected]
    wanted = list(decoder.parameters())
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(expected, weights)), wanted)
    begins, loss, seen = np.cumsum([0, *(len(e.responses) for e in examples)]), 0, 0
    for batch in data.micro_batches(as_dataset(examples), np.arange(12), layout(256, static))[0]:
        made = decoder(batch, [stream])[stream]
        response = [begins[row] + rank for row, rank in zip(batch["rows"].tolist(), batch["rank"].tolist())]
        for at, part in zip(response, made[:, None] if stream == "reward" else made.split(batch["lengths"].tolist())):
            assert (part.view_as(expected[at]) - expected[at]).abs().max() < 1e-10
            loss, seen = loss + (part.view_as(weights[at]) * weights[at]).sum(), seen + 1
    assert seen == len(expected) and relative(torch.autograd.grad(loss, wanted), grads) < 1e-10


def plain_hidden(decoder, tokens):
    """(L,) -> (L, D) by a dense causal mask."""
    head, decoder.lm_head = getattr(decoder, "lm_head", None), torch.nn.Identity()
    hidden = decoder.logits(tokens)
    del decoder.lm_head
    if head is not None:
        decoder.lm_head = head
    return hidden


def test_responses_never_see_their_siblings():
    decoder, rng = tiny("llama"), np.random.default_rng(0)
    example = random_trees(rng, 1, 97, responses=(2, 2), holes=False)[0]
    other = example._replace(responses=[example.responses[0], (example.responses[1] + 1) % 97])
    first, second = (decoder(data.micro_batches(as_dataset([e]), np.arange(1), layout(256))[0][0], ["log_probs"])["log_probs"]
                     for e in (example, other))
    n = len(example.responses[0])
    assert torch.equal(first[:n], second[:n]) and not torch.equal(first[n:], second[n:])


def some_lengths():
    """(prompt, responses) of six small trees."""
    return [(len(e.prompt), [*map(len, e.responses)]) for e in random_trees(np.random.default_rng(5), 6, 97)]


@pytest.mark.parametrize("lengths", [some_lengths(), [(40, [900, 30]), (12, [800])]])  # long ones have a query for each key
def test_varlen_segments_describe_the_same_attention(lengths):
    """The CUDA kernel's index tensors, replayed segment by segment with plain attention, equal the grouped path."""
    spans, at = [], 0
    for prompt, responses in lengths:
        begin = at
        spans.append((at, prompt, at, 0))
        at += prompt
        for n in responses:
            spans.append((at, n, begin, prompt))
            at += n
    q, k, v = (torch.randn(at, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    grouped, varlen = data.to_device(data.grouped_segments(spans), "cpu"), data.to_device(data.varlen_segments(spans), "cpu")
    square = [rows for rows, length_q, length_k in grouped["groups"] if length_q == length_k]
    assert sum(square) == len(lengths) + sum(n > 768 for _, responses in lengths for n in responses)  # prompts, and long ones
    for window in (0, 5, 10**6):
        pieces, cu_q, cu_k = [], varlen["cu_q"].tolist(), varlen["cu_k"].tolist()
        for (a, b), (c, d) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):
            if a == b:
                assert c == d  # padding of cu_seqlens
                continue
            assert b - a <= varlen["max_q"] and d - c <= varlen["max_k"]
            keys = varlen["key_index"][c:d]
            distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # causal at the bottom right
            scores = torch.einsum("qhe,khe->hqk", q[a:b], k[keys].repeat_interleave(2, 1)) / 8**0.5
            scores = scores.masked_fill((distance < 0) | (distance >= (window or 10**9)), -torch.inf)
            pieces.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[keys].repeat_interleave(2, 1)))
        ours, plain = model.packed_attention(q, k, v, {**grouped, "masks": {}}, window), torch.cat(pieces)
        close(ours, plain, 1e-5)
        for a, b in zip(*(torch.autograd.grad((x * torch.cos(x.detach())).sum(), (q, k, v)) for x in (ours, plain))):
            close(a, b, 1e-5)
        rounded = [x.bfloat16() for x in (q, k, v)]
        exact = model.packed_attention(*(x.float() for x in rounded), {**grouped, "masks": {}}, window)
        for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with context:  # 16 bits in and out, and nothing is rounded in between
                assert torch.equal(model.packed_attention(*rounded, {**grouped, "masks": {}}, window), exact.bfloat16())


class Alive(TorchDispatchMode):
    """Notes every tensor that is made, and says which are still there."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        return out

    def shapes(self):
        return [tuple(tensor.shape) for made in self.made if (tensor := made()) is not None]


@pytest.mark.parametrize("family, kept", [("llama", 2), ("gpt2", 1)])
def test_what_backward_waits_for(family, kept, monkeypatch):
    """Of a layer's MLP its matrix products, not what comes of them one by one; of a mask one for all layers."""
    monkeypatch.setattr(model, "REMADE", 0)
    decoder, dataset = tiny(family), as_dataset(random_trees(np.random.default_rng(1), 3, 97))
    (batch,), _ = data.micro_batches(dataset, np.arange(3), layout(999))
    with Alive() as alive:
        out = decoder(batch, ["log_probs"])["log_probs"]
    wide, masks = (len(batch["tokens"]), decoder.shape.intermediate_size), [tuple(mask.shape) for mask in batch["masks"].values()]
    assert alive.shapes().count(wide) == kept * decoder.shape.num_layers
    assert len(masks) == sum(shape in masks for shape in alive.shapes()) > 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_made_again_is_what_it_was(family, dtype, checkpointing, monkeypatch):
    decoder, dataset, found = tiny(family), as_dataset(random_trees(np.random.default_rng(1), 3, 97)), []
    decoder.model.checkpointing = checkpointing
    (batch,), _ = data.micro_batches(dataset, np.arange(3), layout(999))
    for elements in (0, 10**9):
        monkeypatch.setattr(model, "REMADE", elements)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = decoder(batch, ["log_probs"])["log_probs"]
        found.append([out, *torch.autograd.grad(out.sum(), [*decoder.parameters()])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("family", TINY)
def test_a_frozen_model_needs_no_masters(family):
    """Its blocks' matrices in bf16: the bits that autocast makes of fp32 ones; in wider compute it stays as it is."""
    decoder, dataset = tiny(family), as_dataset(random_trees(np.random.default_rng(1), 3, 97))
    (batch,), _ = data.micro_batches(dataset, np.arange(3), layout(999))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = decoder(batch, ["log_probs", "entropy"])
        model.without_masters(decoder, torch.float32)
        assert {p.dtype for p in decoder.parameters()} == {torch.float32}
        after = model.without_masters(decoder, torch.bfloat16)(batch, ["log_probs", "entropy"])
    assert all(map(torch.equal, before.values(), after.values()))
    assert all((p.dtype == torch.bfloat16) == ("_proj." in name) for name, p in decoder.named_parameters())


def test_no_graph_is_made_after_the_first_step():
    """Streams share their graphs, whatever their lengths and however many tokens they score."""
    counters = torch._dynamo.utils.counters["stats"]
    dataset, decoder = as_dataset(random_trees(np.random.default_rng(0), 90, 97)), tiny("llama")
    torch.compiler.reset()
    decoder.compile_blocks()
    graphs, shapes = [], set()
    for step in range(6):
        for batch in data.micro_batches(dataset, data.step_rows(dataset, step, 9 + 2 * step, 0), layout(384, static=True))[0]:
            decoder(batch, ["log_probs"])["log_probs"].sum().backward()
            shapes.add((len(batch["tokens"]), len(batch["target"])))
            graphs.append(counters["unique_graphs"])
    assert len({tokens for tokens, _ in shapes}) == 3 and len(shapes) > 6
    assert graphs[-1] == graphs[0] > 0, graphs


def test_a_hub_name_is_looked_up_once(tmp_path):
    """In the hub's own cache, without a network; a name that is not there is an error that says so."""
    pytest.importorskip("huggingface_hub")
    home = tmp_path / "hub/models--own--tiny"
    (home / "snapshots/abc").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("abc")
    (home / "snapshots/abc/config.json").write_text("{}")
    code = """
import shutil, sys, model
print(model.find_folder("own/tiny").relative_to(sys.argv[1]))
shutil.rmtree(sys.argv[1])
print(model.find_folder("own/tiny").relative_to(sys.argv[1]))
try:
    model.find_folder("own/none")
except ValueError as error:
    print(str(error)[:70])
"""
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "hub"], cwd=ROOT, env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["models--own--tiny/snapshots/abc"] * 2 + ["own/none: not a local folder, and cannot be downloaded from the hub: C"], said.stderr
