"""Every loss as a pure function of tensors, the table of objectives, and the fused linear -> log-prob.

Imports torch and nothing of ours, so that a loss can be pasted anywhere: `from losses import dpo, kto`.

Shapes: T stream tokens, N scored tokens, R responses, L longest response, P pairs, S steps, D width, V vocabulary.

A loss returns (values, mask, metrics): values per element in fp32 or wider, the boolean mask of the elements that count
(None: all of them) and metrics name -> (values, mask). It never averages: `total` divides the sum by a count taken over
all micro-batches and ranks of the optimizer step. Its positional parameters name what it reads (`READINGS`); its
keyword-only parameters are hyperparameters, and become keys of the config.
"""
import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    limits: dict  # hyperparameter -> a key of LIMITS that overrides `LIMITED` for this loss
    coupled: bool  # its value is not a sum over rows, so it is given the readings of the whole step


class Reading(NamedTuple):
    """How an input of a loss is computed from a micro-batch."""
    streams: tuple  # outputs of the model, or columns that a source adds to the batch
    how: Callable  # (batch, *streams) -> tensor


class Term(NamedTuple):
    """One loss of a run, bound to its weight, hyperparameters and readings."""
    weight: float
    objective: Objective
    loss: Callable  # the objective's loss, compiled or not
    hyperparameters: dict
    per: str  # key of the step's counts that its sum is divided by
    reads: dict  # name -> Reading
    importance: Reading | None = None  # (P,) weights of its values


OBJECTIVES: dict[str, Objective] = {}
COUNTS = ("pairs", "examples", "responses", "tokens", "demonstrations", "demonstrated_tokens", "steps")  # of a step (data.count)
LIMITS = {  # what error messages say is expected -> the test for it
    "at least 0": lambda x: x >= 0, "above 0": lambda x: x > 0, "between 0 and 1": lambda x: 0 <= x <= 1,
    "a number in (0, 1)": lambda x: 0 < x < 1, "a number in (0, 1]": lambda x: 0 < x <= 1,
    "a share of flipped labels in [0, 0.5)": lambda x: 0 <= x < 0.5,
    "a number above 1, or 0 for none": lambda x: x > 1 or x == 0,
    "'token', 'sequence' or 'dr_grpo'": lambda x: x in REDUCTIONS,
    "'tis', 'icepop', 'seq-mask-tis' or '' for none": lambda x: x in CORRECTIONS or x == "",
    "'k2' or 'k3' (the gradient of 'k1' is 0 in expectation: kl_coef puts it into the reward)": lambda x: x in ("k2", "k3")}
LIMITED = {
    **dict.fromkeys(("beta", "temperature", "tau_positive", "tau_negative", "max_new_tokens"), "above 0"),
    **dict.fromkeys(("alpha", "desirable_weight", "undesirable_weight", "center_coef", "clip_eps_low", "clip_eps_high",
                     "correction_low", "correction_high", "value_clip"), "at least 0"),
    "jsd_beta": "between 0 and 1", "label_smoothing": "between 0 and 1", "tau": "a number in (0, 1]",
    "dual_clip": "a number above 1, or 0 for none", "reduction": "'token', 'sequence' or 'dr_grpo'",
    "correction": "'tis', 'icepop', 'seq-mask-tis' or '' for none",
    "estimator": "'k2' or 'k3' (the gradient of 'k1' is 0 in expectation: kl_coef puts it into the reward)"}


def check(o: Objective, hyperparameters: dict):
    """An error for a value that has no meaning in this loss."""
    for key, value in hyperparameters.items():
        expected = o.limits.get(key, LIMITED.get(key))
        if expected and not LIMITS[expected](value):
            raise ValueError(f"{o.name}: {key} = {value!r}; expected {expected}")


def objective(data: str | None, per: str | Callable, show: str | None = None, coupled: bool = False, **limits: str):
    """Register a loss under its own name. `per` is a key of the step's counts, or a function from hyperparameters to one. The
    loss also checks its hyperparameters when it is called directly on tensors."""
    def register(loss):
        parameters = inspect.signature(loss).parameters.values()
        reads = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        unknown = [name for name in reads if name not in READINGS]
        if unknown:
            raise TypeError(f"{loss.__name__}: no reading is called {unknown[0]!r}; READINGS has {', '.join(READINGS)}")
        if coupled and "logits" in reads:
            raise TypeError(f"{loss.__name__}: a coupled loss cannot read logits: they exist only in chunks, not for a whole step")
        hyperparameters = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for key in [key for key, value in hyperparameters.items() if type(value) not in (bool, int, float, str)]:
            raise TypeError(f"{loss.__name__}: {key} needs a default (a number, a string or a bool), which gives its type")
        divisor = per if callable(per) else lambda: per
        o = Objective(loss.__name__, loss, data, divisor, show, reads, hyperparameters, limits, coupled)
        OBJECTIVES[loss.__name__] = o

        @functools.wraps(loss)
        def checked(*inputs, **hyperparameters):
            check(o, hyperparameters)
            return loss(*inputs, **hyperparameters)
        return checked
    return register


def bind(name: str, weight: float, hyperparameters: dict, compile: bool = False) -> Term:
    o = OBJECTIVES[name]
    check(o, hyperparameters)
    per = o.per(**{key: hyperparameters[key] for key in inspect.signature(o.per).parameters})
    if per not in COUNTS:
        raise ValueError(f"{name}: per = {per!r}; expected one of {', '.join(COUNTS)}")
    loss = compiled(o.loss) if compile else o.loss
    if "logits" in o.reads:
        loss = functools.partial(by_chunk, loss)
    return Term(weight, o, loss, hyperparameters, per, {n: READINGS[n] for n in o.reads})


@functools.cache
def compiled(function: Callable, dynamic: bool = True, backend: str = "inductor") -> Callable:
    """The function compiled as one graph with dynamic sizes: sizes of 0 and 1, sizes that are equal, and calls without
    gradient are still recompiled, for a loss of several tensors more often than torch allows by default.
    Float hyperparameters are constants of a graph: as its inputs, they may come out of torch's disk cache with the value of
    another run (pytorch/pytorch#194976)."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.specialize_float = True
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def streams(terms: list[Term]) -> set[str]:
    """Names of the streams that these losses need, from the model or from a source of columns."""
    return {stream for t in terms for reading in (*t.reads.values(), t.importance) if reading for stream in reading.streams}


def read(reading: Reading, available: dict) -> Tensor:
    return reading.how(available, *(available[stream] for stream in reading.streams))


class Step(NamedTuple):
    """What a coupled loss sees of the step's other micro-batches, on all ranks: their readings, without gradient."""
    parts: int  # number of micro-batches in the step, over all ranks
    others: dict  # reading -> (its (n,) values in the micro-batches before this one, those in the micro-batches after it)


def total(terms: list[Term], outputs: dict, batch: dict, counts: dict) -> tuple[Tensor, dict]:
    """One micro-batch's share of the step's loss, and metrics as name -> (sum, count).

    counts: name -> number over the whole optimizer step, all micro-batches and ranks. The shares add up to the loss,
    and their gradients to its gradient: a coupled loss is computed whole in every micro-batch, on readings of which only
    the micro-batch's own carry gradient.
    """
    available, loss, metrics = {**batch, **outputs}, 0, {}
    for term in terms:
        inputs, parts = {name: read(reading, available) for name, reading in term.reads.items()}, 1
        if term.objective.coupled:
            parts, others = batch["step"]
            inputs |= {name: torch.cat([before, inputs[name], after]) for name, (before, after) in others.items()}
        metrics.update({metric: reduced(read(READINGS[name], available), None)
                        for name, metric in REPORTED.items() if name in term.reads})
        values, mask, more = term.loss(*inputs.values(), **term.hyperparameters)
        if not 0 < values.dim() <= max((x.dim() for x in inputs.values() if isinstance(x, Tensor)), default=1):
            raise ValueError(f"{term.objective.name}: its values have shape {tuple(values.shape)}; expected one for each pair, "
                             f"response or token: no mean, and no (P, P)")
        if term.importance:
            values = values * read(term.importance, available)
        share, count = reduced(values, mask)
        share = share - (1 - 1 / parts) * share.detach()
        loss = loss + term.weight / max(counts[term.per], 1) * share
        if len(terms) > 1:
            metrics[f"loss/{term.objective.name}"] = (share, count / parts)
        for name, pair in more.items():  # if losses report the same metric, the first one keeps the plain name
            metrics[f"{term.objective.name}/{name}" if name in metrics else name] = tuple(x / parts for x in reduced(*pair))
    return loss, {name: (s.detach(), n.detach()) for name, (s, n) in metrics.items()}


