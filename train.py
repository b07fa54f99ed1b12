"""Train any objective: `python train.py --config configs/dpo.py [--key=value ...]`, or under torchrun on many GPUs.

Reads top to bottom in the order in which things happen: machine, stage, model, data, columns, the loop, files.
Nothing here knows an objective by name: what a loss needs follows from what it reads (losses.READINGS).
"""
import contextlib
import errno
import functools
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import data
import losses
import model
import reference
import reward
import rollout


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
        """How streams of that many tokens are laid out here."""
        varlen = self.device == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        return data.Layout(tokens, varlen, self.compiled, self.device)

    def sum(self, tensor):
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor) -> list:
        """The (n,) of every rank, of whatever lengths."""
        if self.world == 1:
            return [tensor]
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(tensor)
        sizes = self.sum(sizes).tolist()
        table = tensor.new_zeros(self.world, max(sizes))
        table[self.rank, :len(tensor)] = tensor
        return [row[:size] for row, size in zip(self.sum(table), sizes)]

    def share(self, value) -> list:
        """The value of every rank, whatever it is."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is raised on one of the ranks."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def find_machine(cfg) -> Machine:
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', and torch finds no CUDA device; install a CUDA build of torch, or --device=cpu")
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if cuda else "float32"
    return Machine(rank, world, device, getattr(torch, dtype), cuda if cfg.compile == "auto" else cfg.compile)


# ---------------------------------------------------------------------------------------------------------------------
# A run and the stage it starts from


def train(cfg):
    """One run, from a resolved config to out_dir/model."""
    machine, digest, out = find_machine(cfg), config.digest(cfg), Path(cfg.out_dir)
    say = print if machine.rank == 0 else lambda *_: None
    if out.exists() and any(out.iterdir()) and not cfg.resume:
        raise ValueError(f"out_dir {cfg.out_dir} is not empty; go on with --resume, name another --out_dir, or remove it")
    terms, kind = config.terms(cfg, machine.compiled), config.data_kind(cfg)
    supply_of = SUPPLIES.get(kind, Rows)
    missing = losses.streams(terms) - model.HEADS.keys() - SOURCES.keys() - losses.RUNNING.keys() - supply_of.provides
    if missing:
        raise ValueError(f"objective {'+'.join(cfg.weights)}: a run cannot train it, nothing provides "
                         f"{', '.join(sorted(missing))}; on tensors it works, see losses.py")
    folders = {name: run_stage(name, cfg, machine, say) for name in config.models(cfg) if name.endswith(".py")}
    folder_of = lambda name: folders.get(name, name)
    start_from, teacher = folder_of(cfg.init_from), folder_of(cfg.teacher)
    if machine.compiled:
        torch.compiler.reset()  # a stage before this one had shapes of its own
    machine.barrier()

    # Model and rows
    tokenizer_folder = Path(cfg.tokenizer) if cfg.tokenizer else model.find_folder(start_from)
    tokenizer = data.Tokenizer(tokenizer_folder, cfg.chat_template)
    outputs = sorted(losses.streams(terms) & model.HEADS.keys())  # of the model; what else losses read are columns
    apart = {"values"} if cfg.critic else set()  # what another model beside the policy says
    decoder, saved_dtype = model.load_model(cfg, machine, start_from, tokenizer, sorted({*outputs} - apart))
    if cfg.critic:
        tokenizer.same_ids(data.Tokenizer(model.find_folder(folder_of(cfg.critic))))
        decoder.critic = model.load_model(cfg, machine, folder_of(cfg.critic), tokenizer, ["reward"])[0]
    datasets = {split: data.load(paths, kind, tokenizer, cfg, machine.rank == 0)
                for split, paths in (("train", cfg.train_data), ("eval", cfg.eval_data)) if paths}
    prompts = datasets.pop("eval", None) if kind == "prompts" else None
    if prompts and cfg.eval_prompts:
        raise ValueError("eval_data and eval_prompts are both prompts to answer here; name one of them")
    for split, dataset in datasets.items():
        say(f"{split} rows: " + ", ".join(f"{dataset.counts[name]:,} {name}" for name in data.COUNTS))
        model.check_lengths(decoder, dataset, cfg.max_new_tokens)
    if "train" not in datasets:
        raise ValueError("train_data is empty; name the files to train on")
    if cfg.eval_prompts and not (cfg.check or cfg.reward):
        raise ValueError("eval_prompts need check, a function (prompt, completion, row) -> bool in the config file")
    if cfg.eval_prompts and "lm_head" not in model.modules(outputs):
        raise ValueError(f"eval_prompts are answered by a language model, and {'+'.join(cfg.weights)} trains one without its head")
    prompts = data.load(cfg.eval_prompts, "prompts", tokenizer, cfg, False) if cfg.eval_prompts else prompts
    if prompts:
        model.check_lengths(decoder, prompts, cfg.max_new_tokens)
    layout = machine.layout(supply_of.stream_length(datasets, cfg))

    # Where steps come from, and the columns that sources add to each: split -> (batches, epoch) -> None
    run = Run(cfg, machine, decoder, tokenizer, start_from, teacher, datasets, layout, losses.streams(terms))
    supply = supply_of(run, folder_of)
    wanted = (run.streams & SOURCES.keys()) - supply.provides
    sources = [{"train": supply.add}, *[make(run) for make in dict.fromkeys(SOURCES[name] for name in sorted(wanted))]]
    running = {name: torch.zeros(2, dtype=torch.float64, device=machine.device)  # sum and count of a metric over all steps
               for name in sorted(losses.streams(terms) & losses.RUNNING.keys())}
    sources.append(dict.fromkeys(datasets, running_source(running)))
    if any(term.objective.coupled for term in terms):
        sources.append(dict.fromkeys(datasets, step_source(decoder, terms, outputs, machine)))

    # Optimizer and resume
    for trunk in [module for module in decoder.modules() if isinstance(module, model.Trunk)]:
        trunk.checkpointing = cfg.activation_checkpointing
    wrapped = decoder if machine.world == 1 else DistributedDataParallel(
        decoder, device_ids=[torch.cuda.current_device()] if machine.device == "cuda" else None,
        gradient_as_bucket_view=True, broadcast_buffers=False)
    named = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    groups, parameters, policy = {}, [*named.values()], []
    for name, parameter in named.items():
        of_critic = name.split(".")[0] in model.CRITIC
        groups.setdefault((parameter.dim() > 1, of_critic), []).append(parameter)
        policy += [] if of_critic else [parameter]
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": cfg.weight_decay * matrix, "peak": of_critic and cfg.critic_lr or cfg.lr}
         for (matrix, of_critic), group in sorted(groups.items(), reverse=True)], lr=cfg.lr, betas=cfg.betas, fused=True)
    scaler = torch.amp.GradScaler(machine.device, enabled=machine.dtype == torch.float16)
    skipped = torch.zeros(2, device=machine.device)  # steps that were not finite: all of them, and those in a row up to now
    steps = cfg.max_steps or math.ceil(cfg.epochs * supply.per_epoch)
    done = resume(out, decoder, optimizer, scaler, running, skipped, supply, machine, say) if cfg.resume else 0

    predicted = [name for name in losses.PREDICTED if any(name in term.reads for term in terms)]

    def evaluate(step: int) -> dict:
        """The eval rows through the training path without gradient, every rank its share, each row once."""
        if "eval" not in datasets and prompts is None:
            return {}
        metrics, begin = {}, time.perf_counter()
        with torch.no_grad(), machine.autocast():
            if "eval" in datasets:
                dataset, meter = datasets["eval"], Meter()
                counts = data.count(dataset.examples)
                scores = torch.zeros(int(dataset.pair_offsets[-1]), len(predicted), dtype=torch.float64, device=machine.device)
                for rows in data.in_order(dataset):
                    batches, _ = data.micro_batches(dataset, rows, layout, machine.rank, machine.world)
                    for source in sources[1:]:
                        source["eval"](batches, 0)
                    for batch in batches:
                        streams = decoder(batch, outputs)
                        meter.add(*losses.total(terms, streams, batch, counts))
                        for column, name in enumerate(predicted):
                            values = losses.read(losses.READINGS[name], {**batch, **streams})
                            scores[batch["pair_index"], column] = values.to(scores)
                metrics |= meter.read(machine)
                write_predictions(out, machine.sum(scores), predicted, decoder, machine)
            if prompts:
                metrics |= judge(decoder, tokenizer, prompts, supply.rewards, cfg, machine)
        return write_line({"step": step, "split": "eval", **metrics, "seconds": time.perf_counter() - begin})

    def write_line(line: dict) -> dict:
        if machine.rank == 0:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(finite) + "\n")
        return line

    def save(step: int):
        save_checkpoint(out, step, decoder, optimizer, scaler, running, skipped, supply, cfg, machine)

    def unless_lost(done: int, act: Callable):
        """act(steps done), which calls the user's functions: if one of them fails, nothing of the run is lost."""
        try:
            return act(done)
        except ValueError:
            save(done)
            raise

    def gradient(dataset, rows, epoch: int, rank: int = 0, world: int = 1) -> tuple["Meter", dict]:
        """This rank's share of these rows, forward and backward; what they sum up to and what they count."""
        batches, counts = data.micro_batches(dataset, rows, layout, rank, world)
        for source in sources:
            source["train"](batches, epoch)
        meter = Meter()
        for i, batch in enumerate(batches):
            waits = machine.world > 1 and i < len(batches) - 1  # gradients are reduced with the last one
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                with machine.autocast():
                    streams = wrapped(batch, outputs)
                loss, metrics = losses.total(terms, streams, batch, counts)
                scaler.scale(loss * machine.world).backward()  # DDP averages over ranks, the counts are of all of them
            meter.add(loss, metrics)
        return meter, counts

    def finite(meter: "Meter", grad_norm) -> torch.Tensor:
        """Of all ranks, on the device."""
        return machine.sum(meter.sums["loss"][0].clone()).isfinite() & grad_norm.isfinite()

    def stop_for(step: int, dataset, rows):
        """Save, and name the rows of the step whose loss or gradient is not finite when they are alone in it."""
        in_a_row = int(skipped[1])
        skipped[1] = 0  # a resumed run counts anew
        save(step)
        names = []
        for row in rows:
            meter, _ = gradient(dataset, [row], (step - 1) // supply.per_epoch)
            if not finite(meter, torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])):
                names.append(dataset.examples[row].where)
            optimizer.zero_grad()
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        said = f"not finite alone: {', '.join(names[:5])}{more}" if names else "each of them alone is finite"
        raise ValueError(f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite, "
                         f"and changed no weight. Of the {len(rows)} rows of this step, {said}. checkpoint-{step} is saved: "
                         f"repair the rows or lower lr, and go on with --resume")

    # The loop
    if machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", {"digest": digest, "finished": False, "config": config.as_json(cfg)})
    first = {} if done else unless_lost(0, evaluate)
    last, show = first, next((t.objective.show for t in terms if t.objective.show), None)
    bar = tqdm(total=steps, initial=done, desc=out.name, disable=machine.rank > 0, mininterval=0.2 if sys.stderr.isatty() else 30,
               bar_format="{desc} |{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")  # fits 80 columns
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin, since, tokens = time.perf_counter(), 0, 0  # of the steps since the last line
    told = []  # to stop
    for step in noting_signals(range(done + 1, steps + 1), told):  # its number is that of the steps done when it ends
        pause = time.perf_counter()
        dataset, rows = unless_lost(step - 1, supply.rows)
        begin += time.perf_counter() - pause
        meter, counts = gradient(dataset, rows, (step - 1) // supply.per_epoch, machine.rank, machine.world)
        add_step(running, meter, machine)
        lr = learning_rate(cfg, cfg.lr, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, group["peak"], step - 1, steps)
        for parameter in policy if step <= cfg.critic_warmup else ():
            parameter.grad = None  # the optimizer passes it by
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        bad = (~finite(meter, grad_norm)).float()
        skipped = torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad])
        optimizer.found_inf = bad  # a fused optimizer passes the step by, weights and moments, without asking the host
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        bar.update()
        since, tokens = since + 1, tokens + counts["stream_tokens"]

        if step % cfg.log_every == 0 or step == steps:
            metrics = meter.read(machine)  # waits for the device
            seconds = (time.perf_counter() - begin) / since
            line = write_line({
                "step": step, "split": "train", **supply.metrics, **metrics, "grad_norm": grad_norm.item(), "lr": lr,
                "skipped_steps": int(skipped[0]), "tokens": counts["stream_tokens"], "tokens_per_second": tokens / since / seconds,
                "seconds": seconds, "peak_memory_gb": peak_memory_gb(machine)})
            if skipped[1] >= cfg.max_skipped_steps:
                stop_for(step, dataset, rows)
            bar.set_postfix({"loss": f"{line['loss']:.4f}", **({show.split("/")[-1]: f"{line[show]:.3f}"} if show in line else {}),
                             "tok/s": f"{line['tokens_per_second']:,.0f}"})
            begin, since, tokens = time.perf_counter(), 0, 0
        pause = time.perf_counter()
        if step == steps or (cfg.eval_every and step % cfg.eval_every == 0):
            last = unless_lost(step, evaluate)
        reads = machine.world == 1 or step % cfg.log_every == 0  # ranks agree where they wait for each other anyway
        stops = step < steps and reads and machine.any(bool(told))
        if stops or cfg.save_every and step % cfg.save_every == 0:
            save(step)
        if stops:
            bar.close()
            say(f"stopped by a signal after step {step}: {out / f'checkpoint-{step}'} is saved, go on with --resume")
            raise SystemExit(128 + (told[0] if told else signal.SIGTERM))
        begin += time.perf_counter() - pause
    bar.close()

    # The result
    if machine.rank == 0:
        dtype = getattr(torch, cfg.save_dtype) if cfg.save_dtype else saved_dtype
        template = tokenizer.chat_template if cfg.chat_template else ""
        pad = padding(tokenizer, datasets.values()) if "reward" in outputs else ()
        publish(out / "model", lambda folder: model.save(decoder, folder, dtype, tokenizer_folder, template, pad))
        write_json(out / "run.json", {"digest": digest, "finished": True, "config": config.as_json(cfg)})
        changes = [f"{name} {first[name]:.4g} -> {last[name]:.4g}" for name in ("loss", show, "exact_match")
                   if name in first and name in last]
        say(f"{out}: {'; '.join(['before -> after', *changes]) if changes else 'done'}; model in {out / 'model'}")
    machine.barrier()
    if machine.any(bool(told)):  # in the last step: it is done, what would follow is not
        raise SystemExit(128 + (told[0] if told else signal.SIGTERM))


