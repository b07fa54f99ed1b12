"""Every key comes from where it was last said, has its type, and what is wrong is named with what would be right."""
import ast
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import config
from conftest import ROOT
from losses import OBJECTIVES

DEFAULTS = {f.name: f.default for f in fields(config.Config)}


def load(*arguments):
    return config.load(list(arguments))


def from_file(tmp_path, text, *arguments):
    (tmp_path / "run.py").write_text(text)
    return load(f"--config={tmp_path / 'run.py'}", *arguments)


def digest(cfg):
    return config.hashed(config.settings(cfg))


def refused(match, *arguments):
    with pytest.raises(ValueError, match=match):
        load(*arguments)


def test_what_other_trainers_say_is_translated_into_keys_and_losses():
    for known, elsewhere in ((DEFAULTS, config.ELSEWHERE), (OBJECTIVES, config.LOSSES_ELSEWHERE)):
        assert not known.keys() & elsewhere.keys() and known.keys() >= set(elsewhere.values())


def test_defaults_then_file_then_command_line(tmp_path):
    text = "seed = 3\nlr = 2e-4\nobjective = 'dpo'\nbeta = 0.3\n"
    defaults, given = load(), from_file(tmp_path, text, "--lr=3e-4", "--beta=0.5")
    assert {key: getattr(defaults, key) for key in DEFAULTS} == DEFAULTS
    assert (given.epochs, given.seed, given.lr, given.beta) == (1.0, 3, 3e-4, 0.5)
    assert given.weights == {"dpo": 1.0} and defaults.weights == {"sft": 1.0}
    assert load("--lr=1.0", "--lr=2.0").lr == 2.0


@pytest.mark.parametrize("arguments, key, value", [
    (["--lr=1e-3"], "lr", 1e-3), (["--lr", "1e-3"], "lr", 1e-3), (["--lr=2"], "lr", 2.0), (["--epochs", "3"], "epochs", 3.0),
    (["--resume"], "resume", True), (["--resume", "--lr=1.0"], "resume", True), (["--resume=False"], "resume", False),
    (["--resume", "False"], "resume", False), (["--betas=(0.9,0.95)"], "betas", (0.9, 0.95)),
    (["--betas", "[0.9, 0.95]"], "betas", (0.9, 0.95)),
    (["--out_dir=123"], "out_dir", "123"), (["--out_dir", "1e-3"], "out_dir", "1e-3"), (["--out_dir=None"], "out_dir", "None"),
    (["--out_dir=a=b"], "out_dir", "a=b"), (["--out_dir="], "out_dir", ""), (["--compile"], "compile", True),
    (["--compile=auto"], "compile", "auto"), (["--train_data=['a', 'b']"], "train_data", ["a", "b"]),
    (["--train_data=a*.jsonl"], "train_data", "a*.jsonl"),
    (["--scratch={'model_type': 'llama'}"], "scratch", {"model_type": "llama"}),
    (["--scratch=None"], "scratch", None), (["--objective={'dpo': 1, 'sft': 0.5}"], "weights", {"dpo": 1.0, "sft": 0.5}),
    (["--objective=dpo", "--nll_coef=0.5"], "weights", {"dpo": 1.0, "sft": 0.5}),
    (["--objective=ipo", "--length_normalized"], "length_normalized", True), (["--objective=dpo", "--beta=1"], "beta", 1.0)])
