"""What an answer is worth: a function of the config, a reward model, a process reward model, or a weighted sum of them.

A reward takes examples whose responses are the answers, and the answers' texts, and returns for each answer a number,
None where it does not apply, or a message about what went wrong: the caller decides whether that stops the run.
"""
import functools
import inspect
import math
import multiprocessing
import multiprocessing.resource_tracker
import runpy
import signal
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import config
import data
import losses
import model
import report

Values = list[list[float | str | None]]  # for each example, each answer: a number, what went wrong, or None


def rewards(cfg, machine, tokenizer, folder_of: Callable) -> Callable:
    """cfg.reward as (examples, texts) -> {"reward": Values}: the weighted sum; and, if cfg.reward is a {reward: weight},
    the Values of each one under "reward/NAME". folder_of(name): where the model is that the config names."""
    functions, weights = {}, {}
    for what, weight in config.rewards(cfg).items():
        name = name_of(what, functions)
        weights[name] = weight
        if callable(what):
            functions[name] = by_function(what, cfg.reward_workers, cfg.reward_timeout, optional=True)
        else:
            functions[name] = by_model(Scorer(folder_of(what), cfg, machine), tokenizer)

    def give(examples: list[data.Example], texts: list[list[str]]) -> dict[str, Values]:
        parts = {name: function(examples, texts) for name, function in functions.items()}
        totals = []
        for i, example in enumerate(examples):
            totals.append([])
            for j in range(len(texts[i])):
                of_answer = {name: part[i][j] for name, part in parts.items()}
                totals[-1].append(add(of_answer, weights, example.where))
        apart = isinstance(cfg.reward, dict)
        return {"reward": totals, **({f"reward/{name}": part for name, part in parts.items()} if apart else {})}
    return give


def name_of(what: Callable | str, taken: Iterable[str]) -> str:
    """A reward's name in the log: a function's own, or the end of a model's path; with a number if it is taken."""
    if isinstance(what, str):
        path = Path(what.removesuffix(".py"))
        name = path.parent.name if path.name == "model" else path.name
    else:
        function = what.func if isinstance(what, functools.partial) else what
        name = getattr(function, "__name__", type(function).__name__)
    taken = {"std", "clipped", *taken}  # reward/std and reward/clipped are metrics of the sum
    free, number = name, 2
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def add(parts: dict[str, float | str | None], weights: dict[str, float], where: str) -> float | str:
    """The weighted sum of an answer's rewards, without those that do not apply; or what went wrong."""
    for value in parts.values():
        if isinstance(value, str):
            return value
    applying = {name: value for name, value in parts.items() if value is not None}
    if not applying:
        return (f"{where}: no reward applies to an answer ({', '.join(parts)} returned None); "
                f"bad_rewards = 'skip' leaves such prompts out")
    return sum(weights[name] * value for name, value in applying.items())


def together(machine, ask: Callable, bad_rewards: str) -> list[dict[str, Values]]:
    """All ranks' results of ask(), on every rank. A failure on one rank is raised on all: no rank waits for one that stopped.
    An answer without a reward is a failure, unless bad_rewards is "skip"."""
    try:
        mine = ask()
    except ValueError as error:
        mine = error
    ranks = machine.share(mine)
    if isinstance(mine, ValueError):
        raise mine
    for other in ranks:
        if isinstance(other, ValueError):
            raise other
    if bad_rewards == "error":
        for table in ranks:
            raise_first(table)
    return ranks


def raise_first(table: dict[str, Values]):
    """Raise an error with the first message about what went wrong, if there is one."""
    for values in table.values():
        for value in sum(values, []):
            if isinstance(value, str):
                raise ValueError(value)


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def by_function(function: Callable, workers: int = 0, timeout: float = 60.0, what: str = "reward",
                mend: str = "; bad_rewards = 'skip' leaves such prompts out", optional: bool = False) -> Callable:
    """A reward from function(prompt, completion, row) -> number; or, if its first parameter is named `prompts`, lists -> list.
    workers: processes that call it, in which an answer that takes longer than timeout seconds counts as failed. what, mend: the
    function's role and a remedy, for the message about an answer without a number. optional: None is no failure."""
    batched = next(iter(inspect.signature(function).parameters), "") == "prompts"
    name = getattr(function, "__name__", str(function))
    said = what if name == what else f"{what} {name}"
    if batched and workers:
        raise ValueError(f"{what} {name} takes lists of answers, but reward_workers pass one answer at a time; leave them out")
    calls = in_batch(function) if batched else Workers(function, workers, timeout) if workers else one_by_one(function)

    def give(examples, texts):
        results = calls([(e.row["prompt"], text, e.row) for e, mine in zip(examples, texts) for text in mine])
        values = []
        for e, mine in zip(examples, texts):
            values.append([])
            for text in mine:
                result = next(results)
                absent = optional and result is None
                values[-1].append(None if absent else number(result, f"{e.where}: {said}", text, mend))
        return values
    return give