def noting_signals(steps: range, told: list[int]) -> Iterator[int]:
    """The steps; while they last, SIGTERM and SIGINT go into told. A second one acts at once, unless it comes within a second:
    launchers repeat what a terminal has sent."""
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


def run_stage(path: str, cfg, machine: Machine, say: Callable) -> str:
    """The model folder of another config's run. The run is made first where it is missing, taken up where it was cut
    off, and made again where it came from another config (the old folder is kept under another name)."""
    stage = config.load_stage(path, cfg)
    out, digest = Path(stage.out_dir), config.digest(stage)
    machine.barrier()
    found = model.read_json(out / "run.json") if (out / "run.json").is_file() else {"digest": None, "finished": False}
    machine.barrier()  # every rank has looked before any of them writes
    if found["digest"] == digest and found["finished"] and (out / "model").is_dir():
        say(f"{path}: {out / 'model'} is there")
        return str(out / "model")
    if out.exists() and any(out.iterdir()) and found["digest"] != digest and machine.rank == 0:
        aside = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.old{i}")).exists())
        out.rename(aside)
        say(f"{path}: {out} came from another config or seed; kept as {aside}")
    machine.barrier()
    say(f"{path}: running this stage first")
    stage.resume = found["digest"] == digest
    train(stage)
    gc.collect()  # compiled blocks are in reference cycles
    return str(out / "model")


