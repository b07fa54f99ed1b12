"""Every loss as a pure function of tensors, the table of objectives, and the fused linear -> log-prob.

Imports torch and nothing of ours, so that a loss can be pasted anywhere: `from losses import dpo`.

Shapes: T stream tokens, N scored tokens, R responses, L longest response, P pairs, D width, V vocabulary.

A loss returns (values, mask, metrics): values per element in fp32 or wider, the boolean mask of the elements that count
(None: all of them) and metrics name -> (values, mask). It never averages: `total` divides the sum by a count taken over
all micro-batches and ranks of the optimizer step. Its positional parameters name what it reads (`READINGS`); its
keyword-only parameters are hyperparameters, and become keys of the config.
"""
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# The table of objectives


class Objective(NamedTuple):
    name: str
    loss: Callable
    data: str | None  # kind of rows it is trained on (a key of data.FORMATS); None: any
    per: Callable  # hyperparameters -> what its sum is divided by (a key of the step's counts)
    show: str | None  # metric that the progress bar shows beside the loss
    reads: tuple  # names of READINGS, in the order of the loss's positional parameters
    hyperparameters: dict  # name -> default


class Term(NamedTuple):
    """One loss of a run with its weight and its hyperparameters bound."""
    weight: float
    objective: Objective
    loss: Callable  # the objective's loss, compiled or not
    hyperparameters: dict
    per: str  # key of the step's counts that its sum is divided by


OBJECTIVES: dict[str, Objective] = {}


def objective(data: str | None, per: str | Callable, show: str | None = None):
    """Register a loss under its own name. `per` is a key of the step's counts, or a function of hyperparameters."""
    def register(loss):
        parameters = inspect.signature(loss).parameters.values()
        reads = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        unknown = [name for name in reads if name not in READINGS]
        if unknown:
            raise TypeError(f"{loss.__name__}: no reading is called {unknown[0]!r}; READINGS has {', '.join(READINGS)}")
        hyperparameters = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        divisor = per if callable(per) else lambda: per
        OBJECTIVES[loss.__name__] = Objective(loss.__name__, loss, data, divisor, show, reads, hyperparameters)
        return loss
    return register


# ---------------------------------------------------------------------------------------------------------------------
# Readings: name -> (the (N,) stream it is made from, how). A stream is an output of the model or a column of the batch.


def by_response(stream: Tensor, batch: dict) -> Tensor:
    """(N,) -> (R, L): the scored tokens of each response in a row of their own, zeros behind them."""
    table = stream.new_zeros(batch["num_responses"] + 1, batch["longest"])  # padding lands in the row past the last
    return table.index_put((batch["response"], batch["place"]), stream)[:-1]


def action_mask(stream: None, batch: dict) -> Tensor:
    return torch.arange(batch["longest"], device=batch["lengths"].device) < batch["lengths"][:, None]  # (R, L)


def summed(which: str) -> Callable:
    return lambda stream, batch: by_response(stream, batch).sum(-1)[batch[which]]  # (P,)


READINGS = {
    "log_probs": ("log_probs", by_response),
    "action_mask": (None, action_mask),
    "demonstration_mask": (None, lambda _, batch: action_mask(_, batch) & batch["demonstrated"][:, None]),
    "policy_chosen_logps": ("log_probs", summed("chosen")),
    "policy_rejected_logps": ("log_probs", summed("rejected")),
    "reference_chosen_logps": ("reference_log_probs", summed("chosen")),
    "reference_rejected_logps": ("reference_log_probs", summed("rejected")),
    "chosen_lengths": (None, lambda _, batch: batch["lengths"][batch["chosen"]]),
    "rejected_lengths": (None, lambda _, batch: batch["lengths"][batch["rejected"]]),
}


def streams(terms: list[Term]) -> list[str]:
    """Names of the (N,) streams that these losses need, from the model or from a source of columns."""
    return sorted({READINGS[name][0] for term in terms for name in term.objective.reads} - {None})