def reduced(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the values where the mask is True (None: everywhere), and how many they are, () each."""
    if mask is None:
        return values.sum(), torch.full((), values.numel(), dtype=values.dtype, device=values.device)
    return torch.where(mask, values, 0).sum(), mask.sum().to(values.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Readings


def by_response(batch: dict, stream: Tensor) -> Tensor:
    """(N,) -> (R, L): one row per response with the values of its scored tokens, right-padded with zeros."""
    return stream.new_zeros(batch["num_responses"], batch["longest"]).index_put((batch["response"], batch["place"]), stream)


def sums(batch: dict, stream: Tensor) -> Tensor:
    """(N,) -> (R,): sum over each response, in float64: in fp32, thousands of nats and their differences would be off by 1e-4."""
    return by_response(batch, stream).sum(-1, dtype=torch.float64)


def by_rank(batch: dict, stream: Tensor) -> Tensor:
    """(R,) -> (Q, K): one row per example with the values of its responses, best first, right-padded with zeros."""
    return stream.new_zeros(batch["num_examples"], batch["most_responses"]).index_put((batch["example"], batch["standing"]), stream)


def action_mask(batch: dict) -> Tensor:
    return torch.arange(batch["longest"], device=batch["lengths"].device) < batch["lengths"][:, None]  # (R, L)


def column(name: str) -> Reading:
    return Reading((name,), lambda batch, stream: stream)


def before_update(batch: dict, log_probs: Tensor, old: Tensor | None) -> Tensor:
    """(R, L) log-probs under the policy before its updates on these answers. old=None: only one update, so these are log_probs."""
    return by_response(batch, log_probs.detach() if old is None else old)


def summed(name: str, side: str) -> Reading:
    return Reading((name,), lambda batch, stream: sums(batch, stream)[batch[side]])  # (P,)


READINGS = {
    **{name: Reading((name,), by_response) for name in ("log_probs", "rollout_log_probs", "reference_log_probs", "entropy",
                                                        "advantages", "values", "old_values", "returns")},
    "old_log_probs": Reading(("log_probs", "old_log_probs"), before_update),
    "action_mask": Reading((), action_mask),
    "demonstration_mask": Reading((), lambda batch: action_mask(batch) & batch["demonstrated"][:, None]),
    "policy_chosen_logps": summed("log_probs", "chosen"),  # for rows with a label: of the desirable responses
    "policy_rejected_logps": summed("log_probs", "rejected"),
    "reference_chosen_logps": summed("reference_log_probs", "chosen"),
    "reference_rejected_logps": summed("reference_log_probs", "rejected"),
    "chosen_lengths": Reading((), lambda batch: batch["lengths"][batch["chosen"]]),
    "rejected_lengths": Reading((), lambda batch: batch["lengths"][batch["rejected"]]),
    "policy_KL_logps": column("policy_KL_logps"),  # mismatched responses of the whole step, no gradient
    "reference_KL_logps": column("reference_KL_logps"),
    "running_reward": column("running_reward"),  # () as RUNNING says
    "chosen_reward": Reading(("reward",), lambda batch, reward: reward[batch["chosen"]]),
    "reject_reward": Reading(("reward",), lambda batch, reward: reward[batch["rejected"]]),
    "ranked_rewards": Reading(("reward",), by_rank),
    "rank_mask": Reading((), lambda batch: by_rank(batch, batch["ranked"])),
    **{name: Reading((), operator.itemgetter(name)) for name in ("margin", "step_labels", "step_mask")},
    "label": Reading((), lambda batch: torch.where(batch["demonstrated"][batch["response"]], batch["target"], -100)),  # (N,)
    **{name: column(name) for name in ("step_logits", "logits", "teacher_logits")},
}
PREDICTED = {"chosen_reward": "chosen", "reject_reward": "rejected"}  # reading -> its key in predictions.jsonl
REPORTED = {"policy_chosen_logps": "logps/chosen", "policy_rejected_logps": "logps/rejected"}  # reading -> metric that reports it
DERIVED = {"rewards/margins": ("rewards/desirable", "rewards/undesirable")}  # metric -> the two whose difference it is
RUNNING = {"running_reward": "rewards/mean"}  # reading -> metric: its mean over all earlier steps


# ---------------------------------------------------------------------------------------------------------------------
# Options that combine with preference losses: (term, value) -> the term with other readings, or the same term where the
# option would not change it


def reference_free(term: Term, value: bool) -> Term:
    """The reference's log-probs are 0."""
    zeros = lambda policy: Reading(policy.streams, lambda batch, *_: torch.zeros_like(read(policy, batch)))
    changed = {name: zeros(term.reads.get(name.replace("reference", "policy"), READINGS["log_probs"]))
               for name in term.reads if name.startswith("reference_")}
    return term._replace(reads={**term.reads, **changed}) if changed else term


def ld_alpha(term: Term, value: float) -> Term:
    """LD-DPO, arXiv:2409.06411: tokens past the length of the pair's shorter response have weight `value`, in every sum
    of log-probs that the loss reads (so in the NLL terms of orpo and cpo too)."""
    def desensitized(name):
        def how(batch, stream):
            shorter = torch.minimum(batch["lengths"][batch["chosen"]], batch["lengths"][batch["rejected"]])
            logps = by_response(batch, stream)[batch["chosen" if "chosen" in name else "rejected"]]
            place = torch.arange(logps.shape[1], device=logps.device)
            return torch.where(place < shorter[:, None], logps, value * logps).sum(-1, dtype=torch.float64)
        return Reading(READINGS[name].streams, how)
    changed = {name: desensitized(name) for name, reading in term.reads.items()
               if name.endswith("_logps") and reading is READINGS[name]}
    return term._replace(reads={**term.reads, **changed}) if changed else term


def divergence(log_ratio: Tensor, kind: str | float) -> Tensor:
    """f'(pi / pi_ref) as a function of the log-ratio x, which it replaces in DPO under another divergence, arXiv:2309.16240
    table 1. kind: "forward_kl", "js", or the alpha of an alpha-divergence, (e^((alpha - 1) x) - 1) / (alpha - 1); alpha = 1,
    the reverse KL, leaves x as it is. The paper's alpha is 1 minus this one."""
    if kind == "forward_kl":
        return -torch.expm1((-log_ratio).clamp(max=80))
    if kind == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if isinstance(kind, str):
        raise ValueError(f"f_divergence = {kind!r}; expected 'forward_kl', 'js' or a number, the alpha of an alpha-divergence")
    return log_ratio if kind == 1 else torch.expm1(((kind - 1) * log_ratio).clamp(max=80)) / (kind - 1)


def f_divergence(term: Term, value: str | float) -> Term:
    """Log-ratios are replaced by f' of the divergence (`divergence`), within ±1e18: a loss may square them."""
    divergence(torch.zeros(()), value)
    if term.objective.coupled or not {"reference_chosen_logps", "reference_rejected_logps"} <= term.reads.keys():
        return term  # aot sorts differences of log-probs that are no log-ratios
    changed = {}
    for which in ("chosen", "rejected"):
        policy, reference = term.reads[f"policy_{which}_logps"], term.reads[f"reference_{which}_logps"]
        if "reference_log_probs" not in reference.streams:
            raise ValueError(f"f_divergence = {value!r} compares the policy with its reference, which reference_free leaves out")
        changed[f"policy_{which}_logps"] = Reading(
            policy.streams + reference.streams,
            lambda batch, *_, of=(policy, reference): divergence(
                difference(read(of[0], batch), read(of[1], batch)), value).clamp(-1e18, 1e18))
    term = term._replace(reads={**term.reads, **changed})
    return reference_free(term, True)


def wpo(term: Term, value: bool) -> Term:
    """WPO, arXiv:2406.11827 eq. 2 with sampled alignment: each pair's value is multiplied by exp of the sum, over its two
    responses, of the token mean of log p - log sum_v p(v)^2. The weight has no gradient and no upper bound."""
    def weights(batch, log_probs, collision):
        gap = sums(batch, log_probs - collision).detach() / batch["lengths"].clamp(min=1)
        return (gap[batch["chosen"]] + gap[batch["rejected"]]).exp()
    if term.objective.coupled or "policy_chosen_logps" not in term.reads:
        return term  # sorted values belong to no pair
    return term._replace(importance=Reading(("log_probs", "collision"), weights))


OPTIONS = {option.__name__: option for option in (reference_free, ld_alpha, f_divergence, wpo)}

# ---------------------------------------------------------------------------------------------------------------------
# Small shared parts


def wide(x: Tensor) -> Tensor:
    """fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def same_shape(a: Tensor, b: Tensor):
    """Raise an error unless the shapes match: (P, 1) and (P,) would silently broadcast to (P, P), across pairs."""
    if a is None or b is None:
        raise ValueError("an input is None that the loss needs with these hyperparameters")
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ")


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in fp32 or wider."""
    same_shape(a, b)
    return wide(a) - wide(b)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x in fp32 or wider where the mask is True, 0 elsewhere, even where x is NaN."""
    same_shape(x, mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}; expected torch.bool, as mask.bool()")
    return torch.where(mask, wide(x), 0)


def class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """log pi / pi_ref of the chosen (n_c,) and of the rejected (n_r,) responses."""
    return difference(policy_chosen_logps, reference_chosen_logps), difference(policy_rejected_logps, reference_rejected_logps)


def log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """`class_log_ratios` of pairs, (P,) each."""
    same_shape(policy_chosen_logps, policy_rejected_logps)
    return class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums over responses -> means over their tokens."""
    same_shape(logps, lengths)
    return wide(logps) / lengths.clamp(min=1)


def average(x: Tensor) -> Tensor:
    """Mean of a (n,) that may be empty: then 0."""
    return x.sum() / max(len(x), 1)


def running(mean: Tensor | None) -> Tensor | float:
    """A running mean (), 0 before there is one."""
    if mean is not None and mean.dim():
        raise ValueError(f"a running mean is one number, and this one has shape {tuple(mean.shape)}")
    return 0.0 if mean is None else mean


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x) with label smoothing: that share of the labels is taken to be flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def preference_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict:
    """Metrics of every preference loss; rewards are beta times the quantities that the loss compares. A tie is half correct."""
    margins = chosen_rewards - rejected_rewards
    return {"rewards/chosen": (chosen_rewards, None), "rewards/rejected": (rejected_rewards, None),
            "rewards/margins": (margins, None), "rewards/accuracies": (0.5 + 0.5 * margins.sign(), None)}


