"""Columns of a batch that need a forward but no gradient: log-probs of the frozen reference, a teacher's logits, KTO's estimate of
the KL, and what a coupled loss reads of the whole step.

A source is a function add(split, batches, epoch), made once per run from train.Run, that adds columns to a step's micro-batches.
Frozen models are loaded from their own folders, never copied from the live policy (a resumed run has the same reference), and
run through the training path: at step 0, policy and reference agree up to rounding.
"""
import gc
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import data
import losses
import model
import report


def frozen(run, name: str, outputs: list[str]) -> model.Decoder:
    decoder = model.load_model(run.cfg, run.machine, name, run.tokenizer, outputs)[0].requires_grad_(False)
    for dataset in run.datasets.values():
        model.check_lengths(decoder, dataset, run.cfg.max_new_tokens)
    return model.without_masters(decoder, run.machine.dtype)


def reference_folder(run) -> str:
    return run.folder_of(run.cfg.reference or run.cfg.init_from)


def frozen_reference(run) -> model.Decoder:
    folder = reference_folder(run)
    if run.cfg.reference:
        run.tokenizer.same_ids(data.Tokenizer(model.find_folder(folder)), run.cfg.resize_embeddings)
    return frozen(run, folder, ["log_probs"])


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def reference_source(run) -> Callable:
    """Adds reference_log_probs: from a table that is cached on disk, or from a model that runs in every step."""
    if run.cfg.reference_live:
        return live(run, frozen_reference(run), "log_probs", "reference_log_probs")
    tables = {split: reference_table(run, split, dataset) for split, dataset in run.datasets.items()}

    def add(split, batches, epoch):
        for batch in batches:
            batch["reference_log_probs"] = tables[split][batch["scored_index"]]
    return add


def live(run, decoder, output: str, column: str) -> Callable:
    """Adds the output of a frozen model that runs in every step."""
    def add(split, batches, epoch):
        for batch in batches:
            with torch.no_grad(), run.machine.autocast():
                batch[column] = decoder(batch, [output])[output]
    return add


def teacher_source(run) -> Callable:
    """Adds teacher_logits: `Projected`, from a teacher that runs in every step; or `TopLogits`, from a table cached on disk."""
    cfg, teacher = run.cfg, run.folder_of(run.cfg.teacher)
    run.tokenizer.same_ids(data.Tokenizer(model.find_folder(teacher)), cfg.resize_embeddings)

    load = lambda: frozen(run, teacher, ["logits"])
    if not cfg.teacher_top_k:
        return live(run, load(), "logits", "teacher_logits")
    known = run.tokenizer.fast.get_vocab_size()
    if cfg.teacher_top_k > known:
        raise ValueError(f"teacher_top_k = {cfg.teacher_top_k} and the vocabulary has {known} tokens")
    described = model.find_folder(teacher) / "config.json"
    vocab = max(known, model.read_shape(model.read_json(described), str(described)).vocab_size)  # resize_embeddings

    def highest(decoder, batch):
        logits = decoder(batch, ["logits"])["logits"].ready()
        chunk = losses.head_chunk(len(logits.weight), run.machine.device)
        starts = range(0, max(len(logits.hidden), 1), chunk)  # a rank without rows scores nothing
        parts = [logits.rows(slice(start, start + chunk)).topk(cfg.teacher_top_k) for start in starts]
        return {"top": torch.cat([p.values for p in parts]), "index": torch.cat([p.indices for p in parts]).int()}

    what, weights = f"teacher's {cfg.teacher_top_k} highest logits", fingerprint(teacher, cfg)
    tables = {split: precomputed(run, split, dataset, what, load, highest, weights) for split, dataset in run.datasets.items()}

    def add(split, batches, epoch):
        for batch in batches:
            at = batch["scored_index"]
            batch["teacher_logits"] = losses.TopLogits(tables[split]["top"][at], tables[split]["index"][at], vocab)
    return add


