"""Files -> rows: JSONL, JSON arrays, .gz of either, parquet and Arrow, each row with the place that an error names."""
import contextlib
import difflib
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import report
from model import read_json

# ---------------------------------------------------------------------------------------------------------------------
# Names -> files

KNOWN = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^/]+)/(?P<split>[^/]+))?")


def files_of(paths: str | list[str] | dict[str, float]) -> list[str]:
    """The local files that names stand for: of files, globs, folders of `save_to_disk` and data sets of the hub."""
    files = []
    for name in [paths] if isinstance(paths, str) else paths:
        is_glob = glob.has_magic(name) and not Path(name).exists()
        places = sorted(glob.glob(name, recursive=True)) if is_glob else [name]
        if not places:
            raise ValueError(f"no file matches {name!r}")
        for place in places:
            files += files_at(place)
    for file in files:
        check_file(file)
    return files


def files_at(place: str) -> list[str]:
    """A file itself, or those of a folder of `save_to_disk` or of a hub data set."""
    path, hub = Path(place), HUB_NAME.fullmatch(place)
    if path.is_file():
        return [place]
    if path.is_dir():
        return saved_files(place)
    splits = splits_of(path.parent)
    near = splits or difflib.get_close_matches(place, [str(p) for p in path.parent.glob("*")], 1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if not hub or splits or place.startswith("out/") or hub["name"].endswith((*KNOWN, ".gz", ".csv", ".txt")):
        form = "; a split of a hub data set is named org/name:config/split" if ":" in place else ""
        raise ValueError(f"{place}: no such file{hint}{form}")
    try:
        folder = downloaded(hub["name"])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place}: not a local file{hint}, and cannot be downloaded from the hub: "
                         f"{reason:.200}") from error
    return split_files(str(folder), hub["config"] or "", hub["split"] or "train", place)


def splits_of(folder: Path) -> list[str]:
    """The folders of the splits, where `save_to_disk` wrote several."""
    described = folder / "dataset_dict.json"
    return [f"{folder}/{split}" for split in read_json(described).get("splits", [])] if described.is_file() else []


def saved_files(folder: str) -> list[str]:
    """The files of a folder that datasets' `save_to_disk` wrote, as its state.json names them."""
    if splits := splits_of(Path(folder)):
        raise ValueError(f"{folder} has several splits; name one of them: {', '.join(splits)}")
    if not Path(folder, "state.json").is_file():
        raise ValueError(f"{folder} is a folder; name files, or a glob as '{folder}/*.jsonl'")
    parts = read_json(Path(folder, "state.json")).get("_data_files", [])
    files = [str(Path(folder, part["filename"])) for part in parts]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file, and {folder}/state.json names it")
    return files


@functools.cache
def downloaded(name: str) -> Path:
    """The folder of a hub data set; the hub is asked only once in a process. No script of it is run."""
    from huggingface_hub import snapshot_download
    patterns = ["README.md", *(f"*{ending}" for ending in KNOWN)]
    return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))


def split_files(folder: str, config: str, split: str, name: str = "") -> list[str]:
    """The files of a split in the folder of a hub data set. config: "" is the default one. name: what errors call it."""
    every = sorted(Path(folder).rglob("*"))
    readable = [str(path.relative_to(folder)) for path in every if path.name.endswith(KNOWN)]
    default, table = declared(folder, readable)
    if not table:
        default, table = "default", by_layout(readable)
    choices = [key for key in table if key[1] == split and key[0] == (config or key[0])]
    if len(choices) > 1:
        choices = [key for key in choices if key[0] == default]
    if not choices:
        known = ", ".join("/".join(key) for key in table) or f"nothing that can be read ({', '.join(KNOWN)})"
        raise ValueError(f"{name or folder}: expected one split as in org/name:config/split; it has {known}")
    return [str(Path(folder, file)) for file in table[choices[0]]]