# ---------------------------------------------------------------------------------------------------------------------
# Language modelling and distillation


@objective(data=None, per=lambda per_sequence: "demonstrations" if per_sequence else "demonstrated_tokens")
def sft(log_probs, demonstration_mask, *, per_sequence=False, dft=False):
    """Cross-entropy of the responses to imitate, their first token and EOS included, the prompt not.

    log_probs, demonstration_mask: (R, L). per_sequence: mean of per-sequence means instead of one mean over tokens.
    dft: each token is weighted by its own probability, arXiv:2508.05629. Of preference pairs it imitates the chosen
    response, so {"dpo": 1.0, "sft": 0.2} adds an NLL term to DPO.
    """
    nll = -masked(log_probs, demonstration_mask)
    metrics = {"nll": (nll, demonstration_mask)}
    if dft:
        nll = (-nll).exp().detach() * nll
    if not per_sequence:
        return nll, demonstration_mask, metrics
    return nll.sum(-1) / demonstration_mask.sum(-1).clamp(min=1), demonstration_mask.any(-1), metrics


def next_label(labels: Tensor) -> Tensor:
    """(B, L) token ids, -100 where not scored -> the label of each position's logits: the next token."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def labelled(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(..., V), (...,) -> logits in fp32 with zeros where the label is -100, and the mask of the others."""
    same_shape(logits[..., 0], label)
    mask = label != -100
    return torch.where(mask[..., None], wide(logits), 0), mask


@objective(data="sft", per="demonstrated_tokens")
def lm(logits, label):
    """`sft` on logits: cross-entropy with the labels, -100 where not scored (GPTLMLoss).

    logits (..., V), label (...,): the token that these logits predict; of a batch of token ids, `next_label(labels)`.
    """
    logits, mask = labelled(logits, label)
    return sft(logits.gather(-1, torch.where(mask, label, 0)[..., None])[..., 0] - logits.logsumexp(-1), mask)


