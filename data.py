"""Examples -> packed micro-batches -> the rows of a step. (parts/: files -> rows -> Draft, text or messages -> Example, token ids.)

An example is a prompt and its responses, kept together as a tree, so that the prompt is stored and computed once.

Shapes: T stream tokens, N scored tokens, R responses, P pairs, S segments.
"""
import array
import functools
import heapq
import itertools
import json
import math
import os
import re
import sys
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from losses import OBJECTIVES
from model import Noting
from parts.formats import (  # noqa: F401: used from here, too
    FORMATS, MESSAGE_KEYS, TRAIN_ON, Draft, Step, as_conversation, as_messages, is_transcript, kind_of, objects, with_system)
from parts.rows import files_of, read_rows  # noqa: F401
from parts.tokens import (  # noqa: F401
    LARGE, Example, Tokenizer, check_characters, cut, render, renderings, tokenize, truncate, with_responses)

# ---------------------------------------------------------------------------------------------------------------------
# Rows


COUNTS = ("read", "used", "truncated", "dropped", "identical", "bad", "apart", "split")  # of rows. identical: their pairs have equal
# responses, or are tied; apart: joint ids did not begin with the prompt's; split: examples beyond the first of a conversation's turns


def counted(counts: Counter) -> str:
    usual = ("read", "used", "truncated", "dropped", "bad", "apart")
    return ", ".join(f"{counts[name]:,} {name}" for name in COUNTS if name in usual or counts[name])


class Stored(Sequence):
    """Examples in an unnamed temporary file in a folder, so that they need not fit in memory: each is a JSON header, padded with
    spaces to a multiple of 4 bytes, and then its arrays."""

    def __init__(self, folder: str):
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.file, self.ends = tempfile.TemporaryFile(dir=path), array.array("q", [0])
        except OSError as error:
            raise ValueError(f"cache_dir {folder}: {error.strerror}; name another --cache_dir") from None

    def append(self, e: Example):
        sizes = [len(ids) for ids in e.responses]
        told = [len(e.prompt), sizes, bool(e.labels), e.demonstrated, e.chosen, e.rejected, e.margin, e.where, e.row, e.truncated,
                e.turn]
        head = json.dumps(told).encode()
        head += b" " * (-len(head) % 4)
        whole = b"".join([len(head).to_bytes(4, "little"), head, e.prompt, *e.responses, *e.labels, *e.scored])
        self.ends.append(self.ends[-1] + self.file.write(whole))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        begin, end = self.ends[i], self.ends[i + 1]
        self.file.flush()
        held = os.pread(self.file.fileno(), end - begin, begin)
        at = 4 + int.from_bytes(held[:4], "little")
        prompt, sizes, labelled, *more, where, row, truncated, turn = json.loads(held[4:at])

        def take(n, dtype):
            nonlocal at
            at += n * np.dtype(dtype).itemsize
            return np.frombuffer(held, dtype, n, at - n * np.dtype(dtype).itemsize)
        prompt, *responses = (take(n, np.int32) for n in (prompt, *sizes))
        labels = [take(n, np.float32) for n in sizes] if labelled else []
        return Example(prompt, responses, [take(n, bool) for n in sizes], *more, where, labels, row, truncated, turn)


class Dataset(NamedTuple):
    examples: Sequence
    lengths: np.ndarray  # (len,) tokens of each example
    offsets: np.ndarray  # (len + 1,) scored tokens before each example: where its columns lie in a flat table
    pair_offsets: np.ndarray  # (len + 1,) pairs before each example
    kinds: np.ndarray  # (len,) which classes an example has: 1 undesirable (or rejected) responses, 2 desirable ones, 3 both
    counts: Counter  # of rows: COUNTS
    sources: np.ndarray  # (len,) which of the names in `shares` an example is from
    shares: dict[str, float]  # name in train_data -> its share of every step's rows; one name without weights

    def __len__(self):
        return len(self.examples)


def sizes_of(e: Example) -> tuple[int, int, int, int]:
    """An example's numbers of tokens, scored tokens and pairs, and its kind (`Dataset.kinds`)."""
    return e.length, sum(np.count_nonzero(mask) for mask in e.scored), len(e.chosen), 2 * bool(e.chosen) + bool(e.rejected)


