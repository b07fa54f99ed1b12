"""JSONL row -> Draft (text) -> Example (token ids) -> packed micro-batches -> optimizer steps.

An example is a prompt and its responses, kept together as a tree, so that the prompt is stored and computed once. A new
format is one branch of a function in `FORMATS`; which tokens are trained is decided in `tokenize`, by position, never
by comparing ids with pad or eos.

Shapes: T stream tokens, N scored tokens, R responses, P pairs, S segments.
"""
import array
import contextlib
import difflib
import functools
import glob
import gzip
import heapq
import itertools
import json
import math
import os
import re
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer

import report
from losses import OBJECTIVES
from model import Noting, read_json, read_text

# ---------------------------------------------------------------------------------------------------------------------
# Rows


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


class Draft(NamedTuple):
    """A row in the common form of all formats: text, or lists of {role, content} messages for the chat template."""
    prompt: str | list
    responses: list
    demonstrated: list  # for each response: whether it is to be imitated
    chosen: list = []  # indices of responses: pair i prefers chosen[i] to rejected[i]; in rows with a label, chosen has the
    rejected: list = []  # desirable responses, and rejected the undesirable ones
    margin: list = []  # one per pair


def text_field(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} should be a string, found {type(row[key]).__name__}: {str(row[key])[:60]!r}")
    return row[key]


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
         "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant", "observation": "tool"}


REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of an assistant's reasoning before its content
CALLS = ("tool_calls", "function_call")  # keys of its function calls: a list, or a single one
FLAGS = ("train", "loss", "weight", "loss_weight")  # keys that exclude a turn from training if false or 0; it stays as context


def from_json(value, key: str):
    """JSON text is decoded; any other value is returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except ValueError as error:
        raise ValueError(f"{key!r} should be JSON ({error}), found {value[:60]!r}") from None


def objects(value, key: str) -> list[dict]:
    """A list of objects; a single object is accepted too, and each object or the whole value may be JSON text."""
    value = from_json(value, key)
    found = [from_json(item, key) for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{key!r} should be a list of objects, found {str(value)[:60]!r}")
    return found


def called(m: dict, key: str) -> list[dict]:
    """A message's function calls, each as {type, function: {name, arguments}}. Chat templates expect arguments as an object;
    OpenAI has them as JSON text, and ShareGPT has the whole call as JSON text."""
    calls = []
    for call in objects(m[key], key):
        function, outer = objects(call.get("function") or call, key)[0], call if "function" in call else {}
        arguments = from_json(function.get("arguments"), "arguments") or {}
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError(f"{key!r} should be calls with a name and an object of arguments, found {str(call)[:60]!r}")
        calls.append({"type": "function", **outer, "function": {**function, "arguments": arguments}})
    return calls


def extras(m: dict) -> dict:
    """The fields of a message, besides role and content, that a chat template may use."""
    more = {key: m[key] for key in ("name", "tool_call_id") if m.get(key)}
    if (key := first_of(CALLS, m)) and m[key]:
        more["tool_calls"] = called(m, key)
    if (key := first_of(REASONING, m)) and m[key]:
        more |= dict.fromkeys(REASONING[:2], text_field(m, key))
    return more


def messages_field(row: dict, key: str) -> list[dict]:
    """Messages with OpenAI's or ShareGPT's keys, and the other fields that a chat template may use; content given as text parts
    is joined; a single message counts as a list of one."""
    value = [row[key]] if isinstance(row[key], dict) else row[key]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise ValueError(f"{key!r} should be text or a list of messages, found {str(row[key])[:60]!r}")
    messages = []
    for m in value:
        role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        role = role.lower() if isinstance(role, str) else role
        if role == "function_call":
            m, content = {**m, "function_call": content}, None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content):
            content = "".join(part.get("text") or part.get("value") or "" for part in content)
        more = extras(m) | {"trained": False for flag in FLAGS if m.get(flag) in (False, 0)}
        said = isinstance(content, str) or content is None and "tool_calls" in more
        if not isinstance(role, str) or role not in ROLES or not said:
            raise ValueError(f"{key!r} should hold messages with role (one of {', '.join(ROLES)}) and content, "
                             f"found {str(m)[:80]!r}")
        messages.append({"role": ROLES[role], "content": content, **more})
    return messages


def text_or_messages(row: dict, key: str) -> str | list[dict]:
    return row[key] if isinstance(row[key], str) else messages_field(row, key)


def as_messages(role: str, said: str | list) -> list[dict]:
    """Text becomes a list of one message with that role; messages are returned as they are."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def as_response(prompt: str | list, response: str | list) -> str | list:
    """The response in the form of its prompt: after messages, text becomes an assistant message."""
    if isinstance(prompt, list):
        return as_messages("assistant", response)
    if isinstance(response, list):
        raise ValueError("a text prompt with messages as its response; make both text or both messages")
    return response


def with_system(row: dict, prompt: str | list, chat: bool) -> str | list:
    """The prompt with the row's system column, if any, put before it, unless the prompt already has a system message."""
    key = first_of(("system", "system_prompt"), row)
    if not key or not row[key] or prompt and isinstance(prompt, list) and prompt[0]["role"] == "system":
        return prompt
    if isinstance(prompt, str) and (not chat or is_whole(prompt)):
        return f"{text_field(row, key)}\n\n{prompt}"
    return [*as_messages("system", text_field(row, key)), *as_messages("user", prompt)]


def split_messages(messages: list[dict], train_on: str) -> tuple[list, list]:
    """Conversation -> (prompt, response), which begins at the last assistant turn, or ("all") the first."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise ValueError("no assistant message to train on")
    first = turns[0] if train_on == "all" else turns[-1]
    return messages[:first], messages[first:turns[-1] + 1]


ALPACA = ("Below is an instruction that describes a task{0}. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{1}\n\n{2}### Response:\n")
QUESTIONS = ("instruction", "question", "problem", "query", "inputs", "input")  # a bare question, not yet formatted as a prompt
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", *CONVERSATIONS, *QUESTIONS)  # the prompt in rows whose responses are in other columns
ANSWERS = ("completion", "output", "response", "solution", "generated_solution", "answer", "targets")


def first_of(keys: tuple, row: dict) -> str | None:
    """The first key of the row with a non-empty value, or else the first that is present, or None."""
    there = [key for key in keys if key in row]
    return next((key for key in there if row[key]), there[0]) if there else None


def prompt_of(row: dict, chat: bool, keys: tuple = PROMPTS) -> str | list | None:
    """The prompt in the first of these columns, or None. chat: whether the tokenizer has a chat template; a question then becomes
    a user message, otherwise it stays text."""
    key = first_of(keys, row)
    if key == "instruction":
        return instruction_of(row, chat)
    if key in QUESTIONS and not isinstance(row[key], list):
        context = row.get("context")
        asked = "\n".join([text_field(row, key), *([context] if isinstance(context, str) and context else [])])
        return as_messages("user", asked) if chat else asked + "\n"
    return text_or_messages(row, key) if key else None


def instruction_of(row: dict, chat: bool) -> str | list:
    """Alpaca's {instruction, input} or Dolly's {instruction, context}, after LLaMA-Factory's history of [question, answer]."""
    task, more, history = text_field(row, "instruction"), first_of(("input", "context"), row), row.get("history") or []
    given = text_field(row, more) if more else ""
    if not isinstance(history, list) or not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in history):
        raise ValueError(f"'history' should be a list of [question, answer], found {str(history)[:60]!r}")
    if chat or history:
        before = [as_messages(role, said)[0] for pair in history for role, said in zip(("user", "assistant"), pair)]
        return [*before, *as_messages("user", f"{task}\n{given}" if given else task)]
    return ALPACA.format(", paired with an input that provides further context" * bool(given), task,
                         f"### Input:\n{given}\n\n" * bool(given))


