"""Chat templates that reason, prefill and call: each turn is trained as the model will meet it when it answers."""
import json

import numpy as np
import pytest

import config
import data
import preview
from conftest import ROOT
from test_data import A, ARITHMETIC, LLAMA2, PLAIN, S, U, changed_tokenizer, load, one, runs, text_of, with_template, write

MARKS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
THOUGHT = ("{% set parts = m.content.split('</think>') %}{% set thought = m.reasoning_content or parts[0].split('<think>')[-1].strip('\\n') "
           "if m.reasoning_content or parts|length > 1 else '' %}")
LAST = ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}")
# Thoughts are written in the last turn alone, an empty one where there is none; enable_thinking = False prompts for an empty one.
QWEN3 = (LAST + MARKS + "{% if m.role == 'assistant' %}" + THOUGHT + "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}"
         "{% endif %}{{ parts[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
         "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
         "{% endif %}")
# The generation prompt opens a thought, which the turns themselves have only where they say one.
QWEN3_THINKING = (LAST + MARKS + "{% if m.role == 'assistant' %}" + THOUGHT + "{% if loop.index0 > ns.last and thought %}"
                  "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ parts[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
                  "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}")
# The generation prompt opens a thought, and no turn has one.
R1 = (MARKS + "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
      "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}")
