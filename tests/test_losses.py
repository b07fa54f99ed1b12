"""Every loss of the table: against a float64 restatement written from its formula, compiled, at its start, at extremes.

`CASES` holds the restatements; a loss that is registered and has none fails here. They are plain: log(1 / (1 + exp(-x))),
one row or one token at a time, and take their gradient from autograd in float64.
"""
import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses
from bench import DIFFERENTIABLE, reading
from conftest import ROOT

# ---------------------------------------------------------------------------------------------------------------------
# Inputs: a tensor for each reading of a loss

REFERENCE_LOSSES = ("sft", "lm", "kd", "dpo", "ipo", "kto", "kto_vanilla", "ppo", "gspo", "value", "rm", "rm_logexp", "prm")


def inputs(name: str, rows: int = 6, longest: int = 9, seed: int = 0, dtype=torch.float64, scale: float = 1.0) -> dict:
    generator, o = torch.Generator().manual_seed(seed), losses.OBJECTIVES[name]
    more = lambda read: 2 if o.data == "kto" and "rejected" in read else 0  # classes of different sizes
    made = {read: reading(read, rows + more(read), longest, generator, scale) for read in o.reads}
    return {read: (x.to(dtype) if x.is_floating_point() else x).requires_grad_(read in DIFFERENTIABLE) for read, x in made.items()}


def evaluate(function, given: dict, upstream=None, **options):
    """Values with zeros where masked, and the gradient of their sum weighted with upstream."""
    values, mask, _ = function(*given.values(), **options)
    values = values if mask is None else torch.where(mask, values, 0)
    upstream = torch.ones_like(values) if upstream is None else upstream.to(values.dtype)
    wanted = [x for x in given.values() if x.requires_grad]
    return values.detach(), torch.autograd.grad((values * upstream).sum(), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Restatements: (loss, options) -> values, zeros where masked. x: the inputs by name.

CASES = []


def restates(name, *options):
    def register(function):
        CASES.extend(pytest.param(name, o, function, id=f"{name} {o or ''}") for o in options or ({},))
        return function
    return register


sigmoid = lambda x: 1 / (1 + torch.exp(-x))
ls = lambda x: torch.log(sigmoid(x))
each = lambda *columns: zip(*(c.unbind() for c in columns))


def ratios(x):
    return x["policy_chosen_logps"] - x["reference_chosen_logps"], x["policy_rejected_logps"] - x["reference_rejected_logps"]


def of_ratios(formula):
    return lambda x, **o: formula(*ratios(x), **o)


cdpo = lambda m, e: -torch.log((1 / (1 + torch.exp(-m))) ** (1 - e) * (1 / (1 + torch.exp(m))) ** e)
restates("dpo", dict(beta=0.1, label_smoothing=0.0), dict(beta=0.5, label_smoothing=0.2))(
    of_ratios(lambda c, r, beta, label_smoothing: cdpo(beta * (c - r), label_smoothing)))
restates("hinge", dict(beta=0.1))(of_ratios(lambda c, r, beta: torch.stack([max(1 - beta * (a - b), 0 * (a + b)) for a, b in each(c, r)])))
restates("robust", dict(beta=0.2, label_smoothing=0.1))(of_ratios(
    lambda c, r, beta, label_smoothing: (-(1 - label_smoothing) * ls(beta * (c - r)) + label_smoothing * ls(beta * (r - c))) / (1 - 2 * label_smoothing)))
restates("nca_pair", dict(beta=0.1))(of_ratios(lambda c, r, beta: -ls(beta * c) - ls(-beta * c) / 2 - ls(-beta * r) / 2))
restates("sppo_hard", dict(beta=0.1))(of_ratios(lambda c, r, beta: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2))
restates("apo_zero", dict(beta=0.1))(of_ratios(lambda c, r, beta: 1 - sigmoid(beta * c) + sigmoid(beta * r)))
restates("apo_down", dict(beta=0.1))(of_ratios(lambda c, r, beta: sigmoid(beta * c) + 1 - sigmoid(beta * (c - r))))
restates("apo_zero_unpaired", dict(beta=0.1))(of_ratios(lambda c, r, beta: torch.cat([1 - sigmoid(beta * c), sigmoid(beta * r)])))


@restates("exo_pair", dict(beta=0.1, label_smoothing=1e-3))
def exo_pair(x, beta, label_smoothing):
    """KL(softmax of the two rewards || (1 - eps, eps))."""
    c, r = ratios(x)
    p = torch.exp(beta * c) / (torch.exp(beta * c) + torch.exp(beta * r))
    return p * torch.log(p / (1 - label_smoothing)) + (1 - p) * torch.log((1 - p) / label_smoothing)


@restates("ipo", dict(beta=0.1), dict(beta=0.3, length_normalized=True))
def ipo(x, beta, length_normalized=False):
    c, r = ratios(x)
    if length_normalized:
        c, r = c / x["chosen_lengths"], r / x["rejected_lengths"]
    return (c - r - 0.5 / beta) ** 2


@restates("sigmoid_norm", dict(beta=0.7))
def sigmoid_norm(x, beta):
    c, r = ratios(x)
    return -ls(beta * (c / x["chosen_lengths"] - r / x["rejected_lengths"]))


@restates("bco_pair", dict(beta=0.1), dict(beta=0.1, delta=False))
def bco_pair(x, beta, delta=True):
    (c, r), d = ratios(x), x["running_reward"] if delta else 0
    return -ls(beta * c - d) - ls(-(beta * r - d))


@restates("bco", dict(beta=0.1))
def bco(x, beta):
    (c, r), d = ratios(x), x["running_reward"]
    return torch.cat([-ls(beta * c - d), -ls(-(beta * r - d))])


@restates("aot", dict(beta=0.1, label_smoothing=0.0), dict(beta=0.1, label_smoothing=0.1))
def aot(x, beta, label_smoothing):
    policy = sorted(x["policy_chosen_logps"] - x["policy_rejected_logps"])
    reference = sorted(x["reference_chosen_logps"] - x["reference_rejected_logps"])
    return torch.stack([cdpo(beta * (p - q), label_smoothing) for p, q in zip(policy, reference)])


@restates("aot_unpaired", dict(beta=0.1, label_smoothing=0.1))
def aot_unpaired(x, beta, label_smoothing):
    return torch.stack([cdpo(beta * (a - b), label_smoothing) for a, b in zip(*map(sorted, ratios(x)))])


@restates("discopop", dict(beta=0.05, tau=0.05), dict(beta=0.02, tau=1.0))
def discopop(x, beta, tau):
    c, r = ratios(x)
    logits = beta * (c - r)
    m = sigmoid(logits / tau)
    return torch.log(1 + torch.exp(-logits)) * (1 - m) + torch.exp(-logits) * m


@restates("simpo", dict(beta=2.0, gamma=1.0))
def simpo(x, beta, gamma):
    mean = lambda side: x[f"policy_{side}_logps"] / x[f"{side}_lengths"]
    return -ls(beta * mean("chosen") - beta * mean("rejected") - gamma)


@restates("orpo", dict(beta=0.1))
def orpo(x, beta):
    chosen, rejected = (torch.exp(x[f"policy_{s}_logps"] / x[f"{s}_lengths"]) for s in ("chosen", "rejected"))
    odds = lambda p: p / (1 - p)
    return -torch.log(chosen) - beta * torch.log(sigmoid(torch.log(odds(chosen) / odds(rejected))))


@restates("cpo", dict(beta=0.1, alpha=0.5))
def cpo(x, beta, alpha):
    pc, pr = x["policy_chosen_logps"], x["policy_rejected_logps"]
    return -ls(beta * (pc - pr)) - alpha * pc / x["chosen_lengths"]


@restates("kto", dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0), dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
def kto(x, beta, desirable_weight, undesirable_weight):
    """arXiv:2402.01306 eq. 8 as a loss: lambda - value."""
    c, r = ratios(x)
    mismatched = [a - b for a, b in each(x["policy_KL_logps"], x["reference_KL_logps"])]
    z0 = max(sum(mismatched).item() / len(mismatched), 0.0)
    return torch.cat([desirable_weight * (1 - sigmoid(beta * (c - z0))), undesirable_weight * (1 - sigmoid(beta * (z0 - r)))])


@restates("kto_vanilla", dict(beta=0.1), dict(beta=0.1, detach_kl=False))
def kto_vanilla(x, beta, detach_kl=True):
    c, r = ratios(x)
    baselines = [max(sum(y) / len(y), 0 * y[0]) for y in (c, r)]
    c_kl, r_kl = (b.detach() for b in baselines) if detach_kl else baselines
    return torch.cat([1 - sigmoid(beta * (c - r_kl)), 1 - sigmoid(beta * (c_kl - r))])


@restates("rm", dict(center_coef=0.0), dict(center_coef=0.3))
@restates("rm_logexp", dict(center_coef=0.0), dict(center_coef=0.3))
def rm(x, center_coef):
    c, r = x["chosen_reward"], x["reject_reward"]
    return torch.log(1 + torch.exp(r - c + x["margin"])) + center_coef * (c + r) ** 2


@restates("rm_hinge", dict(center_coef=0.0), dict(center_coef=0.3))
def rm_hinge(x, center_coef):
    return torch.stack([max(r - c + m, 0 * (c + r)) + center_coef * (c + r) ** 2 for c, r, m in each(x["chosen_reward"], x["reject_reward"], x["margin"])])


@restates("rm_plackett_luce")
def rm_plackett_luce(x):
    """- log of the product over ranks of exp(r_k) / (exp(r_k) + ... + exp(r_K))."""
    lists = [rewards[mask] for rewards, mask in each(x["ranked_rewards"], x["rank_mask"])]
    return torch.stack([-sum(torch.log(torch.exp(r[k]) / torch.exp(r[k:]).sum()) for k in range(len(r))) for r in lists])


@restates("prm")
def prm(x):
    def one(logits, p, counts):
        q = torch.exp(logits[1]) / torch.exp(logits).sum()
        return -(p * torch.log(q) + (1 - p) * torch.log(1 - q)) if counts else 0 * p
    return torch.stack([one(*row) for row in each(x["step_logits"], x["step_labels"], x["step_mask"])])


@restates("sft", {}, dict(dft=True), dict(per_sequence=True))
def sft(x, dft=False, per_sequence=False):
    rows = []
    for logps, mask in each(x["log_probs"], x["demonstration_mask"]):
        tokens = [-(p.exp().item() if dft else 1) * p if m else 0 * p for p, m in each(logps, mask)]
        rows.append(sum(tokens) / max(int(mask.sum()), 1) if per_sequence else torch.stack(tokens))
    return torch.stack(rows)


@restates("lm")
def lm(x):
    return torch.stack([-torch.log(torch.exp(row[y]) / torch.exp(row).sum()) if y != -100 else 0 * row[0] for row, y in each(x["logits"], x["label"])])


@restates("kd", dict(alpha=0.4, temperature=1.0), dict(alpha=1.0, temperature=2.0), dict(alpha=0.7, jsd_beta=1.0), dict(alpha=1.0, jsd_beta=0.3))
def kd(x, alpha, temperature=1.0, jsd_beta=0.0):
    rows = []
    for s, t, y in each(x["logits"], x["teacher_logits"], x["label"]):
        p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (t, s))  # teacher, student
        m = jsd_beta * p + (1 - jsd_beta) * q
        distance = (-(p * q.log()).sum() if jsd_beta == 0 else (q * (q / p).log()).sum() if jsd_beta == 1 else
                    jsd_beta * (p * (p / m).log()).sum() + (1 - jsd_beta) * (q * (q / m).log()).sum())
        hard = -torch.log(torch.exp(s[y]) / torch.exp(s).sum()) if y != -100 else None
        rows.append((1 - alpha) * hard + alpha * temperature**2 * distance if y != -100 else 0 * s[0])
    return torch.stack(rows)