def sft_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completion}, {messages}, alpaca {instruction, input, output}, ShareGPT {conversations}, other questions with
    answers, {text}, or the chosen side of a preference row."""
    if "chosen" in row:
        draft = preference_row(row, train_on, chat)
        return Draft(draft.prompt, draft.responses[:1], [True])
    if "prompt" in row and "completion" in row:
        keys, answer = ("prompt",), "completion"
    elif conversation := first_of(CONVERSATIONS, row):
        prompt, response = split_messages(with_system(row, messages_field(row, conversation), chat), train_on)
        return Draft(prompt, [response], [True])
    elif "text" in row and not ("instruction" in row and "output" in row):
        if part := first_of(("role", "parent_id", "code"), row):
            raise ValueError(f"'text' beside {part!r} looks like only one part of an example, but all of it would be trained; "
                             f"write it as prompt and completion, or as messages")
        return Draft("", [text_field(row, "text")], [True])
    else:  # a prompt beside an instruction is that instruction, formatted
        keys, answer = (*QUESTIONS[:-1], "prompt", QUESTIONS[-1]), first_of(ANSWERS, row)
    prompt = prompt_of(row, chat, keys)
    if prompt is None or not answer:
        raise ValueError(f"found keys {list(row)}; expected messages, conversations, text, or prompt and completion (or one of "
                         f"{', '.join(QUESTIONS)} and one of {', '.join(ANSWERS[1:])})")
    prompt = with_system(row, prompt, chat)
    return Draft(prompt, [as_response(prompt, text_or_messages(row, answer))], [True])


def shared_prompt(chosen: str | list, rejected: str | list) -> int:
    """Length of the prompt that two whole texts or conversations begin with: up to the last common '\\n\\nAssistant:'
    of an HH transcript, else the common words; for messages, the number in common, not counting either's last message."""
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, list):
        return min(common, len(chosen) - 1, len(rejected) - 1)
    mark = "\n\nAssistant:"
    if chosen.startswith("\n\nHuman:") and mark in chosen[:common]:
        return chosen.rfind(mark, 0, common) + len(mark)
    return max(chosen.rfind(" ", 0, common), chosen.rfind("\n", 0, common) + 1)  # a space belongs to the word after it


def like_a_prompt(value, length: int) -> bool:
    """Whether it is text of several words and more than `length` characters, or messages."""
    if isinstance(value, str):
        return " " in value.strip() and len(value) > length
    return isinstance(value, list) and any(isinstance(m, dict) and ({"role", "from"} & m.keys()) for m in value)


def is_whole(response: str | list) -> bool:
    """Whether the response includes its prompt: a whole conversation, or an HH transcript."""
    if isinstance(response, str):
        return response.startswith("\n\nHuman:")
    return bool(response) and response[0]["role"] in ("system", "user")


def ranked_row(row: dict, chat: bool) -> Draft:
    """{prompt, responses}: ranked best first; every two responses make a pair."""
    prompt, ranked = prompt_of(row, chat), row["responses"]
    if prompt is None or not isinstance(ranked, list) or len(ranked) < 2:
        raise ValueError(f"'responses' should be a list of at least two, best first, with a prompt; found {str(ranked)[:60]!r}")
    prompt = with_system(row, prompt, chat)
    ranked = [as_response(prompt, text_or_messages({"responses": r}, "responses")) for r in ranked]
    better, worse = zip(*itertools.combinations(range(len(ranked)), 2))
    return Draft(prompt, ranked, [True] + [False] * (len(ranked) - 1), [*better], [*worse], [0.0] * len(better))


def preference_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, chosen, rejected} as text or messages, or with a question; {chosen, rejected} as whole texts or conversations that
    share a prompt, HH transcripts included; ShareGPT {conversations, chosen, rejected}; each with a margin or without. Or a
    ranking."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing and "responses" in row:
        return ranked_row(row, chat)
    if missing:
        raise ValueError(f"found keys {list(row)}; expected chosen and rejected, and prompt or conversations beside them "
                         f"unless both begin with the prompt")
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    prompt = prompt_of(row, chat)
    if prompt is not None and isinstance(chosen, list):
        prompt = as_messages("user", prompt)
    if isinstance(prompt, list):
        chosen, rejected = (r[len(prompt):] if r[:len(prompt)] == prompt else r for r in (chosen, rejected))
    goes_on = isinstance(prompt, list) and prompt[-1]["role"] != "user"
    whole = [is_whole(r) for r in (chosen, rejected)]
    if prompt is None or any(whole) and not goes_on:
        if type(chosen) is not type(rejected):
            raise ValueError("'chosen' and 'rejected' should both be text or both be messages")
        length, own = shared_prompt(chosen, rejected), prompt
        if own is not None and not (all(whole) and length):
            raise ValueError("'chosen' and 'rejected' begin differently, at least one with a prompt; leave that to its own column")
        others = {k: v for k, v in row.items() if k not in ("chosen", "rejected") and v and isinstance(v, (str, list, dict))}
        if not length and others:
            raise ValueError(f"'chosen' and 'rejected' begin differently and no column is known as the prompt; found keys "
                             f"{list(row)}; rename that column to 'prompt', which may be empty")
        aside = [k for k, v in others.items() if like_a_prompt(v, length)] if own is None and not any(whole) else ()
        if aside:
            raise ValueError(f"'chosen' and 'rejected' share their first {length} characters (or messages), but {aside[0]!r} "
                             f"looks like the prompt: rename it to 'prompt', or remove it if it is something else")
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if isinstance(own, list) and own[-length:] == prompt:  # they repeat the end of it
            prompt = own
    prompt = with_system(row, prompt, chat)
    margin = row.get("margin") or 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) < 1e38:  # nor NaN
        raise ValueError(f"'margin' should be a number, found {str(margin)[:60]!r}")
    return Draft(prompt, [as_response(prompt, chosen), as_response(prompt, rejected)], [True, False], [0], [1], [float(margin)])