class Run(NamedTuple):
    """What a source may want to know."""
    cfg: object
    machine: Machine
    decoder: model.Decoder
    tokenizer: data.Tokenizer
    start_from: str
    teacher: str
    datasets: dict
    layout: data.Layout
    streams: set  # that the losses read

    def reference(self) -> model.Decoder:
        """From its own path, never from the live model: a resumed run has the same reference."""
        name = self.cfg.reference or self.start_from
        return model.load_model(self.cfg, self.machine, name, self.tokenizer, ["log_probs"])[0].requires_grad_(False)

    def precision(self) -> str:
        """What numbers depend on besides weights and rows."""
        machine = self.machine
        return f"{machine.device} {machine.dtype} {torch.__version__} compiled={machine.compiled} {self.layout.tokens}"

    def reference_table(self, dataset: data.Dataset) -> torch.Tensor:
        """The reference's log-probs of every scored token of these rows, computed once and kept on disk."""
        weights = reference.fingerprint(self.cfg.reference or self.start_from, config.as_json(self.cfg))
        return reference.log_probs(self.reference, weights, dataset, self.layout, self.precision(), self.machine,
                                   self.cfg.cache_dir)


def reference_source(run: Run) -> dict[str, Callable]:
    if run.cfg.reference_live:
        return dict.fromkeys(run.datasets, reference.live(run.reference(), run.machine.autocast))
    return {split: reference.from_table(run.reference_table(dataset)) for split, dataset in run.datasets.items()}