def tokenwise(x, reduction, one, most=256):
    """one(row, token) -> its loss, over the action tokens; reduced as the option says."""
    rows = []
    for i, mask in enumerate(x["action_mask"]):
        nothing = 0 * next(iter(x.values()))[i]  # a clipped token is a constant, and still has a gradient: zero
        tokens = [one(i, t) + nothing[t] if m else nothing[t] for t, m in enumerate(mask)]
        rows.append(torch.stack(tokens) if reduction == "token" else sum(tokens) / (max(int(mask.sum()), 1) if reduction == "sequence" else most))
    return torch.stack(rows)


def sampler_weight(x, i, t, correction, low, high):
    gaps = (x["old_log_probs"] - x["rollout_log_probs"])[i]
    w, mean = math.exp(gaps[t]), math.exp(gaps[x["action_mask"][i]].mean())
    return {"": 1.0, "tis": min(max(w, low), high), "icepop": w if low <= w <= high else 0.0,
            "seq-mask-tis": w if low <= mean <= high else 0.0}[correction]


def surrogate(ratio, advantage, low, high, dual_clip):
    """PPO by cases: where the clip binds, the loss is a constant."""
    bounded = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    loss = -min(ratio * advantage, bounded * advantage)
    return -dual_clip * advantage if dual_clip and advantage < 0 and loss > -dual_clip * advantage else loss


CORRECTED = [dict(correction=c, correction_low=0.8, correction_high=1.3) for c in ("tis", "icepop", "seq-mask-tis")]
REDUCED = [dict(reduction="token"), dict(reduction="sequence"), dict(reduction="dr_grpo", max_new_tokens=20)]


