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

    def __init__(self, folder: Path, chat_template: str = "", chat_template_kwargs: dict | None = None):
        """chat_template: a file, or "chatml"; default: the folder's own. chat_template_kwargs: variables of the template, such as
        enable_thinking."""
        self.folder, self.chat_template_kwargs = Path(folder), chat_template_kwargs or {}
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
        self.turn_end = self._turn_end() if self.chat_template else ""
        ends = {*self.fast.encode(self.turn_end, add_special_tokens=False).ids[:1]} & self.special
        self.stops |= ends  # the special token after an assistant's turn ends an answer, whatever EOS is
        self.ends = ends and {self.eos, *ends}  # EOS ids that a saved model folder has to declare

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

    def _turn_end(self) -> str:
        """What the chat template puts after an assistant's turn, without the whitespace around it."""
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}], False)
        except ValueError:  # a template that wants more than that
            return ""
        return text.rpartition("zebra")[2].strip() if "zebra" in text else ""

    def render(self, messages: list[dict], add_generation_prompt: bool, tools: list | None = None,
               options: dict | None = None) -> str:
        """The messages in the chat template. options: variables of the template for these messages alone."""
        if not self.chat_template:
            raise ValueError(f"messages need a chat template and {self.folder} has none; set chat_template to a file "
                             f"with one, or to 'chatml'")
        if any("tool_calls" in m for m in messages) and "tool_calls" not in self.chat_template:
            raise ValueError("a message has tool_calls, which the template does not read; set chat_template to a file that does")
        variables = {**self.chat_template_kwargs, **(options or {}), "add_generation_prompt": add_generation_prompt,
                     "tools": tools or None, "documents": None, "bos_token": self.bos_token, "eos_token": self.eos_token}
        silent = [m for m in messages if not m["content"] and "tool_calls" in m]
        if not silent:
            return self._rendered(messages, variables)

        # A turn that only calls functions has no content: some templates want a text there, others test for none.
        as_text = [m | {"content": ""} if m["content"] is None else m for m in messages]
        as_none = [m | {"content": None} if m in silent else m for m in messages]
        names = [call["function"]["name"] for m in silent for call in m["tool_calls"]]
        try:
            text = self._rendered(as_text, variables)
        except ValueError:
            return self._rendered(as_none, variables)
        if all(name in text for name in names):
            return text
        try:
            return self._rendered(as_none, variables)
        except ValueError:
            return text

    def _rendered(self, messages: list[dict], variables: dict) -> str:
        try:
            return compile_template(self.chat_template).render(messages=messages, **variables)
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
    turn: int = 0  # of a row whose assistant turns are examples of their own: which one it is, from 1

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


def renderings(draft: Draft, tokenizer: Tokenizer, train_on: str, tools: list | None = None, options: dict | None = None
               ) -> list[tuple]:
    """[(draft, *render(draft))]: a single one. A chat template may render a turn in another way once others follow it (it drops
    earlier reasoning, or marks the last turn); then one for each trained turn, each after its own history, as the model will
    meet it when it answers. tools: the functions that may be called; options: variables of the template."""
    continues = isinstance(draft.prompt, list) and continued(draft)
    template = functools.partial(tokenizer.render, tools=tools, options=options)
    draft = with_greeting(draft, template)
    rendered = render(draft, tokenizer, train_on, tools, options, continues)
    if rendered is not None:
        return [(draft, *rendered)]
    if len(draft.responses) > 1 or draft.chosen or draft.rejected:
        raise ValueError("the chat template renders the same turns differently once a reply or more turns follow; "
                         "train_on = 'last' helps if only earlier turns change, otherwise another chat_template")
    messages, parts = draft.prompt + draft.responses[0], []
    for turn, i in enumerate(trained_turns(messages, len(draft.prompt), train_on), 1):
        part = Draft(messages[:i], [[messages[i]]], draft.demonstrated, turn=turn)
        parts.append((part, *render(part, tokenizer, train_on, tools, options)))
    return parts


