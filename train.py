"""Train any objective: `python train.py --config configs/dpo.py [--key=value ...]`, or under torchrun on many GPUs.

Reads top to bottom in the order in which things happen: machine, stage, model, data, columns, the loop, files.
Nothing here knows an objective by name: what a loss needs follows from what it reads (losses.READINGS).
"""
import contextlib
import functools
import gc
import json
import math
import shlex
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import data
import losses
import model
import optimizers
import reference
import report
import reward
import rollout
from machine import Machine, ending, find_machine, noting_signals, stopped


# ---------------------------------------------------------------------------------------------------------------------
# A run


class Run(NamedTuple):
    """What a run has before its first step."""
    cfg: object
    machine: Machine
    say: Callable  # print, on rank 0
    terms: list  # losses.Term
    streams: set  # names of the tensors that the terms read: model outputs, and batch columns added by sources
    outputs: list[str]  # the streams that the model outputs
    folder_of: Callable  # name of a model in the config -> its folder
    tokenizer: data.Tokenizer
    decoder: model.Decoder
    saved_dtype: torch.dtype  # of the weights in the folder that training starts from
    datasets: dict  # split -> rows
    prompts: data.Dataset | None  # that eval answers
    layout: data.Layout

    def answers(self) -> bool:
        """Whether it trains a language model."""
        return bool({"log_probs", "logits"} & {*self.outputs})

    def questions(self) -> data.Dataset:
        """The rows whose prompts the samples answer: the eval prompts, else the eval rows, else the training rows."""
        return self.prompts or self.datasets.get("eval") or self.datasets["train"]