def test_values_of_the_command_line(arguments, key, value):
    read = getattr(load(*arguments), key)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("arguments, message", ids=lambda value: " ".join(value) if isinstance(value, list) else "", argvalues=[
    (["--max_step=3"], "command line: unknown key 'max_step'. Did you mean 'max_steps'?.*--help"),
    (["--objective=dpo", "--bta=0.1"], "unknown key 'bta'. Did you mean 'beta'?"),
    (["--learning_rate=1e-5"], "unknown key 'learning_rate'. Did you mean 'lr'?"),
    (["--reward_model=out/rm"], "unknown key 'reward_model'. Did you mean 'reward'?"),
    (["--objective=grpo"], "unknown objective 'grpo'. It is a recipe: --config=configs/grpo.py or --config=configs/smollm2/grpo.py. Known: "),
    (["--zzzzzz=1"], "unknown key 'zzzzzz'. `python"),
    (["--beta=0.1"], r"sft has no hyperparameter 'beta' \(it belongs to dpo, ipo"),
    (["--objective=dpo", "--length_normalized"], r"dpo has no hyperparameter 'length_normalized' \(it belongs to ipo"),
    (["--objective=dop"], "command line: unknown objective 'dop'. Did you mean 'dpo'? Known: sft, lm, kd, dpo"),
    (["--objective={'dpo': 1, 'sf': 1}"], "unknown objective 'sf'. Did you mean 'sft'?"),
    (["--objective={'dpo': 'x'}"], r"objective\['dpo'\] = 'x' is a str; expected float"),
    (["--objective={'dpo': True}"], r"objective\['dpo'\] = True is a bool; expected float"),
    (["--objective={}"], "objective"),
    (["--objective=3"], "objective = 3 is a int; expected str or dict"),
    (["--objective=sft", "--nll_coef=0.5"], "nll_coef adds the sft loss"),
    (["--seed=True"], "seed = True is a bool; expected int"),
    (["--seed=1.0"], "seed = 1.0 is a float; expected int"),
    (["--lr=fast"], "lr = 'fast' is a str; expected float"),
    (["--lr=True"], "lr = True is a bool; expected float"),
    (["--objective=dpo", "--nll_coef=some"], "nll_coef = 'some' is a str; expected float"),
    (["--resume=1"], "resume = 1 is a int; expected bool"),
    (["--betas=0.9"], "betas = 0.9 is a float; expected tuple"), (["--betas=(0.9,)"], r"betas = \(0.9,\); expected two values"),
    (["--reward_tokens=('good',)"], r"reward_tokens = \('good',\); expected two values"),
    (["--stop=[13]"], r"stop\[0\] = 13 is a int; expected str"), (["--betas=(0.9,1.0)"], r"betas\[1\] = 1.0; expected at least 0 and below 1"), (["--betas=(0.9,'x')"], r"betas\[1\] = 'x' is a str; expected float"),
    (["--eval_data=['a.jsonl', 1]"], r"eval_data\[1\] = 1 is a int; expected str"),
    (["--train_data=123"], "train_data = 123 is a int; expected str or list"),
    (["--scratch={[]: 1}"], "scratch = .* is a str; expected dict"),
    (["--check=print"], "check = 'print' is a str; expected function"),
    (["--lr=None"], "lr = None is a NoneType; expected float"),
    (["--objective=dpo", "--beta=high"], "beta = 'high' is a str; expected float"),
    (["--objective=ipo", "--length_normalized=1"], "length_normalized = 1 is a int; expected bool"),
    (["--truncation=cutt"], "truncation = 'cutt'; expected one of 'cut', 'drop', 'error'"),
    (["--compile=maybe"], "compile = 'maybe'; expected one of True, False, 'auto'"),
    (["--batch_size=0"], "batch_size = 0; expected at least 1"), (["--lr=-1e-6"], "lr = -1e-06; expected at least 0"),
    (["--objective=dpo", "--beta=0"], "command line: dpo: beta = 0.0; expected above 0"), (["--objective=dpo", "--label_smoothing=-0.1"], "label_smoothing = -0.1; expected between 0 and 1"),
    (["--objective=kd", "--jsd_beta=1.5"], "jsd_beta = 1.5; expected between 0 and 1"), (["--max_length=1"], "max_length = 1; expected at least 2"),
    (["--lr=-1"], "lr = -1.*; expected at least 0"), (["--lr=1e999", "--lr=-1e999"], "lr = -inf; expected at least 0"),
    (["--out_dir"], "out_dir"), (["--out_dir", "--resume"], "out_dir"),
    (["lr=1"], "'lr=1' was not expected here"), (["configs/dpo.py"], "options are --key=value; did you mean --config=configs/dpo.py?"), (["--"], "'--' was not expected here"),
    (["--resume", "True", "x"], "'x' was not expected here")])
def test_what_is_refused(arguments, message):
    refused(message.replace("?", r"\?"), *arguments)


