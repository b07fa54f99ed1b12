"""Row -> Draft: the common form of all row formats, as text or as messages. A new format is one branch of a function in `FORMATS`; a
data set whose columns have other names is a line of `DATA_SETS`."""
import ast
import contextlib
import copy
import functools
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
    spans: list = []  # text responses that are trained in part: for each, [(begin, end)] in characters; None: all of it


def text_field(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} should be a string, found {type(row[key]).__name__}: {str(row[key])[:60]!r}")
    return row[key]


ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "environment", "tool_response"), "tool"),
}
CALLERS = ("function_call", "tool_call")  # roles whose content is a function call
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of an assistant's reasoning before its content
CALLS = ("tool_calls", "function_call", "function_calls")  # keys of its function calls: a list, or a single one
FLAGS = ("train", "loss", "weight", "loss_weight", "loss_mask", "mask")  # keys that exclude a turn from training if false or 0; it
# stays as context
MESSAGE_KEYS = {"role", "from", "content", "value", "name", "tool_call_id", *REASONING, *CALLS, *FLAGS}  # keys that are read


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


def python_calls(text: str) -> list[dict]:
    """Function calls as Python writes them, such as f(a=1), one a line or in a list. Empty if the text is something else."""
    try:
        nodes = [statement.value for statement in ast.parse(text.strip()).body]
        nodes = nodes[0].elts if len(nodes) == 1 and isinstance(nodes[0], ast.List) else nodes
        if any(node.args for node in nodes):
            return []
        return [{"name": ast.unparse(node.func), "arguments": {k.arg: ast.literal_eval(k.value) for k in node.keywords}}
                for node in nodes]
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        return []


def called(m: dict, key: str) -> list[dict]:
    """A message's function calls, each as {type, function: {name, arguments}}. Chat templates expect arguments as an object;
    OpenAI has them as JSON text, ShareGPT has the whole call as JSON text, and others write Python."""
    value, calls = m[key], []
    if isinstance(value, str):
        value = python_calls(value) or value
    for call in objects(value, key):
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


def decoded(value):
    """Messages that are written as text, as JSON or as Python prints them, become messages; any other value stays as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or not ("role" in value or "from" in value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            messages = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if are_messages(messages if isinstance(messages, list) else [messages]):
            return messages
    return value


MAY_BE_EMPTY = ("rejected", "responses")  # columns of answers that are compared: one that says nothing can lose


def are_messages(values: list) -> bool:
    """Whether these are objects with a role that is known and something said."""
    for m in values:
        role = m.get("role", m.get("from")) if isinstance(m, dict) else None
        if not isinstance(role, str) or role.lower() not in ROLES or not {"content", "value", *CALLS} & m.keys():
            return False
    return bool(values)


def messages_field(row: dict, key: str) -> list[dict]:
    """Messages with OpenAI's or ShareGPT's keys, and the other fields that a chat template may use; content given as text parts
    is joined; a single message counts as a list of one; a list of texts is a conversation that the user begins."""
    value = decoded(row[key])
    value = [value] if isinstance(value, dict) else value
    if key in CONVERSATIONS and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        value = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(value)]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise ValueError(f"{key!r} should be text or a list of messages, found {str(row[key])[:60]!r}")
    return [message_of(m, key) for m in value]


def message_of(m: dict, key: str) -> dict:
    """A message as {role, content} and the other fields that are read."""
    role, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
    role = role.lower() if isinstance(role, str) else role
    if role in CALLERS:
        m, content = {**m, "function_call": content}, None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type", "text") == "text" for part in content):
        content = "".join(part.get("text") or part.get("value") or "" for part in content)
    more = extras(m) | {"trained": False for flag in FLAGS if m.get(flag) in (False, 0)}
    says = "tool_calls" in more or "reasoning_content" in more
    if not isinstance(role, str) or role not in ROLES or not (isinstance(content, str) or content is None and says):
        raise ValueError(f"{key!r} should hold messages with role (one of {', '.join(ROLES)}) and content, "
                         f"found {str(m)[:80]!r}")
    if ROLES[role] == "assistant" and not (says or content.strip()) and key not in MAY_BE_EMPTY and more.get("trained", True):
        raise ValueError(f"{key!r} holds a message in which the assistant says nothing, found {str(m)[:80]!r}; give it content or "
                         f"tool_calls, or leave it out")
    return {"role": ROLES[role], "content": content if content is not None or "tool_calls" in more else "", **more}


def text_or_messages(row: dict, key: str) -> str | list[dict]:
    value = decoded(row[key])
    return value if isinstance(value, str) else messages_field({key: value}, key)


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
    if key in QUESTIONS and not isinstance(decoded(row[key]), list):
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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def with_columns(row: dict, columns: dict) -> dict:
    """The row with other columns besides. What is read of it counts as read of the row."""
    row = copy.copy(row)
    row.update(columns)
    return row


def meaning(row: dict, key: str, meanings: dict) -> float:
    """What a column's value means."""
    value = row[key]
    if isinstance(value, (dict, list)) or value not in meanings:
        raise ValueError(f"{key!r} should be one of {', '.join(map(repr, meanings))}, found {value!r:.60}")
    return meanings[value]


