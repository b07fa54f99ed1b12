"""Columns of a batch that need a forward but no gradient: the frozen reference's log-probs, a teacher's highest logits.

A source takes the micro-batches of a step and adds a column to each. The reference is loaded from its own folder, never
taken from the live model, and runs through the training path: at step 0 policy and reference agree to the last bits.
"""
import gc
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import Dataset, Layout, in_order, micro_batches
from losses import head_chunk
from model import find_folder


def live(decoder, autocast: Callable) -> Callable:
    """A source that runs the frozen model in every step."""
    def add(batches: list[dict], epoch: int):
        for batch in batches:
            with torch.no_grad(), autocast():
                batch["reference_log_probs"] = decoder(batch, ["log_probs"])["log_probs"]
    return add


def from_table(table: torch.Tensor) -> Callable:
    """A source that looks up what was precomputed: table holds every scored token of the dataset."""
    def add(batches: list[dict], epoch: int):
        for batch in batches:
            batch["reference_log_probs"] = table[batch["scored_index"]]
    return add


def fingerprint(name: str, cfg: dict) -> str:
    """Hash of a model's weights and config.json; of one made from scratch, of what it is made from."""
    if name == "scratch":
        return f"{cfg['seed']} {cfg['scratch']} {cfg['tokenizer']}"
    digest, folder = hashlib.sha256(), find_folder(name)
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def key(weights: str, dataset: Dataset, precision: str) -> str:
    """What reference log-probs depend on: weights, token ids and scored masks, precision and device."""
    digest = hashlib.sha256(f"{weights} {precision}".encode())
    for e in dataset.examples:
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


def log_probs(load: Callable, weights: str, dataset: Dataset, layout: Layout, precision: str, machine,
              cache_dir: str) -> torch.Tensor:
    """Of every scored token of the rows, (dataset.offsets[-1],)."""
    def of(decoder, batch):
        return {"log_probs": decoder(batch, ["log_probs"])["log_probs"]}
    return precompute(load, of, "reference log-probs", weights, dataset, layout, precision, machine, cache_dir)["log_probs"]


def top_logits(load: Callable, weights: str, dataset: Dataset, layout: Layout, k: int, precision: str, machine, cache_dir: str):
    """The k highest logits of every scored token and where they are, (dataset.offsets[-1], k) each."""
    def of(decoder, batch):
        logits, chunk = decoder(batch, ["logits"])["logits"], head_chunk(len(decoder.lm_head.weight), machine.device)
        parts = [logits.rows(start, start + chunk).topk(k) for start in range(0, len(logits.hidden), chunk)]
        return {"top": torch.cat([p.values for p in parts]), "index": torch.cat([p.indices for p in parts]).int()}
    made = precompute(load, of, f"teacher's top {k} logits", weights, dataset, layout, precision, machine, cache_dir)
    return made["top"], made["index"]


def sweep(of: Callable, dataset: Dataset, layout: Layout, machine, what: str = "") -> dict[str, torch.Tensor]:
    """Tables of what of(batch) says of each scored token, name -> (dataset.offsets[-1], ...), by one pass without gradient over
    the rows, shared between the ranks."""
    tables = {}
    for rows in tqdm(in_order(dataset), desc=what, disable=machine.rank > 0 or not what, leave=False):
        for batch in micro_batches(dataset, rows, layout, machine.rank, machine.world)[0]:
            with torch.no_grad(), machine.autocast():
                made = of(batch)
            for name, values in made.items():
                table = tables.setdefault(name, values.new_zeros(int(dataset.offsets[-1]), *values.shape[1:]))
                table[batch["scored_index"]] = values
    return {name: machine.sum(table) for name, table in tables.items()}  # disjoint shares


def precompute(load: Callable, of: Callable, what: str, weights: str, dataset: Dataset, layout: Layout, precision: str, machine,
               cache_dir: str) -> dict[str, torch.Tensor]:
    """Tables of what of(decoder, batch) says of each scored token, name -> (dataset.offsets[-1], ...): from the cache on disk, or
    by one pass over the rows, shared between the ranks. load() gives the frozen model, which is freed afterwards."""
    path = Path(cache_dir).expanduser() / f"reference-{key(weights, dataset, f'{precision} {what}')}.safetensors"
    tables = read(path, int(dataset.offsets[-1]))
    if machine.sum(torch.tensor(float(tables is None), device=layout.device)) == 0:  # every rank has it
        if machine.rank == 0:
            print(f"{what} of {len(dataset):,} rows: from {path}")
        return {name: table.to(layout.device) for name, table in tables.items()}
    decoder = load()
    tables = sweep(lambda batch: of(decoder, batch), dataset, layout, machine, what)
    if machine.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: table.cpu() for name, table in tables.items()}, part)
        os.replace(part, path)
    del decoder
    gc.collect()  # compiled blocks are in reference cycles
    return tables
