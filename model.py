"""One decoder for Llama, Mistral, Qwen2, Qwen3 and GPT-2, with Hugging Face's parameter names; its heads; load and save.

A family is an entry of `FAMILIES`: its config.json -> `Shape`. GPT-2's own parameter names are translated on load and save.

Shapes: T stream tokens, S segments, H query heads, K key-value heads, E head width, D width, V vocabulary.
"""
import functools
import inspect
import json
import math
import re
import shutil
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses import Projected, linear_log_probs, wide

# ---------------------------------------------------------------------------------------------------------------------
# Shape: what config.json says, in one vocabulary for every family


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied: bool  # lm_head shares the embedding
    rope: dict | None = None  # None: learned positions (GPT-2)
    windows: tuple = ()  # sliding window of each layer in positions, 0: none
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gpt2: bool = False  # LayerNorm, plain GELU MLP, learned positions

    def __post_init__(self):
        for name, kind in typing.get_type_hints(Shape).items():
            value = getattr(self, name)
            value = float(value) if kind is float and type(value) is int else value
            if kind in (int, float, bool) and (type(value) is not kind or kind is not bool and not 0 < value < 1e12):
                wanted = "true or false" if kind is bool else "a number above 0"
                raise ValueError(f"{name} should be {wanted}, found {value!r:.40}")
        if not all(type(window) is int and window >= 0 for window in self.windows) or len(self.windows) != self.num_layers:
            raise ValueError(f"sliding_window and layer_types should give a length, or none, for each of {self.num_layers} layers")
        if self.rope:
            rope_frequencies(self.rope, self.head_dim)  # an unknown scaling is an error now, not in step 1
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads {self.num_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_kv_heads}")


def _llama(c: dict) -> Shape:
    heads = c["num_attention_heads"]
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {c['hidden_act']!r} is not implemented (silu is)")
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    return Shape(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"], num_heads=heads, num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads, norm_eps=c.get("rms_norm_eps", 1e-6),
        max_positions=c.get("max_position_embeddings", 2048), tied=c.get("tie_word_embeddings", False), rope=rope,
        windows=(0,) * c["num_hidden_layers"], qkv_bias=c.get("attention_bias", False),
        o_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False))


def _mistral(c: dict) -> Shape:
    return replace(_llama(c), windows=(c.get("sliding_window") or 0,) * c["num_hidden_layers"])


def _qwen2(c: dict) -> Shape:
    shape, window = _llama(c), c.get("sliding_window") or 0
    first = c.get("max_window_layers", 28) if c.get("use_sliding_window") else shape.num_layers
    kinds = c.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(shape.num_layers)]
    return replace(shape, windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
                   qkv_bias=True, o_bias=False)


def _qwen3(c: dict) -> Shape:
    bias = c.get("attention_bias", False)
    return replace(_qwen2(c), head_dim=c.get("head_dim") or 128, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _gpt2(c: dict) -> Shape:
    for key, plain in {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                       "scale_attn_weights": True, "activation_function": "gelu_new"}.items():
        if c.get(key, plain) != plain:
            raise ValueError(f"{key} = {c[key]!r} is not implemented ({plain!r} is)")
    width, heads, layers = c["n_embd"], c["n_head"], c["n_layer"]
    return Shape(
        vocab_size=c["vocab_size"], hidden_size=width, intermediate_size=c.get("n_inner") or 4 * width, num_layers=layers,
        num_heads=heads, num_kv_heads=heads, head_dim=width // heads, norm_eps=c.get("layer_norm_epsilon", 1e-5),
        max_positions=c["n_positions"], tied=c.get("tie_word_embeddings", True), windows=(0,) * layers,
        qkv_bias=True, o_bias=True, mlp_bias=True, gpt2=True)


FAMILIES = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": _gpt2}
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}


class Noting(dict):
    """A dict that notes which of its keys are read."""

    def __init__(self, given: dict):
        super().__init__(given)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


def read_shape(config: dict, where: str) -> Shape:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r:.40} is not known; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](config)
    except KeyError as missing:
        raise ValueError(f"{where}: a {family} model needs the key {missing}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {str(error):.400}") from None
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{where}: a value of the wrong kind ({type(error).__name__}: {error})"[:400]) from None


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions


