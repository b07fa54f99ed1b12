"""Runs as processes of their own: forked from one that has imported torch, so that a run starts in no time. Ranks find each other
as under torchrun (which tests/test_crash.py starts itself)."""
import math
import multiprocessing
import os
import socket
import tempfile
import time
from types import SimpleNamespace

from conftest import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def child(arguments: list[str], said: list[str], environment: dict):
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in zip((1, 2), said):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import train
    import torch
    torch.set_num_threads(1)
    train.main(arguments)


def start(arguments: list, said: list = (os.devnull, os.devnull), **environment):
    """A process that does what `python train.py ARGUMENTS` does on one thread; said: files for what it prints."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")  # the server's, if this starts it
    try:
        process = FORKS.Process(target=child, args=([*map(str, arguments)], [*map(str, said)], environment))
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


def run(arguments: list, ranks: int = 1, check: bool = True, timeout: float = 600, **environment) -> SimpleNamespace:
    """The run on so many ranks, to its end: returncode, and what all ranks printed. When a rank fails, the others have ten seconds to
    follow; after `timeout` seconds they are ended."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # it keeps the port for the ranks, from whoever looks for one
        free.bind(("localhost", 0))
        address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(ranks))
        said = [f"{folder}/out", f"{folder}/err"]
        places = [dict(address, RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {} for rank in range(ranks)]
        processes = [start(arguments, said, **environment, **place) for place in places]
        end, grace = time.monotonic() + timeout, 10
        while any(p.exitcode is None for p in processes):
            time.sleep(0.01)
            if any(p.exitcode for p in processes):
                end, grace = min(end, time.monotonic() + grace), math.inf
            if time.monotonic() > end:
                [p.kill() for p in processes]
        stdout, stderr = (open(path).read() if os.path.exists(path) else "" for path in said)
    done = SimpleNamespace(returncode=max((p.exitcode for p in processes), key=abs), stdout=stdout, stderr=stderr)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