@restates("ppo", {}, dict(clip_eps_low=0.1, clip_eps_high=0.3), dict(dual_clip=1.5), *REDUCED, *CORRECTED)
def ppo(x, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=0.0, reduction="token", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    def one(i, t):
        ratio = torch.exp(x["log_probs"][i, t]) / torch.exp(x["old_log_probs"][i, t])
        loss = surrogate(ratio, x["advantages"][i, t], clip_eps_low, clip_eps_high, dual_clip)
        return loss * sampler_weight(x, i, t, correction, correction_low, correction_high)
    return tokenwise(x, reduction, one, max_new_tokens)


@restates("gspo", {}, dict(clip_eps_low=0.05, clip_eps_high=0.1, dual_clip=1.1), *CORRECTED)
def gspo(x, clip_eps_low=3e-4, clip_eps_high=4e-4, dual_clip=0.0, correction="", correction_low=0.5, correction_high=5.0):
    def one(i, t):
        """arXiv:2507.18071: (pi(y) / pi_old(y))^(1 / |y|)."""
        mask = x["action_mask"][i]
        ratio = (torch.exp(x["log_probs"][i][mask]).prod() / torch.exp(x["old_log_probs"][i][mask]).prod()) ** (1 / int(mask.sum()))
        return surrogate(ratio, x["advantages"][i, t], clip_eps_low, clip_eps_high, dual_clip) * sampler_weight(x, i, t, correction, correction_low, correction_high)
    return tokenwise(x, "sequence", one)


@restates("cispo", {}, dict(clip_eps_high=0.1), *REDUCED, *CORRECTED)
def cispo(x, clip_eps_high=0.2, reduction="token", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    def one(i, t):
        weight = min(math.exp((x["log_probs"] - x["old_log_probs"])[i, t].item()), 1 + clip_eps_high)
        return -weight * x["advantages"][i, t] * x["log_probs"][i, t] * sampler_weight(x, i, t, correction, correction_low, correction_high)
    return tokenwise(x, reduction, one, max_new_tokens)


@restates("reinforce", {}, *REDUCED, *CORRECTED)
def reinforce(x, reduction="token", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    def one(i, t):
        return -x["advantages"][i, t] * x["log_probs"][i, t] * sampler_weight(x, i, t, correction, correction_low, correction_high)
    return tokenwise(x, reduction, one, max_new_tokens)


@restates("sapo", {}, dict(tau_positive=2.0), *REDUCED, *CORRECTED)
def sapo(x, tau_positive=1.0, tau_negative=1.05, reduction="sequence", max_new_tokens=256, correction="", correction_low=0.5, correction_high=5.0):
    def one(i, t):
        ratio, a = torch.exp(x["log_probs"][i, t] - x["old_log_probs"][i, t]), x["advantages"][i, t]
        tau = tau_positive if a > 0 else tau_negative
        return -4 / tau * sigmoid(tau * (ratio - 1)) * a * sampler_weight(x, i, t, correction, correction_low, correction_high)
    return tokenwise(x, reduction, one, max_new_tokens)


@restates("kl", {}, dict(estimator="k2"), *REDUCED)
def kl(x, estimator="k3", reduction="token", max_new_tokens=256):
    """k3 is r - 1 - log r of r = pi_ref / pi, joschu.net/blog/kl-approx."""
    def one(i, t):
        r = torch.exp(x["reference_log_probs"][i, t]) / torch.exp(x["log_probs"][i, t])
        return r - 1 - torch.log(r) if estimator == "k3" else 0.5 * torch.log(r) ** 2
    return tokenwise(x, reduction, one, max_new_tokens)


@restates("entropy_bonus")
def entropy_bonus(x):
    return tokenwise(x, "token", lambda i, t: -x["entropy"][i, t])


@restates("value", {}, dict(value_clip=0.2), dict(value_clip=0.5), *REDUCED)
def value(x, value_clip=0.0, reduction="token", max_new_tokens=256):
    def one(i, t):
        v, old, target = (x[name][i, t] for name in ("values", "old_values", "returns"))
        inside = old + value_clip if v > old + value_clip else old - value_clip if v < old - value_clip else v
        return max((v - target) ** 2, (inside - target) ** 2) / 2 if value_clip else (v - target) ** 2 / 2
    return tokenwise(x, reduction, one, max_new_tokens)


EVERY = [case.values[:2] for case in CASES] + [(name, {}) for name in losses.OBJECTIVES.keys() - {case.values[0] for case in CASES}]


def test_every_loss_is_restated_with_every_reduction_and_correction():
    assert {case.values[0] for case in CASES} == losses.OBJECTIVES.keys()
    for key, names in (("reduction", losses.REDUCTIONS), ("correction", losses.CORRECTIONS)):
        for name in [name for name, o in losses.OBJECTIVES.items() if key in o.hyperparameters]:
            assert {options[key] for n, options in EVERY if n == name and key in options} == names.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, restated as means in float64


def of_pairs(c, r, **more):
    return {"rewards/chosen": c.mean(), "rewards/rejected": r.mean(), "rewards/margins": (c - r).mean(),
            "rewards/accuracies": sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in each(c, r)) / len(c), **more}


def pair_metrics(name, x, beta=0.1, **options):
    if "reference_chosen_logps" in x:
        c, r = ratios(x)
        if name == "sigmoid_norm":
            c, r = c / x["chosen_lengths"], r / x["rejected_lengths"]
        return of_pairs(beta * c, beta * r, **({"rewards/mean": beta * torch.cat([c, r]).mean()} if name == "bco_pair" else {}))
    c, r = x["policy_chosen_logps"], x["policy_rejected_logps"]
    nll = {} if name == "simpo" else {"nll": -(c / x["chosen_lengths"]).mean()}
    if name != "cpo":
        c, r = c / x["chosen_lengths"], r / x["rejected_lengths"]
    return of_pairs(beta * c, beta * r, **nll)


def label_metrics(name, x, beta=0.1, **options):
    c, r = ratios(x)
    more = {}
    if name == "kto":
        more["kl"] = (x["policy_KL_logps"] - x["reference_KL_logps"]).mean().clamp(min=0)  # of each response: the same number
    if name == "kto_vanilla":
        more["kl"] = (c.mean().clamp(min=0) + r.mean().clamp(min=0)) / 2
    if name == "bco":
        more["rewards/mean"] = beta * torch.cat([c, r]).mean()
    return {"rewards/desirable": beta * c.mean(), "rewards/undesirable": beta * r.mean(), **more}


def reward_metrics(name, x, **options):
    if name == "rm_plackett_luce":
        lists = [row[mask] for row, mask in each(x["ranked_rewards"], x["rank_mask"])]
        right = [float(a > b) for row in lists for a, b in zip(row, row[1:])]
        return {"accuracy": sum(right) / len(right), "reward": torch.cat(lists).mean()}
    c, r = x["chosen_reward"], x["reject_reward"]
    return {"accuracy": (c > r).double().mean(), "margin": (c - r).mean(), "reward": torch.cat([c, r]).mean()}


def step_metrics(name, x, **options):
    rows = [(float((logits[1] > logits[0]) == (p > 0.5)), bool(p > 0.5)) for logits, p, counts in each(x["step_logits"], x["step_labels"], x["step_mask"]) if counts]
    share = lambda picked: sum(picked) / len(picked)
    return {"accuracy": share([a for a, _ in rows]), "accuracy/positive": share([a for a, good in rows if good]),
            "accuracy/negative": share([a for a, good in rows if not good])}


def language_metrics(name, x, **options):
    if name == "sft":
        return {"nll": -x["log_probs"][x["demonstration_mask"]].mean()}
    counted, kls = x["label"] != -100, []
    log_q = x["logits"].log_softmax(-1)[counted]
    if name == "kd":
        log_p, log_qt = ((x[k] / options.get("temperature", 1.0)).log_softmax(-1)[counted] for k in ("teacher_logits", "logits"))
        kls = {"kl": (log_p.exp() * (log_p - log_qt)).sum(-1).mean()}
    return {"nll": -log_q[range(len(log_q)), x["label"][counted]].mean(), **(kls or {})}


def token_metrics(name, x, clip_eps_low=None, clip_eps_high=None, value_clip=None, **options):
    m = x["action_mask"]
    if name == "kl":
        return {"kl": (x["log_probs"] - x["reference_log_probs"])[m].mean()}
    if name == "entropy_bonus":
        return {"entropy": x["entropy"][m].mean()}
    if name == "value":
        v, old, target = (x[k][m] for k in ("values", "old_values", "returns"))
        clipped = [value_clip and (o + min(max(a - o, -value_clip), value_clip) - t) ** 2 > (a - t) ** 2 for a, o, t in each(v, old, target)]
        return {"value/mean": v.mean(), "value/clip_fraction": sum(map(bool, clipped)) / len(v),
                "value/loss": value({**x, "action_mask": m}, value_clip)[m].mean()}
    gap, a = x["log_probs"] - x["old_log_probs"], x["advantages"]
    if name == "gspo":
        gap = torch.stack([row[mask].mean().expand(len(row)) for row, mask in each(gap, m)])
    ratio = gap[m].exp()
    high = ratio > 1 + clip_eps_high if clip_eps_high is not None else torch.zeros_like(m[m])
    binds = high if clip_eps_low is None else high & (a[m] > 0) | (ratio < 1 - clip_eps_low) & (a[m] < 0)
    return {"policy/ratio": ratio.mean(), "policy/clip_fraction": binds.double().mean(),
            "policy/approx_kl": (x["old_log_probs"] - x["log_probs"])[m].mean(), "policy/rollout_kl": (x["rollout_log_probs"] - x["old_log_probs"])[m].mean()}


METRICS = {"policy_chosen_logps": pair_metrics, "chosen_reward": reward_metrics, "ranked_rewards": reward_metrics, "step_logits": step_metrics,
           "log_probs": token_metrics, "entropy": token_metrics, "values": token_metrics, "logits": language_metrics}


@pytest.mark.parametrize("name, options", [case.values[:2] for case in CASES])
def test_metrics(name, options):
    """Each metric that a loss reports, as a mean over what it counts, and no other."""
    o = losses.OBJECTIVES[name]
    restated = label_metrics if o.data == "kto" else language_metrics if name == "sft" else METRICS[o.reads[0]]
    for seed in range(3):
        x = {k: v.detach() for k, v in inputs(name, rows=12, seed=seed).items()}
        expected = restated(name, x, **{**o.hyperparameters, **options})
        found = {metric: (total / count).item() for metric, (total, count) in ((k, losses.reduced(*pair)) for k, pair in o.loss(*x.values(), **options)[2].items())}
        assert found == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name, options, restated", CASES)
def test_value_and_gradient_against_the_formula(name, options, restated, dtype, tolerance):
    for seed in range(3):
        given = inputs(name, seed=seed, dtype=dtype)
        exact = {k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for k, x in given.items()}
        expected = restated(exact, **options)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slopes = torch.autograd.grad((expected * upstream).sum(), [x for x in exact.values() if x.requires_grad])
        values, grads = evaluate(losses.OBJECTIVES[name].loss, given, upstream, **options)
        assert values.dtype == dtype
        for found, wanted in zip((values, *grads), (expected, *slopes), strict=True):
            assert ((found.double() - wanted).abs() <= tolerance * ((1e-3 if dtype == torch.float64 else 1) + wanted.abs())).all()


@pytest.mark.parametrize("name, options", [case.values[:2] for case in CASES])
def test_a_sum_is_divided_by_the_number_of_its_values(name, options):
    """`per` names a count of the step, taken from the data: it has to be that of the elements that count."""
    x, o = inputs(name), losses.OBJECTIVES[name]
    term = losses.bind(name, 1.0, {**o.hyperparameters, **options})
    values, mask, _ = o.loss(*x.values(), **options)
    scored = x.get("demonstration_mask", x["label"] != -100 if "label" in x else None)
    expected = {"pairs": lambda: 6, "examples": lambda: 6, "steps": lambda: x["step_mask"].sum(),
                "tokens": lambda: x["action_mask"].sum(), "responses": lambda: 14 if o.data == "kto" else x["action_mask"].any(-1).sum(),
                "demonstrated_tokens": lambda: scored.sum(), "demonstrations": lambda: scored.any(-1).sum()}[term.per]()
    assert losses.reduced(values, mask)[1] == expected


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_gradcheck(name):
    """Against differences of the loss itself; the random points lie on none of its kinks. Where part of a loss is a constant of
    its gradient by definition it has to be one of its value too: cispo's weight, by ratios past its bound."""
    given, options = inputs(name, rows=4, longest=5), {"kto_vanilla": dict(detach_kl=False)}.get(name, {})
    if name == "cispo":
        given["old_log_probs"] = given["log_probs"].detach() - 1
    free = [k for k, x in given.items() if x.requires_grad]

    def function(*xs):
        values, mask, _ = losses.OBJECTIVES[name].loss(**{**given, **dict(zip(free, xs))}, **options)
        return values if mask is None else torch.where(mask, values, 0)
    assert torch.autograd.gradcheck(function, [given[k] for k in free])


# ---------------------------------------------------------------------------------------------------------------------
# Values known by hand


def start(name, **changes):
    """Inputs with policy = reference (or old, or teacher) and everything else as drawn."""
    given = inputs(name, **changes)
    same = {"reference_chosen_logps": "policy_chosen_logps", "reference_rejected_logps": "policy_rejected_logps",
            "reference_KL_logps": "policy_KL_logps", "old_log_probs": "log_probs", "rollout_log_probs": "log_probs",
            "reference_log_probs": "log_probs", "teacher_logits": "logits", "reject_reward": "chosen_reward", "old_values": "values",
            "returns": "values"}
    given.update({name: given[other].detach().clone() for name, other in same.items() if name in given})
    if "running_reward" in given:
        given["running_reward"] = torch.zeros((), dtype=torch.float64)
    return given


@pytest.mark.parametrize("name, options, expected", [
    ("dpo", {}, math.log(2)), ("dpo", dict(label_smoothing=0.3), math.log(2)), ("ipo", dict(beta=0.1), 25.0),
    ("ipo", dict(beta=0.25, length_normalized=True), 4.0), ("hinge", {}, 1.0), ("robust", {}, math.log(2)),
    ("exo_pair", {}, -math.log(2) - math.log(1 - 1e-3) / 2 - math.log(1e-3) / 2), ("nca_pair", {}, 2 * math.log(2)),
    ("bco_pair", {}, 2 * math.log(2)), ("sppo_hard", dict(beta=0.1), 50.0), ("aot_unpaired", {}, math.log(2)), ("aot", {}, math.log(2)),
    ("apo_zero", {}, 1.0), ("apo_down", {}, 1.0), ("discopop", {}, (1 + math.log(2)) / 2), ("sigmoid_norm", {}, math.log(2)),
    ("kto", dict(desirable_weight=1.0, undesirable_weight=1.0), 0.5), ("kto_vanilla", {}, 0.5), ("apo_zero_unpaired", {}, 0.5),
    ("bco", {}, math.log(2)), ("kl", {}, 0.0), ("value", {}, 0.0)])
def test_values_at_the_start(name, options, expected):
    """policy = reference, no reward so far: the same value for every row, whatever its log-probs."""
    values, mask, metrics = losses.OBJECTIVES[name].loss(*start(name).values(), **options)
    assert (values - expected).abs().max() < 1e-12
    for metric in ("rewards/margins", "kl", "value/loss"):
        assert metric not in metrics or metrics[metric][0].abs().max() < 1e-12
    if "rewards/accuracies" in metrics:
        assert (metrics["rewards/accuracies"][0] == 0.5).all()


def test_values_at_equal_scores():
    x, n, one = torch.full((3,), -7.0), torch.full((3,), 5), torch.ones(3, dtype=torch.bool)
    for values, expected in ((losses.rm(x, x), math.log(2)), (losses.rm_logexp(x, x), math.log(2)), (losses.rm_hinge(x, x, x + 9), 2.0),
                             (losses.prm(torch.zeros(3, 2), torch.rand(3), one), math.log(2)), (losses.lm(torch.zeros(3, 9), n), math.log(9)),
                             (losses.rm_plackett_luce(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)), math.log(24)),
                             (losses.simpo(x, x, n, n, gamma=0.0), math.log(2)), (losses.simpo(x, x, n, n, gamma=1.0), math.log(1 + math.e)),
                             (losses.orpo(x, x, n, n, beta=0.5), 1.4 + math.log(2) / 2), (losses.cpo(x, x, n, alpha=2.0), math.log(2) + 2.8)):
        assert (values[0] - expected).abs().max() < 1e-6


def test_kto_weighs_its_classes_at_the_start():
    given = start("kto")
    values = losses.kto(*given.values(), desirable_weight=3.0, undesirable_weight=0.5)[0]
    n = len(given["policy_chosen_logps"])
    assert torch.equal(values[:n], torch.full((n,), 1.5).double()) and torch.equal(values[n:], torch.full((n + 2,), 0.25).double())


@pytest.mark.parametrize("name, options", [("ppo", {}), ("ppo", dict(dual_clip=3.0, correction="tis")), ("ppo", dict(reduction="sequence")), ("gspo", {})])
def test_at_ratio_one_a_policy_loss_is_minus_the_mean_advantage(name, options):
    given = start(name)
    values, mask, metrics = losses.OBJECTIVES[name].loss(*given.values(), **options)
    advantages, action_mask = given["advantages"], given["action_mask"]
    means = torch.where(action_mask, advantages, 0).sum(-1) / action_mask.sum(-1)
    expected = -means.sum() / len(means) if values.dim() == 1 else -advantages[action_mask].sum() / action_mask.sum()
    total, count = losses.reduced(values, mask)
    assert abs(total / count - expected) < 1e-12
    ratio, where = metrics["policy/ratio"]
    assert (ratio[where] == 1).all() and (metrics["policy/approx_kl"][0] == 0).all() and (metrics["policy/clip_fraction"][0] == 0).all()


def test_sapo_starts_with_the_gradient_of_ppo():
    given = start("sapo")
    assert (evaluate(losses.sapo, given, reduction="token")[1][0] - evaluate(losses.ppo, given)[1][0]).abs().max() < 1e-12


def test_distillation_at_student_equal_teacher():
    """The KL and the divergences are 0 there, and so is their gradient; the cross-entropy is the teacher's entropy."""
    given = start("kd")
    counted = given["label"] != -100
    for jsd_beta in (0.0, 0.5, 1.0):
        values, grads = evaluate(losses.kd, given, alpha=1.0, jsd_beta=jsd_beta, temperature=1.7)
        assert max(g.abs().max() for g in grads) < 1e-12
        p = (given["logits"] / 1.7).softmax(-1)
        entropy = -(p * p.log()).sum(-1) * 1.7**2
        assert (values - torch.where(counted, entropy if jsd_beta == 0 else 0, 0)).abs().max() < 1e-12
    assert losses.kd(*given.values())[2]["kl"][0][counted].abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


def assert_compiled_equals_eager(name: str, backend: str, options: dict = {}):
    """One graph for ten shapes: no break (fullgraph), no recompilation; the same value and gradient."""
    function = losses.OBJECTIVES[name].loss
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses.compiled.__wrapped__(function, backend=backend)
    for rows, longest in zip(range(3, 13), range(16, 6, -1)):
        given = inputs(name, rows, longest, seed=rows, dtype=torch.float32)
        (values, grads), (found, slopes) = (evaluate(f, given, **options) for f in (function, compiled))
        for a, b in zip((values, *grads), (found, *slopes), strict=True):
            assert ((a - b).abs() <= 1e-5 * (1 + a.abs())).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_compiles_whole_without_recompilation(name):
    assert_compiled_equals_eager(name, "aot_eager")


@pytest.mark.parametrize("name", REFERENCE_LOSSES)
def test_compiled_by_inductor(name):
    assert_compiled_equals_eager(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name, options, restated", CASES)
def test_every_loss_and_option_compiled_by_inductor(name, options, restated):
    assert_compiled_equals_eager(name, "inductor", options)


def test_compiled_hyperparameters_do_not_come_from_another_run():
    """Bounds of a clamp, which torch's disk cache of graphs may otherwise hand on from a run with others."""
    for options in ({}, dict(clip_eps_low=0.1, clip_eps_high=0.3)):
        torch._dynamo.reset()
        compiled = losses.compiled.__wrapped__(losses.OBJECTIVES["ppo"].loss)
        for rows in (3, 4):
            given = inputs("ppo", rows, dtype=torch.float32)
            (values, grads), (found, slopes) = (evaluate(f, given, **options) for f in (losses.ppo, compiled))
            assert (values - found).abs().max() < 1e-5 and (grads[0] - slopes[0]).abs().max() < 1e-5


def test_the_compiled_version_is_made_once():
    assert losses.compiled(losses.dpo) is losses.compiled(losses.dpo)


@pytest.mark.parametrize("name", [name if name in ("sft", "lm", "dpo", "aot", "kto", "rm_plackett_luce", "prm", "ppo") else
                                  pytest.param(name, marks=pytest.mark.slow) for name in losses.OBJECTIVES])
def test_the_compiled_version_takes_every_size(name):
    """No rows, one row, classes of one size, tokens as many as rows, with and without gradient, fp16 and fp32: graphs of their
    own, and never an error about too many of them."""
    torch._dynamo.reset()
    function, compiled = losses.OBJECTIVES[name].loss, losses.compiled.__wrapped__(getattr(losses, name), backend="eager")
    for rows, longest, dtype in [(r, n, torch.float32) for r in (0, 1, 2, 5) for n in (1, 2, 5, 7)] + [(4, 6, torch.float16)]:
        given = inputs(name, rows, longest, dtype=dtype)
        if losses.OBJECTIVES[name].data == "kto":
            for k, x in given.items():  # the undesirable ones: 0, 1, as many as the others, two more
                if "rejected" in k:
                    given[k] = x.detach()[:{1: 0, 2: 1, 5: rows}.get(longest)].requires_grad_(x.requires_grad)
        values, grads = evaluate(compiled, given)  # the version that checks its hyperparameters compiles as well
        expected, slopes = evaluate(function, given)
        assert torch.equal(values, expected) and all(torch.equal(a, b) for a, b in zip(grads, slopes))
        with torch.no_grad():
            assert torch.equal(compiled(*given.values())[0], function(*given.values())[0])


# ---------------------------------------------------------------------------------------------------------------------
# Extremes


def at_the_edge(name: str, rows: int, seed: int, magnitude: float) -> dict:
    """fp32 inputs of which any may be 0 or as far as magnitude: log-ratios, rewards and logits of ±1e4."""
    generator, given = torch.Generator().manual_seed(seed), inputs(name, rows=rows, longest=rows + 1, seed=seed, dtype=torch.float32)
    for read, x in given.items():
        if x.is_floating_point() and read not in ("step_labels", "running_reward"):
            signs = (0.0, -1.0) if read.endswith(("_logps", "log_probs")) else (1.0, 0.0, -1.0)
            drawn = torch.tensor(signs)[torch.randint(len(signs), x.shape, generator=generator)] * magnitude
            given[read] = drawn.requires_grad_(x.requires_grad)
    return given


@pytest.mark.parametrize("name, options", EVERY)
def test_finite_at_log_ratios_of_ten_thousand(name, options):
    """Value, gradient and metrics, there and on the way, in fp32 and from bf16. (An fp16 leaf cannot hold a gradient past
    65,504, which exp of a log-ratio of 12 is.)"""
    for seed, magnitude in enumerate((8.0, 15.0, 19.9, 90.0, 1e3, 1e4, 3e4)):
        for dtype in (torch.float32, torch.bfloat16):
            given = {k: x.detach().to(dtype if x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad)
                     for k, x in at_the_edge(name, 8, seed, magnitude).items()}
            values, grads = evaluate(losses.OBJECTIVES[name].loss, given, **options)
            assert values.isfinite().all() and all(g.isfinite().all() for g in grads)
            assert all(losses.reduced(*pair)[0].isfinite() for pair in losses.OBJECTIVES[name].loss(*given.values(), **options)[2].values())


@pytest.mark.parametrize("name", ["dpo", "robust", "bco_pair", "aot", "discopop", "sppo_hard", "ipo", "hinge", "cpo", "rm", "rm_logexp", "prm"])
def test_a_pair_that_is_very_wrong_has_a_gradient(name):
    """The gradient is not lost where the loss is large."""
    given = inputs(name, rows=2, dtype=torch.float32)
    wrong, right = {"rm": ("chosen_reward", "reject_reward"), "rm_logexp": ("chosen_reward", "reject_reward"),
                    "prm": ("step_logits", None)}.get(name, ("policy_chosen_logps", "policy_rejected_logps"))
    given[wrong] = torch.full_like(given[wrong], -1e4, requires_grad=True)
    if name == "prm":
        given[wrong] = torch.tensor([[1e4, 0.0]] * 2, requires_grad=True)
        given.update(step_labels=torch.ones(2), step_mask=torch.ones(2, dtype=torch.bool))
    else:
        given[right] = torch.zeros_like(given[right], requires_grad=True)
    _, grads = evaluate(losses.OBJECTIVES[name].loss, given)
    assert all(g.abs().max() > 1e-3 for g in grads)


@pytest.mark.parametrize("rows, longest", [(0, 4), (1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_empty_and_one_row_batches(name, rows, longest):
    """Of unpaired losses the other class has two rows more; of a class without rows nothing is missed."""
    given = inputs(name, rows, longest, dtype=torch.float32)
    values, grads = evaluate(losses.OBJECTIVES[name].loss, given)
    assert values.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert rows or losses.OBJECTIVES[name].data == "kto" or len(values) == 0
    _, _, metrics = losses.OBJECTIVES[name].loss(*given.values())
    for pair in metrics.values():
        total, count = losses.reduced(*pair)
        assert total.isfinite() and (count or total == 0)


@pytest.mark.parametrize("name", [n for n, o in losses.OBJECTIVES.items() if o.data == "kto"])
def test_a_step_with_one_class(name):
    """All desirable or all undesirable, no KL rows: finite, and the same as that part of a mixed step where rows do not couple."""
    loss = losses.OBJECTIVES[name].loss
    for absent in ("chosen", "rejected"):
        given = inputs(name, dtype=torch.float32)
        whole, _ = evaluate(loss, given)
        n = len(given["policy_chosen_logps"])
        empty = {k: torch.empty(0, requires_grad=x.requires_grad) if absent in k else x for k, x in given.items()}
        values, grads = evaluate(loss, empty)
        assert values.isfinite().all() and all(g.isfinite().all() for g in grads)
        if not losses.OBJECTIVES[name].coupled:
            assert torch.equal(values, whole[n:] if absent == "chosen" else whole[:n])
    if name == "kto":
        none = {k: torch.empty(0) if "KL" in k else x for k, x in given.items()}
        assert (losses.kto(*none.values())[2]["kl"][0] == 0).all()


MASKED = {"sft": "demonstration_mask", "lm": "label", "kd": "label", "rm_plackett_luce": "rank_mask", "prm": "step_mask",
          **{name: "action_mask" for name, o in losses.OBJECTIVES.items() if "action_mask" in o.reads}}


@pytest.mark.parametrize("name, options", [case.values[:2] for case in CASES if case.values[0] in MASKED])
def test_nan_at_masked_places_does_not_spread(name, options):
    """Same values as with numbers there, a gradient of exactly 0 there, and an empty mask gives 0."""
    loss, given = losses.OBJECTIVES[name].loss, inputs(name, dtype=torch.float32)
    mask = given[MASKED[name]] != -100 if MASKED[name] == "label" else given[MASKED[name]]

    def poisoned(mask):
        fill = lambda x: torch.where(mask if x.shape == mask.shape else mask[..., None], x.detach(), math.nan).requires_grad_(x.requires_grad)
        return {k: fill(x) if x.is_floating_point() and x.dim() else x for k, x in given.items()}
    plain, slopes = evaluate(loss, given, **options)
    values, grads = evaluate(loss, poisoned(mask), **options)
    assert torch.equal(values, plain) and all(torch.equal(a, b) for a, b in zip(grads, slopes))
    metrics = loss(*poisoned(mask).values(), **options)[2]
    assert all(losses.reduced(*pair)[0].isfinite() for pair in metrics.values())
    empty = poisoned(torch.zeros_like(mask))
    empty[MASKED[name]] = torch.full_like(given[MASKED[name]], -100 if MASKED[name] == "label" else False)
    values, grads = evaluate(loss, empty, **options)
    assert values.abs().sum() == 0 and all(g.abs().sum() == 0 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_half_precision_inputs_are_computed_in_fp32(name, dtype):
    given = inputs(name, dtype=dtype)
    same = {k: x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for k, x in given.items()}
    (values, grads), (expected, slopes) = (evaluate(losses.OBJECTIVES[name].loss, x) for x in (given, same))
    assert values.dtype == torch.float32 and torch.equal(values, expected)
    for a, b in zip(grads, slopes):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


def test_inputs_without_meaning_are_refused():
    x, mask = torch.zeros(3), torch.ones(3, 2, dtype=torch.bool)
    token = torch.zeros(3, 2)
    for expected, call in {
            r"exo_pair: label_smoothing = 0; expected a number in \(0, 1\)": lambda: losses.exo_pair(x, x, x, x, label_smoothing=0),
            r"label_smoothing = 0.5; expected a share": lambda: losses.robust(x, x, x, x, label_smoothing=0.5),
            r"tau = 2.0; expected a number in \(0, 1\]": lambda: losses.discopop(x, x, x, x, tau=2.0),
            r"shapes \(3,\) and \(3, 1\) differ": lambda: losses.rm(x, x, x[:, None]),
            r"shapes \(3, 1\) and \(3,\) differ": lambda: losses.dpo(x[:, None], x, x, x),
            r"step_labels are torch.int64; expected floats": lambda: losses.prm(token, x.long(), mask[:, 0]),
            r"dual_clip = 0.9; expected a number above 1": lambda: losses.ppo(token, token, token, mask, dual_clip=0.9),
            r"correction = 'tos'; expected 'tis', ": lambda: losses.ppo(token, token, token, mask, token, correction="tos"),
            r"correction = 'tis' needs rollout_log_probs": lambda: losses.ppo(token, token, token, mask, correction="tis"),
            r"reduction = 'mean'; expected 'token', ": lambda: losses.ppo(token, token, token, mask, reduction="mean"),
            r"estimator = 'k1'; expected 'k2' or 'k3' \(the gradient of 'k1' is 0": lambda: losses.kl(token, token, mask, estimator="k1"),
            r"estimator = 'k4'; expected one of 'k1'": lambda: losses.kl_estimate(token, token, mask, "k4"),
            r"dpo: label_smoothing = 1.5; expected between 0 and 1": lambda: losses.dpo(x, x, x, x, label_smoothing=1.5),
            r"beta = 0; expected above 0": lambda: losses.ipo(x, x, x, x, beta=0),
            r"an input is None that the loss needs": lambda: losses.ipo(x, x, x, x, length_normalized=True),
            r"the mask is torch.int64; expected torch.bool": lambda: losses.ppo(token, token, token, mask.long()),
            r"step_logits are \(3, 50\); expected \(S, 2\)": lambda: losses.prm(torch.zeros(3, 50), x, mask[:, 0]),
            r"a running mean is one number, and this one has shape \(3, 1\)": lambda: losses.bco_pair(x, x, x, x, x[:, None]),
            r"temperature = 0; expected above 0": lambda: losses.linear_log_probs(token, token, x.long(), temperature=0),
            r"shapes \(3,\) and \(2,\) differ$": lambda: losses.linear_log_probs(token, token, x[:2].long()),
            r"shapes \(3, 1\) and \(3, 2\) differ": lambda: losses.ppo(token, token, token[:, :1], mask),
            r"shapes \(3,\) and \(2,\) differ": lambda: losses.dpo(x, x[:2], x, x[:2]),
            r"shapes \(3,\) and \(1,\) differ": lambda: losses.simpo(x, x, x[:1].long(), x.long()),
            r"shapes \(3,\) and \(3, 2\) differ": lambda: losses.lm(torch.zeros(3, 5), token.long()),
            r"needs at least 2; found groups of 1": lambda: losses.rloo(torch.zeros(3, 1))}.items():
        with pytest.raises(ValueError, match=expected):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Properties over random shapes


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(EVERY), rows=st.integers(1, 9), longest=st.integers(1, 12), seed=st.integers(0, 10**6),
       scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]), cut=st.integers(0, 9))
def test_rows_in_any_order_and_in_any_parts(case, rows, longest, seed, scale, cut):
    """A loss that does not couple rows is the same row by row: permuted with them, and cut into two micro-batches. A coupled
    one keeps its sum when rows are permuted. All of it finite."""
    name, options = case
    o, x = losses.OBJECTIVES[name], inputs(name, rows, longest, seed, scale=scale)

    def on(take):
        part = {k: v if not v.dim() else v[take(len(v))] if "KL" not in k else v for k, v in x.items()}
        values, mask, _ = o.loss(*part.values(), **options)
        return values.detach() if mask is None else torch.where(mask, values, 0).detach()
    whole = on(lambda n: torch.arange(n))
    assert whole.isfinite().all()
    order = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(seed))
    permuted = on(lambda n: order[order < n])
    assert abs(permuted.sum() - whole.sum()) <= 1e-9 * (1 + whole.abs().sum())
    if o.coupled:
        return
    first, second = on(lambda n: torch.arange(min(cut, n))), on(lambda n: torch.arange(min(cut, n), n))
    n = len(whole) - rows - 2 if o.data == "kto" else 0  # values of two classes, one behind the other
    parts = [first[:min(cut, n)], second[:n - min(cut, n)], first[min(cut, n):], second[n - min(cut, n):]] if n else [first, second]
    joined = torch.cat(parts) if n else torch.cat([first, second])
    assert joined.shape == whole.shape and ((joined - whole).abs() <= 1e-9 * (1 + whole.abs())).all()
    if not n:
        assert ((permuted - whole[order[order < rows]]).abs() <= 1e-9 * (1 + permuted.abs())).all()


# ---------------------------------------------------------------------------------------------------------------------
# Options that combine with preference losses


def test_divergences_are_derivatives_of_their_f():
    """arXiv:2309.16240: by autograd of f(t), up to a constant, which a difference of two responses loses."""
    t = torch.linspace(0.05, 4, 50, dtype=torch.float64, requires_grad=True)
    js = t * t.log() - (t + 1) * ((t + 1) / 2).log()
    alpha = lambda a: (t**a - 1 - a * (t - 1)) / (a * (a - 1))
    for kind, f in (("forward_kl", -t.log()), ("js", js), (1, t * t.log()), (0.5, alpha(0.5)), (2.0, alpha(2.0))):
        slope = torch.autograd.grad(f.sum(), t)[0]
        found = losses.divergence(t.log(), kind).detach()
        assert ((found - found[0]) - (slope - slope[0])).abs().max() < 1e-9, kind
    x = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    for kind in ("forward_kl", "js", 0.5, 2.0, 1):
        y = losses.divergence(x, kind)
        assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    with pytest.raises(ValueError, match="f_divergence = 'kl'; expected 'forward_kl', 'js' or a number"):
        losses.divergence(x, "kl")


def preference_batch(seed=0, dtype=torch.float64):
    """A micro-batch of 3 pairs with its streams, and the same log-probs as nested lists."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 2, 3, 5, 1, 6]
    rows = [(-2 * torch.rand(2, n, generator=generator, dtype=dtype)).unbind() for n in lengths]
    batch = {"num_responses": 6, "longest": 6, "lengths": torch.tensor(lengths), "chosen": torch.tensor([0, 2, 4]),
             "rejected": torch.tensor([1, 3, 5]), "demonstrated": torch.tensor([True, False] * 3),
             "response": torch.repeat_interleave(torch.arange(6), torch.tensor(lengths)),
             "place": torch.cat([torch.arange(n) for n in lengths]), "reference_log_probs": torch.cat([r for _, r in rows])}
    outputs = {"log_probs": torch.cat([p for p, _ in rows]).requires_grad_(True),
               "collision": -torch.rand(sum(lengths), generator=generator, dtype=dtype)}
    return batch, outputs, rows


COUNTS = {"pairs": 3, "demonstrations": 3, "demonstrated_tokens": 8, "examples": 3}


def run_term(name, *changes, **hyperparameters):
    batch, outputs, rows = preference_batch()
    term = losses.bind(name, 1.0, {**losses.OBJECTIVES[name].hyperparameters, **hyperparameters})
    for option, value in changes:
        term = losses.OPTIONS[option](term, value)
    loss, metrics = losses.total([term], outputs, batch, COUNTS)
    assert torch.autograd.grad(loss, outputs["log_probs"])[0].isfinite().all()
    return loss.item(), metrics, rows


def test_readings_by_hand():
    """What each name of a loss's parameters stands for, in a micro-batch of three pairs."""
    batch, outputs, rows = preference_batch()
    available = {**batch, **outputs, "reward": torch.arange(6.0)}
    read = lambda name: losses.read(losses.READINGS[name], available)
    for name, which, first in (("policy_chosen", 0, 0), ("policy_rejected", 0, 1), ("reference_chosen", 1, 0), ("reference_rejected", 1, 1)):
        expected = [row[which].sum().item() for row in rows[first::2]]
        assert read(f"{name}_logps").tolist() == pytest.approx(expected, rel=1e-12), name
    assert read("chosen_lengths").tolist() == [4, 3, 1] and read("rejected_lengths").tolist() == [2, 5, 6]
    assert read("chosen_reward").tolist() == [0, 2, 4] and read("reject_reward").tolist() == [1, 3, 5]
    assert read("action_mask").sum(-1).tolist() == [4, 2, 3, 5, 1, 6] and read("demonstration_mask").sum(-1).tolist() == [4, 0, 3, 0, 1, 0]
    for i, (own, frozen) in enumerate(rows):
        for name, expected in (("log_probs", own), ("reference_log_probs", frozen)):
            assert read(name)[i].tolist() == [*expected.tolist(), *[0.0] * (6 - len(expected))]


def test_reference_free_takes_zero_for_the_reference():
    loss, metrics, rows = run_term("dpo", ("reference_free", True))
    expected = [math.log(1 + math.exp(-0.1 * (c.sum() - r.sum()))) for (c, _), (r, _) in zip(rows[::2], rows[1::2])]
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-12)
    term = losses.OPTIONS["reference_free"](losses.bind("dpo", 1.0, dict(beta=0.1, label_smoothing=0.0)), True)
    assert losses.streams([term]) == {"log_probs"}  # no reference is loaded for it


@pytest.mark.parametrize("option, value", [("reference_free", True), ("f_divergence", "js")])
def test_options_of_a_loss_that_reads_tokens_too(option, value, monkeypatch):
    """One of a fork: DPO that reports a KL of tokens, which takes zeros for the reference as well."""
    def watched(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, log_probs, reference_log_probs, action_mask):
        values, mask, metrics = losses.OBJECTIVES["dpo"].loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        return values, mask, {**metrics, "kl": (log_probs - reference_log_probs, action_mask)}
    reads = tuple(inspect.signature(watched).parameters)
    monkeypatch.setitem(losses.OBJECTIVES, "watched", losses.OBJECTIVES["dpo"]._replace(name="watched", loss=watched, reads=reads, hyperparameters={}))
    (loss, metrics, rows), (plain, _, _) = run_term("watched", (option, value)), run_term("dpo", (option, value))
    assert loss == plain
    if option == "reference_free":
        assert (metrics["kl"][0] / metrics["kl"][1]).item() == pytest.approx(np.concatenate([own for own, _ in rows]).mean(), rel=1e-12)


@pytest.mark.parametrize("wrong", [lambda x: x.mean(), lambda x: x[:, None] - x])
def test_a_mean_and_an_outer_product_are_no_values(wrong, monkeypatch):
    def loss(policy_chosen_logps, policy_rejected_logps):
        return wrong(policy_chosen_logps - policy_rejected_logps), None, {}
    monkeypatch.setitem(losses.OBJECTIVES, "mine", losses.OBJECTIVES["cpo"]._replace(name="mine", loss=loss, reads=("policy_chosen_logps", "policy_rejected_logps"), hyperparameters={}))
    with pytest.raises(ValueError, match=r"mine: its values have shape \(.*; expected one for each pair, response or token: no mean"):
        run_term("mine")


def test_a_loss_of_logits_alone_is_one(monkeypatch):
    """They come as what makes them, and no other input says how many values there are."""
    confidence = lambda logits: (logits.float().softmax(-1).square().sum(-1), None, {})
    mine = losses.OBJECTIVES["lm"]._replace(name="mine", loss=confidence, per=lambda: "tokens", reads=("logits",), hyperparameters={})
    monkeypatch.setitem(losses.OBJECTIVES, "mine", mine)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    loss, _ = losses.total([losses.bind("mine", 1.0, {})], {"logits": losses.Projected(hidden, weight)}, {}, {"tokens": 5})
    assert loss.item() == pytest.approx((hidden @ weight.T).softmax(-1).square().sum().item() / 5, rel=1e-5)


def test_a_hyperparameter_has_a_default():
    for mine in (lambda log_probs, *, scale: None, lambda log_probs, *, scale=None: None):
        with pytest.raises(TypeError, match="scale needs a default"):
            losses.objective("preference", "pairs")(mine)
    assert "<lambda>" not in losses.OBJECTIVES


def test_ld_alpha_weighs_the_tokens_past_the_shorter_response():
    loss, metrics, rows = run_term("dpo", ("ld_alpha", 0.3))
    expected = 0
    for (c, rc), (r, rr) in zip(rows[::2], rows[1::2]):
        n = min(len(c), len(r))
        summed = lambda x: x[:n].sum() + 0.3 * x[n:].sum()
        expected += math.log(1 + math.exp(-0.1 * (summed(c) - summed(rc) - summed(r) + summed(rr)))) / 3
    assert loss == pytest.approx(expected, rel=1e-12)
    plain = sum(p.sum().item() for p, _ in rows[::2])
    assert metrics["logps/chosen"][0].item() == pytest.approx(plain)  # reported as they are
    assert run_term("dpo", ("ld_alpha", 1.0))[0] == pytest.approx(run_term("dpo")[0], rel=1e-12)


@pytest.mark.parametrize("kind, f", [("forward_kl", lambda x: 1 - math.exp(-x)), ("js", lambda x: math.log(2 / (1 + math.exp(-x)))),
                                     (0.3, lambda x: (math.exp(-0.7 * x) - 1) / -0.7)])
@pytest.mark.parametrize("name", ["dpo", "nca_pair"])
def test_f_divergence_takes_the_place_of_log_ratios(name, kind, f):
    """Of every loss of log-ratios, those included that use them apart (nca_pair)."""
    loss, metrics, rows = run_term(name, ("f_divergence", kind))
    softplus, expected = lambda x: math.log(1 + math.exp(x)), 0
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        c, r = (0.1 * f((p - q).sum().item()) for p, q in (chosen, rejected))
        expected += (softplus(r - c) if name == "dpo" else softplus(-c) + softplus(c) / 2 + softplus(r) / 2) / 3
    assert loss == pytest.approx(expected, rel=1e-9)


def test_wpo_weighs_pairs_by_the_policy():
    loss, metrics, rows = run_term("dpo", ("wpo", True))
    batch, outputs, _ = preference_batch()
    gaps = [(a - b).mean().item() for a, b in zip(outputs["log_probs"].split(batch["lengths"].tolist()), outputs["collision"].split(batch["lengths"].tolist()))]
    expected = 0
    for i in range(3):
        (c, rc), (r, rr) = rows[2 * i], rows[2 * i + 1]
        expected += math.exp(gaps[2 * i] + gaps[2 * i + 1]) * math.log(1 + math.exp(-0.1 * (c.sum() - rc.sum() - r.sum() + rr.sum()))) / 3
    assert loss == pytest.approx(expected, rel=1e-9)


def test_options_combine():
    """LD-DPO's sums, under a divergence, weighed: by hand."""
    loss, _, rows = run_term("hinge", ("ld_alpha", 0.3), ("f_divergence", "js"), ("wpo", True))
    batch, outputs, _ = preference_batch()
    gaps = [(a - b).mean().item() for a, b in zip(outputs["log_probs"].split(batch["lengths"].tolist()), outputs["collision"].split(batch["lengths"].tolist()))]
    f, expected = lambda x: math.log(2 / (1 + math.exp(-x))), 0
    for i in range(3):
        (c, rc), (r, rr) = rows[2 * i], rows[2 * i + 1]
        n = min(len(c), len(r))
        summed = lambda x: (x[:n].sum() + 0.3 * x[n:].sum()).item()
        expected += math.exp(gaps[2 * i] + gaps[2 * i + 1]) * max(0, 1 - 0.1 * (f(summed(c) - summed(rc)) - f(summed(r) - summed(rr)))) / 3
    assert loss == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="f_divergence = 'js' compares the policy with its reference, which reference_free leaves out"):
        run_term("hinge", ("reference_free", True), ("f_divergence", "js"))