@pytest.mark.parametrize("line, message", [
    ("lerning_rate = 1.0", "run.py: unknown key 'lerning_rate'"), ("lr = 'fast'", "run.py: lr = 'fast' is a str; expected float"),
    ("seed = True", "run.py: seed = True is a bool; expected int"), ("beta = 0.1", "run.py: sft has no hyperparameter 'beta'"),
    ("objective = 'dop'", "run.py: unknown objective 'dop'"), ("check = 3", "run.py: check = 3 is a int; expected function")])
def test_the_file_is_named(line, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path, line, "--seed=1" if "seed" not in line else "--lr=1.0")


def test_what_is_not_a_key(tmp_path):
    """Modules, functions, classes and names with an underscore; but a function is one where a key holds functions."""
    cfg = from_file(tmp_path, "import math\nfrom math import sqrt\nfrom collections import Counter\n_half = 0.5\n"
                              "def check(prompt, completion, row):\n    return prompt\n"
                              "def helper(x):\n    return x * _half\nclass Thing: pass\nlr = helper(sqrt(4.0))\n")
    assert cfg.lr == 1.0 and cfg.check("p", "c", {}) == "p"
    assert set(vars(cfg)) - OBJECTIVES["sft"].hyperparameters.keys() == DEFAULTS.keys() | {"weights", "bound"}
    cfg = from_file(tmp_path, "def is_right(prompt, completion, row):\n    return True\ncheck = is_right\n")
    assert cfg.check("", "", {}) is True


def test_a_config_may_import_what_it_likes(tmp_path):
    cfg = from_file(tmp_path, "from __future__ import annotations\nfrom typing import Optional\nfrom numpy import sin\nimport functools\n"
                              "@functools.cache\ndef half(x):\n    return x / 2\nlr = half(0.5)\n")
    assert cfg.lr == 0.25


def test_a_function_that_was_edited_is_another(tmp_path):
    """A stage with the other one is made again; a partial is the same in every process."""
    with_reward = "objective, init_from = 'ppo', 'x'\nfrom functools import partial\ndef reward(prompt, completion, row, x=1):\n    return {}\n"
    of = lambda text: digest(from_file(tmp_path, text))
    first, again, edited = (of(with_reward.format(value)) for value in ("1.0", "1.0", "-1.0"))
    assert first == again != edited
    part, same, other = (of(with_reward.format("1.0") + f"reward = partial(reward, x={x})\n") for x in (2, 2, 3))
    judge = "class Judge:\n    def __init__(self, x):\n        self.x = x\n    def __call__(self, prompt, completion, row):\n        return {}\n"
    one, again, other_x, other_text = (of(with_reward.format("1.0") + judge.format(text) + f"reward = partial(Judge({x}), row={{}})\n")
                                       for text, x in (("self.x", 1), ("self.x", 1), ("self.x", 2), ("-self.x", 1)))
    assert one == again and len({one, other_x, other_text}) == 3
    held = {"a closure": "def make(x):\n    return lambda prompt, completion, row: x\nreward = make({})\n",
            "two closures": "def make(x):\n    return lambda prompt, completion, row: x\nreward = {{make(1): {}, make(2): 0.5}}\n",
            "a method": judge.format("self.x") + "reward = Judge({}).__call__\n", "a default": "def reward(prompt, completion, row, x={}):\n    return x\n",
            "another method": "class Judge:\n    def __call__(self, *given):\n        return self.of(*given)\n    def of(self, *given):\n        return {}\nreward = Judge()\n",
            "an attribute of its class": "class Judge:\n    x = {}\n    def __call__(self, *given):\n        return self.x\nreward = Judge()\n",
            "a decorator": "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def again(*given):\n        return {} * f(*given)\n    return again\nreward = twice(reward)\n",
            "a cache": "import functools\ndef make(x):\n    @functools.cache\n    def reward(prompt, completion, row):\n        return x\n    return reward\nreward = make({})\n",
            "no variable yet": "def make(x):\n    def reward(prompt, completion, row):\n        return x, later\n    return reward\n    later = 1\nreward = make({})\n", "an object": judge.format("self.x.y") + "class Held:\n    pass\n"
            "reward = Judge(Held())\nreward.x.y, reward.x.me, reward.lock = {}, reward, __import__('threading').Lock()\n"}
    for what, text in held.items():
        settings = lambda x: config.settings(from_file(tmp_path, with_reward.format("1.0") + text.format(x)))
        assert settings(2.0) == settings(2.0) != settings(3.0) and "0x" not in str(settings(2.0)), what
    assert part == same and len({first, part, other}) == 3 and "0x" not in str(config.settings(from_file(tmp_path, with_reward.format("2.0") + "reward = partial(reward)\n")))


