"""Where a run computes: this process, its rank, device, precision and memory; how it handles signals, and how
it exits."""
import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import config
import data


class Machine(NamedTuple):
    """Where a run computes: this process's place among the ranks, its device and precision."""
    rank: int
    world: int
    device: str
    dtype: torch.dtype  # of compute
    compiled: bool

    def autocast(self):
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device, self.dtype) if low else contextlib.nullcontext()

    def layout(self, tokens: int) -> data.Layout:
        """How packed streams of up to that many tokens are laid out on this machine."""
        return data.Layout(tokens, data.varlen(self.device, self.dtype), self.compiled, self.device)

    def sum(self, tensor):
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor) -> list:
        """The (n,) tensors of all ranks, in rank order; n may differ between ranks."""
        return [tensor] if self.world == 1 else [own.to(tensor) for own in self.share(tensor.cpu())]

    def share(self, value) -> list:
        """The values of all ranks, in rank order; any picklable object."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on any rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def peak_memory_gb(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def keep_memory():
    """Keep freed memory in the process. By default, glibc returns a freed tensor's pages to the system and faults them in again
    for the next tensor, which on a CPU takes up to a third of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors, too, are allocated on the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the top of the heap is never returned


def find_machine(cfg) -> Machine:
    device, dtype = config.machine(cfg)
    cuda = device == "cuda"
    if not cuda:
        keep_memory()
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', and torch finds no CUDA device; install a CUDA build of torch, or --device=cpu")
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun
        if cuda:
            own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own)
            dist.init_process_group("nccl", timeout=timedelta(hours=2), device_id=own)  # the others wait while rank 0 writes
        else:
            dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Machine(rank, world, device, getattr(torch, dtype), cuda if cfg.compile == "auto" else cfg.compile)


def noting_signals(steps: range, told: list[int]) -> Iterator[int]:
    """Yield the steps; meanwhile, the first SIGTERM or SIGINT is appended to `told`. A second one stops the process at once,
    unless it comes within a second: launchers forward signals that the terminal has already sent."""
    if threading.current_thread() is not threading.main_thread():
        yield from steps
        return

    def note(number, frame):
        if not told:
            told.append(number)
            first.append(time.monotonic())
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing this step, then saving; a second one stops at once\n".encode())
        elif time.monotonic() > first[0] + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    first, before = [], {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield from steps
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(told: list[int]) -> SystemExit:
    """The end of a run that a signal has asked for, here or on another rank."""
    return SystemExit(128 + (told[0] if told else signal.SIGTERM))


def leave(error: BaseException):
    """Exit this rank immediately: NCCL's own shutdown would wait for the other ranks, which wait for this one."""
    code = error.code if isinstance(error, SystemExit) else None
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(code, str):
        print(code, file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def on_purpose(error: Exception) -> bool:
    """Was it raised by a `raise` of this project? Then its message is for the user; any other is a bug, and wants a traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    root = Path(__file__).parent
    return Path(last.filename).parent in (root, root / "parts") and last.line.startswith("raise")


@contextlib.contextmanager
def ending():
    """Exit cleanly: an error that the user can fix prints one line, any other a traceback, and no other rank is left waiting."""
    try:
        yield
    except ValueError as error:
        if not on_purpose(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first step or behind the last: in between, noting_signals hears it
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers repeat what the terminal has sent
        print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:  # from gloo, when a rank is gone; NCCL's watchdog kills the process itself
        if not (dist.is_initialized() and re.search("connection (closed|reset)|timed out", str(error), re.IGNORECASE)):
            raise
        said = f"error: another rank is gone ({str(error).splitlines()[0][:100]}); checkpoints are whole: go on with --resume"
        print(said, file=sys.stderr, flush=True)  # before the launcher ends this one too
        sys.exit(1)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if not error.filename:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error).lower():
            raise
        sys.exit(f"error: the disk is full ({error}); make room; checkpoints are whole: a run can go on with --resume")
    finally:
        if dist.is_initialized():
            error = sys.exception()
            agreed = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128  # a signal, on every rank
            agreed = agreed and not isinstance(error.__context__, KeyboardInterrupt)  # it may be of this rank alone
            if error and not agreed and dist.get_backend() == "nccl":
                leave(error)
            gc.collect()  # frees DDP's wrapper before its process group is destroyed
            dist.destroy_process_group()