@pytest.mark.parametrize("name", [n for n, o in losses.OBJECTIVES.items() if o.data == "preference" and not o.coupled and "policy_chosen_logps" in o.reads])
def test_options_stay_finite_at_extremes(name):
    """Every option on every loss it means something to, log-ratios of ±1e4 among them: value, gradient and metrics."""
    for option, value in (("reference_free", True), ("ld_alpha", 0.5), ("wpo", True), *(("f_divergence", kind) for kind in ("forward_kl", "js", 0.5, 2.0))):
        batch, outputs, _ = preference_batch(dtype=torch.float32)
        wild = torch.where(torch.arange(21) % 4 == 0, -1e4, outputs["log_probs"].detach()).requires_grad_(True)
        batch["reference_log_probs"] = torch.where(torch.arange(21) % 5 == 0, -1e4, batch["reference_log_probs"])
        term = losses.OPTIONS[option](losses.bind(name, 1.0, losses.OBJECTIVES[name].hyperparameters), value)
        loss, metrics = losses.total([term], {**outputs, "log_probs": wild}, {**batch, "running_reward": torch.tensor(0.1)}, COUNTS)
        assert loss.isfinite() and torch.autograd.grad(loss, wild)[0].isfinite().all(), option
        assert all(total.isfinite() for total, _ in metrics.values()), option


