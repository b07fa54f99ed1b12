"""Every knob, its default and one comment. Defaults < config file < command line; every key and value is checked.

A config file is plain Python: its assignments are keys, and it may compute, import, and define functions for a key to
hold. The chosen losses add their hyperparameters (losses.py) as keys.
"""
import ast
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import runpy
import textwrap
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import model
from losses import ADVANTAGES, OBJECTIVES, OPTIONS, Term, bind, check, streams
from parts.rows import contents


@dataclass
class Config:
    # What to train
    objective: str | dict = "sft"  # a loss, or {loss: weight}; the losses and their hyperparameters are listed below
    init_from: str = ""  # model folder, hub name, config file (its stage is run first if missing) or "scratch"
    out_dir: str = "out/run"  # metrics.jsonl, model/ and checkpoint-<step>/ go here; must be empty, or --resume
    nll_coef: float = 0.0  # weight of an added NLL loss on the responses to imitate (in a pair: the chosen one)
    reference_free: bool = False  # preference losses: the reference's log-probs are 0
    ld_alpha: float = 1.0  # preference losses: weight of tokens past the shorter response's length (LD-DPO)
    f_divergence: str | float = 1.0  # preference losses: forward_kl, js, or alpha of an alpha-divergence; 1: reverse KL
    wpo: bool = False  # preference losses: weigh pairs by how likely the policy finds their responses
    scratch: dict = None  # config.json of the new model when init_from = "scratch"; vocab_size comes from the tokenizer
    tokenizer: str = ""  # folder with tokenizer.json; default: init_from's
    resize_embeddings: bool = False  # a tokenizer with more tokens than a model: new rows, the mean of the old ones

    # Data
    train_data: str | list | dict = ""  # files, globs, save_to_disk folders, hub data sets (org/name:config/split); {one: weight}
    eval_data: str | list = ""  # rows of the same kind as train_data, held out for eval; empty: none
    eval_prompts: str | list = ""  # {prompt, ...} rows that eval answers greedily, for check and reward
    check: Callable = None  # (prompt (text or messages), completion, row) -> is it right; eval reports the mean as exact_match
    max_new_tokens: int = 256  # longest answer that eval and rollouts generate
    max_length: int = 1024  # most tokens of a prompt plus its longest response
    max_prompt_length: int = 0  # most tokens of a prompt; 0: what its longest response leaves of max_length, at least half
    truncation: str = "cut"  # of rows that do not fit: cut (prompt's left, response's right), drop, error
    tokenize: str = "joint"  # joint: encode prompt + response as one text; apart: encode each by itself
    train_on: str = ""  # assistant turns that are trained: all, last; default: all for sft, last for pairs and kto
    chat_template: str = ""  # a jinja file, or "chatml"; default: the tokenizer's own
    chat_template_kwargs: dict = None  # variables of the template, such as {"enable_thinking": False}; a row's own win over them
    as_chat: bool = False  # with a chat template, a prompt of text becomes a user's message, and its response the assistant's
    step_token: str = "\n"  # a single token, appended to each step of a process reward row; the step's score is read there
    reward_tokens: tuple = ()  # (bad, good): tokens whose logits judge a step; default: a head of two labels
    bad_rows: str = "error"  # a malformed row: error (stop), skip (and count)

    # Steps
    batch_size: int = 64  # examples per optimizer step, over all ranks
    micro_batch_tokens: int = 0  # tokens of a packed micro-batch: changes memory, not the gradient; 0: chosen from the data
    epochs: float = 1.0  # passes over train_data (times as many rows, if its files have weights); filter_rounds draw on top
    max_steps: int = 0  # optimizer steps; 0: as epochs say
    lr: float = 1e-6  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of linear and cosine
    schedule: str = "cosine"  # constant, linear, cosine
    warmup_steps: int = 0  # steps of linear warmup from 0 to lr
    optimizer: str = "adamw"  # adamw; or muon: for the matrices of the blocks, with adamw for the rest, at the same lr
    weight_decay: float = 0.0  # on matrices and embeddings only
    betas: tuple = (0.9, 0.999)  # AdamW
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    max_skipped_steps: int = 10  # a non-finite loss or gradient skips the step; stop at this many in a row (seen at log lines)
    seed: int = 0  # seeds the order of rows, new weights, and random draws such as rollouts
    reference: str = ""  # model folder, hub name or config file of the frozen reference; default: init_from's
    teacher: str = ""  # distillation: model folder, hub name or config file whose model is imitated
    teacher_top_k: int = 0  # keep the teacher's k highest logits per token on disk, computed once; 0: run it in every step
    reference_live: bool = False  # run the reference in every step instead of once per row, cached on disk
    cache_dir: str = "~/.cache/nanoalign"  # folder for reference log-probs, teacher logits and, during a run, tokenized rows

    # Rollouts, for losses on prompts
    reward: Callable | str | dict = None  # (prompt, completion, row) -> number or None; reward model; {either: weight}
    reward_workers: int = 0  # processes that call the reward function; 0: the run's own process calls it
    reward_timeout: float = 60.0  # seconds that a worker may take for an answer
    bad_rewards: str = "error"  # a reward that raises, hangs or is no number: error (save and stop), skip (the prompt, and count)
    rollout_prompts: int = 0  # prompts answered per rollout, over all ranks, or what is left of an epoch; 0: batch_size
    rollout_epochs: int = 1  # passes over a rollout's answers before the next rollout
    rollout_batch: int = 256  # answers that each rank generates in parallel: memory and speed only
    samples_per_prompt: int = 1  # answers to each prompt
    temperature: float = 1.0  # of the softmax for sampling answers and for the losses; in distillation: of both models
    top_k: int = 0  # draw from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the fewest most likely tokens whose total probability reaches this
    min_p: float = 0.0  # draw from tokens with at least this share of the most likely one's probability
    stop: tuple = ()  # strings that end an answer, besides the model's own end tokens
    advantages: str = "group_norm"  # gae, reinforce, reinforce_baseline, rloo, group_norm (GRPO's), group_center (Dr. GRPO's)
    gamma: float = 1.0  # discount of rewards per token
    lam: float = 0.95  # GAE's lambda: 1 relies on rewards alone, 0 on the critic
    reward_clip: float = 10.0  # rewards are clipped to plus or minus this; 0: no clipping
    missing_eos_penalty: float = 0.0  # subtracted from the reward of an answer that ran out of tokens before it ended
    overlong_buffer: int = 0  # over this many last tokens of max_new_tokens, a penalty grows linearly to overlong_penalty
    overlong_penalty: float = 1.0  # subtracted from the reward of an answer of max_new_tokens
    filter_groups: bool = False  # leave out prompts whose answers all have the same reward
    filter_rounds: int = 0  # up to this many further draws of rollout_prompts, to replace those that were left out
    kl_coef: float = 0.0  # penalty in the reward per nat of a token's log-ratio to the reference
    kl_target: float = 0.0  # adapt kl_coef towards a KL of this many nats per token; 0: keep kl_coef fixed
    kl_horizon: float = 10000.0  # answers over which kl_coef adapts
    critic: str = ""  # folder or config of a reward model that a separate critic starts from; default: a head on the policy
    critic_lr: float = 0.0  # peak learning rate of the critic's own weights; 0: lr
    critic_warmup: int = 0  # first steps, in which only the critic is trained

    # Machine
    device: str = "auto"  # cpu, cuda; auto: cuda if there is one
    dtype: str = "auto"  # float32, bfloat16, float16, float64 of compute (weights stay fp32); auto: bfloat16 on cuda
    compile: bool | str = "auto"  # torch.compile; auto: on cuda
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time
    head_memory: float = 0.0  # GB of the head's softmax to keep for backward instead of recomputing it; 0: its last chunk only

    # Logs and checkpoints
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between evals; 0: before the first step and after the last only
    save_every: int = 0  # steps between checkpoints; 0: none
    keep_checkpoints: int = 2  # how many of the newest checkpoints are kept
    resume: bool = False  # go on from out_dir's newest checkpoint
    save_dtype: str = ""  # dtype of the saved model/; default: as trained, fp32 (fp64 with dtype = "float64")
    samples: int = 3  # prompts whose answers before and after training are shown at the end
    track: str = ""  # wandb, tensorboard: also send every line of metrics.jsonl there; it has to be installed


