"""Columns of a batch that need a forward but no gradient: the frozen reference's log-probs.

A source takes the micro-batches of a step and adds a column to each. The reference is loaded from its own folder, never
taken from the live model, and runs through the training path: at step 0 policy and reference agree to the last bits.
"""
import gc
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import Dataset, Layout, in_order, micro_batches
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


def read(path: Path, size: int) -> torch.Tensor | None:
    """The cached table, or None where there is none; a file that does not hold it whole counts as none."""
    try:
        with safe_open(path, framework="pt") as tensors:
            table = tensors.get_tensor("log_probs")
    except Exception:
        return None
    return table if len(table) == size else None


def precompute(load: Callable, weights: str, dataset: Dataset, layout: Layout, precision: str, machine,
               cache_dir: str) -> torch.Tensor:
    """Reference log-probs of every scored token, (dataset.offsets[-1],): from the cache on disk, or by one pass over the
    rows, shared between the ranks. load() gives the frozen model, which is freed afterwards."""
    path = Path(cache_dir).expanduser() / f"reference-{key(weights, dataset, precision)}.safetensors"
    table = read(path, int(dataset.offsets[-1]))
    if machine.sum(torch.tensor(float(table is None), device=layout.device)) == 0:  # every rank has it
        if machine.rank == 0:
            print(f"reference log-probs of {len(dataset):,} rows: from {path}")
        return table.to(layout.device)
    decoder = load()
    table = torch.zeros(int(dataset.offsets[-1]), device=layout.device,
                        dtype=torch.promote_types(torch.float32, decoder.lm_head.weight.dtype))
    for rows in tqdm(list(in_order(dataset)), desc="reference log-probs", disable=machine.rank > 0, leave=False):
        for batch in micro_batches(dataset, rows, layout, machine.rank, machine.world)[0]:
            with torch.no_grad(), machine.autocast():
                real = batch["scored"]
                table[batch["scored_index"][:real]] = decoder(batch, ["log_probs"])["log_probs"][:real]
    table = machine.sum(table)  # disjoint shares
    if machine.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"log_probs": table.cpu()}, part)
        os.replace(part, path)
    del decoder
    gc.collect()  # compiled blocks are in reference cycles
    return table