def mismatched_source(run: Run) -> dict[str, Callable]:
    """KTO's estimate of the KL: log-probs of the step's prompts with responses of other prompts, under the current policy, by
    a pass without gradient, and under the reference, looked up. All ranks get those of the whole step."""
    machine = run.machine

    def of(dataset):
        @functools.lru_cache(maxsize=1)
        def rows_of(epoch):
            rows = data.mismatched(dataset, run.cfg.seed, epoch)
            return rows, run.reference_table(rows) if "reference_KL_logps" in run.streams else None

        def add(batches, epoch):
            rows, table = rows_of(epoch)
            mine = torch.cat([batch["rows"] for batch in batches]).unique().cpu().numpy()
            parts = {"policy_KL_logps": [], "reference_KL_logps": []}
            with torch.no_grad(), machine.autocast():
                for batch in data.micro_batches(rows, mine, run.layout)[0]:
                    of_policy = run.decoder(batch, ["log_probs"])["log_probs"]
                    parts["policy_KL_logps"].append(losses.by_response(batch, of_policy).sum(-1))
                    if table is not None:
                        parts["reference_KL_logps"].append(losses.by_response(batch, table[batch["scored_index"]]).sum(-1))
            for name in [name for name, logps in parts.items() if logps]:
                logps = torch.cat(machine.gather(torch.cat(parts[name])))
                for batch in batches:
                    batch[name] = logps
        return add
    return {split: of(dataset) for split, dataset in run.datasets.items()}