@objective(data="sft", per="demonstrated_tokens", show="kl")
def kd(logits, teacher_logits, label, *, alpha=0.4, temperature=1.0, jsd_beta=0.0):
    """Knowledge distillation, arXiv:1503.02531: (1 - alpha) CE(label) + alpha T^2 D(teacher, student) at temperature T.

    logits (..., V), teacher_logits (..., V'), label (...,): the token that these logits predict, -100 where not scored;
    of a batch of token ids, `next_label(labels)`. Of vocabularies padded to other sizes the common part is compared. D is,
    by jsd_beta: 0: cross-entropy -sum_v p_T log p_S (KDLoss; KL(T||S) up to a constant); 1: KL(S||T); between: generalized
    JSD, arXiv:2306.13649. Metric kl is KL(T||S), 0 at student = teacher. A token banned by a logit of -inf on one side is
    left out of the divergence. Logits are taken whole: for long batches call it on slices and add the sums.
    """
    logits, teacher_logits = wide(logits), wide(teacher_logits)
    values, mask, metrics = lm(logits, label)
    common = min(logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = ((labelled(x[..., :common], label)[0] / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    expected = lambda p, log_q: (p * log_q.masked_fill(log_q.isneginf(), 0)).sum(-1)
    p = teacher.exp()
    distance = cross_entropy = -expected(p, student)
    if jsd_beta == 1:
        q = student.exp()
        distance = expected(q, student) - expected(q, teacher)
    elif jsd_beta:
        q, floor = student.exp(), lambda log_p: log_p.clamp(min=-1e30)  # -inf has no gradient in logaddexp
        mixture = torch.logaddexp(floor(teacher) + math.log(jsd_beta), floor(student) + math.log1p(-jsd_beta))
        distance = (jsd_beta * (expected(p, teacher) - expected(p, mixture))
                    + (1 - jsd_beta) * (expected(q, student) - expected(q, mixture)))
    values = (1 - alpha) * values + alpha * temperature**2 * torch.where(mask, distance, 0)
    return values, mask, {**metrics, "kl": (cross_entropy.detach() + expected(p, teacher), mask)}


# ---------------------------------------------------------------------------------------------------------------------
# Preference pairs. All inputs (P,): log-probs summed over a response's tokens, in nats, of policy and reference; lengths in
# tokens. c and r are the log-ratios of the chosen and the rejected response.


@objective(data="preference", per="pairs", show="rewards/accuracies")
def dpo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
        beta=0.1, label_smoothing=0.0):
    """Direct preference optimization, arXiv:2305.18290 eq. 7: -log sigmoid(beta (c - r)). label_smoothing > 0 is
    conservative DPO: the share of labels taken to be flipped. At policy = reference the loss is log 2."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return smoothed(beta * (c - r), label_smoothing), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def ipo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
        chosen_lengths=None, rejected_lengths=None, *, beta=0.1, length_normalized=False):
    """Identity preference optimization, arXiv:2310.12036 eq. 17: (c - r - 1/(2 beta))^2, a regression of the difference.

    length_normalized divides each log-ratio by its response's length (what the authors do in later work, and TRL); the
    rewards that are reported are beta times the sums either way. At policy = reference the loss is 1/(4 beta^2).
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    metrics = preference_metrics(beta * c, beta * r)
    if length_normalized:
        c, r = per_token(c, chosen_lengths), per_token(r, rejected_lengths)
    return (c - r - 1 / (2 * beta)) ** 2, None, metrics


@objective(data="preference", per="pairs", show="rewards/accuracies")
def hinge(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """SLiC-HF's calibration on log-ratios, arXiv:2305.10425: max(0, 1 - beta (c - r)). 1 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return torch.relu(1 - beta * (c - r)), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies", label_smoothing="a share of flipped labels in [0, 0.5)")
def robust(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
           beta=0.1, label_smoothing=0.1):
    """Robust DPO, arXiv:2403.00409: the unbiased estimate of the clean loss when a share label_smoothing of the labels
    is flipped, [-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)] / (1 - 2 eps). log 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    x = beta * (c - r)
    values = (label_smoothing * F.logsigmoid(-x) - (1 - label_smoothing) * F.logsigmoid(x)) / (1 - 2 * label_smoothing)
    return values, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies", label_smoothing="a number in (0, 1)")
def exo_pair(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta=0.1, label_smoothing=1e-3):
    """EXO, arXiv:2402.00856 eq. 16: the reverse KL from the pair's preference under the policy to (1 - eps, eps)."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    x = beta * (c - r)
    values = (x.sigmoid() * (F.logsigmoid(x) - math.log1p(-label_smoothing))
              + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(label_smoothing)))
    return values, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def nca_pair(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """Noise contrastive alignment, arXiv:2402.05369, for pairs: -log sigmoid(beta c) - log sigmoid(-beta c) / 2
    - log sigmoid(-beta r) / 2. 2 log 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    values = -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)
    return values, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def bco_pair(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             running_reward=None, *, beta=0.1, delta=True):
    """Binary classifier optimization of pairs, arXiv:2404.04656: -log sigmoid(beta c - d) - log sigmoid(d - beta r).

    d: running_reward, (), the mean of beta c and beta r over all earlier steps (the paper's is the mean of the two classes'
    means, the same for pairs); delta=False: 0. 2 log 2 at the start.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    d = running(running_reward) if delta else 0
    values = -F.logsigmoid(beta * c - d) - F.logsigmoid(d - beta * r)
    return values, None, {**preference_metrics(beta * c, beta * r), "rewards/mean": (beta * torch.cat([c, r]), None)}


@objective(data="preference", per="pairs", show="rewards/accuracies")
def sppo_hard(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """Self-play preference optimization with hard labels, arXiv:2405.00675 eq. 4.7: (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2.
    1/(2 beta^2) at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies", coupled=True)
def aot(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
        beta=0.1, label_smoothing=0.0):
    """Alignment via optimal transport, arXiv:2406.05882, paired: `dpo` on sort(pc - pr) - sort(rc - rr), the differences of
    policy and of reference each sorted over the step. log 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    policy = difference(policy_chosen_logps, policy_rejected_logps).sort().values
    reference = difference(reference_chosen_logps, reference_rejected_logps).sort().values
    return smoothed(beta * (policy - reference), label_smoothing), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies", coupled=True)
def aot_unpaired(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
                 beta=0.1, label_smoothing=0.0):
    """Alignment via optimal transport, arXiv:2406.05882, unpaired: `dpo` on sort(c) - sort(r), each sorted over the step.
    log 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    values = smoothed(beta * (c.sort().values - r.sort().values), label_smoothing)
    return values, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def apo_zero(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """Anchored preference optimization, arXiv:2408.06266 eq. 7: 1 - sigmoid(beta c) + sigmoid(beta r), where the chosen
    responses are better than the policy's own. 1 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return (-beta * c).sigmoid() + (beta * r).sigmoid(), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def apo_down(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """Anchored preference optimization, arXiv:2408.06266 eq. 8: sigmoid(beta c) + 1 - sigmoid(beta (c - r)), where the chosen
    responses are worse than the policy's own. 1 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return (beta * c).sigmoid() + (beta * (r - c)).sigmoid(), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def discopop(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta=0.1, tau=0.05):
    """Discovered preference optimization, arXiv:2406.08414 eq. 5: x = beta (c - r), m = sigmoid(x / tau):
    -log sigmoid(x) (1 - m) + exp(-x) m, the last as exp(-x + log m) so that it stays finite; above
    tau = 1 it has no bound. (log 2 + 1) / 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    x = beta * (c - r)
    values = -F.logsigmoid(x) * (-x / tau).sigmoid() + (F.logsigmoid(x / tau) - x).exp()
    return values, None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def sigmoid_norm(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                 chosen_lengths, rejected_lengths, *, beta=0.1):
    """Length-normalised DPO, arXiv:2411.15124: -log sigmoid(beta (c / n_c - r / n_r)). log 2 at the start."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    c, r = per_token(c, chosen_lengths), per_token(r, rejected_lengths)
    return smoothed(beta * (c - r), 0), None, preference_metrics(beta * c, beta * r)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def simpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, *, beta=2.0, gamma=1.0):
    """Simple preference optimization, arXiv:2405.14734 eq. 6: -log sigmoid(beta (pc / n_c - pr / n_r) - gamma). No reference."""
    chosen, rejected = per_token(policy_chosen_logps, chosen_lengths), per_token(policy_rejected_logps, rejected_lengths)
    return smoothed(beta * difference(chosen, rejected) - gamma, 0), None, preference_metrics(beta * chosen, beta * rejected)


@objective(data="preference", per="pairs", show="rewards/accuracies")
def orpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, *, beta=0.1):
    """Odds ratio preference optimization, arXiv:2403.07691 eq. 6: -m_c - beta log sigmoid(log odds(m_c) - log odds(m_r)), m the
    mean log-prob of a response's tokens, odds(m) = e^m / (1 - e^m). beta is the paper's lambda. No reference."""
    chosen, rejected = per_token(policy_chosen_logps, chosen_lengths), per_token(policy_rejected_logps, rejected_lengths)
    log_odds = lambda m: m - (-torch.expm1(m.clamp(max=-torch.finfo(m.dtype).eps))).log()
    values = beta * smoothed(difference(log_odds(chosen), log_odds(rejected)), 0) - chosen
    return values, None, {**preference_metrics(beta * chosen, beta * rejected), "nll": (-chosen, None)}


@objective(data="preference", per="pairs", show="rewards/accuracies")
def cpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, *, beta=0.1, alpha=1.0):
    """Contrastive preference optimization, arXiv:2401.08417: -log sigmoid(beta (pc - pr)) + alpha NLL(chosen), the latter the mean
    of the response's tokens. No reference."""
    chosen, rejected = wide(policy_chosen_logps), wide(policy_rejected_logps)
    nll = -per_token(chosen, chosen_lengths)
    values = smoothed(beta * difference(chosen, rejected), 0) + alpha * nll
    return values, None, {**preference_metrics(beta * chosen, beta * rejected), "nll": (nll, None)}


# ---------------------------------------------------------------------------------------------------------------------
# Responses with a label, not paired: "chosen" are the desirable ones (n_c,), "rejected" the undesirable ones (n_r,); one of
# them may be empty. Values are (n_c + n_r,).


def label_metrics(desirable_rewards: Tensor, undesirable_rewards: Tensor) -> dict:
    return {"rewards/desirable": (desirable_rewards, None), "rewards/undesirable": (undesirable_rewards, None)}