def kto_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completion, label}, {messages, label} (anything that sft takes, with a label: true is desirable); or a
    preference row, which gives one desirable and one undesirable response."""
    if "label" not in row:
        if "chosen" in row:
            return preference_row(row, train_on, chat)._replace(margin=[])
        raise ValueError(f"found keys {list(row)}; expected label beside prompt and completion or messages, or a preference row")
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise ValueError(f"'label' should be true or false, found {str(row['label'])[:60]!r}")
    draft, good = sft_row(row, train_on, chat), bool(row["label"])
    return draft._replace(demonstrated=[good], chosen=[0] * good, rejected=[0] * (not good))


class Step(NamedTuple):
    """A step of a solution; a response may be a list of them."""
    text: str
    label: float  # 1 is good, 0 is bad, nan is unlabelled


def step_label(value) -> float:
    if value is None:
        return math.nan
    if value in ("+", "-"):
        return float(value == "+")
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"a step's label should be true, false, '+', '-', a number from 0 to 1 or null, found {value!r:.40}")


def as_steps(texts: list, labels: list | None) -> list[Step]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"steps should be a list of one or more texts, none of them empty, found {str(texts)[:60]!r}")
    if not isinstance(labels, list) or len(labels) != len(texts):
        found = len(labels) if isinstance(labels, list) else labels
        raise ValueError(f"{len(texts)} steps and {found!r:.60} labels; expected one label per step")
    return [Step(text, step_label(label)) for text, label in zip(texts, labels)]


STEP_TAGS = ("\u043a\u0438", "<extra_0>", "<|step|>")  # what marks the end of a step in tagged text: Math-Shepherd's is the first


def tagged_steps(text: str, marked) -> tuple[str, list[Step]]:
    """Split text with a tag after each step; marked: the same text with + or - in place of the tags, or a list of labels."""
    tag = next((tag for tag in STEP_TAGS if tag in text), None)
    if tag is None:
        raise ValueError(f"'input' has none of the step tags {', '.join(STEP_TAGS)}")
    *pieces, tail = text.split(tag)
    labels, at = [], 0
    for piece in pieces if isinstance(marked, str) else []:
        if not marked.startswith(piece, at):
            raise ValueError(f"'label' should be 'input' with + or - in place of each {tag!r}; they differ at {piece[:40]!r}")
        at += len(piece)
        labels.append(marked[at:at + 1])
        at += 1
    if tail.strip() or isinstance(marked, str) and marked[at:].strip():
        more = (tail.strip() or marked[at:].strip())[:40]
        raise ValueError(f"there is text after the last {tag!r}: {more!r}; each step has to end in a tag")
    begin = max(pieces[0].find("Step 1"), 0)  # the problem stands before it
    prompt, pieces[0] = pieces[0][:begin].rstrip(" ") + "\n" * bool(begin), pieces[0][begin:]
    return prompt, as_steps([piece.strip() for piece in pieces], labels if isinstance(marked, str) else marked)


def rated_steps(steps: list[dict]) -> list[list[Step]]:
    """PRM800K: the path of chosen (or human) steps, and a response for every other completion, with the path before it
    unlabelled. Ratings: 1 and 0 (neutral) are good, -1 is bad."""
    rated = lambda c: Step(text_field(c, "text"), math.nan if c.get("rating") is None else float(c["rating"] >= 0))
    path, branches = [], []
    for step in steps:
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        branches += [[*(s._replace(label=math.nan) for s in path), rated(c)] for i, c in enumerate(completions) if i != chosen]
        taken = completions[chosen] if chosen is not None else step.get("human_completion")
        if not taken:
            break
        path.append(rated(taken))
    return [path, *branches] if path else branches


def prm_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completions: [...], labels: [...]}; tagged text {input, label} or {input, value} (Math-Shepherd); PRM800K;
    BIG-Bench Mistake {input, steps, mistake_index}: good up to the mistake, bad there, unlabelled after it."""
    if "completions" in row and "prompt" in row:
        prompt, responses = text_field(row, "prompt"), [as_steps(row["completions"], row.get("labels"))]
    elif "steps" in row and "mistake_index" in row:
        texts, wrong = row["steps"], row["mistake_index"]
        if wrong is not None and (type(wrong) is not int or not 0 <= wrong < len(texts)):
            raise ValueError(f"'mistake_index' should be null or an index from 0 into the {len(texts)} steps, found {wrong!r:.40}")
        labels = [1.0] * len(texts) if wrong is None else [1.0] * wrong + [0.0] + [None] * (len(texts) - wrong - 1)
        prompt, responses = text_field(row, "input") + "\n", [as_steps(texts, labels)]
    elif "input" in row and ("label" in row or "value" in row):
        prompt, steps = tagged_steps(text_field(row, "input"), row.get("label", row.get("value")))
        responses = [steps]
    elif isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict):
        prompt, responses = text_field(row["question"], "problem") + "\n", rated_steps(row["label"]["steps"])
    else:
        raise ValueError(f"found keys {list(row)}; expected prompt, completions and labels; input and label or value; "
                         f"input, steps and mistake_index; or PRM800K's question and label")
    return Draft(prompt, responses, [False] * len(responses))


def steps_row(row: dict, train_on: str, chat: bool) -> Draft:
    """Rows for scoring steps, not for training: as for prm, but labels may be missing (0.5 stands in for each)."""
    if "completions" in row and "labels" not in row:
        row = {**row, "labels": [None] * len(row["completions"])}
    draft = prm_row(row, train_on, chat)
    known = lambda step: step if step.label == step.label else step._replace(label=0.5)
    return draft._replace(responses=[[known(step) for step in steps] for steps in draft.responses])


