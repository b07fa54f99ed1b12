"""Reward models and what is done with them: from rows to a folder that others read, scores in the rows' order."""
import json
import math
import os
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import data
import model
import reference
import reward
import rollout
import sample
import train
from conftest import ROOT, TINY, tiny_folder
from machine import Machine
from parts import tokens
from test_train import ROWS, SMALL, lines, options, run


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.train(config.load(options(folder, "rm", eval_data=ROWS["preference"], dtype="float32", save_dtype="float32")))
    return folder / "run"


def pairs():
    return [json.loads(line) for line in open(ROOT / ROWS["preference"])]


def test_predictions_are_those_of_transformers(reward_run):
    """Padded batches through AutoModelForSequenceClassification, the folder and its tokenizer as they are."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(reward_run / "model", num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_run / "model")
    assert theirs.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    found = [json.loads(line) for line in open(reward_run / "predictions.jsonl")]
    assert len(found) == len(pairs()) and (reward_run / "predictions.jsonl").read_text().endswith("}\n")
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in pairs()[:40]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        assert (batch["input_ids"][:, -1] == tokenizer.pad_token_id).any()
        with torch.no_grad():
            scores = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        assert scores.tolist() == pytest.approx([row[side] for row in found[:40]], abs=1e-5)
    saved = json.loads((reward_run / "model" / "config.json").read_text())
    every = [value for row in found for value in row.values()]
    assert saved["reward_mean"] == pytest.approx(np.mean(every)) and saved["reward_std"] == pytest.approx(np.std(every))
    assert saved["architectures"] == ["LlamaForSequenceClassification"] and "lm_head.weight" not in load_file(reward_run / "model" / "model.safetensors")


def test_scores_of_rows_are_in_their_order(reward_run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sample.main(["score", f"--model={reward_run}", f"--data={ROWS['preference']}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    found, expected = ([json.loads(line) for line in open(path)] for path in (tmp_path / "s.jsonl", reward_run / "predictions.jsonl"))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    row = pairs()[0]
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n"
                                        + json.dumps({"prompt": row["prompt"], "completion": row["rejected"]}) + "\n")
    sample.main(["score", f"--model={reward_run}", f"--data={tmp_path / 'one.jsonl'}", f"--out={tmp_path / 'o.jsonl'}", "--device=cpu"])
    assert [json.loads(line)["score"] for line in open(tmp_path / "o.jsonl")] == pytest.approx([*found[0].values()], abs=1e-4)


def test_out_is_made_or_refused_before_the_work(reward_run, tmp_path):
    given = ["score", f"--model={reward_run}", f"--data={ROOT / ROWS['preference']}", "--device=cpu"]
    sample.main([*given, f"--out={tmp_path / 'new' / 'deep' / 's.jsonl'}"])
    assert len(open(tmp_path / "new" / "deep" / "s.jsonl").readlines()) == 500
    with pytest.raises(SystemExit, match="new is a folder; name a file"):
        sample.main([*given[:1], "--model=nowhere", *given[2:], f"--out={tmp_path / 'new'}"])


@pytest.mark.parametrize("line, said", [("[1]", "expected an object, found list"), ("{", "not JSON")])
def test_a_bad_first_row_is_named(line, said, reward_run, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{line}\n" + json.dumps(pairs()[0]) + "\n")
    with pytest.raises(SystemExit, match=f"error: {tmp_path / 'rows.jsonl'}:1: {said}"):
        sample.main(["score", f"--model={reward_run}", f"--data={tmp_path / 'rows.jsonl'}", "--device=cpu"])


def test_log_probs_of_a_language_model_are_scored_too(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "sft", max_steps=1, dtype="float32")))
    sample.main(["score", f"--model={tmp_path / 'run'}", f"--data={ROWS['sft']}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    found = [json.loads(line)["score"] for line in open(tmp_path / "s.jsonl")]
    decoder, tokenizer = model.load(tmp_path / "run" / "model")[0], data.Tokenizer(tmp_path / "run" / "model")
    row = json.loads(open(ROOT / ROWS["sft"]).readline())
    prompt = tokenizer.fast.encode(row["prompt"]).ids
    ids = torch.tensor([*prompt, *tokenizer.fast.encode(row["completion"]).ids, tokenizer.eos])
    logps = decoder.logits(ids).log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt):]]
    assert found[0] == {"logps": pytest.approx(logps.sum().item(), abs=1e-4), "tokens": len(ids) - len(prompt)}


def test_best_of_n_takes_the_highest_reward(reward_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "sft", max_steps=1, dtype="float32")))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(open("tasks/arithmetic/problems_eval.jsonl").readlines()[:5]))
    given = ["best", f"--model={tmp_path / 'run'}", f"--reward={reward_run}", f"--data={prompts}", "--n=3", "--max_new_tokens=4",
             "--check=configs/dpo.py", f"--out={tmp_path / 'b.jsonl'}", "--device=cpu"]
    sample.main(given)
    found = [json.loads(line) for line in open(tmp_path / "b.jsonl")]
    assert len(found) == 5 and all(row["best"] == row["answers"][row["rewards"].index(max(row["rewards"]))] and len(row["answers"]) == 3 for row in found)
    assert "of the best of 3" in capsys.readouterr().err and any(len(set(row["answers"])) > 1 for row in found)
    sample.main(given)
    assert found == [json.loads(line) for line in open(tmp_path / "b.jsonl")]  # a function of the seed
    with pytest.raises(SystemExit, match="best needs --reward"):
        sample.main(["best", "--model=x", "--data=y"])
    with pytest.raises(SystemExit, match="is not a language model, its output is reward"):
        sample.main([*given[:1], f"--model={reward_run}", *given[2:]])


def test_best_of_n_by_steps(tmp_path, monkeypatch):
    """A process reward model ranks by its lowest step: what scoring the same answers as steps says."""
    monkeypatch.chdir(ROOT)
    for name in ("sft", "prm"):
        train.train(config.load(options(tmp_path, name, name, max_steps=1, dtype="float32")))
    (tmp_path / "prompts.jsonl").write_text("".join(open("tasks/arithmetic/problems_eval.jsonl").readlines()[:4]))
    sample.main(["best", f"--model={tmp_path / 'sft'}", f"--reward={tmp_path / 'prm'}", f"--data={tmp_path / 'prompts.jsonl'}", "--n=3",
                 "--max_new_tokens=6", f"--out={tmp_path / 'b.jsonl'}", "--device=cpu"])
    found = [json.loads(line) for line in open(tmp_path / "b.jsonl")]
    rows = [{"prompt": row["prompt"], "completions": [line for line in text.split("\n") if line] or [" "]} for row in found for text in row["answers"]]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample.main(["score", f"--model={tmp_path / 'prm'}", f"--data={tmp_path / 'steps.jsonl'}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    expected = [json.loads(line)["score"]["min"] for line in open(tmp_path / "s.jsonl")]
    assert [reward for row in found for reward in row["rewards"]] == pytest.approx(expected, abs=1e-6)
    assert all(row["best"] == row["answers"][row["rewards"].index(max(row["rewards"]))] for row in found)


def test_steps_of_a_conversation_are_scored_as_text():
    """A process reward model ranks answers of a chat model too: what user and assistant said, a line each."""
    scorer = types.SimpleNamespace(tokenizer=data.Tokenizer(ROOT / "tasks/arithmetic"), cfg=types.SimpleNamespace(step_token="\n"))
    said = [{"role": "system", "content": "7"}, {"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}, {"role": "tool", "content": "9"}, {"role": "user", "content": "4+5"}]
    trees = [reward.in_steps(data.Example(np.zeros(1, np.int32), [], [], [], [], [], [], "here", row={"prompt": prompt}), ["6\n7", "8"], scorer)
             for prompt in (said, "1+2\n3\n4+5\n")]
    assert trees[0].prompt.tolist() == trees[1].prompt.tolist() and len(trees[0].prompt) > 5
    assert [ids.tolist() for ids in trees[0].responses] == [ids.tolist() for ids in trees[1].responses]


@pytest.mark.parametrize("name, bias", [("v_head.summary", True), ("value_head", False), ("score", False), ("score", True)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_of_other_names_are_read(family, name, bias, tmp_path):
    """A value head of TRL (v_head.summary, with a bias) and others; the language model's head beside it is left out."""
    decoder = model.scratch({"model_type": family, **TINY[family]}, 0, {"lm_head": 0})
    tokenizer_from = ROOT / "tasks/arithmetic"
    model.save(decoder, tmp_path, torch.float32, tokenizer_from)
    state = load_file(tmp_path / "model.safetensors")
    width = decoder.shape.hidden_size
    head = torch.randn(1, width)
    save_file({**state, f"{name}.weight": head, **({f"{name}.bias": torch.tensor([0.5])} if bias else {})}, tmp_path / "model.safetensors")
    loaded, _ = model.load(tmp_path, {"score": 1})
    assert torch.equal(loaded.score.weight, head) and not hasattr(loaded, "lm_head")
    assert (loaded.score.bias is not None) == bias and (not bias or (loaded.score.bias.item(), loaded.score.bias.requires_grad) == (0.5, False))
    plain, _ = model.load(tmp_path)  # and the other way round
    assert not hasattr(plain, "score")
    model.save(loaded, tmp_path / "again", torch.float32, tokenizer_from)
    again, _ = model.load(tmp_path / "again", {"score": 1})
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values()))