def train(cfg):
    """One run, from a resolved config to out_dir/model."""
    machine, out = find_machine(cfg), Path(cfg.out_dir)
    settings = machine.share(config.settings(cfg))[0]  # rank 0's, so that all ranks agree
    say = print if machine.rank == 0 else lambda *_: None
    checkpoint.check_free(out, cfg, machine)
    if cfg.resume and checkpoint.finished_already(out, settings, machine, say):
        return
    report.check_tracker(cfg.track)
    config.check_run(cfg)
    supply_of = SUPPLIES.get(config.data_kind(cfg), Rows)
    run = prepared(cfg, machine, say, supply_of.provides)
    decoder, terms, outputs, layout = run.decoder, run.terms, run.outputs, run.layout

    # The supply of steps, and the sources that add columns to their micro-batches
    supply = supply_of(run)
    wanted = (run.streams & reference.SOURCES.keys()) - supply.provides
    running = {name: torch.zeros(2, dtype=torch.float64, device=machine.device)  # sum and count of a metric over all steps
               for name in sorted(run.streams & losses.RUNNING.keys())}
    sources = [make(run) for make in dict.fromkeys(reference.SOURCES[name] for name in sorted(wanted))]
    sources.append(reference.running_source(running))
    if any(term.objective.coupled for term in terms):
        sources.append(reference.step_source(run))

    # Optimizer and resume
    for trunk in [module for module in decoder.modules() if isinstance(module, model.Trunk)]:
        trunk.checkpointing = cfg.activation_checkpointing
    decoder.keep = int(cfg.head_memory * 2**30) or None
    wrapped = decoder if machine.world == 1 else DistributedDataParallel(
        decoder, device_ids=[torch.cuda.current_device()] if machine.device == "cuda" else None,
        gradient_as_bucket_view=True)
    optimizer = optimizers.made(cfg, decoder)
    clear = functools.partial(optimizer.zero_grad, set_to_none=machine.world == 1)  # DDP's are kept, as views of its buckets
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    parameters, policy = [*trained.values()], [p for name, p in trained.items() if not model.of_critic(name)]
    scaler = torch.amp.GradScaler(machine.device, enabled=machine.dtype == torch.float16)
    skipped = torch.zeros(2, device=machine.device)  # non-finite steps: in total, and the current streak
    steps = data.steps(cfg, supply.per_epoch)
    if cfg.critic_warmup and cfg.critic_warmup >= steps:
        raise ValueError(f"critic_warmup = {cfg.critic_warmup}, and the run has {steps} steps: the policy would never "
                         f"be trained; lower critic_warmup, or raise max_steps or epochs")
    state = checkpoint.State(decoder, optimizer, scaler, running, skipped, supply)
    checkpoint.hold(out, machine)
    checkpoint.check_free(out, cfg, machine)  # again, now locked: another run may have come and gone
    done = checkpoint.resume(out, state, machine, say, steps, settings) if cfg.resume else 0
    pad = padding(run.tokenizer, run.datasets.values()) if machine.rank == 0 and "reward" in outputs else ()
    template = run.tokenizer.chat_template if cfg.chat_template else ""
    with_files = run.tokenizer.folder, template, pad, run.tokenizer.ends
    write_model = lambda folder, dtype: model.save(decoder, folder, dtype, *with_files)

    def save(step: int):
        if machine.rank == 0:
            checkpoint.save(out, step, state, write_model, cfg.keep_checkpoints, config.as_json(cfg), machine.world)
        machine.barrier()

    def unless_lost(done: int, act: Callable):
        """act(done), which may call user functions; if it raises a ValueError, a checkpoint is saved first."""
        try:
            return act(done)
        except ValueError:
            save(done)
            raise

    def evaluated(step: int) -> dict:
        begin = time.perf_counter()
        metrics = evaluate(run, sources, supply.rewards, out)
        line = {"step": step, "split": "eval", **metrics, "seconds": time.perf_counter() - begin} if metrics else {}
        if line:
            record(line)
        return line

    def gradient(dataset, rows, epoch: int, rank: int = 0, world: int = 1) -> tuple["Meter", dict]:
        """Forward and backward on this rank's share of the rows; returns the summed metrics and the step's counts."""
        batches, counts = data.micro_batches(dataset, rows, layout, rank, world)
        supply.add(batches)
        for add in sources:
            add("train", batches, epoch)
        meter = Meter()
        for i, batch in enumerate(batches):
            waits = machine.world > 1 and i < len(batches) - 1  # gradients are all-reduced with the last micro-batch
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                with machine.autocast():
                    streams = wrapped(batch, outputs)
                loss, metrics = losses.total(terms, streams, batch, counts)
                scaler.scale(loss * machine.world).backward()  # DDP averages over ranks, the counts are of all of them
            meter.add(loss, metrics)
        return meter, counts

    def finite(meter: "Meter", grad_norm) -> torch.Tensor:
        """Whether the loss, summed over ranks, and the gradient norm are finite: a () bool tensor on the device."""
        return machine.sum(meter.sums["loss"][0].clone()).isfinite() & grad_norm.isfinite()

    def stop_for(step: int, dataset, rows):
        """Save a checkpoint, then raise an error that names the step's rows whose own loss or gradient is not finite."""
        in_a_row = int(skipped[1])
        skipped[1] = 0  # a resumed run counts anew
        save(step)
        names = []
        for row in rows:
            meter, _ = gradient(dataset, [row], (step - 1) // supply.per_epoch)
            if not finite(meter, torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])):
                names.append(dataset.examples[row].where)
            clear()
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        said = f"these are not finite on their own: {', '.join(names[:5])}{more}" if names else "each is finite on its own"
        mend = "repair the rows or lower lr" if len(names) < len(rows) else (
            "the weights may have diverged: if so, remove this checkpoint to use an older one, and lower lr")
        raise ValueError(f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite, "
                         f"and changed no weight. Of the {len(rows)} rows of this step, {said}. checkpoint-{step} is saved: "
                         f"{mend}; go on with --resume")

    # The loop
    described = {"digest": config.hashed(settings), "settings": settings, "config": config.as_json(cfg),
                 "rows": {split: dict(rows.counts) for split, rows in run.datasets.items()}}
    record = lambda line: None
    if machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not cfg.resume:
            checkpoint.start_anew(out)
        checkpoint.write_json(out / "run.json", {**described, "finished": False})
        record = report.recorder(out, cfg.track, config.as_json(cfg))
    evals, lines = report.written(out) if done and machine.rank == 0 else ([], [])
    first = next((line for line in evals if line["step"] == 0), {}) if done else unless_lost(0, evaluated)
    last = evals[-1] if evals and evals[-1]["step"] == done else first
    if done == steps and machine.any(machine.rank == 0 and last is first):  # the last eval is missing: cut off, or check failed
        last = unless_lost(steps, evaluated)
    before = [] if done else samples(run)
    show = next((t.objective.show for t in terms if t.objective.show), None)
    bar = report.bar(what=out.name[:8], show=machine.rank == 0, total=steps, initial=done, leave=True, delay=0)
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    since, since_line, tokens = 0, time.perf_counter(), 0  # steps, start time and tokens since the last log line
    told, (began, line) = [], (lines[0], lines[-1]) if lines else ({}, {})  # stop signals received; first and latest log line
    for step in noting_signals(range(done + 1, steps + 1), told):  # from 1: a step's number is how many are done after it
        pause = time.perf_counter()
        dataset, rows = unless_lost(step - 1, supply.rows)
        since_line += time.perf_counter() - pause
        meter, counts = gradient(dataset, rows, (step - 1) // supply.per_epoch, machine.rank, machine.world)
        add_step(running, meter, machine)
        lr = learning_rate(cfg, cfg.lr, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, group["peak"], step - 1, steps)
        for parameter in policy if step <= cfg.critic_warmup else ():
            parameter.grad = None  # so that the optimizer skips it
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        bad = (~finite(meter, grad_norm)).float()
        skipped.copy_(torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad]))
        optimizer.found_inf = bad
        optimizer.step()
        scaler.update()
        clear()
        bar.update()
        since, tokens = since + 1, tokens + counts["stream_tokens"]

        if step % cfg.log_every == 0 or step == steps:
            metrics = meter.read(machine)  # waits for the device
            seconds = (time.perf_counter() - since_line) / since
            line = {"step": step, "split": "train", **supply.metrics, **metrics, "grad_norm": grad_norm.item(), "lr": lr,
                    "skipped_steps": int(skipped[0]), "tokens": counts["stream_tokens"],
                    "tokens_per_second": tokens / since / seconds, "seconds": seconds, "peak_memory_gb": machine.peak_memory_gb()}
            record(line)
            if skipped[1] >= cfg.max_skipped_steps:
                stop_for(step, dataset, rows)
            shown = [f"{name.split('/')[-1]} {line[name]:.3f}" for name in ("loss", show) if name in line]
            bar.set_postfix_str(", ".join([*shown, f"{line['tokens_per_second'] / 1000:.1f}k tok/s"]), refresh=False)
            began = began or line
            since, since_line, tokens = 0, time.perf_counter(), 0
        pause = time.perf_counter()
        if step == steps or (cfg.eval_every and step % cfg.eval_every == 0):
            last = unless_lost(step, evaluated)
        reads = machine.world == 1 or step % cfg.log_every == 0  # ranks share signals at log lines, where they wait anyway
        stops = step < steps and reads and machine.any(bool(told))
        if stops or cfg.save_every and step % cfg.save_every == 0:
            save(step)
        if stops:
            bar.close()
            say(f"stopped by a signal after step {step}: {out / f'checkpoint-{step}'} is saved, go on with --resume")
            raise stopped(told)
        since_line += time.perf_counter() - pause
    bar.close()

    # The result
    if machine.rank == 0:
        dtype = getattr(torch, cfg.save_dtype) if cfg.save_dtype else run.saved_dtype
        checkpoint.publish(out / "model", lambda folder: write_model(folder, dtype))
        checkpoint.write_json(out / "run.json", {**described, "finished": True})
        ends = "before -> after", first, last
        if not first and began:
            ends = "first step -> last step", began, line
        say(report.summary(out, *ends, ("loss", show, "exact_match", "reward"), before, samples(run), use_of(run)))
    machine.barrier()
    if machine.any(bool(told)):  # in the last step: this run is complete, but none may follow it
        raise stopped(told)