def number(row: dict, key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e38:  # nor NaN
        raise ValueError(f"{key!r} should be a number, found {value!r:.60}")
    return float(value)


def two(row: dict, first: str, second: str, preference: float) -> dict:
    """Two responses. preference: positive where the first is better, negative where the second is, 0 for a tie."""
    return {"responses": [row[first], row[second]], "scores": [preference, 0.0]}


def by_side(row: dict, side: str) -> dict:
    """PKU-SafeRLHF: the column `side` has the index of the better response."""
    return two(row, "response_0", "response_1", meaning(row, side, {0: 1, 1: -1}))


def helpsteer2(row: dict) -> dict:
    """A prompt of several turns has <extra_id_1> and a speaker's name between them."""
    question, *turns = re.split(r"\n*<extra_id_1>(User|Assistant)\n", text_field(row, "prompt"))
    messages = as_messages("user", question) if question else []
    for speaker, words in zip(turns[::2], turns[1::2]):
        messages += as_messages(speaker.lower(), words)
    asked = {"prompt": messages} if turns else {"prompt": "", "question": question}
    return asked | two(row, "response_1", "response_2", -number(row, "preference_strength"))


def graded(row: dict, key: str, text: str, grade: str) -> dict:
    """A list of objects that have a text and a grade each."""
    answers = objects(row[key], key)
    if not all(text in answer and grade in answer for answer in answers):
        raise ValueError(f"{key!r} should be a list of objects with {text!r} and {grade!r}, found {str(row[key])[:60]!r}")
    grades = [answer[grade] for answer in answers]
    return {"responses": [answer[text] for answer in answers], "rank" if grade == "rank" else "scores": grades}


def nectar(row: dict) -> dict:
    """A prompt that ends in "Assistant: ", and ranked answers, whose first space that is."""
    if not isinstance(row["answers"], list) or not all(isinstance(a, dict) and "rank" in a for a in row["answers"]):
        return {}
    ranking, prompt = graded(row, "answers", "answer", "rank"), text_field(row, "prompt")
    bare = prompt.rstrip(" ")
    return {"prompt": bare, **ranking, "responses": [prompt[len(bare):] + answer for answer in ranking["responses"]]}


def glaive(row: dict) -> dict:
    """Conversations as text: USER:, ASSISTANT: and FUNCTION RESPONSE: begin a turn, and <|endoftext|> ends the assistant's. Calls of
    functions stay text, as the system's description of them is."""
    first, *turns = re.split(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", text_field(row, "chat"))
    if first.strip() or not turns:
        raise ValueError(f"'chat' should be turns that begin with USER: or ASSISTANT:, found {row['chat'][:60]!r}")
    roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    said = [words.strip().removesuffix("<|endoftext|>").strip() for words in turns[1::2]]
    messages = [{"role": roles[speaker], "content": words} for speaker, words in zip(turns[::2], said)]
    return {"messages": messages, "system": text_field(row, "system").strip().removeprefix("SYSTEM:").strip()}


def after_context(row: dict) -> dict:
    """Messages that come before the prompt, or are the prompt. Before a conversation they are not trained."""
    key, context = first_of(PROMPTS, row) or "prompt", []
    if row["context_messages"]:
        context = messages_field(row, "context_messages")
    if key in CONVERSATIONS:
        conversation = decoded(row[key])
        return {key: [{**m, "train": False} for m in context] + conversation}
    return {key: context + (as_messages("user", prompt_of(row, True)) if row.get(key) else [])}


DATA_SETS = {  # name -> columns that tell it, and a function: row -> the same in columns that are read below
    "PKU-SafeRLHF": (("response_0", "response_1", "better_response_id"), lambda row: by_side(row, "better_response_id")),
    "PKU-SafeRLHF, safety alone": (("response_0", "response_1", "safer_response_id"), lambda row: by_side(row, "safer_response_id")),
    "HelpSteer2-preference": (("prompt", "response_1", "response_2", "preference_strength"), helpsteer2),
    "HelpSteer3": (("context", "response1", "response2", "overall_preference"), lambda row: {
        "prompt": row["context"], **two(row, "response1", "response2", -number(row, "overall_preference"))}),
    "UltraFeedback": (("instruction", "completions"), lambda row: graded(row, "completions", "response", "overall_score")),
    "Nectar": (("prompt", "answers"), nectar),
    "UltraInteract_pair": (("trajectory", "chosen", "rejected"), lambda row: {"prompt": row["trajectory"]}),
    "SHP": (("history", "human_ref_A", "human_ref_B", "labels"), lambda row: {
        "question": row["history"], **two(row, "human_ref_A", "human_ref_B", meaning(row, "labels", {1: 1, 0: -1}))}),
    "stack-exchange-paired": (("question", "response_j", "response_k"), lambda row: two(row, "response_j", "response_k", 1)),
    "lmarena": (("conversation_a", "conversation_b", "winner"), lambda row: two(
        row, "conversation_a", "conversation_b", meaning(row, "winner", WINNERS))),
    "xlam-function-calling": (("query", "answers", "tools"), lambda row: {"messages": [
        {"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": row["answers"]}]}),
    "glaive-function-calling": (("system", "chat"), glaive),
    "context_messages": (("context_messages",), after_context),
}
WINNERS = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}


@functools.lru_cache(maxsize=256)
def data_set(columns: tuple) -> tuple | None:
    """The columns and the function of the data set that has these columns."""
    return next((known for known in DATA_SETS.values() if set(known[0]) <= set(columns)), None)


def as_known(row: dict) -> dict:
    """The row of a data set in columns that are known, in place of its own; any other row as it is."""
    known = data_set(tuple(row))
    columns = known[1](row) if known else {}
    if not columns:
        return row
    row = with_columns(row, columns)
    for key in {*known[0]} - columns.keys() - {"chosen", "rejected", *PROMPTS}:
        del row[key]
    return row


def is_comparison(row: dict) -> bool:
    """Whether the row has responses to compare."""
    return "chosen" in row or "responses" in row


def kind_of(row: dict) -> str:
    """The kind of rows that this one is if nothing else says so: "preference" where responses are compared, otherwise "sft"."""
    row = {key: value for key, value in row.items() if value is not None}
    with contextlib.suppress(ValueError, LookupError, TypeError):  # a bad row: reading it as either kind says so
        row = as_known(row)
    return "preference" if is_comparison(row) else "sft"


def unknown(row: dict, expected: str, *columns: str) -> str:
    """What to say of a row in no known format. columns: those that it could be converted to."""
    texts = [key for key, value in row.items() if isinstance(value, str)]
    given = ", ".join(f"{column}=r[{key[:20]!r}]" for column, key in zip(columns, [*texts, *columns]))
    keys = str(list(row))
    return (f"found keys {keys if len(keys) < 200 else keys[:200] + '...'}; expected {expected}. To convert, with the right names: "
            f'python -c "import json, sys; [print(json.dumps(dict({given}))) for r in map(json.loads, sys.stdin)]" < OLD > NEW')


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations


def sft_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completion}, {messages}, alpaca {instruction, input, output}, ShareGPT {conversations}, other questions with
    answers, {text}, or the best side of a preference row."""
    row = as_known(row)
    if "chosen" in row or is_comparison(row) and not first_of(("text", *CONVERSATIONS, *ANSWERS), row):
        return best_side(preference_row(row, train_on, chat))
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
        raise ValueError(unknown(row, f"messages, conversations, text, or prompt and completion (or one of "
                                      f"{', '.join(QUESTIONS)} and one of {', '.join(ANSWERS[1:])})", "prompt", "completion"))
    prompt, (response,) = without_prompt(prompt, [text_or_messages(row, answer)])
    prompt = with_system(row, prompt, chat)
    return last_turns(Draft(prompt, [as_response(prompt, response)], [True]))


def best_side(draft: Draft) -> Draft:
    """Of compared responses, the best. Where all are tied, none is: all stay, and nothing to imitate."""
    if not draft.chosen:
        return draft
    best = draft.chosen[0]
    return Draft(draft.prompt, [draft.responses[best]], [True], spans=draft.spans[best:best + 1])


# ---------------------------------------------------------------------------------------------------------------------
# Preferences


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # what begins the turns of a transcript in the form of HH


def is_transcript(text: str) -> bool:
    """Whether it is a conversation in the form of HH: turns of Human and Assistant."""
    return HUMAN in text and ASSISTANT in text


def shared_prompt(chosen: str | list, rejected: str | list) -> int:
    """Length of the prompt that two whole texts or conversations begin with: up to the last common '\\n\\nAssistant:'
    of an HH transcript, else the common words; for messages, the number in common, not counting either's last message. Where they
    part at a turn that is not the assistant's, up to the assistant's before it; 0 if there is none."""
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, list):
        common = min(common, len(chosen) - 1, len(rejected) - 1)
        while common and not chosen[common]["role"] == rejected[common]["role"] == "assistant":
            common -= 1
        return common
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        mark = chosen.rfind(ASSISTANT, 0, common)
        return mark + len(ASSISTANT) if mark >= 0 else 0
    return max(chosen.rfind(" ", 0, common), chosen.rfind("\n", 0, common) + 1)  # a space belongs to the word after it


def like_a_prompt(value, length: int) -> bool:
    """Whether it is text of several words and more than `length` characters, or messages."""
    if isinstance(value, str):
        return " " in value.strip() and len(value) > length
    return isinstance(value, list) and any(isinstance(m, dict) and ({"role", "from"} & m.keys()) for m in value)


def is_whole(response: str | list) -> bool:
    """Whether the response includes its prompt: a whole conversation, or an HH transcript."""
    if isinstance(response, str):
        return response.startswith(HUMAN)
    return bool(response) and response[0]["role"] in ("system", "user")


def without_prompt(prompt: str | list | None, responses: list) -> tuple:
    """(prompt, responses without it where they repeat it): messages one by one; text where all responses begin with it, not counting
    the whitespace at its end, and one goes on. That it is no chance, as in "Hi" and "Hi!", takes a prompt of three words, or
    one that ends in : or =, and no word that begins in the prompt and ends in a response."""
    if isinstance(prompt, list):
        return prompt, [r[len(prompt):] if r[:len(prompt)] == prompt else r for r in responses]
    bare = prompt.rstrip() if prompt else ""
    if not bare or not isinstance(responses[0], str) or not responses[0].startswith(bare):
        return prompt, responses
    if not all(isinstance(r, str) and r.startswith(bare) for r in responses):
        return prompt, responses
    head = prompt if all(r.startswith(prompt) for r in responses) else bare
    rests = [r[len(head):] for r in responses]
    to_complete = len(head.split()) > 2 or bare.endswith((":", "="))
    inside_word = head[-1:].isalnum() and any(rest[:1].isalnum() for rest in rests)
    return (head, rests) if to_complete and any(rests) and not inside_word else (prompt, responses)


def last_turns(draft: Draft) -> Draft:
    """If responses to an HH transcript go on with further turns, the last Assistant's turn of each is trained, as of messages. (Only
    that, whatever train_on is: nothing but EOS could end an earlier one.)"""
    if not isinstance(draft.prompt, str) or not is_transcript(draft.prompt) or not any(HUMAN in r for r in draft.responses):
        return draft
    responses, spans = [], []
    for text in draft.responses:
        begin = text.rfind(ASSISTANT)
        end = text.find(HUMAN, max(begin, 0))
        text = text[:end] if end >= 0 else text
        responses.append(text)
        spans.append(None if begin < 0 else [(begin + len(ASSISTANT), len(text))])
    return draft._replace(responses=responses, spans=spans)


def with_beginning(row: dict, prompt: str | list, chat: bool) -> str | list:
    """The prompt with the beginning of the answer behind it, which every response continues: Step-DPO's initial_reason_steps."""
    if "initial_reason_steps" not in row:
        return prompt
    beginning = text_field(row, "initial_reason_steps")
    if isinstance(prompt, str) and not chat:
        return f"{prompt}\n{beginning}"
    return as_messages("user", prompt) + (as_messages("assistant", beginning) if beginning else [])