def reduced(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the values that count, and how many they are."""
    if mask is None:
        return values.sum(), torch.full((), values.numel(), dtype=values.dtype, device=values.device)
    return torch.where(mask, values, 0).sum(), mask.sum().to(values.dtype)


def total(terms: list[Term], outputs: dict, batch: dict, counts: dict) -> tuple[Tensor, dict]:
    """One micro-batch's share of the step's loss, and metrics as name -> (sum, count).

    counts: name -> number over the whole optimizer step, all micro-batches and ranks. The shares add up to the loss.
    """
    available = {**batch, **outputs}
    read = {name: how(stream and available[stream], batch)
            for name, (stream, how) in READINGS.items() if any(name in term.objective.reads for term in terms)}
    loss, metrics = 0, {}
    for term in terms:
        values, mask, more = term.loss(*(read[name] for name in term.objective.reads), **term.hyperparameters)
        share, count = reduced(values, mask)
        loss = loss + term.weight / max(counts[term.per], 1) * share
        if len(terms) > 1:
            metrics[f"loss/{term.objective.name}"] = (share, count)
        metrics.update({name: reduced(*pair) for name, pair in more.items()})
    return loss, {name: (s.detach(), n.detach()) for name, (s, n) in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Language modelling


@objective(data=None, per=lambda per_sequence: "demonstrations" if per_sequence else "demonstrated_tokens")
def sft(log_probs, demonstration_mask, *, per_sequence=False):
    """Cross-entropy of the responses to imitate, their first token and EOS included, the prompt not.

    log_probs, demonstration_mask: (R, L). per_sequence: mean of per-sequence means instead of one mean over tokens.
    Of preference pairs it imitates the chosen response, so {"dpo": 1.0, "sft": 0.2} adds an NLL term to DPO.
    """
    nll = torch.where(demonstration_mask, -log_probs, 0)
    metrics = {"nll": (nll, demonstration_mask)}
    if not per_sequence:
        return nll, demonstration_mask, metrics
    return nll.sum(-1) / demonstration_mask.sum(-1).clamp(min=1), demonstration_mask.any(-1), metrics


# ---------------------------------------------------------------------------------------------------------------------
# Preference pairs. (P,) summed log-probs of the chosen and rejected responses under the policy and the reference.


def preference_metrics(chosen_logps, rejected_logps, chosen_rewards, rejected_rewards) -> dict:
    """The metrics that every preference loss reports; rewards are beta times the log-ratio to the reference."""
    margins = chosen_rewards - rejected_rewards
    return {"rewards/chosen": (chosen_rewards, None), "rewards/rejected": (rejected_rewards, None),
            "rewards/margins": (margins, None), "rewards/accuracies": (0.5 + 0.5 * margins.sign(), None),  # ties: half
            "logps/chosen": (chosen_logps, None), "logps/rejected": (rejected_logps, None)}


@objective(data="preference", per="pairs", show="rewards/accuracies")
def dpo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
        beta=0.1, label_smoothing=0.0):
    """Direct preference optimization, arXiv:2305.18290 eq. 7. label_smoothing > 0 is conservative DPO: the share of
    labels taken to be flipped. All inputs (P,), in nats. At policy = reference the loss is log 2."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    margin = beta * (chosen - rejected)
    values = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return values, None, preference_metrics(policy_chosen_logps, policy_rejected_logps, beta * chosen, beta * rejected)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def ipo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
        chosen_lengths=None, rejected_lengths=None, *, beta=0.1, length_normalized=False):
    """Identity preference optimization, arXiv:2310.12036 eq. 17: regress the log-ratio difference on 1/(2 beta).

    All inputs (P,). Log-ratios are summed over tokens; length_normalized divides each by its response's length (what
    the authors do in later work, and TRL). At policy = reference the loss is 1/(4 beta^2).
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    metrics = preference_metrics(policy_chosen_logps, policy_rejected_logps, beta * chosen, beta * rejected)
    if length_normalized:
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2, None, metrics


# ---------------------------------------------------------------------------------------------------------------------
# The fused linear -> log-prob. [N, V] logits never exist: a chunk of rows at a time, made again in backward.


def head_chunk(vocab_size: int, device: str = "cpu") -> int:
    """Rows of logits alive at once: a power of two, so that a chunk is about 128 MB in fp32 (512 MB on an accelerator)
    whatever the vocabulary, and the padding of N to whole chunks stays small."""
    budget = 2**25 if device == "cpu" else 2**27  # elements
    return max(64, min(1024, 1 << (budget // vocab_size).bit_length() - 1))


def _chunk_logps(hidden, weight, target, entropy):
    """(C, D), (V, D), (C,) -> log-probs of the targets (C,) and entropies (C,) or None."""
    logps = _logits(hidden, weight).log_softmax(-1)
    picked = logps.gather(1, target[:, None])[:, 0]
    return picked, -(logps.exp() * logps).sum(-1) if entropy else None


def _chunk_grad(hidden, weight, target, grad_logps, grad_entropy):
    """d loss / d logits (C, V): g (onehot - p) for the log-probs, -h p (log p + H) for the entropies."""
    if grad_entropy is None:
        grad = _logits(hidden, weight).softmax(-1).mul_(-grad_logps[:, None])
    else:
        logps = _logits(hidden, weight).log_softmax(-1)
        p = logps.exp()
        grad = -p * (grad_logps[:, None] + grad_entropy[:, None] * (logps - (p * logps).sum(-1, keepdim=True)))
    return grad.scatter_add_(1, target[:, None], grad_logps[:, None])


def _logits(hidden, weight):
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # rounding logits to bf16 costs 0.03 nat a token
    return hidden @ weight.t()


_compiled = {}


def _body(function, compiled):
    if not compiled:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, fullgraph=True, dynamic=False)
    return _compiled[function]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, entropy, chunk, compiled):
        ctx.save_for_backward(hidden, weight, target)
        ctx.entropy, ctx.chunk, ctx.compiled = entropy, chunk, compiled
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = _LinearLogProbs.operands(hidden, weight)
            body = _body(_chunk_logps, compiled)
            parts = [body(rows, w, ids, entropy) for rows, ids in zip(h.split(chunk), target.split(chunk))]
        logps = torch.cat([part[0] for part in parts])
        return logps, torch.cat([part[1] for part in parts]) if entropy else None

    @staticmethod
    def operands(hidden, weight):
        """Both in the dtype of the matrix product: the trunk's on CUDA, where it accumulates into fp32 logits; fp32 or
        wider elsewhere, where a bf16 product would be rounded to bf16."""
        low = hidden.dtype in (torch.bfloat16, torch.float16)
        dtype = hidden.dtype if low and hidden.is_cuda else torch.promote_types(
            torch.float32, torch.promote_types(hidden.dtype, weight.dtype))
        return hidden.to(dtype), weight.to(dtype)

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, target = ctx.saved_tensors
        h, w = _LinearLogProbs.operands(hidden, weight)
        body = _body(_chunk_grad, ctx.compiled)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(h) if need_hidden else None
        grad_weight = torch.zeros_like(w, dtype=grad_logps.dtype) if need_weight else None
        for start in range(0, len(h), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad = body(h[rows], w, target[rows], grad_logps[rows], grad_entropy[rows] if ctx.entropy else None).to(h.dtype)
            if need_hidden:
                torch.mm(grad, w, out=grad_hidden[rows])
            if need_weight and grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.t(), h[rows])
            elif need_weight:
                grad_weight += torch.mm(grad.t(), h[rows], out_dtype=grad_weight.dtype)
            del grad  # before the next chunk is made
        return (grad_hidden.to(hidden.dtype) if need_hidden else None,
                grad_weight.to(weight.dtype) if need_weight else None, None, None, None, None)


def linear_log_probs(hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                     chunk: int = 0, compiled: bool = False) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] without ever holding [N, V].

    hidden (N, D), weight (V, D), target (N,) int64 -> log-probs (N,) and, when asked, entropies (N,), in nats, fp32 or
    wider. Backward makes each chunk's logits again: 8NVD FLOPs instead of 6NVD, and memory for one chunk only.
    chunk: rows at a time (0: by `head_chunk`). compiled: chunk bodies through torch.compile; N is then best a multiple
    of chunk.
    """
    if temperature != 1:
        hidden = hidden / temperature
    chunk = chunk or head_chunk(len(weight), hidden.device.type)
    return _LinearLogProbs.apply(hidden, weight, target, entropy, chunk, compiled)