def running_source(running: dict) -> Callable:
    """Means over all earlier steps."""
    def add(batches: list[dict], epoch: int):
        means = {name: total / count.clamp(min=1) for name, (total, count) in running.items()}
        for batch in batches:
            batch.update(means)
    return add


def add_step(running: dict, meter: "Meter", machine: Machine):
    """A step's sums into the running ones; not if they are not finite, they would spoil all later steps."""
    for name in running:
        metric = losses.RUNNING[name]
        if metric not in meter.sums:
            raise ValueError(f"{name} is the running mean of the metric {metric!r}, and no loss of this run reports it")
        added = machine.sum(meter.sums[metric].clone())
        running[name] += torch.where(added.isfinite().all(), added, 0)


def step_source(decoder, terms: list, outputs: list[str], machine: Machine) -> Callable:
    """What coupled losses read of the whole step, by a pass without gradient. Runs after all other sources. (An eval couples
    the rows of each piece of data.in_order; alone in its step, a micro-batch needs no pass.)"""
    wanted = {name: reading for term in terms if term.objective.coupled for name, reading in term.reads.items()}

    def add(batches: list[dict], epoch: int):
        if machine.world == len(batches) == 1:
            batches[0]["step"] = losses.Step(1, {})
            return
        with torch.no_grad(), machine.autocast():
            mine = [{name: losses.read(reading, available) for name, reading in wanted.items()}
                    for available in ({**batch, **decoder(batch, outputs)} for batch in batches)]
        for name in [name for name, own in mine[0].items() if own.dim() > 1]:
            raise ValueError(f"{name} has shape {tuple(mine[0][name].shape)}: a coupled loss reads (n,) and () tensors alone")
        parts = int(machine.sum(torch.tensor(float(len(batches)), device=machine.device)))
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