def rope_frequencies(rope: dict, head_dim: int, device=None) -> Tensor:
    """Angle per position of each rotary pair (E/2,), fp32; llama3 scaling as in Llama 3.1."""
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope["rope_theta"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not implemented")
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim)
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / rope["factor"]
    if kind == "llama3":
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, as it was; 0: slowed by the factor
        return frequency * keep + frequency / factor * (1 - keep)
    raise ValueError(f"rope_scaling type {kind!r} is not implemented; known: default, linear, llama3")


for _function in (torch.cos, torch.sin, torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.tanh):
    for _dtype in (torch.float32, torch.float64):  # if several threads race in MKL's first call of a function, one's result
        _function(torch.ones(1, dtype=_dtype))  # may be off by 1e-4 (pytorch/pytorch#188792): make it here, in one thread


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, E), cos and sin (T, 1, E/2): rotate pair (i, i + E/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a packed, prefix-shared stream. A segment is a prompt, which attends to itself, or a response, which attends
# to its prompt and itself. Its keys are gathered, so that a key's index among them is its position, and the causal mask (and a
# sliding window) is aligned at the bottom right. data.varlen_segments and data.grouped_segments build the index tensors.


@functools.cache
def varlen_kernel() -> tuple[Callable, typing.Mapping]:
    """The kernel and its parameters: torch 2.11 to 2.13 name the causal switch differently. Its import takes as long as torch."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn, inspect.signature(varlen_attn).parameters


def packed_attention(q: Tensor, k: Tensor, v: Tensor, batch: dict, window: int) -> Tensor:
    """q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
    return (_varlen if "cu_q" in batch else _grouped)(q, k, v, batch, window)  # as the batch was laid out


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (T, K, E) -> (T, H, E): each head repeated for the query heads that share it."""
    shared = q.shape[1] // x.shape[1]
    return x.repeat_interleave(shared, dim=1) if shared > 1 else x


def _varlen(q, k, v, batch, window):
    """One variable-length flash kernel for the whole stream."""
    k, v = k[batch["key_index"]], v[batch["key_index"]]
    varlen_attn, parameters = varlen_kernel()
    options = {"window_size": (window - 1 if window else -1, 0)} if "window_size" in parameters else {"is_causal": True}
    if window and "window_size" not in parameters:
        raise ValueError("sliding windows on CUDA in 16 bits need a newer torch (varlen_attn with window_size) or --dtype=float32")
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    else:
        k, v = repeated(k, q), repeated(v, q)
    return varlen_attn(q.contiguous(), k, v, batch["cu_q"], batch["cu_k"], batch["max_q"], batch["max_k"], **options)


def _grouped(q, k, v, batch, window):
    """Segments of similar lengths are batched into one padded SDPA call per group, for any device and dtype. Computes in fp32 or
    wider: on a CPU, SDPA in bf16 takes twice as long."""
    if q.is_cuda:  # its kernels do GQA in 16 bits only: in fp32, enable_gqa would materialize every head's (Lq, Lk) scores
        k, v = repeated(k, q), repeated(v, q)
    dtype, groups, out = q.dtype, batch["groups"], []  # split, not sliced: each slice's gradient would be full-size
    q = wide(q).index_select(0, batch["group_q"]).split([rows * length for rows, length, _ in groups])
    k, v = (wide(x).index_select(0, batch["group_k"]).split([rows * length for rows, _, length in groups]) for x in (k, v))
    for i, (rows, length_q, length_k) in enumerate(groups):
        reach = window if window < length_k else 0
        causal = length_q == length_k and not reach  # every segment has a query for each key
        key = i, reach, q[i].dtype
        mask = None if causal else batch["masks"].get(key)  # the same for every layer
        if mask is None and not causal:
            offset = batch["group_offset"].split([rows for rows, _, _ in groups])[i]  # keys before the first query
            place = torch.arange(length_q, device=offset.device)[:, None] + offset[:, None, None]  # (B, Lq, 1)
            distance = place - torch.arange(length_k, device=place.device)  # (B, Lq, Lk), both as places among the keys
            hidden = (distance < 0) | (distance >= reach if reach else False)
            mask = q[i].new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]  # SDPA converts bool masks in every call
            batch["masks"][key] = mask
        blocks = [x[i].unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v)]  # (B, H, L, E)
        with torch.autocast(q[i].device.type, enabled=False):
            attended = F.scaled_dot_product_attention(*blocks, attn_mask=mask, is_causal=causal, enable_gqa=True)
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out).index_select(0, batch["group_inverse"]).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def norm(shape: Shape) -> nn.Module:
    return (nn.LayerNorm if shape.gpt2 else RMSNorm)(shape.hidden_size, eps=shape.norm_eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim, width = shape.head_dim, shape.hidden_size
        self.q_proj = nn.Linear(width, shape.num_heads * shape.head_dim, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, width, bias=shape.o_bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def project(self, x, rope):
        """x (T, D) -> q (T, H, E), k and v (T, K, E)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # CUDA autocast norms in fp32
        return (rotate(q, *rope), rotate(k, *rope), v) if rope else (q, k, v)


REMADE = 2**20  # elements of an input, from which `remade` recomputes


def remade(function: Callable, *inputs: Tensor) -> Tensor:
    """function(*inputs), whose intermediate results are recomputed in backward instead of kept; not under a compiler, which
    decides that itself, nor for small inputs, where it does not pay."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or inputs[0].numel() < REMADE:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class MLP(nn.Module):
    """Gated by SiLU; GPT-2's is plain, with a GELU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gated = not shape.gpt2
        if self.gated:
            self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def down(self, up, gate=None):
        return self.down_proj(F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up)

    def forward(self, x):
        return remade(self.down, self.up_proj(x), *([self.gate_proj(x)] if self.gated else []))


class Block(nn.Module):
    """Two halves around attention, each one compiled graph: the attention kernel is opaque to the compiler anyway."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norm(shape), norm(shape)
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)

    def before(self, x, rope):
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after(self, x, attended):
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, attend, layer):
        """x (T, D); attend(layer, q, k, v) -> (T, H, E) is packed attention or attention over a cache."""
        return self.after(x, attend(layer, *self.before(x, rope)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if it is enabled, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Trunk(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.checkpointing = shape, False
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        if shape.gpt2:
            self.embed_positions = nn.Embedding(shape.max_positions, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = norm(shape)

    def forward(self, tokens, positions, attend):
        """tokens, positions (T,) -> hidden states after the last norm (T, D)."""
        x, rope = self.embed_tokens(tokens), None
        if self.shape.gpt2:
            x = x + self.embed_positions(positions)
        else:
            angle = positions[:, None].float() * rope_frequencies(self.shape.rope, self.shape.head_dim, x.device)
            low = compute_dtype(x)
            rope = (angle.cos()[:, None].to(low), angle.sin()[:, None].to(low))  # (T, 1, E/2)
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, layer, use_reentrant=False)
            else:
                x = block(x, rope, attend, layer)
        return self.norm(x)


def predicting(hidden, batch):
    """Hidden states at the positions that predict the scored tokens (N, D). On CUDA, cast to the dtype of matrix products: the
    residual stream is fp32."""
    hidden = hidden.index_select(0, batch["predict_from"])
    return hidden.to(compute_dtype(hidden)) if hidden.is_cuda else hidden


def token_head(decoder, hidden, batch, wanted):
    """log p of each scored token under the softmax that predicts it; if wanted, its entropy and collision too, (N,) each."""
    hidden = predicting(hidden(), batch)
    made = linear_log_probs(hidden, decoder.lm_head.weight, batch["target"], entropy="entropy" in wanted,
                            collision="collision" in wanted, temperature=decoder.temperature, keep=decoder.keep,
                            compiled=decoder.compiled)
    return dict(zip(("log_probs", "entropy", "collision"), made))


def logits_head(decoder, hidden, batch, wanted):
    """Logits that predict the scored tokens, as (hidden, weight) not yet multiplied: `losses.by_chunk` does that."""
    return {"logits": Projected(predicting(hidden(), batch), decoder.lm_head.weight)}


def reward_head(decoder, hidden, batch, wanted):
    """The score of each response at its last token, (R,), in fp32."""
    hidden = hidden().index_select(0, batch["last"])
    with torch.autocast(hidden.device.type, enabled=False):
        return {"reward": decoder.score(hidden.to(decoder.score.weight.dtype))[:, 0]}


def step_head(decoder, hidden, batch, wanted):
    """Logits of a bad and of a good step at each step's own token, (N, 2), in fp32: from the score head, or those of the two
    reward tokens."""
    hidden = hidden().index_select(0, batch["own"])
    with torch.autocast(hidden.device.type, enabled=False):
        if decoder.reward_tokens:
            rows = torch.where(torch.arange(2, device=hidden.device) == 0, *decoder.reward_tokens)  # on the device without a copy
            weight = decoder.lm_head.weight.index_select(0, rows)
            return {"step_logits": F.linear(hidden.to(weight.dtype), weight)}
        return {"step_logits": decoder.score(hidden.to(decoder.score.weight.dtype))}


def value_head(decoder, hidden, batch, wanted):
    """The critic's value at the position that predicts each scored token, (N,), in fp32: it sees the prompt and the tokens before
    that one. The critic is a head on the policy's trunk, or a separate model."""
    if hasattr(decoder, "critic"):
        hidden, head = decoder.critic.hidden(batch), decoder.critic.score
    else:
        hidden, head = hidden(), decoder.values
    with torch.autocast(hidden.device.type, enabled=False):
        return {"values": head(hidden.index_select(0, batch["predict_from"]).to(head.weight.dtype))[:, 0]}


class Head(NamedTuple):
    """A function that computes streams from hidden states, and the module whose weights it needs."""
    make: Callable  # (decoder, hidden, batch, names wanted) -> {name: stream}; hidden() computes the decoder's on demand
    module: str
    labels: int = 0  # rows of a `score` module


HEADS = {**dict.fromkeys(("log_probs", "entropy", "collision"), Head(token_head, "lm_head")),
         "logits": Head(logits_head, "lm_head"), "reward": Head(reward_head, "score", 1),
         "step_logits": Head(step_head, "score", 2), "values": Head(value_head, "values", 1)}  # stream -> the head that makes it
LANGUAGE = {"lm_head": 0}  # the modules of a language model


def modules(outputs: list[str], reward_tokens: bool = False) -> dict[str, int]:
    """The head modules that these streams need -> their number of labels. reward_tokens: lm_head judges the steps."""
    needed = [HEADS["log_probs"] if reward_tokens and HEADS[name].labels > 1 else HEADS[name] for name in outputs]
    labels = {head.labels for head in needed if head.module == "score"}
    if len(labels) > 1:
        raise ValueError(f"{' and '.join(outputs)} need score heads with {' and '.join(map(str, labels))} labels; a model has "
                         f"only one such head")
    return {head.module: head.labels for head in needed}


class Decoder(nn.Module):
    """A trunk and the requested heads. `config` is its config.json, kept complete for saving."""

    def __init__(self, config: dict, where: str = "config", heads: dict[str, int] = LANGUAGE):
        super().__init__()
        self.config, self.shape, self.compiled, self.reward_tokens = config, read_shape(config, where), False, ()
        self.temperature, self.keep = 1.0, None  # of the log-probs' softmax, and its bytes kept for backward
        self.model = Trunk(self.shape)
        if "lm_head" in heads:
            self.lm_head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
            if self.shape.tied:
                self.lm_head.weight = self.model.embed_tokens.weight
        if "score" in heads:  # a reward bias cancels in differences: its gradient is noise, which Adam would turn into steps
            self.score = nn.Linear(self.shape.hidden_size, heads["score"], bias=heads["score"] > 1)
        if "values" in heads:
            self.values = nn.Linear(self.shape.hidden_size, 1)

    def forward(self, batch: dict, outputs: list[str]) -> dict[str, Tensor]:
        """One packed micro-batch -> the named streams: (N,) each, but reward (R,), step_logits (N, 2) and logits a `Projected`."""
        hidden, made = functools.cache(lambda: self.hidden(batch)), {}
        for make in dict.fromkeys(HEADS[name].make for name in outputs):
            made |= make(self, hidden, batch, outputs)
        return {name: made[name] for name in outputs}

    def hidden(self, batch: dict) -> Tensor:
        """Its hidden states (T, D)."""
        def attend(layer, q, k, v):
            return packed_attention(q, k, v, batch, self.shape.windows[layer])
        return self.model(batch["tokens"], batch["positions"], attend)

    def compile_blocks(self):
        """Compile in place: parameter names stay clean, and all layers and stream lengths share one graph per half of a block.
        (Which graph a stream gets must not depend on earlier streams: a resumed run has seen others.)"""
        self.compiled = True
        torch._dynamo.config.optimize_ddp = False  # it would split graphs that are halves of a block
        for block in self.model.layers:
            block.before = torch.compile(block.before, fullgraph=True, dynamic=True)
            block.after = torch.compile(block.after, fullgraph=True, dynamic=True)

    def logits(self, tokens: Tensor) -> Tensor:
        """(L,) -> (L, V): one sequence, every position. For tests and as a readable reference; training never builds this."""
        def attend(layer, q, k, v):
            distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
            window = self.shape.windows[layer]
            mask = (distance >= 0) & (distance < window if window else True)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        return self.lm_head(self.model(tokens, torch.arange(len(tokens), device=tokens.device), attend))

    def resize(self, tokens: int):
        """Give the embedding and, if there is one, the head a row for each of so many tokens: new ones are the mean of
        the old ones."""
        def grown(weight: Tensor) -> nn.Parameter:
            new = weight.mean(0, keepdim=True).expand(tokens - len(weight), -1)
            return nn.Parameter(torch.cat([weight, new]).detach())
        self.config["vocab_size"] = tokens
        self.shape = self.model.shape = replace(self.shape, vocab_size=tokens)
        embedding = self.model.embed_tokens
        embedding.weight, embedding.num_embeddings = grown(embedding.weight), tokens
        if hasattr(self, "lm_head"):
            self.lm_head.weight = embedding.weight if self.shape.tied else grown(self.lm_head.weight)
            self.lm_head.out_features = tokens

    def init_head(self, name: str, seed: int):
        """A new score or values head: normal with std 1 / (D + 1), the same on every device."""
        head, std = getattr(self, name), 1 / (self.shape.hidden_size + 1)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * std)
            if head.bias is not None:
                head.bias.zero_()


