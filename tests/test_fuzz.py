"""Bad input: each of thousands of spoiled rows, configs, folders and checkpoints is read right or refused in one clear sentence."""
import ast
import copy
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import config
import data
import model
import train
from conftest import ROOT, tiny
from parts import tokens
from test_train import options

USER, AI = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
MORE = [USER, AI, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
CALL = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}]}
GOOD = {
    "sft": [{"tools": '[{"name": "add"}]', "messages": [USER, CALL, {"role": "tool", "tool_call_id": "1", "content": "4"}, AI]},
            {"prompt": "a b", "completion": " c d"}, {"messages": MORE}, {"text": "all of it"}, {"system": "Be short.", "messages": [USER, AI]},
            {"instruction": "Add", "input": "2 2", "output": "4"}, {"prompt": [USER], "completion": [AI]},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            {"system": "Be short.", "instruction": "2 + 2?", "context": "in the ring of 3", "history": [["a", "b"]], "response": "1"}],
    "preference": [{"prompt": "a b", "chosen": " c", "rejected": " d e", "margin": 0.5}, {"prompt": [USER], "chosen": [AI], "rejected": MORE[3:]},
                   {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
                   {"prompt": "best first", "responses": [" a", " b", " c"]}, {"chosen": MORE, "rejected": [*MORE[:3], AI]},
                   {"system": "Be short.", "question": "2 + 2?", "chosen": "4", "rejected": "5"}],
    "kto": [{"prompt": "a b", "completion": " c", "label": True}, {"messages": MORE, "label": 0}, {"prompt": "p", "chosen": " c", "rejected": " d"}],
    "prm": [{"prompt": "sum", "completions": ["one", "two"], "labels": [True, False]}, {"prompt": "sum", "completions": ["one"], "labels": [0.5]},
            {"input": "x Step 1: a \u043a\u0438 Step 2: b \u043a\u0438", "label": "x Step 1: a + Step 2: b -"},
            {"input": "q", "steps": ["s", "t"], "mistake_index": 1}],
    "prompts": [{"prompt": "say", "answer": 3}, {"question": "why"}, {"problem": "1 + 1"}, {"prompt": [USER]}, {"messages": MORE}]}
ODD = ["", " ", "\0", "a\0b", "\ud800", "x\udfffy", "\u202e\u0301", "🙂" * 3, "<|end|>", "x" * 20_000, None, True, False, 0, -1, 2, 1.5, 1e999,
       float("nan"), 10**30, [], {}, [[]], [[[[1]]]], [None], [{}], {"role": "user"}, {"a": {"b": []}}, [1, "a", None], [USER, 3], "assistant"]
CHATML = ("{{ tools|tojson if tools }}{% for m in messages %}<|{{ m.role }}|>{{ m.thinking }}{{ m.content }}"
          "{{ m.tool_calls|tojson if m.tool_calls }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token a byte: what is encoded can be read back."""
    folder = tmp_path_factory.mktemp("bytes")
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|end|>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": CHATML}))
    return data.Tokenizer(folder)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def mutated(row, rng) -> bytes:
    """A good row with one to three things wrong: in its values, its keys or its bytes."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(row)))
        if not path:
            row = rng.choice(ODD) if rng.random() < 0.05 else row
            continue
        holder = row
        for key in path[:-1]:
            holder = holder[key]
        how = rng.random()
        if how < 0.5:
            holder[path[-1]] = copy.deepcopy(rng.choice(ODD))
        elif how < 0.7:
            del holder[path[-1]]
        elif how < 0.8 and isinstance(holder, dict):
            holder[rng.choice(["", "prompt", "chosen", "labels", "\0", "messages", "completion"])] = holder.pop(path[-1])
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([*holder, *ODD])))
        if not isinstance(row, (dict, list)) or not row:
            break
    line = json.dumps(row, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:  # broken bytes
        at = rng.randrange(len(line) + 1)
        line = rng.choice([line[:at], line[:at] + bytes([rng.randrange(256)]) + line[at + 1:], line[at:], line + b"}"])
    return line.replace(b"\n", b" ")


def is_right(e: data.Example, tokenizer, room: int):
    """What can be said of any example: something is scored, lengths agree, ids are known, and it fits."""
    known = tokenizer.fast.get_vocab_size()
    assert len(e.prompt) and e.prompt.dtype == np.int32 and len(e.responses) == len(e.scored) == len(e.demonstrated)
    for ids, scored in zip(e.responses, e.scored):
        assert len(ids) == len(scored) and scored.any() and scored.dtype == bool and 0 <= ids.min() <= ids.max() < known
        assert len(e.prompt) + len(ids) <= room
    assert len(e.chosen) == len(e.margin) == len(e.rejected) or not e.margin
    assert all(0 <= i < len(e.responses) for i in (*e.chosen, *e.rejected)) and np.isfinite(e.margin).all()
    for labels, scored in zip(e.labels, e.scored):
        assert len(labels) == len(scored) and not (~np.isnan(labels) & ~scored).any()
        assert ((labels[~np.isnan(labels)] >= 0) & (labels[~np.isnan(labels)] <= 1)).all()


@pytest.mark.parametrize("kind", GOOD)
def test_ten_thousand_spoiled_rows(kind, tokenizer, tmp_path):
    """2,000 of each kind, between two good ones: an example, or an error that begins with file and line; skipped on demand."""
    rng, file, cfg = random.Random(kind), tmp_path / "rows.jsonl", config.Config(max_length=600, cache_dir=str(tmp_path), max_new_tokens=8)
    good, skip, read = [json.dumps(row).encode() for row in GOOD[kind]], config.Config(**{**vars(cfg), "bad_rows": "skip"}), 0
    for nth in range(2000):
        line = mutated(rng.choice(GOOD[kind]), rng)
        file.write_bytes(b"\n".join([good[0], line, good[-1]]) + b"\n")
        try:
            dataset = data.load(str(file), kind, tokenizer, cfg, False)
        except ValueError as error:
            assert str(error).startswith(f"{file}:2: "), (nth, line, error)
            assert len(str(error)) < 600 and "\n" not in str(error), (nth, line, error)
            dataset = data.load(str(file), kind, tokenizer, skip, False)
            assert dataset.counts["bad"] == 1 and len(dataset) == 2, (nth, line)
        else:
            read += 1
        for e in dataset.examples:
            is_right(e, tokenizer, 600)
    assert 100 < read < 1900  # both happen


@pytest.mark.parametrize("kind", GOOD)
def test_good_rows_are_good(kind, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD[kind]))
    dataset = data.load(str(tmp_path / "rows.jsonl"), kind, tokenizer, config.Config(cache_dir=str(tmp_path)), False)
    assert len(dataset) == len(GOOD[kind]) and dataset.counts["truncated"] == 0
    for e in dataset.examples:
        is_right(e, tokenizer, 1024)


@pytest.mark.parametrize("text", ["plain", "a\0b", "é 🙂 \u202e\u0301", "<|end|> inside", " lead", "trail \n", "x" * 300])
def test_what_is_trained_is_the_text_of_the_response(text, tokenizer, tmp_path):
    """...and nothing else, to the byte, for text and for messages."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt": text, "completion": text}, {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]})))
    for e in data.load(str(tmp_path / "rows.jsonl"), "sft", tokenizer, config.Config(cache_dir=str(tmp_path)), False).examples:
        found = tokenizer.fast.decode(e.responses[0][e.scored[0]].tolist(), skip_special_tokens=False)
        assert found.removesuffix("<|end|>") == text