CALLS = (MARKS + "{{ CONTENT }}{% for call in m.tool_calls or [] %}{{ call.function.name + '()' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def trained(tokenizer, e):
    return [runs(tokenizer, ids, scored) for ids, scored in zip(e.responses, e.scored)]


def whole(tokenizer, e, i=0):
    return text_of(tokenizer, [*e.prompt, *e.responses[i]])


# ---------------------------------------------------------------------------------------------------------------------
# Reasoning


@pytest.mark.parametrize("source, prompt, response", [
    (QWEN3, "<|im_start|>assistant\n", "<think>\nok\n</think>\n\n4<|im_end|>"),
    (QWEN3_THINKING, "<|im_start|>assistant\n<think>\n", "ok\n</think>\n\n4<|im_end|>"),
    (R1, "<|im_start|>assistant\n<think>\n", "ok\n</think>\n\n4<|im_end|>")])
@pytest.mark.parametrize("mode", ["joint", "apart"])
def test_a_thought_is_trained_from_where_the_prompt_ends(source, prompt, response, mode, chat, tmp_path):
    """Whether the message holds it as a field or in its content, and whether or not the generation prompt opens it."""
    tokenizer = with_template(tmp_path, chat, source)
    for m in (A("<think>\nok\n</think>\n\n4"), A("4") | {"reasoning_content": "ok"}):
        example, _ = one(tmp_path, {"messages": [U("2+2?"), m]}, tokenizer, tokenize=mode)
        assert text_of(tokenizer, example.prompt) == "<|im_start|>user\n2+2?<|im_end|>\n" + prompt
        assert trained(tokenizer, example) == [[response]]
    pair = {"prompt": "2+2?", "system": "", "chosen": "<think>\nok\n</think>\n\n4", "rejected": "<think>\nno\n</think>\n\n5"}
    example, _ = one(tmp_path, pair, tokenizer, "preference", tokenize=mode)
    assert trained(tokenizer, example) == [[response], [response.replace("ok", "no").replace("4", "5")]]


@pytest.mark.parametrize("source", [QWEN3_THINKING, R1])
def test_a_turn_without_the_thought_that_is_prompted_for(source, chat, tmp_path):
    """The model would have to answer inside its thought: an error that says how to write an empty one, which is trained."""
    tokenizer = with_template(tmp_path, chat, source)
    with pytest.raises(ValueError, match=r"row.jsonl:1: .*generation prompt ends in .*<think>.*"):
        one(tmp_path, {"messages": [U("2+2?"), A("4")]}, tokenizer)
    if source == R1:
        example, _ = one(tmp_path, {"messages": [U("2+2?"), A("<think>\n\n</think>\n\n4")]}, tokenizer)
        assert trained(tokenizer, example) == [["</think>\n\n4<|im_end|>"]]


@pytest.mark.parametrize("source, first, second", [
    (QWEN3, "<think>\na\n</think>\n\n2<|im_end|>", "<think>\nb\n</think>\n\n4<|im_end|>"),
    (QWEN3_THINKING, "a\n</think>\n\n2<|im_end|>", "b\n</think>\n\n4<|im_end|>"), (R1, "a\n</think>\n\n2<|im_end|>", "b\n</think>\n\n4<|im_end|>")])
def test_each_turn_is_an_example_where_the_template_rewrites_it(source, first, second, chat, tmp_path, capsys):
    """Both turns are trained, each after its own history: the second one's does not hold the first one's thought."""
    tokenizer = with_template(tmp_path, chat, source)
    messages = [U("1+1?"), A("<think>\na\n</think>\n\n2"), U("2+2?"), A("<think>\nb\n</think>\n\n4")]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    dataset = load(file, tokenizer)
    assert [trained(tokenizer, e)[0] for e in dataset.examples] == [[first], [second], [first]]
    assert [e.turn for e in dataset.examples] == [1, 2, 0] and [e.where[-1] for e in dataset.examples] == ["1", "1", "2"]
    assert dataset.counts["split"] == 1 and dataset.counts["used"] == dataset.counts["read"] + 1 and "1 split" in data.counted(dataset.counts)
    prompt = text_of(tokenizer, dataset.examples[1].prompt)
    history = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.removesuffix("<think>\n") == history
    assert "rows.jsonl:1 (turn 2)" in preview.row(dataset.examples[1], tokenizer)
    last = load(file, tokenizer, train_on="last")
    assert [trained(tokenizer, e)[0] for e in last.examples] == [[second], [first]] and last.counts["split"] == 0


def test_turns_without_thoughts_where_the_template_marks_the_last(chat, tmp_path):
    """An empty thought is written in the last turn alone; a turn that is excluded stays context."""
    tokenizer = with_template(tmp_path, chat, QWEN3)
    messages = [S("be brief"), U("1+1?"), A("2"), U("2+2?"), A("4") | {"loss": 0}, U("3+3?"), A("6")]
    dataset = load(write(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer)
    assert [trained(tokenizer, e)[0] for e in dataset.examples] == [["<think>\n\n</think>\n\n2<|im_end|>"], ["<think>\n\n</think>\n\n6<|im_end|>"]]
    assert "assistant\n4<|im_end|>" in text_of(tokenizer, dataset.examples[1].prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Options of the template


def test_variables_of_the_template(chat, tmp_path):
    """A row's, or the config's for all rows; the row's win; rollouts and templates that need them read them, too."""
    row, thinks = {"messages": [U("2+2?"), A("4")]}, "<think>\n\n</think>\n\n"
    tokenizer = with_template(tmp_path, chat, QWEN3)
    example, _ = one(tmp_path, row | {"chat_template_kwargs": {"enable_thinking": False}}, tokenizer)
    assert text_of(tokenizer, example.prompt).endswith(thinks) and trained(tokenizer, example) == [["4<|im_end|>"]]
    quick = data.Tokenizer(chat, str(tmp_path / "template.jinja"), {"enable_thinking": False})
    assert trained(quick, one(tmp_path, row, quick)[0]) == [["4<|im_end|>"]]
    assert text_of(quick, one(tmp_path, {"prompt": row["messages"][:1]}, quick, "prompts")[0].prompt).endswith(thinks)
    example, _ = one(tmp_path, row | {"chat_template_kwargs": {"enable_thinking": True}}, quick)
    assert trained(quick, example) == [[thinks + "4<|im_end|>"]]
    with pytest.raises(ValueError, match="row.jsonl:1: 'chat_template_kwargs' should be an object, found 'no'"):
        one(tmp_path, row | {"chat_template_kwargs": "no"}, tokenizer)
    assert config.load(["--chat_template_kwargs={'enable_thinking': False}"]).chat_template_kwargs == {"enable_thinking": False}


def test_variables_of_the_template_are_read(chat, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"messages": [U("1"), A("2")], "chat_template_kwargs": {"x": 1}}])
    data.load(file, "sft", with_template(tmp_path, chat, QWEN3), config.load([]))
    assert "not read" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Prefills and calls


@pytest.mark.parametrize("source, header", [
    (QWEN3, "<|im_start|>assistant\n"), (PLAIN.replace("'\n'", "'<|im_end|>\n'"), "assistant: "),
    (CALLS.replace("CONTENT", "m.content | trim"), "<|im_start|>assistant\n"), (LLAMA2, "[/INST] ")])
@pytest.mark.parametrize("prefill", ["Let me solve this.\n<think>", "Sure: ", "<think>\n"])
def test_a_prefill_is_continued(source, header, prefill, chat, tmp_path):
    """The prompt ends in the beginning of the answer, in rows that are trained and in rollouts; no turn is closed or opened there."""
    tokenizer = with_template(tmp_path, chat, source)
    asked = [U("2+2?"), A(prefill)]
    rollout, _ = one(tmp_path, {"prompt": asked}, tokenizer, "prompts")
    prompt = text_of(tokenizer, rollout.prompt)
    assert prompt.endswith(header + prefill) and prompt.count(prefill) == 1
    row = {"prompt": asked, "chosen": [A("ok\n</think>\n\n2 and 2 is 4.")], "rejected": "5"}
    example, _ = one(tmp_path, row, tokenizer, "preference")
    assert text_of(tokenizer, example.prompt) == prompt and trained(tokenizer, example) == [["ok\n</think>\n\n2 and 2 is 4.<|im_end|>"], ["5<|im_end|>"]]
    example, _ = one(tmp_path, {"prompt": asked, "completion": "4"}, tokenizer)
    assert text_of(tokenizer, example.prompt) == prompt and trained(tokenizer, example) == [["4<|im_end|>"]]


def test_a_prefill_behind_an_opened_thought(chat, tmp_path):
    """The tag that opens it is there once."""
    tokenizer = with_template(tmp_path, chat, R1)
    example, _ = one(tmp_path, {"prompt": [U("2+2?"), A("<think>\nhm")], "completion": "</think>4"}, tokenizer)
    assert text_of(tokenizer, example.prompt).endswith("assistant\n<think>\nhm") and trained(tokenizer, example) == [["</think>4<|im_end|>"]]


def test_a_prefill_that_the_template_leaves_out(chat, tmp_path):
    tokenizer = with_template(tmp_path, chat, "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match=r"row.jsonl:1: the chat template leaves out '<think>hm</think>', the beginning of the answer"):
        one(tmp_path, {"prompt": [U("2+2?"), A("<think>hm</think>")]}, tokenizer, "prompts")


def test_turns_that_follow_one_another_are_no_prefill(chat, tmp_path):
    """In a conversation, each assistant's message is a turn, whichever are trained."""
    tokenizer = with_template(tmp_path, chat, CALLS.replace("CONTENT", "m.content"))
    row = {"messages": [U("q"), A("a"), A("b")]}
    example, _ = one(tmp_path, row, tokenizer)
    assert trained(tokenizer, example) == [["a<|im_end|>", "b<|im_end|>"]]
    text, (example, _) = whole(tokenizer, example), one(tmp_path, row, tokenizer, train_on="last")
    assert whole(tokenizer, example) == text and trained(tokenizer, example) == [["b<|im_end|>"]]


@pytest.mark.parametrize("content", ["m.content | trim", "m.content.strip()", "m.content", "m['content'] + ''", "'' if m.content is none else m.content",
                                     "m.content if m.content is not none else ''"])
@pytest.mark.parametrize("empty", [None, ""])
def test_a_call_without_content(content, empty, chat, tmp_path):
    """Whatever the template does with content: nothing is written for what is not there, and never the word None."""
    tokenizer = with_template(tmp_path, chat, CALLS.replace("CONTENT", content))
    call = {"role": "assistant", "content": empty, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    example, _ = one(tmp_path, {"messages": [U("2+2?"), call, {"role": "tool", "content": "4"}, A("It is 4.")]}, tokenizer)
    assert trained(tokenizer, example) == [["add()<|im_end|>", "It is 4.<|im_end|>"]]


def test_a_call_that_is_written_only_where_content_is_none(chat, tmp_path):
    source = CALLS.replace("CONTENT", "m.content or ''").replace("m.tool_calls or []", "((m.tool_calls or []) if m.content is none else [])")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    tokenizer = with_template(tmp_path, chat, source)
    assert trained(tokenizer, one(tmp_path, {"messages": [U("2+2?"), call]}, tokenizer)[0]) == [["add()<|im_end|>"]]


# ---------------------------------------------------------------------------------------------------------------------
# Text and messages in one file


@pytest.mark.parametrize("given", [{"prompt": "Q?", "chosen": "A", "rejected": "B"}, {"system": None, "prompt": "Q?", "chosen": "A", "rejected": "B"},
                                   {"system": "", "prompt": "Q?", "chosen": "A", "rejected": "B"}])
@pytest.mark.parametrize("first", [True, False])
def test_a_column_for_the_system_makes_all_rows_conversations(given, first, chat, tmp_path):
    """Also rows where it is empty, and those before the first one that has it."""
    tokenizer = with_template(tmp_path, chat, CALLS.replace("CONTENT", "m.content"))
    rows = [given, {"system": "be brief", "prompt": "Q?", "chosen": "A", "rejected": "B"}]
    dataset = load(write(tmp_path / "rows.jsonl", rows if first else rows[::-1]), tokenizer, "preference")
    plain, brief = dataset.examples if first else dataset.examples[::-1]
    asked = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
    assert [text_of(tokenizer, e.prompt) for e in (plain, brief)] == [asked, "<|im_start|>system\nbe brief<|im_end|>\n" + asked]
    assert dataset.counts["read"] == 2 == len(dataset) and trained(tokenizer, plain) == trained(tokenizer, brief) == [["A<|im_end|>"], ["B<|im_end|>"]]


def test_text_that_is_no_chat_is_said_and_can_become_one(chat, tmp_path, capsys):
    tokenizer = with_template(tmp_path, chat, CALLS.replace("CONTENT", "m.content"))
    transcript = {"chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant: so", "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\n\nAssistant: no"}
    rows = [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}, transcript]
    file = write(tmp_path / "rows.jsonl", rows)
    raw = data.load(file, "preference", tokenizer, config.load(["--objective=dpo"]))
    said = capsys.readouterr().err
    assert "2 prompts are text and stay so" in said and "--as_chat" in said and [text_of(tokenizer, e.prompt) for e in raw.examples][0] == "2+2?"
    asked = data.load(file, "preference", tokenizer, config.load(["--objective=dpo", "--as_chat"]))
    turn = lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n"
    assert [text_of(tokenizer, e.prompt) for e in asked.examples] == [
        turn("user", "2+2?") + "<|im_start|>assistant\n",
        turn("user", "hi") + turn("assistant", "yo") + turn("user", "and") + "<|im_start|>assistant\n"]
    assert trained(tokenizer, asked.examples[1]) == [["so<|im_end|>"], ["no<|im_end|>"]] and "as_chat" not in capsys.readouterr().err
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "2+2?", "answer": "4"}])
    example = data.load(prompts, "prompts", tokenizer, config.load(["--as_chat"])).examples[0]
    assert text_of(tokenizer, example.prompt) == turn("user", "2+2?") + "<|im_start|>assistant\n" and example.row["prompt"] == [U("2+2?")]