def declared(folder: str, readable: list[str]) -> tuple[str, dict]:
    """What README.md's front matter says (`configs`): the default config, and (config, split) -> files."""
    readme, default, table = Path(folder, "README.md"), "default", {}
    front = re.match(r"---\s*\n(.*?\n)---", readme.read_text(encoding="utf-8"), re.S) if readme.is_file() else None
    if not front:
        return default, table
    import yaml  # huggingface_hub needs it, too
    try:
        for config in (yaml.safe_load(front[1]) or {}).get("configs") or []:
            name, parts = config["config_name"], config.get("data_files") or []
            default = name if config.get("default") else default
            for part in parts if isinstance(parts, list) else [parts]:
                part = part if isinstance(part, dict) else {"split": "train", "path": part}
                files = matching(readable, part["path"], config.get("data_dir", ""))
                table[name, part["split"]] = table.get((name, part["split"]), []) + files
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{readme}: its list of configs cannot be read: {' '.join(str(error).split()):.200}") from None
    return default, {key: files for key, files in table.items() if files}


def matching(files: list[str], patterns: str | list[str], folder: str) -> list[str]:
    """The files that match one of the patterns, which begin at a folder."""
    kept = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        whole = os.path.normpath(os.path.join(folder, pattern)).replace("**/", "*")
        kept += [file for file in fnmatch.filter(files, whole) if file not in kept]
    return kept


def by_layout(readable: list[str]) -> dict[tuple[str, str], list[str]]:
    """(config, split) -> files: data/train-00000-of-00002.parquet, config/train.jsonl, config/train/0000.parquet."""
    table = {}
    for file in readable:
        *folders, last = Path(file).parts
        split = re.match(r"(.*?)(-\d+-of-\d+)?(\.jsonl?(\.gz)?|\.parquet|\.arrow)$", last)[1]
        if split.isdigit() and folders:
            split = folders.pop()
        config = "/".join(folders)
        table.setdefault(("default" if config in ("", "data") else config, split), []).append(file)
    return table


def contents(paths: str | list[str] | dict[str, float]) -> dict[str, str]:
    """file -> hash of what is in it."""
    hashes = {}
    for file in files_of(paths):
        with open(file, "rb") as opened:
            hashes[file] = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    return hashes


# ---------------------------------------------------------------------------------------------------------------------
# What a file holds