@pytest.mark.parametrize("option", [None, ("ld_alpha", 0.5), ("wpo", True)])
def test_long_responses_are_summed_without_rounding(option):
    """dpo of a pair of 5,000 fp32 log-probs each against the same in float64: an fp32 sum of 10,000 nats has an ulp of 1e-3."""
    generator, n = torch.Generator().manual_seed(0), 5000
    policy, reference = (-2 - torch.rand(2 * n, generator=generator) for _ in range(2))
    sides = {side: torch.tensor([i]) for i, side in enumerate(("chosen", "rejected"))}
    batch = {**sides, "num_responses": 2, "longest": n, "lengths": torch.tensor([n, n]), "response": torch.arange(2 * n) // n,
             "place": torch.arange(2 * n) % n}
    term = losses.bind("dpo", 1.0, losses.OBJECTIVES["dpo"].hyperparameters)
    term = losses.OPTIONS[option[0]](term, option[1]) if option else term

    def loss(to):
        streams = {"log_probs": policy, "reference_log_probs": reference, "collision": policy - 0.1}
        return losses.total([term], {name: x.to(to) for name, x in streams.items()}, batch, {"pairs": 1})[0].item()
    assert loss(torch.float32) == pytest.approx(loss(torch.float64), abs=1e-9, rel=1e-6 if option == ("wpo", True) else 1e-12)


