"""Row -> Draft: the common form of all row formats, as text or as messages. A new format is one branch of a function in `FORMATS`."""
import itertools
import json
import math
import re
from typing import NamedTuple


class Draft(NamedTuple):
    """A row in the common form of all formats: text, or lists of {role, content} messages for the chat template."""
    prompt: str | list
    responses: list
    demonstrated: list  # for each response: whether it is to be imitated
    chosen: list = []  # indices of responses: pair i prefers chosen[i] to rejected[i]; in rows with a label, chosen has the
    rejected: list = []  # desirable responses, and rejected the undesirable ones
    margin: list = []  # one per pair
    turn: int = 0  # of a conversation that is split into its assistant turns: which one it is, from 1


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
    while first - 1 in turns:  # an assistant's turn before it is whole, and no beginning of this one
        first -= 1
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


def is_transcript(text: str) -> bool:
    """Whether it is a conversation in the form of HH: turns of Human and Assistant."""
    return "\n\nHuman:" in text and "\n\nAssistant:" in text


def as_conversation(draft: Draft) -> Draft:
    """A draft of text as messages: the prompt is the user's (of an HH transcript, each turn its speaker's), the responses are the
    assistant's. Text without a prompt, and steps, stay text."""
    if not isinstance(draft.prompt, str) or not draft.prompt.strip() or not all(isinstance(r, str) for r in draft.responses):
        return draft
    if is_transcript(draft.prompt):
        first, *turns = re.split(r"\n\n(Human|Assistant):", draft.prompt)
        messages = as_messages("system", first.strip()) if first.strip() else []
        for speaker, words in zip(turns[::2], turns[1::2]):
            messages += as_messages("user" if speaker == "Human" else "assistant", words.strip())
        messages = messages[:-1] if messages[-1]["content"] == "" else messages
    else:
        messages = as_messages("user", draft.prompt.strip())
    return draft._replace(prompt=messages, responses=[as_messages("assistant", r.strip()) for r in draft.responses])


FORMATS = {"sft": sft_row, "preference": preference_row, "kto": kto_row, "prm": prm_row, "steps": steps_row, "prompts": prompt_row}
TRAIN_ON = {"sft": "all", "preference": "last", "kto": "last", "prm": "all", "steps": "all",
            "prompts": "last"}  # the assistant turns that are trained, unless the config sets train_on