# ---------------------------------------------------------------------------------------------------------------------
# Folders in Hugging Face layout

GPT2_NAMES = (("transformer.wte.", "model.embed_tokens."), ("transformer.wpe.", "model.embed_positions."),
              ("transformer.h.", "model.layers."), ("transformer.ln_f.", "model.norm."), (".ln_1.", ".input_layernorm."),
              (".ln_2.", ".post_attention_layernorm."), (".attn.c_proj.", ".self_attn.o_proj."),
              (".mlp.c_fc.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj."))
CONV1D = (".o_proj.weight", ".up_proj.weight", ".down_proj.weight")  # GPT-2 keeps these transposed


def from_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's names and layouts -> ours: renamed, transposed, the fused qkv split."""
    ours = {}
    for name, tensor in state.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old checkpoints carry
            continue
        name = name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"
        for theirs, mine in GPT2_NAMES:
            name = name.replace(theirs, mine)
        if ".attn.c_attn." in name:
            for part, piece in zip("qkv", tensor.chunk(3, dim=-1)):
                ours[name.replace(".attn.c_attn.", f".self_attn.{part}_proj.")] = piece.t() if piece.dim() == 2 else piece
        else:
            ours[name] = tensor.t() if name.endswith(CONV1D) else tensor
    return ours


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of from_gpt2."""
    theirs = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
            name, tensor = name.replace(".self_attn.q_proj.", ".attn.c_attn."), torch.cat(parts).t()
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name.endswith(CONV1D):
            tensor = tensor.t()
        for their, mine in GPT2_NAMES:
            name = name.replace(mine, their)
        theirs[name] = tensor
    return theirs


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def find_folder(name: str) -> Path:
    """A local model folder, the one in a run's out_dir, or a hub name (owner/name) when online. Remote code is never run."""
    for folder in (Path(name), Path(name, "model")):
        if (folder / "config.json").is_file():
            return folder
    if not name:
        raise ValueError("no model is named; set init_from to a folder, a hub name (owner/name), a config file or 'scratch'")
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~", "out/")):
        parts = sorted((path.name for path in Path(name).glob("checkpoint-*")), key=lambda part: (len(part), part))
        but = f" (did you mean its {parts[-1]}?)" if parts else ""
        found = f"no config.json there{but}" if Path(name).exists() else "no such folder"
        raise ValueError(f"{name}: {found}; expected a model folder in Hugging Face layout or a hub name (owner/name); "
                         f"keys of a run may also name a config file (.py), and init_from 'scratch'")
    try:
        return downloaded(name)
    except Exception as error:
        raise ValueError(f"{name}: not a local folder, and cannot be downloaded from the hub: {str(error):.200}") from error