def prompt_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt} as text or messages, or a question under another name. Other columns are kept for the reward or check."""
    beside = chat and any(isinstance(row.get(key), list) for key in CONVERSATIONS)  # messages that contain the prompt
    said = "prompt" in row and not (beside and isinstance(row["prompt"], str))
    prompt = prompt_of(row, chat, ("prompt", *QUESTIONS, *CONVERSATIONS) if said else (*CONVERSATIONS, *QUESTIONS))
    if prompt is None:
        raise ValueError(f"found keys {list(row)}; expected prompt, messages, {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}")
    if isinstance(prompt, list) and not (said and row["prompt"]) and prompt[-1]["role"] == "assistant":
        prompt = split_messages(prompt, "last")[0]
    if prompt == []:
        raise ValueError("no message before the assistant's, so there is no prompt")
    return Draft(with_system(row, prompt, chat), [], [])


FORMATS = {"sft": sft_row, "preference": preference_row, "kto": kto_row, "prm": prm_row, "steps": steps_row, "prompts": prompt_row}
TRAIN_ON = {"sft": "all", "preference": "last", "kto": "last", "prm": "all", "steps": "all",
            "prompts": "last"}  # the assistant turns that are trained, unless the config sets train_on

# ---------------------------------------------------------------------------------------------------------------------
# Tokens


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class Tokenizer:
    """tokenizer.json of a model folder, its special tokens, and its chat template in jinja2's sandbox."""

    def __init__(self, folder: Path, chat_template: str = ""):
        self.folder = Path(folder)
        if not (self.folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: no tokenizer.json there; put the model's own beside its weights, or, for the "
                             f"model to train, name a folder that has one: --tokenizer=FOLDER")
        self.fast = FastTokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.fast.no_padding()
        self.fast.no_truncation()
        path = self.folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        text = {kind: (t["content"] if isinstance(t := config.get(f"{kind}_token"), dict) else t) for kind in ("bos", "eos")}
        self.bos_token, self.eos_token = text["bos"] or "", text["eos"] or ""
        self.bos, self.eos = (self.fast.token_to_id(t) if t else None for t in (self.bos_token, self.eos_token))
        if self.eos is None:
            raise ValueError(f"{path}: eos_token is {text['eos']!r}; expected a token of tokenizer.json")
        self.adds_bos = self.bos is not None and config.get(
            "add_bos_token", self.fast.encode("a").ids[:1] == [self.bos])
        self.dummy_prefix = self.fast.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")  # SentencePiece
        files = (self.folder / name for name in ("generation_config.json", "config.json"))
        described = [read_json(file) for file in files if file.is_file()]
        ends = next((c["eos_token_id"] for c in described if c.get("eos_token_id") is not None), self.eos)
        self.stops = {self.eos, *(ends if isinstance(ends, list) else [ends])}  # what ends an answer
        self.special = {i for i, token in self.fast.get_added_tokens_decoder().items() if token.special}
        self.chat_template = self._template(chat_template, config)
        turn_end = self._turn_end() if self.chat_template else set()
        self.stops |= turn_end
        self.ends = turn_end and {self.eos, *turn_end}  # EOS ids that a saved model folder has to declare

    def _template(self, asked: str, config: dict) -> str:
        """The chat template that the config asks for (a file, or "chatml"), else the folder's own."""
        if asked == "chatml":  # without <|im_end|> in the vocabulary, EOS ends a turn
            return CHATML if self.fast.token_to_id("<|im_end|>") is not None else CHATML.replace("'<|im_end|>'", "eos_token")
        if asked:
            if not Path(asked).is_file():
                raise ValueError(f"chat_template {asked!r} is neither 'chatml' nor a file")
            return read_text(Path(asked))
        file, template = self.folder / "chat_template.jinja", config.get("chat_template") or ""
        if file.is_file():
            return read_text(file)
        if isinstance(template, list):  # several named ones
            template = {t["name"]: t["template"] for t in template}.get("default", "")
        return template

    def _turn_end(self) -> set[int]:
        """The special token that the chat template puts after an assistant turn: it ends an answer, whatever EOS is."""
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}], False)
        except ValueError:  # a template that wants more than that
            return set()
        behind = text.rpartition("zebra")[2].lstrip() if "zebra" in text else ""
        return {*self.fast.encode(behind, add_special_tokens=False).ids[:1]} & self.special

    def render(self, messages: list[dict], add_generation_prompt: bool, tools: list | None = None) -> str:
        if not self.chat_template:
            raise ValueError(f"messages need a chat template and {self.folder} has none; set chat_template to a file "
                             f"with one, or to 'chatml'")
        if any("tool_calls" in m for m in messages) and "tool_calls" not in self.chat_template:
            raise ValueError("a message has tool_calls, which the template does not read; set chat_template to a file that does")
        try:
            return compile_template(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools or None, documents=None,
                bos_token=self.bos_token, eos_token=self.eos_token)
        except Exception as error:  # a template is the user's code: say what it said
            raise ValueError(f"chat template: {type(error).__name__}: {error}") from None

    def continuation(self, text: str):
        """The encoding of text that follows other text: without the dummy prefix that SentencePiece puts first.
        Returns ids and the (begin, end) of each in characters."""
        encoded = self.fast.encode(text, add_special_tokens=False)
        if self.dummy_prefix:
            joined = self.fast.encode("\n" + text, add_special_tokens=False)
            kept = [i for i, (begin, end) in enumerate(joined.offsets) if end > 1]
            if kept and joined.offsets[kept[0]][0] >= 1:
                return [joined.ids[i] for i in kept], [(b - 1, e - 1) for b, e in (joined.offsets[i] for i in kept)]
        return encoded.ids, encoded.offsets

    def same_ids(self, other: "Tokenizer"):
        """An error unless every token of this one has the same id in the other (which may have more)."""
        ours, theirs = self.fast.get_vocab(), other.fast.get_vocab()
        for token in [token for token in ours if theirs.get(token) != ours[token]][:1]:
            raise ValueError(f"{other.folder}: token {token!r} has id {theirs.get(token)} there and {ours[token]} in "
                             f"{self.folder}; models that are used together need the same ids")

    def one(self, text: str) -> int:
        """The id of a text that is one token."""
        i = self.fast.token_to_id(text)
        ids = [i] if i is not None else self.continuation(text)[0]
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens in {self.folder}; it has to be one: change step_token/reward_tokens")
        return ids[0]

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(list(ids), skip_special_tokens=True)