def as_dataset(examples: Sequence, counts: Counter, sizes: Sequence = (), sources: Sequence = (),
               shares: dict | None = None) -> Dataset:
    """sizes: the `sizes_of` all examples, concatenated, where they are already known. sources, shares: if several files
    have weights."""
    sizes = np.array(sizes or [n for e in examples for n in sizes_of(e)], np.int64)
    lengths, scored, pairs, kinds = sizes.reshape(-1, 4).T
    before = lambda sizes: np.concatenate([[0], np.cumsum(sizes)])
    sources = np.array(sources, np.int64) if shares else np.zeros(len(examples), np.int64)
    return Dataset(examples, lengths, before(scored), before(pairs), kinds, counts, sources, shares or {"": 1.0})


def distinct(e: Example) -> Example | None:
    """The example without the pairs whose responses are equal: their gradient is exactly 0, or rounding noise that Adam turns into
    whole steps. None if no pair is left, because of that or because the row's responses are all tied."""
    same = lambda a, b: np.array_equal(e.responses[a], e.responses[b]) and np.array_equal(e.scored[a], e.scored[b])
    kept = [i for i, pair in enumerate(zip(e.chosen, e.rejected)) if not same(*pair)]
    if not kept:
        return None
    return e._replace(chosen=[e.chosen[i] for i in kept], rejected=[e.rejected[i] for i in kept],
                      margin=[e.margin[i] for i in kept] if e.margin else [])


SYSTEM = {"system", "system_prompt"}  # a column that makes all rows conversations, where there is a chat template


class Notes:
    """What is noted about rows while they are read."""

    def __init__(self):
        self.columns, self.read = set(), set()  # columns that the rows have, and those that were read
        self.message_keys = set()  # keys of messages that are not read
        self.system = False  # whether one of them is the system's
        self.texts = self.transcripts = 0  # prompts that are text although there is a chat template; of them, HH transcripts
        self.without_pair = ""  # file:line of the first row whose responses are equal or tied


def read_sources(names: list, show: bool) -> Iterator[tuple[int, str, object]]:
    """(source, where, row) of all rows; source: the place of its name in the list."""
    for source, name in enumerate(names):
        for where, row in read_rows(name, show):
            yield source, where, row


def load(paths: str | list[str] | dict[str, float], kind: str, tokenizer: Tokenizer, cfg, show: bool = True, train: bool = True
         ) -> Dataset:
    """Read, tokenize and truncate every row; a malformed one stops the run unless bad_rows = "skip". paths: names of files, or
    name -> its weight in a step. train: drop rows that nothing can be learned from, because their responses are equal or tied."""
    if kind not in FORMATS:
        raise ValueError(f"rows of kind {kind!r} are not known; known: {', '.join(FORMATS)}")
    examples, sizes, drafts, rows, longest_prompt = Stored(cfg.cache_dir), array.array("q"), [], {}, cfg.max_prompt_length
    counts, notes = Counter(), Notes()
    names = sorted(paths) if isinstance(paths, dict) else [paths]  # of sources, whose order in train_data is of no matter
    now, sources = 0, array.array("q")  # the source that is being read; the source of each example
    if kind == "prompts":  # the answer wants room
        longest_prompt = min(longest_prompt or cfg.max_length, cfg.max_length - cfg.max_new_tokens)
        if longest_prompt < 1:
            raise ValueError(f"max_length = {cfg.max_length} must hold a prompt and its answer, and max_new_tokens = "
                             f"{cfg.max_new_tokens} leaves nothing for the prompt; raise max_length or lower max_new_tokens")

    def flush():
        for example in tokenize(drafts, tokenizer, cfg.tokenize, counts, cfg.step_token):
            example = truncate(example, tokenizer.bos, cfg.max_length, longest_prompt, cfg.truncation, counts)
            compared = kind not in ("prm", "steps") and example is not None and len(example.responses) > 1
            if train and compared:
                where, example = example.where, distinct(example)
                if example is None:
                    counts["identical"] += 1
                    notes.without_pair = notes.without_pair or where
            if example is not None:
                examples.append(example._replace(row=rows.get(example.where)) if rows else example)
                sizes.extend(sizes_of(example))
                sources.append(now)
        drafts.clear()
        rows.clear()

    for source, where, row in read_sources(names, show):
        if source != now:
            flush()
            now = source
        counts["read"] += 1
        try:
            row, rendered = understood(row, kind, tokenizer, cfg, notes)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            if cfg.bad_rows == "skip":
                counts["bad"] += 1
                continue
            raise ValueError(f"{where}: {explained(error, where)}; bad_rows = 'skip' leaves such rows out") from None
        if notes.system and notes.texts > notes.transcripts and not cfg.as_chat:  # one way for all rows
            return load(paths, kind, tokenizer, types.SimpleNamespace(**vars(cfg) | {"as_chat": True}), show, train)
        drafts += [(where, *parts) for parts in rendered]
        counts["split"] += len(rendered) - 1
        draft = rendered[0][0]
        if not draft.responses:
            rows[where] = {**row, "prompt": draft.prompt}
        if len(drafts) >= 1024:
            flush()
    flush()
    counts["used"], named = len(examples), paths if isinstance(paths, str) else ", ".join(paths)
    if show and kind != "steps":
        report_notes(notes, kind, named, counts, cfg)
    if not examples:
        raise ValueError(f"{named}: no usable row is left ({counted(counts)})")
    shares = {name: paths[name] / sum(paths.values()) for name in names} if isinstance(paths, dict) else None
    dataset = as_dataset(examples, counts, sizes, sources, shares)
    for source, (name, share, taken) in enumerate(zip(names, dataset.shares.values(), rows_per_epoch(dataset))):
        if source not in dataset.sources:
            raise ValueError(f"{name}: no usable row is left, and its weight asks for {share:.1%} of every step")
        if not taken:
            raise ValueError(f"{name}: its weight is {share:.2g} of all, less than one of the {len(dataset):,} rows of an epoch; "
                             f"raise the weight or leave the file out")
    return dataset