def mismatched_source(run) -> Callable:
    """Adds policy_KL_logps and reference_KL_logps, (m,), for KTO's estimate of the KL: log-probs of the step's prompts with
    responses of other prompts, under the current policy, by a forward without gradient, and under the reference, from its
    table. All ranks get those of the whole step."""
    machine, made = run.machine, {}  # split -> (epoch, its rows, their table)

    def add(split, batches, epoch):
        if split not in made or made[split][0] != epoch:
            rows = data.mismatched(run.datasets[split], run.cfg.seed, epoch)
            made[split] = epoch, rows, reference_table(run, split, rows) if "reference_KL_logps" in run.streams else None
        _, rows, table = made[split]
        mine = np.array(sorted(i for batch in batches for i in batch["members"]), np.int64)
        parts = {"policy_KL_logps": [], "reference_KL_logps": []}
        with torch.no_grad(), machine.autocast():
            for batch in data.micro_batches(rows, mine, run.layout)[0]:
                of_policy = run.decoder(batch, ["log_probs"])["log_probs"]
                parts["policy_KL_logps"].append(losses.sums(batch, of_policy))
                if table is not None:
                    parts["reference_KL_logps"].append(losses.sums(batch, table[batch["scored_index"]]))
        for name in [name for name, logps in parts.items() if logps]:
            logps = torch.cat(machine.gather(torch.cat(parts[name])))
            for batch in batches:
                batch[name] = logps
    return add


SOURCES = {"reference_log_probs": reference_source, "teacher_logits": teacher_source, "policy_KL_logps": mismatched_source,
           "reference_KL_logps": mismatched_source}  # column that a loss reads -> what adds it to the batches of a step


def running_source(running: dict) -> Callable:
    """Adds means of metrics over all earlier steps, (). running: name -> (2,) sum and count of a metric."""
    def add(split, batches, epoch):
        means = {name: total / count.clamp(min=1) for name, (total, count) in running.items()}
        for batch in batches:
            batch.update(means)
    return add


def step_source(run) -> Callable:
    """Adds "step", what coupled losses read of the whole step, by a forward without gradient. Runs after all other sources. (Eval
    couples the rows of each piece of data.in_order; the only micro-batch of a step needs no such forward.)"""
    wanted = {name: reading for term in run.terms if term.objective.coupled for name, reading in term.reads.items()}
    machine = run.machine

    def add(split, batches, epoch):
        if machine.world == len(batches) == 1:
            batches[0]["step"] = losses.Step(1, {})
            return
        with torch.no_grad(), machine.autocast():
            mine = [{name: losses.read(reading, available) for name, reading in wanted.items()}
                    for available in ({**batch, **run.decoder(batch, run.outputs)} for batch in batches)]
        for name in [name for name, own in mine[0].items() if own.dim() > 1]:
            raise ValueError(f"{name} has shape {tuple(mine[0][name].shape)}: a coupled loss reads (n,) and () tensors alone")
        parts = sum(machine.share(len(batches)))
        others = [{} for _ in batches]
        for name in [name for name in wanted if mine[0][name].dim()]:  # a number is the same in every micro-batch
            own = [readings[name] for readings in mine]
            ranks = machine.gather(torch.cat(own))
            for i in range(len(batches)):
                others[i][name] = (torch.cat([*ranks[:machine.rank], *own[:i], own[0][:0]]),
                                   torch.cat([*own[i + 1:], *ranks[machine.rank + 1:], own[0][:0]]))
        for batch, readings in zip(batches, others):
            batch["step"] = losses.Step(parts, readings)
    return add


# ---------------------------------------------------------------------------------------------------------------------
# Tables: computed once for every scored token of the rows, kept on disk