CHOICES = {"bad_rewards": ("error", "skip"),
           "advantages": tuple(ADVANTAGES),
           "truncation": ("cut", "drop", "error"), "tokenize": ("joint", "apart"), "train_on": ("", "all", "last"),
           "bad_rows": ("error", "skip"), "schedule": ("constant", "linear", "cosine"), "optimizer": ("adamw", "muon"),
           "device": ("auto", "cpu", "cuda"),
           "dtype": ("auto", "float32", "bfloat16", "float16", "float64"), "compile": (True, False, "auto"),
           "track": ("", "wandb", "tensorboard"), "save_dtype": ("", "float32", "bfloat16", "float16", "float64")}
AT_LEAST = {"max_length": 2, "f_divergence": -math.inf} | dict.fromkeys(  # of other numbers: 0
    ("batch_size", "log_every", "keep_checkpoints", "max_skipped_steps", "max_new_tokens", "rollout_batch", "samples_per_prompt",
     "rollout_epochs", "kl_horizon"), 1)
AT_MOST = dict.fromkeys(("top_p", "min_p", "lam"), 1)
PATHS = ("init_from", "out_dir", "tokenizer", "reference", "teacher", "critic", "reward", "chat_template", "train_data",
         "eval_data", "eval_prompts")  # a shell leaves the ~ of --key=~/folder to us