def prepared(cfg, machine: Machine, say: Callable, provided: frozenset) -> Run:
    """Run the stages that this run depends on, load model, tokenizer and rows, and check that they fit together.
    provided: batch columns that the supply of steps adds by itself."""
    terms, kind = config.terms(cfg, machine.compiled), config.data_kind(cfg)
    streams = losses.streams(terms)
    outputs = sorted(streams & model.HEADS.keys())  # of the model; what else losses read are columns
    missing = streams - model.HEADS.keys() - reference.SOURCES.keys() - losses.RUNNING.keys() - provided
    if missing:
        raise ValueError(f"objective {'+'.join(cfg.weights)}: a run cannot train it, because nothing provides "
                         f"{', '.join(sorted(missing))}; it can only be called on tensors, see losses.py")
    for paths in filter(None, (cfg.train_data, cfg.eval_data, cfg.eval_prompts)):
        data.files_of(paths)  # a missing file is an error now, not after the stages have run
    folders = {name: run_stage(name, cfg, machine, say) for name in config.stage_files(cfg)}
    folder_of = lambda name: folders.get(name, name)
    start_from = folder_of(cfg.init_from)
    if machine.compiled:
        torch.compiler.reset()  # drop the graphs compiled for an earlier stage's shapes
    machine.barrier()

    folder = Path(cfg.tokenizer) if cfg.tokenizer else model.find_folder(start_from)
    tokenizer = data.Tokenizer(folder, cfg.chat_template, cfg.chat_template_kwargs)
    apart = {"values"} if cfg.critic else set()  # outputs of a model other than the policy
    decoder, saved_dtype = model.load_model(cfg, machine, start_from, tokenizer, sorted({*outputs} - apart))
    if cfg.critic:
        tokenizer.same_ids(data.Tokenizer(model.find_folder(folder_of(cfg.critic))), cfg.resize_embeddings)
        decoder.critic = model.load_model(cfg, machine, folder_of(cfg.critic), tokenizer, ["reward"])[0]

    datasets = {split: data.load(paths, kind, tokenizer, cfg, machine.rank == 0)
                for split, paths in (("train", cfg.train_data), ("eval", cfg.eval_data)) if paths}
    prompts = datasets.pop("eval", None) if kind == "prompts" else None
    for split, dataset in datasets.items():
        say("\n".join([f"{split} rows: {data.counted(dataset.counts)}", *data.sources_said(dataset)]))
    prompts = data.load(cfg.eval_prompts, "prompts", tokenizer, cfg, False) if cfg.eval_prompts else prompts
    beyond = ""  # rotary positions that the model was not made for: it may do badly there
    for dataset in filter(None, [*datasets.values(), prompts]):
        model.check_lengths(decoder, dataset, cfg.max_new_tokens)
        beyond = beyond or model.too_long(decoder.shape, dataset, cfg.max_new_tokens)
    if beyond:
        say(f"warning: {beyond}")
    for dataset in datasets.values() if cfg.critic else ():
        model.check_lengths(decoder.critic, dataset, cfg.max_new_tokens)
    answers = (cfg.samples_per_prompt, cfg.max_new_tokens) if kind == "prompts" else ()  # that rollouts will add to each prompt
    tokens = data.stream_length([*datasets.values()], cfg.batch_size, cfg.micro_batch_tokens, *answers, device=machine.device)
    return Run(cfg, machine, say, terms, streams, outputs, folder_of, tokenizer, decoder, saved_dtype,
               datasets, prompts, machine.layout(tokens))