def pieces(run, split: str) -> list[np.ndarray]:
    """Indices of the rows that a run reads of a split, in pieces. If it ends before it has seen all training rows, these are the
    first ones in the order of its steps."""
    dataset, cfg = run.datasets[split], run.cfg
    steps = data.steps(cfg, data.steps_per_epoch(dataset, cfg.batch_size))
    count = -(-steps * cfg.batch_size // 64) * 64  # whole pieces: with more steps, these are the same
    if split == "train" and count < len(dataset):
        order = data.epoch_order(dataset, 0, cfg.seed)[:count]
        order = order[np.sort(np.unique(order, return_index=True)[1])]  # with weights, a row may come again
        return np.split(order, range(64, len(order), 64))
    return data.in_order(dataset)


def reference_table(run, split: str, dataset: data.Dataset) -> torch.Tensor:
    """The reference's log-probs of the scored tokens that the run reads, (dataset.offsets[-1],)."""
    weights = fingerprint(reference_folder(run), run.cfg)
    of = lambda decoder, batch: decoder(batch, ["log_probs"])
    return precomputed(run, split, dataset, "reference log-probs", lambda: frozen_reference(run), of, weights)["log_probs"]


def precomputed(run, split: str, dataset: data.Dataset, what: str, load: Callable, of: Callable, weights: str
                ) -> dict[str, torch.Tensor]:
    """Tables of what of(decoder, batch) returns for each scored token that the run reads, name -> (dataset.offsets[-1], ...): from
    the cache on disk, or by one pass over these rows, split over the ranks. load() loads the frozen model, which is freed
    afterwards."""
    machine, parts, folder = run.machine, pieces(run, split), Path(run.cfg.cache_dir).expanduser()
    rows, size = sum(map(len, parts)), int(dataset.offsets[-1])
    place = lambda asked: folder / f"reference-{key(run, dataset, asked, what, weights)}.safetensors"
    tables = read(path := place(parts), size)
    if tables is None and rows < len(dataset):  # a table of all rows serves a short run, too
        tables = read(place(data.in_order(dataset)), size)
    if not machine.any(tables is None):
        run.say(f"{what} of {rows:,} rows: read from the cache in {run.cfg.cache_dir}")
        return {name: table.to(machine.device) for name, table in tables.items()}
    decoder = load()
    tables = sweep(lambda batch: of(decoder, batch), dataset, run.layout, machine, what, parts)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one of each machine: the folder may be its own
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{machine.rank}.{os.getpid()}.part")
        save_file({name: table.cpu() for name, table in tables.items()}, part)
        os.replace(part, path)
    del decoder
    gc.collect()  # compiled blocks are in reference cycles
    return tables


def fingerprint(name: str, cfg) -> str:
    """Hash of a model's weights and config.json; for a model made from scratch, the settings that it is made from."""
    if name == "scratch":
        return f"{cfg.seed} {cfg.scratch} {cfg.tokenizer}"
    digest, folder = hashlib.sha256(), model.find_folder(name)
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def key(run, dataset: data.Dataset, parts: list[np.ndarray], what: str, weights: str) -> str:
    """Cache key, a hash of all that a table depends on, but for the number of ranks, which rounds it otherwise: weights, token ids
    and scored masks of the rows in it, their places, device, dtype, torch and our code."""
    machine = run.machine
    precision = f"{machine.device} {machine.dtype} {torch.__version__} compiled={machine.compiled} {run.layout.tokens}"
    precision += f" {run.tokenizer.fast.get_vocab_size()} tokens"  # to which resize_embeddings takes a model
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (data, losses, model))
    digest = hashlib.sha256(f"{weights} {precision} {what} {source}".encode())
    digest.update(dataset.offsets.tobytes())
    for row in itertools.chain(*parts):
        e = dataset.examples[row]
        digest.update(int(row).to_bytes(8, "little"))
        for part in (e.prompt, *e.responses, *e.scored):
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    return digest.hexdigest()[:32]


def read(path: Path, size: int) -> dict | None:
    """The cached tables, or None where there are none; a file that does not hold them whole counts as none."""
    try:
        tables = load_file(path)
    except Exception:
        return None
    return tables if tables and all(len(table) == size for table in tables.values()) else None


def sweep(of: Callable, dataset: data.Dataset, layout: data.Layout, machine, what: str = "", parts: Sequence = ()
          ) -> dict[str, torch.Tensor]:
    """Tables of what of(batch) returns for each scored token, name -> (dataset.offsets[-1], ...), by one pass without gradient
    over the rows (of these parts; default: all), split over the ranks."""
    tables = {}
    for rows in report.bar(parts or data.in_order(dataset), what, machine.rank == 0 and bool(what)):
        for batch in data.micro_batches(dataset, rows, layout, machine.rank, machine.world)[0]:
            with torch.no_grad(), machine.autocast():
                made = of(batch)
            for name, values in made.items():
                table = tables.setdefault(name, values.new_zeros(int(dataset.offsets[-1]), *values.shape[1:]))
                table[batch["scored_index"]] = values
    return {name: machine.sum(table) for name, table in tables.items()}  # disjoint shares