ITEMS = {"betas": float} | dict.fromkeys(("stop", "reward_tokens", "train_data", "eval_data", "eval_prompts"), str)
TWO = ("betas", "reward_tokens")  # keys with exactly two values; reward_tokens may also be empty
ELSEWHERE = {  # what other trainers call a key -> ours
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size", "gradient_accumulation_steps": "micro_batch_tokens", "model": "init_from",
    "model_name_or_path": "init_from", "pretrain": "init_from", "dataset": "train_data", "dataset_name": "train_data",
    "output_dir": "out_dir", "save_path": "out_dir", "max_seq_length": "max_length", "max_len": "max_length",
    "max_completion_length": "max_new_tokens", "num_generations": "samples_per_prompt",
    "n_samples_per_prompt": "samples_per_prompt", "loss_type": "objective", "rpo_alpha": "nll_coef", "ref_model": "reference",
    "reward_funcs": "reward", "reward_model": "reward", "advantage_estimator": "advantages", "max_norm": "grad_clip",
    "max_grad_norm": "grad_clip", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing", "bf16": "dtype", "fp16": "dtype", "logging_steps": "log_every",
    "save_steps": "save_every", "eval_steps": "eval_every", "save_total_limit": "keep_checkpoints", "report_to": "track",
    "resume_from_checkpoint": "resume", "torch_compile": "compile", "init_kl_coef": "kl_coef", "optim": "optimizer",
    "adam_beta1": "betas", "adam_beta2": "betas", "run_name": "out_dir", "logging_dir": "out_dir", "data_seed": "seed",
    "save_strategy": "save_every", "eval_strategy": "eval_every", "evaluation_strategy": "eval_every",
    "logging_strategy": "log_every", "num_iterations": "rollout_epochs", "reward_weights": "reward",
    "remote_rm_url": "reward", "reward_pretrain": "reward", "prompt_data": "train_data", "use_cpu": "device",
    "no_cuda": "device", "assistant_only_loss": "train_on", "completion_only_loss": "train_on",
    "scale_rewards": "advantages", "rollout_batch_size": "rollout_prompts", "micro_rollout_batch_size": "rollout_batch",
    "micro_train_batch_size": "micro_batch_tokens", "generate_max_len": "max_new_tokens",
    "prompt_max_len": "max_prompt_length", "actor_learning_rate": "lr", "critic_learning_rate": "critic_lr"}
NOT_HERE = {  # keys of other trainers that have no counterpart, as regular expressions -> what is done instead
    "load_best_model_at_end|metric_for_best_model|greater_is_better":
        "the model of the last step is saved; with eval_every and save_every, take the checkpoint that you like best",
    "early_stop.*|patience": "a run ends after max_steps or epochs; Ctrl-C stops it earlier, and saves",
    "mask_truncated_completions|overlong_filter.*":
        "answers that ran out of tokens are trained, too; missing_eos_penalty and overlong_buffer lower their reward",
    "(use_)?vllm.*|colocate_.*|cache_implementation": "the run generates answers itself, between its steps",
    "(use_)?(peft|lora|qlora|dora)(_.*)?|load_in_.bit|quantization_config|bnb_.*":
        "all weights are trained, in fp32; there are no adapters and no quantized weights",
    "deepspeed.*|zero_stage|fsdp.*|tp_size|ddp_.*|accelerator_config":
        "each rank holds the whole model and takes a share of each step; start the ranks with torchrun",
    "(sample_|eval_)?packing(_.*)?|padding_free|group_by_length|pad_to_multiple_of":
        "rows are always packed, without padding",
    "(use_)?flash_attn.*|use_flash_attention.*|attn_implementation|use_liger.*":
        "the kernels are chosen by the device and its dtype",
    "neftune_.*|(disable_|attention_|attn_)?dropout": "there is no dropout and no noise",
    "sync_ref_model|ref_model_.*": "the reference is frozen",
    "precompute_ref_.*": "the reference is asked once per row anyway; reference_live runs it in every step",
    "push_to_hub.*|hub_.*": "nothing is uploaded; out_dir/model is a folder that transformers loads and uploads",
    "(dataset|dataloader|preprocessing)_num_.*|dataloader_.*|num_workers":
        "all cores tokenize, and no loader is needed",
    "remove_unused_columns": "columns that nothing reads are listed and left out",
    "dataset_(text|kwargs).*|input_key|output_key|label_key":
        "columns are known by their names; rename them in the file",
    "trust_remote_code": "code in a model's folder is never run",
    "train_on_inputs": "prompts are not trained; rows of {text} are trained whole",
    "shuffle(_.*)?": "each epoch has its own order, a function of seed",
    "overwrite_output_dir": "an out_dir is never written over; remove it, or name another",
    "adam_eps(ilon)?": "AdamW's is 1e-8", "fp16_full_eval|bf16_full_eval": "evals compute in the run's dtype",
    "ema(_.*)?": "the weights of the last step are saved, and no average of them; sample.py merge averages two models"}
LOSSES_ELSEWHERE = {"sigmoid": "dpo", "reward": "rm", "reward_model": "rm"}
TYPES = typing.get_type_hints(Config)


