"""Rollouts as a data source: prompts are answered, the answers rewarded, and the loop gets them as examples with columns.

`generate` is also what eval, `sample.py generate` and `sample.py chat` use. With a given model, an answer depends on its key alone
(seed, place of its prompt in the run, number of the answer): not on the ranks, nor on what it is batched with.

Shapes: B rows of a batch, C positions of the KV cache, H query heads, K key-value heads, E head width, V vocabulary;
R responses, L longest response, n responses per prompt.
"""
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import data
import losses
import model
import reference
import report
import reward

# ---------------------------------------------------------------------------------------------------------------------
# Generation


class Sampling(NamedTuple):
    """What tokens are sampled from: softmax(logits / temperature), filtered by top-k, top-p and min-p in this order."""
    temperature: float = 1.0  # 0: greedy, the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest most likely tokens whose total probability reaches this
    min_p: float = 0.0  # keep tokens with at least this fraction of the most likely one's probability

    @classmethod
    def of(cls, cfg) -> "Sampling":
        return cls(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)


GREEDY = Sampling(0.0)
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # not cuDNN's: it plans each shape anew


class Answer(NamedTuple):
    ids: list[int]  # including the token that ended it
    log_probs: list[float]  # under softmax(logits / temperature), before top-k, top-p and min-p
    ended: bool  # by a stop token or a stop string, not by running out of tokens


class Slots:
    """The rows (slots) of a decoding batch, each holding an answer in progress or free; the slot is every array's first dimension.
    On the host: `answer`, its index (-1: free); `born`, the step when it began; `head`, how many tokens its prompt has."""

    def __init__(self, decoder, size: int, capacity: int, room: int):
        shape, weight = decoder.shape, decoder.lm_head.weight
        low = model.compute_dtype(weight)
        self.room, self.capacity = room, capacity
        self.answer, self.born, self.head = np.full(size, -1), np.zeros(size, int), np.zeros(size, int)
        with torch.device(weight.device):
            self.cache = [torch.zeros(size, shape.num_kv_heads, capacity, shape.head_dim, dtype=low)
                          for _ in range(2 * shape.num_layers)]
            self.logits, self.uniform = torch.zeros(size, shape.vocab_size, dtype=low), torch.zeros(size, room + 1)
            self.token, self.place, self.age, self.length = torch.zeros(4, size, dtype=torch.int64)  # place: where the next goes
            self.ended, self.done = torch.zeros(2, size, dtype=torch.bool)  # length and ended are valid where done
            self.tokens = torch.zeros(size, room + 1, dtype=torch.int64)  # last column: discarded tokens, after a full answer
            self.log_probs = torch.zeros(size, room + 1, dtype=torch.promote_types(low, torch.float32))

    def live(self) -> list[int]:
        return np.flatnonzero(self.answer >= 0).tolist()

    def begin(self, decoder, prompts: list[list[int]], answers: np.ndarray, of: np.ndarray, numbers: list[np.ndarray], now: int):
        """Start answers in free slots; answers[i] is to prompts[of[i]]. numbers: each one's random numbers, or [] if greedy."""
        free = np.flatnonzero(self.answer < 0)[:len(answers)]
        asked, first, which = np.unique(of, return_index=True, return_inverse=True)
        slots, lengths = torch.from_numpy(free).to(self.place.device), np.array([len(prompts[i]) for i in of])
        with torch.compiler.set_stance("force_eager"):  # its varying shapes would use up the blocks' recompilations
            logits = prefill(decoder, self.cache, [prompts[i] for i in asked], slots[first])
        for part in self.cache if len(asked) < len(of) else ():
            part[slots, :, :lengths.max()] = part[slots[first][which], :, :lengths.max()]
        self.logits[slots] = logits[which]
        self.answer[free], self.born[free], self.head[free] = answers, now, lengths
        self.place[slots] = torch.from_numpy(lengths).to(slots.device)
        self.age[slots], self.done[slots] = 0, False
        if numbers:
            self.uniform[slots, :self.room] = torch.from_numpy(np.stack(numbers)).to(slots.device)

    def take(self, token: Tensor, log_prob: Tensor, stops: Tensor):
        """Append the next token (B,) of each slot, with its log-prob (B,). stops (V,): whether a token ends an answer."""
        self.tokens.scatter_(1, self.age[:, None], token[:, None])
        self.log_probs.scatter_(1, self.age[:, None], log_prob[:, None])
        self.token, self.age = token, (self.age + 1).clamp(max=self.room)
        full = (self.age == self.room) | (self.place + 1 >= self.capacity)
        self.end(~self.done & (stops[token] | full), self.age, stops[token])

    def end(self, over: Tensor, length: Tensor, ended: Tensor):
        """Finish the answers in `over` (B,), each with `length` tokens. Slots decode on at position 0, seen in any window."""
        self.length, self.ended, self.done = (
            torch.where(over, length, self.length), torch.where(over, ended, self.ended), self.done | over)
        self.place = torch.where(self.done, 0, self.place)

    def finished(self) -> dict[int, Answer]:
        """The answers finished since the last call, by index; their slots become free. Waits for the device."""
        slots, found = [slot for slot, done in enumerate(self.done.tolist()) if done and self.answer[slot] >= 0], {}
        parts = (x[slots].tolist() for x in (self.tokens, self.log_probs, self.length, self.ended)) if slots else ()
        for slot, ids, log_probs, length, ended in zip(slots, *parts):
            if not all(map(math.isfinite, log_probs[:length])):
                raise ValueError("the model's logits are not finite: it has diverged; go back to an older checkpoint, or lower lr")
            found[int(self.answer[slot])] = Answer(ids[:length], log_probs[:length], ended)
        self.answer[slots] = -1
        return found

    def keep(self, live: list[int]):
        """Keep only these slots, which shrinks the batch."""
        for i, part in enumerate(self.cache):
            self.cache[i] = part[live]
        for name, x in vars(self).items():
            if isinstance(x, (Tensor, np.ndarray)):
                setattr(self, name, x[live])