@functools.cache
def downloaded(name: str) -> Path:
    """A hub model's folder; the hub is asked only once in a process."""
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def read_weights(folder: Path, names_only: bool = False) -> dict[str, Tensor | None]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json names; names_only: None for each."""
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) and Path(f).name == f for f in shards.values()):
        raise ValueError(f"{index}: expected weight_map, from tensor names to files in the same folder")
    state = {}
    for file in sorted(set(shards.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {file} is missing (weights are read from safetensors only, never from pickles)")
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                state.update({name: None if names_only else tensors.get_tensor(name) for name in tensors.keys()})
        except Exception as error:
            raise ValueError(f"{folder / file}: {error}") from None
    return state


REWARD = ("reward_mean", "reward_std")  # over the eval rows; saved in a reward model's config.json
NEW = {"score", "values"}  # heads that a folder may lack: they are newly initialized
SCORES = re.compile(r"^(v_head\.summary|value_head(\.summary)?|classifier)\.")  # other names of a score head


def has_score(folder: Path) -> bool:
    """Is there a score head among its tensors, under whichever name?"""
    return any(SCORES.sub("score.", name).startswith("score.") for name in read_weights(folder, names_only=True))


def read_state(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """A folder's tensors under our names."""
    state = {SCORES.sub("score.", name): tensor for name, tensor in read_weights(folder).items()}
    return from_gpt2(state) if shape.gpt2 else state