def render(draft: Draft, tokenizer: Tokenizer, train_on: str, tools: list | None = None, options: dict | None = None,
           continues: bool = False) -> tuple[str, list] | None:
    """A draft -> prompt text and, for each response, (text, character spans that are trained; None: all of it; or its steps).
    None if one text cannot hold all trained turns as the template renders each of them. continues: the prompt's last message is
    the beginning of the assistant's turn."""
    if isinstance(draft.prompt, str):
        bare = lambda r: r.rstrip() if r.rstrip().endswith(tokenizer.eos_token) else r  # whitespace after EOS is dropped
        spans = draft.spans or [None] * len(draft.responses)
        return draft.prompt, [(bare(r), trained) if isinstance(r, str) else ("".join(s.text for s in r), r)
                              for r, trained in zip(draft.responses, spans)]
    template = functools.partial(tokenizer.render, tools=tools, options=options)
    history, prefill = draft.prompt, ""
    if continues:
        history, prefill = draft.prompt[:-1], draft.prompt[-1]["content"]
        prompt = begun(draft.prompt, template)
    else:
        prompt = template(draft.prompt, add_generation_prompt=True)
    responses = []
    for turns in draft.responses:
        if continues:
            turns = [{**draft.prompt[-1], **turns[0], "content": prefill + (turns[0]["content"] or "")}, *turns[1:]]
        response = render_response(history, turns, prompt, prefill, template, tokenizer.turn_end, train_on)
        if response is None:
            return None
        responses.append(response)
    return prompt, responses


def continued(draft: Draft) -> bool:
    """Whether the prompt's last message is the beginning of the assistant's answer, which each response continues."""
    last = draft.prompt[-1] if draft.prompt else {"role": ""}
    return last["role"] == "assistant" and "tool_calls" not in last and all(r[0]["role"] == "assistant" for r in draft.responses)


def begun(messages: list[dict], template: Callable) -> str:
    """The messages up to the end of the last one, which begins the assistant's turn: what it says follows the generation prompt
    (without the tag that already opens a thought there). Where there is none, it is cut out of the rendered messages."""
    history, prefill = messages[:-1], messages[-1]["content"]
    if history and not messages[-1].get("reasoning_content"):
        header = template(history, add_generation_prompt=True)
        if header != template(history, add_generation_prompt=False):
            rest = answer_after(header, {"content": prefill}, "")
            return header + (prefill if rest is None else rest)
    text = template(messages, add_generation_prompt=False)
    for words in (prefill, prefill.rstrip(), prefill.strip()):  # a template may strip what a message says
        if words and words in text:
            return text[:text.rindex(words) + len(words)]
    raise ValueError(f"the chat template leaves out {prefill[:60]!r}, the beginning of the answer; set chat_template to a file "
                     f"that keeps it")


def trained_turns(messages: list[dict], begin: int, train_on: str) -> list[int]:
    """The indices, from `begin` on, of the assistant turns that are trained: all, or the last one."""
    turns = [i for i in range(begin, len(messages)) if messages[i]["role"] == "assistant" and messages[i].get("trained", True)]
    return turns if train_on == "all" else turns[-1:]