def checked(key: str, value, kind, where: str):
    """The value as its declared type, or an error that names the source, the key and what was expected."""
    if value is None and getattr(Config, key, 0) is None:
        return None
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value)
    if isinstance(value, list) and tuple in kinds:
        value = tuple(value)
    if not any(callable(value) if k is Callable else type(value) is k for k in kinds):
        names = " or ".join("function" if k is Callable else k.__name__ for k in kinds)
        raise ValueError(f"{where}: {key} = {value!r:.60} is a {type(value).__name__}; expected {names}")
    if key in ITEMS and isinstance(value, (list, tuple)):
        value = type(value)(checked(f"{key}[{i}]", item, ITEMS[key], where) for i, item in enumerate(value))
    if key == "train_data" and isinstance(value, dict):
        names = [checked("a name in train_data", name, str, where) for name in value]
        value = {name: checked(f"train_data[{name!r}]", value[name], float, where) for name in names}
    if key.startswith("train_data[") and isinstance(value, float) and not value > 0:
        raise ValueError(f"{where}: {key} = {value}; expected a weight above 0")
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{where}: {key} = {value!r:.60}; expected one of {', '.join(map(repr, CHOICES[key]))}")
    if key in TYPES and type(value) in (int, float) and not value >= AT_LEAST.get(key, 0):
        raise ValueError(f"{where}: {key} = {value!r}; expected at least {AT_LEAST.get(key, 0)}")
    if key.startswith("betas[") and not 0 <= value < 1:
        raise ValueError(f"{where}: {key} = {value}; expected at least 0 and below 1")
    if key in AT_MOST and not value <= AT_MOST[key]:
        raise ValueError(f"{where}: {key} = {value!r}; expected at most {AT_MOST[key]}")
    if key in TWO and len(value) != 2 and value != getattr(Config, key):
        raise ValueError(f"{where}: {key} = {value!r}; expected two values")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {key} = {value}; expected a finite number")
    return value


