"""Draft -> Example: text or messages become token ids. Which tokens are trained is decided in `tokenize`, by position, never by
comparing ids with pad or eos."""
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from model import read_json, read_text
from parts.formats import Draft, Step


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

    def same_ids(self, other: "Tokenizer", resized: bool = False):
        """An error unless every token of this one has the same id in the other (which may have more). resized: the other
        may lack a token whose id is behind all of its own; its model gets a new row for it."""
        ours, theirs = self.fast.get_vocab(), other.fast.get_vocab()
        last = max(theirs.values()) if resized else math.inf
        for token in ours:
            new = token not in theirs and ours[token] > last
            if theirs.get(token) == ours[token] or new:
                continue
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