def test_metrics_of_two_losses_stay_apart():
    batch, outputs, _ = preference_batch()
    made = [losses.bind(name, 1.0, {**losses.OBJECTIVES[name].hyperparameters, "beta": beta}) for name, beta in (("dpo", 0.1), ("hinge", 0.3))]
    metrics = losses.total(made, outputs, batch, COUNTS)[1]
    assert metrics["hinge/rewards/margins"][0].item() == pytest.approx(3 * metrics["rewards/margins"][0].item(), rel=1e-12)
    assert {"logps/chosen", "loss/dpo", "loss/hinge"} <= metrics.keys() and "hinge/logps/chosen" not in metrics


def test_coupled_shares_add_up_to_the_whole():
    """aot of three pairs in one micro-batch, and in two with the other's readings: one loss, one gradient, one metric."""
    batch, outputs, _ = preference_batch()
    term = losses.bind("aot", 1.0, losses.OBJECTIVES["aot"].hyperparameters)
    read = {name: losses.read(r, {**batch, **outputs}) for name, r in term.reads.items()}
    empty = {name: (x[:0].detach(), x[:0].detach()) for name, x in read.items()}
    whole, metrics = losses.total([term], outputs, {**batch, "step": losses.Step(1, empty)}, COUNTS)
    slope, = torch.autograd.grad(whole, outputs["log_probs"])
    shares, slopes, counted = 0, 0, 0
    for pairs in (slice(0, 1), slice(1, 3)):
        others = {n: (x[:pairs.start].detach(), x[pairs.stop:].detach()) for n, x in read.items()}
        part = {**batch, "chosen": batch["chosen"][pairs], "rejected": batch["rejected"][pairs], "step": losses.Step(2, others)}
        share, m = losses.total([term], outputs, part, COUNTS)
        slopes = slopes + torch.autograd.grad(share, outputs["log_probs"])[0]
        shares, counted = shares + share.item(), counted + torch.stack(m["rewards/margins"])
    assert shares == pytest.approx(whole.item(), rel=1e-12) and (slopes - slope).abs().max() < 1e-12
    assert (counted - torch.stack(metrics["rewards/margins"])).abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 5), longest=st.integers(1, 9), seed=st.integers(0, 10**6), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_td_errors_over_action_tokens(rows, longest, seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, longest, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, longest, generator=generator) < 0.6
    advantages, returns = losses.gae(torch.where(mask, rewards, math.nan), torch.where(mask, values, math.nan), mask, gamma, lam)
    for i in range(rows):
        r, v = rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist() + [0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(r))) for t in range(len(r))]
        assert advantages[i][mask[i]].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert returns[i][mask[i]].tolist() == pytest.approx([a + b for a, b in zip(expected, v)], rel=1e-9, abs=1e-12)
        to_go = [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
        assert losses.discounted(rewards, mask, gamma)[i][mask[i]].tolist() == pytest.approx(to_go, rel=1e-9, abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    for g, row in enumerate(rewards.tolist()):
        others = [(sum(row) - r) / 3 for r in row]
        mean, std = sum(row) / 4, math.sqrt(sum((r - sum(row) / 4) ** 2 for r in row) / 3)
        assert losses.rloo(rewards)[g].tolist() == pytest.approx([r - o for r, o in zip(row, others)])
        assert losses.group_norm(rewards)[g].tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in row])
        assert losses.group_center(rewards)[g].tolist() == pytest.approx([r - mean for r in row])
    assert (losses.group_norm(torch.ones(3, 1)) == 0).all()
    for equal in (0.1, 0.7, 1e4 / 3):  # no signal, not that of rounding over eps
        assert all((f(torch.full((5, 7), equal)) == 0).all() for f in (losses.group_norm, losses.group_center, losses.rloo))
    assert (losses.group_norm(rewards)[0] - (rewards[0] - rewards[0].mean()) / (rewards[0].std() + 1e-6)).abs().max() < 1e-12


