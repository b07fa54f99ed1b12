"""Rows become the right text, text the right ids, masks follow positions, and steps use every row once."""
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import config
import data
from conftest import ROOT, as_dataset, layout, random_trees
from parts import formats, tokens

ARITHMETIC = ROOT / "tasks" / "arithmetic"  # a token per character of 0-9 + = and newline; BOS is not added by itself
S, U, A = (lambda text, role=role: {"role": role, "content": text} for role in ("system", "user", "assistant"))
LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
          "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")  # no generation prompt
PLAIN = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # does not close the turn
REFUSING = "{% for m in messages %}{{ raise_exception('no') if m.content == 'refuse' else m.content }}{% endfor %}"


def write(path, rows):
    """Rows as JSONL or a JSON array, .gz of either; bytes as they are."""
    text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(r) + "\n" for r in rows)
    raw = rows if isinstance(rows, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def load(paths, tokenizer, kind="sft", train=True, **keys):
    cfg = config.load([f"--{key}={value}" for key, value in {"max_length": 100_000, **keys}.items()])
    return data.load(paths, kind, tokenizer, cfg, False, train)


def one(tmp_path, row, tokenizer, kind="sft", **keys):
    """The one example of a row, and the counts."""
    dataset = load(write(tmp_path / "row.jsonl", [row]), tokenizer, kind, **keys)
    return dataset.examples[0], dataset.counts


def text_of(tokenizer, ids):
    return tokenizer.fast.decode(list(ids), skip_special_tokens=False)


def tokens_of(tokenizer, ids):
    return [tokenizer.fast.id_to_token(int(i)) for i in ids]


def runs(tokenizer, ids, scored):
    """Text of each stretch of scored tokens."""
    return [text_of(tokenizer, [int(i) for i, _ in part])
            for is_scored, part in itertools.groupby(zip(ids, scored), key=lambda pair: bool(pair[1])) if is_scored]


def with_template(tmp_path, folder, source):
    (tmp_path / "template.jinja").write_text(source)
    return data.Tokenizer(folder, str(tmp_path / "template.jinja"))


def changed_tokenizer(folder, **changes):
    """The arithmetic tokenizer in another folder with another tokenizer_config.json; None removes a key."""
    folder.mkdir()
    shutil.copy(ARITHMETIC / "tokenizer.json", folder)
    given = {**json.loads((ARITHMETIC / "tokenizer_config.json").read_text()), **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    return data.Tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Formats: name -> kind, row, prompt and responses

FORMATS = {
    "text": ("sft", {"prompt": "Once upon", "completion": " a time"}, "Once upon", [" a time"]),
    "completion of messages": ("sft", {"prompt": [U("hi")], "completion": [A("yo")]}, [U("hi")], [[A("yo")]]),
    "text completion of messages": ("sft", {"prompt": [U("hi")], "completion": "yo"}, [U("hi")], [[A("yo")]]),
    "one message": ("sft", {"prompt": U("hi"), "completion": A("yo")}, [U("hi")], [[A("yo")]]),
    "messages": ("sft", {"messages": [S("be brief"), U("hi"), A("yo"), U("and"), A("so")]},
                 [S("be brief"), U("hi")], [[A("yo"), U("and"), A("so")]]),
    "last turn is the user's": ("sft", {"messages": [U("hi"), A("yo"), U("and")]}, [U("hi")], [[A("yo")]]),
    "system key": ("sft", {"messages": [U("hi"), A("yo")], "system": "be brief"}, [S("be brief"), U("hi")], [[A("yo")]]),
    "empty system key": ("sft", {"messages": [U("hi"), A("yo")], "system": None}, [U("hi")], [[A("yo")]]),
    "parts": ("sft", {"messages": [U([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
                                   A([{"type": "text", "value": "yo"}])]}, [U("hi")], [[A("yo")]]),
    "part without text": ("sft", {"messages": [U([{"type": "text", "text": None}, {"type": "text", "text": "hi"}]), A("yo")]},
                          [U("hi")], [[A("yo")]]),
    "sharegpt": ("sft", {"system": "be brief", "conversations": [
        {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}, {"from": "human", "value": "and"},
        {"from": "chatgpt", "value": "so"}]}, [S("be brief"), U("hi")], [[A("yo"), U("and"), A("so")]]),
    "sharegpt tools": ("sft", {"conversations": [
        {"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "f()"},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "yo"}]},
        [S("be brief"), U("hi")], [[A("f()"), {"role": "tool", "content": "3"}, A("yo")]]),
    "alpaca": ("sft", {"instruction": "Add.", "input": "1 2", "output": "3"}, [U("Add.\n1 2")], [[A("3")]]),
    "alpaca without input": ("sft", {"instruction": "Add.", "output": "3", "system": "be brief"},
                             [S("be brief"), U("Add.")], [[A("3")]]),
    "question": ("sft", {"question": "1+1?", "answer": "2"}, [U("1+1?")], [[A("2")]]),  # GSM8K
    "problem": ("sft", {"problem": "1+1?", "solution": "It is 2", "answer": "2"}, [U("1+1?")], [[A("It is 2")]]),  # NuminaMath
    "query": ("sft", {"query": "1+1?", "response": "2", "type": "sum"}, [U("1+1?")], [[A("2")]]),  # MetaMathQA
    "instruction with a context": (  # Dolly
        "sft", {"instruction": "Add.", "context": "1 2", "response": "3"}, [U("Add.\n1 2")], [[A("3")]]),
    "problem without a solution": ("sft", {"problem": "1+1?", "solution": "", "answer": "2"}, [U("1+1?")], [[A("2")]]),
    "instruction that is laid out": ("sft", {"instruction": "Add.", "input": "1 2", "output": "3", "prompt": "Add.\n1 2\n3"},
                                     [U("Add.\n1 2")], [[A("3")]]),
    "instruction beside an empty prompt": ("sft", {"prompt": "", "instruction": "Add.", "output": "3"}, [U("Add.")], [[A("3")]]),
    "history": ("sft", {"instruction": "and", "output": "so", "history": [["hi", "yo"]]}, [U("hi"), A("yo"), U("and")], [[A("so")]]),
    "system prompt": ("sft", {"system_prompt": "be brief", "question": "hi", "response": "yo"},  # OpenOrca
                      [S("be brief"), U("hi")], [[A("yo")]]),
    "system key beside text": ("sft", {"system": "be brief", "prompt": "hi", "completion": "yo"}, [S("be brief"), U("hi")], [[A("yo")]]),
    "system key beside a system's turn": ("sft", {"system": "be brief", "messages": [S("be long"), U("hi"), A("yo")]},
                                          [S("be long"), U("hi")], [[A("yo")]]),
    "text beside a question": ("sft", {"question": "1+1?", "answer": "2", "text": "1+1? 2"}, "", ["1+1? 2"]),
    "whole text": ("sft", {"text": "Once upon a time"}, "", ["Once upon a time"]),
    "chosen side": ("sft", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ["2"]),
    "pair": ("preference", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ["2", "3"]),
    "pair of messages": ("preference", {"prompt": [U("hi")], "chosen": [A("yo")], "rejected": [A("no")]},
                         [U("hi")], [[A("yo")], [A("no")]]),
    "text pair of messages": ("preference", {"prompt": [U("hi")], "chosen": "yo", "rejected": "no", "system": "be brief"},
                              [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations": ("preference", {"prompt": "hi", "chosen": [U("hi"), A("yo")], "rejected": [U("hi"), A("no")]},
                              [U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations, system key": (
        "preference", {"prompt": "hi", "system": "be brief", "chosen": [U("hi"), A("yo")], "rejected": [U("hi"), A("no")]},
        [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "implicit prompt": ("preference", {"chosen": "Sky?\nIt is blue", "rejected": "Sky?\nit is red"},
                        "Sky?\n", ["It is blue", "it is red"]),
    "implicit prompt of words": ("preference", {"chosen": "The sky is blue", "rejected": "The sky is bland"},
                                 "The sky is", [" blue", " bland"]),
    "implicit prompt of messages": (
        "preference", {"chosen": [U("hi"), A("yo"), U("and"), A("so")], "rejected": [U("hi"), A("yo"), U("and"), A("no")]},
        [U("hi"), A("yo"), U("and")], [[A("so")], [A("no")]]),
    "equal conversations": ("preference", {"chosen": [U("hi"), A("yo")], "rejected": [U("hi"), A("yo")]},
                            [U("hi")], [[A("yo")], [A("yo")]]),
    "hh": ("preference", {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: yes"},
           "\n\nHuman: hi\n\nAssistant:", [" yo", " yes"]),
    "hh, several turns": (
        "preference", {"chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant: so",
                       "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant: no"},
        "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant:", [" so", " no"]),
    "sharegpt pair": ("preference", {"conversations": [{"from": "human", "value": "hi"}], 
                                     "chosen": {"from": "gpt", "value": "yo"}, "rejected": {"from": "gpt", "value": "no"}},
                     [U("hi")], [[A("yo")], [A("no")]]),
    "pair with a question": ("preference", {"system": "be brief", "question": "hi", "chosen": "yo", "rejected": "no"},  # Orca
                             [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "pair with an instruction": ("preference", {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"},
                                 [U("Add.\n1 2")], [[A("3")], [A("4")]]),
    "pair with an input": ("preference", {"system": "", "input": "hi", "chosen": "yo", "rejected": "no"},
                           [U("hi")], [[A("yo")], [A("no")]]),
    "pair of text, system key": ("preference", {"system": "be brief", "prompt": "hi", "chosen": "yo", "rejected": "no"},  # truthy-dpo
                                 [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations with a system": ("preference", {
        "prompt": "hi", "chosen": [S("be brief"), U("hi"), A("yo")], "rejected": [S("be brief"), U("hi"), A("no")]},
        [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations, prompt with a system": ("preference", {
        "prompt": [S("be brief"), U("hi")], "chosen": [U("hi"), A("yo")], "rejected": [U("hi"), A("no")]},
        [S("be brief"), U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations, last turn as prompt": ("preference", {
        "prompt": "and ", "chosen": [U("hi"), A("yo"), U("and"), A("so")], "rejected": [U("hi"), A("yo"), U("and"), A("no")]},
        [U("hi"), A("yo"), U("and")], [[A("so")], [A("no")]]),
    "pair of conversations that repeat the end of their prompt": ("preference", {
        "prompt": [U("hi"), A("yo"), U("and")], "chosen": [U("and"), A("so")], "rejected": [U("and"), A("no")]},
        [U("hi"), A("yo"), U("and")], [[A("so")], [A("no")]]),
    "hh, system key": ("preference", {"system": "be brief", "chosen": "\n\nHuman: hi\n\nAssistant: yo",
                                      "rejected": "\n\nHuman: hi\n\nAssistant: yes"},
                       "be brief\n\n\n\nHuman: hi\n\nAssistant:", [" yo", " yes"]),
    "hh beside a question": ("preference", {"question": "hi", "chosen": "\n\nHuman: hi\n\nAssistant: yo",
                                            "rejected": "\n\nHuman: hi\n\nAssistant: yes"},
                             "\n\nHuman: hi\n\nAssistant:", [" yo", " yes"]),
    "pair beside responses": ("preference", {"question": "hi", "chosen": "yo", "rejected": "no", "responses": ["no", "yo"]},
                              [U("hi")], [[A("yo")], [A("no")]]),
    "pair of conversations with a question": (
        "preference", {"question": "hi", "chosen": [U("hi"), A("yo")], "rejected": [U("hi"), A("no")]},
        [U("hi")], [[A("yo")], [A("no")]]),
    "pair without a prompt": ("preference", {"prompt": "", "id": "a", "chosen": "yo", "rejected": "no"}, "", ["yo", "no"]),
    "prompt": ("prompts", {"prompt": "1+1=", "answer": "2"}, "1+1=", []),
    "prompt of messages": ("prompts", {"prompt": [U("hi")]}, [U("hi")], []),
    "prompt with a system key": ("prompts", {"system": "be brief", "problem": "1+1?", "answer": "2"}, [S("be brief"), U("1+1?")], []),
    "history of another kind": ("prompts", {"question": "hi", "history": "WW2"}, [U("hi")], []),
    "conversation beside an empty prompt": ("prompts", {"prompt": "", "messages": [U("hi"), A("yo")]}, [U("hi")], []),
    "question beside a conversation": ("prompts", {"problem": "hi", "messages": [U("hi"), A("yo")]}, [U("hi")], []),
    "prompt of a conversation": ("prompts", {"messages": [U("hi"), A("yo"), U("and"), A("so")]}, [U("hi"), A("yo"), U("and")], []),
}
each_format = pytest.mark.parametrize("kind, row, prompt, responses", FORMATS.values(), ids=FORMATS)


@each_format
def test_formats(kind, row, prompt, responses):
    pairs = ([0], [1], [0.0]) if kind == "preference" else ([], [], [])
    draft = data.FORMATS[kind](row, data.TRAIN_ON[kind], True)
    assert draft == data.Draft(prompt, responses, [True, False][:len(responses)], *pairs)


@each_format
@pytest.mark.parametrize("mode", ["joint", "apart"])
def test_formats_as_ids(kind, row, prompt, responses, mode, chat, tmp_path):
    """The ids say what the row says, and the scored ones are the assistant's words, each turn with its end."""
    def chatml(messages):
        own = S("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
        messages = messages if messages[0]["role"] == "system" else [own, *messages]
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)

    tokenizer = data.Tokenizer(chat)
    example, _ = one(tmp_path, row, tokenizer, kind, train=False, tokenize=mode)
    asked = prompt or "<|im_start|>" if isinstance(prompt, str) else chatml(prompt) + "<|im_start|>assistant\n"
    assert text_of(tokenizer, example.prompt) == asked
    assert example.row == ({**row, "prompt": prompt} if kind == "prompts" else None)
    for ids, scored, response in zip(example.responses, example.scored, responses, strict=True):
        messages = [A(response)] if isinstance(response, str) else response
        assert runs(tokenizer, ids, scored) == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        whole = asked + response + "<|im_end|>\n" if isinstance(response, str) else chatml(prompt + response)
        assert text_of(tokenizer, [*example.prompt, *ids]) + "\n" == whole


@pytest.mark.parametrize("given, prompt", [
    ("", "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
         "### Instruction:\nAdd.\n\n### Response:\n"),
    ("1 2", "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
            "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")])
def test_alpaca_without_a_template(given, prompt, each_pieces, tmp_path):
    row, tokenizer = {"instruction": "Add.", "input": given, "output": "3"}, data.Tokenizer(each_pieces)
    assert formats.sft_row(row, "all", False) == data.Draft(prompt, ["3"], [True])
    example, _ = one(tmp_path, row, tokenizer)
    assert text_of(tokenizer, [*example.prompt, *example.responses[0]]) == "<s> " + prompt + "3</s>"


@pytest.mark.parametrize("kind, row, prompt", [
    ("preference", {"system": "be brief", "question": "hi", "chosen": "yo", "rejected": "no"}, "be brief\n\nhi\n"),
    ("sft", {"query": "Add.", "response": "3"}, "Add.\n"), ("prompts", {"problem": "1+1?"}, "1+1?\n")])
def test_questions_without_a_template(kind, row, prompt):
    assert data.FORMATS[kind](row, "last", False).prompt == prompt


@pytest.mark.parametrize("post, chosen, rejected", [("hi", "yo", "no"), ("hi", [A("yo")], [A("no")]), ([U("hi")], "yo", "no")])
def test_a_pair_does_not_lose_a_prompt_of_an_unknown_name(post, chosen, rejected):
    with pytest.raises(ValueError, match="no column is known as the prompt; found keys .*'post'.*; rename that column to 'prompt'"):
        formats.preference_row({"post": post, "chosen": chosen, "rejected": rejected}, "last", True)


@pytest.mark.parametrize("row", [
    {"prompt": "hi", "chosen": [S("be brief"), U("hi"), A("yo")], "rejected": [U("hi"), A("no")]},
    {"prompt": "hi", "chosen": [U("hi"), A("yo")], "rejected": [U("Hi"), A("no")]},
    {"prompt": "hi", "chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "no"}])
def test_a_prompt_is_not_there_twice(row):
    with pytest.raises(ValueError, match="begin differently"):
        formats.preference_row(row, "last", True)


@pytest.mark.parametrize("history", [["hi", "yo"], [["hi", None]], [{"role": "user", "content": "hi"}], [["hi"]], "hi"])
def test_a_history_is_questions_with_answers(history):
    with pytest.raises(ValueError, match="'history' should be a list of"):
        formats.sft_row({"instruction": "and", "output": "so", "history": history}, "all", True)


def test_a_pair_may_go_on_behind_its_prompt():
    row = {"prompt": [U("hi"), A("yo")], "chosen": [U("and"), A("so")], "rejected": [U("and"), A("no")]}
    assert formats.preference_row(row, "last", True)[:2] == ([U("hi"), A("yo"), U("and")], [[A("so")], [A("no")]])


def test_what_is_not_read_is_said(tmp_path, capsys):
    rows = [{"id": 1, "prompt": "1", "completion": "2", "tools": None}, {"post": "hi", "question": "1", "answer": "2"}]
    tokenizer = data.Tokenizer(ARITHMETIC)
    read = lambda file, kind: data.load(file, kind, tokenizer, config.load(["--max_length=99"]))
    assert len(read(write(tmp_path / "rows.jsonl", rows), "sft")) == 2 and capsys.readouterr().err.endswith("rows.jsonl: columns that are not read: id, post\n")
    file = write(tmp_path / "all.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3", "margin": 1.0}])
    for objective, lost in (("rm", False), ("dpo", True), ("{'dpo': 1.0, 'rm_hinge': 1.0}", False)):
        data.load(file, "preference", tokenizer, config.load([f"--objective={objective}"]))
        assert ("columns that are not read: margin" in capsys.readouterr().err) == lost
    read([str(write(tmp_path / "steps.jsonl", [{"prompt": "1", "completions": ["2"], "labels": [True], "task": "sum"}]))], "prm")
    assert capsys.readouterr().err.endswith("steps.jsonl: columns that are not read: task\n")


@pytest.mark.parametrize("name, hint", [("rows.csv", "; expected .jsonl or .json; bad_rows"), ("rows.jsonl", "; bad_rows")])
def test_files_that_are_no_json_are_named(name, hint, tmp_path):
    (tmp_path / name).write_text("prompt,completion\n1,2\n")
    with pytest.raises(ValueError, match=f"{name}:1: not JSON: Expecting value at character 0{hint}"):
        data.load(str(tmp_path / name), "sft", data.Tokenizer(ARITHMETIC), config.load([]))


def test_nulls_are_columns_that_are_not_there(tmp_path):
    rows = [{"prompt": None, "completion": None, "chosen": None, "messages": [U("1"), A("2")]},
            {"prompt": None, "question": "1", "answer": "2", "text": None, "system": None}]
    assert len(load(write(tmp_path / "rows.jsonl", rows), with_template(tmp_path, ARITHMETIC, REFUSING))) == 2


@pytest.mark.parametrize("a, b", [
    ("The sky is blue", "The sky is blue today"), ("x y", "x z"), ("x", "x"), ("", "x"), ("a\nb", "a\nc")])
def test_an_implicit_prompt_does_not_depend_on_which_side_is_chosen(a, b):
    assert formats.shared_prompt(a, b) == formats.shared_prompt(b, a)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_containers(name, tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(3)]
    file = write(tmp_path / name, rows)
    dataset = load(file, data.Tokenizer(ARITHMETIC), "prompts")
    assert [e.row for e in dataset.examples] == rows
    assert [e.where for e in dataset.examples] == [f"{file}:{i + 1}" if "jsonl" in name else f"{file}[{i}]" for i in range(3)]


def test_a_glob_reaches_into_folders(tmp_path):
    for folder in ("a", "a/b", "a/b/c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("{}\n")
    assert len(data.files_of(f"{tmp_path}/a/**/*.jsonl")) == 3 and len(data.files_of(f"{tmp_path}/a/*.jsonl")) == 1


def test_several_files_globs_and_blank_lines(tmp_path):
    write(tmp_path / "b.jsonl", b'\n{"prompt": "2"}\n  \r\n{"prompt": "3"}')
    write(tmp_path / "a.jsonl.gz", [{"prompt": "1"}])
    write(tmp_path / "c.json", [{"prompt": "4"}])
    dataset = load([str(tmp_path / "c.json"), str(tmp_path / "*.jsonl*")], data.Tokenizer(ARITHMETIC), "prompts")
    assert [e.row["prompt"] for e in dataset.examples] == ["4", "1", "2", "3"]
    where = [e.where.removeprefix(f"{tmp_path}/") for e in dataset.examples]
    assert where == ["c.json[0]", "a.jsonl.gz:1", "b.jsonl:2", "b.jsonl:4"]


def test_rows_stay_with_their_examples(tmp_path):
    """More rows than are tokenized at once."""
    tokenizer = data.Tokenizer(ARITHMETIC)
    dataset = load(write(tmp_path / "a.jsonl", [{"prompt": f"{i}="} for i in range(2500)]), tokenizer, "prompts")
    assert [e.row["prompt"] for e in dataset.examples] == [text_of(tokenizer, e.prompt) for e in dataset.examples] == [
        f"{i}=" for i in range(2500)]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and templates


@pytest.mark.parametrize("train_on, trained", [("", ["a<|im_end|>", "b<|im_end|>"]), ("all", ["a<|im_end|>", "b<|im_end|>"]),
                                               ("last", ["b<|im_end|>"])])
def test_train_on(train_on, trained, each_chat, tmp_path):
    """The user's <|im_end|>, which is EOS and pad as well, is not trained; nor is what only the prompt holds."""
    tokenizer, row = data.Tokenizer(each_chat), {"messages": [U("q"), A("a"), U("r"), A("b"), U("s")]}
    example, _ = one(tmp_path, row, tokenizer, train_on=train_on)
    assert runs(tokenizer, example.responses[0], example.scored[0]) == trained
    assert (example.responses[0][~example.scored[0]] == tokenizer.eos).sum() == len(trained) - 1


def test_text_with_eos_in_the_prompt(each_chat, tmp_path):
    tokenizer = data.Tokenizer(each_chat)
    row = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "a <|im_end|> b"}
    example, _ = one(tmp_path, row, tokenizer)
    assert text_of(tokenizer, example.prompt) == row["prompt"] and example.scored[0].all()
    assert text_of(tokenizer, example.responses[0]) == "a <|im_end|> b<|im_end|>"


CHATS = [[U("hi"), A("yo")], [S("be brief"), U("1+1?"), A("2"), U("and 2+2?"), A("It is 4."), U("so")],
         [U("a\n\nb "), A(" yes\n"), U("\u00e9 <|im_sta"), A("12 \U0001f600"), U("x"), A("no, it is red.")], [S(""), U("Add the numbers."), A("3\n\n4")]]


def check_chats(rows, key, folder, mode, tmp_path):
    """Each conversation's ids are those of transformers, and what the assistant says is trained, each turn with its end."""
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), data.Tokenizer(folder)
    dataset = load(write(tmp_path / "rows.jsonl", rows), tokenizer, tokenize=mode)
    assert len(dataset) == len(rows) and dataset.counts["apart"] == 0
    newline = tokenizer.fast.encode("\n").ids
    for row, example in zip(rows, dataset.examples, strict=True):
        messages = formats.messages_field(row, key)
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        expected = theirs.apply_chat_template(messages[:last + 1], return_dict=False)
        assert [*example.prompt, *example.responses[0], *newline] == expected
        assert runs(tokenizer, example.responses[0], example.scored[0]) == [turn + "<|im_end|>" for turn in turns]


@pytest.mark.parametrize("mode", ["joint", "apart"])
def test_chats_are_what_transformers_renders(mode, chat, tmp_path):
    check_chats([{"messages": messages} for messages in CHATS], "messages", chat, mode, tmp_path)


def test_real_chats_are_what_transformers_renders(real, smollm2, tmp_path):
    """Of the pairs, the conversations before them that have an assistant's turn."""
    for file, mode in itertools.product(("sft/v1-sft-demo.jsonl", "preference/sharegpt-dpo-en.json"), ("joint", "apart")):
        text = (real / file).read_text()
        rows = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
        key = next(iter(rows[0]))
        rows = [{key: row[key]} for row in rows if any(m.get("role", m.get("from")) in ("assistant", "gpt") for m in row[key])]
        assert len(rows) > 100
        check_chats(rows, key, smollm2, mode, tmp_path)


@pytest.mark.parametrize("source", [
    tokens.CHATML,
    LLAMA2,
    "{{ bos_token }}{% for m in messages %}\n    {% if loop.first %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "{{ strftime_now('%Y') }}",
    "{% for m in messages %}\n{%- generation %}\n{% set role = m.role %}{{ role }}\n{% endgeneration -%}\n{{ role }}|{% endfor %}",
    "{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{% if tools is not none %}{{ 'tools' }}{% endif %}{{ messages[0]['content'] }}"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(source, add_generation_prompt, pieces, tmp_path):
    transformers = pytest.importorskip("transformers")
    messages = [U("é < 'a'"), A("yo")]
    expected = transformers.AutoTokenizer.from_pretrained(pieces).apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert with_template(tmp_path, pieces, source).render(messages, add_generation_prompt) == expected


CALLING = (  # a template that knows of functions
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "é <int>"}}}


def called(arguments, **more):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": arguments}}], **more}


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_of_functions_are_trained(as_text, chat, tmp_path):
    """What an assistant thinks and calls is the template's to write, with arguments as an object and as JSON text, and `tools`
    in both forms as well; what the function said is not trained."""
    arguments, tools = {"a": 2, "b": "é"}, [ADD]
    if as_text:
        arguments, tools = json.dumps(arguments), json.dumps(tools)
    messages = [U("2+2?"), called(arguments, reasoning="hm"), {"role": "tool", "tool_call_id": "1", "content": "4"}, A("It is 4.")]
    tokenizer = with_template(tmp_path, chat, CALLING)
    example, _ = one(tmp_path, {"messages": messages, "tools": tools}, tokenizer)
    assert text_of(tokenizer, example.prompt) == f"<tools>{json.dumps(ADD, ensure_ascii=False)}</tools><user>2+2?<|im_end|><assistant>"
    assert runs(tokenizer, example.responses[0], example.scored[0]) == ['(hm)add{"a": 2, "b": "é"}<|im_end|>', "It is 4.<|im_end|>"]
    pair = {"prompt": messages[:1], "chosen": messages[1:2], "rejected": [A("5")], "tools": tools}
    example, _ = one(tmp_path, pair, tokenizer, "preference")
    assert [text_of(tokenizer, ids) for ids in example.responses] == ['(hm)add{"a": 2, "b": "é"}<|im_end|>', "5<|im_end|>"]
    sharegpt = {"conversations": [{"from": "human", "value": "2+2?"}, {
        "from": "function_call", "value": json.dumps({"name": "add", "arguments": arguments})}], "tools": tools}
    example, _ = one(tmp_path, sharegpt, tokenizer)
    assert text_of(tokenizer, example.responses[0]) == 'add{"a": 2, "b": "é"}<|im_end|>'
    prompt, _ = one(tmp_path, {"prompt": messages[:3], "tools": tools}, tokenizer, "prompts")
    assert text_of(tokenizer, prompt.prompt).endswith("<tool>4<|im_end|><assistant>") and prompt.row["tools"] == tools


FORGETS = CALLING.replace("m.tool_calls or []", "m.no_tool_calls or []")
CUTS = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("source, m, said", [
    (REFUSING, called({}), "a message has tool_calls, which the template does not read"),
    (FORGETS, called({}), "the chat template leaves out the tool_calls of a turn that is trained"),
    (PLAIN, {**A("yo"), "reasoning_content": "hm"}, "the chat template leaves out the reasoning_content of a turn that is trained"),
    (CUTS, A("<think>hm</think>yo"), "the chat template leaves out the content of a turn that is trained")])
def test_what_a_trained_turn_says_is_not_lost(source, m, said, chat, tmp_path):
    tokenizer = with_template(tmp_path, chat, source)
    with pytest.raises(ValueError, match=f"row.jsonl:1: {said}.*; set chat_template"):
        one(tmp_path, {"messages": [U("1"), m]}, tokenizer)
    if m.get("content"):  # before it, it may be
        one(tmp_path, {"messages": [U("1"), m, U("2"), A("so")]}, tokenizer, train_on="last")


@pytest.mark.parametrize("given, said", [
    *(({"tool_calls": calls}, "'tool_calls' should be") for calls in ("{", "3", {"a": 1}, [1], [{"function": 1}], [{"function": {"arguments": {}}}])),
    *(({"tool_calls": [{"name": "f", "arguments": arguments}]}, "'(tool_calls|arguments)' should be") for arguments in ("{", "3", [1])),
    ({"function_call": "f(1)"}, "'function_call' should be JSON"), ({"reasoning": ["hm"]}, "'reasoning' should be a string")])
def test_calls_and_thoughts_that_are_none(given, said, tmp_path):
    with pytest.raises(ValueError, match=f"row.jsonl:1: {said}"):
        one(tmp_path, {"messages": [U("1"), {**A("2"), **given}]}, with_template(tmp_path, ARITHMETIC, CALLING))


@pytest.mark.parametrize("tools", ["{", "3", 3, True, ["add"], "\"add\"", [[ADD]]])
def test_functions_that_are_none(tools, tmp_path):
    with pytest.raises(ValueError, match=r"row.jsonl:1: 'tools' should be"):
        one(tmp_path, {"messages": [U("1"), A("2")], "tools": tools}, with_template(tmp_path, ARITHMETIC, CALLING))


@pytest.mark.parametrize("tools", [ADD, json.dumps(ADD), [ADD], json.dumps([ADD]), [json.dumps(ADD)]])
@pytest.mark.parametrize("m", [{"tool_calls": [{"name": "add"}]}, {"tool_calls": {"name": "add", "arguments": ""}},
                               {"function_call": {"name": "add", "arguments": "{}"}}, {"tool_calls": [{"function": {"name": "add"}, "id": "1"}]}])
def test_forms_of_functions_and_calls(tools, m, chat, tmp_path):
    tokenizer = with_template(tmp_path, chat, CALLING)
    example, _ = one(tmp_path, {"messages": [U("1"), {"role": "assistant", **m}], "tools": tools}, tokenizer)
    assert text_of(tokenizer, example.prompt).startswith(f"<tools>{json.dumps(ADD, ensure_ascii=False)}</tools>")
    assert text_of(tokenizer, example.responses[0]) == "add{}<|im_end|>"


def test_functions_that_a_template_does_not_know_are_said(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"messages": [U("1"), A("2")], "tools": [ADD], "answer": "2"}])
    for (source, lost), kind in itertools.product(((CALLING, False), (REFUSING, True)), ("sft", "prompts")):
        data.load(file, kind, with_template(tmp_path, ARITHMETIC, source), config.load(["--max_length=999"]))
        assert ("tools" in capsys.readouterr().err) == lost


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}"])
def test_a_template_stays_in_its_sandbox(source, tmp_path):
    tokenizer = with_template(tmp_path, ARITHMETIC, source)
    with pytest.raises(ValueError, match=r"row.jsonl:1: chat template: SecurityError"):
        one(tmp_path, {"messages": [U("1"), A("2")]}, tokenizer)


def with_marks(folder, **changes):
    """The arithmetic tokenizer with the marks of chatml, which are not its EOS."""
    made = changed_tokenizer(folder, **changes)
    made.fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.fast.save(str(folder / "tokenizer.json"))
    return data.Tokenizer(folder)


def test_what_ends_a_turn_ends_an_answer(tmp_path):
    """The mark that the template puts behind an assistant's turn, which is trained, or EOS where there is no such mark."""
    plain, marked = data.Tokenizer(ARITHMETIC, "chatml"), with_marks(tmp_path / "marks", chat_template=tokens.CHATML)
    mark = marked.fast.token_to_id("<|im_end|>")
    assert plain.stops == {plain.eos} and marked.stops == {marked.eos, mark} and mark != marked.eos
    for tokenizer, end in ((plain, plain.eos), (marked, mark)):
        example, _ = one(tmp_path, {"messages": [U("1"), A("2")]}, tokenizer)
        assert example.responses[0][-1] == end and example.scored[0][-1]
    silent = changed_tokenizer(tmp_path / "silent", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    strict = changed_tokenizer(tmp_path / "strict", chat_template="{{ raise_exception('a system message') }}")
    deaf = with_marks(tmp_path / "deaf", chat_template="<|im_start|>{{ messages[0]['content'] }}")
    assert silent.stops == strict.stops == deaf.stops == {plain.eos}


def test_where_a_template_comes_from(tmp_path):
    """The config's, else the folder's file, else the one in tokenizer_config.json, of several the default."""
    assert changed_tokenizer(tmp_path / "none").chat_template == ""
    assert changed_tokenizer(tmp_path / "one", chat_template="x").chat_template == "x"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert changed_tokenizer(tmp_path / "several", chat_template=named).chat_template == "y"
    (tmp_path / "one" / "chat_template.jinja").write_text("z")
    assert data.Tokenizer(tmp_path / "one").chat_template == "z"
    assert data.Tokenizer(with_marks(tmp_path / "marks").folder, "chatml").chat_template == tokens.CHATML
    eos_for_mark = tokens.CHATML.replace("'<|im_end|>'", "eos_token")
    assert data.Tokenizer(tmp_path / "one", "chatml").chat_template == eos_for_mark != tokens.CHATML
    assert data.Tokenizer(tmp_path / "one", str(tmp_path / "one" / "chat_template.jinja")).chat_template == "z"
    with pytest.raises(ValueError, match="'chatm' is neither 'chatml' nor a file"):
        data.Tokenizer(tmp_path / "one", "chatm")
    with pytest.raises(ValueError, match=r"row.jsonl:1: messages need a chat template.*chatml"):
        one(tmp_path, {"messages": [U("1"), A("2")]}, data.Tokenizer(ARITHMETIC))


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("answer, trained", [("5", ["5", "5<|im_end|>"]), ("yes", ["yes", " yes<|im_end|>"])])
def test_a_header_that_ends_in_a_space(answer, trained, trimmed, each_chat, tmp_path):
    """The space is trained only where it is one token with the answer, whether or not offsets count it (Llama 3: not)."""
    vocabulary = json.loads((each_chat / "tokenizer.json").read_text())
    if trimmed:
        vocabulary["post_processor"] = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    shutil.copy(each_chat / "tokenizer_config.json", tmp_path)
    tokenizer = with_template(tmp_path, tmp_path, PLAIN)
    example, _ = one(tmp_path, {"messages": [U("x"), A(answer)] * 2}, tokenizer)
    assert runs(tokenizer, example.responses[0], example.scored[0]) == trained


def test_a_header_that_ends_in_a_space_sentencepiece(pieces, tmp_path):
    tokenizer = with_template(tmp_path, pieces, PLAIN)
    example, _ = one(tmp_path, {"messages": [U("x"), A("yes")] * 2}, tokenizer)
    assert tokens_of(tokenizer, example.responses[0][example.scored[0]]) == ["yes", "▁yes", "</s>"]


@pytest.mark.parametrize("mode", ["joint", "apart"])
@pytest.mark.parametrize("messages", [[U("hi"), A("yo")], [A("yo"), U("hi"), A("yo")]])
def test_a_template_without_generation_prompt(messages, mode, each_chat, tmp_path):
    tokenizer = with_template(tmp_path, each_chat, LLAMA2)
    example, _ = one(tmp_path, {"messages": messages}, tokenizer, tokenize=mode)
    assert runs(tokenizer, example.responses[0], example.scored[0]) == [" yo<|im_end|>"] * (len(messages) - 1 or 1)
    first = [] if messages[0] == A("yo") else example.prompt  # else it is BOS, for want of a prompt
    whole = "".join("[INST] hi [/INST]" if m == U("hi") else " yo<|im_end|>" for m in messages)
    assert text_of(tokenizer, [*first, *example.responses[0]]) == whole


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    source = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '' }}={% endfor %}"
    tokenizer, row = with_template(tmp_path, ARITHMETIC, source), {"messages": [U("1"), A("2"), U("3"), A("4")]}
    dataset = load(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert [text_of(tokenizer, [*e.prompt, *e.responses[0]]) for e in dataset.examples] == ["1=2=<eos>", "1==3=4=<eos>"]
    pair = {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [A("5")]}
    with pytest.raises(ValueError, match=r"row.jsonl:1: .*train_on = 'last'"):
        one(tmp_path, pair, tokenizer, "preference", train_on="all")
    example, _ = one(tmp_path, row, tokenizer, train_on="last")
    assert text_of(tokenizer, [*example.prompt, *example.responses[0]]) == "1==3=4=<eos>"


# ---------------------------------------------------------------------------------------------------------------------
# BOS, EOS, joint and apart


@pytest.mark.parametrize("mode", ["joint", "apart"])
@pytest.mark.parametrize("row", [
    {"prompt": "Once upon", "completion": " a time"}, {"prompt": "<s>Once upon", "completion": " a time"},
    {"prompt": "", "completion": "Once"}, {"text": "Once upon a time"}, {"messages": [U("hi"), A("yo")]}])
def test_bos_once_and_first(row, mode, each_pieces, tmp_path):
    tokenizer = with_template(tmp_path, each_pieces, "{{ bos_token }}" + PLAIN)
    example, _ = one(tmp_path, row, tokenizer, tokenize=mode)
    ids = [*example.prompt, *example.responses[0]]
    assert ids[0] == tokenizer.bos and ids.count(tokenizer.bos) == 1


def test_a_template_without_bos_has_none(each_pieces, tmp_path):
    """Nothing is put before what a template writes, as in transformers."""
    tokenizer, messages = with_template(tmp_path, each_pieces, PLAIN), [U("hi"), A("yo")]
    example, _ = one(tmp_path, {"messages": messages}, tokenizer)
    assert example.prompt.tolist() == tokenizer.fast.encode("user: hi\nassistant: ", add_special_tokens=False).ids


@pytest.mark.parametrize("row, template", [
    ({"prompt": "1+1=", "completion": "2"}, ""), ({"prompt": "1+1=", "completion": "2<eos>"}, ""), ({"prompt": "1+1=", "completion": "2<eos>\n"}, ""), ({"text": "1+1=2"}, ""),
    ({"prompt": "1+1=", "completion": ""}, ""),
    ({"messages": [U("1"), A("2")]}, "{% for m in messages %}{{ m.content }}={% endfor %}"),
    ({"messages": [U("1"), A("2")]}, "{% for m in messages %}{{ m.content }}{{ eos_token if loop.index == 2 }}\n{% endfor %}")])
def test_eos_once_and_only_behind_a_whole_response(row, template, tmp_path):
    tokenizer = with_template(tmp_path, ARITHMETIC, template)
    example, counts = one(tmp_path, row, tokenizer)
    ids, scored = example.responses[0], example.scored[0]
    assert ids[-1] == tokenizer.eos and (ids == tokenizer.eos).sum() == 1 and scored[-1] and counts["truncated"] == 0
    if len(ids) > 1:
        n = len(example.prompt)
        cut, counts = one(tmp_path, row, tokenizer, max_length=n + len(ids) - 1, max_prompt_length=n)
        assert (cut.responses[0] == ids[:-1]).all() and counts["truncated"] == 1


def test_an_empty_prompt_is_bos_or_else_eos(tmp_path):
    for tokenizer, first in ((data.Tokenizer(ARITHMETIC), "<bos>"), (changed_tokenizer(tmp_path / "t", bos_token=None), "<eos>")):
        example, _ = one(tmp_path, {"prompt": "", "completion": "1"}, tokenizer)
        assert tokens_of(tokenizer, example.prompt) == [first]


def test_a_tokenizer_without_its_eos_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="eos_token is '<end>'; expected a token of tokenizer.json"):
        changed_tokenizer(tmp_path / "t", eos_token="<end>")
    with pytest.raises(ValueError, match="no tokenizer.json there"):
        data.Tokenizer(tmp_path)


@pytest.mark.parametrize("completion, tokens", [
    (" a time", ["▁a", "▁time", "</s>"]), ("time", ["t", "im", "e", "</s>"]), ("\nTom", ["<0x0A>", "To", "m", "</s>"]),
    ("", ["</s>"])])
def test_no_dummy_prefix_inside_a_row(completion, tokens, pieces, tmp_path):
    tokenizer = data.Tokenizer(pieces)
    example, _ = one(tmp_path, {"prompt": "Once", "completion": completion}, tokenizer, tokenize="apart")
    assert tokens_of(tokenizer, example.prompt) == ["<s>", "▁Once"] and tokens_of(tokenizer, example.responses[0]) == tokens


def test_ids_apart_say_what_the_text_says(each_pieces):
    hypothesis = pytest.importorskip("hypothesis")
    tokenizer = data.Tokenizer(each_pieces)

    @hypothesis.given(hypothesis.strategies.text("ab é\n😀.", max_size=12))
    def decodes(text):
        ids, offsets = tokenizer.continuation(text)
        assert text_of(tokenizer, tokenizer.fast.encode("Once").ids + ids) == "<s> Once" + text
        assert all(0 <= begin <= end <= len(text) for begin, end in offsets) and len(offsets) == len(ids)

    decodes()


@pytest.mark.parametrize("mode", ["joint", "apart"])
def test_whole_texts_are_the_tokenizers_own_ids(mode, each_pieces, tmp_path):
    """There is nothing before them that they continue: SentencePiece's dummy prefix belongs there."""
    tokenizer, text = data.Tokenizer(each_pieces), "Once upon a time"
    example, _ = one(tmp_path, {"text": text}, tokenizer, tokenize=mode)
    assert [*example.prompt, *example.responses[0]] == [*tokenizer.fast.encode(text).ids, tokenizer.eos]


def test_joint_ids_are_the_tokenizers_own_where_they_can_be(each_pieces, tmp_path):
    """Every row whose joint ids begin with the prompt's, and the others are counted."""
    tokenizer, plain = data.Tokenizer(each_pieces), lambda text: data.Tokenizer(each_pieces).fast.encode(text).ids
    rows = [{"prompt": prompt, "completion": completion}
            for prompt in ("Once upon", "Once upon ", "Lily was", "a\n") for completion in (" a time", "time", "\n", "s")]
    dataset = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    split = [plain(r["prompt"] + r["completion"])[:len(plain(r["prompt"]))] == plain(r["prompt"]) for r in rows]
    assert 0 < dataset.counts["apart"] == split.count(False) < len(rows)
    for row, is_split, example in zip(rows, split, dataset.examples, strict=True):
        ids = [*example.prompt, *example.responses[0]]
        assert (ids == [*plain(row["prompt"] + row["completion"]), tokenizer.eos]) == is_split
        assert text_of(tokenizer, ids) == "<s> " + row["prompt"] + row["completion"] + "</s>"
    assert load(str(tmp_path / "rows.jsonl"), tokenizer, tokenize="apart").counts["apart"] == 0  # asked for: not a fallback


# ---------------------------------------------------------------------------------------------------------------------
# Truncation and counts


@pytest.mark.parametrize("max_length, max_prompt_length, prompt, response, truncated", [
    (12, 0, "<bos>12345=", "6789<eos>", 0),
    (11, 0, "<bos>2345=", "6789<eos>", 1),  # what the response leaves
    (8, 0, "<bos>45=", "6789", 1),  # half
    (12, 4, "<bos>45=", "6789<eos>", 1),
    (9, 7, "<bos>12345=", "67", 1)])
def test_cut(max_length, max_prompt_length, prompt, response, truncated, tmp_path):
    tokenizer = changed_tokenizer(tmp_path / "t", add_bos_token=True)
    row, lengths = {"prompt": "12345=", "completion": "6789"}, dict(max_length=max_length, max_prompt_length=max_prompt_length)
    example, counts = one(tmp_path, row, tokenizer, **lengths)
    assert (text_of(tokenizer, example.prompt), text_of(tokenizer, example.responses[0])) == (prompt, response)
    assert len(example.scored[0]) == len(example.responses[0]) and counts["truncated"] == truncated
    if truncated:
        with pytest.raises(ValueError, match=r"row.jsonl:1: 7 prompt \+ 5 response tokens do not fit"):
            one(tmp_path, row, tokenizer, truncation="error", **lengths)
        file = write(tmp_path / "rows.jsonl", [row, {"prompt": "1", "completion": "2"}])
        dataset = load(file, tokenizer, truncation="drop", **lengths)
        assert len(dataset) == 1 and dataset.counts["dropped"] == 1 and dataset.counts["truncated"] == 0


def test_a_bos_that_opens_each_turn_is_cut_with_its_turn(tmp_path):
    """In front of the middle of a turn it would open another one."""
    tokenizer = changed_tokenizer(tmp_path / "t", chat_template="{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}")
    turns = [U("123"), A("45"), U("678"), A("9")]
    for given, prompt in ((turns, "5<bos>678"), (turns[2:], "<bos>678"), ([U("12345678"), A("9")], "<bos>5678")):
        example, _ = one(tmp_path, {"messages": given}, tokenizer, train_on="last", max_prompt_length=5)
        assert text_of(tokenizer, example.prompt) == prompt


def test_cut_fits_and_takes_only_the_ends(tmp_path):
    """Whatever the lengths: BOS and the end of the prompt, the beginning of the responses, and no longer than asked."""
    hypothesis = pytest.importorskip("hypothesis")
    number, tokenizer = hypothesis.strategies.integers, changed_tokenizer(tmp_path / "t", add_bos_token=True)

    @hypothesis.given(number(0, 9), number(0, 9), number(0, 9), number(2, 14), number(0, 16))
    @hypothesis.settings(deadline=None, max_examples=200)
    def fits(prompt, chosen, rejected, max_length, max_prompt_length):
        lengths = dict(max_length=max_length, max_prompt_length=max_prompt_length)
        row = {"prompt": "123456789"[:prompt], "chosen": "1" * chosen, "rejected": "2" * rejected}
        file = write(tmp_path / "rows.jsonl", [row, {"prompt": "", "chosen": "", "rejected": ""}])
        whole, cut = (load(file, tokenizer, "preference", False, **keys) for keys in ({}, lengths))
        assert cut.counts["read"] == 2 == len(cut) + cut.counts["dropped"]
        before, after = whole.examples[0], cut.examples[0]
        if after.where != before.where:
            return
        assert len(after.prompt) + max(map(len, after.responses)) <= max_length
        assert not max_prompt_length or len(after.prompt) <= max_prompt_length
        kept = len(after.prompt) - 1
        assert kept == 0 or [*after.prompt] == [tokenizer.bos, *before.prompt[len(before.prompt) - kept:]]
        assert all([*a] == [*b[:len(a)]] for a, b in zip(after.responses, before.responses))
        assert all(m.any() and len(m) == len(a) for m, a in zip(after.scored, after.responses))
        fitted = len(before.prompt) + max(map(len, before.responses)) <= max_length and (
            not max_prompt_length or len(before.prompt) <= max_prompt_length)
        assert (cut.counts["truncated"] == 0) == fitted
        assert not fitted or (after.length, kept + 1) == (before.length, len(before.prompt))

    fits()


def test_a_prompt_without_bos_keeps_its_end(tmp_path):
    tokenizer = data.Tokenizer(ARITHMETIC)
    example, _ = one(tmp_path, {"prompt": "12345=", "completion": "67"}, tokenizer, max_length=8)
    assert text_of(tokenizer, example.prompt) == "2345="


def test_nothing_left_to_score_is_dropped(tmp_path):
    """A response that begins with the user's words is cut before the assistant's."""
    tokenizer = with_template(tmp_path, ARITHMETIC, "{% for m in messages %}{{ m.content }}={% endfor %}")
    rows = [{"prompt": [U("1")], "completion": [U("2345"), A("6")]}, {"prompt": [U("1")], "completion": [A("6")]}]
    dataset = load(write(tmp_path / "rows.jsonl", rows), tokenizer, max_length=5, max_prompt_length=4)
    assert [e.where[-1] for e in dataset.examples] == ["2"] and dataset.counts["dropped"] == 1
    with pytest.raises(ValueError, match="no usable row is left"):
        load(write(tmp_path / "rows.jsonl", rows[:1]), tokenizer, max_length=5, max_prompt_length=4)


def check_counts(file, kind, rows, tokenizer, max_length, truncation):
    """Every row is used, dropped or bad, some do not fit, and what is left fits and is scored."""
    dataset = load(file, tokenizer, kind, max_length=max_length, truncation=truncation)
    counts = dataset.counts
    left_out = counts["dropped"] + counts["identical"] + counts["bad"]
    assert rows == counts["read"] == counts["used"] + left_out and counts["used"] == len(dataset)
    assert counts["truncated" if truncation == "cut" else "dropped"] > 0 == counts["bad"]
    assert set(counts) <= set(data.COUNTS) and len({e.where for e in dataset.examples}) == len(dataset)
    scored = [int(m.sum()) for e in dataset.examples for m in e.scored]
    assert min(scored) > 0 and dataset.offsets[0] == 0 and (np.diff(dataset.offsets).sum() == dataset.offsets[-1] == sum(scored))
    assert all(len(e.prompt) + max(map(len, e.responses)) <= max_length for e in dataset.examples)


@pytest.mark.parametrize("truncation", ["cut", "drop"])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_counts_add_up(kind, truncation, chat, pieces, tmp_path):
    rng, words = np.random.default_rng(0), "Once upon a time there was a little girl and she liked to play in the park".split()
    text = lambda: " ".join(rng.choice(words, rng.integers(1, 25)))
    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(200)]
    rows += [{"conversations": [{"from": "human", "value": text()}], "chosen": {"from": "gpt", "value": text()},
              "rejected": {"from": "gpt", "value": text()}} for _ in range(200 if kind == "preference" else 0)]
    rows += [{"messages": [U(text()), A(text()), U(text()), A(text())]} for _ in range(200 if kind == "sft" else 0)]
    rows += [{"prompt": "Once", "chosen": "upon", "rejected": "upon"}] if kind == "preference" else []
    check_counts(write(tmp_path / "rows.jsonl", rows), kind, len(rows), data.Tokenizer(chat), 80, truncation)
    check_counts(write(tmp_path / "texts.jsonl", rows[:200]), kind, 200, data.Tokenizer(pieces), 25, truncation)


def test_counts_add_up_on_real_files(real, stories, smollm2):
    for file, kind, rows, folder, max_length in (
            ("preference/hh-harmless-test.jsonl.gz", "preference", 2312, stories, 80), ("sft/alpaca-en.json", "sft", 999, stories, 200),
            ("preference/sharegpt-dpo-en.json", "preference", 300, smollm2, 200), ("sft/v1-sft-demo.jsonl", "sft", 500, smollm2, 80)):
        for truncation in ("cut", "drop"):
            check_counts(str(real / file), kind, rows, data.Tokenizer(folder), max_length, truncation)


# ---------------------------------------------------------------------------------------------------------------------
# Malformed rows

MALFORMED = {
    "truncated": b'{"prompt": "1+1=", "compl',
    "two objects": b'{"prompt": "1"} {"completion": "2"}',
    "array": b'["1+1=", "2"]',
    "null": b"null",
    "no known keys": b'{"left": "1+1=", "right": "2"}',
    "no completion": b'{"prompt": "1+1="}',
    "number for text": b'{"prompt": "1+1=", "completion": 2}',
    "null for text": b'{"prompt": null, "completion": "2"}',
    "number in alpaca": b'{"instruction": "1", "output": 2}',
    "number in whole text": b'{"text": 2}',
    "messages as text": b'{"messages": "hi"}',
    "number for an answer": b'{"question": "1+1=", "answer": 2}',
    "no messages": b'{"messages": []}',
    "messages of text": b'{"messages": ["hi"]}',
    "no assistant": b'{"messages": [{"role": "user", "content": "1"}]}',
    "an image": b'{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "2"}]}',
    "no assistant in the completion": b'{"prompt": {"from": "human", "value": "1"}, "completion": {"from": "human", "value": "2"}}',
    "unknown role": b'{"messages": [{"role": "robot", "content": "1"}]}',
    "role of the wrong type": b'{"messages": [{"role": ["user"], "content": "1"}]}',
    "content of the wrong type": b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "2"}]}',
    "system of the wrong type": b'{"system": 1, "messages": [{"role": "assistant", "content": "2"}]}',
    "no role": b'{"messages": [{"content": "1"}]}',
    "messages after text": b'{"prompt": "1", "completion": [{"role": "assistant", "content": "2"}]}',
    "no rejected": b'{"prompt": "1", "chosen": "2"}',
    "text and messages": b'{"chosen": "2", "rejected": [{"role": "assistant", "content": "3"}]}',
    "refused by the template": b'{"messages": [{"role": "user", "content": "refuse"}, {"role": "assistant", "content": "2"}]}',
    "not utf-8": b'{"prompt": "1+1=", "completion": "\xff"}',
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_named_or_skipped(line, tmp_path):
    tokenizer = with_template(tmp_path, ARITHMETIC, REFUSING)
    good = b'{"prompt": "1", "completion": "2"}\n'
    file = write(tmp_path / "rows.jsonl", good + b"\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match=re.escape(file) + ":3: ."):
        load(file, tokenizer)
    dataset = load(file, tokenizer, bad_rows="skip")
    assert len(dataset) == 2 and dataset.counts["bad"] == 1 and dataset.counts["read"] == 3


def test_a_malformed_row_of_an_array(tmp_path):
    file = write(tmp_path / "rows.json", [{"text": "1"}, {"text": 2}])
    with pytest.raises(ValueError, match=re.escape(f"{file}[1]: 'text' should be a string, found int: '2'")):
        load(file, data.Tokenizer(ARITHMETIC))


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_lines_in_a_file_that_is_called_json(packed, tmp_path):
    name = "rows.json" + ".gz" * (packed is gzip.compress)
    for content in (b'{"text": "1"}\n\n{"text": "2"}\n', b'\xef\xbb\xbf {"text": "1"}\n{"text": "2"}', b'\xef\xbb\xbf\n [{"text": "1"}, {"text": "2"}]'):
        (tmp_path / name).write_bytes(packed(content))
        assert load(str(tmp_path / name), data.Tokenizer(ARITHMETIC)).counts["used"] == 2
    (tmp_path / name).write_bytes(packed('[{"text": "1"},\n{"text": "2"}]'.encode("utf-16")))
    assert load(str(tmp_path / name), data.Tokenizer(ARITHMETIC)).counts["used"] == 2
    (tmp_path / name).write_bytes(packed(b'{"data":\n[{"text": "1"},\n{"text": "2"}\n]}'))
    with pytest.raises(ValueError, match=re.escape(name) + ": expected a JSON array of rows, or one row per line"):
        load(str(tmp_path / name), data.Tokenizer(ARITHMETIC), bad_rows="skip")


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="t.jinja: 'utf-8' codec can't decode"):
        data.Tokenizer(ARITHMETIC, str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("name, content", [
    ("a.json", b'{"text":\n"1"}'), ("a.json", b'[{"text": "1"}'), ("a.jsonl.gz", b'{"text": "1"}'),
    ("a.jsonl.gz", gzip.compress(b'{"text": "1"}\n' * 99)[:-12]), ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 40)],
    ids=["an object", "truncated", "not gzip", "truncated gzip", "garbled gzip"])
def test_a_broken_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        load(str(tmp_path / name), data.Tokenizer(ARITHMETIC))


def test_a_missing_file_is_named(tmp_path):
    there = write(tmp_path / "pairs.jsonl", [{"text": "1"}])
    with pytest.raises(ValueError, match=f"pair.jsonl: no such file; did you mean {re.escape(there)}?"):
        load(str(tmp_path / "pair.jsonl"), data.Tokenizer(ARITHMETIC))
    for paths in (str(tmp_path / "x*.jsonl"), [there, str(tmp_path / "x*.jsonl")]):
        with pytest.raises(ValueError, match=r"no file matches .*x\*\.jsonl"):
            load(paths, data.Tokenizer(ARITHMETIC))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("count, batch_size", [(10, 3), (12, 4), (3, 8), (1, 1)])
def test_every_epoch_uses_each_row_once(count, batch_size):
    dataset = as_dataset(random_trees(np.random.default_rng(0), count, 9))
    rows = lambda step, seed=0: data.step_rows(dataset, step, batch_size, seed).tolist()
    steps = data.steps_per_epoch(dataset, batch_size)
    for epoch in range(3):
        sizes = [len(rows(epoch * steps + at)) for at in range(steps)]
        assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)
        assert sorted(i for at in range(steps) for i in rows(epoch * steps + at)) == list(range(count))
    if count > 3:
        assert len({tuple(rows(step, seed)) for step in (0, steps, 2 * steps) for seed in (0, 1)}) == 6  # each has its own order
    late = rows(2 * steps)
    assert rows(0) == rows(0) and rows(2 * steps) == late  # a function of (seed, step), whatever was asked before


def test_in_order_is_everything_once():
    dataset = as_dataset(random_trees(np.random.default_rng(0), 10, 9))
    pieces = data.in_order(dataset, 4)
    assert [len(p) for p in pieces] == [4, 4, 2] and np.concatenate(pieces).tolist() == list(range(10))


def test_pack():
    hypothesis = pytest.importorskip("hypothesis")
    number = hypothesis.strategies.integers

    @hypothesis.given(hypothesis.strategies.lists(number(1, 50), max_size=60), number(50, 90))
    def packs(lengths, capacity):
        bins = data.pack(lengths, capacity)
        loads = sorted(sum(lengths[i] for i in b) for b in bins)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(0 < load <= capacity for load in loads)
        assert len(loads) < 2 or loads[0] + loads[1] > capacity  # no two bins would have fitted into one

    packs()


def test_shared():
    """Each index is one rank's, and ranks differ by one item at most; one rank has all, longest first."""
    hypothesis = pytest.importorskip("hypothesis")
    number = hypothesis.strategies.integers

    @hypothesis.given(hypothesis.strategies.lists(number(1, 50), max_size=60), number(1, 9))
    def shares(lengths, ranks):
        shares = data.shared(lengths, ranks)
        loads = [sum(lengths[i] for i in share) for share in shares]
        assert len(shares) == ranks and sorted(i for share in shares for i in share) == list(range(len(lengths)))
        assert max(loads) - min(loads) <= max(lengths, default=0)

    shares()
    assert data.shared([3, 5, 5, 4], 1) == [[1, 2, 3, 0]]
    assert data.shared([5, 5, 5, 5, 2], 2) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("static", [False, True])
def test_micro_batches_share_a_step_between_ranks(static):
    dataset = as_dataset(random_trees(np.random.default_rng(0), 24, 97))
    rows, shape = data.step_rows(dataset, 0, 20, 0), layout(256, static)
    tokens, longest = int(dataset.lengths[rows].sum()), int(dataset.lengths[rows].max())

    def step(world):
        """What is scored, of each row; each rank's numbers of streams and of tokens."""
        shares, counts = zip(*(data.micro_batches(dataset, rows, shape, rank, world) for rank in range(world)))
        assert all(c == counts[0] for c in counts) and all(shares)  # no rank stays away
        batches = [batch for share in shares for batch in share]
        assert all(len(batch["tokens"]) <= 256 for batch in batches)
        assert sum(len(batch["target"]) for batch in batches) == counts[0]["tokens"] == sum(int(b["lengths"].sum()) for b in batches)
        assert sum(batch["num_responses"] for batch in batches) == counts[0]["responses"]
        assert sum(len(batch["chosen"]) for batch in batches) == counts[0]["pairs"]
        assert all(len(batch["target"]) == 0 for batch in batches if not batch["num_responses"])
        scored = sorted(pair for b in batches for pair in zip(b["scored_index"].tolist(), b["target"].tolist(), b["rows"][b["response"]].tolist()))
        real = [sum(int(dataset.lengths[i]) for batch in share for i in batch["members"]) for share in shares]
        return (scored, counts[0]), [*map(len, shares)], real

    alone, streams, _ = step(1)
    assert streams[0] > 3 and sorted({row for _, _, row in alone[0]}) == sorted(rows.tolist())
    for world in (2, 3, streams[0] + 2, 30):
        found, streams, real = step(world)
        assert found == alone and sum(real) == tokens and max(real) - min(real) <= longest


def tree(prompt, responses, scored, chosen=(), rejected=()):
    array = lambda values, dtype: [np.array(v, dtype) for v in values]
    return data.Example(np.array(prompt, np.int32), array(responses, np.int32), array(scored, bool),
                        [True, False][:len(responses)], list(chosen), list(rejected), [0.5] * len(chosen), "hand:1")


PAIR, SINGLE = tree([5, 6], [[7, 8, 9], [10]], [[1, 0, 1], [1]], [0], [1]), tree([11], [[12, 13]], [[0, 1]])
LONG = tree([11] * 254, [[12, 13]], [[0, 1]])
BY_HAND = {  # SINGLE, then PAIR: 11 12 13 | 5 6 7 8 9 10
    "tokens": [11, 12, 13, 5, 6, 7, 8, 9, 10], "positions": [0, 1, 2, 0, 1, 2, 3, 4, 2],
    "predict_from": [1, 4, 6, 4], "target": [13, 7, 9, 10], "response": [0, 1, 1, 2], "place": [0, 0, 1, 0],
    "scored_index": [3, 0, 1, 2], "lengths": [1, 2, 1], "demonstrated": [True, True, False], "rows": [1, 0, 0],
    "chosen": [1], "rejected": [2], "margin": [0.5], "last": [2, 7, 8], "example": [0, 1, 1], "rank": [0, 0, 1], "pair_index": [0]}


def test_build_by_hand():
    batch = data.build([(1, SINGLE), (0, PAIR)], as_dataset([PAIR, SINGLE]), layout(32))
    assert {name: batch[name].tolist() for name in BY_HAND} == BY_HAND
    assert (batch["num_responses"], batch["longest"]) == (3, 2)
    assert all(batch[name].dtype == torch.int64 for name in BY_HAND if name not in ("demonstrated", "margin"))
    assert data.count([PAIR, SINGLE]) == dict(stream_tokens=9, tokens=4, responses=3, demonstrated_tokens=3, demonstrations=2,
                                              pairs=1, examples=2, steps=0)


@pytest.mark.parametrize("members, tokens, length", [
    ([(1, SINGLE), (0, PAIR)], 256, 128), ([(1, SINGLE), (0, PAIR)], 9, 9), ([(1, LONG), (0, PAIR)], 512, 384), ([], 256, 128)])
def test_build_pads_streams_alone(members, tokens, length):
    """To a multiple of 128, T at most, also with nothing to score; what is scored stays as it was."""
    dataset = as_dataset([PAIR, LONG if members and members[0][1] is LONG else SINGLE])
    bare, batch = (data.build(members, dataset, layout(tokens, static)) for static in (False, True))
    assert len(batch["tokens"]) == len(batch["positions"]) == length
    assert len(bare["tokens"]) == max(1, sum(e.length for _, e in members))
    for name in {*bare} - {"tokens", "positions", "groups", "group_q", "group_k", "group_inverse", "group_offset", "masks"}:
        np.testing.assert_array_equal(batch[name], bare[name], name)


@pytest.mark.parametrize("prompt, response", [(118, 43), (180, 300), (350, 35)])  # as in HH, UltraFeedback, TL;DR
def test_padding_of_a_large_step_is_below_1_percent(prompt, response):
    rng = np.random.default_rng(0)
    length = lambda mean: max(4, int(mean * rng.lognormal(-0.18, 0.6)))
    dataset = as_dataset([tree([1] * length(prompt), *[[[1] * length(response) for _ in "ab"]] * 2) for _ in range(1024)])
    shape = layout(data.stream_length([dataset], 256, 0, device="cuda"), static=True)
    for step in range(4):
        batches, counts = data.micro_batches(dataset, data.step_rows(dataset, step, 256, 0), shape)
        assert counts["stream_tokens"] > 0.99 * sum(len(batch["tokens"]) for batch in batches)


def test_stream_length():
    dataset = as_dataset([PAIR, SINGLE])
    assert data.stream_length([dataset], 1, 0) == 128 and data.stream_length([dataset], 1, 6) == 6
    assert data.stream_length([dataset], 100, 0) == 512  # an average step is 450 tokens, and with an eighth more 506
    assert data.stream_length([dataset], 110, 0) == 640  # 495, and 557
    assert data.stream_length([dataset], 10**6, 0) == 1024 and data.stream_length([dataset], 10**6, 0, device="cuda") == 4096
    long = tree([1] * 5000, [[1]], [[1]])._replace(where="eval.jsonl:7")
    assert data.stream_length([dataset, as_dataset([long])], 1, 0) == 5120  # whichever set it is in
    with pytest.raises(ValueError, match=r"eval.jsonl:7: .* 5001 tokens .* micro_batch_tokens is 4096; set it to 5120"):
        data.stream_length([dataset, as_dataset([long])], 1, 4096)


def test_stored_examples_are_those_that_were_appended(tmp_path):
    made = random_trees(np.random.default_rng(0), 20, 97)
    made[3] = made[3]._replace(row={"prompt": "a \u00fc \ud800", "n": [1.5, None]}, responses=[], scored=[], demonstrated=[])
    made[4] = made[4]._replace(labels=[np.full(len(ids), np.nan, np.float32) for ids in made[4].responses], margin=[float("nan")])
    stored = data.Stored(str(tmp_path / "new"))
    for i, e in enumerate(made):
        stored.append(e)
        np.testing.assert_equal(stored[i], e)  # reading and writing take turns
    np.testing.assert_equal(list(stored), made)
    np.testing.assert_equal(stored[-20], made[0])
    np.testing.assert_equal(stored[1::3], made[1::3])
    assert len(stored) == 20 and not list((tmp_path / "new").iterdir())  # a name would outlive a crash
    with pytest.raises(IndexError):
        stored[20]
    with pytest.raises(ValueError, match="cache_dir /proc/here: .*name another --cache_dir"):
        data.Stored("/proc/here")


LOAD = """
import sys, config, data
resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
tokenizer = data.Tokenizer("tasks/arithmetic")
load = lambda file: data.load(file, "sft", tokenizer, config.Config(cache_dir=sys.argv[2]), False)
load("tasks/arithmetic/sft.jsonl")
before = resident()
dataset = load(sys.argv[1])
print(len(dataset), (resident() - before) * 2**20 / len(dataset))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_a_row_takes_no_memory(tmp_path):
    """Of a file larger than memory only the places of its rows are held: 5 numbers each."""
    rows = (ROOT / "tasks/arithmetic/sft.jsonl").read_text() * 12
    (tmp_path / "large.jsonl").write_text(rows)
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "large.jsonl", tmp_path], cwd=ROOT, capture_output=True, text=True)
    count, each = done.stdout.split()
    assert int(count) == len(rows.splitlines()) and float(each) < 200, each


# ---------------------------------------------------------------------------------------------------------------------
# Rows with a label


@pytest.mark.parametrize("kind, row, prompt, responses", [
    ("sft", {"question": "q", "context": "c", "answer": "a"}, [U("q\nc")], [[A("a")]]), ("sft", {"question": "q", "context": {"x": 1}, "answer": "a"}, [U("q")], [[A("a")]]),
    ("preference", {"question": "q", "context": "c", "chosen": "a", "rejected": "b"}, [U("q\nc")], [[A("a")], [A("b")]]), ("prompts", {"question": "q", "context": "c"}, [U("q\nc")], []),
    ("sft", {"inputs": "q", "targets": "a"}, [U("q")], [[A("a")]]), ("sft", {"problem": "q", "generated_solution": "a", "answer": "2"}, [U("q")], [[A("a")]]),
    ("sft", {"conversation": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]}, [U("q")], [[A("a")]]),
    ("sft", {"input": [U("q")], "output": "a"}, [U("q")], [[A("a")]]), ("prompts", {"prompt": "q", "messages": [S("s"), U("q"), A("a")]}, [S("s"), U("q")], []),
    ("prompts", {"prompt": [U("q")], "messages": [S("s"), U("q"), A("a")]}, [U("q")], []), ("prompts", {"prompt": "q", "conversation": "0f3c"}, "q", [])])
def test_rows_as_other_people_write_them(kind, row, prompt, responses):
    draft = data.FORMATS[kind](row, data.TRAIN_ON[kind], True)
    assert (draft.prompt, draft.responses) == (prompt, responses)


@pytest.mark.parametrize("kind, row, message", [
    ("sft", {"text": "Can you?", "role": "prompter", "parent_id": None}, "'text' beside 'role' looks like only one part"), ("sft", {"text": "Write it.", "code": "def f"}, "beside 'code'"),
    ("preference", {"user": "What is the capital?", "chosen": "The capital.", "rejected": "The city."}, r"share their first 3 characters \(or messages\), but 'user' looks like the prompt"),
    ("preference", {"history": [{"from": "user", "value": "q"}], "chosen": "Step 1: a", "rejected": "Step 1: b"}, "'history' looks like the prompt")])
def test_rows_that_would_lose_a_part_are_refused(kind, row, message):
    with pytest.raises(ValueError, match=message):
        data.FORMATS[kind](row, data.TRAIN_ON[kind], True)


def test_whole_pairs_may_have_other_columns():
    row = {"id": "0f3c-11", "source": "web", "score": 1.5, "chosen": "Q: How far is it? A: Ten miles.", "rejected": "Q: How far is it? A: Two miles."}
    assert formats.preference_row(row, "last", False).prompt == "Q: How far is it? A:"


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_turns_that_say_so_are_not_trained(flag, tmp_path):
    tokenizer = with_template(tmp_path, ARITHMETIC, "{% for m in messages %}{{ '+' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}{{ '=' if add_generation_prompt }}")
    example, _ = one(tmp_path, {"messages": [U("1"), A("2"), U("3"), A("4")]}, tokenizer)
    said = lambda e: runs(tokenizer, e.responses[0], e.scored[0])
    every = said(example)
    assert len(every) == 2
    example, _ = one(tmp_path, {"messages": [U("1"), {**A("2"), **flag}, {**U("3"), **flag}, {**A("4"), **{key: not value for key, value in flag.items()}}]}, tokenizer)
    assert said(example) == every[1:]
    with pytest.raises(ValueError, match="no assistant message to train on"):
        one(tmp_path, {"messages": [U("1"), {**A("2"), **flag}]}, tokenizer)


@pytest.mark.parametrize("header", ["=", ""])
def test_a_greeting_that_the_template_can_ask_for_is_trained(header, tmp_path):
    """Whatever the template puts between its header and the content, if it has a header."""
    template = "{% for m in messages %}{{ '+' if m.role == 'user' else '" + header + "' }}{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}" \
               + (f"{{{{ '{header}' if add_generation_prompt }}}}" if header else "")
    tokenizer, thinking = with_template(tmp_path, ARITHMETIC, template), {"reasoning_content": "77"} if header else {}
    example, _ = one(tmp_path, {"messages": [{**A("8"), **thinking}, U("1"), A("2")]}, tokenizer)
    assert runs(tokenizer, example.responses[0], example.scored[0])[0].startswith("778" if header else "8")
    assert len(runs(tokenizer, example.responses[0], example.scored[0])) == 2


@pytest.mark.parametrize("system", ["{% if messages %}9+9={% endif %}", "{{ '9+9=' if messages[0].role != 'system' }}"])
def test_a_greeting_that_the_template_cannot_ask_for_is_context(system, tmp_path):
    """What it makes of no message is not what the conversation begins with, or an error."""
    template = system + "{% for m in messages %}{{ m.content + ('=' if m.role == 'user' else '') }}{% endfor %}"
    tokenizer = with_template(tmp_path, ARITHMETIC, template)
    example, _ = one(tmp_path, {"messages": [A("8"), U("1"), A("2"), U("3"), A("4")]}, tokenizer)
    assert tokenizer.decode(example.prompt.tolist()) == "9+9=81=" and len(runs(tokenizer, example.responses[0], example.scored[0])) == 2
    with pytest.raises(ValueError, match="no assistant message to train on, but for a greeting, which the chat template cannot prompt for"):
        one(tmp_path, {"messages": [A("8"), U("1")]}, tokenizer)


@pytest.mark.parametrize("row, prompt, responses, chosen, rejected", [
    ({"prompt": "a", "completion": "b", "label": True}, "a", ["b"], [0], []), ({"prompt": "a", "completion": "b", "label": 0}, "a", ["b"], [], [0]),
    ({"messages": [U("hi"), A("yo")], "label": False}, [U("hi")], [[A("yo")]], [], [0]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", ["b", "c"], [0], [1])])
def test_rows_with_a_label(row, prompt, responses, chosen, rejected):
    assert formats.kto_row(row, "last", True) == data.Draft(prompt, responses, [True] if chosen == [0] and not rejected else [False] if not chosen else [True, False],
                                                         chosen, rejected, [])


@pytest.mark.parametrize("kind, row, message", [
    ("kto", {"prompt": "a", "completion": "b"}, "expected label beside"), ("kto", {"prompt": "a", "completion": "b", "label": "yes"}, "'label' should be true or false, found 'yes'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "'margin' should be a number, found 'big'"),
    ("preference", {"prompt": "a", "responses": ["b"]}, "'responses' should be a list of at least two")])
def test_what_is_wrong_with_a_label_is_said(kind, row, message):
    with pytest.raises(ValueError, match=message):
        data.FORMATS[kind](row, "last", True)


def labelled(count, every):
    return as_dataset([tree([i], [[1]], [[1]])._replace(chosen=[0] * (i % every != 0), rejected=[0] * (i % every == 0)) for i in range(count)])


def check_labels(file, tokenizer, max_length):
    """Every row is used, with the label that it has; long ones are cut and counted."""
    rows = json.loads(file.read_text())
    dataset = load(str(file), tokenizer, "kto", max_length=max_length)
    assert (dataset.counts["read"], dataset.counts["used"]) == (len(rows), len(rows)) and 0 < dataset.counts["truncated"] < len(rows)
    assert [bool(e.chosen) for e in dataset.examples] == [row["label"] for row in rows] == [not e.rejected for e in dataset.examples]


def test_labels(chat, tmp_path):
    rows = [{"messages": [U("Add the numbers."), A("yes " * 3 * i)], "label": i % 3 == 0} for i in range(1, 40)]
    write(tmp_path / "rows.json", rows)
    check_labels(tmp_path / "rows.json", data.Tokenizer(chat), 80)


def test_real_labels(real, smollm2):
    check_labels(real / "kto" / "kto-en.json", data.Tokenizer(smollm2), 512)


def test_desirable_and_undesirable_rows_take_turns():
    """Each step has them in the dataset's proportions, to within one; every row comes once an epoch, in another order each time."""
    dataset = labelled(100, 5)
    for epoch in (0, 1):
        steps = [data.step_rows(dataset, epoch * 10 + step, 10, 3) for step in range(10)]
        assert sorted(np.concatenate(steps)) == list(range(100))
        assert all(1 <= sum(bool(dataset.examples[i].rejected) for i in rows) <= 3 for rows in steps)
    assert not np.array_equal(data.step_rows(dataset, 0, 100, 3), data.step_rows(dataset, 1, 100, 3))


def test_mismatched_responses_are_of_other_prompts():
    dataset = as_dataset([tree([i // 3], [[10 + i] * (1 + i % 4)], [[1] * (1 + i % 4)]) for i in range(12)])
    first, again, other = (data.mismatched(dataset, 0, epoch) for epoch in (0, 0, 1))
    ids = lambda d: [e.responses[0].tolist() for e in d.examples]
    assert ids(first) == ids(again) != ids(other)
    for i, (e, mine) in enumerate(zip(first.examples, dataset.examples)):
        j = e.responses[0][0] - 10
        assert j // 3 != i // 3 and len(e.responses[0]) == 1 + j % 4 == len(e.scored[0]) and e.prompt is mine.prompt
    with pytest.raises(ValueError, match="hand:1: every row has this row's prompt"):
        data.mismatched(as_dataset([tree([1], [[2]], [[1]])] * 3), 0, 0)


def test_mismatched_trees_are_no_larger_than_the_rows():
    """A long prompt with two long responses of other rows: neither the tree nor a prompt with a response outgrows the data."""
    dataset = as_dataset([tree([1] * 90, [[2] * 8] * 2, [[1] * 8] * 2), *(tree([i], [[3] * 95] * 2, [[1] * 95] * 2) for i in (5, 6))])
    largest, longest = max(e.length for e in dataset.examples), max(len(e.prompt) + len(e.responses[0]) for e in dataset.examples)
    for epoch in range(5):
        for e in data.mismatched(dataset, 0, epoch).examples:
            assert e.length <= largest and all(1 <= len(e.prompt) + len(r) <= longest for r in e.responses)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of a solution


def steps_of(row):
    draft = formats.prm_row(row, "all", False)
    return draft.prompt, [[(step.text, None if step.label != step.label else step.label) for step in response] for response in draft.responses]


KI = formats.STEP_TAGS[0]

STEP_ROWS = {  # row, prompt, steps with their labels
    "stepwise": ({"prompt": "p", "completions": ["a", "b", "c", "d", "e"], "labels": [True, "-", 0.3, None, 1]}, "p", [[("a", 1), ("b", 0), ("c", 0.3), ("d", None), ("e", 1)]]),
    "math-shepherd": ({"input": f"How? Step 1: a {KI}\nStep 2: b {KI}", "label": "How? Step 1: a +\nStep 2: b -"}, "How?\n", [[("Step 1: a", 1), ("Step 2: b", 0)]]),
    "tagged values": ({"input": "a <extra_0>b <extra_0>", "value": [0.25, 0.5]}, "", [[("a", 0.25), ("b", 0.5)]]),
    "bigbench": ({"input": "q", "steps": ["a", "b", "c"], "mistake_index": 1}, "q\n", [[("a", 1), ("b", 0), ("c", None)]]),
    "bigbench without a mistake": ({"input": "q", "steps": ["a", "b"], "mistake_index": None}, "q\n", [[("a", 1), ("b", 1)]]),
    "prm800k": ({"question": {"problem": "q"}, "label": {"steps": [
        {"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0},
        {"completions": [{"text": "x", "rating": -1}, {"text": "b", "rating": 0}], "chosen_completion": 1},
        {"completions": [{"text": "y", "rating": -1}], "chosen_completion": None, "human_completion": {"text": "c", "rating": None}},
        {"completions": [{"text": "z", "rating": -1}], "chosen_completion": None, "human_completion": None}]}}, "q\n",
     [[("a", 1), ("b", 1), ("c", None)], [("a", None), ("x", 0)], [("a", None), ("b", None), ("y", 0)], [("a", None), ("b", None), ("c", None), ("z", 0)]])}


@pytest.mark.parametrize("row, prompt, steps", STEP_ROWS.values(), ids=STEP_ROWS)
def test_step_formats(row, prompt, steps):
    assert steps_of(row) == (prompt, steps)


@pytest.mark.parametrize("row, message", [
    ({"prompt": "p", "completions": ["a", "b"], "labels": [True]}, "2 steps and 1 labels"), ({"prompt": "p", "completions": ["a"], "labels": [True, True]}, "1 steps and 2 labels"),
    ({"prompt": "p", "completions": ["a"], "labels": [1.5]}, "a step's label should be .* found 1.5"), ({"prompt": "p", "completions": ["a"], "labels": ["good"]}, "found 'good'"),
    ({"prompt": "p", "completions": ["a"], "labels": [-1]}, "found -1"), ({"prompt": "p", "completions": [], "labels": []}, "steps should be a list of one or more texts"),
    ({"prompt": "p", "completions": ["a"]}, "1 steps and None labels"), ({"input": "no tag", "label": "no tag"}, "'input' has none of the step tags"),
    ({"input": f"a {KI}", "label": "a + b -"}, "there is text after the last .*: 'b -'"), ({"input": f"a {KI} tail", "label": "a + tail"}, "there is text after the last .*: 'tail'"),
    ({"question": {"problem": "q"}, "label": {"finish_reason": "x"}}, r"KeyError: 'steps' \(formats.py:\d+\); a field may be missing"), ({"input": "q", "steps": None, "mistake_index": 1}, "TypeError"),
    ({"input": f"a {KI}", "label": "b +"}, "they differ at 'a '"), ({"input": f"a {KI}", "label": "a ?"}, "found '\\?'"), ({"x": 1}, r"found keys \['x'\]")])
def test_what_is_wrong_with_steps_is_said(row, message, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{message}"):
        data.load(write(tmp_path / "rows.jsonl", [{"prompt": "1", "completions": ["2"], "labels": [True]}, row]), "prm", arithmetic(), config.load([]), False)


def arithmetic():
    return data.Tokenizer(ROOT / "tasks/arithmetic")


def test_step_tokens_are_where_steps_end(tmp_path):
    """As ids, whatever the text holds: a step with a newline of its own has one scored place, at its end. A row without any
    label is dropped and counted; truncation takes labels along."""
    rows = [{"prompt": "1+2=", "completions": ["3", "4\n5", "6"], "labels": [1, None, 0.9]}, {"prompt": "1", "completions": ["2"], "labels": [None]}]
    dataset = data.load(write(tmp_path / "rows.jsonl", rows), "prm", arithmetic(), config.load([]), False)
    assert (dataset.counts["read"], dataset.counts["used"], dataset.counts["dropped"]) == (2, 1, 1)
    e, = dataset.examples
    newline = arithmetic().one("\n")
    assert arithmetic().decode(e.responses[0]) == "3\n4\n5\n6\n" and np.flatnonzero(e.scored[0]).tolist() == [1, 5, 7]
    assert e.responses[0][e.scored[0]].tolist() == [newline] * 3 and e.labels[0][e.scored[0]].tolist() == pytest.approx([1, np.nan, 0.9], nan_ok=True)
    batch = data.build([(0, e)], dataset, layout(32))
    assert batch["own"].tolist() == [5, 9, 11] and batch["step_mask"].tolist() == [True, False, True] and data.count([e])["steps"] == 2
    assert batch["step_labels"][2] == np.float32(0.9)
    short = data.load(write(tmp_path / "rows.jsonl", rows[:1]), "prm", arithmetic(), config.load(["--max_length=8", "--max_prompt_length=4"]), False)
    assert short.counts["truncated"] == 1 and short.examples[0].labels[0].tolist()[1] == 1 and len(short.examples[0].labels[0]) == len(short.examples[0].responses[0]) == 4
    with pytest.raises(ValueError, match="'12' is 2 tokens in .*; it has to be one"):
        data.load(str(tmp_path / "rows.jsonl"), "prm", arithmetic(), config.load(["--step_token=12"]), False)


def check_steps(file, read, labelled, tokenizer):
    """Every row is read and used, none is lost; labelled: how many steps have a label, None where that is not known."""
    dataset = load(file, tokenizer, "prm")
    assert (dataset.counts["read"], dataset.counts["used"], dataset.counts["dropped"]) == (read, read, 0)
    assert labelled is None or data.count(dataset.examples)["steps"] == labelled


@pytest.mark.parametrize("row, prompt, steps", STEP_ROWS.values(), ids=STEP_ROWS)
def test_steps_of_rows_are_labels_once(row, prompt, steps, pieces, tmp_path):
    labels = [label for response in steps for _, label in response if label is not None]
    check_steps(write(tmp_path / "rows.jsonl", [row, row]), 2, 2 * len(labels), data.Tokenizer(pieces))


def test_real_steps(real, stories):
    """Every rating of PRM800K is a label once."""
    for file, read, labelled in (("samples_math-shepherd.jsonl", 7, None), ("samples_prm800k.jsonl", 6, 73), ("bigbench-mistake-arithmetic.jsonl", 300, None)):
        check_steps(str(real / "prm" / file), read, labelled, data.Tokenizer(stories))