def test_predictions_resume_and_stages(tmp_path, monkeypatch):
    """Two ranks write the predictions of one; a run that is resumed after its last step keeps its mean, also with a head whose
    bias is frozen; a model trained on from there has a mean of its own, or none."""
    monkeypatch.chdir(ROOT)
    options_ = dict(eval_data=ROWS["preference"], max_steps=2, save_every=1)
    decoder, _ = scratch_folder(tmp_path / "start", {"score": 1}, bias=0.5)
    for out, ranks in (("one", 1), ("two", 2)):
        run(options(tmp_path, "rm", out, init_from=tmp_path / "start", micro_batch_tokens=128, **options_), ranks=ranks)
    one, two = ([[*json.loads(line).values()] for line in open(tmp_path / out / "predictions.jsonl")] for out in ("one", "two"))
    assert torch.tensor(one).sub(torch.tensor(two)).abs().max() < 1e-9 and len(one) == 500
    said = json.loads((tmp_path / "one" / "model" / "config.json").read_text())
    run([*options(tmp_path, "rm", "one", init_from=tmp_path / "start", micro_batch_tokens=128, **options_), "--resume"])
    again = json.loads((tmp_path / "one" / "model" / "config.json").read_text())
    assert again == said and said["reward_std"] > 0 and load_file(tmp_path / "one" / "model" / "model.safetensors")["score.bias"].item() == 0.5
    run(options(tmp_path, "rm_plackett_luce", "ranked", init_from=tmp_path / "one", max_steps=1))
    ranked = json.loads((tmp_path / "ranked" / "model" / "config.json").read_text())
    assert "reward_mean" not in ranked and ranked["pad_token_id"] not in (None, 0)
    sample.main(["score", f"--model={tmp_path / 'one'}", f"--data={ROWS['preference']}", f"--out={tmp_path / 'n.jsonl'}", "--normalize", "--device=cpu"])
    values = [value for line in open(tmp_path / "n.jsonl") for value in json.loads(line).values()]
    assert abs(np.mean(values)) < 1e-3 and np.std(values) == pytest.approx(1, rel=1e-2)