def test_whitening_is_over_all_ranks_and_the_mask():
    x = torch.randn(4, 6, dtype=torch.float64) * 3 + 5
    mask = torch.rand(4, 6) < 0.7
    poisoned = torch.where(mask, x, math.nan)
    expected = torch.where(mask, (x - x[mask].mean()) / (x[mask].var(correction=0) + 1e-8).sqrt(), 0)
    assert (losses.whiten(poisoned, mask) - expected).abs().max() < 1e-12
    sums = torch.stack([mask.sum().double(), x[mask].sum()]), (x[mask] - x[mask].mean()).square().sum()
    for rank in (slice(0, 2), slice(2, 4)):  # each gets the sums of both
        answers = iter(sums)
        assert (losses.whiten(poisoned[rank], mask[rank], lambda own: next(answers)) - expected[rank]).abs().max() < 1e-12
    assert (losses.whiten(poisoned, torch.zeros_like(mask)) == 0).all()


def test_kl_estimates_are_those_of_the_blog_post():
    """k1 and k3 have the KL for their mean; k2 is half a square."""
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    ones = torch.ones(1, 50, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        assert abs((p.exp() * losses.kl_estimate(p[None], q[None], ones, estimator)).sum() - exact) < 1e-12
    assert torch.equal(losses.kl_estimate(p[None], q[None], ones, "k2")[0], (p - q) ** 2 / 2)


# ---------------------------------------------------------------------------------------------------------------------
# On plain tensors


def test_losses_need_torch_alone(tmp_path):
    """Copied into an empty folder, with nothing else of the repo on the path, every loss imports and works."""
    (tmp_path / "losses.py").write_text((ROOT / "losses.py").read_text())
    code = (f"import sys; sys.path.insert(0, '.'); import torch; from losses import {', '.join(losses.OBJECTIVES)}\n"
            "x = torch.zeros(3); print(dpo(x, x, x, x)[0][0].item(), kto(x, x, x, x, x, x)[0][0].item())\n"
            f"assert not any(getattr(m, '__file__', None) and m.__file__.startswith({str(ROOT)!r}) for m in sys.modules.values())")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "0.6931471824645996 0.5", done.stderr


def test_logits_of_a_padded_batch():
    """GPTLMLoss's convention: labels are the input ids, the logits of a place predict the token after it."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 7, 13, generator=generator), torch.randint(13, (2, 7), generator=generator)
    labels[0, :3] = labels[1, :5] = -100
    values, mask, _ = losses.lm(logits, losses.next_label(labels))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    total, count = losses.reduced(values, mask)
    assert count == (labels[:, 1:] != -100).sum() and abs(total / count - expected) < 1e-6


def test_a_teacher_with_a_padded_vocabulary_and_banned_tokens():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(4, 10, generator=generator, requires_grad=True), torch.randn(4, 16, generator=generator)
    label = torch.tensor([1, 2, 3, -100])
    values = losses.kd(logits, teacher, label, alpha=1.0)[0]
    assert torch.equal(values, losses.kd(logits, teacher[:, :10], label, alpha=1.0)[0])
    banned = teacher[:, :10].clone()
    banned[:, 7] = -math.inf
    for jsd_beta in (0.0, 0.4, 1.0):
        for student in (logits, torch.where(torch.arange(10) == 5, -math.inf, logits)):
            values, mask, metrics = losses.kd(student, banned, label, alpha=1.0, jsd_beta=jsd_beta)
            assert values.isfinite().all() and torch.autograd.grad(values.sum(), logits, retain_graph=True)[0].isfinite().all()