@functools.lru_cache(maxsize=8)
def compile_template(source: str):
    """Compile as transformers does. {% generation %} marks the assistant's text; ignored here: spans are found by position."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", source))


class Example(NamedTuple):
    prompt: np.ndarray  # ids (int32), never empty: BOS, or EOS where there is no BOS
    responses: list  # arrays of ids (int32), one per response
    scored: list  # boolean masks, one per response: the tokens that are trained
    demonstrated: list
    chosen: list
    rejected: list
    margin: list
    where: str  # file:line
    labels: list = []  # step rows only, one array per response: the label at the step token after a labelled step, nan elsewhere
    row: dict | None = None  # prompts only: all columns, for a reward or a check
    truncated: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def with_responses(e: Example, responses: list) -> Example:
    """Its prompt with other responses (ids), all of them scored."""
    scored = [np.ones(len(ids), bool) for ids in responses]
    return e._replace(responses=responses, scored=scored, demonstrated=[False] * len(responses))


LARGE = 16384  # tokens: trees larger than this are cut, where cutting is allowed


def cut(e: Example, tokens: int) -> list[Example]:
    """Cut a tree into pieces of at most so many tokens, each with the prompt and at least one response."""
    hold = max(1, (tokens - len(e.prompt)) // max(map(len, e.responses)))
    return [e._replace(responses=e.responses[i:i + hold], scored=e.scored[i:i + hold], labels=e.labels[i:i + hold],
                       demonstrated=e.demonstrated[i:i + hold]) for i in range(0, len(e.responses), hold)]


def render(draft: Draft, tokenizer: Tokenizer, train_on: str, tools: list | None = None) -> tuple[str, list]:
    """A draft -> prompt text and, for each response, (text, character spans that are trained; None: all of it; or its steps).
    tools: the functions that may be called, for the chat template."""
    if isinstance(draft.prompt, str):
        bare = lambda r: r.rstrip() if r.rstrip().endswith(tokenizer.eos_token) else r  # whitespace after EOS is dropped
        return draft.prompt, [(bare(r), None) if isinstance(r, str) else ("".join(s.text for s in r), r) for r in draft.responses]
    rendered = functools.partial(tokenizer.render, tools=tools)
    if not draft.prompt and len(draft.responses) == 1 and not opens(draft.responses[0], rendered):
        turns = draft.responses[0]
        second = next((i for i, m in enumerate(turns) if i and m["role"] == "assistant"), len(turns))
        draft = draft._replace(prompt=turns[:second], responses=[turns[second:]])
    prompt = rendered(draft.prompt, add_generation_prompt=True)
    responses = []
    for turns in draft.responses:
        messages, spans, begin = draft.prompt + turns, [], len(prompt)
        text = rendered(messages, add_generation_prompt=False)
        trained = [i for i in range(len(draft.prompt), len(messages))
                   if messages[i]["role"] == "assistant" and messages[i].get("trained", True)]
        for i in trained if train_on == "all" else trained[-1:]:
            before = rendered(messages[:i], add_generation_prompt=True)
            after = rendered(messages[:i + 1], add_generation_prompt=False)
            if not (text.startswith(after) and after.startswith(before) and before.startswith(prompt)):
                raise ValueError("the chat template renders the same turns differently once a reply or more turns follow; "
                                 "train_on = 'last' helps if only earlier turns change, otherwise another chat_template")
            check_said(messages[i], after[len(before):])
            spans.append((len(before) - begin, len(after.rstrip()) - begin))  # templates put a newline after EOS
        if not spans:
            greeting = ", but for a greeting, which the chat template cannot prompt for" * (messages[0]["role"] == "assistant")
            raise ValueError(f"no assistant message to train on{greeting}")
        responses.append((text[begin:begin + spans[-1][1]], spans))
    return prompt, responses


def opens(messages: list[dict], rendered: Callable) -> bool:
    """Whether the template can prompt for the greeting that a conversation begins with; otherwise the greeting is context."""
    asked = [{"role": "user", "content": "a"}]
    try:
        header, text = rendered([], add_generation_prompt=True), rendered(messages[:1], add_generation_prompt=False)
        usual = rendered(asked, add_generation_prompt=True).removeprefix(rendered(asked, add_generation_prompt=False))
    except ValueError:  # a template that needs a message
        return False
    at_once = text[len(header):].lstrip().startswith((messages[0]["content"] or "").strip())
    return text.startswith(header) and (header.endswith(usual) if usual else at_once)


def check_said(m: dict, text: str):
    """Raise unless the text of a trained turn, as rendered, contains all that its message says, ignoring whitespace."""
    bare = lambda said: "".join((said or "").split())
    whole = bare(text)
    for key, parts in (("content", [m["content"]]), ("reasoning_content", [m.get("reasoning_content")]),
                       ("tool_calls", [call["function"]["name"] for call in m.get("tool_calls", ())])):
        if not all(bare(part) in whole for part in parts):
            raise ValueError(f"the chat template leaves out the {key} of a turn that is trained and writes only {text[:60]!r}; "
                             f"set chat_template to a file that keeps it")


def check_characters(text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[max(0, error.start - 20):error.end]!r} ends in half of a character, a lone surrogate") from None


def with_step_tokens(steps: list[Step], tokenizer: Tokenizer, step_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each step's ids followed by the step token -> ids, mask of the step tokens, labels at them (nan elsewhere)."""
    ids, ends, labels = [], [], []
    for step in steps:
        own = tokenizer.continuation(step.text)[0]
        ids += [*own, step_id]
        ends += [False] * len(own) + [True]
        labels += [math.nan] * len(own) + [step.label]
    return np.array(ids, np.int32), np.array(ends, bool), np.array(labels, np.float32)


def tokenize(drafts: list[tuple], tokenizer: Tokenizer, mode: str, counts: Counter, step_token: str = "\n") -> list[Example]:
    """[(where, draft, prompt text, responses of `render`)] -> examples. mode "joint": prompt + response are encoded
    as one text, and the ids split at the length of the prompt's own (where they do not begin with those, and in mode "apart",
    each is encoded by itself). BOS once; EOS once, after a complete response."""
    whole = lambda spans: not (spans and isinstance(spans[0], Step))  # steps are encoded one by one
    texts = [text for _, _, prompt, responses in drafts
             for text in (prompt, *(prompt + r for r, s in responses if whole(s) and (mode == "joint" or not prompt)))]
    encodings, examples = iter(tokenizer.fast.encode_batch(texts, add_special_tokens=False)), []
    for where, draft, prompt, responses in drafts:
        prompt_ids, all_ids, all_scored, all_labels = next(encodings).ids, [], [], []
        n = len(prompt_ids)
        for text, spans in responses:
            if not whole(spans):
                ids, scored, labels = with_step_tokens(spans, tokenizer, tokenizer.one(step_token))
                all_ids.append(ids)
                all_scored.append(scored)
                all_labels.append(labels)
                continue
            joint = next(encodings) if mode == "joint" or not prompt else None
            if joint and (joint_ids := joint.ids)[:n] == prompt_ids:
                ids, offsets, begin = joint_ids[n:], joint.offsets[n:] if spans else (), len(prompt)
            else:
                counts["apart"] += mode == "joint"
                (ids, offsets), begin = tokenizer.continuation(text), 0
            closed = text.endswith(tokenizer.eos_token) if spans is None else bool(ids) and ids[-1] in tokenizer.special
            scored = np.ones(len(ids) + (not closed), bool)
            if spans is not None:  # a token is trained if any of its characters is the assistant's
                starts, ends = np.array(offsets, int).reshape(-1, 2).T - begin
                scored[:len(ids)] = False
                for first, last in spans:
                    scored[:len(ids)] |= (ends > first) & (starts < last)
            all_ids.append(np.array(ids if closed else [*ids, tokenizer.eos], np.int32))
            all_scored.append(scored)
        text = isinstance(draft.prompt, str)  # a template writes its own BOS
        if text and tokenizer.adds_bos and prompt_ids[:1] != [tokenizer.bos] or not prompt_ids:
            prompt_ids = [tokenizer.eos if tokenizer.bos is None else tokenizer.bos, *prompt_ids]
        examples.append(Example(np.array(prompt_ids, np.int32), all_ids, all_scored, *draft[2:], where, all_labels))
    return examples