def scratch_folder(folder, heads, bias=None):
    decoder = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0, "bos_token_id": 1}, 0, heads)
    if bias is not None:
        decoder.score.bias = torch.nn.Parameter(torch.tensor([bias]))
    model.save(decoder, folder, torch.float32, ROOT / "tasks/arithmetic")
    return decoder, folder


def test_a_language_model_with_a_value_head_is_a_reward_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    decoder, folder = scratch_folder(tmp_path / "m", {"lm_head": 0})
    state = load_file(folder / "model.safetensors")
    save_file({**state, "v_head.summary.weight": torch.ones(1, 32)}, folder / "model.safetensors")
    sample.main(["score", f"--model={folder}", f"--data={ROWS['preference']}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    assert isinstance(json.loads(open(tmp_path / "s.jsonl").readline())["chosen"], float)


def test_padding_is_a_special_token_or_for_the_config_alone(tmp_path):
    tokenizer = data.Tokenizer(ROOT / "tasks/arithmetic")
    cfg = config.load(options(tmp_path, "rm"))
    dataset = data.load(str(ROOT / ROWS["preference"]), "preference", tokenizer, cfg, False)
    assert train.padding(tokenizer, [dataset]) == (2, "<unk>")
    tokenizer.special = {tokenizer.eos}
    i, token = train.padding(tokenizer, [dataset])
    assert token == "" and i != tokenizer.eos and i not in {int(ids[-1]) for e in dataset.examples for ids in e.responses}


def test_a_new_score_head_is_small_and_seeded(tmp_path):
    model.save(model.scratch({"model_type": "llama", **TINY["llama"]}, 0), tmp_path, torch.float32, ROOT / "tasks/arithmetic")
    first, again, other = (model.load(tmp_path, {"score": 1}, seed)[0].score for seed in (0, 0, 1))
    width = first.weight.shape[1]
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight) and first.bias is None
    assert first.weight.std().item() == pytest.approx(1 / (width + 1), rel=0.5)


def test_identical_responses_teach_nothing(tmp_path, monkeypatch):
    """Pairs whose sides are equal, also once they are truncated, are left out and counted: what is learned is what the others teach."""
    monkeypatch.chdir(ROOT)
    equal = ['{"prompt": "1+1=", "chosen": "2", "rejected": "2"}', '{"prompt": "1+1=", "chosen": "2345678", "rejected": "2345679"}']
    others = ['{"prompt": "1+1=", "chosen": "2", "rejected": "3"}', '{"prompt": "1+2=", "chosen": "3", "rejected": "2"}']
    for name, rows in (("mixed", [equal[0], others[0], equal[1], others[1]]), ("others", others)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        given = dict(train_data=tmp_path / f"{name}.jsonl", max_steps=2, batch_size=2, max_length=10)
        train.train(config.load(options(tmp_path, "dpo", name, **given)))
    assert [{k: v for k, v in line.items() if k in ("loss", "grad_norm", "tokens")} for line in lines(tmp_path / "mixed")] == [
        {k: v for k, v in line.items() if k in ("loss", "grad_norm", "tokens")} for line in lines(tmp_path / "others")]
    assert json.loads((tmp_path / "mixed/run.json").read_text())["rows"]["train"]["identical"] == 2
    (tmp_path / "equal.jsonl").write_text(equal[0])
    with pytest.raises(ValueError, match="no usable row is left .*1 identical"):
        train.train(config.load(options(tmp_path, "rm", "equal", train_data=tmp_path / "equal.jsonl")))


def test_a_margin_and_a_ranking_reach_the_loss(tmp_path, monkeypatch):
    """Where all rewards are 0, the margin of a row shifts its loss; three ranked responses are three pairs, and one ranking."""
    monkeypatch.chdir(ROOT)
    silent = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0}, 0, {"score": 1}).double()
    torch.nn.init.zeros_(silent.score.weight)
    model.save(silent, tmp_path / "silent", torch.float64, ROOT / "tasks/arithmetic")
    given = dict(init_from=tmp_path / "silent", scratch=None, max_steps=1)
    (tmp_path / "margin.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 1.5}\n')
    train.train(config.load(options(tmp_path, "rm", train_data=tmp_path / "margin.jsonl", batch_size=1, **given)))
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(1 + math.exp(1.5)), abs=1e-12)
    (tmp_path / "ranked.jsonl").write_text('{"prompt": "1+1=", "responses": ["2", "3", "4"]}\n' * 2)
    for name, expected in (("rm", math.log(2)), ("rm_plackett_luce", math.log(6))):
        train.train(config.load(options(tmp_path, name, name, train_data=tmp_path / "ranked.jsonl", batch_size=2, **given)))
        assert lines(tmp_path / name)[0]["loss"] == pytest.approx(expected, abs=1e-12)
    cfg = config.load(options(tmp_path, "rm"))
    ranked = data.load(str(tmp_path / "ranked.jsonl"), "preference", data.Tokenizer(ROOT / "tasks/arithmetic"), cfg, False)
    assert (ranked.examples[0].chosen, ranked.examples[0].rejected) == ([0, 0, 1], [1, 2, 2]) and data.count(ranked.examples)["pairs"] == 6