def test_a_function_is_the_same_in_every_process(tmp_path):
    """Whatever it holds: sets have another order there, and objects are elsewhere. Nothing of it is written down as it is, and
    what is held many times is read once."""
    (tmp_path / "run.py").write_text(
        "import dataclasses, threading, types, numpy\nwords = {'one', 'two', 'three'}\nx = ['secret', threading.Lock(), numpy.random.default_rng(0)]\n"
        "for _ in range(40):\n    x = [x, x]\n@dataclasses.dataclass\nclass Judge:\n    words: set\n    more: dict\n    def reward(self, prompt, completion, row):\n"
        "        return 1.0\nmore = {w: types.SimpleNamespace(w=words) for w in words}\nreward = Judge(words, {'x': x, 'more': more}).reward\ndel words, x, more, _\n")
    ask = f"import config; print(config.as_json(config.load(['--config={tmp_path / 'run.py'}']))['reward'])"
    said = {subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True,
                           check=True).stdout for seed in range(3)}
    assert len(said) == 1 and re.fullmatch(r"Judge\.reward [0-9a-f]{8}\n", said.pop())


def test_what_needs_no_compiler_does_not_wait_for_one():
    """Its import takes as long as all the rest: help, a typo and a look at a file come without."""
    ask = "import sys, train, sample, preview; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True)


def test_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load("--out_dir=~/runs/x", "--train_data=['~/a.jsonl', 'b.jsonl']", "--init_from=~/m", "--eval_data=~/e.jsonl")
    assert (cfg.out_dir, cfg.train_data, cfg.init_from, cfg.eval_data) == ("/home/me/runs/x", ["/home/me/a.jsonl", "b.jsonl"], "/home/me/m", "/home/me/e.jsonl")
    assert load("--reward={'~/rm': 1.0, len: 0.5}".replace("len", "'rm'")).reward == {"/home/me/rm": 1.0, "rm": 0.5}


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "dpo.py").write_text("")
    refused(rf"{tmp_path}/dop.py: no such config file; did you mean {tmp_path}/dpo.py\?", f"--config={tmp_path}/dop.py")
    refused("nowhere/dpo.py: no such config file$", "--config", "nowhere/dpo.py")