@torch.no_grad()
def generate(decoder, prompts: list[list[int]], *, max_new_tokens: int, stop: set[int], n: int = 1, sampling: Sampling = GREEDY,
             keys: list[tuple] | None = None, strings: tuple = (), text: Callable | None = None, batch: int = 256,
             check: int = 16, compiled: bool = False, longest: int = 0, watch: Callable | None = None, show: str = ""
             ) -> list[list[Answer]]:
    """n answers to each prompt (a list of ids); answers to the same prompt that begin together share one prefill.

    An answer ends at a token of `stop`, or where `text(ids)` contains one of `strings`. keys: integers that seed the random
    numbers of each prompt. batch: answers at a time. Every `check` tokens the host checks which are done; waiting ones take
    their slots, and when none is waiting, the batch shrinks. compiled: a decoding step is one graph, of a fixed batch size;
    longest: tokens of the longest prompt of any call, to fix the graph's shapes. watch(answer, ids) is called at each of these
    checks for every answer in progress or just ended. show: name of the progress bar.
    """
    if not prompts:
        return []
    keys, count, weight = keys or [(0, i) for i in range(len(prompts))], n * len(prompts), decoder.lm_head.weight
    capacity = -(-(max(longest, *map(len, prompts)) + max_new_tokens) // 64) * 64
    if decoder.shape.gpt2:  # learned positions end
        capacity = min(capacity, decoder.shape.max_positions)
        if (most := max(map(len, prompts))) > capacity:
            raise ValueError(f"a prompt has {most} tokens, and the model has {capacity} positions; shorten it or lower max_length")
    slots = Slots(decoder, min(batch, count), capacity, max_new_tokens)
    step, stance = (losses.compiled(decode, dynamic=False), "default") if compiled else (decode, "force_eager")
    stops = torch.isin(torch.arange(len(weight), device=weight.device), torch.tensor(sorted(stop), device=weight.device))
    answers, begun, now, ends = {}, 0, 0, set()  # now: decoding steps so far; ends: steps when answers reach their limit
    bar = report.bar(what=show, show=bool(show), total=count * max_new_tokens)
    while len(answers) < count:
        some = np.arange(begun, min(begun + len(slots.answer) - len(slots.live()), count))
        if len(some) and (4 * len(some) >= len(slots.answer) or some[-1] + 1 == count):  # fewer would not be worth it
            numbers = [np.random.default_rng((*keys[i // n], i % n)).random(max_new_tokens, np.float32)
                       for i in some.tolist()] if sampling.temperature else []
            slots.begin(decoder, prompts, some, some // n, numbers, now)
            begun += len(some)
            ends.add(now + max_new_tokens)
        token, log_prob = pick(slots.logits, slots.uniform.gather(1, slots.age[:, None])[:, 0], sampling)
        slots.take(token, log_prob, stops)
        now += 1
        if now % check == 0 or now in ends:
            if strings or watch:
                look(slots, strings, text, watch)
            answers |= slots.finished()
            live = slots.live()
            bar.update(len(answers) * max_new_tokens + int((now - slots.born[live]).sum()) - bar.n)
            if not compiled and begun == count and 0 < 4 * len(live) < 3 * len(slots.answer):
                slots.keep(live)
        if live := slots.live():
            seen = capacity if compiled else min(capacity, int((slots.head + now - slots.born)[live].max()))
            with torch.compiler.set_stance(stance), sdpa_kernel(KERNELS):
                slots.logits = step(decoder, slots.cache, slots.token, slots.place, seen)
            slots.place = slots.place + 1
    bar.close()
    return [[answers[n * i + j] for j in range(n)] for i in range(len(prompts))]


def answers_to(prompts: list[list[int]], decoder, tokenizer: data.Tokenizer, cfg, **options) -> list[list[Answer]]:
    """`generate` with the config's answer length, stop strings and batch size, and the tokenizer's stop tokens."""
    return generate(decoder, prompts, max_new_tokens=cfg.max_new_tokens, stop=tokenizer.stops, strings=cfg.stop,
                    text=tokenizer.decode, batch=cfg.rollout_batch, **options)


def prefill(decoder, cache: list[Tensor], prompts: list[list[int]], slots: Tensor) -> Tensor:
    """Write the keys and values of P prompts into these slots (P,) of every layer's cache (B, K, C, E), at their positions, and
    return the logits after each prompt (P, V). Prompts go through packed attention, about 8,192 tokens at a time."""
    shape, device, dtype = decoder.shape, slots.device, cache[0].dtype
    pieces, last = np.cumsum([len(p) for p in prompts]) // 8192, []
    for piece in np.unique(pieces):
        members = np.flatnonzero(pieces == piece)
        lengths = np.array([len(prompts[i]) for i in members])
        begins = np.cumsum(lengths) - lengths
        spans = [(int(begin), int(length), int(begin), 0) for begin, length in zip(begins, lengths)]
        batch = data.to_device({
            "tokens": np.concatenate([prompts[i] for i in members]).astype(np.int64), "row": np.repeat(members, lengths),
            "positions": np.concatenate([np.arange(length) for length in lengths]), "last": begins + lengths - 1,
            **(data.varlen_segments if data.varlen(device.type, dtype) else data.grouped_segments)(spans)}, device.type)
        rows = slots[batch["row"]]

        def attend(layer, q, k, v):
            for part, new in zip(cache[2 * layer:2 * layer + 2], (k, v)):
                part[rows, :, batch["positions"]] = new.to(dtype)
            return model.packed_attention(q, k, v, batch, shape.windows[layer])

        last.append(decoder.model(batch["tokens"], batch["positions"], attend)[batch["last"]])
    return decoder.lm_head(torch.cat(last))


def decode(decoder, cache: list[Tensor], tokens: Tensor, positions: Tensor, seen: int) -> Tensor:
    """One decoding step: tokens (B,) at positions (B,) -> logits of the next tokens (B, V). Updates the KV cache in place; attends
    to its first `seen` positions. Query heads that share a key-value head are grouped as its queries, so that no key is copied."""
    shape, each = decoder.shape, torch.arange(len(tokens), device=tokens.device)
    distance = positions[:, None] - torch.arange(seen, device=tokens.device)  # (B, C)
    masks = {window: ((distance >= 0) & (distance < window if window else True))[:, None, None] for window in set(shape.windows)}

    def attend(layer, q, k, v):
        keys, values = cache[2 * layer], cache[2 * layer + 1]
        keys[each, :, positions], values[each, :, positions] = k.to(keys.dtype), v.to(keys.dtype)
        q = q.to(keys.dtype).unflatten(1, (shape.num_kv_heads, -1))  # (B, K, H/K, E)
        return F.scaled_dot_product_attention(
            q, keys[:, :, :seen], values[:, :, :seen], attn_mask=masks[shape.windows[layer]]).flatten(1, 2)

    return decoder.lm_head(decoder.model(tokens, positions, attend))


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(B, V) logits and (B,) random numbers in [0, 1) -> a token for each row and its log-prob, sampled by inverting the
    cumulative distribution: one random number per token."""
    logits = losses.wide(logits)
    logps = (logits if sampling.temperature in (0, 1) else logits / sampling.temperature).log_softmax(-1)
    if sampling.temperature:
        total = truncated(logps, sampling).exp().cumsum(-1)
        below = total[:, -1:].nextafter(total.new_zeros(()))  # the product below may round up to the total
        token = torch.searchsorted(total, (uniform[:, None].to(total) * total[:, -1:]).minimum(below), right=True)[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)  # the index is V if logits are not finite
    else:
        token = logits.argmax(-1)
    return token, logps.gather(1, token[:, None])[:, 0]


def truncated(logps: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) log-probs with -inf for what top-k, top-p and min-p leave out; the most likely token always stays."""
    if 0 < sampling.top_k < logps.shape[1]:
        logps = logps.masked_fill(logps < logps.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        p, order = logps.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= sampling.top_p
        beyond[:, 0] = False
        logps = logps.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        logps = logps.masked_fill(logps < logps.max(-1, keepdim=True).values + math.log(sampling.min_p), -torch.inf)
    return logps


def look(slots: Slots, strings: tuple, text: Callable | None, watch: Callable | None):
    """On the host: end each answer whose text contains a stop string at the token that completed it, and call watch."""
    lengths, over = torch.where(slots.done, slots.length, slots.age).tolist(), [False] * len(slots.answer)
    tokens = slots.tokens[:, :max(lengths)].tolist()
    for slot in slots.live():
        ids = tokens[slot][:lengths[slot]]

        def holds(end):
            said = text(ids[:end])
            return any(string in said for string in strings)
        if strings and holds(len(ids)):
            over[slot], lengths[slot] = True, next(end for end in range(1, len(ids) + 1) if holds(end))
        if watch:
            watch(int(slots.answer[slot]), ids[:lengths[slot]])
    if any(over):
        over, lengths = (torch.tensor(x, device=slots.done.device) for x in (over, lengths))
        slots.end(over, lengths, over)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


def shaped(rewards: Tensor, size: Tensor, ended: Tensor, cfg) -> Tensor:
    """Rewards (R,) clipped to reward_clip, minus the penalties for missing EOS and for length (DAPO, arXiv:2503.14476 eq. 13).
    size, ended (R,): an answer's number of tokens; 1 where it ended, else 0."""
    scores = rewards.clamp(-cfg.reward_clip, cfg.reward_clip) if cfg.reward_clip else rewards
    over = (size - (cfg.max_new_tokens - cfg.overlong_buffer)).clamp(min=0) / max(cfg.overlong_buffer, 1)
    return scores - cfg.missing_eos_penalty * (1 - ended) - (cfg.overlong_penalty * over if cfg.overlong_buffer else 0)


class Group(NamedTuple):
    """A prompt and its answers."""
    example: int  # its index in the dataset of prompts
    answers: list[Answer]
    rewards: list[float]  # nan: it could not be had
    parts: dict  # of a weighted sum: "reward/NAME" -> each answer's reward of that name, None where it does not apply


class Rollout(NamedTuple):
    """Answers to the prompts of the next few steps, the same on every rank."""
    groups: list[Group]
    dataset: data.Dataset  # an example is a prompt with its answers, or with as many of them as a stream holds
    pieces: list  # for each group, the indices of its examples
    columns: dict[str, Tensor]  # name -> a value for each action token, in the dataset's order
    metrics: dict[str, float]


def written(tokenizer: data.Tokenizer, answer: Answer) -> str:
    """The text of an answer, without the token that ended it."""
    return tokenizer.decode(answer.ids[:-1] if answer.ids[-1] in tokenizer.stops else answer.ids)


def trees_of(prompts: list[data.Example], answers: list[list[Answer]]) -> list[data.Example]:
    """Prompts with their answers as responses."""
    return [data.with_responses(e, [np.array(answer.ids, np.int32) for answer in some]) for e, some in zip(prompts, answers)]


def answered(tokenizer: data.Tokenizer, prompts: list[data.Example], answers: list[list[Answer]]) -> tuple[list, list]:
    """Prompts with their answers as responses, and the answers' texts: what a reward is asked about."""
    return trees_of(prompts, answers), [[written(tokenizer, answer) for answer in some] for some in answers]


class Rollouts:
    """The steps of a run whose rows are prompts: every few steps, new answers are sampled from the current policy."""
    provides = frozenset({"old_log_probs", "rollout_log_probs", "reference_log_probs", "old_values", "advantages", "returns"})

    def __init__(self, run):
        cfg = self.cfg = run.cfg
        self.machine, self.decoder, self.tokenizer, self.layout = run.machine, run.decoder, run.tokenizer, run.layout
        self.prompts, self.size = run.datasets["train"], cfg.rollout_prompts or cfg.batch_size
        self.steps = self.size // cfg.batch_size * cfg.rollout_epochs  # steps on a rollout
        self.per_epoch = -(-len(self.prompts) // cfg.batch_size) * cfg.rollout_epochs
        self.asked = self.size  # prompts that the current rollout asks for
        self.examples = len(self.prompts)
        self.rewards = reward.rewards(cfg, run.machine, run.tokenizer, run.folder_of)
        once = self.steps == 1 and not cfg.kl_coef  # a single update computes the old log-probs itself
        self.outputs = ["log_probs"] * (not once) + ["values"] * ("values" in run.streams)
        self.reference = reference.frozen_reference(run) if cfg.kl_coef or "reference_log_probs" in run.streams else None
        self.unchecked = {"old_values": run.folder_of(cfg.critic or cfg.init_from),  # column -> the model that it comes from
                          "reference_log_probs": reference.reference_folder(run)}
        for decoder in [self.decoder] + [self.reference] * bool(self.reference):
            decoder.temperature = cfg.temperature
        if (cfg.top_k or cfg.top_p < 1 or cfg.min_p) and run.machine.rank == 0:
            print("warning: top_k, top_p and min_p cut off the distribution that answers are drawn from; losses use all of it")
        self.sampler, self.longest = None, max(len(e.prompt) for e in self.prompts.examples)
        self.drawn, self.kl_coef, self.now = 0, cfg.kl_coef, None  # prompts drawn so far
        self.warned = False  # of rewards that are clipped

    @property
    def metrics(self) -> dict[str, float]:
        return self.now.metrics

    def rows(self, step: int) -> tuple[data.Dataset, np.ndarray]:
        """The dataset and the examples of a step, counted from 0. The first step of a rollout generates its answers."""
        nth, self.asked = self.place(step)
        if nth == 0:
            self.now = self.make()
        epoch, minibatch = divmod(nth, self.minibatches)
        order = np.random.default_rng((self.cfg.seed, self.drawn, epoch)).permutation(len(self.now.groups))
        mine = np.array_split(order, self.minibatches)[minibatch]
        return self.now.dataset, np.concatenate([self.now.pieces[i] for i in mine])

    def place(self, step: int) -> tuple[int, int]:
        """Which of its rollout's steps a step is, both counted from 0, and how many prompts this rollout asks for: the
        last one of an epoch takes those that are left, and fewer steps. (What filter_rounds draws comes on top.)"""
        rollout, nth = divmod(step % self.per_epoch, self.steps)
        return nth, min(self.size, len(self.prompts) - rollout * self.size)

    @property
    def minibatches(self) -> int:
        """Steps of one pass over the current rollout's answers."""
        return -(-self.asked // self.cfg.batch_size)

    def add(self, batches: list[dict]):
        """Add the rollout's columns to the micro-batches of a step."""
        for batch in batches:
            batch["old_log_probs"] = None
            batch.update({name: column[batch["scored_index"]] for name, column in self.now.columns.items()})

    def make(self) -> Rollout:
        cfg, drawn, clock, begin = self.cfg, [], Counter(), time.perf_counter()
        self.sampler = copied(self.decoder, self.sampler, self.machine.dtype)
        short = self.asked < self.size  # of an epoch's last prompts, none may have a reward: others then stand in
        for i in range(1 + cfg.filter_rounds + short):
            first, stand_in = self.drawn + len(drawn), i > cfg.filter_rounds
            count = min(self.size, len(self.prompts)) if stand_in else self.asked
            drawn += self.draw(range(first, first + count), clock)
            valid = [g for g in drawn if not any(map(math.isnan, g.rewards))]
            varied = [g for g in valid if max(g.rewards) > min(g.rewards)]
            kept = varied if cfg.filter_groups else valid
            if len(kept) >= self.asked or i >= cfg.filter_rounds and len(valid) >= self.minibatches:
                break
        if not valid:
            raise ValueError(f"none of the {len(drawn)} prompts of a rollout has rewards for all of its answers; see bad_rewards")
        rest = [g for g in valid if cfg.filter_groups and max(g.rewards) == min(g.rewards)]
        groups = [*kept, *rest[:max(0, self.minibatches - len(kept))]][:self.asked]  # a step wants at least one
        if len(groups) < self.minibatches:
            raise ValueError(f"only {len(groups)} of {len(drawn)} prompts of a rollout have rewards for all of their answers, "
                             f"too few for its {self.minibatches} steps; see bad_rewards")
        every = [x for g in valid for x in g.rewards]
        clipped = float(np.mean(np.abs(every) > (cfg.reward_clip or math.inf)))
        if clipped and not self.warned and self.machine.rank == 0:
            print(f"warning: {clipped:.0%} of the rewards are beyond reward_clip = {cfg.reward_clip:g} and are clipped to it; "
                  f"--reward_clip=0 turns this off", file=sys.stderr)
            self.warned = True
        metrics = {"reward": float(np.mean(every)), "reward/std": float(np.std(every)), "reward/clipped": clipped,
                   "rollout/skipped": len(drawn) - len(valid), "rollout/kept": len(kept) / len(valid)}
        if cfg.samples_per_prompt > 1:
            metrics["frac_reward_zero_std"] = (len(valid) - len(varied)) / len(valid)
        for name in valid[0].parts:
            applying = [x for g in valid for x in g.parts[name] if x is not None]
            metrics |= {name: float(np.mean(applying))} if applying else {}
        self.drawn += len(drawn)
        made = self.assemble(groups)._replace(metrics=metrics)
        return self.with_columns(made, clock, begin)

    def draw(self, places: range, clock: Counter) -> list[Group]:
        """Groups for the prompts at these places of the run: each rank answers and rewards its share, every rank gets all."""
        cfg, machine, begin = self.cfg, self.machine, time.perf_counter()
        orders = {epoch: data.epoch_order(self.prompts, epoch, cfg.seed)
                  for epoch in {place // len(self.prompts) for place in places}}
        chosen = [int(orders[place // len(self.prompts)][place % len(self.prompts)]) for place in places]
        share = slice(machine.rank, None, machine.world)
        examples, answers = [self.prompts.examples[i] for i in chosen[share]], []

        def ask():
            answers.extend(answers_to(
                [e.prompt.tolist() for e in examples], self.sampler, self.tokenizer, cfg, n=cfg.samples_per_prompt,
                sampling=Sampling.of(cfg), keys=[(cfg.seed, place) for place in places[share]], compiled=machine.compiled,
                longest=self.longest, show="answers" if machine.rank == 0 else ""))
            clock["generate"] += time.perf_counter() - begin
            return self.rewards(*answered(self.tokenizer, examples, answers))
        tables = reward.together(machine, ask, cfg.bad_rewards)
        every = machine.share(answers)
        clock["draw"] += time.perf_counter() - begin
        clock["tokens"] += sum(len(answer.ids) for ranks in every for some in ranks for answer in some)
        groups = []
        for place, example in enumerate(chosen):
            rank, i = place % machine.world, place // machine.world
            parts = {name: values[i] for name, values in tables[rank].items()}
            rewards = [math.nan if isinstance(value, str) else value for value in parts.pop("reward")]
            groups.append(Group(example, every[rank][i], rewards, parts))
        return groups

    def assemble(self, groups: list[Group]) -> Rollout:
        """Groups as examples that fit into a stream and, of several ranks, into each one's share of a step: a prompt whose answers
        do not all fit is in several of them."""
        trees = trees_of([self.prompts.examples[g.example] for g in groups], [g.answers for g in groups])
        most, world = self.layout.tokens, self.machine.world
        most = most if world == 1 else min(most, sum(tree.length for tree in trees) // (world * self.minibatches))
        parts = [data.cut(tree, most) for tree in trees]
        ends = np.cumsum([*map(len, parts)])
        pieces = [np.arange(end - len(mine), end) for mine, end in zip(parts, ends)]
        return Rollout(groups, data.as_dataset([e for mine in parts for e in mine], Counter()), pieces, {}, {})

    def with_columns(self, made: Rollout, clock: Counter, begin: float) -> Rollout:
        """Add columns: the policy's old log-probs (if updated more than once, or for kl_coef) and old values, the reference's
        log-probs, and the advantages and returns that follow from rewards."""
        cfg, forward = self.cfg, time.perf_counter()

        def of(batch):
            streams = self.decoder(batch, self.outputs)
            columns = {f"old_{name}": streams[name] for name in self.outputs}
            if self.reference:
                columns["reference_log_probs"] = self.reference(batch, ["log_probs"])["log_probs"]
            return columns
        columns = reference.sweep(of, made.dataset, self.layout, self.machine) if self.outputs or self.reference else {}
        for column in self.unchecked.keys() & columns.keys():
            reference.check_finite({column: columns[column]}, made.dataset, self.unchecked.pop(column), column)
        answers, weight = [answer for g in made.groups for answer in g.answers], self.decoder.lm_head.weight
        tensor = lambda values: torch.tensor(values, dtype=weight.dtype, device=weight.device)
        columns["rollout_log_probs"] = tensor([x for answer in answers for x in answer.log_probs])
        old = columns.get("old_log_probs", columns["rollout_log_probs"])
        lengths = [len(answer.ids) for answer in answers]
        table = lambda column: pad_sequence(column.split(lengths), batch_first=True)  # (R, L)
        size, ended = tensor(lengths), tensor([answer.ended for answer in answers])
        mask = torch.arange(max(lengths), device=old.device) < size[:, None]

        scores = shaped(tensor([x for g in made.groups for x in g.rewards]), size, ended, cfg)
        reference_logps = table(columns["reference_log_probs"] if self.reference else old)
        kl = losses.kl_estimate(table(old), reference_logps, mask)
        values = table(columns["old_values"]) if "old_values" in columns else None
        advantages, returns = losses.ADVANTAGES[cfg.advantages].of(
            scores, -self.kl_coef * kl, values, mask, cfg.samples_per_prompt, cfg.gamma, cfg.lam)
        columns |= {"advantages": advantages[mask], "returns": returns[mask]}

        now = time.perf_counter()
        metrics = {**made.metrics, "entropy": -old.mean().item(), "response_length": size.mean().item(),
                   "ended": ended.mean().item(), "rollout/seconds": now - begin, "rollout/generate_seconds": clock["generate"],
                   "rollout/reward_seconds": clock["draw"] - clock["generate"], "rollout/forward_seconds": now - forward,
                   "rollout/tokens_per_second": clock["tokens"] / max(clock["generate"], 1e-9)}
        if values is not None:
            missed = columns["returns"] - columns["old_values"]
            metrics["value/explained_variance"] = 1 - (missed.var() / columns["returns"].var().clamp(min=1e-12)).item()
        if self.reference:
            metrics |= {"kl": kl[mask].mean().item(), "kl_coef": self.kl_coef}
            if cfg.kl_target:  # Ziegler et al., arXiv:1909.08593 section 2.2
                error = min(max(metrics["kl"] / cfg.kl_target - 1, -0.2), 0.2)
                self.kl_coef *= 1 + error * self.asked * cfg.samples_per_prompt / cfg.kl_horizon
        return made._replace(columns=columns, metrics=metrics)

    def save(self, folder: Path, step: int) -> dict:
        """The state that carries over from step to step; in the middle of a rollout, the rollout is saved too."""
        if self.place(step)[0]:
            answers = [answer for g in self.now.groups for answer in g.answers]
            prompts = [self.prompts.examples[g.example].prompt for g in self.now.groups]
            save_file({**self.now.columns, "example": torch.tensor([g.example for g in self.now.groups]),
                       "prompt": torch.from_numpy(np.concatenate(prompts)),
                       "prompt_length": torch.tensor([*map(len, prompts)]),
                       "length": torch.tensor([len(a.ids) for a in answers]), "ended": torch.tensor([a.ended for a in answers]),
                       "ids": torch.tensor([i for a in answers for i in a.ids])}, folder / "rollout.safetensors")
        return {"drawn": self.drawn, "kl_coef": self.kl_coef, "temperature": self.cfg.temperature,
                "metrics": self.now.metrics if self.now else {}}

    def restore(self, folder: Path, step: int, state: dict):
        self.unchecked.pop("old_values")  # a critic that has been trained is another
        self.drawn, self.kl_coef = state["drawn"], state["kl_coef"] if self.cfg.kl_target else self.kl_coef
        nth, self.asked = self.place(step)
        if nth:
            if not (folder / "rollout.safetensors").is_file():
                raise ValueError(f"{folder}: no rollout.safetensors, and step {step} is inside a rollout of {self.steps} steps; "
                                 f"batch_size, rollout_prompts or rollout_epochs were different when it was saved: set them back")
            saved = load_file(folder / "rollout.safetensors")
            lengths, n = saved.pop("length").tolist(), self.cfg.samples_per_prompt
            if len(lengths) != n * len(saved["example"]):
                raise ValueError(f"{folder}: step {step} is inside a rollout with {len(lengths) // len(saved['example'])} "
                                 f"samples_per_prompt; resume with the same number")
            before = state.get("temperature", self.cfg.temperature)
            if before != self.cfg.temperature:
                raise ValueError(f"{folder}: step {step} is inside a rollout, whose answers were drawn with temperature = "
                                 f"{before}; resume with the same")
            prompts = saved.pop("prompt").split(saved.pop("prompt_length").tolist())
            for place, prompt in zip(saved["example"].tolist(), prompts):
                now = self.prompts.examples[place]
                if now.prompt.tolist() != prompt.tolist():
                    raise ValueError(f"{now.where}: this prompt had other tokens in {folder}, which is inside a rollout: its "
                                     f"answers would be trained as answers to another prompt. Set back the rows and the keys "
                                     f"that make tokens of them, or begin a new run: --init_from={folder} --out_dir=...")
            answers = [Answer(ids.tolist(), [], bool(ended))
                       for ids, ended in zip(saved.pop("ids").split(lengths), saved.pop("ended"))]
            groups = [Group(example, answers[i * n:(i + 1) * n], [], {})
                      for i, example in enumerate(saved.pop("example").tolist())]
            self.now = self.assemble(groups)._replace(metrics=state["metrics"], columns={
                name: column.to(self.machine.device) for name, column in saved.items()})


def copied(decoder, sampler, dtype: torch.dtype):
    """The decoder itself, unless the compute dtype has 16 bits; then a copy of its language model in that dtype: a new one, or the
    sampler given, with its weights updated to the decoder's."""
    if dtype not in (torch.bfloat16, torch.float16):
        return decoder
    if sampler is None:
        with torch.device(decoder.lm_head.weight.device):
            sampler = model.Decoder(decoder.config).to(dtype).requires_grad_(False)
    weights = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, parameter in sampler.named_parameters():
            parameter.copy_(weights[name])
    return sampler