STEPS = "tasks/arithmetic/steps_eval.jsonl"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [(), ("+", "=")])
def test_steps_are_scored_as_in_transformers(family, tokens, tmp_path, monkeypatch):
    """A head of two labels loads as AutoModelForTokenClassification, two tokens of the vocabulary as a causal model: the
    probability of each step from plain forward passes."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    scratch = {"scratch": {"model_type": family, **TINY[family]}} if family == "gpt2" else {}
    train.train(config.load(options(tmp_path, "prm", dtype="float32", save_dtype="float32", reward_tokens=tokens, **scratch)))
    sample.main(["score", f"--model={tmp_path / 'run'}", f"--data={STEPS}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    found = [json.loads(line)["score"] for line in open(tmp_path / "s.jsonl")]
    kind = transformers.AutoModelForCausalLM if tokens else transformers.AutoModelForTokenClassification
    theirs, tokenizer = kind.from_pretrained(tmp_path / "run" / "model"), data.Tokenizer(tmp_path / "run" / "model")
    columns = [tokenizer.one(t) for t in tokens] or [0, 1]
    for row, said in list(zip(map(json.loads, open(STEPS)), found, strict=True))[:20]:
        text, ends = row["prompt"], []
        for step in row["completions"]:
            text += step + "\n"
            ends.append(len(text) - 1)  # a character is a token
        with torch.no_grad():
            logits = theirs(torch.tensor([tokenizer.fast.encode(text).ids])).logits[0, ends][:, columns]
        expected = logits.softmax(-1)[:, 1].tolist()
        assert said["steps"] == pytest.approx(expected, abs=1e-5)
        assert (said["min"], said["product"], said["last"]) == pytest.approx((min(expected), math.prod(expected), expected[-1]), abs=1e-5)
        wrong = [i for i, p in enumerate(said["steps"]) if p < 0.5]
        assert said["first_wrong"] == (wrong[0] if wrong else None)


def test_unlabelled_steps_do_not_count(tmp_path, monkeypatch):
    """The loss of a row with one labelled step is that of the step alone."""
    monkeypatch.chdir(ROOT)
    rows = {"one": [1, None, None], "all": [1, 1, 1]}
    for name, labels in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "1+1=", "completions": ["2", "2", "2"], "labels": labels}) + "\n")
        train.train(config.load(options(tmp_path, "prm", name, train_data=tmp_path / f"{name}.jsonl", max_steps=1, batch_size=1)))
    sample.main(["score", f"--model={tmp_path / 'one'}", f"--data={tmp_path / 'one.jsonl'}", f"--out={tmp_path / 's.jsonl'}", "--device=cpu"])
    assert len(json.loads((tmp_path / "s.jsonl").read_text())["score"]["steps"]) == 3
    assert lines(tmp_path / "one")[0]["loss"] != pytest.approx(lines(tmp_path / "all")[0]["loss"], rel=1e-6)


def test_a_model_has_one_score_head():
    with pytest.raises(ValueError, match="need score heads with 1 and 2 labels; a model has only one|need score heads with 2 and 1"):
        model.modules(["reward", "step_logits"])


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.train(config.load(options(folder, "sft", max_steps=1, dtype="float32", eval_data=ROWS["sft"])))
    return folder / "run"


def test_generate_answers_rows_and_a_prompt(language_run, tmp_path, monkeypatch, capsys):
    """Answers in the rows' order, n of each, the same for the same seed; at temperature 0 the one that rollout.generate gives."""
    monkeypatch.chdir(ROOT)
    given = ["generate", f"--model={language_run}", "--data=tasks/arithmetic/problems_eval.jsonl", "--max_new_tokens=5", "--device=cpu"]
    sample.main([*given, "--n=2", f"--out={tmp_path / 'a.jsonl'}"])
    sample.main([*given, "--n=2", f"--out={tmp_path / 'b.jsonl'}", "--rollout_batch=7"])
    sample.main([*given, "--n=2", f"--out={tmp_path / 'c.jsonl'}", "--seed=1"])
    a, b, c = ([json.loads(line) for line in open(tmp_path / f"{name}.jsonl")] for name in "abc")
    assert a == b != c and [row["prompt"] for row in a] == [json.loads(line)["prompt"] for line in open("tasks/arithmetic/problems_eval.jsonl")]
    assert all(len(row["answers"]) == 2 for row in a)
    sample.main(["generate", f"--model={language_run}", "--prompt=1+2+3+4=", "--temperature=0", "--max_new_tokens=5", "--device=cpu"])
    said = json.loads(capsys.readouterr().out)
    decoder, tokenizer = model.load(language_run / "model")[0], data.Tokenizer(language_run / "model")
    ids = tokenizer.fast.encode("1+2+3+4=").ids
    (answer,), = sample.rollout.generate(decoder, [ids], max_new_tokens=5, stop=tokenizer.stops)
    assert said == {"prompt": "1+2+3+4=", "answers": [sample.rollout.written(tokenizer, answer)]}
    with pytest.raises(SystemExit, match="generate needs --data"):
        sample.main(["generate", f"--model={language_run}"])
    sample.main(["generate", f"--model={language_run}", "--prompt=", "--temperature=0", "--max_new_tokens=5", "--device=cpu"])  # behind BOS alone
    assert json.loads(capsys.readouterr().out)["prompt"] == ""