def number(result, where: str, text: str, mend: str) -> float | str:
    """The result as a float if it is a finite number, otherwise a message that says what it is instead."""
    said = result if isinstance(result, Failed) else f"returned {result!r:.80}, expected a number"
    try:
        value = math.nan if isinstance(result, str) else float(result)
    except Exception:  # of its own __float__
        value = math.nan
    return value if math.isfinite(value) else f"{where}: {said}; for the completion {text[:80]!r}{mend}"


class Failed(str):
    """A message about what went wrong, in place of a function's result."""


class Unloaded(Failed):
    """A worker could not load the function: no answer's fault, so an error whatever bad_rewards says."""


def told(error: BaseException, frame: int = 1) -> Failed:
    """The error's message, and the line that it came from: of the function called here, or in another frame of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[frame:][:1]
    return Failed("".join([f"{type(error).__name__}: {error}", *(f" ({at.filename}:{at.lineno})" for at in frames)]))


# A function may run the policy's code, which may call exit(): any exception is that answer's failure, but for Ctrl-C.


def one_by_one(function: Callable) -> Callable:
    def calls(asked: list[tuple]) -> Iterator:
        for given in asked:
            try:
                result = function(*given)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                result = told(error)
            yield result
    return calls


def in_batch(function: Callable) -> Callable:
    def calls(asked: list[tuple]) -> Iterator:
        try:
            found = list(function(*map(list, zip(*asked)))) if asked else []
            if len(found) != len(asked):
                raise ValueError(f"{len(asked)} answers, but {len(found)} values returned")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found = [told(error)] * len(asked)
        return iter(found)
    return calls


START = 600  # seconds that a pool may take to start


class Workers:
    """Processes that call a function. If a call hangs, its whole pool is ended, and a new one goes on with the next answer."""

    def __init__(self, function: Callable, workers: int, timeout: float):
        self.workers, self.timeout, self.pool = workers, timeout, None
        name = getattr(function, "__qualname__", "")  # which a partial or an object does not have
        self.place = inspect.getsourcefile(function) if name else "", name
        if not name or config.run_file(self.place[0]).get(name) is None:
            raise ValueError(f"reward_workers: {name or function} is not a function at the top level of "
                             f"{self.place[0] or 'a file'}, where workers find it")

    def started(self):
        """A pool of processes that never hear a terminal's Ctrl-C, which is for the run: they inherit that it is blocked."""
        multiprocessing.resource_tracker.ensure_running()  # a process of the pool's own, whose start would unblock it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return multiprocessing.get_context("spawn").Pool(self.workers, begin, self.place)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __call__(self, asked: list[tuple]) -> Iterator:
        results = None
        for i in range(len(asked)):
            if results is None:
                self.pool = self.pool or self.started()
                try:
                    self.pool.apply_async(bool).get(START)  # start-up and imports do not count towards the timeout
                except multiprocessing.TimeoutError:
                    self.pool.terminate()
                    raise ValueError(f"reward_workers: no process was ready after {START} seconds; {self.place[0]} may end them "
                                     f"as they load it") from None
                results = self.pool.imap(call, asked[i:])
            try:
                result = results.next(self.timeout)  # the i-th result: those before it are done
                if isinstance(result, Unloaded):
                    raise ValueError(result)
                yield result
            except multiprocessing.TimeoutError:
                self.pool.terminate()
                self.pool = results = None
                yield Failed(f"TimeoutError: no answer within reward_timeout = {self.timeout:g} seconds: it hangs, or its process "
                             f"died")


def begin(file: str, name: str):
    """In a worker: load the function from its own file. A worker that ends here would be started again, for ever."""
    global function
    try:
        function = runpy.run_path(file)[name]
    except BaseException as error:
        said = Unloaded(f"reward_workers: a process cannot load {name}: {told(error, frame=-1)}")
        function = lambda *given: said