SCORES, RANKS = ("scores", "ratings", "rewards"), ("rank", "ranks")  # columns beside responses: more is better, or less


def scores_of(row: dict, count: int) -> list[float]:
    """A score for each of the responses; without a column of scores or ranks, they are ranked best first."""
    key = first_of((*SCORES, *RANKS), row)
    if key is None:
        return [float(-i) for i in range(count)]
    if not isinstance(row[key], list) or len(row[key]) != count:
        raise ValueError(f"{key!r} should be a list of {count} numbers, one for each of the responses, found {str(row[key])[:60]!r}")
    scores = [number({key: float(value) if isinstance(value, bool) else value}, key) for value in row[key]]
    return [-score for score in scores] if key in RANKS else scores


def ranked_row(row: dict, chat: bool) -> Draft:
    """{prompt, responses} with scores (or ratings, rewards; rank, where 1 is best), or else ranked best first; or responses that are
    whole conversations which begin with the same prompt. Every two of different scores make a pair, ties make none. The
    responses stay in the row's order."""
    prompt, responses = prompt_of(row, chat), row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"'responses' should be a list of at least two, best first or with scores, found {str(responses)[:60]!r}")
    responses = [text_or_messages({"responses": r}, "responses") for r in responses]
    scores = scores_of(row, len(responses))
    if prompt is None and all(isinstance(r, list) for r in responses):
        length = min(shared_prompt(responses[0], r) for r in responses[1:])
        if not length:
            raise ValueError(parted(responses, "responses"))
        prompt = responses[0][:length]
    if prompt is None:
        raise ValueError(unknown(row, "a prompt beside responses", "prompt", "responses"))
    prompt, responses = without_prompt(prompt, responses)
    prompt = with_beginning(row, with_system(row, prompt, chat), chat)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    pairs = [(a, b) for a, b in itertools.combinations(order, 2) if scores[a] > scores[b]]
    best = [score == max(scores) if pairs else False for score in scores]
    return last_turns(Draft(prompt, [as_response(prompt, r) for r in responses], best, [a for a, _ in pairs], [b for _, b in pairs],
                            [0.0] * len(pairs)))