def run_stage(path: str, cfg, machine: Machine, say: Callable) -> str:
    """The model folder that another config's run produces. The run is started if it is missing, resumed if it was interrupted,
    and redone if it was made with other settings (the old folder is kept under another name)."""
    stage = config.load_stage(path, cfg)
    out = Path(stage.out_dir)  # all ranks act on what rank 0 finds there
    settings, found, begun = machine.share((config.settings(stage), checkpoint.run_json(out), checkpoint.written_to(out)))[0]
    same = found.get("digest") == config.hashed(settings)
    if same and found["finished"]:
        checkpoint.hold(out, machine, alone=False)
        say(f"{path}: already trained, in {out / 'model'}")
        return str(out / "model")
    if begun and not same:
        checkpoint.hold(out, machine)
    if begun and not same and machine.rank == 0:
        aside = next(p for i in range(1, 10**6) if not (p := out.with_name(f"{out.name}.old{i}")).exists())
        out.rename(aside)
        changed = config.changes(found["settings"], settings) if "settings" in found else ["another config"]
        say(f"{path}: {out} is kept as {aside}, it was made with other settings: {'; '.join(changed)}")
    machine.barrier()
    say(f"{path}: running this stage first")
    stage.resume = same
    train(stage)
    checkpoint.hold(out, machine, alone=False)
    gc.collect()  # compiled blocks are in reference cycles
    return str(out / "model")