# ---------------------------------------------------------------------------------------------------------------------
# BOS once


@pytest.mark.parametrize("mode", ["joint", "apart"])
@pytest.mark.parametrize("text", ["<s>[INST] Name a colour. [/INST] Red. </s>", "[INST] Name a colour. [/INST] Red."])
def test_text_that_begins_with_bos(text, mode, pieces, tmp_path):
    """It is there once, as the prompt, and is not trained; what follows it is the same whether or not the row wrote it."""
    tokenizer = data.Tokenizer(pieces)
    example, _ = one(tmp_path, {"text": text}, tokenizer, tokenize=mode)
    assert example.prompt.tolist() == [tokenizer.bos] and tokenizer.bos not in example.responses[0] and example.scored[0].all()
    assert (example.responses[0] == tokenizer.eos).sum() == 1


def test_text_that_begins_with_bos_that_is_eos_too(tmp_path):
    tokenizer = changed_tokenizer(tmp_path / "t", bos_token="<eos>")
    example, _ = one(tmp_path, {"text": "<eos>1+1=2"}, tokenizer)
    assert text_of(tokenizer, example.prompt) == "<eos>" and text_of(tokenizer, example.responses[0]) == "1+1=2<eos>"


# ---------------------------------------------------------------------------------------------------------------------
# Pairs that teach nothing