# ---------------------------------------------------------------------------------------------------------------------
# Configs, model folders, checkpoints


def refused(act, *named) -> bool:
    """act() goes well, or is refused in one short sentence with one of these names in it."""
    try:
        act()
    except ValueError as error:
        assert any(str(name) in str(error) for name in named) and len(str(error)) < 800, error
        return True
    return False


def test_spoiled_config_files(tmp_path):
    """A file that is no Python, or assigns what a key does not take: an error that names the file, and the key."""
    rng, keys, refusals = random.Random(0), [*vars(config.Config()), "beta", "betaa", "import os", "def reward"], 0
    for nth in range(600):
        chosen = [(rng.choice(keys), rng.choice([*ODD, [], ("a",), "dpo", {"dpo": 1.0}, "scratch", -3, 0.5])) for _ in range(rng.randint(1, 3))]
        text = "".join(f"{key} = {value!r}\n" for key, value in chosen).replace("inf", "float('inf')").replace("nan", "float('nan')")
        if rng.random() < 0.2:
            text = text[:rng.randrange(len(text))]
        (tmp_path / "spoiled.py").write_text(text, errors="surrogatepass")
        refusals += refused(lambda: config.load(["--config", str(tmp_path / "spoiled.py"), "--train_data=rows.jsonl", "--init_from=here"]),
                            *(key for key, _ in chosen), "spoiled.py", "objective", "reward")
    assert 300 < refusals < 600