@objective(data="kto", per="responses", show="rewards/desirable")
def kto(policy_chosen_logps, policy_rejected_logps, policy_KL_logps,
        reference_chosen_logps, reference_rejected_logps, reference_KL_logps, *,
        beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """Kahneman-Tversky optimization, arXiv:2402.01306 eq. 8: w_i sigmoid(-s_i beta (log-ratio_i - z0)), s = 1 for desirable
    responses and -1 for the others; that is w_i (1 - sigmoid(...)) without cancelling to a zero gradient.

    z0: mean log-ratio of the KL rows, clamped at 0, no gradient. policy_KL_logps, reference_KL_logps: (m,), prompts with
    responses of other prompts, of the whole step. At policy = reference the loss is w_i / 2.
    """
    c, r = class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    z0 = average(difference(policy_KL_logps, reference_KL_logps).detach()).clamp(min=0)
    values = torch.cat([desirable_weight * (beta * (z0 - c)).sigmoid(), undesirable_weight * (beta * (r - z0)).sigmoid()])
    return values, None, {**label_metrics(beta * c, beta * r), "kl": (z0.expand(len(values)), None)}


@objective(data="kto", per="responses", show="rewards/desirable", coupled=True)
def kto_vanilla(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
                beta=0.1, detach_kl=True):
    """KTO for even sampling: each class's baseline is the other class's mean log-ratio over the step, clamped at 0.

    detach_kl=False lets gradient through the baselines, as the reference implementation does. 1/2 at the start.
    """
    c, r = class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    c_kl, r_kl = average(c.detach() if detach_kl else c).clamp(min=0), average(r.detach() if detach_kl else r).clamp(min=0)
    values = torch.cat([(beta * (r_kl - c)).sigmoid(), (beta * (r - c_kl)).sigmoid()])
    return values, None, {**label_metrics(beta * c, beta * r), "kl": (torch.stack([c_kl, r_kl]), None)}


@objective(data="kto", per="responses", show="rewards/desirable")
def apo_zero_unpaired(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta=0.1):
    """`apo_zero` without pairs, arXiv:2408.06266: 1 - sigmoid(beta c) for desirable responses, sigmoid(beta r) for the others.
    1/2 at the start."""
    c, r = class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return torch.cat([(-beta * c).sigmoid(), (beta * r).sigmoid()]), None, label_metrics(beta * c, beta * r)


@objective(data="kto", per="responses", show="rewards/desirable")
def bco(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
        running_reward=None, *, beta=0.1):
    """Binary classifier optimization, arXiv:2404.04656: -log sigmoid(beta c - d) for desirable responses, -log sigmoid(d - beta r)
    for the others. d: running_reward, (), the mean reward of all responses of earlier steps (the paper's is the mean of the two
    classes' means). log 2 at the start."""
    c, r = class_log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    d = running(running_reward)
    values = -F.logsigmoid(torch.cat([beta * c - d, d - beta * r]))
    return values, None, {**label_metrics(beta * c, beta * r), "rewards/mean": (beta * torch.cat([c, r]), None)}


# ---------------------------------------------------------------------------------------------------------------------
# Reward models. chosen_reward, reject_reward, margin: (P,) scores.


def reward_terms(chosen_reward, reject_reward, margin, center_coef) -> tuple[Tensor, Tensor, dict]:
    """(chosen - rejected - margin), center_coef (chosen + rejected)^2 and the metrics."""
    gap = difference(chosen_reward, reject_reward)
    metrics = {"accuracy": (0.5 + 0.5 * gap.sign(), None), "margin": (gap, None),
               "reward": (torch.cat([wide(chosen_reward), wide(reject_reward)]), None)}
    center = center_coef * (wide(chosen_reward) + wide(reject_reward)) ** 2
    return gap if margin is None else difference(gap, margin), center, metrics


@objective(data="preference", per="pairs", show="accuracy")
def rm(chosen_reward, reject_reward, margin=None, *, center_coef=0.0):
    """Bradley-Terry reward model, arXiv:2203.02155 eq. 1: -log sigmoid(chosen - rejected - margin) (PairWiseLoss). center_coef
    (chosen + rejected)^2 keeps the rewards near 0, arXiv:2312.09244. log 2 where both rewards are equal."""
    gap, center, metrics = reward_terms(chosen_reward, reject_reward, margin, center_coef)
    return smoothed(gap, 0) + center, None, metrics


@objective(data="preference", per="pairs", show="accuracy")
def rm_logexp(chosen_reward, reject_reward, margin=None, *, center_coef=0.0):
    """log(1 + exp(rejected - chosen + margin)), arXiv:2204.05862 (LogExpLoss): the same function as `rm`, written so that it
    does not overflow."""
    gap, center, metrics = reward_terms(chosen_reward, reject_reward, margin, center_coef)
    return torch.logaddexp(-gap, torch.zeros_like(gap)) + center, None, metrics


@objective(data="preference", per="pairs", show="accuracy")
def rm_hinge(chosen_reward, reject_reward, margin=None, *, center_coef=0.0):
    """max(0, rejected - chosen + margin)."""
    gap, center, metrics = reward_terms(chosen_reward, reject_reward, margin, center_coef)
    return torch.relu(-gap) + center, None, metrics


@objective(data="preference", per="examples", show="accuracy")
def rm_plackett_luce(ranked_rewards, rank_mask):
    """Plackett-Luce likelihood of a ranking: sum over ranks k of logsumexp(reward_k..K) - reward_k; `rm` where K = 2.

    ranked_rewards, rank_mask: (Q, K), best first; the mask is True where there is a response, except for all but the first of
    responses that are tied: a ranking cannot say that of two neither is better, so only one of them is in it.
    """
    same_shape(ranked_rewards, rank_mask)
    rewards = torch.where(rank_mask, wide(ranked_rewards), -1e30)  # -inf has no gradient in logcumsumexp
    rest = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    both = rank_mask[:, 1:] & rank_mask[:, :-1]
    accuracy = 0.5 + 0.5 * (rewards[:, :-1] - rewards[:, 1:]).sign()
    values = torch.where(rank_mask, rest - rewards, 0).sum(-1)
    return values, rank_mask.any(-1), {"accuracy": (accuracy, both), "reward": (rewards, rank_mask)}


# ---------------------------------------------------------------------------------------------------------------------
# Process rewards


@objective(data="prm", per="steps", show="accuracy")
def prm(step_logits, step_labels, step_mask):
    """Process reward model: two-way cross-entropy at each step's own token, arXiv:2305.20050 (PRMLoss).

    step_logits (S, 2): label 0 (bad step) and label 1 (good step), of a 2-label head or the two reward tokens' logits.
    step_labels (S,): floats in [0, 1], hard or soft; step_mask (S,): steps that have a label. With
    d = logit 1 - logit 0: -(p log sigmoid(d) + (1 - p) log sigmoid(-d)). log 2 where the logits are equal. To train on
    the whole vocabulary instead, use `lm(logits, label)` at those positions, without a shift.
    """
    if not step_labels.is_floating_point():
        raise ValueError(f"step_labels are {step_labels.dtype}; expected floats: integers would cut 0.9 to 0")
    good = masked(step_labels, step_mask)
    if step_logits.shape[-1] != 2:
        raise ValueError(f"step_logits are {tuple(step_logits.shape)}; expected (S, 2), the logits of a bad and of a good step")
    d = masked(difference(step_logits[..., 1], step_logits[..., 0]), step_mask)
    values = -good * F.logsigmoid(d) - (1 - good) * F.logsigmoid(-d)
    right = 0.5 + 0.5 * d.sign() * (good - 0.5).sign()
    return values, step_mask, {"accuracy": (right, step_mask), "accuracy/positive": (right, step_mask & (good > 0.5)),
                               "accuracy/negative": (right, step_mask & (good < 0.5))}


# ---------------------------------------------------------------------------------------------------------------------
# Policy gradient. All inputs (R, L); action_mask: the tokens that the policy chose. Log-probs are those of
# softmax(logits / temperature) over the whole vocabulary: log_probs with gradient, old_log_probs the trainer's before the
# update, rollout_log_probs the sampler's, all on the same rollouts. Log-ratios are clamped to ±20 before exp.

REDUCTIONS = {  # name -> (count that divides the sum, function of (R, L) values, (R, L) mask and max_new_tokens -> values, mask)
    "token": ("tokens", lambda values, mask, most: (values, mask)),  # mean over all tokens
    "sequence": ("responses", lambda values, mask, most: (sequence_mean(values, mask), mask.any(-1))),  # of sequence means
    "dr_grpo": ("responses", lambda values, mask, most: (values.sum(-1) / most, mask.any(-1))),  # sum / (R * max_new_tokens)
}
CORRECTIONS = {  # name -> function of (token weights w, their geometric mean over the sequence, low, high) -> token weights
    "tis": lambda w, sequence, low, high: w.clamp(low, high),
    "icepop": lambda w, sequence, low, high: torch.where((w >= low) & (w <= high), w, 0),
    "seq-mask-tis": lambda w, sequence, low, high: torch.where((sequence >= low) & (sequence <= high), w, 0),
}


def per_reduction(reduction: str) -> str:
    """Key of the step's counts that a sum under this reduction is divided by."""
    return REDUCTIONS[reduction][0]


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(R, L), zeros where masked -> (R,)."""
    return values.sum(-1) / mask.sum(-1).clamp(min=1)


def log_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b at action tokens, 0 elsewhere."""
    return masked(difference(a, b), mask)


def bounded_exp(x: Tensor) -> Tensor:
    """exp of a log-ratio clamped to ±20."""
    return x.clamp(-20, 20).exp()


def token_reduced(values: Tensor, action_mask: Tensor, reduction: str, max_new_tokens: int = 1) -> tuple[Tensor, Tensor]:
    """(R, L) per-token losses -> values and mask under the reduction, (R, L) or (R,)."""
    values = torch.where(action_mask, values, 0)
    return REDUCTIONS[reduction][1](values, action_mask, max_new_tokens)


def finished(values, ratio, binds, rollouts, reduction, max_new_tokens, correction, low, high) -> tuple[Tensor, Tensor, dict]:
    """(R, L) per-token losses -> what a policy loss returns: corrected for a sampler that differs from the trainer (importance
    weights exp(old - rollout), no gradient), reduced, and with metrics."""
    log_probs, old_log_probs, rollout_log_probs, action_mask = rollouts
    metrics = {"policy/clip_fraction": (binds.to(ratio.dtype), action_mask),
               "policy/ratio": (ratio.expand(action_mask.shape), action_mask),
               "policy/approx_kl": (log_difference(old_log_probs, log_probs, action_mask), action_mask)}
    if correction and rollout_log_probs is None:
        raise ValueError(f"correction = {correction!r} needs rollout_log_probs")
    if rollout_log_probs is not None:
        gap = log_difference(old_log_probs, rollout_log_probs, action_mask).detach()
        metrics["policy/rollout_kl"] = -gap, action_mask
        if correction:
            sequence = bounded_exp(sequence_mean(gap, action_mask))[:, None]
            values = values * CORRECTIONS[correction](bounded_exp(gap), sequence, low, high)
    return *token_reduced(values, action_mask, reduction, max_new_tokens), metrics


def clipped_surrogate(ratio, advantages, clip_eps_low, clip_eps_high, dual_clip):
    """-min(ratio A, clip(ratio) A), capped at -dual_clip A where A < 0; and the mask of tokens where clipping is active."""
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high) * advantages
    surrogate = torch.min(plain, clipped)
    if dual_clip:
        surrogate = torch.where(advantages < 0, torch.max(surrogate, dual_clip * advantages), surrogate)
    return -surrogate, clipped < plain