BLANK = b" \t\r\n\xef\xbb\xbf"  # whitespace, and the byte order mark that some editors put first
WITH_PYARROW = (".parquet", ".arrow")
MAGIC = {  # first bytes -> what begins with them, how such a file is to be named
    b"PAR1": ("parquet", "; rename it to end in .parquet"), b"ARROW1": ("arrow", "; rename it to end in .arrow"),
    b"\xff\xff\xff\xff": ("arrow", "; rename it to end in .arrow"),
    b"\x1f\x8b": ("gzip", "; rename it to end in .jsonl.gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ""), b"\xfd7zXZ": ("xz", ""), b"BZh": ("bzip2", ""), b"PK\x03\x04": ("zip", "")}


def check_file(file: str):
    """Raise if the first bytes are not what the name says, or if what reads such a file is not installed."""
    wanted = Path(file).suffix[1:] if file.endswith(WITH_PYARROW) else "JSON"
    if wanted != "JSON" and not importlib.util.find_spec("pyarrow"):
        raise ValueError(f"{file}: reading {wanted} needs pyarrow: pip install pyarrow")
    try:
        begin = beginning(file)
    except (OSError, EOFError, zlib.error):  # reading it will say why
        return
    held, way = next((known for magic, known in MAGIC.items() if begin.startswith(magic)), ("JSON", ""))
    text = begin.lstrip(BLANK).startswith((b"{", b"[")) or not json.detect_encoding(begin).startswith("utf-8")
    if held == wanted == "JSON" and b"\0" in begin and not text:  # in text, it is a bad row
        held = "binary data"
    if begin and held != wanted:
        way = way or "; files are JSONL or JSON, .gz of either, parquet or arrow"
        raise ValueError(f"{file}: holds {held}, and its name says {wanted}{way}")


def beginning(file: str) -> bytes:
    """The first bytes of a file, of a .gz those that are packed in it."""
    with open(file, "rb") as raw:
        begin = raw.read(256)
    if file.endswith(".gz") and begin.startswith(b"\x1f\x8b"):
        with gzip.open(file) as packed:
            begin = packed.read(256)
    return begin


# ---------------------------------------------------------------------------------------------------------------------
# Files -> rows


def read_rows(paths: str | list[str], show: bool = False) -> Iterator[tuple[str, object]]:
    """(where, row) of every row of files; where is file:line in JSONL, else file[index]."""
    files = files_of(paths)
    with report.bar(what="tokenizing", show=show, total=sum(map(os.path.getsize, files)), unit_scale=True) as bar:
        for file in files:
            try:
                yield from (arrow_rows if file.endswith(WITH_PYARROW) else rows_of)(file, bar)
            except (ValueError, RecursionError, EOFError, OSError, zlib.error, NotImplementedError) as error:
                raise ValueError(f"{file}: {error}") from None


def rows_of(file: str, bar) -> Iterator[tuple[str, object]]:
    """Rows of a JSON array, or undecoded JSONL lines, so that a malformed line is a bad row, not a bad file. bar: counts bytes."""
    before = bar.n
    with open(file, "rb") as raw, gzip.open(raw) if file.endswith(".gz") else contextlib.nullcontext(raw) as lines:
        if file.removesuffix(".gz").endswith(".json"):
            first = next((line for line in lines if line.strip(BLANK)), b"[")
            lines.seek(0)
            if first.lstrip(BLANK).startswith(b"[") or not json.detect_encoding(first).startswith("utf-8"):
                yield from ((f"{file}[{i}]", row) for i, row in enumerate(json.load(lines)))
                return
            try:
                json.loads(first)
            except ValueError:
                raise ValueError("expected a JSON array of rows, or one row per line") from None
        for i, line in enumerate(lines, 1):
            bar.update(before + raw.tell() - bar.n)
            if line.strip():
                yield f"{file}:{i}", line


def arrow_rows(file: str, bar) -> Iterator[tuple[str, dict]]:
    """Rows of a parquet or Arrow file, a record batch at a time. bar: counts bytes."""
    import pyarrow
    before, size, index = bar.n, os.path.getsize(file), 0
    with pyarrow.memory_map(file) as source:
        for part, batch in (parquet_batches if file.endswith(".parquet") else arrow_batches)(source):
            unlike_json = [field.name for field in batch.schema if UNLIKE_JSON.search(str(field.type))]
            for row in batch.to_pylist():
                for name in unlike_json:
                    row[name] = as_json(row[name])
                yield f"{file}[{index}]", row
                index += 1
            bar.update(before + int(size * part) - bar.n)


def parquet_batches(source) -> Iterator[tuple[float, object]]:
    """(part of the file that is read with it, record batch of up to 1,024 rows)"""
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(source) as table:
        seen = 0
        for batch in table.iter_batches(1024, use_threads=False):
            seen += len(batch)
            yield seen / table.metadata.num_rows, batch


def arrow_batches(source) -> Iterator[tuple[float, object]]:
    """As parquet_batches, of Arrow's IPC format: a stream, as `save_to_disk` writes, or a file."""
    import pyarrow
    if source.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(source)
        batches = ((i / table.num_record_batches, table.get_batch(i)) for i in range(table.num_record_batches))
    else:
        source.seek(0)
        batches = ((source.tell() / source.size(), batch) for batch in pyarrow.ipc.open_stream(source))
    for part, batch in batches:
        for start in range(0, len(batch), 1024):
            yield part, batch.slice(start, 1024)


UNLIKE_JSON = re.compile("binary|date|decimal|duration|extension|interval|map<|time")  # in the names of Arrow's types


def as_json(value):
    """A value as a JSON file would have it: bytes as text, a map as an object, a time, date or decimal as text."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return dict(map(as_json, value)) if value and isinstance(value[0], tuple) else [*map(as_json, value)]
    if isinstance(value, tuple):
        return str(value[0]), as_json(value[1])
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