class Rows:
    """Supplies the steps of a run on a fixed dataset."""
    provides, metrics, rewards = frozenset(), {}, None

    def __init__(self, run: Run):
        self.dataset = run.datasets["train"]
        self.per_epoch = data.steps_per_epoch(self.dataset, run.cfg.batch_size)
        self.of_step = data.steps_of(self.dataset, run.cfg.batch_size, run.cfg.seed)

    def rows(self, step: int):
        """The dataset, and the indices in it of a step's examples; steps are counted from 0."""
        return self.dataset, self.of_step(step)

    def add(self, batches: list[dict]):
        """Fixed rows add no columns to the micro-batches."""

    def save(self, folder: Path, step: int) -> dict:
        return {}

    def restore(self, folder: Path, step: int, state: dict):
        """Nothing to restore: the rows are a function of (seed, step)."""


SUPPLIES = {"prompts": rollout.Rollouts}  # kind of rows -> class that supplies the steps of a run; Rows for all others


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


class Meter:
    """Sums and counts of a step or an eval, kept on the device until they are read."""

    def __init__(self):
        self.sums = {}

    def add(self, loss, metrics: dict):
        for name, pair in {**metrics, "loss": (loss.detach(), torch.zeros_like(loss))}.items():
            pair = torch.stack([part.double() for part in pair])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def read(self, machine: Machine) -> dict[str, float]:
        """name -> mean over all micro-batches and ranks (the loss is summed: each micro-batch holds a share of it)."""
        table = machine.sum(torch.stack(list(self.sums.values()))).tolist()
        means = {name: total / (count or 1) for name, (total, count) in zip(self.sums, table) if count or name == "loss"}
        return means | {name: means[a] - means[b] for name, (a, b) in losses.DERIVED.items() if a in means and b in means}


def add_step(running: dict, meter: "Meter", machine: Machine):
    """Add a step's metric sums to the running sums, unless they are not finite, which would spoil all later steps."""
    for name in running:
        metric = losses.RUNNING[name]
        if metric not in meter.sums:
            raise ValueError(f"{name} is the running mean of the metric {metric!r}, and no loss of this run reports it")
        added = machine.sum(meter.sums[metric].clone())
        running[name] += torch.where(added.isfinite().all(), added, 0)