def before_answer(response: str | list) -> list:
    """The turns of a response that come before the assistant's first; they are the prompt's."""
    messages = as_messages("assistant", response)
    return [*itertools.takewhile(lambda m: m["role"] != "assistant", messages)]


def parted(conversations: list, what: str) -> str:
    """What to say of conversations that differ in a turn of the system's or the user's before their answers."""
    first, other = next(((a, b) for c in conversations[1:] for a, b in zip(conversations[0], c) if a != b), ("", ""))
    return (f"{what} begin differently: {str(first)[:60]!r} and {str(other)[:60]!r}; responses that are compared need the "
            f"same prompt")


def preference_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, chosen, rejected} as text or messages, or with a question; {chosen, rejected} as whole texts or conversations that
    share a prompt, HH transcripts included; ShareGPT {conversations, chosen, rejected}; each with a margin or without. Or a
    ranking: {prompt, responses}, and chosen and rejected that are lists of texts (RewardBench 2)."""
    row = as_known(row)
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing and "responses" in row:
        return ranked_row(row, chat)
    if missing:
        raise ValueError(unknown(row, "chosen and rejected, and prompt or conversations beside them unless both begin with the "
                                      "prompt", "prompt", "chosen", "rejected"))
    if any(isinstance(row[side], list) and row[side] and isinstance(row[side][0], str) for side in ("chosen", "rejected")):
        good, bad = ([row[side]] if isinstance(row[side], str) else row[side] for side in ("chosen", "rejected"))
        return ranked_row(with_columns(row, {"responses": good + bad, "scores": [1.0] * len(good) + [0.0] * len(bad)}), chat)
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    prompt = prompt_of(row, chat)
    if prompt is not None and isinstance(chosen, list):
        prompt = as_messages("user", prompt)
    prompt, (chosen, rejected) = without_prompt(prompt, [chosen, rejected])
    goes_on = isinstance(prompt, list) and prompt[-1]["role"] != "user"
    whole = [is_whole(r) for r in (chosen, rejected)]
    if prompt is None or any(whole) and not goes_on:
        if type(chosen) is not type(rejected):
            raise ValueError("'chosen' and 'rejected' should both be text or both be messages")
        length, own = shared_prompt(chosen, rejected), prompt
        if own is not None and not (all(whole) and length):
            raise ValueError("'chosen' and 'rejected' begin differently, at least one with a prompt; leave that to its own column")
        if not length and any(whole):
            raise ValueError(parted([chosen, rejected], "'chosen' and 'rejected'"))
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
    elif goes_on and (before_answer(chosen) or before_answer(rejected)):
        turns = before_answer(chosen)
        if turns != before_answer(rejected):
            raise ValueError(parted([chosen, rejected], "'chosen' and 'rejected'"))
        prompt, chosen, rejected = prompt + turns, chosen[len(turns):], rejected[len(turns):]
    prompt = with_beginning(row, with_system(row, prompt, chat), chat)
    margin = number(row, "margin") if row.get("margin") else 0.0
    return last_turns(Draft(prompt, [as_response(prompt, chosen), as_response(prompt, rejected)], [True, False], [0], [1], [margin]))


def kto_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completion, label}, {messages, label} (anything that sft takes, with a label: true is desirable); or a preference row,
    which gives a desirable and an undesirable response: of a ranking, the best and the worst."""
    if "label" not in row:
        row = as_known(row)
        if is_comparison(row):
            return best_and_worst(preference_row(row, train_on, chat))
        raise ValueError(unknown(row, "label beside prompt and completion or messages, or a preference row", "prompt",
                                 "completion", "label"))
    if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        raise ValueError(f"'label' should be true or false, found {str(row['label'])[:60]!r}")
    draft, good = sft_row(row, train_on, chat), bool(row["label"])
    return draft._replace(demonstrated=[good], chosen=[0] * good, rejected=[0] * (not good))