def teacher_source(run: Run) -> dict[str, Callable]:
    """The teacher's logits, not yet made: its hidden states and its head; or its highest ones, from the disk."""
    cfg, machine = run.cfg, run.machine
    if not run.teacher:
        raise ValueError("distillation needs teacher, a model folder or a config file")
    run.tokenizer.same_ids(data.Tokenizer(model.find_folder(run.teacher)))

    def frozen():
        decoder = model.load_model(cfg, machine, run.teacher, run.tokenizer, ["logits"])[0].requires_grad_(False)
        for dataset in run.datasets.values():
            model.check_lengths(decoder, dataset)
        return decoder

    def live(decoder):
        def add(batches, epoch):
            for batch in batches:
                with torch.no_grad(), machine.autocast():
                    batch["teacher_logits"] = decoder(batch, ["logits"])["logits"]
        return add
    if not cfg.teacher_top_k:
        return dict.fromkeys(run.datasets, live(frozen()))
    if any(given.get("jsd_beta") == 1 for given in cfg.bound.values()):
        raise ValueError("teacher_top_k with jsd_beta = 1: the reverse KL asks for the teacher's probability of every token "
                         "that the student takes, and only its highest are kept; leave out one of the two")
    known = run.tokenizer.fast.get_vocab_size()
    if cfg.teacher_top_k > known:
        raise ValueError(f"teacher_top_k = {cfg.teacher_top_k} and the vocabulary has {known} tokens")
    described = model.find_folder(run.teacher) / "config.json"
    vocab = model.read_shape(model.read_json(described), str(described)).vocab_size

    def of(dataset):
        top, index = reference.top_logits(frozen, reference.fingerprint(run.teacher, {}), dataset, run.layout,
                                                 cfg.teacher_top_k, run.precision(), machine, cfg.cache_dir)

        def add(batches, epoch):
            for batch in batches:
                at = batch["scored_index"]
                batch["teacher_logits"] = losses.TopLogits(top[at], index[at], vocab)
        return add
    return {split: of(dataset) for split, dataset in run.datasets.items()}


SOURCES = {"reference_log_probs": reference_source, "teacher_logits": teacher_source, "policy_KL_logps": mismatched_source,
           "reference_KL_logps": mismatched_source}  # column that a loss reads -> what adds it to the batches of a step


class Rows:
    """The steps of a run on fixed rows."""
    provides, metrics, rewards = frozenset(), {}, None

    def __init__(self, run: Run, folder_of: Callable):
        self.dataset, self.size, self.seed = run.datasets["train"], run.cfg.batch_size, run.cfg.seed
        self.per_epoch = data.steps_per_epoch(self.dataset, self.size)

    @staticmethod
    def stream_length(datasets: dict, cfg) -> int:
        return data.stream_length(list(datasets.values()), cfg.batch_size, cfg.micro_batch_tokens)

    def rows(self, step: int):
        """The dataset and the examples of a step, counted from 0."""
        return self.dataset, data.step_rows(self.dataset, step, self.size, self.seed)

    def add(self, batches: list[dict], epoch: int):
        """No columns."""

    def save(self, folder: Path, step: int) -> dict:
        return {}

    def restore(self, folder: Path, step: int, state: dict):
        """Rows are f(seed, step)."""


SUPPLIES = {"prompts": rollout.Rollouts}  # kind of rows -> where the steps of a run come from, if not from the rows themselves


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


class Meter:
    """Sums and counts of a step or an eval, kept on the device until they are read."""

    def __init__(self):
        self.sums = {}

    def add(self, loss, metrics: dict):
        for name, pair in {"loss": (loss.detach(), torch.zeros_like(loss)), **metrics}.items():
            pair = torch.stack([part.double() for part in pair])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self, machine: Machine) -> dict[str, float]:
        """name -> mean over all micro-batches and ranks (of the loss: its sum, the shares add up)."""
        table = machine.sum(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / (count or 1) for name, (total, count) in zip(self.sums, table) if count or name == "loss"}
        return means | {name: means[a] - means[b] for name, (a, b) in losses.DERIVED.items() if a in means and b in means}