def load(folder: Path, heads: dict[str, int] = LANGUAGE, seed: int = 0) -> tuple[Decoder, torch.dtype]:
    """A model in fp32 (master weights; fp64 stays) with these heads, and the dtype of its folder. Every tensor is accounted
    for: heads that are not asked for are left out, and a missing score or values head is newly initialized (by seed)."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for said in (*REWARD, "step_token", "reward_tokens"):  # they describe this folder's training, not the next model's
        config.pop(said, None)
    with torch.device("meta"):
        decoder = Decoder(config, str(folder / "config.json"), heads)
    state = read_state(folder, decoder.shape)
    labels = len(state.get("score.weight", ()))
    if heads.get("score") == labels == 1 and "score.bias" in state:  # from another project's folder: kept, but not trained
        decoder.score.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    unread = {"lm_head", *NEW} - heads.keys()
    state = {name: t for name, t in state.items() if name.split(".")[0] not in unread and not name.endswith("rotary_emb.inv_freq")}
    new = {name for name in NEW & heads.keys() if f"{name}.weight" not in state}
    dtypes = [t.dtype for t in state.values()]
    saved = max(dtypes, key=dtypes.count, default=torch.float32)
    if decoder.shape.tied and "lm_head" in heads:
        state.setdefault("model.embed_tokens.weight", state.get("lm_head.weight"))
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    expected = decoder.state_dict()
    state.update({name: torch.zeros(expected[name].shape) for name in expected if name.split(".")[0] in new})
    missing = expected.keys() - state.keys()
    judge = "; it has a score head: is it a reward model?" * bool(labels and "lm_head.weight" in missing)
    for problem, names in (("are missing", missing), ("are not known", state.keys() - expected.keys())):
        if names:
            raise ValueError(f"{folder}: {len(names)} tensors of a {config['model_type']} model {problem}: "
                             f"{', '.join(sorted(names)[:4])}{' ...' if len(names) > 4 else ''}{judge}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{folder}: {name} is {list(tensor.shape)}, config.json says {list(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: {name} is {tensor.dtype}, and weights are floating point")
    wide = torch.float64 if saved == torch.float64 else torch.float32
    decoder.load_state_dict({name: t.to(wide).contiguous() for name, t in state.items()}, assign=True)
    if decoder.shape.tied and "lm_head" in heads:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    for name in new:
        decoder.init_head(name, seed)
    return decoder, saved


def scratch(config: dict, seed: int, heads: dict[str, int] = LANGUAGE) -> Decoder:
    """A new model: normal(0, initializer_range or 0.02), residual outputs scaled by 1/sqrt(2 layers) as in GPT-2; the same
    on every device."""
    decoder = Decoder(config, "scratch", heads)
    generator, std = torch.Generator().manual_seed(seed), config.get("initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * decoder.shape.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                parameter.normal_(0, std * scale, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    for name in NEW & heads.keys():
        decoder.init_head(name, seed)
    return decoder


def load_model(cfg, machine, name: str, tokenizer, outputs: list[str]) -> tuple[Decoder, torch.dtype]:
    """The model that a run starts from, or another that it uses, with the heads for these outputs: one code path for all, so that
    policy and reference agree. cfg, machine, tokenizer: from config.py, machine.py and data.py."""
    heads = modules(outputs, bool(cfg.reward_tokens))
    if name == "scratch":
        if not cfg.scratch:
            raise ValueError("init_from = 'scratch' needs scratch = {model_type, hidden_size, ...}, as in config.json")
        tokens = {"vocab_size": tokenizer.fast.get_vocab_size(), "eos_token_id": tokenizer.eos, "bos_token_id": tokenizer.bos}
        given = Noting({**tokens, **cfg.scratch})
        read_shape(given, "scratch")
        unread = sorted(given.keys() - given.read - tokens.keys() - {"initializer_range"})
        if unread and machine.rank == 0:
            print(f"scratch: {', '.join(unread)}: not used by a {given['model_type']} model", file=sys.stderr)
        decoder, saved = scratch(dict(given), cfg.seed, heads), torch.float32
    else:
        decoder, saved = load(find_folder(name), heads, cfg.seed)
    if "step_logits" in outputs:
        decoder.config |= {"step_token": cfg.step_token, "reward_tokens": list(cfg.reward_tokens)}
        decoder.reward_tokens = tuple(map(tokenizer.one, cfg.reward_tokens))
    vocabulary = tokenizer.fast.get_vocab_size()
    if decoder.shape.vocab_size < vocabulary and cfg.resize_embeddings:
        decoder.resize(vocabulary)
    if decoder.shape.vocab_size < vocabulary:
        raise ValueError(f"{name}: {decoder.shape.vocab_size} embeddings are too few: the tokenizer of {tokenizer.folder} has "
                         f"{vocabulary} tokens; --resize_embeddings adds rows for the others, or name the model's own "
                         f"tokenizer")
    if machine.layout(0).varlen and (decoder.shape.head_dim % 8 or decoder.shape.head_dim > 256):
        raise ValueError(f"{name}: head_dim is {decoder.shape.head_dim}; 16-bit attention on CUDA needs a multiple of 8 up to "
                         f"256: use --dtype=float32")
    decoder = decoder.to(machine.device, torch.float64 if machine.dtype == torch.float64 else torch.float32)
    if machine.compiled:
        decoder.compile_blocks()
    return decoder, saved


def without_masters(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Cast the linear layers of a frozen model's blocks, in place, to a 16-bit compute dtype: what autocast would do in every
    pass, in half the memory. With a wider compute dtype, the model stays as it is."""
    for module in decoder.model.layers.modules() if dtype in (torch.bfloat16, torch.float16) else ():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return decoder