def best_and_worst(draft: Draft) -> Draft:
    if not draft.chosen:  # all are tied
        return draft
    ends = draft.chosen[0], draft.rejected[-1]
    return draft._replace(responses=[draft.responses[i] for i in ends], demonstrated=[True, False], chosen=[0], rejected=[1],
                          margin=[], spans=[draft.spans[i] for i in ends] if draft.spans else [])


# ---------------------------------------------------------------------------------------------------------------------
# Steps


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


def steps_before(row: dict, wrong: str, none: int | None) -> list[Step]:
    """The row's steps: good before the first wrong one, bad there, unlabelled after it. wrong: the column with its index; none: what
    it holds if no step is wrong."""
    texts, first = row["steps"], row[wrong]
    if first == none:
        return as_steps(texts, [1.0] * len(texts))
    if type(first) is not int or not 0 <= first < len(texts):
        otherwise = "null" if none is None else none
        raise ValueError(f"{wrong!r} should be {otherwise} or an index from 0 into the {len(texts)} steps, found {first!r:.40}")
    return as_steps(texts, [1.0] * first + [0.0] + [None] * (len(texts) - first - 1))


def prm_row(row: dict, train_on: str, chat: bool) -> Draft:
    """{prompt, completions: [...], labels: [...]}; tagged text {input, label} or {input, value} (Math-Shepherd); PRM800K; and steps up
    to the first wrong one: BIG-Bench Mistake {input, steps, mistake_index}, ProcessBench {problem, steps, label}."""
    if "completions" in row and "prompt" in row:
        prompt, responses = text_field(row, "prompt"), [as_steps(row["completions"], row.get("labels"))]
    elif "steps" in row and "mistake_index" in row:
        prompt, responses = text_field(row, "input") + "\n", [steps_before(row, "mistake_index", None)]
    elif "problem" in row and "steps" in row and "label" in row:
        prompt, responses = text_field(row, "problem") + "\n", [steps_before(row, "label", -1)]
    elif "input" in row and ("label" in row or "value" in row):
        prompt, steps = tagged_steps(text_field(row, "input"), row.get("label", row.get("value")))
        responses = [steps]
    elif isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict):
        prompt, responses = text_field(row["question"], "problem") + "\n", rated_steps(row["label"]["steps"])
    else:
        raise ValueError(unknown(row, "prompt, completions and labels; input and label or value; input, steps and mistake_index; "
                                      "problem, steps and label; or PRM800K's question and label", "prompt", "completions", "labels"))
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
    row = as_known(row) if not first_of(PROMPTS, row) or "context_messages" in row else row
    beside = chat and any(isinstance(row.get(key), list) for key in CONVERSATIONS)  # messages that contain the prompt
    said = "prompt" in row and not (beside and isinstance(row["prompt"], str))
    prompt = prompt_of(row, chat, ("prompt", *QUESTIONS, *CONVERSATIONS) if said else (*CONVERSATIONS, *QUESTIONS))
    if prompt is None:
        raise ValueError(unknown(row, f"prompt, messages, {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}", "prompt"))
    if isinstance(prompt, list) and not (said and row["prompt"]) and prompt[-1]["role"] == "assistant":
        prompt = split_messages(prompt, "last")[0]
    if prompt == []:
        raise ValueError("no message before the assistant's, so there is no prompt")
    return Draft(with_system(row, prompt, chat), [], [])