def learning_rate(cfg, peak: float, step: int, steps: int) -> float:
    """That of a step counted from 0: linear warmup over warmup_steps, then the schedule, which would reach min_lr at the
    step after the last."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    part = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[cfg.schedule]
    return cfg.min_lr + (peak - cfg.min_lr) * shape


def judge(decoder, tokenizer, prompts, rewards, cfg, machine: Machine) -> dict[str, float]:
    """Greedy answers to prompts: the share that passes cfg.check, and their mean reward."""
    mine = prompts.examples[machine.rank::machine.world]
    answers = rollout.answers_to([e.prompt.tolist() for e in mine], decoder, tokenizer, cfg)
    texts, found = [rollout.written(tokenizer, answer) for (answer,) in answers], {}
    if cfg.check:
        found["exact_match"] = [cfg.check(e.row["prompt"], text, e.row) for e, text in zip(mine, texts)]
    if rewards:
        trees = [rollout.answered(e, some) for e, some in zip(mine, answers)]
        said = reward.together(machine, lambda: rewards(trees, [[text] for text in texts]), cfg.bad_rewards)[machine.rank]
        found["reward"] = [value for (value,) in said if not isinstance(value, str)]
    counts = torch.tensor([[sum(map(float, x)), len(x)] for x in found.values()], dtype=torch.float64, device=machine.device)
    return {name: total / max(count, 1) for name, (total, count) in zip(found, machine.sum(counts).tolist())}


REWARD = ("reward_mean", "reward_std")  # of the eval rows, in the config.json of a reward model


def write_predictions(out: Path, scores: torch.Tensor, predicted: list[str], decoder, machine: Machine):
    """(pairs, readings) of the eval rows, in their order, and their mean and deviation for the model's config.json."""
    if not predicted:
        return
    decoder.config |= dict(zip(REWARD, (scores.mean().item(), scores.std(correction=0).item())))
    if machine.rank == 0:
        keys = [losses.PREDICTED[name] for name in predicted]
        write_text(out / "predictions.jsonl", "".join(json.dumps(dict(zip(keys, row))) + "\n" for row in scores.tolist()))


def padding(tokenizer: data.Tokenizer, datasets) -> tuple[int, str]:
    """(id, token) that a reward model may be padded with: one that no response ends in, a special one if there is any (else the
    token is "": its id is for config.json alone)."""
    ends = {int(ids[-1]) for dataset in datasets for e in dataset.examples for ids in e.responses} | {tokenizer.eos}
    for i in sorted(range(tokenizer.fast.get_vocab_size()), key=lambda i: (i not in tokenizer.special, i == tokenizer.bos, i)):
        if i not in ends and tokenizer.fast.id_to_token(i) is not None:
            return i, tokenizer.fast.id_to_token(i) if i in tokenizer.special else ""
    raise ValueError(f"{tokenizer.folder}: every token of the vocabulary ends a response; none is left for padding")


def peak_memory_gb(machine: Machine) -> float:
    if machine.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Files: written under a temporary name, fsynced, renamed


def write_text(path: Path, text: str):
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        fsync(part)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def write_json(path: Path, value: dict):
    write_text(path, json.dumps(value, indent=1) + "\n")