def too_long(shape: Shape, dataset, answer: int = 0) -> str:
    """Which example is the first that is longer than the model has positions, in words; "" if none is. answer: tokens
    of a response that is yet to come."""
    long_trees = (dataset.lengths + answer > shape.max_positions).nonzero()[0]  # others fit, whatever their parts are
    for i in long_trees.tolist():
        e = dataset.examples[i]
        length = len(e.prompt) + max(map(len, e.responses), default=answer)
        if length > shape.max_positions:
            return (f"{e.where}: {length} tokens, and the model has {shape.max_positions} positions; "
                    f"set max_length to at most that")
    return ""


def check_lengths(decoder: Decoder, dataset, answer: int = 0):
    """Raise an error for examples longer than learned positions reach. answer: tokens of a response that is yet to come."""
    long = too_long(decoder.shape, dataset, answer) if decoder.shape.gpt2 else ""
    if long:
        raise ValueError(long)


CRITIC = ("values", "critic")  # how the critic's parameter names begin: a head on the trunk, or a separate model


def of_critic(name: str) -> bool:
    """Whether the parameter of that name is the critic's."""
    return name.split(".")[0] in CRITIC


def architecture(decoder: Decoder) -> dict:
    """The config.json entries that describe the heads to transformers; stale ones are removed from decoder.config."""
    for stale in ("id2label", "label2id", "num_labels"):
        decoder.config.pop(stale, None)
    name, labels = NAMES[decoder.config["model_type"]], decoder.score.out_features if hasattr(decoder, "score") else 0
    if not labels:
        return {"architectures": [name + ("LMHeadModel" if decoder.shape.gpt2 else "ForCausalLM")]}
    names = [f"LABEL_{i}" for i in range(labels)]
    return {"architectures": [name + ("ForSequenceClassification" if labels == 1 else "ForTokenClassification")],
            "id2label": {str(i): label for i, label in enumerate(names)}, "label2id": {label: i for i, label in enumerate(names)}}