def read_file(path: str) -> dict:
    """The assignments of a config file. Imports, functions, classes and names with a leading underscore are not keys,
    unless a declared key holds a function."""
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), 1)
        raise ValueError(f"{path:.200}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    values = run_file(path)
    return {key: value for key, value in values.items() if not key.startswith("_") and not isinstance(value, types.ModuleType)
            and (key in TYPES or not (callable(value) or type(value).__module__ == "__future__"))}


def run_file(path: str) -> dict:
    """The names that a Python file defines. What goes wrong in it is an error that names the line."""
    try:
        return runpy.run_path(path)
    except (Exception, SystemExit) as error:  # of the user's own code, or of what it imports
        frames = traceback.extract_tb(error.__traceback__)
        frame = [frame for frame in frames if "_sitebuiltins" not in frame.filename][-1]  # where exit() is defined
        at = f"{path}: {frame.filename}:{frame.lineno}"
        at = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else at
        raise ValueError(f"{at}: {type(error).__name__}: {error}"[:400]) from error


def read_command_line(arguments: list[str]) -> tuple[str | None, dict]:
    """(config file, {key: value}) of --config FILE and --key=value, --key value or --flag; values are Python literals or text."""
    path, values, i = None, {}, 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--") or word == "--":
            near = f"; did you mean --config={word}?" if word.endswith(".py") else ""
            raise ValueError(f"command line: {word!r} was not expected here; options are --key=value{near}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = arguments[i + 1] if i + 1 < len(arguments) else "--"
            text, i = ("True", i) if following.startswith("--") else (following, i + 1)
            if text == "True" and key in TYPES and TYPES[key] not in (bool, bool | str):
                raise ValueError(f"command line: --{key} needs a value: --{key}=...")
        i += 1
        if key == "config":
            path = home(text)
            continue
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            values[key] = text
        if TYPES.get(key) is str:
            values[key] = text
    return path, values


def resolve(layers: list[tuple[str, dict]]) -> types.SimpleNamespace:
    """Merge layers of (where, values), later ones winning -> every key with its value, `weights` (loss -> weight) and `bound`
    (loss -> its hyperparameters)."""
    values, source = {f.name: f.default for f in fields(Config)}, {}
    for where, layer in layers:
        for key in {f"{name}_{key}" for name in OBJECTIVES for key in layer} & source.keys():  # a later beta wins over dpo_beta
            del values[key], source[key]
        values.update(layer)
        source.update(dict.fromkeys(layer, where))
    name = checked("objective", values["objective"], TYPES["objective"], source.get("objective", "config"))
    weights = dict(name) if isinstance(name, dict) else {name: 1.0}
    if not weights:
        raise ValueError(f"{source['objective']}: objective = {{}}; expected a loss, or {{loss: weight}}")
    for key, weight in weights.items():
        if key not in OBJECTIVES:
            recipes = [f"--config={path}" for path in (f"configs/{key}.py", f"configs/smollm2/{key}.py")
                       if os.path.isfile(Path(__file__).parent / path)]
            hint = f" It is a recipe: {' or '.join(recipes)}." if recipes else suggestion(str(key), OBJECTIVES, LOSSES_ELSEWHERE)
            raise ValueError(f"{source.get('objective', 'config')}: unknown objective {str(key)!r:.40}.{hint} "
                             f"Known: {', '.join(OBJECTIVES)}")
        weights[key] = checked(f"objective[{key!r}]", weight, float, source.get("objective", "config"))
    if values["nll_coef"]:
        if "sft" in weights:
            raise ValueError(f"{source['nll_coef']}: nll_coef adds the sft loss, which the objective already has; use one of them")
        weights["sft"] = checked("nll_coef", values["nll_coef"], float, source["nll_coef"])
    hyperparameters = {}  # key -> the (loss, hyperparameter) pairs it sets: `beta` in all losses, `simpo_beta` in simpo only
    for name in weights:
        for hyperparameter in OBJECTIVES[name].hyperparameters:
            for key in (hyperparameter, f"{name}_{hyperparameter}"):
                hyperparameters.setdefault(key, []).append((name, hyperparameter))
    for key, where in source.items():
        if key in TYPES:
            values[key] = checked(key, values[key], TYPES[key], where)
            values[key] = home(values[key]) if key in PATHS else values[key]
        elif key in hyperparameters:
            defaults = [OBJECTIVES[name].hyperparameters[hyperparameter] for name, hyperparameter in hyperparameters[key]]
            unset = any(f"{name}_{key}" not in source for name, _ in hyperparameters[key])
            having = " and ".join(name for name, _ in hyperparameters[key])
            if unset and any(default != defaults[0] for default in defaults):
                raise ValueError(f"{where}: {key} has more than one default among {having}; set "
                                 f"{' and '.join('_'.join(pair) for pair in hyperparameters[key])} separately")
            values[key] = checked(key, values[key], type(defaults[0]), where)
            if all(source.get(f"{name}_{key}") == where for name, _ in hyperparameters[key]):
                raise ValueError(f"{where}: {key} has no effect, each of {having} has its own; leave it out")
            for name, hyperparameter in hyperparameters[key]:
                try:
                    check(OBJECTIVES[name], {hyperparameter: values[key]})
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
        else:
            owners = [o.name for o in OBJECTIVES.values() if key in o.hyperparameters]
            if owners:
                raise ValueError(f"{where}: {'+'.join(weights)} has no hyperparameter {key!r} (it belongs to {', '.join(owners)})")
            hint = absent(key) or suggestion(key, [*TYPES, *hyperparameters], ELSEWHERE, 0.75)
            raise ValueError(f"{where}: unknown key {key!r:.40}.{hint} "
                             f"`python train.py --help` lists every key; in a config file, other values have to begin with _")
    given = {key: values[key] for key in source}
    bound = {name: {k: given.get(f"{name}_{k}", given.get(k, default)) for k, default in OBJECTIVES[name].hyperparameters.items()}
             for name in weights}
    return types.SimpleNamespace(**values, weights=weights, bound=bound)


def home(value):
    """Expand a leading ~ in a path, in each path of a list or in the keys of a dict. A function is returned as it is."""
    if isinstance(value, list):
        return [*map(home, value)]
    if isinstance(value, dict):
        return {home(key): weight for key, weight in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def suggestion(word: str, known, elsewhere: dict, alike: float = 0.6) -> str:
    """A question after the known word that is meant: by another trainer's name for it, or by a word that is spelled
    much like it, to at least `alike`, from 0 to 1."""
    near = [word] if word in elsewhere else difflib.get_close_matches(word, [*known, *elsewhere], 1, alike)
    return f" Did you mean {elsewhere.get(near[0], near[0])!r}?" if near else ""


def absent(key: str) -> str:
    """What is done here instead, if it is the key of another trainer that has no counterpart."""
    reasons = [reason for pattern, reason in NOT_HERE.items() if re.fullmatch(pattern, key)]
    return f" There is no counterpart here: {reasons[0]}." if reasons else ""


def load(arguments: list[str], *below: tuple[str, dict]) -> types.SimpleNamespace:
    """below: layers of (where, values) that the config file and the command line win over."""
    path, values = read_command_line(arguments)
    return resolve([*below, *([(path, read_file(path))] if path else []), ("command line", values)])


def load_stage(path: str, parent: types.SimpleNamespace) -> types.SimpleNamespace:
    """Another config file as a stage of a run: it inherits the run's seed, machine and cache_dir."""
    inherited = {key: getattr(parent, key) for key in ("seed", "device", "dtype", "compile", "cache_dir")}
    return resolve([(path, read_file(path)), ("inherited", inherited)])


def terms(cfg: types.SimpleNamespace, compiled: bool) -> list[Term]:
    """The losses of a run, bound to their weights, hyperparameters and readings."""
    made = [bind(name, weight, cfg.bound[name], compiled) for name, weight in cfg.weights.items()]
    for name, option in OPTIONS.items():
        if (value := getattr(cfg, name)) == getattr(Config, name):
            continue
        changed = [option(term, value) if term.objective.data == "preference" else term for term in made]
        same = [term.objective.name for term, new in zip(made, changed) if new is term]
        ignoring = [loss for loss in same if OBJECTIVES[loss].data == "preference"] or same * (len(same) == len(made))
        if ignoring:
            raise ValueError(f"{name} = {value!r} changes nothing in {'+'.join(ignoring)}; leave it out")
        made = changed
    read = streams(made)
    for key in [key for key in NEEDS if getattr(cfg, key) != getattr(Config, key)]:
        used, what = NEEDS[key]
        if not used(cfg, read) and not has(cfg, key):
            raise ValueError(f"{key} = {getattr(cfg, key)!r} does nothing in {'+'.join(cfg.weights)} without {what}; "
                             f"leave it out")
    return made


def rolls(cfg: types.SimpleNamespace, read=None) -> bool:
    return any(OBJECTIVES[name].data == "prompts" for name in cfg.weights)


def has(cfg: types.SimpleNamespace, hyperparameter: str) -> bool:
    """Whether a loss of the run has one of that name."""
    return any(hyperparameter in given for given in cfg.bound.values())


NEEDS = {  # key -> (whether the key is used, given the config and the streams that losses read; what it needs to be used)
    **dict.fromkeys(("reward", "bad_rewards", "rollout_prompts", "rollout_epochs", "samples_per_prompt", "advantages",
                     "reward_clip", "missing_eos_penalty", "overlong_buffer", "filter_groups", "kl_coef", "top_k", "top_p",
                     "min_p"), (rolls, "a loss on prompts (such as ppo)")),
    **dict.fromkeys(("rollout_batch", "stop"),
                    (lambda cfg, read: rolls(cfg) or cfg.eval_prompts, "a loss on prompts (such as ppo) or eval_prompts")),
    "temperature": (rolls, "a loss on prompts (such as ppo) or distillation"),
    "reward_workers": (lambda cfg, read: any(map(callable, rewards(cfg))), "a reward that is a function"),
    "reward_timeout": (lambda cfg, read: cfg.reward_workers, "reward_workers"),
    "overlong_penalty": (lambda cfg, read: cfg.overlong_buffer, "overlong_buffer"),
    "filter_rounds": (lambda cfg, read: cfg.filter_groups, "filter_groups"),
    "gamma": (lambda cfg, read: rolls(cfg) and ("values" in read or ADVANTAGES[cfg.advantages].ahead),
              "the value loss, or advantages that count future rewards"),
    "lam": (lambda cfg, read: ADVANTAGES[cfg.advantages].critic, "advantages = 'gae'"),
    "kl_target": (lambda cfg, read: cfg.kl_coef, "kl_coef"), "kl_horizon": (lambda cfg, read: cfg.kl_target, "kl_target"),
    **dict.fromkeys(("critic", "critic_lr", "critic_warmup"), (lambda cfg, read: "values" in read, "the value loss")),
    "reference": (lambda cfg, read: "reference_log_probs" in read or cfg.kl_coef, "a loss that reads a reference, or kl_coef"),
    "reference_live": (lambda cfg, read: "reference_log_probs" in read and not rolls(cfg),
                       "a loss that reads a reference, on fixed rows and not on rollouts"),
    "head_memory": (lambda cfg, read: "log_probs" in read and "entropy" not in read, "a loss on log-probs and not on entropies"),
    **dict.fromkeys(("teacher", "teacher_top_k"), (lambda cfg, read: "teacher_logits" in read, "distillation")),
    "as_chat": (lambda cfg, read: data_kind(cfg) != "prm", "rows that a chat template can render, which steps are not"),
}


def check_complete(cfg: types.SimpleNamespace):
    """Raise for what the config of a run lacks, or what does not go together in it."""
    losses, estimator, read = "+".join(cfg.weights), ADVANTAGES[cfg.advantages], streams(terms(cfg, False))
    language = "lm_head" in model.modules(sorted(read & model.HEADS.keys()))
    others = ", ".join(name for name, other in ADVANTAGES.items() if not other.critic)
    always = (
        (cfg.init_from == "scratch" and not cfg.tokenizer, "init_from = 'scratch' needs tokenizer, a folder with tokenizer.json"),
        (cfg.init_from == "scratch" and not cfg.scratch,
         "init_from = 'scratch' needs scratch = {model_type, hidden_size, ...}, as in config.json"),
        (not cfg.train_data, "train_data is empty; name the files to train on"),
        (cfg.eval_prompts and not (cfg.check or cfg.reward),
         "eval_prompts need check, a function (prompt, completion, row) -> bool in the config file"),
        (cfg.eval_prompts and not language,
         f"eval_prompts need a language model to answer them, and {losses} trains a model without its head; leave them out"),
        ("teacher_logits" in read and not cfg.teacher, "distillation needs teacher, a model folder or a config file"),
        (cfg.teacher_top_k and any(given.get("jsd_beta") == 1 for given in cfg.bound.values()),
         "teacher_top_k with jsd_beta = 1: the reverse KL asks for the teacher's probability of every token that the student "
         "takes, and only its highest are kept; leave out one of the two"))
    rollouts = (
        (cfg.eval_data and cfg.eval_prompts, "eval_data and eval_prompts are both prompts to answer here; set only one of them"),
        (not cfg.reward,
         "rollouts need reward: a function (prompt, completion, row) -> number in the config file, or the folder of a reward "
         "model"),
        (not all((callable(what) or isinstance(what, str) and what) and type(weight) in (int, float)
                 for what, weight in rewards(cfg).items()),
         f"reward = {cfg.reward!r}; expected a function, the folder or config of a reward model, or {{either: weight}}"),
        (not language, f"{losses} trains a critic and no policy; expected both, as in objective = {{'ppo': 1.0, 'value': 0.5}}"),
        (cfg.temperature == 0, "temperature = 0 gives each prompt one fixed answer, but rollouts have to sample; set it above 0"),
        (cfg.gamma > 1, f"gamma = {cfg.gamma}: a reward would count more the later it comes; set it to at most 1"),
        (cfg.rollout_prompts % cfg.batch_size,
         f"rollout_prompts = {cfg.rollout_prompts}; expected a multiple of batch_size = {cfg.batch_size}"),
        (estimator.critic and "values" not in read,
         f"advantages = {cfg.advantages!r} needs a critic: objective = {{..., 'value': 0.5}}; or name other advantages: "
         f"{others}"),
        (estimator.group and cfg.samples_per_prompt < 2,
         f"advantages = {cfg.advantages!r} compares several answers to the same prompt; set samples_per_prompt above 1"))
    for wrong, said in always + rollouts * rolls(cfg):
        if wrong:
            raise ValueError(said)


def data_kind(cfg: types.SimpleNamespace) -> str:
    kinds = {OBJECTIVES[name].data for name in cfg.weights} - {None} or {"sft"}
    imitating = [name for name in cfg.weights if OBJECTIVES[name].data is None]
    for kind in kinds & {"prompts", "prm"} if imitating else ():
        raise ValueError(f"objective {'+'.join(cfg.weights)}: {kind} rows have nothing for {imitating[0]} to imitate; drop it")
    if len(kinds) > 1:
        raise ValueError(f"objective {cfg.objective}: these losses need different rows ({', '.join(sorted(kinds))})")
    return kinds.pop()


def stage_files(cfg: types.SimpleNamespace) -> list[str]:
    """The config files among the models that the run begins with."""
    models = [cfg.init_from, cfg.reference, cfg.teacher, cfg.critic, *[name for name in rewards(cfg) if isinstance(name, str)]]
    return [name for name in models if name.endswith(".py")]


def stages(cfg: types.SimpleNamespace) -> dict[str, types.SimpleNamespace]:
    """config file -> config, of every stage before a run and of those before these."""
    found = {}
    for path in stage_files(cfg):
        stage = load_stage(path, cfg)
        found |= {os.path.relpath(path): stage, **stages(stage)}
    return found


def check_run(cfg: types.SimpleNamespace):
    """Raise, before any stage of a run has run, if two of these would write to the same folder, or one inside the other's, and for
    what one of them lacks."""
    before, taken = stages(cfg), {}
    for name, run in {"this run": cfg, **before}.items():  # a stage that is named twice is one
        path = Path(os.path.realpath(run.out_dir))
        for other in [other for other, its in taken.items() if path.is_relative_to(its) or its.is_relative_to(path)]:
            raise ValueError(f"{other} and {name} would both write to out_dir = {run.out_dir!r}; give each its own folder, none "
                             f"nested")
        taken[name] = path
    check_complete(cfg)
    for path, stage in before.items():
        try:
            check_complete(stage)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def rewards(cfg: types.SimpleNamespace) -> dict:
    """function, folder or config -> its weight in the reward."""
    return cfg.reward if isinstance(cfg.reward, dict) else {cfg.reward: 1.0} if cfg.reward else {}


def code(function: Callable) -> str:
    """A function's name, and a hash of its source and of all that it holds: defaults, closure variables, a partial's arguments, an
    object's attributes and the source of its methods. An edit changes it; it is the same in every process."""
    known = {}  # id -> object, hash: each is hashed once, and kept alive so that its id is not reused

    def text(code: types.CodeType) -> str:
        try:
            return inspect.getsource(code)
        except OSError:  # it was not written in a file
            return code.co_code.hex()

    def parts(v) -> list:
        """What an object consists of."""
        if isinstance(v, dict):
            return sorted(said([k, x]) for k, x in v.items())
        if isinstance(v, (list, tuple)):
            return [*map(said, v)]
        if isinstance(v, (set, frozenset)):
            return sorted(map(said, v))
        if isinstance(v, functools.partial):
            return [*map(said, (v.func, v.args, v.keywords))]
        if isinstance(v, types.MethodType):
            return [*map(said, (v.__func__, v.__self__))]
        if isinstance(v, types.FunctionType):
            held = [cell.cell_contents for cell in v.__closure__ or () if cell != types.CellType()]  # which is empty
            return [v.__qualname__, text(v.__code__), *map(said, (v.__defaults__, v.__kwdefaults__, held, vars(v)))]
        if isinstance(v, type):
            own = {k: x for k, x in vars(v).items() if isinstance(x, types.FunctionType) or not k.startswith("__")}
            return [v.__qualname__, said(own)]
        if hasattr(v, "__wrapped__"):  # functools.cache
            return [said(v.__wrapped__)]
        if hasattr(v, "__dict__") and (callable(v) or vars(v)) and not isinstance(v, types.ModuleType):
            return [*map(said, (type(v), vars(v)))]
        return [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(v))]

    def said(v) -> str:
        if id(v) not in known:
            known[id(v)] = v, "itself"
            known[id(v)] = v, hashed([type(v).__name__, *parts(v)])
        return known[id(v)][1]
    named = next((x for x in (function, getattr(function, "func", None)) if hasattr(x, "__qualname__")), type(function))
    return f"{named.__qualname__} {said(function)[:8]}"


def as_json(cfg: types.SimpleNamespace) -> dict:
    def named(v):
        if isinstance(v, dict):
            return {named(key): value for key, value in v.items()}
        return code(v) if callable(v) else v
    return {key: named(value) for key, value in vars(cfg).items()}


def machine(cfg: types.SimpleNamespace) -> tuple[str, str]:
    """The device and the dtype of compute that "auto" stands for."""
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return device, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"


def settings(cfg: types.SimpleNamespace, above: tuple = ()) -> dict:
    """The settings that determine a run's result, with those of its stages: not where it is computed and written, nor how it
    is evaluated, logged and saved. above: config files of the runs that this one is a stage of, to detect cycles."""
    apart = {"device", "compile", "out_dir", "resume", "log_every", "save_every", "keep_checkpoints", "cache_dir", "samples",
             "track", "activation_checkpointing", "head_memory", "max_skipped_steps", "eval_data", "eval_prompts", "eval_every",
             "check", "max_new_tokens"}
    apart |= {"objective", "nll_coef"}  # kept as `weights` and `bound`, as are the hyperparameters
    apart |= {key for name, given in cfg.bound.items() for k in given for key in (k, f"{name}_{k}")}
    apart -= {"max_new_tokens"} if rolls(cfg) else set()
    kept = {key: value for key, value in as_json(cfg).items() if key not in apart} | {"dtype": machine(cfg)[1]}
    for path in stage_files(cfg):
        if path in above:
            raise ValueError(f"{path} needs its own result to start: {' <- '.join([*above, path])}; break the cycle")
        kept[path] = hashed(settings(load_stage(path, cfg), (*above, path)))
    return json.loads(json.dumps(kept))


def settings_and_rows(cfg: types.SimpleNamespace, before: dict) -> dict:
    """The settings, and under "contents" what is in the files of train_data, of the run and of each of its stages, as
    {file: hash}. before: those of an earlier run. Files that are gone count as unchanged: a trained stage needs none."""
    now, known = settings(cfg), before.get("contents", {})
    now["contents"] = {}
    for name, run in {"train_data": cfg, **stages(cfg)}.items():
        try:
            now["contents"][name] = contents(run.train_data)
        except (ValueError, OSError):  # a run that reads them will say what is wrong
            now["contents"][name] = known.get(name, {})
    return now


def hashed(settings: dict | list) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flat(settings: dict, name: str = "") -> dict:
    """One level of keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    parts = [flat(v, f"{name}{k}.") if isinstance(v, dict) and v else {f"{name}{k}": v} for k, v in settings.items()]
    return dict(item for part in parts for item in part.items())


def changes(before: dict, now: dict) -> list[str]:
    """Settings that differ, and files of train_data that do."""
    files = []
    hashes_before, hashes_now = hashes(before), hashes(now)
    for file in sorted(hashes_before.keys() | hashes_now.keys()):
        if file not in hashes_before:
            files.append(f"{file} is new")
        elif file not in hashes_now:
            files.append(f"{file} is gone")
        elif hashes_before[file] != hashes_now[file]:
            files.append(f"{file} has other contents")
    before, now = (flat({key: value for key, value in given.items() if key != "contents"}) for given in (before, now))
    keys = sorted(before.keys() | now.keys())
    differing = [key for key in keys if before.get(key) != now.get(key)]
    return files + [f"{key} {str(before.get(key))[:60]} -> {str(now.get(key))[:60]}" for key in differing]


def hashes(settings: dict) -> dict[str, str]:
    """file -> hash of what is in it, of a run and its stages."""
    return {file: value for files in settings.get("contents", {}).values() for file, value in files.items()}


def help_text() -> str:
    """Every key with its default and comment, from the source above; then every loss with its hyperparameters."""
    lines = ["usage: python train.py --config configs/dpo.py [--key=value ...]",
             "       torchrun --nproc_per_node=8 train.py --config ..."]
    for line in inspect.getsource(Config).splitlines():
        if heading := re.match(r"    # (.*)", line):
            lines += ["", heading[1]]
        elif knob := re.match(r"    (\w+): .+? = (.+?)  # (.*)", line):
            lines.append(f"  --{knob[1]}={knob[2]}")
            lines += textwrap.wrap(knob[3], 72, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "Objectives and their hyperparameters"]
    for o in OBJECTIVES.values():
        lines += textwrap.wrap(" ".join([o.name, *(f"--{k}={v}" for k, v in o.hyperparameters.items())]), 78, initial_indent="  ",
                               subsequent_indent="    ", break_on_hyphens=False)
        first = re.sub(r"\s+", " ", (o.loss.__doc__ or "").split("\n\n")[0])
        lines += textwrap.wrap(first, 72, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