def publish(folder: Path, write: Callable):
    """A folder that is whole or not there."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    try:
        write(part)
        for path in [*part.iterdir(), part]:
            fsync(path)
    except Exception:
        shutil.rmtree(part)  # on a full disk the space is needed
        raise
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def save_checkpoint(out: Path, step: int, decoder, optimizer, scaler, running: dict, skipped, supply, cfg, machine: Machine):
    """Master weights, optimizer state and what carries between steps. Fixed rows need no state: they are f(seed, step)."""
    if machine.rank == 0:
        def write(folder):
            weights = dict(decoder.named_parameters())
            save_file({n: p.detach().contiguous() for n, p in weights.items()}, folder / "model.safetensors")
            save_file({f"{n}.{key}": value for n, p in weights.items() for key, value in optimizer.state[p].items()},
                      folder / "optimizer.safetensors")
            write_json(folder / "state.json", {"step": step, "world_size": machine.world, "scaler": scaler.state_dict(),
                                               "supply": supply.save(folder, step),
                                               "running": {name: pair.tolist() for name, pair in running.items()},
                                               "skipped": skipped.tolist(),
                                               "reward": {k: v for k, v in decoder.config.items() if k in REWARD},
                                               "config": config.as_json(cfg)})
        publish(out / f"checkpoint-{step}", write)
        for old in checkpoints(out)[:-cfg.keep_checkpoints]:
            shutil.rmtree(old)
    machine.barrier()


def resume(out: Path, decoder, optimizer, scaler, running: dict, skipped, supply, machine: Machine, say: Callable) -> int:
    """Put the newest checkpoint back; metrics past it are dropped. Returns the steps done."""
    found = checkpoints(out)
    machine.barrier()
    folder, step = (found[-1], int(found[-1].name.removeprefix("checkpoint-"))) if found else (None, 0)
    say(f"resuming from {folder}" if folder else f"{out} holds no checkpoint: starting from step 0")
    if machine.rank == 0 and (out / "metrics.jsonl").is_file():
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and step and json.loads(line)["step"] <= step]
        write_text(out / "metrics.jsonl", "".join(kept))
    if not folder:
        return 0
    weights, moments, state = read_checkpoint(folder, decoder)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(weights[name])
            if f"{name}.step" not in moments:  # frozen, or of a policy whose critic has the first steps
                continue
            optimizer.state[parameter] = {key: moments[f"{name}.{key}"].to(machine.device)
                                          for key in ("step", "exp_avg", "exp_avg_sq")}
    decoder.config |= state.get("reward", {})
    for name, pair in running.items():
        if name not in state.get("running", {}):
            raise ValueError(f"{folder / 'state.json'}: {name} is missing; another objective was trained there, name another "
                             f"--out_dir")
        pair.copy_(torch.tensor(state["running"][name], dtype=pair.dtype))
    skipped.copy_(torch.tensor(state.get("skipped", [0.0, 0.0])))
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    supply.restore(folder, step, state["supply"])
    return step


def read_checkpoint(folder: Path, decoder) -> list[dict]:
    """Weights, the optimizer's tensors and state.json, or an error that names the file and the way out."""
    readers = {"model.safetensors": load_file, "optimizer.safetensors": load_file, "state.json": model.read_json}
    found, file = [], folder
    try:
        for name, read in readers.items():
            file = folder / name
            found.append(read(file))
        missing = {"supply", "scaler"} - found[2].keys()
        if missing:
            raise ValueError(f"{' and '.join(sorted(missing))} missing")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}; remove the folder to go on from an older one, or name another --out_dir") from None
    weights = found[0]
    other = [name for name, p in decoder.named_parameters() if name not in weights or weights[name].shape != p.shape]
    if other:
        raise ValueError(f"{folder / 'model.safetensors'}: {other[0]} is not that of this model; another one was trained there, "
                         f"name another --out_dir")
    return found


def main(arguments: list[str]):
    if "--help" in arguments or "-h" in arguments:
        return print(config.help_text())
    try:
        train(config.load(arguments))
    except ValueError as error:  # raised by this project: the message is for the user; from anywhere else: a bug
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).parent != Path(__file__).parent:
            raise
        sys.exit(f"error: {error}")
    except RuntimeError as error:  # gloo's; NCCL's watchdog ends the process by itself
        if not (dist.is_initialized() and re.search("connection (closed|reset)|timed out", str(error), re.IGNORECASE)):
            raise
        traceback.print_exc()
        sys.exit(f"error: another rank is gone ({str(error).splitlines()[0][:120]}); checkpoints are whole: go on with --resume")
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error).lower():
            raise
        sys.exit(f"error: the disk is full ({error}); checkpoints that were whole are whole: make room, and go on with --resume")
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP's wrapper, before its process group
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