@pytest.mark.parametrize("command, said", [
    ("generate --prompt=1 --reward=nowhere", "--reward does nothing in generate; leave it out"), ("score --data=x --n=5", "--n does nothing in score"),
    ("chat --data=x", "--data does nothing in chat"), ("generate --prompt=1 --data=x", "or --prompt, and not both"),
    ("merge --out=x --weight=0.3", "--weight is the share of --model when two are merged"), ("generate --data=x --system=y", "--system is for --prompt; with --data, a row's system message is in its column"),
    ("best --prompt=1 --reward={model} --max_new_tokens=100000000", "is a language model; expected a reward model")])
def test_what_does_nothing_is_refused(command, said, language_run):
    """The last: before any answer is made."""
    with pytest.raises(SystemExit, match=said):
        sample.main([*command.format(model=language_run).split(), f"--model={language_run}", "--device=cpu"])


def test_the_systems_message_is_read(language_run, tmp_path):
    policy = sample.language_model(str(language_run), config.load(["--device=cpu"]))
    options = types.SimpleNamespace(prompt="1+2", system="3", data="")
    assert sample.asked(options, policy, None)[0].row == {"prompt": "3\n\n1+2"}
    policy.tokenizer.chat_template = tokens.CHATML
    assert sample.asked(options, policy, None)[0].row == {"prompt": [{"role": "system", "content": "3"}, {"role": "user", "content": "1+2"}]}