def call(given: tuple) -> float | str | None:
    """In a worker: call the function; a number, None, a text (which is no number) or a Failed crosses to the run."""
    try:
        value = function(*given)
        if value is None or isinstance(value, Failed):
            return value
        return str(value) if isinstance(value, str) else float(value)
    except BaseException as error:  # one that ended this process would cost its answer the whole timeout
        return told(error)


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Scorer:
    """The model of a folder, and what its head says about the responses of an example."""

    def __init__(self, name: str, cfg, machine):
        self.name, self.machine, folder = name, machine, model.find_folder(name)
        described = model.read_json(folder / "config.json")
        self.cfg = types.SimpleNamespace(**{**vars(cfg), "step_token": described.get("step_token", cfg.step_token),
                                            "reward_tokens": tuple(described.get("reward_tokens", ()))})
        self.described, named = described, (described.get("architectures") or [""])[0]
        kind = next(kind for kind in SAY if named.endswith(kind))
        if not kind and model.has_score(folder):  # a value head beside a language model
            kind = "ForSequenceClassification"
        self.stream, self.say = SAY["ForTokenClassification" if self.cfg.reward_tokens else kind]
        self.tokenizer = data.Tokenizer(folder, cfg.chat_template, cfg.chat_template_kwargs)
        self.decoder, self.saved_dtype = model.load_model(self.cfg, self.machine, name, self.tokenizer, [self.stream])
        self.decoder.requires_grad_(False)
        self.tokens = 0  # stream length: the largest so far, to keep compiled shapes few

    def scores(self, dataset: data.Dataset) -> list[list]:
        """For each example, in order, a list with one result per response."""
        model.check_lengths(self.decoder, dataset)
        self.tokens, found = max(self.tokens, data.stream_length([dataset], 64, 0, device=self.machine.device)), [None] * len(dataset)
        layout = self.machine.layout(self.tokens)
        for rows in report.bar(data.in_order(dataset, 64), "rewards", self.machine.rank == 0):
            for batch in data.micro_batches(dataset, rows, layout)[0]:
                with torch.no_grad(), self.machine.autocast():
                    made = self.decoder(batch, [self.stream])[self.stream].double()
                if not made.isfinite().all():
                    places = ", ".join(dataset.examples[i].where for i in batch["members"][:3])
                    raise ValueError(f"{self.name}: its {self.stream} is not finite in a batch with the rows {places}, ... . Look "
                                     f"for NaN in its weights, name another folder, or try --dtype=float32")
                values = [[] for _ in range(batch["num_examples"])]
                for of, value in zip(batch["example"].tolist(), self.say(batch, made)):
                    values[of].append(value)
                for index, row in zip(batch["members"], values):
                    found[index] = row
        return found


def logps_of(batch: dict, log_probs: torch.Tensor) -> list[dict]:
    """Each response's log-prob, summed over its scored tokens, and how many these are."""
    return [{"logps": s, "tokens": n} for s, n in zip(losses.sums(batch, log_probs).tolist(), batch["lengths"].tolist())]


def steps_of(batch: dict, logits: torch.Tensor) -> list[dict]:
    """For each response: the probability that each step is good; their min, product and last; the index of the first bad step."""
    p, said = (logits[:, 1] - logits[:, 0]).sigmoid().split(batch["lengths"].tolist()), []
    for steps in (part.tolist() for part in p):
        wrong = next((i for i, q in enumerate(steps) if q < 0.5), None)
        said.append({"steps": steps, "min": min(steps), "product": math.prod(steps), "last": steps[-1], "first_wrong": wrong})
    return said


SAY = {"ForSequenceClassification": ("reward", lambda batch, reward: reward.tolist()),
       "ForTokenClassification": ("step_logits", steps_of),
       "": ("log_probs", logps_of)}  # suffix of an architecture's name -> the stream to read, and its result for each response


def in_steps(e: data.Example, texts: list[str], scorer: Scorer) -> data.Example:
    """A prompt with answers whose lines are steps. Messages become text: what user and assistant said, one per line."""
    prompt = e.row["prompt"]
    if not isinstance(prompt, str):
        prompt = "".join(m["content"] + "\n" for m in prompt if m["role"] in ("user", "assistant") and m["content"])
    steps = [[data.Step(line, 0.0) for line in text.split("\n") if line] or [data.Step(" ", 0.0)] for text in texts]
    draft = data.Draft(prompt, steps, [False] * len(steps))
    rendered = data.render(draft, scorer.tokenizer, "all")
    return data.tokenize([(e.where, draft, *rendered)], scorer.tokenizer, "joint", Counter(), scorer.cfg.step_token)[0]


def by_model(scorer: Scorer, tokenizer: data.Tokenizer) -> Callable:
    """A reward model's score of an answer (it reads the policy's ids), or a process reward model's of its worst step."""
    if scorer.stream == "log_probs":
        raise ValueError(f"reward {scorer.name} is a language model; expected a reward model or a process reward model")
    if scorer.stream == "reward":
        tokenizer.same_ids(scorer.tokenizer)
    model.without_masters(scorer.decoder, scorer.machine.dtype)  # it only scores from now on, and is never saved

    def give(examples, texts):
        """Score each distinct answer to a prompt once, so that identical answers get bitwise identical rewards."""
        by_steps, trees, places, count = scorer.stream == "step_logits", [], [], 0
        for e, mine in zip(examples, texts):
            names = mine if by_steps else [ids.tobytes() for ids in e.responses]
            kept = dict(zip(names, mine if by_steps else e.responses))
            nth = {name: count + i for i, name in enumerate(kept)}
            places.append([nth[name] for name in names])
            count += len(kept)
            once = in_steps(e, [*kept], scorer) if by_steps else data.with_responses(e, [*kept.values()])
            trees += data.cut(once, data.LARGE)
        said = [x for some in (scorer.scores(data.as_dataset(trees, Counter())) if trees else []) for x in some]
        return [[said[i]["min"] if by_steps else said[i] for i in mine] for mine in places]
    return give