def as_conversation(draft: Draft) -> Draft:
    """A draft of text as messages: the prompt is the user's (of an HH transcript, each turn its speaker's), the responses are the
    assistant's. Text without a prompt, and steps, stay text."""
    if not isinstance(draft.prompt, str) or not draft.prompt.strip() or not all(isinstance(r, str) for r in draft.responses):
        return draft
    if is_transcript(draft.prompt):
        prompt = turns_of(draft.prompt)
        prompt = prompt[:-1] if prompt[-1]["content"] == "" else prompt
        responses = [turns_of(ASSISTANT + r) for r in draft.responses]
    else:
        prompt = as_messages("user", draft.prompt.strip())
        responses = [as_messages("assistant", r.strip()) for r in draft.responses]
    return draft._replace(prompt=prompt, responses=responses, spans=[])


def turns_of(transcript: str) -> list[dict]:
    """An HH transcript's turns as messages; what stands before them is the system's."""
    first, *turns = re.split(r"\n\n(Human|Assistant):", transcript)
    messages = as_messages("system", first.strip()) if first.strip() else []
    for speaker, words in zip(turns[::2], turns[1::2]):
        messages += as_messages("user" if speaker == "Human" else "assistant", words.strip())
    return messages


FORMATS = {"sft": sft_row, "preference": preference_row, "kto": kto_row, "prm": prm_row, "steps": steps_row, "prompts": prompt_row}
TRAIN_ON = {"sft": "all", "preference": "last", "kto": "last", "prm": "all", "steps": "all",
            "prompts": "last"}  # the assistant turns that are trained, unless the config sets train_on