def test_a_check_of_many_answers_is_asked_at_once(language_run, tmp_path, monkeypatch, capsys):
    """As in an eval; and one that fails names its row."""
    monkeypatch.chdir(ROOT)
    given = ["compare", f"--model={language_run}", f"--other={language_run}", f"--check={tmp_path / 'c.py'}", "--prompt=1+2", "--max_new_tokens=3", "--device=cpu"]
    (tmp_path / "c.py").write_text("def check(prompts, completions, rows):\n    return [False for _ in prompts]\n")
    sample.main(given)
    assert json.loads(capsys.readouterr().out)["right"] == [False, False]
    (tmp_path / "c.py").write_text("def check(prompt, completion, row):\n    return row['answer']\n")
    with pytest.raises(SystemExit, match=rf"error: --prompt: check: KeyError: 'answer' \({tmp_path / 'c.py'}:2\)"):
        sample.main(given)


def test_models_that_judge_and_references_have_no_masters(reward_run, tmp_path):
    machine, tokenizer = Machine(0, 1, "cpu", torch.bfloat16, False), data.Tokenizer(ROOT / "tasks/arithmetic")
    cfg = config.load([*options(tmp_path, "dpo"), f"--tokenizer={ROOT / 'tasks/arithmetic'}"])
    scorer = reward.Scorer(str(reward_run), cfg, machine)
    reward.by_model(scorer, tokenizer)
    frozen = reference.frozen(types.SimpleNamespace(cfg=cfg, machine=machine, tokenizer=tokenizer, datasets={}), "scratch", ["log_probs"])
    for decoder in (scorer.decoder, frozen):
        assert {p.dtype for name, p in decoder.named_parameters() if "_proj." in name} == {torch.bfloat16}


def test_files_are_as_readable_as_others(language_run):
    modes = {path.stat().st_mode & 0o777 for path in (language_run / "model").iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def typed_in(monkeypatch, *texts):
    """The lines that are typed, and Ctrl-D."""
    rest = iter(texts)

    def ask(prompt):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", ask)


def test_chat_is_a_conversation(chat, tmp_path, monkeypatch, capsys):
    """The second prompt holds the first question and its answer; tokens are shown as they come, and add up to the answers."""
    folder, heard, answers, answers_to = tiny_folder(tmp_path / "model", chat), [], [], sample.answers_to
    tokenizer = data.Tokenizer(folder)

    def noted(ids, *given, **more):
        (answer,), = found = answers_to(ids, *given, **more)
        heard.append(ids[0])
        answers.append(rollout.written(tokenizer, answer))
        return found
    monkeypatch.setattr(sample, "answers_to", noted)
    typed_in(monkeypatch, "Who is it?", "And now?")
    sample.main(["chat", f"--model={folder}", "--temperature=0", "--max_new_tokens=16", "--device=cpu"])
    assert len(answers) == 2 and all(answers) and capsys.readouterr().out.split() == " ".join(answers).split()
    messages = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "And now?"}]
    for ids, before in zip(heard, (messages[:1], messages), strict=True):
        assert tokenizer.fast.decode(ids, skip_special_tokens=False) == tokenizer.render(before, True)