def render_response(history: list[dict], turns: list[dict], prompt: str, prefill: str, template: Callable, turn_end: str,
                    train_on: str) -> tuple[str, list] | None:
    """(text after the prompt, its trained spans in characters), up to the last trained turn. None if there are several trained turns
    and the template renders one of them in another way once others follow. prefill: the part of the first turn that the prompt
    holds. turn_end: what the template puts after a turn."""
    messages = history + turns
    trained = trained_turns(messages, len(history), train_on)
    if not trained:
        greeting = messages[0]["role"] == "assistant"
        but = ", but for a greeting, which the chat template cannot prompt for" if greeting else ""
        raise ValueError(f"no assistant message to train on{but}")
    messages = messages[:trained[-1] + 1]
    text, spans = template(messages, add_generation_prompt=False), []
    for i in trained:
        first, last = i == len(history), i == trained[-1]
        before = prompt if first else template(messages[:i], add_generation_prompt=True)
        after = text if last else template(messages[:i + 1], add_generation_prompt=False)
        fits = text.startswith(after) and after.startswith(before) and before.startswith(prompt)
        if first and prefill and fits:  # the template may write more than the message between the two
            fits = squeezed(after[len(before):]).startswith(squeezed(messages[i]["content"][len(prefill):]))
        missing = left_out(messages[i], after[len(before):]) if fits else ""
        if missing:  # the generation prompt may hold the beginning of it
            header = template(messages[:i], add_generation_prompt=False)
            missing = left_out(messages[i], after[len(header):]) if after.startswith(header) else missing
        if fits and not missing:
            spans.append((len(before) - len(prompt), len(after.rstrip()) - len(prompt)))  # templates put a newline after EOS
            continue
        if len(trained) > 1:
            return None
        answer = answer_after(before, messages[i], prefill if first else "")
        if answer is not None and before.startswith(prompt):
            text = before + answer + turn_end
            spans.append((len(before) - len(prompt), len(text) - len(prompt)))
        elif missing:
            raise ValueError(f"the chat template leaves out the {missing} of a turn that is trained and writes only "
                             f"{after[len(before):][:60]!r}; set chat_template to a file that keeps it")
        else:
            raise ValueError(f"the chat template renders a turn differently from what it prompts for: it writes "
                             f"{after[-60:]!r} where its generation prompt ends in {before[-40:]!r}; if that opens a thought, write "
                             f"the turn's (as reasoning_content, or before the content), or set another chat_template")
    return text[len(prompt):len(prompt) + spans[-1][1]], spans


def answer_after(before: str, m: dict, prefill: str) -> str | None:
    """What the assistant's message says after a text that ends in its first words: a prefill, or the tag that opens a thought in the
    template's generation prompt. None if the message does not begin so."""
    tag = re.search(r"<[^<>\s]+>\s*$", before)
    opening = prefill or (tag[0].strip() if tag else "")
    whole = m["content"] or ""
    if m.get("reasoning_content") and not prefill:
        whole = f"{opening}\n{m['reasoning_content']}\n</{opening[1:]}\n\n{whole}"
    whole = whole if prefill else whole.lstrip()
    if "tool_calls" in m or not opening or not whole.startswith(opening):
        return None
    rest = whole[len(opening):]
    return rest.lstrip("\n") if before.endswith("\n") and not prefill else rest


def with_greeting(draft: Draft, template: Callable) -> Draft:
    """The draft itself; or, if its conversation begins with a greeting that the template cannot prompt for, the same with the
    greeting as context: in the prompt, together with all that comes before the assistant's second turn."""
    if draft.prompt or not isinstance(draft.prompt, list) or len(draft.responses) != 1 or opens(draft.responses[0], template):
        return draft
    turns = draft.responses[0]
    second = next((i for i, m in enumerate(turns) if i and m["role"] == "assistant"), len(turns))
    return draft._replace(prompt=turns[:second], responses=[turns[second:]])


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


def left_out(m: dict, text: str) -> str:
    """The field of a trained turn's message that its rendered text does not hold whole, whitespace ignored; "" if none."""
    whole = squeezed(text)
    fields = {"content": [m["content"]], "reasoning_content": [m.get("reasoning_content")],
              "tool_calls": [call["function"]["name"] for call in m.get("tool_calls", ())]}
    for field, parts in fields.items():
        if not all(squeezed(part) in whole for part in parts):
            return field
    return ""


def squeezed(text: str | None) -> str:
    """The text without whitespace."""
    return "".join((text or "").split())


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
            if not prompt_ids and ids[:1] == [tokenizer.bos]:  # the prompt will be BOS
                ids, offsets = ids[1:], offsets[1:]
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
        examples.append(Example(np.array(prompt_ids, np.int32), all_ids, all_scored, draft.demonstrated, draft.chosen,
                                draft.rejected, draft.margin, where, all_labels, turn=draft.turn))
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