def learning_rate(cfg, peak: float, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: linear warmup over warmup_steps, then the schedule; linear and cosine would
    reach min_lr at the step after the last."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    part = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[cfg.schedule]
    return cfg.min_lr + (peak - cfg.min_lr) * shape


def evaluate(run: Run, sources: list[Callable], rewards: Callable | None, out: Path) -> dict[str, float]:
    """Run the eval rows, each once, split over ranks, through the training path without gradient; and `judge` the eval prompts."""
    metrics, machine = {}, run.machine
    if "eval" in run.datasets:
        dataset, meter = run.datasets["eval"], Meter()
        predicted = [name for name in losses.PREDICTED if any(name in term.reads for term in run.terms)]
        counts = data.count(dataset.examples)
        scores = torch.zeros(int(dataset.pair_offsets[-1]), len(predicted), dtype=torch.float64, device=machine.device)
        with torch.no_grad(), machine.autocast():
            for rows in report.bar(data.in_order(dataset), "eval", machine.rank == 0):
                batches, _ = data.micro_batches(dataset, rows, run.layout, machine.rank, machine.world)
                for add in sources:
                    add("eval", batches, 0)
                for batch in batches:
                    streams = run.decoder(batch, run.outputs)
                    meter.add(*losses.total(run.terms, streams, batch, counts))
                    for column, name in enumerate(predicted):
                        values = losses.read(losses.READINGS[name], {**batch, **streams})
                        scores[batch["pair_index"], column] = values.to(scores)
        metrics |= meter.read(machine)
        scores = machine.sum(scores)  # of all pairs, in row order: ranks filled disjoint rows
        if predicted:
            run.decoder.config |= dict(zip(model.REWARD, (scores.mean().item(), scores.std(correction=0).item())))
        if predicted and machine.rank == 0:
            keys = [losses.PREDICTED[name] for name in predicted]
            lines = [json.dumps(dict(zip(keys, row))) + "\n" for row in scores.tolist()]
            checkpoint.write_text(out / "predictions.jsonl", "".join(lines))
    return metrics | judge(run, rewards) if run.prompts else metrics


def judge(run: Run, rewards: Callable | None) -> dict[str, float]:
    """Greedy answers to prompts: the share that passes cfg.check, and their mean reward, also of each part of a sum."""
    cfg, machine, found = run.cfg, run.machine, {}
    mine, answers = run.prompts.examples[machine.rank::machine.world], []

    def ask():
        with machine.autocast():
            answers.extend(rollout.answers_to([e.prompt.tolist() for e in mine], run.decoder, run.tokenizer, cfg,
                                              show="answers" if machine.rank == 0 else ""))
        return {}
    reward.together(machine, ask, "error")  # if the model has diverged, every rank raises
    trees, texts = rollout.answered(run.tokenizer, mine, answers)
    columns = {}
    if cfg.check:
        check = reward.by_function(cfg.check, what="check", mend="")
        columns |= reward.together(machine, lambda: {"exact_match": check(trees, texts)}, "error")[machine.rank]
    if rewards:
        columns |= reward.together(machine, lambda: rewards(trees, texts), cfg.bad_rewards)[machine.rank]
    for name, values in columns.items():
        found[name] = [value for (value,) in values if isinstance(value, float)]
    counts = torch.tensor([[sum(x), len(x)] for x in found.values()], dtype=torch.float64, device=machine.device)
    return {name: total / count for name, (total, count) in zip(found, machine.sum(counts).tolist()) if count}


def samples(run: Run) -> list[tuple[str, str]]:
    """A few (prompt, greedy answer) texts, on rank 0; none on other ranks, or of a model that does not answer or has diverged."""
    if run.machine.rank or not run.answers():
        return []
    prompts = [e.prompt.tolist() for e in run.questions().examples[:run.cfg.samples]]
    brief = types.SimpleNamespace(**{**vars(run.cfg), "max_new_tokens": min(run.cfg.max_new_tokens, 64)})
    try:
        with run.machine.autocast():
            answers = rollout.answers_to(prompts, run.decoder, run.tokenizer, brief)
    except ValueError:  # it has diverged, and the loop will say so
        return []
    return [(run.tokenizer.decode(ids), rollout.written(run.tokenizer, answer)) for ids, (answer,) in zip(prompts, answers)]


def use_of(run: Run) -> str:
    """The command that tries the model."""
    files = run.cfg.eval_data or run.cfg.train_data
    if not run.answers() or {"reward", "step_logits"} & {*run.outputs}:
        use, end = "score", f"--data={shlex.quote(files if isinstance(files, str) else [*files][0])}"
    elif run.tokenizer.chat_template:
        use, end = "chat", ""
    else:
        prompt = run.tokenizer.decode(run.questions().examples[0].prompt.tolist())[-60:]
        use, end = "generate", f"--temperature=0 --prompt={shlex.quote(prompt)}"
    return f"python sample.py {use} --model={shlex.quote(run.cfg.out_dir)} {end}".rstrip()


def padding(tokenizer: data.Tokenizer, datasets) -> tuple[int, str]:
    """The padding (id, token) of a reward model: a token that no response ends in, a special one if possible (else token is ""
    and only the id is used, in config.json)."""
    ends = {int(ids[-1]) for dataset in datasets for e in dataset.examples for ids in e.responses} | {tokenizer.eos}
    for i in sorted(range(tokenizer.fast.get_vocab_size()), key=lambda i: (i not in tokenizer.special, i == tokenizer.bos, i)):
        if i not in ends and tokenizer.fast.id_to_token(i) is not None:
            return i, tokenizer.fast.id_to_token(i) if i in tokenizer.special else ""
    raise ValueError(f"{tokenizer.folder}: every token of the vocabulary ends a response; none is left for padding")


# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]):
    if "--help" in arguments or "-h" in arguments:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
        return print(config.help_text())
    with ending():
        train(config.load(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