def test_spoiled_command_lines():
    rng, keys, refusals = random.Random(0), [*vars(config.Config()), "beta", "betaa", "", "-", "config"], 0
    for nth in range(600):
        key, value = rng.choice(keys), rng.choice(["", "1", "-1", "nan", "inf", "1e400", "[", "{'a': 1}", "None", "x", "__import__('os').getcwd()", "\0", "9" * 5000])
        refusals += refused(lambda: config.load([f"--{key}={value}", "--train_data=rows.jsonl"]), key, value[:20], "config", "objective")
    assert 200 < refusals < 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save(tiny("llama"), path, torch.float32, ROOT / "tasks/arithmetic")
    return path


def test_spoiled_model_configs(folder, tmp_path):
    rng, good, refusals = random.Random(0), json.loads((folder / "config.json").read_text()), 0
    shutil.copytree(folder, tmp_path / "m")
    for nth in range(500):
        spoiled = copy.deepcopy(good)
        for path in rng.sample([p for p in places(good) if p], rng.randint(1, 2)):
            holder = spoiled
            for key in path[:-1]:
                holder = holder[key] if isinstance(holder, dict) and key in holder else {}
            if rng.random() < 0.3 and isinstance(holder, dict) and path[-1] in holder:
                del holder[path[-1]]
            elif isinstance(holder, dict):
                holder[path[-1]] = rng.choice([v for v in ODD if v != 10**30] + [7, 96, 98, "llama", "gpt2", "qwen3", 64.5])
        text = json.dumps(spoiled)
        (tmp_path / "m/config.json").write_text(text[:rng.randrange(len(text))] if rng.random() < 0.1 else text)
        refusals += refused(lambda: model.load(tmp_path / "m"), tmp_path / "m")
    assert 100 < refusals < 500


def test_spoiled_weights(folder, tmp_path):
    """Truncated files, flipped bytes, missing and additional tensors, wrong shapes and dtypes, missing shards, a pickle."""
    rng, raw, good = random.Random(0), (folder / "model.safetensors").read_bytes(), load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "m")
    file, index, names = tmp_path / "m/model.safetensors", tmp_path / "m/model.safetensors.index.json", sorted(good)
    head = 8 + int.from_bytes(raw[:8], "little")
    for nth in range(300):
        at = rng.randrange(head)
        file.write_bytes(raw[:rng.randrange(len(raw))] if nth % 2 else raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1:])
        refused(lambda: model.load(tmp_path / "m"), tmp_path / "m")
    name = lambda: rng.choice(names)
    for spoil in (lambda s: s.pop(name()), lambda s: s.update(more=torch.zeros(1)), lambda s: s.update({name(): torch.zeros(3)}),
                  lambda s: s.update({name(): torch.zeros(0, 7)}), lambda s: s.update({"model.norm.weight": torch.zeros(32, dtype=torch.int64)}),
                  lambda s: s.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(56, 32)})):
        state = dict(good)
        spoil(state)
        save_file(state, file)
        assert refused(lambda: model.load(tmp_path / "m"), tmp_path / "m")
    file.write_bytes(raw)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}),
                 json.dumps({"weight_map": dict.fromkeys(names, "../../etc/passwd")})):
        file.rename(tmp_path / "m/aside")
        index.write_text(text)
        assert refused(lambda: model.load(tmp_path / "m"), tmp_path / "m"), text
        index.unlink()
        (tmp_path / "m/aside").rename(file)