def understood(row: bytes | object, kind: str, tokenizer: Tokenizer, cfg, notes: Notes) -> tuple[dict, list[tuple]]:
    """A row, or a line of JSON -> the row, and its `renderings`."""
    row = json.loads(row) if isinstance(row, bytes) else row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    nulls = kind in ("prm", "steps") or None not in row.values()  # elsewhere, a null is a missing column
    noting = Noting(row if nulls else {k: v for k, v in row.items() if v is not None})

    # Text or messages
    train_on, chat = cfg.train_on or TRAIN_ON[kind], bool(tokenizer.chat_template)
    draft = FORMATS[kind](noting, train_on, chat)
    if chat and kind not in ("prm", "steps"):
        draft = as_conversation(draft) if cfg.as_chat else draft
        notes.system |= not SYSTEM.isdisjoint(row)
        if isinstance(draft.prompt, str) and draft.prompt:
            notes.texts += 1
            notes.transcripts += is_transcript(draft.prompt)

    # What the template may be given besides
    tools = options = None
    if isinstance(draft.prompt, list):
        options = noting.get("chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"'chat_template_kwargs' should be an object, found {str(options)[:60]!r}")
        if "tools" in tokenizer.chat_template and noting.get("tools"):
            tools = objects(noting["tools"], "tools")
    notes.columns |= noting.keys()
    notes.read |= noting.read
    for column, value in row.items():
        if isinstance(value, (list, dict)) and column in noting.read:
            notes.message_keys |= unread_keys(value)

    rendered = renderings(draft, tokenizer, train_on, tools, options)
    for _, prompt, responses in rendered:
        check_characters("".join([prompt, *(text for text, _ in responses)]))
    return row, rendered


def unread_keys(value: list | dict) -> set[str]:
    """The keys of its messages that nothing reads."""
    keys = set()
    for m in value if isinstance(value, list) else [value]:
        if isinstance(m, dict) and ("role" in m or "from" in m) and not m.keys() <= MESSAGE_KEYS:
            keys |= {key for key in m.keys() - MESSAGE_KEYS if m[key] is not None}
    return keys


def explained(error: Exception, where: str) -> str:
    """What is wrong with the row, in words for whoever wrote it."""
    if isinstance(error, json.JSONDecodeError):
        known = re.search(r"\.jsonl?(\.gz)?[:\[]\d+\]?$", where)
        return f"not JSON: {error.msg} at character {error.pos}" + ("" if known else "; expected .jsonl or .json")
    if isinstance(error, (ValueError, RecursionError)):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno}); a field may be missing or have the "
            f"wrong type")