@objective(data="prompts", per=per_reduction, show="reward")
def ppo(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs=None, *,
        clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=0.0, reduction="token", max_new_tokens=256,
        correction="", correction_low=0.5, correction_high=5.0):
    """Clipped surrogate, arXiv:1707.06347 eq. 7: -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A) (PolicyLoss). With
    group advantages it is GRPO's, arXiv:2402.03300; reduction "sequence" is GRPO's mean, "token" DAPO's, "dr_grpo" a constant.

    dual_clip c > 1: where A < 0 the loss is at most -c A, arXiv:1912.09729. correction: weights exp(old - rollout), no gradient,
    for a sampler that differs from the trainer: "tis" clamps them to [correction_low, correction_high], "icepop" drops tokens
    outside of it, "seq-mask-tis" drops sequences whose geometric mean is outside. At ratio 1 the loss is -mean(A).
    """
    advantages = masked(advantages, action_mask)
    ratio = bounded_exp(log_difference(log_probs, old_log_probs, action_mask))
    values, binds = clipped_surrogate(ratio, advantages, clip_eps_low, clip_eps_high, dual_clip)
    return finished(values, ratio, binds, (log_probs, old_log_probs, rollout_log_probs, action_mask),
                    reduction, max_new_tokens, correction, correction_low, correction_high)


@objective(data="prompts", per="responses", show="reward")
def gspo(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs=None, *,
         clip_eps_low=3e-4, clip_eps_high=4e-4, dual_clip=0.0, correction="", correction_low=0.5, correction_high=5.0):
    """Group sequence policy optimization, arXiv:2507.18071: `ppo` with exp of the sequence's mean log-ratio as the ratio
    and a mean over sequences. Its clip ranges are on the order of 3e-4."""
    advantages = masked(advantages, action_mask)
    ratio = bounded_exp(sequence_mean(log_difference(log_probs, old_log_probs, action_mask), action_mask))[:, None]
    values, binds = clipped_surrogate(ratio, advantages, clip_eps_low, clip_eps_high, dual_clip)
    return finished(values, ratio, binds, (log_probs, old_log_probs, rollout_log_probs, action_mask),
                    "sequence", 1, correction, correction_low, correction_high)