def test_spoiled_checkpoints(tmp_path, monkeypatch):
    """Truncated or of another run: an error that names the file and what to do; the run's files stay as they were."""
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "dpo", max_steps=2, save_every=2)))
    newest, rng = tmp_path / "run/checkpoint-2", random.Random(0)
    go_on = lambda **more: train.train(config.load([*options(tmp_path, "dpo", **{"max_steps": 3, "save_every": 2, **more}), "--resume"]))
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        raw = (newest / file).read_bytes()
        for spoiled in (b"", raw[:5], raw[:len(raw) // 2], raw[:-1] if file != "state.json" else b"[]", b"{}", None):
            if spoiled is None:
                (newest / file).unlink()
            else:
                (newest / file).write_bytes(spoiled)
            with pytest.raises(ValueError, match=f"checkpoint-2/{file}.*(remove the folder|another --out_dir)"):
                go_on()
        (newest / file).write_bytes(raw)
    with pytest.raises(ValueError, match="checkpoint-2/model.safetensors.*another --out_dir"):
        go_on(scratch={**json.loads(json.dumps(config.load(options(tmp_path, "dpo")).scratch)), "hidden_size": 64})
    go_on()
    assert (tmp_path / "run/model/model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Files from strangers


def test_no_pickle_and_no_shell():
    """What could run a stranger's code is not there: no pickle in a file, no shell, no remote code. (Ranks of one run pickle what they tell
    each other.)"""
    modules, calls, switches = {"pickle", "marshal", "shelve", "dill"}, {"eval", "exec", "system", "popen"}, {"shell", "allow_pickle", "trust_remote_code"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("parts/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not modules & {alias.name.split(".")[0] for alias in node.names} | modules & {getattr(node, "module", "")}, file
            if isinstance(node, ast.Call):
                name, of = getattr(node.func, "id", getattr(node.func, "attr", "")), getattr(getattr(node.func, "value", None), "id", "")
                assert name not in calls and (of, name) not in {("torch", "load"), ("torch", "save")}, (file, node.lineno)
                assert not any(k.arg in switches and getattr(k.value, "value", True) for k in node.keywords), (file, node.lineno)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["BOMB"],)


def test_a_malicious_file_does_nothing(folder, tmp_path, monkeypatch):
    """A pickle by any name that a model folder or a checkpoint may have, and paths with a shell's words in them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BOMB", str(tmp_path / "fired"))
    shutil.copytree(folder, tmp_path / "m")
    torch.save(Bomb(), tmp_path / "bomb")
    (tmp_path / "m" / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
        shutil.copy(tmp_path / "bomb", tmp_path / "m" / name)
        assert refused(lambda: model.load(tmp_path / "m"), tmp_path / "m")
        (tmp_path / "m" / name).unlink()
    spoken = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "m/config.json").write_text(json.dumps(spoken))
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'fired')!r}, 'w')")
    shutil.copy(folder / "model.safetensors", tmp_path / "m")
    model.load(tmp_path / "m")
    train.train(config.load(options(tmp_path, "dpo", max_steps=2, save_every=2)))
    shutil.copy(tmp_path / "bomb", tmp_path / "run/checkpoint-2/optimizer.safetensors")
    with pytest.raises(ValueError, match="checkpoint-2"):
        train.train(config.load([*options(tmp_path, "dpo", max_steps=3), "--resume"]))
    for path in (f"$(touch {tmp_path}/fired)", f"`touch {tmp_path}/fired`", f"x; touch {tmp_path}/fired", f"| touch {tmp_path}/fired"):
        for key in ("train_data", "init_from", "tokenizer", "reference"):
            with pytest.raises(ValueError):
                train.train(config.load(options(tmp_path, "dpo", "other", **{"init_from": tmp_path / "m", "tokenizer": "", "scratch": None, key: path})))
    assert not (tmp_path / "fired").exists()


ESCAPES = ["{{ ().__class__.__base__.__subclasses__() }}", "{{ messages.__class__ }}", "{{ lipsum.__globals__['os'].popen('id') }}", "{{ self.__init__.__globals__ }}",
           "{{ namespace.__init__.__globals__ }}", "{{ messages|attr('__class__') }}", "{{ '%c' % 95 ~ messages|attr('__cla' ~ 'ss__') }}", "{{ joiner.__init__ }}",
           "{{ ''['__class__'] }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['json'] }}", "{% include '/etc/passwd' %}",
           "{% import 'os' as os %}", "{{ messages.append(1) }}", "{{ '{0.__class__}'.format(messages) }}", "{{ messages|map(attribute='__class__')|list }}",
           "{% for _ in range(10**9) %}{% endfor %}"]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_reach_nothing(source, tokenizer):
    """An error, or nothing of Python's insides in the text."""
    try:
        made = tokens.compile_template(source).render(messages=[USER], add_generation_prompt=True, eos_token="</s>")
    except Exception as error:
        assert type(error).__name__ in ("SecurityError", "UndefinedError", "TypeError", "TemplateNotFound", "OverflowError", "TemplateRuntimeError"), repr(error)
    else:
        assert not any(word in made for word in ("<class", "<function", "uid=", "root:", "module", "built-in")), made