@pytest.mark.parametrize("row, kept", [
    ({"prompt": "1", "chosen": "2", "rejected": "2"}, None), ({"prompt": "1", "chosen": "23456", "rejected": "23457"}, None),
    ({"prompt": "1", "chosen": "2", "rejected": "3"}, ([0], [1])),
    ({"prompt": "1", "responses": ["2", "2", "3"]}, ([0, 1], [2, 2])), ({"prompt": "1", "responses": ["2", "2"]}, None)])
def test_pairs_of_equal_responses_are_left_out(row, kept, tmp_path, capsys):
    tokenizer = data.Tokenizer(ARITHMETIC)
    file = write(tmp_path / "rows.jsonl", [row, {"prompt": "1", "chosen": "4", "rejected": "5", "margin": 2.0}])
    cfg = config.load(["--objective=dpo", "--max_length=5"])
    dataset = data.load(file, "preference", tokenizer, cfg)
    assert len(dataset) == dataset.counts["used"] == (2 if kept else 1) and dataset.counts["identical"] == (0 if kept else 1)
    if kept:
        first = dataset.examples[0]
        assert (first.chosen, first.rejected, len(first.margin)) == (*kept, len(kept[0]))
    assert ("the first is " + file + ":1" in capsys.readouterr().err) == (not kept) and dataset.examples[-1].margin == [2.0]
    assert len(data.load(file, "preference", tokenizer, cfg, False, train=False)) == 2  # for scores
    if "responses" not in row:
        assert len(data.load(file, "kto", tokenizer, cfg, False)) == (2 if kept else 1)