def save(decoder: Decoder, folder: Path, dtype: torch.dtype, tokenizer_from: Path, chat_template: str = "", pad: tuple = (),
         ends: set = frozenset()):
    """Write a folder that transformers and vLLM load as it is: tied weights once, with the tokenizer's files. pad: the (id, token)
    of a reward model's padding, which transformers looks for to find the last token. ends: ids of tokens that end an answer,
    written even if the source folders do not list them."""
    def with_ends(described: dict) -> dict:
        said = described.get("eos_token_id")
        said = {*said} if isinstance(said, list) else {said} - {None}
        return described if ends <= said else {**described, "eos_token_id": sorted(said | ends)}

    folder, tokenizer_from = Path(folder), Path(tokenizer_from)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", dtype) for name, p in decoder.named_parameters()  # shared parameters once
             if not of_critic(name)}
    if decoder.shape.gpt2:
        state = to_gpt2(state)
        if hasattr(decoder, "score") and decoder.score.out_features > 1:  # transformers' name for it in GPT-2
            state = {name.replace("score.", "classifier."): tensor for name, tensor in state.items()}
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**decoder.config, **architecture(decoder), "tie_word_embeddings": decoder.shape.tied,
              "torch_dtype": str(dtype).removeprefix("torch."), **({"pad_token_id": pad[0]} if pad else {})}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(with_ends(config), indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                 "chat_template.jinja"):
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    for path in [folder / "tokenizer_config.json", folder / "special_tokens_map.json"] if pad and pad[1] else []:
        if path.is_file():
            path.write_text(json.dumps({**read_json(path), "pad_token": pad[1]}, indent=2) + "\n", encoding="utf-8")
    generation = folder / "generation_config.json"
    if ends and generation.is_file():
        generation.write_text(json.dumps(with_ends(read_json(generation)), indent=2) + "\n", encoding="utf-8")
    if chat_template:  # the run's own, instead of the tokenizer's
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
