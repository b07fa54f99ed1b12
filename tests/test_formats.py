"""Rows of the data sets that people use, in their exact columns: the right prompt, and the right tokens trained."""
import json
import math

import pytest
import torch

import config
import data
import losses
import preview
import sample
import train
from conftest import as_dataset, layout
from parts import formats
from test_data import A, ARITHMETIC, FORMATS, S, U, load, one, runs, text_of, with_template, write
from test_train import SMALL, options

TURNS = ("{% for t in tools or [] %}{{ '<tools>' + t.name + '</tools>' }}{% endfor %}"
         "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
         "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def asked(*turns):
    """A prompt: turns of user and assistant in turn, and the assistant's header."""
    return "".join(turn("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)) + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def turns(chat, tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("turns"), chat, TURNS)


def seen(tokenizer, e):
    """Its prompt, the trained text of each response, and its pairs."""
    trained = []
    for ids, scored in zip(e.responses, e.scored):
        trained.append([text.replace("<|im_end|>", "") for text in runs(tokenizer, ids, scored)])
    return text_of(tokenizer, e.prompt), [parts[0] if len(parts) == 1 else parts for parts in trained], list(zip(e.chosen, e.rejected))


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: name -> kind, row, prompt, what is trained of each response, pairs


def user_says(text):
    return {"from": "user", "value": text}


def arena(text, role="user"):  # lmarena-140k has parts
    return {"role": role, "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]}


SAFE = {"prompt": "May I?", "response_0": "Yes.", "response_1": "No, never.", "prompt_source": "Alpaca", "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca-7B", "is_response_0_safe": False, "is_response_1_safe": True, "response_0_severity_level": 1,
        "response_1_severity_level": 0, "better_response_id": 1, "safer_response_id": 1, "response_0_sha256": "1f", "response_1_sha256": "2e"}
STEER2 = {"split": "train", "prompt": "Name one.", "response_1": "Red.", "response_2": "Blue.", "preference_strength": -2,
          "preference_statement": "@Response 1 is better than @Response 2.", "preference_elaboration": "Shorter.",
          "three_most_similar_preferences": [{"statement": "", "elaboration": "", "strength": -2}], "all_preferences_unprocessed": []}
STEER3 = {"domain": "general", "language": "english", "context": [U("Name one."), A("Red."), U("Another.")], "response1": "Red again.",
          "response2": "Blue.", "overall_preference": 2, "individual_preference": [{"score": 2, "reasoning": "", "feedback1": "", "feedback2": ""}]}
ULTRA = {"source": "sharegpt", "instruction": "Name one.", "models": ["a", "b", "c"], "correct_answers": ["None"], "incorrect_answers": ["None"],
         "completions": [{"model": m, "response": r, "overall_score": s, "fine-grained_score": 3.0, "critique": "", "principle": "",
                          "custom_system_prompt": "", "annotations": {}} for m, r, s in (("a", "Re", 4.0), ("b", "Blue.", 8.5), ("c", "R", 4.0))]}
NECTAR = {"prompt": "\n\nHuman: Name one. \n\nAssistant: ", "turns": 1, "num_responses": 3, "source": ["a"], "good_natured": True, "answers": [
    {"answer": "Red.", "model": "a", "rank": 2.0}, {"answer": "Blue.", "model": "b", "rank": 1.0}, {"answer": "Re", "model": "c", "rank": 3.0}]}
SHP = {"post_id": "1", "domain": "askculinary_train", "upvote_ratio": 0.9, "history": "Why salt?", "c_root_id_A": "a", "c_root_id_B": "b",
       "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 3, "score_B": 8, "human_ref_A": "Why not.", "human_ref_B": "It tastes.",
       "labels": 0, "seconds_difference": 1.0, "score_ratio": 2.7}
ARENA = {"question_id": "1", "model_a": "a", "model_b": "b", "winner": "model_b", "judge": "arena_user_1", "turn": 2, "language": "English",
         "conversation_a": [U("hi"), A("yo"), U("and"), A("so")], "conversation_b": [U("hi"), A("ho"), U("and"), A("no")]}
STEP_DPO = {"dataset": "MATH", "prompt": "What is 2+2+3?", "initial_reason_steps": "Step 1: 2+2=4.\nStep 2:", "chosen": " 4+3=7.", "rejected": " 4+3=8.",
            "full_chosen": " 4+3=7.\nStep 3: So 7.", "full_rejected": " 4+3=8.\nStep 3: So 8.", "answer": "7"}
WEATHER = {"name": "weather", "description": "The weather", "parameters": {"city": {"description": "Where", "type": "str", "default": "Oslo"}}}
XLAM = {"id": 1, "query": "Weather in Oslo?", "answers": json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}]), "tools": json.dumps([WEATHER])}
CALL = "<functioncall> {\"name\": \"weather\", \"arguments\": '{\"city\": \"Oslo\"}'}"
GLAIVE = {"system": "SYSTEM: You may call functions. Use them if required -\n" + json.dumps(WEATHER) + "\n\n",
          "chat": f"USER: Weather in Oslo?\n\n\nASSISTANT: {CALL} <|endoftext|>\n\n\nFUNCTION RESPONSE: {{\"sun\": 1}}\n\n\n"
                  "ASSISTANT: It shines.\nASK: more <|endoftext|>\n\n\n"}
PROCESS = {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "1+1+1=?", "steps": ["1+1=2", "2+1=4", "4"], "final_answer_correct": False, "label": 1}

DATA_SETS = {
    "PKU-SafeRLHF": ("preference", SAFE, "May I?", ["Yes.", "No, never."], [(1, 0)]),
    "PKU-SafeRLHF, safety alone": ("preference", {k: v for k, v in SAFE.items() if k != "better_response_id"} | {"safer_response_id": 0}, "May I?",
                                   ["Yes.", "No, never."], [(0, 1)]),
    "HelpSteer2": ("preference", STEER2, asked("Name one."), ["Red.", "Blue."], [(0, 1)]),
    "HelpSteer2, several turns": (
        "preference", STEER2 | {"prompt": "Name one.\n<extra_id_1>Assistant\nRed.\n<extra_id_1>User\nAnother.", "preference_strength": 1},
        asked("Name one.", "Red.", "Another."), ["Red.", "Blue."], [(1, 0)]),
    "HelpSteer3": ("preference", STEER3, asked("Name one.", "Red.", "Another."), ["Red again.", "Blue."], [(1, 0)]),
    "UltraFeedback": ("preference", ULTRA, asked("Name one."), ["Re", "Blue.", "R"], [(1, 0), (1, 2)]),
    "Nectar": ("preference", NECTAR, "\n\nHuman: Name one. \n\nAssistant:", [" Red.", " Blue.", " Re"], [(1, 0), (1, 2), (0, 2)]),
    "UltraInteract_pair": (
        "preference", {"task": "Coding", "dataset": "codecontest", "trajectory": [user_says("Solve it."), {"from": "assistant", "value": "a"}, user_says("Wrong.")],
                       "chosen": "Step 1: b", "rejected": "Step 1: c", "id": "1", "parent_id": "0"},
        asked("Solve it.", "a", "Wrong."), ["Step 1: b", "Step 1: c"], [(0, 1)]),
    "SHP": ("preference", SHP, asked("Why salt?"), ["Why not.", "It tastes."], [(1, 0)]),
    "stack-exchange-paired": ("preference", {"qid": 1, "question": "Why salt?", "date": "2020", "metadata": ["a"], "response_j": "It tastes.", "response_k": "Why not."},
                              asked("Why salt?"), ["It tastes.", "Why not."], [(0, 1)]),
    "RewardBench 2": (
        "preference", {"id": "1", "prompt": "Name one.", "chosen": ["Red.", "Blue."], "rejected": ["Re", "No."], "num_correct": 2, "num_incorrect": 2,
                       "total_completions": 4, "models": ["a"], "subset": "Ties", "additional_metadata": None},
        "Name one.", ["Red.", "Blue.", "Re", "No."], [(0, 2), (0, 3), (1, 2), (1, 3)]),
    "RewardBench": ("preference", {"prompt": "Name one.", "chosen": "Red.", "chosen_model": "a", "rejected": "Re", "rejected_model": "b", "subset": "chat", "id": 1},
                    "Name one.", ["Red.", "Re"], [(0, 1)]),
    "lmarena": ("preference", ARENA, asked("hi"), ["so", "no"], [(1, 0)]),
    "lmarena of parts": ("preference", ARENA | {"winner": "model_a", "conversation_a": [arena("hi"), arena("yo", "assistant")],
                                                "conversation_b": [arena("hi"), arena("ho", "assistant")]}, asked("hi"), ["yo", "ho"], [(0, 1)]),
    "Step-DPO": ("preference", STEP_DPO, asked("What is 2+2+3?") + "Step 1: 2+2=4.\nStep 2:", [" 4+3=7.", " 4+3=8."], [(0, 1)]),
    "Step-DPO, first step": ("preference", STEP_DPO | {"initial_reason_steps": ""}, asked("What is 2+2+3?"), [" 4+3=7.", " 4+3=8."], [(0, 1)]),
    "context_messages": ("preference", {"context_messages": [U("hi"), A("yo")], "prompt": "and", "chosen": "so", "rejected": "no"},
                         asked("hi", "yo", "and"), ["so", "no"], [(0, 1)]),
    "context_messages alone": ("prompts", {"context": "hi", "context_messages": [U("hi")], "dataset": "a"}, asked("hi"), [], []),
    "context_messages, completion": ("sft", {"context_messages": [S("be brief")], "prompt": "hi", "completion": "yo"},
                                     turn("system", "be brief") + asked("hi"), ["yo"], []),
    "context_messages, conversation": ("sft", {"context_messages": [U("hi"), A("yo")], "messages": [U("and"), A("so")]},
                                       asked("hi"), ["so"], []),
    "ProcessBench": ("prm", PROCESS, "1+1+1=?\n", [["\n", "\n", "\n"]], []),
    "xlam": ("sft", XLAM, "<tools>weather</tools>" + asked("Weather in Oslo?"), ['weather{"city": "Oslo"}'], []),
    "glaive": ("sft", GLAIVE, turn("system", GLAIVE["system"].removeprefix("SYSTEM: ").strip()) + asked("Weather in Oslo?"),
               [[CALL, "It shines.\nASK: more"]], []),
    "LIMA": ("sft", {"conversations": ["hi", "yo", "and", "so"], "source": "stackexchange"}, asked("hi"), [["yo", "so"]], []),
    "OLMo's roles": ("sft", {"messages": [{"role": "developer", "content": "be brief"}, U("Weather?"),
                                          {"role": "assistant", "content": None, "function_calls": "weather(city='Oslo')\ntime(zone=[1, 2])"},
                                          {"role": "environment", "content": "sun"}, {"role": "model", "content": "It shines."}]},
                     turn("system", "be brief") + asked("Weather?"), [['weather{"city": "Oslo"}time{"zone": [1, 2]}', "It shines."]], []),
    "roles of calls": ("sft", {"messages": [U("Weather?"), {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                                            {"role": "tool_response", "content": "sun"}, A("It"), {"role": "function", "content": "a"}, A("is"),
                                            {"role": "ipython", "content": "b"}, A("so")]},
                       asked("Weather?"), [['weather{"city": "Oslo"}', "It", "is", "so"]], []),
}
each_data_set = pytest.mark.parametrize("kind, row, prompt, trained, pairs", DATA_SETS.values(), ids=DATA_SETS)


@each_data_set
@pytest.mark.parametrize("mode", ["joint", "apart"])
def test_data_sets(kind, row, prompt, trained, pairs, mode, turns, tmp_path):
    example, _ = one(tmp_path, row, turns, kind, tokenize=mode)
    assert seen(turns, example) == (prompt, trained, pairs)
    assert len(example.margin) == len(pairs)


@each_data_set
def test_training_preview_and_scores_read_a_row_alike(kind, row, prompt, trained, pairs, turns, tmp_path):
    """The kind that `sample.py score` takes a row for is the one that it is trained as, and the preview shows what is trained."""
    if kind in ("preference", "sft"):
        assert formats.kind_of(row) == formats.kind_of({"nothing": None, **row}) == kind
    example, _ = one(tmp_path, row, turns, kind)
    scored = load(str(tmp_path / "row.jsonl"), turns, kind, train=False).examples[0]
    assert seen(turns, scored) == seen(turns, example)
    shown = preview.row(example, turns)
    for text in trained if kind != "prm" else ():
        for part in [text] if isinstance(text, str) else text:
            assert part.strip().split()[0] in shown
    if kind == "preference":
        value = sample.lines([[float(i) for i in range(len(trained))]], as_dataset([example]))[0]
        assert value == ({"chosen": 0.0, "rejected": 1.0} if pairs == [(0, 1)] else {"scores": [float(i) for i in range(len(trained))]})


@pytest.mark.parametrize("kind, objective", [("sft", "sft"), ("preference", "dpo"), ("prm", "prm")])
def test_all_formats_are_the_same_to_a_run_the_preview_and_scores(kind, objective, turns, tmp_path, monkeypatch, capsys):
    """Each is asked about one file with all formats of a kind; what they loaded has the same ids and masks."""
    rows = [row for name, (other, row, *_) in FORMATS.items() if other == kind and name != "equal conversations"]  # no pair for a run
    rows += [row for other, row, *_ in DATA_SETS.values() if other == kind]
    rows += [{"prompt": "1+1=", "completions": ["2", "3"], "labels": ["+", "-"]}] if kind == "prm" else []
    file, template, datasets = write(tmp_path / "rows.jsonl", rows), tmp_path / "turns.jinja", []
    template.write_text(TURNS)
    given = options(tmp_path, objective, train_data=file, tokenizer=turns.folder, chat_template=template, batch_size=4, max_steps=1, max_length=512,
                    scratch={**SMALL, "max_position_embeddings": 512})

    def loaded(*arguments, **keys):
        dataset = load_rows(*arguments, **keys)
        if not any(dataset is other for other in datasets):  # it may begin anew, once it has seen what all rows are
            datasets.append(dataset)
        return dataset
    load_rows = data.load
    monkeypatch.setattr(data, "load", loaded)
    train.train(config.load(given))
    preview.main([file, *(option for option in given if not option.startswith("--train_data"))])
    sample.main(["score", f"--model={tmp_path / 'run'}", f"--data={file}", f"--out={tmp_path / 'scores.jsonl'}", f"--cache_dir={tmp_path}"])
    assert len(datasets) == 3 and len((tmp_path / "scores.jsonl").read_text().splitlines()) == len(rows) > 1
    ids = [[[e.prompt.tolist(), *(r.tolist() for r in e.responses), *(mask.tolist() for mask in e.scored)] for e in d.examples] for d in datasets]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == len(rows)


@each_data_set
def test_data_sets_as_other_kinds(kind, row, prompt, trained, pairs, turns, tmp_path):
    """Of compared responses sft imitates the best, and kto takes the best and the worst."""
    if kind != "preference":
        return
    best, worst = pairs[0][0], pairs[-1][1]
    example, _ = one(tmp_path, row, turns, "sft", train_on="last")
    assert seen(turns, example) == (prompt, [trained[best]], []) and example.demonstrated == [True]
    example, _ = one(tmp_path, row, turns, "kto")
    assert seen(turns, example) == (prompt, [trained[best], trained[worst]], [(0, 1)]) and example.demonstrated == [True, False]


@pytest.mark.parametrize("label, expected", [(-1, [1, 1, 1]), (0, [0, None, None]), (1, [1, 0, None])])
@pytest.mark.parametrize("kind", ["prm", "steps"])
def test_labels_of_processbench(label, expected, kind, tmp_path):
    example, _ = one(tmp_path, PROCESS | {"label": label}, data.Tokenizer(ARITHMETIC), kind)
    labels = example.labels[0][example.scored[0]]
    assert [None if math.isnan(x) else x for x in labels] == [0.5 if x is None and kind == "steps" else x for x in expected]


@pytest.mark.parametrize("row", [
    SAFE | {"response_1": "Yes."}, STEER2 | {"preference_strength": 0}, STEER3 | {"overall_preference": 0}, ARENA | {"winner": "tie"},
    ARENA | {"winner": "tie (bothbad)"}, ARENA | {"winner": "both_bad"}, {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 1, 1.0]}])
@pytest.mark.parametrize("kind", ["preference", "kto", "sft"])
def test_ties_are_dropped_and_counted(row, kind, turns, tmp_path):
    file = write(tmp_path / "rows.jsonl", [row, SHP])
    dataset = load(file, turns, kind)
    if kind == "sft" and row.get("response_1") == "Yes.":  # the better one is known, equal as they are
        assert len(dataset) == 2
    else:
        assert (len(dataset), dataset.counts["identical"]) == (1, 1) and dataset.examples[0].where.endswith(":2")
    assert len(load(file, turns, kind, train=False)) == 2


@pytest.mark.parametrize("row, message", [
    (SAFE | {"better_response_id": 2}, "'better_response_id' should be one of 0, 1, found 2"),
    (SHP | {"labels": "A"}, "'labels' should be one of 1, 0, found 'A'"), (ARENA | {"winner": "a"}, "'winner' should be one of 'model_a'"),
    (STEER3 | {"overall_preference": "2"}, "'overall_preference' should be a number, found '2'"),
    (ULTRA | {"completions": [{"response": "a"}]}, "'completions' should be a list of objects with 'response' and 'overall_score'"),
    (ULTRA | {"completions": [{"response": "a", "overall_score": "N/A"}, {"response": "b", "overall_score": 1}]}, "'scores' should be a number, found 'N/A'"),
    (ARENA | {"conversation_b": [U("ho"), A("yo")]}, "begin differently"),
    (PROCESS | {"label": 3}, "'label' should be -1 or an index from 0 into the 3 steps, found 3"),
    (GLAIVE | {"chat": "hi"}, "'chat' should be turns that begin with USER: or ASSISTANT:, found 'hi'")])
def test_data_sets_with_something_wrong(row, message, turns, tmp_path):
    kind = "prm" if "steps" in row else "sft" if "chat" in row else "preference"
    with pytest.raises(ValueError, match=f"row.jsonl:1: .*({message})"):
        one(tmp_path, row, turns, kind)


@pytest.mark.parametrize("kind", ["sft", "preference", "kto", "prm", "prompts"])
def test_a_row_that_does_not_fit_is_told_how_to(kind, turns, tmp_path):
    """The message has the keys, and a line that converts: it runs."""
    with pytest.raises(ValueError, match=r"row.jsonl:1: found keys \['post', 'reply'\]; expected .*To convert, .*python -c") as said:
        one(tmp_path, {"post": "hi", "reply": "yo"}, turns, kind)
    code = str(said.value).split('python -c "')[1].split('" <')[0]
    compile(code, "line", "exec")
    assert "r['post']" in code


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


@pytest.mark.parametrize("more, pairs", [
    ({}, [(0, 1), (0, 2), (1, 2)]), ({"scores": [1.0, 9, 5]}, [(1, 2), (1, 0), (2, 0)]), ({"ratings": [9, 9, 5]}, [(0, 2), (1, 2)]),
    ({"rewards": [-1.5, -2.5, 0]}, [(2, 0), (2, 1), (0, 1)]), ({"rank": [3, 1, 1]}, [(1, 0), (2, 0)]), ({"scores": [True, False, True]}, [(0, 1), (2, 1)])])
def test_rankings_follow_their_scores(more, pairs, turns, tmp_path):
    example, _ = one(tmp_path, {"query": "Name two.", "responses": ["a", "b", "c"], **more}, turns, "preference")
    assert seen(turns, example) == (asked("Name two."), ["a", "b", "c"], pairs)
    assert [i for i, shown in enumerate(example.demonstrated) if shown] == sorted({a for a, _ in pairs} - {b for _, b in pairs})


@pytest.mark.parametrize("scores", [[1], 3, [1, "2"], [1, None], [1, float("nan")], "12"])
def test_scores_that_are_none(scores, turns, tmp_path):
    with pytest.raises(ValueError, match="row.jsonl:1: 'scores' should be a"):
        one(tmp_path, {"prompt": "q", "responses": ["a", "b"], "scores": scores}, turns, "preference")


def test_a_ranking_has_one_of_tied_responses(tmp_path):
    """Plackett-Luce orders responses by their scores whatever their order in the row, and the order of ties plays no part."""
    tokenizer, values = data.Tokenizer(ARITHMETIC), {"1": 0.3, "2": -0.4, "3": 1.1, "4": 0.7}

    def loss(row):
        dataset = load(write(tmp_path / "rows.jsonl", [row]), tokenizer, "preference")
        batch = data.build([(0, dataset.examples[0])], dataset, layout(32))
        rewards = torch.tensor([values[r] for r in row["responses"]])
        table, mask = losses.READINGS["ranked_rewards"].how(batch, rewards), losses.READINGS["rank_mask"].how(batch)
        return table[mask].tolist(), losses.rm_plackett_luce(table, mask)[0].item()

    strict, value = loss({"prompt": "5", "responses": ["3", "1", "2"]})
    assert strict == pytest.approx([1.1, 0.3, -0.4])
    assert loss({"prompt": "5", "responses": ["2", "3", "1"], "scores": [1, 7, 3]}) == (strict, pytest.approx(value))
    for responses, scores in ((["2", "3", "1", "4"], [1, 7, 3, 3]), (["1", "4", "3", "2"], [3, 3, 7, 1])):
        tied, tied_value = loss({"prompt": "5", "responses": responses, "scores": scores})
        assert tied == strict and tied_value == pytest.approx(value)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize("flag", [{"loss_mask": 0}, {"loss_mask": False}, {"mask": 0}, {"mask": False}, {"train": False}, {"weight": 0.0}])
def test_turns_that_are_masked(flag, turns, tmp_path):
    example, _ = one(tmp_path, {"messages": [U("hi"), A("yo") | flag, U("and"), A("so") | {key: 1 for key in flag}]}, turns)
    assert seen(turns, example)[1] == ["so"]


def test_keys_of_messages_that_are_not_read_are_said(turns, tmp_path, capsys):
    messages = [U("hi") | {"id": 3, "tokens": None}, A("yo") | {"weight": 1, "rating": 5}]
    file = write(tmp_path / "rows.jsonl", [{"messages": messages}, {"messages": [U("hi"), A("yo") | {"name": "me"}]}])
    data.load(file, "sft", turns, config.load([]))
    assert capsys.readouterr().err.endswith("rows.jsonl: keys of messages that are not read: id, rating\n")
    pair = {"prompt": [U("hi")], "chosen": {"from": "gpt", "value": "yo", "why": "x"}, "rejected": [A("no")]}
    data.load(write(tmp_path / "pairs.jsonl", [pair]), "preference", turns, config.load(["--objective=dpo"]))
    assert capsys.readouterr().err.endswith("pairs.jsonl: keys of messages that are not read: why\n")


@pytest.mark.parametrize("m", [A(""), A(" \n"), A("") | {"tool_calls": []}, A("") | {"tool_calls": None, "calls": "f(a=1)"}])
def test_an_assistant_that_says_nothing(m, turns, tmp_path):
    with pytest.raises(ValueError, match="row.jsonl:1: 'messages' holds a message in which the assistant says nothing.*; give it content or tool_calls"):
        one(tmp_path, {"messages": [U("hi"), m]}, turns)
    example, _ = one(tmp_path, {"messages": [U("hi"), m | {"train": False}, U("and"), A("so")]}, turns)
    assert seen(turns, example)[1] == ["so"]
    example, _ = one(tmp_path, {"prompt": [U("hi")], "chosen": [A("yo")], "rejected": [m]}, turns, "preference")  # it may lose
    assert seen(turns, example)[1][0] == "yo"


@pytest.mark.parametrize("calls", ["weather(city='Oslo')", "[weather(city='Oslo')]", '[{"name": "weather", "arguments": {"city": "Oslo"}}]',
                                   [{"name": "weather", "arguments": '{"city": "Oslo"}'}]])
@pytest.mark.parametrize("content", ["", None])
def test_function_calls_are_calls(calls, content, turns, chat, tmp_path):
    row = {"messages": [U("hi"), A(content) | {"function_calls": calls}]}
    assert seen(turns, one(tmp_path, row, turns)[0])[1] == ['weather{"city": "Oslo"}']
    deaf = with_template(tmp_path, chat, TURNS.replace("m.tool_calls", "m.no_calls").replace("tools or []", "[]"))
    with pytest.raises(ValueError, match="row.jsonl:1: .*tool_calls"):
        one(tmp_path, row, deaf)


@pytest.mark.parametrize("calls", ["weather('Oslo')", "weather", "weather(city=open('x'))", "call the weather"])
def test_function_calls_that_are_none(calls, turns, tmp_path):
    with pytest.raises(ValueError, match="row.jsonl:1: 'function_calls' should be"):
        one(tmp_path, {"messages": [U("hi"), A("") | {"function_calls": calls}]}, turns)


def test_a_thought_alone_is_something_said(chat, tmp_path):
    tokenizer = with_template(tmp_path, chat, TURNS.replace("(m.content or '')", "(m.reasoning_content or '') + m.content"))
    for empty in ("", None):
        example, _ = one(tmp_path, {"messages": [U("hi"), A(empty) | {"reasoning": "hm"}]}, tokenizer)
        assert seen(tokenizer, example)[1] == ["hm"]


# ---------------------------------------------------------------------------------------------------------------------
# Messages as text


@pytest.mark.parametrize("text", [json.dumps, lambda value: json.dumps(value, indent=2), repr])
def test_messages_as_text_are_decoded(text, turns, tmp_path):
    whole = {"chosen": text([U("hi"), A("yo")]), "rejected": text([U("hi"), A("no")])}
    example, _ = one(tmp_path, whole, turns, "preference")
    assert seen(turns, example) == (asked("hi"), ["yo", "no"], [(0, 1)])
    example, _ = one(tmp_path, {"prompt": text([U("hi")]), "chosen": text([A("yo")]), "rejected": text(A("no"))}, turns, "preference")
    assert seen(turns, example) == (asked("hi"), ["yo", "no"], [(0, 1)])
    example, _ = one(tmp_path, {"prompt": [U("hi")], "responses": [text([A("yo")]), text([A("no")])]}, turns, "preference")
    assert seen(turns, example) == (asked("hi"), ["yo", "no"], [(0, 1)])
    for key in ("messages", "conversations"):
        example, _ = one(tmp_path, {key: text([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])}, turns)
        assert seen(turns, example) == (asked("hi"), ["yo"], [])
    example, _ = one(tmp_path, {"input": text([U("hi")]), "output": "yo"}, turns)
    assert seen(turns, example) == (asked("hi"), ["yo"], [])
    assert seen(turns, one(tmp_path, {"prompt": text([U("hi")])}, turns, "prompts")[0]) == (asked("hi"), [], [])


@pytest.mark.parametrize("text", ['[{"name": "Bo", "age": 3}]', '{"role": "king", "content": "x"}', '{"role": "user"}', "[1, 2]", "[", "[]", "{}", "[{'role': f()}]"])
def test_other_json_stays_text(text, turns, tmp_path):
    example, _ = one(tmp_path, {"prompt": "q", "completion": text}, turns)
    assert seen(turns, example) == ("q", [text], [])


# ---------------------------------------------------------------------------------------------------------------------
# A prompt that is repeated


@pytest.mark.parametrize("prompt, first, second, rest, other", [
    ("Question: Q\nAnswer:", "Question: Q\nAnswer: A", "Question: Q\nAnswer: B", " A", " B"),
    ("Question: Q\nAnswer: ", "Question: Q\nAnswer: A", "Question: Q\nAnswer: B", "A", "B"),
    ("1+1=", "1+1=2", "1+1=3", "2", "3"), ("Once upon a time", "Once upon a time there was", "Once upon a time, no", " there was", ", no")])
def test_a_repeated_prompt_is_taken_off(prompt, first, second, rest, other, turns, tmp_path):
    pair, _ = one(tmp_path, {"prompt": prompt, "chosen": first, "rejected": second}, turns, "preference")
    assert seen(turns, pair) == (prompt, [rest, other], [(0, 1)])
    ranked, _ = one(tmp_path, {"prompt": prompt, "responses": [first, second]}, turns, "preference")
    assert seen(turns, ranked) == seen(turns, pair)
    assert seen(turns, one(tmp_path, {"prompt": prompt, "completion": first}, turns)[0]) == (prompt, [rest], [])
    kto, _ = one(tmp_path, {"prompt": prompt, "completion": first, "label": True}, turns, "kto")
    assert seen(turns, kto) == (prompt, [rest], []) and kto.chosen == [0]


def test_whitespace_behind_a_repeated_prompt_may_differ(turns, tmp_path):
    example, _ = one(tmp_path, {"prompt": "Question: Q\nAnswer: ", "chosen": "Question: Q\nAnswer:\nA", "rejected": "Question: Q\nAnswer: B"}, turns, "preference")
    assert seen(turns, example) == ("Question: Q\nAnswer:", ["\nA", " B"], [(0, 1)])


@pytest.mark.parametrize("prompt, chosen, rejected", [
    ("A", "A man", "A dog"), ("Hi", "Hi!", "Hi?"), ("Good morning", "Good morning!", "Good morning to you"), ("", "a", "b"),
    ("Name a colour", "Name a colour? Red.", "Blue."), ("What is a cat", "What is a cathedral?", "What is a cat?"), ("Say it again, Sam", "Say it again, Sam", "Say it again, Sam")])
def test_what_may_be_chance_stays(prompt, chosen, rejected, turns, tmp_path):
    example, _ = one(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, turns, "preference", train=False)
    assert seen(turns, example)[1:] == ([chosen, rejected], [(0, 1)])


def test_messages_that_repeat_their_prompt_in_a_completion(turns, tmp_path):
    for more, kind in (({}, "sft"), ({"label": True}, "kto")):
        example, _ = one(tmp_path, {"prompt": [S("be brief"), U("hi")], "completion": [S("be brief"), U("hi"), A("yo")], **more}, turns, kind)
        assert seen(turns, example)[:2] == (turn("system", "be brief") + asked("hi"), ["yo"])


# ---------------------------------------------------------------------------------------------------------------------
# Where two conversations part

HH = "\n\nHuman: hi\n\nAssistant:"
EARLY = {"chosen": HH + " yo\n\nHuman: and\n\nAssistant: so", "rejected": HH + " ho\n\nHuman: what\n\nAssistant: no\n\nHuman: bye"}


def test_the_last_turn_of_a_transcript_is_trained(turns, tmp_path):
    """Where transcripts part before their last turns, the turns between are context; so it is of messages."""
    example, _ = one(tmp_path, EARLY, turns, "preference")
    assert seen(turns, example) == (HH, [" so", " no"], [(0, 1)])
    assert [text_of(turns, ids) for ids in example.responses] == [" yo\n\nHuman: and\n\nAssistant: so<|im_end|>", " ho\n\nHuman: what\n\nAssistant: no<|im_end|>"]
    for kind, count in (("kto", 2), ("sft", 1)):
        assert seen(turns, one(tmp_path, EARLY, turns, kind)[0])[:2] == (HH, [" so", " no"][:count])
    messages = {"chosen": [U("hi"), A("yo"), U("and"), A("so")], "rejected": [U("hi"), A("ho"), U("what"), A("no")]}
    assert seen(turns, one(tmp_path, messages, turns, "preference")[0]) == (asked("hi"), ["so", "no"], [(0, 1)])
    as_chat = one(tmp_path, EARLY, turns, "preference", as_chat=True)[0]
    assert seen(turns, as_chat) == (asked("hi"), ["so", "no"], [(0, 1)])
    row = {"prompt": HH, "completion": " yo\n\nHuman: and\n\nAssistant: so"}
    assert seen(turns, one(tmp_path, row, turns)[0]) == (HH, [" so"], [])
    answer = {"prompt": HH, "completion": " yo\n\nHuman: and"}
    assert seen(turns, one(tmp_path, answer, turns)[0]) == (HH, [" yo"], [])


def test_real_transcripts_train_no_human(real, turns):
    dataset = load(str(real / "preference/hh-harmless-test.jsonl.gz"), turns, "preference")
    assert dataset.counts["read"] == 2312 and dataset.counts["bad"] == 0
    for e in dataset.examples[:300]:
        assert not any("\n\nHuman:" in text for text in seen(turns, e)[1])


@pytest.mark.parametrize("chosen, rejected", [
    ([S("be brief"), U("hi"), A("yo")], [S("be long"), U("hi"), A("no")]), ([U("hi"), A("yo")], [U("ho"), A("no")]), ([S("s"), U("hi"), A("yo")], [U("hi"), A("no")]),
    ("\n\nHuman: hi\n\nAssistant: yo", "\n\nHuman: ho\n\nAssistant: no"), ([S("s"), U("hi"), A("yo")], [S("s"), U("ho"), A("no")])])
def test_conversations_that_begin_differently(chosen, rejected, turns, tmp_path):
    with pytest.raises(ValueError, match="row.jsonl:1: 'chosen' and 'rejected' begin differently"):
        one(tmp_path, {"chosen": chosen, "rejected": rejected}, turns, "preference")
    with pytest.raises(ValueError, match="row.jsonl:1: .*begin differently"):
        one(tmp_path, {"source": "web", "chosen": chosen, "rejected": rejected}, turns, "sft")


def test_conversations_that_part_at_the_user(turns, tmp_path):
    """They have the answer before it in common, which stays context."""
    row = {"chosen": [U("hi"), A("yo"), U("and"), A("so")], "rejected": [U("hi"), A("yo"), U("what"), A("no")]}
    example, _ = one(tmp_path, row, turns, "preference")
    assert seen(turns, example) == (asked("hi"), ["so", "no"], [(0, 1)])


def test_a_pair_that_goes_on_behind_its_prompt(turns, tmp_path):
    row = {"prompt": [U("hi"), A("yo")], "chosen": [U("and"), A("so")], "rejected": [U("and"), A("no")]}
    example, _ = one(tmp_path, row, turns, "preference")
    assert seen(turns, example)[1:] == (["so", "no"], [(0, 1)])
    with pytest.raises(ValueError, match="row.jsonl:1: 'chosen' and 'rejected' begin differently"):
        one(tmp_path, row | {"rejected": [U("what"), A("no")]}, turns, "preference")