def test_an_answer_that_is_stopped_stays_in_the_conversation(chat, tmp_path, monkeypatch, capsys):
    folder, heard, answers_to = tiny_folder(tmp_path / "model", chat), [], sample.answers_to
    tokenizer = data.Tokenizer(folder)

    def stopped_once(ids, *given, watch, **more):
        heard.append(ids[0])
        if len(heard) > 1:
            return answers_to(ids, *given, watch=watch, **more)
        watch(0, tokenizer.fast.encode("It is in the").ids)
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "answers_to", stopped_once)
    typed_in(monkeypatch, "Where is Rome?", "Go on.")
    sample.main(["chat", f"--model={folder}", "--temperature=0", "--max_new_tokens=4", "--device=cpu"])
    assert "assistant\nIt is in the<|im_end|>" in tokenizer.fast.decode(heard[1], skip_special_tokens=False)


def test_chat_with_smollm2(smollm2, monkeypatch, capsys):
    """The second answer knows of the first question."""
    typed_in(monkeypatch, "What is the capital of France?", "And of Italy?")
    sample.main(["chat", f"--model={smollm2}", "--temperature=0", "--max_new_tokens=16", "--device=cpu"])
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "Paris" in first and "Rome" in second


def test_runs_are_drawn(language_run, reward_run, tmp_path, capsys, monkeypatch):
    """A PNG of whatever metrics there are, of a run that is still being written too; clear errors."""
    pytest.importorskip("matplotlib")
    import plot
    (tmp_path / "metrics.jsonl").write_text((language_run / "metrics.jsonl").read_text() + '{"step": 9, "spl')
    plot.main([str(language_run), str(reward_run), str(tmp_path), f"--out={tmp_path / 'all.png'}"])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.strip() == str(tmp_path / "all.png")
    assert plot.points(plot.read(str(language_run)), "eval", "loss")[0] == [0, 1] and plot.smooth([1.0, 3.0]) == [1.0, 3.0]
    with pytest.raises(SystemExit, match="no metrics.jsonl there"):
        plot.main([str(tmp_path / "nowhere")])
    legends = []
    from matplotlib.figure import Figure
    monkeypatch.setattr(Figure, "legend", lambda figure, handles, labels, **more: legends.append([*labels]))
    plot.main([str(language_run), str(reward_run), f"--out={tmp_path / 'two.png'}", "--only=nll,margin"])  # each has one of the two
    assert legends == [[str(language_run), str(reward_run)]]
    from matplotlib.axes import Axes
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axis, title, **more: titles.append(title))
    (tmp_path / "mine.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0, "seconds": 1.0, "tokens": 5, "mine": 2.0, "lr": 0.1}\n')
    plot.main([str(tmp_path / "mine.jsonl"), f"--out={tmp_path / 'mine.png'}"])
    assert titles == ["loss", "lr", "mine"]  # a metric of a fork, behind those that are known
    with pytest.raises(SystemExit, match="no metric nothing in .*; found step, split"):
        plot.main([str(language_run), "--only=nothing"])


def test_two_models_are_compared(language_run, reward_run, tmp_path, monkeypatch, capsys):
    """Answers of both in the rows' order, rewards as of `best`, the win rate counts ties half; against itself every prompt is a tie."""
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "sft", "other", max_steps=1, seed=7, dtype="float32", scratch={**SMALL, "initializer_range": 0.3})))
    (tmp_path / "check.py").write_text("def check(prompt, completion, row):\n    return completion < '5'\n")
    (tmp_path / "none.py").write_text("seed = 1\n")
    with pytest.raises(SystemExit, match="none.py: defines no function check"):
        sample.main(["compare", f"--model={language_run}", f"--other={language_run}", f"--check={tmp_path / 'none.py'}", "--prompt=1+2"])
    given = ["compare", f"--model={language_run}", f"--reward={reward_run}", f"--check={tmp_path / 'check.py'}", "--max_new_tokens=5",
             "--data=tasks/arithmetic/problems_eval.jsonl", "--device=cpu"]
    sample.main([*given, f"--other={language_run}", f"--out={tmp_path / 'same.jsonl'}"])
    assert "ties 500: win rate 0.500 +- 0.000" in capsys.readouterr().err
    sample.main([*given, f"--other={tmp_path / 'other'}", f"--out={tmp_path / 'both.jsonl'}"])
    said, found = capsys.readouterr().err, [json.loads(line) for line in open(tmp_path / "both.jsonl")]
    for key, verb in (("rewards", "is liked better"), ("right", "is right and the other is not")):
        won, lost = (sum(sign * (a - b) > 0 for a, b in (row[key] for row in found)) for sign in (1, -1))
        points = [1.0] * won + [0.0] * lost + [0.5] * (500 - won - lost)
        assert won and lost and f"{language_run} {verb} in {won} of 500, {tmp_path / 'other'} in {lost}," in said
        assert f"win rate {np.mean(points):.3f} +- {1.96 * np.std(points, ddof=1) / 500**0.5:.3f}" in said
    assert all(row["right"] == [text < "5" for text in row["answers"]] for row in found)
    shown = sample.beside(found[0])
    assert all(len(line) < 80 for line in shown.splitlines()) and found[0]["prompt"] in shown and found[0]["answers"][0].split()[0] in shown