def report_notes(notes: Notes, kind: str, named: str, counts: Counter, cfg):
    """Print what a user may not expect about the rows that were read."""
    read = notes.read - {"margin"}.difference(*(OBJECTIVES[name].reads for name in cfg.weights))  # a loss has to read it, too
    unread = notes.columns - read
    if kind == "prompts":  # the others are for the reward
        unread &= {"tools"}
    if unread:
        print(f"{named}: columns that are not read: {', '.join(sorted(unread))}", file=sys.stderr)
    if notes.message_keys:
        print(f"{named}: keys of messages that are not read: {', '.join(sorted(notes.message_keys))}", file=sys.stderr)
    if notes.texts:
        print(f"{named}: {notes.texts:,} prompts are text and stay so, although the model has a chat template: what is trained is "
              f"not what a chat sends; --as_chat makes them the user's messages", file=sys.stderr)
    if notes.without_pair:
        print(f"{named}: {counts['identical']:,} rows are left out, their responses are equal or tied and there is nothing to "
              f"prefer; the first is {notes.without_pair}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def steps(cfg, per_epoch: int) -> int:
    """The optimizer steps of a run."""
    return cfg.max_steps or math.ceil(cfg.epochs * per_epoch)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    return -(-len(dataset) // batch_size)


def rows_per_epoch(dataset: Dataset) -> list[int]:
    """How many rows of an epoch are from each source: its share of them, by largest remainder. An epoch has as many rows
    as the dataset, so that without weights it is one pass over it."""
    exact = np.array([*dataset.shares.values()]) * len(dataset)
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[:len(dataset) - rows.sum()]] += 1
    return rows.tolist()


def sources_said(dataset: Dataset) -> list[str]:
    """A line for each file that has a weight: its share of a step, its rows, how often an epoch passes over them."""
    rows = np.bincount(dataset.sources, minlength=len(dataset.shares)).tolist()
    return [f"  {name}: {share:.1%} of every step; {count:,} rows, an epoch has each {taken / count:.2g} times"
            for (name, share), count, taken in zip(dataset.shares.items(), rows, rows_per_epoch(dataset)) if name]


def spread(labels: np.ndarray) -> np.ndarray:
    """An order of places in which each label comes as evenly as its number allows; places of a label stay in order."""
    turn = np.empty(len(labels))
    for members in (np.flatnonzero(labels == label) for label in np.unique(labels)):
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(turn, kind="stable")


def pass_order(dataset: Dataset, source: int, nth: int, seed: int) -> np.ndarray:
    """Indices of a source's examples in its nth pass: shuffled, desirable and undesirable rows interleaved evenly."""
    members = np.flatnonzero(dataset.sources == source)
    order = members[np.random.default_rng((seed, nth, source)).permutation(len(members))]
    return order[spread(dataset.kinds[order])]


def epoch_order(dataset: Dataset, epoch: int, seed: int) -> np.ndarray:
    """Indices of the examples of an epoch, (len,), a function of (seed, epoch): of each source what follows in its own
    passes, as many as its share asks for, interleaved evenly. Without weights, this is every example once, in another
    order each time."""
    parts = []
    for source, rows in enumerate(rows_per_epoch(dataset)):
        count = np.count_nonzero(dataset.sources == source)
        first, begin = divmod(epoch * rows, count)
        passes = range(first, first + -(-(begin + rows) // count))
        parts.append(np.concatenate([pass_order(dataset, source, nth, seed) for nth in passes])[begin:begin + rows])
    order = np.concatenate(parts)
    return order[spread(dataset.sources[order])]


def steps_of(dataset: Dataset, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """A function step -> indices of the examples of that optimizer step, which depend on (seed, step) alone; steps are
    counted from 0. The last step of an epoch is what is left."""
    per_epoch = steps_per_epoch(dataset, batch_size)
    order = functools.lru_cache(1)(lambda epoch: epoch_order(dataset, epoch, seed))

    def rows(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        return order(epoch)[at * batch_size:(at + 1) * batch_size]
    return rows


def step_rows(dataset: Dataset, step: int, batch_size: int, seed: int) -> np.ndarray:
    """As steps_of, for a single step."""
    return steps_of(dataset, batch_size, seed)(step)


def mismatched(dataset: Dataset, seed: int, epoch: int) -> Dataset:
    """Each prompt with random responses of other prompts instead of its own: KTO estimates its KL on these. The draw is a
    function of (seed, epoch, row). Responses are cut so that no prompt + response, and no tree, is longer than the longest
    one in the dataset."""
    longest = max(len(e.prompt) + max(map(len, e.responses)) for e in dataset.examples)
    largest = int(dataset.lengths.max())
    prompts = [e.prompt.tobytes() for e in dataset.examples]
    if len(set(prompts)) < 2:
        raise ValueError(f"{dataset.examples[0].where}: every row has this row's prompt, and KTO needs responses of "
                         f"other prompts; add rows with other prompts, or use a loss that needs none: --objective=bco, "
                         f"apo_zero_unpaired or kto_vanilla")
    made = []
    for i, e in enumerate(dataset.examples):
        rng, responses = np.random.default_rng((seed, epoch, i)), []
        for _ in e.responses:
            j = i
            while prompts[j] == prompts[i]:
                j = int(rng.integers(len(prompts)))
            other = dataset.examples[j]
            k = int(rng.integers(len(other.responses)))
            room = max(1, min(longest - len(e.prompt), (largest - len(e.prompt)) // len(e.responses)))
            responses.append((other.responses[k][:room], other.scored[k][:room]))
        ids, scored = map(list, zip(*responses))
        made.append(e._replace(responses=ids, scored=scored))
    return as_dataset(made, dataset.counts)


def in_order(dataset: Dataset, size: int = 256) -> list[np.ndarray]:
    """Indices of all examples in order, split into chunks that are packed together: for passes that do not train."""
    return np.split(np.arange(len(dataset)), range(size, len(dataset), size))


USUAL = {"cpu": 1024, "cuda": 4096}  # tokens of a stream that keep the device busy; on a CPU, more only take memory (measured)


def stream_length(datasets: list[Dataset], batch_size: int, asked: int, answers: int = 0, answer: int = 0,
                  device: str = "cpu") -> int:
    """T: as asked, or (0) a multiple of 128 that holds the largest tree and, up to USUAL tokens, most whole steps (9/8 of the mean
    step). answers, answer: how many answers each prompt is yet to get, of at most how many tokens; such trees may be cut down
    to one answer each, so that T is then at most LARGE, if that holds a prompt with one answer."""
    largest = max((d.examples[d.lengths.argmax()] for d in datasets), key=lambda e: e.length)
    least = largest.length + answer
    if asked and asked < least:
        raise ValueError(f"{largest.where}: a prompt with its responses takes {least} tokens and "
                         f"micro_batch_tokens is {asked}; set it to {-(-least // 128) * 128} or to 0, or lower max_length")
    step = math.ceil(9 / 8 * batch_size * (datasets[0].lengths.mean() + answers * answer))
    whole = largest.length + answers * answer
    return asked or -(-max(least, min(whole, LARGE) if answer else whole, min(USUAL[device], step)) // 128) * 128


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: bins of indices whose lengths add up to at most capacity."""
    bins, left = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b, room in enumerate(left) if room >= lengths[i]]
        if not fits:
            bins.append([])
            left.append(capacity)
        b = min(fits, key=lambda b: left[b]) if fits else -1
        bins[b].append(i)
        left[b] -= lengths[i]
    return bins


def shared(lengths: list[int], ranks: int) -> list[list[int]]:
    """Each rank's share of the indices: the next longest goes to the rank that has the fewest tokens."""
    shares, fewest = [[] for _ in range(ranks)], [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = fewest[0]
        shares[rank].append(i)
        heapq.heapreplace(fewest, (tokens + lengths[i], rank))
    return shares


def count(examples: Iterable[Example]) -> dict[str, int]:
    """Counts over a whole step; each loss's sum is divided by one of them."""
    total = Counter()
    for e in examples:
        scored = [int(mask.sum()) for mask in e.scored]
        total.update(stream_tokens=e.length, tokens=sum(scored), responses=len(scored),
                     demonstrated_tokens=sum(n for n, shown in zip(scored, e.demonstrated) if shown),
                     demonstrations=sum(e.demonstrated), pairs=len(e.chosen), examples=1,
                     steps=sum(int((~np.isnan(labels)).sum()) for labels in e.labels))
    return dict(total)


class Layout(NamedTuple):
    """How a stream is laid out: fixed for a run."""
    tokens: int  # T
    varlen: bool  # index tensors for the variable-length CUDA kernel, not for grouped SDPA
    static: bool  # pad T to a multiple of 128, for kernels that are compiled
    device: str


def varlen(device: str, dtype: torch.dtype) -> bool:
    """Whether the variable-length attention kernel supports this device and dtype."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16)


def micro_batches(dataset: Dataset, rows: np.ndarray, layout: Layout, rank: int = 0, world: int = 1):
    """This rank's share of a step's examples, packed, and the counts over all ranks.

    A rank without a share gets a stream with nothing to score, so that it takes part in every collective.
    """
    examples = [dataset.examples[i] for i in rows]
    mine = [(int(rows[i]), examples[i]) for i in shared([e.length for e in examples], world)[rank]]
    streams = pack([e.length for _, e in mine], layout.tokens) or [[]]
    return [build([mine[i] for i in stream], dataset, layout) for stream in streams], count(examples)


def ranking(e: Example) -> tuple[list[int], list[bool]]:
    """For each response: its place in the ranking that the pairs make, best first; and whether it counts there: of responses that are
    tied, the first does."""
    beaten = Counter(e.rejected)
    order = sorted(range(len(e.responses)), key=lambda i: beaten[i])
    place, counts = [0] * len(order), [True] * len(order)
    for n, i in enumerate(order):
        place[i] = n
        counts[i] = n == 0 or beaten[i] > beaten[order[n - 1]]
    return place, counts


def build(members: list[tuple[int, Example]], dataset: Dataset, layout: Layout) -> dict:
    """Examples of one stream -> its tensors (T,), (N,), (R,), (P,) and, on the host, its sizes and members. last (R,): index of a
    response's last token; example, rank (R,): its example and its index in it; standing, ranked (R,): its place in the
    ranking of that example, and whether it counts there; own (N,): index of a scored token itself."""
    tokens, positions, spans = [], [], []  # a span: begin, length; begin and length of the prompt it also sees
    columns = {"predict_from": [], "own": [], "target": [], "response": [], "place": [], "scored_index": []}
    lengths, last, chosen, rejected, margin, pair_index, of, rank, at = [], [], [], [], [], [], [], [], 0
    standing, ranked = [], []
    for nth, (index, e) in enumerate(members):
        begin, n, seen = at, len(e.prompt), int(dataset.offsets[index])
        tokens.append(e.prompt)
        positions.append(np.arange(n))
        spans.append((begin, n, begin, 0))
        at += n
        chosen += [len(lengths) + i for i in e.chosen]
        rejected += [len(lengths) + i for i in e.rejected]
        margin += e.margin
        pair_index += range(dataset.pair_offsets[index], dataset.pair_offsets[index + 1])
        of += [nth] * len(e.responses)
        place, counts = ranking(e)
        rank += range(len(e.responses))
        standing += place
        ranked += counts
        for ids, scored in zip(e.responses, e.scored):
            places = np.flatnonzero(scored)
            before = at + places - 1  # a token is predicted one place before itself, the first one at the prompt's end
            before[places == 0] = begin + n - 1
            columns["predict_from"].append(before)
            columns["own"].append(at + places)
            columns["target"].append(ids[places])
            columns["response"].append(np.full(len(places), len(lengths)))
            columns["place"].append(np.arange(len(places)))
            columns["scored_index"].append(seen + np.arange(len(places)))
            tokens.append(ids)
            positions.append(n + np.arange(len(ids)))
            spans.append((at, len(ids), begin, n))
            at, seen = at + len(ids), seen + len(places)
            lengths.append(len(places))
            last.append(at - 1)
    length = min(-(-max(at, 1) // 128) * 128, layout.tokens) if layout.static else max(at, 1)
    for start in range(at, length, 128):  # padding: separate segments that no scored token sees
        n = min(128, length - start)
        tokens.append(np.zeros(n, np.int32))
        positions.append(np.arange(n))
        spans.append((start, n, start, 0))
    flat = {name: np.concatenate([np.zeros(0, np.int64), *parts]) for name, parts in columns.items()}
    labels = [labels[scored] for _, e in members for labels, scored in zip(e.labels, e.scored)]
    labels = np.concatenate([*labels, np.full(sum(lengths) - sum(map(len, labels)), np.nan, np.float32)]).astype(np.float32)
    whole = dict(lengths=lengths, last=last, example=of, rank=rank, standing=standing,
                 rows=[members[nth][0] for nth in of], chosen=chosen,
                 rejected=rejected, pair_index=pair_index)
    flat.update(tokens=np.concatenate(tokens).astype(np.int64), positions=np.concatenate(positions),
                **{name: np.array(values, np.int64) for name, values in whole.items()}, margin=np.array(margin, np.float32),
                step_labels=labels, step_mask=~np.isnan(labels), ranked=np.array(ranked, bool),
                demonstrated=np.array([shown for _, e in members for shown in e.demonstrated], bool))
    known = {"num_responses": len(lengths), "longest": max(lengths, default=1), "num_examples": len(members),
             "most_responses": max((len(e.responses) for _, e in members), default=1), "members": [i for i, _ in members]}
    flat.update((varlen_segments if layout.varlen else grouped_segments)(spans))
    return {**known, **to_device(flat, layout.device)}


def to_device(values: dict, device: str) -> dict:
    moved = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    if device == "cuda":
        moved = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}


def varlen_segments(spans: list) -> dict:
    """Index tensors for the variable-length kernel: gather indices of keys, cumulative lengths padded to a multiple of 64."""
    lengths_q = [n for _, n, _, _ in spans]
    lengths_k = [n + shared for _, n, _, shared in spans]
    key_index = np.concatenate([np.r_[p:p + shared, b:b + n] for b, n, p, shared in spans])
    pad = -(len(spans) + 1) % 64
    cu_q, cu_k = (np.pad(np.cumsum([0, *lengths]), (0, pad), mode="edge").astype(np.int32) for lengths in (lengths_q, lengths_k))
    up = lambda n: 1 << (n - 1).bit_length()
    return {"key_index": key_index, "cu_q": cu_q, "cu_k": cu_k, "max_q": up(max(lengths_q)), "max_k": up(max(lengths_k))}


def grouped_segments(spans: list) -> dict:
    """Index tensors for grouped attention: segments whose query and key lengths round up to the same sizes share one padded
    call; a segment's offset is the number of keys before its first query. Prompts have a query for each key, and long responses
    after short prompts are padded with queries to have one too: offset 0, and no mask needed if there is no sliding window."""
    groups = {}
    for span in spans:
        _, n, _, shared = span
        square = shared == 0 or n + shared > 768 and n >= 4 * shared  # measured: padding queries cost less than padding keys
        groups.setdefault((square, rounded(n + square * shared), rounded(n + shared)), []).append(span)
    index_q, index_k, shapes, offsets, at = [], [], [], [], 0
    inverse = np.empty(sum(span[1] for span in spans), np.int64)
    for (square, _, _), members in groups.items():
        begin, n, prompt, shared = np.array(members).T[..., None]  # (B, 1) each
        first = square * shared  # place of the first query that is not padding
        length_q, length_k = int((n + first).max()), int((n + shared).max())
        place = np.arange(length_k)
        own = np.where(place < shared + n, begin + place - shared, prompt)
        index_k.append(np.where(place < shared, prompt + place, own).ravel())
        place = np.arange(length_q) - first
        real = (place >= 0) & (place < n)
        index_q.append(np.where(real, begin + place, begin).ravel())
        inverse[(begin + place)[real]] = at + np.flatnonzero(real)
        at += real.size
        shapes.append((len(members), length_q, length_k))
        offsets.append((shared - first)[:, 0])
    return {"group_q": np.concatenate(index_q), "group_k": np.concatenate(index_k), "group_inverse": inverse,
            "group_offset": np.concatenate(offsets), "groups": shapes, "masks": {}}


def rounded(length: int) -> int:
    """Round up to the next of 8, 12, 16, 24, 32, 48, 64, ...: above 8, to less than 1.5 times the length."""
    power = 1 << max(3, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 8 else power


if __name__ == "__main__":
    import signal

    import preview
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
    preview.main(sys.argv[1:])