def test_a_stage_does_not_begin_with_itself(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(f"init_from = {str(other)!r}\n")
    other.write_text(f"init_from, reference, objective = 'x', {str(one)!r}, 'dpo'\n")
    with pytest.raises(ValueError, match="one.py needs its own result to start: .*one.py <- .*other.py <- .*one.py; break the cycle"):
        config.settings(load(f"--init_from={one}"))


def test_a_stage_inherits_seed_and_machine_only(tmp_path):
    (tmp_path / "stage.py").write_text("seed = 1\nlr = 0.5\ndevice = 'cpu'\n")
    parent = load("--seed=7", "--dtype=float64", "--lr=0.25", "--device=auto", "--compile=False")
    stage = config.load_stage(str(tmp_path / "stage.py"), parent)
    assert (stage.seed, stage.dtype, stage.device, stage.compile, stage.lr) == (7, "float64", "auto", False, 0.5)


def test_steps_show_nothing_to_imitate():
    with pytest.raises(ValueError, match="prm.sft: prm rows have nothing for sft to imitate; drop it"):
        config.data_kind(load("--objective=prm", "--nll_coef=0.5"))


def test_terms_bind_weights_and_hyperparameters():
    terms = config.terms(load("--objective={'dpo': 2, 'sft': 0.5}", "--beta=0.3"), False)
    assert [(t.objective.name, t.weight, t.hyperparameters) for t in terms] == [
        ("dpo", 2.0, {"beta": 0.3, "label_smoothing": 0.0}), ("sft", 0.5, {"per_sequence": False, "dft": False})]
    assert [t.loss for t in terms] == [OBJECTIVES["dpo"].loss, OBJECTIVES["sft"].loss]
    assert config.data_kind(load("--objective={'dpo': 2, 'sft': 0.5}")) == "preference" and config.data_kind(load()) == "sft"


@pytest.mark.parametrize("arguments", [
    ["--objective=sft", "--reference_free"], ["--objective=simpo", "--reference_free"], ["--objective=orpo", "--f_divergence=js"],
    ["--objective=aot", "--f_divergence=0.5"], ["--objective=aot_unpaired", "--wpo"], ["--objective=sft", "--ld_alpha=0.5"],
    ["--objective=kto", "--ld_alpha=0.5"], ["--objective=rm", "--wpo"], ["--objective={'dpo': 1.0, 'aot': 1.0}", "--wpo"]])
def test_an_option_that_a_loss_would_not_heed_is_refused(arguments):
    cfg = load(*arguments)
    name, _, value = arguments[1][2:].partition("=")
    with pytest.raises(ValueError, match=rf"{name} = '?{value or True}'? changes nothing in {list(cfg.weights)[-1]}; leave it out"):
        config.terms(cfg, False)


@pytest.mark.parametrize("arguments, message", [
    (["--objective=simpo", "--reference=x"], "reference = 'x' does nothing in simpo without a loss that reads a reference"),
    (["--objective=rm", "--head_memory=1"], "head_memory = 1.0 does nothing in rm without a loss on log-probs and not on entropies"),
    (["--objective=sft", "--reference_live"], "reference_live = True does nothing in sft without a loss that reads a reference, on fixed rows and not on rollouts; leave it out"),
    (["--objective=dpo", "--reference_free", "--reference=x"], "reference = 'x' does nothing in dpo without a loss that reads a reference"),
    (["--objective=prm", "--as_chat"], "as_chat = True does nothing in prm without rows that a chat template can render"),
    (["--objective=dpo", "--reference_free", "--f_divergence=js"], "f_divergence = 'js' compares the policy with its reference, which reference_free leaves")])
def test_a_reference_that_nothing_reads_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        config.terms(load(*arguments), False)


def test_a_key_of_the_run_that_a_loss_has_too(monkeypatch):
    """SimPO's margin is called gamma, and so is the discount of rollouts: each has its own default and its own bound."""
    (term,) = config.terms(load("--objective=simpo", "--gamma=1.5"), False)
    assert term.hyperparameters == dict(beta=2.0, gamma=1.5) and load("--objective=simpo", "--simpo_gamma=0.3").bound["simpo"]["gamma"] == 0.3
    monkeypatch.setitem(OBJECTIVES, "cold", OBJECTIVES["simpo"]._replace(name="cold", hyperparameters=dict(gamma=0.3, temperature=2.0)))
    monkeypatch.setitem(OBJECTIVES, "best", OBJECTIVES["dpo"]._replace(name="best", hyperparameters=dict(top_k=3)))
    assert config.terms(load("--objective=best", "--top_k=5"), False)[0].hyperparameters == dict(top_k=5)
    monkeypatch.setitem(OBJECTIVES, "bare", OBJECTIVES["dpo"]._replace(name="bare", loss=lambda x: x))  # without a docstring
    assert "\n  bare --beta=0.1" in config.help_text()
    assert load("--objective=cold").bound["cold"] == dict(gamma=0.3, temperature=2.0)
    assert load("--objective=cold", "--gamma=0.5").bound["cold"] == dict(gamma=0.5, temperature=2.0)
    with pytest.raises(ValueError, match="gamma = 0.5 does nothing in dpo without"):
        config.terms(load("--objective=dpo", "--gamma=0.5"), False)


def test_hyperparameters_that_several_losses_have(tmp_path):
    """One key sets them all where it means the same; where their defaults differ each is set by its own name."""
    two = "--objective={'dpo': 1, 'ipo': 1}"
    assert load(two, "--beta=0.3").bound == {"dpo": dict(beta=0.3, label_smoothing=0.0), "ipo": dict(beta=0.3, length_normalized=False)}
    assert [given["beta"] for given in load(two, "--beta=0.3", "--ipo_beta=0.2").bound.values()] == [0.3, 0.2]
    assert [given["beta"] for given in load("--objective={'dpo': 1, 'simpo': 1}").bound.values()] == [0.1, 2.0]
    refused("beta has more than one default among dpo and simpo; set dpo_beta and simpo_beta separately", "--objective={'dpo': 1, 'simpo': 1, 'sft': 1}", "--beta=0.3")
    set_apart = from_file(tmp_path, "objective, beta = {'dpo': 1, 'simpo': 1}, 0.5", "--dpo_beta=0.2", "--simpo_beta=3.0")  # a file's beta cannot be unset
    assert [given["beta"] for given in set_apart.bound.values()] == [0.2, 3.0]
    refused("simpo: beta = -1.0; expected above 0", "--objective={'dpo': 1, 'simpo': 1}", "--simpo_beta=-1")
    refused("unknown key 'simpo_beta'", "--objective=dpo", "--simpo_beta=1")
    assert from_file(tmp_path, "objective, beta, nll_coef = 'dpo', 0.1, 1.0", "--dpo_beta=0.2").bound["dpo"]["beta"] == 0.2  # the file sets beta
    refused("beta has no effect, each of dpo and ipo has its own; leave it out", two, "--beta=0.3", "--ipo_beta=0.2", "--dpo_beta=0.1")
    layers = [("file", dict(objective="dpo", dpo_beta=0.5)), ("command line", dict(beta=0.3))]
    assert config.resolve(layers).bound["dpo"]["beta"] == 0.3  # later ones win
    assert digest(load(two, "--beta=0.3")) == digest(load(two, "--dpo_beta=0.3", "--ipo_beta=0.3"))
    assert digest(load(two, "--beta=0.3")) != digest(load(two, "--beta=0.3", "--ipo_beta=0.2"))


def test_options_change_the_losses_that_heed_them():
    dpo, sft = config.terms(load("--objective={'dpo': 1, 'sft': 1}", "--ld_alpha=0.5", "--wpo", "--f_divergence=js"), False)
    plain = config.terms(load("--objective=dpo"), False)[0]
    assert dpo.importance and all(dpo.reads[name] is not plain.reads[name] for name in dpo.reads) and sft.importance is None
    with pytest.raises(ValueError, match="f_divergence = 'jss'; expected 'forward_kl', 'js' or a number"):
        config.terms(load("--objective=dpo", "--f_divergence=jss"), False)


def test_help_lists_every_key_with_its_default():
    lines = config.help_text().splitlines()
    listed = dict(line.strip().removeprefix("--").split("=", 1) for line in lines if line.startswith("  --"))
    assert {key: ast.literal_eval(value) for key, value in listed.items()} == DEFAULTS
    words = " ".join(lines).split()
    for o in OBJECTIVES.values():
        line = [o.name, *(f"--{key}={value}" for key, value in o.hyperparameters.items())]
        assert any(words[i:i + len(line)] == line for i in range(len(words))), o.name
    assert max(map(len, lines)) <= 80
    assert all(lines[i + 1].startswith("      ") for i, line in enumerate(lines) if line.startswith("  --"))  # each is explained


@pytest.mark.parametrize("argument, changes", [
    ("--lr=0.5", True), ("--seed=1", True), ("--beta=0.5", True), ("--train_data=x", True), ("--nll_coef=0.5", True),
    ("--max_length=64", True), ("--dtype=float64", True), ("--objective=ipo", True), ("--out_dir=x", False),
    ("--log_every=7", False), ("--save_every=7", False), ("--keep_checkpoints=7", False), ("--resume", False),
    ("--cache_dir=x", False), ("--head_memory=2", False)])
def test_digest_is_of_what_decides_the_result(argument, changes):
    assert (digest(load("--objective=dpo", argument)) != digest(load("--objective=dpo"))) == changes


@pytest.mark.parametrize("a, b", [
    (["--lr=1"], ["--lr=1.0"]), (["--nll_coef=1"], ["--nll_coef=1.0"]), (["--beta=0.1"], []), (["--betas=[0.9, 0.999]"], []),
    (["--objective={'dpo': 1}"], ["--objective={'dpo': 1.0}"])])
def test_digest_does_not_depend_on_how_it_is_said(a, b):
    assert digest(load("--objective=dpo", *a)) == digest(load("--objective=dpo", *b))