def test_merged_weights_are_the_mean(tmp_path, monkeypatch):
    """Tensor by tensor; GPT-2 with a head of its own; a copy is the same model; what does not fit is refused."""
    monkeypatch.chdir(ROOT)
    gpt2 = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128)
    for seed in (0, 1):
        train.train(config.load(options(tmp_path, "rm", str(seed), seed=seed, max_steps=1, scratch=gpt2, save_dtype="float32", eval_data=ROWS["preference"])))
    train.train(config.load(options(tmp_path, "sft", "language", max_steps=1)))
    merge = lambda out, *more: sample.main(["merge", f"--model={tmp_path / '0'}", f"--out={tmp_path / out}", "--device=cpu", *more])
    merge("soup", f"--other={tmp_path / '1'}", "--weight=0.25")
    merge("copy")
    merge("narrow", "--save_dtype=bfloat16")
    one, other, soup, copy, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("0/model", "1/model", "soup", "copy", "narrow"))
    for name in one:
        assert torch.allclose(soup[name], 0.25 * one[name] + 0.75 * other[name], atol=1e-7) and torch.equal(copy[name], one[name])
        assert torch.equal(narrow[name], one[name].bfloat16())
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("0/model", "copy", "soup")]
    assert described[0] == described[1] and "reward_mean" in described[0] and "reward_mean" not in described[2]
    for message, more in (("already exists", ("copy",)), ("differ in more than their weights", ("bad", f"--other={tmp_path / 'language'}"))):
        with pytest.raises(SystemExit, match=message):
            merge(*more)


@pytest.mark.parametrize("name, family", [("sft", "llama"), ("sft", "gpt2"), ("rm", "llama"), ("prm", "gpt2"), ("value", "llama")])
def test_a_checkpoint_is_a_model_folder(name, family, tmp_path, monkeypatch, capsys):
    """The last checkpoint holds what model/ holds, and sample.py uses the one as the other."""
    monkeypatch.chdir(ROOT)
    scratch = SMALL if family == "llama" else dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128)
    train.train(config.load(options(tmp_path, name, scratch=scratch, max_steps=2, save_every=2, dtype="float32", save_dtype="float32")))
    whole, part = (load_file(tmp_path / "run" / folder / "model.safetensors") for folder in ("model", "checkpoint-2"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)
    what = ["generate", "--prompt=1+2+3+4=", "--temperature=0", "--max_new_tokens=4"] if name in ("sft", "value") else [
        "score", f"--data={ROWS['prm' if name == 'prm' else 'preference']}"]
    capsys.readouterr()
    for folder in ("model", "checkpoint-2"):
        sample.main([*what, f"--model={tmp_path / 'run' / folder}", "--device=cpu"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 2 and said[:len(said) // 2] == said[len(said) // 2:]


def test_words_are_typed_in_lines(capsys):
    text = "\n".join(" ".join("abcdefg"[:1 + i * j % 7] for i in range(60)) for j in range(1, 6)) + "\n\n    code(x)\n" + "x" * 200
    column = 0
    for begin in range(0, len(text), 7):
        column = sample.typed(text[begin:begin + 7], column)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 79 and "\n    code(x)\n" in said
    assert "".join(said.split()) == "".join(text.split())