@objective(data="prompts", per=per_reduction, show="reward")
def cispo(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs=None, *,
          clip_eps_high=0.2, reduction="token", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    """CISPO, arXiv:2506.13585: -sg(min(ratio, 1 + eps_high)) A log p: the weight is clipped, no token loses its gradient."""
    ratio = bounded_exp(log_difference(log_probs, old_log_probs, action_mask)).detach()
    clipped = ratio.clamp(max=1 + clip_eps_high)
    values = -clipped * masked(advantages, action_mask) * masked(log_probs, action_mask)
    return finished(values, ratio, clipped < ratio, (log_probs, old_log_probs, rollout_log_probs, action_mask),
                    reduction, max_new_tokens, correction, correction_low, correction_high)


@objective(data="prompts", per=per_reduction, show="reward")
def reinforce(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs=None, *,
              reduction="token", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    """REINFORCE: -A log p, for rollouts of the current policy; old_log_probs are read for metrics and correction alone."""
    ratio = bounded_exp(log_difference(log_probs, old_log_probs, action_mask)).detach()
    values = -masked(advantages, action_mask) * masked(log_probs, action_mask)
    return finished(values, ratio, torch.zeros_like(ratio), (log_probs, old_log_probs, rollout_log_probs, action_mask),
                    reduction, max_new_tokens, correction, correction_low, correction_high)


@objective(data="prompts", per=per_reduction, show="reward")
def sapo(log_probs, old_log_probs, advantages, action_mask, rollout_log_probs=None, *,
         tau_positive=1.0, tau_negative=1.05, reduction="sequence", max_new_tokens=256,
         correction="", correction_low=0.5, correction_high=5.0):
    """Soft adaptive policy optimization, arXiv:2511.20347: -(4 / tau) sigmoid(tau (ratio - 1)) A, tau by the sign of A: a soft
    gate in the place of the clip. At ratio 1 its gradient is that of `ppo`."""
    advantages = masked(advantages, action_mask)
    ratio = bounded_exp(log_difference(log_probs, old_log_probs, action_mask))
    tau = torch.full_like(ratio, tau_negative).masked_fill(advantages > 0, tau_positive)
    values = -4 / tau * (tau * (ratio - 1)).sigmoid() * advantages
    return finished(values, ratio, torch.zeros_like(ratio), (log_probs, old_log_probs, rollout_log_probs, action_mask),
                    reduction, max_new_tokens, correction, correction_low, correction_high)


KL_ESTIMATORS = {  # of KL(policy || reference) from samples of the policy, d = log pi - log pi_ref, within ±20
    "k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: torch.expm1(-d) + d}


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, action_mask: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference), 0 where masked: "k1", "k2" or "k3" of joschu.net/blog/kl-approx."""
    d = log_difference(log_probs, reference_log_probs, action_mask).clamp(-20, 20)
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator = {estimator!r}; expected one of {', '.join(map(repr, KL_ESTIMATORS))}")
    return KL_ESTIMATORS[estimator](d)


@objective(data="prompts", per=per_reduction)
def kl(log_probs, reference_log_probs, action_mask, *, estimator="k3", reduction="token", max_new_tokens=256):
    """KL to the reference as a term of the loss: {"ppo": 1.0, "kl": 0.05}. k2's gradient is that of the KL, k3's is not quite;
    k1's is 0 in expectation, and refused."""
    values = kl_estimate(log_probs, reference_log_probs, action_mask, estimator)
    metrics = {"kl": (kl_estimate(log_probs, reference_log_probs, action_mask), action_mask)}
    return *token_reduced(values, action_mask, reduction, max_new_tokens), metrics


@objective(data="prompts", per="tokens")
def entropy_bonus(entropy, action_mask):
    """Minus the mean entropy of the policy at action tokens: {"ppo": 1.0, "entropy_bonus": 0.01}."""
    values = masked(entropy, action_mask)
    return -values, action_mask, {"entropy": (values, action_mask)}


@objective(data="prompts", per=per_reduction, show="value/loss")
def value(values, old_values, returns, action_mask, *, value_clip=0.0, reduction="token", max_new_tokens=256):
    """Half the squared error of the value head, arXiv:1707.06347 eq. 9 (ValueLoss). value_clip > 0: the larger of the errors with
    and without V clipped to V_old ± value_clip."""
    values, old_values, returns = (masked(x, action_mask) for x in (values, old_values, returns))
    errors = plain = (values - returns) ** 2
    if value_clip:
        errors = torch.max(plain, (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns) ** 2)
    metrics = {"value/loss": (0.5 * errors, action_mask), "value/clip_fraction": ((errors > plain).to(plain.dtype), action_mask),
               "value/mean": (values, action_mask)}
    return *token_reduced(0.5 * errors, action_mask, reduction, max_new_tokens), metrics


# ---------------------------------------------------------------------------------------------------------------------
# Advantages, from rewards, without gradient: per token (R, L), over action tokens alone; per group (G, n), n responses a prompt.


def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, arXiv:1506.02438 eq. 16 -> advantages, returns (R, L). Gaps in the mask are skipped."""
    rewards, values = (masked(x, action_mask).detach() for x in (rewards, values))
    advantage = next_value = values.new_zeros(len(values))
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        here = action_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, advantage, 0)
    return advantages, advantages + values


def discounted(rewards: Tensor, action_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Reward to go (R, L): the returns of REINFORCE. `gae` without values and with lam = 1."""
    return gae(rewards, torch.zeros_like(rewards), action_mask, gamma, 1.0)[0]


def rloo(rewards: Tensor) -> Tensor:
    """(G, n): each reward minus the mean of the others of its group, arXiv:2402.14740."""
    n = rewards.shape[1]
    if n < 2:
        raise ValueError(f"rloo compares each answer with the others of its group and needs at least 2; found groups of {n}")
    return group_center(rewards) * (n / (n - 1))


def group_norm(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(G, n): GRPO, arXiv:2402.03300: (r - mean) / (std + eps), unbiased std. 0 for a group of one."""
    centered = group_center(rewards)
    std = (centered.square().sum(1, keepdim=True) / max(rewards.shape[1] - 1, 1)).sqrt()
    return centered / (std + eps)


def group_center(rewards: Tensor) -> Tensor:
    """(G, n): Dr. GRPO, arXiv:2503.20783: r - mean of the group; exactly 0 if rewards are equal. Followed by `discounted`
    and `whiten`, it is REINFORCE++-baseline."""
    gap = wide(rewards) - wide(rewards[:, :1])
    return gap - gap.sum(1, keepdim=True) / rewards.shape[1]


def whiten(advantages: Tensor, action_mask: Tensor, sum_ranks: Callable = lambda x: x, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the action tokens of all ranks (sum_ranks adds a tensor up over them), 0 where masked."""
    x = masked(advantages, action_mask)
    count, first = sum_ranks(torch.stack([action_mask.sum().to(x.dtype), x.sum()]))
    centered = torch.where(action_mask, x - first / count.clamp(min=1), 0)
    variance = sum_ranks(centered.square().sum()) / count.clamp(min=1)
    return centered * (variance + eps).rsqrt()


def at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """(R,) scores -> (R, L): each at its response's last action token, 0 elsewhere (the mask has no gaps)."""
    return scores.new_zeros(mask.shape).scatter(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def by_gae(scores, penalty, values, mask, n, gamma, lam):
    advantages, returns = gae(penalty + at_end(scores, mask), values, mask, gamma, lam)
    return whiten(advantages, mask), returns


def by_return(scores, penalty, values, mask, n, gamma, lam):
    returns = discounted(penalty + at_end(scores, mask), mask, gamma)
    return whiten(returns, mask), returns


def by_centered_return(scores, penalty, values, mask, n, gamma, lam):
    return by_return(group_center(scores.view(-1, n)).flatten(), penalty, values, mask, n, gamma, lam)


def by_group(weigh: Callable) -> Callable:
    """One advantage for all tokens of a response: weigh(total rewards (G, n))."""
    def advantages(scores, penalty, values, mask, n, gamma, lam):
        returns = discounted(penalty + at_end(scores, mask), mask, gamma)
        return torch.where(mask, weigh((scores + penalty.sum(1)).view(-1, n)).view(-1, 1), 0), returns
    return advantages


class Estimator(NamedTuple):
    """of: (scores (R,), minus the KL penalty (R, L), values (R, L) or None, action mask (R, L), n, gamma, lam) -> advantages and
    returns (R, L)."""
    of: Callable
    critic: bool = False  # it needs values
    group: bool = False  # it compares the answers to a prompt
    ahead: bool = False  # a token's advantage depends on later rewards, which gamma discounts


ADVANTAGES = {"gae": Estimator(by_gae, critic=True, ahead=True), "reinforce": Estimator(by_return, ahead=True),
              "reinforce_baseline": Estimator(by_centered_return, group=True, ahead=True),
              **{weigh.__name__: Estimator(by_group(weigh), group=True) for weigh in (rloo, group_norm, group_center)}}


# ---------------------------------------------------------------------------------------------------------------------
# The fused linear -> log-prob, and losses on logits. [N, V] is never materialized, only a chunk of rows at a time:
# for log-probs the logits are recomputed in backward; for losses on logits they are computed once, along with their gradient.


def head_chunk(vocab_size: int, device: str = "cpu") -> int:
    """Rows of logits alive at once: a power of two from 128 to 1,024, so that a chunk takes at most 128 MB in fp32 (512 MB on an
    accelerator), but at least 128 whatever the vocabulary, since smaller products are memory-bound."""
    budget = 2**25 if device == "cpu" else 2**27  # elements
    return max(128, min(1024, 1 << (budget // vocab_size).bit_length() - 1))


def _chunk_logps(hidden, weight, target, temperature, entropy, collision, softmax):
    """(C, D), (V, D), (C,) -> log-probs of the targets (C,) and, None unless asked for, entropies (C,), log sum_v p(v)^2 (C,) and
    softmax - onehot (C, V) in dtype `softmax`: p - 1 of a confident target is small, and would be lost in a rounded p."""
    logps = _logits(hidden, weight, temperature).log_softmax(-1)
    made = (logps.gather(1, target[:, None])[:, 0], -(logps.exp() * logps).sum(-1) if entropy else None,
            (2 * logps).logsumexp(-1) if collision else None)
    if softmax is None:
        return *made, None
    return *made, logps.exp_().scatter_add_(1, target[:, None], logps.new_full((len(logps), 1), -1.0)).to(softmax)


def _chunk_grad(hidden, weight, target, temperature, grad_logps, grad_entropy, p):
    """d loss / d (hidden @ weight.T) (C, V): g (onehot - p) for grad_logps g, -h p (log p + H) for grad_entropy h, both divided
    by the temperature. p: softmax - onehot, if it was kept."""
    if temperature != 1:
        grad_logps, grad_entropy = grad_logps / temperature, None if grad_entropy is None else grad_entropy / temperature
    if p is not None:
        return p.mul_(-grad_logps[:, None])
    if grad_entropy is None:
        grad = _logits(hidden, weight, temperature).softmax(-1).mul_(-grad_logps[:, None])
    else:
        logps = _logits(hidden, weight, temperature).log_softmax(-1)
        p = logps.exp()
        grad = -p * (grad_logps[:, None] + grad_entropy[:, None] * (logps - (p * logps).sum(-1, keepdim=True)))
    return grad.scatter_add_(1, target[:, None], grad_logps[:, None])


def _operands(hidden, weight):
    """Both in the dtype of the matrix product: the trunk's on CUDA, where it accumulates into fp32 logits; fp32 or wider
    elsewhere, where a bf16 product would be rounded to bf16."""
    low = hidden.dtype in (torch.bfloat16, torch.float16)
    dtype = hidden.dtype if low and hidden.is_cuda else torch.promote_types(
        torch.float32, torch.promote_types(hidden.dtype, weight.dtype))
    return hidden.to(dtype), weight.to(dtype)


def _logits(hidden, weight, temperature):
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # rounding logits to bf16 costs 0.03 nat a token
    else:
        logits = hidden @ weight.t()
    return logits if temperature == 1 else logits.div_(temperature)


def _zeros(hidden, weight, need_hidden, need_weight):
    """Buffers that `_back` fills with both gradients; the weight's is accumulated over chunks, in fp32 or wider."""
    return (torch.zeros_like(hidden) if need_hidden else None,
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if need_weight else None)


def _back(grad, hidden, weight, rows, grad_hidden, grad_weight):
    """Backpropagate d loss / d logits (C, V) of these rows into the gradients of hidden and weight; None: not needed."""
    grad = grad.to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(grad, weight, out=grad_hidden[rows])
    if grad_weight is not None and grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.t(), hidden[rows])
    elif grad_weight is not None:
        grad_weight += torch.mm(grad.t(), hidden[rows], out_dtype=grad_weight.dtype)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, entropy, collision, chunk, keep, graphs):
        ctx.temperature, ctx.entropy, ctx.chunk, ctx.graphs = temperature, entropy, chunk, graphs
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        frozen = need_hidden and not need_weight and not entropy
        if not frozen:
            ctx.save_for_backward(hidden, weight, target)
        ctx.jacobian, ctx.softmax, parts = torch.empty_like(hidden) if frozen else None, {}, []  # softmax: of the last chunks
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = _operands(hidden, weight)
            body = compiled(_chunk_logps) if graphs else _chunk_logps
            keep = chunk * len(w) * h.element_size() if keep is None else keep
            for start in range(0, max(len(h), 1), chunk):
                rows = slice(start, start + chunk)
                kept = need_weight and not entropy and (len(h) - start) * len(w) * h.element_size() <= keep
                *made, p = body(h[rows], w, target[rows], temperature, entropy, collision, h.dtype if frozen or kept else None)
                parts.append(made)
                if kept:
                    ctx.softmax[start] = p
                elif frozen:  # d log-prob / d hidden does not depend on the upstream gradient
                    ctx.jacobian[rows] = torch.mm(p, w).div_(-temperature)
        logps, entropies, collisions = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
        if collision:
            ctx.mark_non_differentiable(collisions)
        return logps, entropies, collisions

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, _):
        if ctx.jacobian is not None:
            return (ctx.jacobian * grad_logps[:, None]).to(ctx.jacobian.dtype), *[None] * 8
        hidden, weight, target = ctx.saved_tensors
        h, w = _operands(hidden, weight)
        body = compiled(_chunk_grad) if ctx.graphs else _chunk_grad
        grad_hidden, grad_weight = _zeros(h, w, *ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in reversed(range(0, len(h), ctx.chunk)):  # chunks with a kept softmax first, to free it
                rows = slice(start, start + ctx.chunk)
                upstream = grad_logps[rows], grad_entropy[rows] if ctx.entropy else None
                _back(body(h[rows], w, target[rows], ctx.temperature, *upstream, ctx.softmax.pop(start, None)),
                      h, w, rows, grad_hidden, grad_weight)
        return (None if grad_hidden is None else grad_hidden.to(hidden.dtype),
                None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 7)


class Projected(NamedTuple):
    """Logits that are not there yet: hidden (N, D) @ weight (V, D).T."""
    hidden: Tensor
    weight: Tensor

    def ready(self) -> "Projected":
        """As `rows` needs it: in the dtype of the matrix product, detached."""
        return Projected(*_operands(self.hidden.detach(), self.weight.detach()))

    def rows(self, rows: slice) -> Tensor:
        with torch.autocast(self.hidden.device.type, enabled=False):
            return _logits(self.hidden[rows], self.weight, temperature=1)


class TopLogits(NamedTuple):
    """The k highest of each row's V logits, and their token ids, (N, k) each; all other logits are taken as -inf."""
    logits: Tensor
    index: Tensor
    vocab: int

    def rows(self, rows: slice) -> Tensor:
        top = wide(self.logits[rows])
        return top.new_full((len(top), self.vocab), -math.inf).scatter(1, self.index[rows].long(), top)


class _Known(torch.autograd.Function):
    """Values whose masked sum has precomputed gradients with respect to the inputs: the only backward scales them by the upstream
    gradient, or by NaN if that is not the same factor for all values."""
    @staticmethod
    def forward(ctx, values, mask, gradients, *inputs):
        ctx.mask, ctx.gradients = mask, gradients
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("a loss on logits allows only one backward; compute the loss again for another")
        total, count = reduced(upstream, ctx.mask)
        mean = total / count.clamp(min=1)
        one = reduced((upstream - mean).abs(), ctx.mask)[0] <= 1e-4 * total.abs()
        factor = torch.where(one, mean, math.nan).view(1)  # of no dimension, it would be rounded to a gradient's dtype first
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(gradient.mul_(factor) for gradient in gradients)


def by_chunk(loss: Callable, *inputs, **hyperparameters) -> tuple[Tensor, Tensor, dict]:
    """A loss on logits without materializing [N, V]: `Projected` and `TopLogits` become logits one chunk of rows at a time, which
    the loss may not change in place; other inputs (N, ...) are sliced alongside. Without either of them, it is a plain call.

    Gradients are computed along with the values, so that logits are computed only once (6NVD FLOPs). They are those of the masked
    sum of the values: the upstream gradient has to be the same factor for all of these, as in `total`.
    """
    unmade = [x for x in inputs if isinstance(x, (Projected, TopLogits))]
    if not unmade:
        return loss(*inputs, **hyperparameters)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs if isinstance(x, Tensor)):
        raise ValueError("a loss on logits gives gradients to the logits only, and another of its inputs requires one; use "
                         "that input in an objective of its own")
    device = unmade[0][0].device
    chunk = head_chunk(len(unmade) * max(len(x.weight) if isinstance(x, Projected) else x.vocab for x in unmade), device.type)
    ready = [x.ready() if isinstance(x, Projected) else x for x in inputs]
    gradients = {i: _zeros(*ready[i], *(factor.requires_grad for factor in x)) for i, x in enumerate(inputs)
                 if isinstance(x, Projected) and any(factor.requires_grad for factor in x) and torch.is_grad_enabled()}

    def part(rows):
        given = [x[rows] if isinstance(x, Tensor) else x.rows(rows) for x in ready]
        trained = [given[i].requires_grad_() for i in gradients]
        values, mask, metrics = loss(*given, **hyperparameters)
        made = torch.autograd.grad(reduced(values, mask)[0], trained, materialize_grads=True) if trained else ()
        del given, trained
        for i, grad in zip(gradients, made):
            _back(grad, *ready[i], rows, *gradients[i])
        return values.detach(), mask, {name: (x.detach(), counted) for name, (x, counted) in metrics.items()}
    with torch.autocast(device.type, enabled=False):
        parts = [part(slice(start, start + chunk)) for start in range(0, max(len(unmade[0][0]), 1), chunk)]
    values, masks, metrics = zip(*parts)
    cat = lambda pieces: None if pieces[0] is None else torch.cat(pieces)
    values, mask = cat(values), cat(masks)
    if gradients:
        known = [(grad, factor) for i in gradients for grad, factor in zip(gradients[i], inputs[i]) if grad is not None]
        values = _Known.apply(values, mask, [grad for grad, _ in known], *(factor for _, factor in known))
    return values, mask, {name: tuple(map(cat, zip(*(m[name] for m in metrics)))) for name in metrics[0]}


def linear_log_probs(hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                     collision: bool = False, chunk: int = 0, keep: int | None = None, compiled: bool = False
                     ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] without ever holding [N, V].

    hidden (N, D), weight (V, D), target (N,) int64 -> log-probs (N,) and, when asked, entropies (N,) and the log collision
    probability log sum_v p(v)^2 (N,) without gradient, in nats, fp32 or wider. Backward recomputes each chunk's logits: 8NVD
    FLOPs instead of 6NVD, and memory for one chunk only; if the weight needs no gradient and no entropies are asked for, forward
    computes what backward needs (4NVD). chunk: rows at a time (0: by `head_chunk`). keep: bytes of softmax, in the product's
    dtype, kept for backward instead of recomputed (None: one chunk's). compiled: chunk bodies through torch.compile.
    """
    same_shape(hidden[:, 0], target)
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}; expected above 0")
    chunk = chunk or head_chunk(len(weight), hidden.device.type)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # nothing is made for backward
    return _LinearLogProbs.apply(hidden, weight, target, temperature, entropy, collision, chunk, keep, compiled)
