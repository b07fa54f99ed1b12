"""Files -> rows: JSONL, JSON arrays and .gz of either, each row with the place that an error names."""
import contextlib
import difflib
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import report


def files_of(paths: str | list[str]) -> list[str]:
    """The files that names and globs stand for."""
    files = []
    for name in [paths] if isinstance(paths, str) else paths:
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not Path(name).is_file() else [name]
        if not found:
            raise ValueError(f"no file matches {name!r}")
        for file in [file for file in found if not Path(file).is_file()]:
            near = difflib.get_close_matches(file, [str(p) for p in Path(file).parent.glob("*")], 1)
            raise ValueError(f"{file} is a folder; name files, or a glob as '{file}/*.jsonl'" if Path(file).is_dir() else
                             f"{file}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
        files += found
    return files


def contents(paths: str | list[str]) -> dict[str, str]:
    """file -> hash of what is in it."""
    hashes = {}
    for file in files_of(paths):
        with open(file, "rb") as opened:
            hashes[file] = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    return hashes


def read_rows(paths: str | list[str], show: bool = False) -> Iterator[tuple[str, object]]:
    """(where, row) of every row of JSONL files, JSON arrays, .gz of either; where is file:line, or file[index]."""
    files = files_of(paths)
    with report.bar(what="tokenizing", show=show, total=sum(map(os.path.getsize, files)), unit_scale=True) as bar:
        for file in files:
            try:
                yield from rows_of(file, bar)
            except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{file}: {error}") from None


BLANK = b" \t\r\n\xef\xbb\xbf"  # whitespace, and the byte order mark that some editors put first


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