def truncate(example: Example, bos: int | None, max_length: int, max_prompt_length: int, how: str,
             counts: Counter) -> Example | None:
    """Fit prompt + each response into max_length tokens: the prompt is cut from the left (BOS stays, unless each turn begins with
    one) to max_prompt_length (0: what the longest response leaves, at least half of max_length), responses from the right.
    None: dropped, as are rows with nothing left to train."""
    length, longest = len(example.prompt), max(map(len, example.responses), default=0)
    room = min(max_length, max_prompt_length or max(max_length // 2, max_length - longest))
    if length > room or length + longest > max_length:
        if how == "error":
            raise ValueError(f"{example.where}: {length} prompt + {longest} response tokens do not fit max_length {max_length}, "
                             f"max_prompt_length {max_prompt_length}; raise them, or set truncation = 'cut' or 'drop'")
        if how == "drop":
            counts["dropped"] += 1
            return None
        counts["truncated"] += 1
        head = int(room > 1 and example.prompt[0] == bos and not (example.prompt[1:] == bos).any())
        prompt = np.concatenate([example.prompt[:head], example.prompt[head:][-(room - head):]])
        left = max_length - len(prompt)
        example = example._replace(prompt=prompt, responses=[ids[:left] for ids in example.responses],
                                   scored=[mask[:left] for mask in example.scored],
                                   labels=[labels[:left] for labels in example.labels], truncated=True)
    nothing = example.labels and all(np.isnan(labels).all() for labels in example.labels)  # a step may be unlabelled, not all
    if nothing or not all(mask.any() for mask in example.scored):
        counts["dropped"] += 1
        return None
    return example


COUNTS = ("read", "used", "truncated", "dropped", "bad", "apart")  # apart: joint ids did not begin with the prompt's


def counted(counts: Counter) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in COUNTS)


class Stored(Sequence):
    """Examples in an unnamed temporary file in a folder, so that they need not fit in memory: each is a JSON header, padded with
    spaces to a multiple of 4 bytes, and then its arrays."""

    def __init__(self, folder: str):
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.file, self.ends = tempfile.TemporaryFile(dir=path), array.array("q", [0])
        except OSError as error:
            raise ValueError(f"cache_dir {folder}: {error.strerror}; name another --cache_dir") from None

    def append(self, e: Example):
        sizes = [len(ids) for ids in e.responses]
        told = [len(e.prompt), sizes, bool(e.labels), e.demonstrated, e.chosen, e.rejected, e.margin, e.where, e.row, e.truncated]
        head = json.dumps(told).encode()
        head += b" " * (-len(head) % 4)
        whole = b"".join([len(head).to_bytes(4, "little"), head, e.prompt, *e.responses, *e.labels, *e.scored])
        self.ends.append(self.ends[-1] + self.file.write(whole))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        begin, end = self.ends[i], self.ends[i + 1]
        self.file.flush()
        held = os.pread(self.file.fileno(), end - begin, begin)
        at = 4 + int.from_bytes(held[:4], "little")
        prompt, sizes, labelled, *more, where, row, truncated = json.loads(held[4:at])

        def take(n, dtype):
            nonlocal at
            at += n * np.dtype(dtype).itemsize
            return np.frombuffer(held, dtype, n, at - n * np.dtype(dtype).itemsize)
        prompt, *responses = (take(n, np.int32) for n in (prompt, *sizes))
        labels = [take(n, np.float32) for n in sizes] if labelled else []
        return Example(prompt, responses, [take(n, bool) for n in sizes], *more, where, labels, row, truncated)


class Dataset(NamedTuple):
    examples: Sequence
    lengths: np.ndarray  # (len,) tokens of each example
    offsets: np.ndarray  # (len + 1,) scored tokens before each example: where its columns lie in a flat table
    pair_offsets: np.ndarray  # (len + 1,) pairs before each example
    kinds: np.ndarray  # (len,) which classes an example has: 1 undesirable (or rejected) responses, 2 desirable ones, 3 both
    counts: Counter  # of rows: COUNTS

    def __len__(self):
        return len(self.examples)


def sizes_of(e: Example) -> tuple[int, int, int, int]:
    """An example's numbers of tokens, scored tokens and pairs, and its kind (`Dataset.kinds`)."""
    return e.length, sum(np.count_nonzero(mask) for mask in e.scored), len(e.chosen), 2 * bool(e.chosen) + bool(e.rejected)


def as_dataset(examples: Sequence, counts: Counter, sizes: Sequence = ()) -> Dataset:
    """sizes: the `sizes_of` all examples, concatenated, where they are already known."""
    sizes = np.array(sizes or [n for e in examples for n in sizes_of(e)], np.int64)
    lengths, scored, pairs, kinds = sizes.reshape(-1, 4).T
    before = lambda sizes: np.concatenate([[0], np.cumsum(sizes)])
    return Dataset(examples, lengths, before(scored), before(pairs), kinds, counts)


def load(paths: str | list[str], kind: str, tokenizer: Tokenizer, cfg, show: bool = True) -> Dataset:
    """Read, tokenize and truncate every row; a malformed one stops the run unless bad_rows = "skip"."""
    if kind not in FORMATS:
        raise ValueError(f"rows of kind {kind!r} are not known; known: {', '.join(FORMATS)}")
    train_on, chat, counts = cfg.train_on or TRAIN_ON[kind], bool(tokenizer.chat_template), Counter()
    examples, sizes, drafts, rows, longest_prompt = Stored(cfg.cache_dir), array.array("q"), [], {}, cfg.max_prompt_length
    columns, noted = set(), set()  # columns that the rows have, and columns that were read
    if kind == "prompts":  # the answer wants room
        longest_prompt = min(longest_prompt or cfg.max_length, cfg.max_length - cfg.max_new_tokens)
        if longest_prompt < 1:
            raise ValueError(f"max_length = {cfg.max_length} must hold a prompt and its answer, and max_new_tokens = "
                             f"{cfg.max_new_tokens} leaves nothing for the prompt; raise max_length or lower max_new_tokens")

    def flush():
        for example in tokenize(drafts, tokenizer, cfg.tokenize, counts, cfg.step_token):
            example = truncate(example, tokenizer.bos, cfg.max_length, longest_prompt, cfg.truncation, counts)
            if example is not None:
                examples.append(example._replace(row=rows.get(example.where)) if rows else example)
                sizes.extend(sizes_of(example))
        drafts.clear()
        rows.clear()

    for where, row in read_rows(paths, show):
        counts["read"] += 1
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
            nulls = kind in ("prm", "steps") or None not in row.values()  # elsewhere, a null is a missing column
            noting = Noting(row if nulls else {k: v for k, v in row.items() if v is not None})
            draft = FORMATS[kind](noting, train_on, chat)
            with_tools = isinstance(draft.prompt, list) and "tools" in tokenizer.chat_template
            tools = objects(noting["tools"], "tools") if with_tools and noting.get("tools") else None
            columns |= noting.keys()
            noted |= noting.read
            prompt, responses = render(draft, tokenizer, train_on, tools)
            check_characters("".join([prompt, *(text for text, _ in responses)]))
            drafts.append((where, draft, prompt, responses))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            if cfg.bad_rows == "skip":
                counts["bad"] += 1
                continue
            said = error
            if isinstance(error, json.JSONDecodeError):
                known = re.search(r"\.jsonl?(\.gz)?[:\[]\d+\]?$", where)
                said = f"not JSON: {error.msg} at character {error.pos}" + "; expected .jsonl or .json" * (not known)
            if not isinstance(error, (ValueError, RecursionError)):
                at = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(at.filename).name}:{at.lineno}"
                said = f"{type(error).__name__}: {error} ({at}); a field may be missing or have the wrong type"
            raise ValueError(f"{where}: {said}; bad_rows = 'skip' leaves such rows out") from None
        if not draft.responses:
            rows[where] = {**row, "prompt": draft.prompt}
        if len(drafts) == 1024:
            flush()
    flush()
    counts["used"], named = len(examples), paths if isinstance(paths, str) else ", ".join(paths)
    if show and kind != "steps":
        noted -= {"margin"}.difference(*(OBJECTIVES[name].reads for name in cfg.weights))  # a loss has to read it, too
        lost = (columns - noted) & ({"tools"} if kind == "prompts" else columns)  # of prompts, others are for the reward
        if lost:
            print(f"{named}: columns that are not read: {', '.join(sorted(lost))}", file=sys.stderr)
    if not examples:
        raise ValueError(f"{named}: no usable row is left ({counted(counts)})")
    return as_dataset(examples, counts, sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def steps(cfg, per_epoch: int) -> int:
    """The optimizer steps of a run."""
    return cfg.max_steps or math.ceil(cfg.epochs * per_epoch)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    return -(-len(dataset) // batch_size)


def epoch_order(dataset: Dataset, epoch: int, seed: int) -> np.ndarray:
    """Indices of all examples, shuffled anew in each epoch, desirable and undesirable rows interleaved evenly by their shares."""
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    kinds, turn = dataset.kinds[order], np.empty(len(order))
    for members in (np.flatnonzero(kinds == kind) for kind in np.unique(kinds)):
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(turn, kind="stable")]


def step_rows(dataset: Dataset, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Indices of the examples of an optimizer step: a function of (seed, step). The last step of an epoch is what is left."""
    epoch, at = divmod(step, steps_per_epoch(dataset, batch_size))
    return epoch_order(dataset, epoch, seed)[at * batch_size:(at + 1) * batch_size]


def mismatched(dataset: Dataset, seed: int, epoch: int) -> Dataset:
    """Each prompt with random responses of other prompts instead of its own: KTO estimates its KL on these. The draw is a
    function of (seed, epoch, row). Responses are cut so that no prompt + response, and no tree, is longer than the longest
    one in the dataset."""
    longest = max(len(e.prompt) + max(map(len, e.responses)) for e in dataset.examples)
    largest = int(dataset.lengths.max())
    prompts = [e.prompt.tobytes() for e in dataset.examples]
    if len(set(prompts)) < 2:
        raise ValueError(f"{dataset.examples[0].where}: every row has this row's prompt, and KTO needs responses of other prompts")
    made = []
    for i, e in enumerate(dataset.examples):
        rng, responses = np.random.default_rng((seed, epoch, i)), []
        for _ in e.responses:
            j = i
            while prompts[j] == prompts[i]:
                j = int(rng.integers(len(prompts)))
            other = dataset.examples[j]
            k = int(rng.integers(len(other.responses)))
            room = max(1, min(longest - len(e.prompt), (largest - len(e.prompt)) // len(e.responses)))
            responses.append((other.responses[k][:room], other.scored[k][:room]))
        ids, scored = map(list, zip(*responses))
        made.append(e._replace(responses=ids, scored=scored))
    return as_dataset(made, dataset.counts)


def in_order(dataset: Dataset, size: int = 256) -> list[np.ndarray]:
    """Indices of all examples in order, split into chunks that are packed together: for passes that do not train."""
    return np.split(np.arange(len(dataset)), range(size, len(dataset), size))


def stream_length(datasets: list[Dataset], batch_size: int, asked: int, answers: int = 0, answer: int = 0) -> int:
    """T: as asked, or (0) a multiple of 128 that holds the largest tree and, up to 4,096 tokens, most whole steps (9/8 of the mean
    step). answers, answer: how many answers each prompt is yet to get, of at most how many tokens; such trees may be cut down
    to one answer each, so that T is then at most LARGE, if that holds a prompt with one answer."""
    largest = max((d.examples[d.lengths.argmax()] for d in datasets), key=lambda e: e.length)
    least = largest.length + answer
    if asked and asked < least:
        raise ValueError(f"{largest.where}: a prompt with its responses takes {least} tokens and "
                         f"micro_batch_tokens is {asked}; set it to {-(-least // 128) * 128} or to 0, or lower max_length")
    step = math.ceil(9 / 8 * batch_size * (datasets[0].lengths.mean() + answers * answer))
    whole = largest.length + answers * answer
    return asked or -(-max(least, min(whole, LARGE) if answer else whole, min(4096, step)) // 128) * 128


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: bins of indices whose lengths add up to at most capacity."""
    bins, left = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b, room in enumerate(left) if room >= lengths[i]]
        if not fits:
            bins.append([])
            left.append(capacity)
        b = min(fits, key=lambda b: left[b]) if fits else -1
        bins[b].append(i)
        left[b] -= lengths[i]
    return bins


def shared(lengths: list[int], ranks: int) -> list[list[int]]:
    """Each rank's share of the indices: the next longest goes to the rank that has the fewest tokens."""
    shares, fewest = [[] for _ in range(ranks)], [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = fewest[0]
        shares[rank].append(i)
        heapq.heapreplace(fewest, (tokens + lengths[i], rank))
    return shares


def count(examples: Iterable[Example]) -> dict[str, int]:
    """Counts over a whole step; each loss's sum is divided by one of them."""
    total = Counter()
    for e in examples:
        scored = [int(mask.sum()) for mask in e.scored]
        total.update(stream_tokens=e.length, tokens=sum(scored), responses=len(scored),
                     demonstrated_tokens=sum(n for n, shown in zip(scored, e.demonstrated) if shown),
                     demonstrations=sum(e.demonstrated), pairs=len(e.chosen), examples=1,
                     steps=sum(int((~np.isnan(labels)).sum()) for labels in e.labels))
    return dict(total)


class Layout(NamedTuple):
    """How a stream is laid out: fixed for a run."""
    tokens: int  # T
    varlen: bool  # index tensors for the variable-length CUDA kernel, not for grouped SDPA
    static: bool  # pad T to a multiple of 128, for kernels that are compiled
    device: str


def varlen(device: str, dtype: torch.dtype) -> bool:
    """Whether the variable-length attention kernel supports this device and dtype."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16)


def micro_batches(dataset: Dataset, rows: np.ndarray, layout: Layout, rank: int = 0, world: int = 1):
    """This rank's share of a step's examples, packed, and the counts over all ranks.

    A rank without a share gets a stream with nothing to score, so that it takes part in every collective.
    """
    examples = [dataset.examples[i] for i in rows]
    mine = [(int(rows[i]), examples[i]) for i in shared([e.length for e in examples], world)[rank]]
    streams = pack([e.length for _, e in mine], layout.tokens) or [[]]
    return [build([mine[i] for i in stream], dataset, layout) for stream in streams], count(examples)


def build(members: list[tuple[int, Example]], dataset: Dataset, layout: Layout) -> dict:
    """Examples of one stream -> its tensors (T,), (N,), (R,), (P,) and, on the host, its sizes and members. last (R,): index of a
    response's last token; example, rank (R,): its example and its index in it; own (N,): index of a scored token itself."""
    tokens, positions, spans = [], [], []  # a span: begin, length; begin and length of the prompt it also sees
    columns = {"predict_from": [], "own": [], "target": [], "response": [], "place": [], "scored_index": []}
    lengths, last, chosen, rejected, margin, pair_index, of, rank, at = [], [], [], [], [], [], [], [], 0
    for nth, (index, e) in enumerate(members):
        begin, n, seen = at, len(e.prompt), int(dataset.offsets[index])
        tokens.append(e.prompt)
        positions.append(np.arange(n))
        spans.append((begin, n, begin, 0))
        at += n
        chosen += [len(lengths) + i for i in e.chosen]
        rejected += [len(lengths) + i for i in e.rejected]
        margin += e.margin
        pair_index += range(dataset.pair_offsets[index], dataset.pair_offsets[index + 1])
        of += [nth] * len(e.responses)
        rank += range(len(e.responses))
        for ids, scored in zip(e.responses, e.scored):
            places = np.flatnonzero(scored)
            before = at + places - 1  # a token is predicted one place before itself, the first one at the prompt's end
            before[places == 0] = begin + n - 1
            columns["predict_from"].append(before)
            columns["own"].append(at + places)
            columns["target"].append(ids[places])
            columns["response"].append(np.full(len(places), len(lengths)))
            columns["place"].append(np.arange(len(places)))
            columns["scored_index"].append(seen + np.arange(len(places)))
            tokens.append(ids)
            positions.append(n + np.arange(len(ids)))
            spans.append((at, len(ids), begin, n))
            at, seen = at + len(ids), seen + len(places)
            lengths.append(len(places))
            last.append(at - 1)
    length = min(-(-max(at, 1) // 128) * 128, layout.tokens) if layout.static else max(at, 1)
    for start in range(at, length, 128):  # padding: separate segments that no scored token sees
        n = min(128, length - start)
        tokens.append(np.zeros(n, np.int32))
        positions.append(np.arange(n))
        spans.append((start, n, start, 0))
    flat = {name: np.concatenate([np.zeros(0, np.int64), *parts]) for name, parts in columns.items()}
    labels = [labels[scored] for _, e in members for labels, scored in zip(e.labels, e.scored)]
    labels = np.concatenate([*labels, np.full(sum(lengths) - sum(map(len, labels)), np.nan, np.float32)]).astype(np.float32)
    whole = dict(lengths=lengths, last=last, example=of, rank=rank, rows=[members[nth][0] for nth in of], chosen=chosen,
                 rejected=rejected, pair_index=pair_index)
    flat.update(tokens=np.concatenate(tokens).astype(np.int64), positions=np.concatenate(positions),
                **{name: np.array(values, np.int64) for name, values in whole.items()}, margin=np.array(margin, np.float32),
                step_labels=labels, step_mask=~np.isnan(labels),
                demonstrated=np.array([shown for _, e in members for shown in e.demonstrated], bool))
    known = {"num_responses": len(lengths), "longest": max(lengths, default=1), "num_examples": len(members),
             "most_responses": max((len(e.responses) for _, e in members), default=1), "members": [i for i, _ in members]}
    flat.update((varlen_segments if layout.varlen else grouped_segments)(spans))
    return {**known, **to_device(flat, layout.device)}


def to_device(values: dict, device: str) -> dict:
    moved = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    if device == "cuda":
        moved = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}


def varlen_segments(spans: list) -> dict:
    """Index tensors for the variable-length kernel: gather indices of keys, cumulative lengths padded to a multiple of 64."""
    lengths_q = [n for _, n, _, _ in spans]
    lengths_k = [n + shared for _, n, _, shared in spans]
    key_index = np.concatenate([np.r_[p:p + shared, b:b + n] for b, n, p, shared in spans])
    pad = -(len(spans) + 1) % 64
    cu_q, cu_k = (np.pad(np.cumsum([0, *lengths]), (0, pad), mode="edge").astype(np.int32) for lengths in (lengths_q, lengths_k))
    up = lambda n: 1 << (n - 1).bit_length()
    return {"key_index": key_index, "cu_q": cu_q, "cu_k": cu_k, "max_q": up(max(lengths_q)), "max_k": up(max(lengths_k))}


def grouped_segments(spans: list) -> dict:
    """Index tensors for grouped attention: segments whose query and key lengths round up to the same sizes share one padded
    call; a segment's offset is the number of keys before its first query. Prompts have a query for each key, and long responses
    after short prompts are padded with queries to have one too: offset 0, and no mask needed if there is no sliding window."""
    groups = {}
    for span in spans:
        _, n, _, shared = span
        square = shared == 0 or n + shared > 768 and n >= 4 * shared  # measured: padding queries cost less than padding keys
        groups.setdefault((square, rounded(n + square * shared), rounded(n + shared)), []).append(span)
    index_q, index_k, shapes, offsets, at = [], [], [], [], 0
    inverse = np.empty(sum(span[1] for span in spans), np.int64)
    for (square, _, _), members in groups.items():
        begin, n, prompt, shared = np.array(members).T[..., None]  # (B, 1) each
        first = square * shared  # place of the first query that is not padding
        length_q, length_k = int((n + first).max()), int((n + shared).max())
        place = np.arange(length_k)
        own = np.where(place < shared + n, begin + place - shared, prompt)
        index_k.append(np.where(place < shared, prompt + place, own).ravel())
        place = np.arange(length_q) - first
        real = (place >= 0) & (place < n)
        index_q.append(np.where(real, begin + place, begin).ravel())
        inverse[(begin + place)[real]] = at + np.flatnonzero(real)
        at += real.size
        shapes.append((len(members), length_q, length_k))
        offsets.append((shared - first)[:, 0])
    return {"group_q": np.concatenate(index_q), "group_k": np.concatenate(index_k), "group_inverse": inverse,
            "group_offset": np.concatenate(offsets), "groups": shapes, "masks": {}}


def rounded(length: int) -> int:
    """Round up to the next of 8, 12, 16, 24, 32, 48, 64, ...: above 8, to less than 1.5 times the length."""
    power = 1 << max(3, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 8 else power


if __name__ == "__main__":
    import signal

    import preview
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
    preview.main(sys.argv[1:])
