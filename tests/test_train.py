"""The loop: results do not depend on micro-batches, ranks or interruptions. Real runs on the arithmetic rows."""
import contextlib
import ctypes
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config
import data
import losses
import model
import reference
import sample
import train
from conftest import ROOT, layout
from launch import run, start
from machine import Machine

TRAINED = [name for name, o in losses.OBJECTIVES.items()  # what a run can train
           if losses.streams([losses.bind(name, 1.0, o.hyperparameters)]) <= model.HEADS.keys() | reference.SOURCES.keys()
           | losses.RUNNING.keys() | train.SUPPLIES.get(o.data, train.Rows).provides]
WIRINGS = {(o.data, o.reads, o.coupled): name for name, o in reversed(losses.OBJECTIVES.items()) if name in TRAINED}  # a loss of each


ROLLED = [name for name in TRAINED if losses.OBJECTIVES[name].data == "prompts"]
TIMES = ["rollout/seconds", "rollout/generate_seconds", "rollout/reward_seconds", "rollout/forward_seconds", "rollout/tokens_per_second"]
SMALL = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15)
ROWS = {"sft": "tasks/arithmetic/sft_eval.jsonl", "preference": "tasks/arithmetic/pairs_eval.jsonl", "kto": "tasks/arithmetic/pairs_eval.jsonl", "prm": "tasks/arithmetic/steps_eval.jsonl",
        "prompts": "tasks/arithmetic/problems_eval.jsonl", None: "tasks/arithmetic/sft_eval.jsonl"}


REWARD = """
def reward(prompt, completion, row):
    return completion.count("1") - 0.3 * completion.count("2") + 0.1 * len(completion)
"""  # of which answers of a new model get various amounts


def options(tmp_path, name="dpo", out="run", **changes):
    """The command line of a short run of an objective from a scratch model, without its reference cached elsewhere."""
    given = dict(objective=name, init_from="scratch", scratch=SMALL, tokenizer="tasks/arithmetic", schedule="constant",
                 train_data=ROWS.get(losses.OBJECTIVES[name].data, "nowhere"), out_dir=tmp_path / out, cache_dir=tmp_path / "cache",
                 batch_size=26, max_steps=4, lr=1e-2, max_length=64, dtype="float64", save_dtype="float64", device="cpu",
                 compile=False, samples=0)
    if "teacher_logits" in losses.OBJECTIVES[name].reads and not (tmp_path / "teacher").exists():
        teacher = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0, "num_hidden_layers": 1}, 5).double()
        model.save(teacher, tmp_path / "teacher", torch.float64, ROOT / "tasks/arithmetic")
    if "teacher_logits" in losses.OBJECTIVES[name].reads:
        given["teacher"] = tmp_path / "teacher"
    if losses.OBJECTIVES[name].data == "prompts":
        (tmp_path / "reward.py").write_text(REWARD)
        given |= dict(config=tmp_path / "reward.py", samples_per_prompt=3, max_new_tokens=6, batch_size=13)
        given["objective"] = {"kl": {"kl": 1.0, "reinforce": 1.0}, "value": {"value": 1.0, "ppo": 1.0}}.get(name, name)  # at the start
        # the gradient of the KL is 0, and a critic alone is no policy
    return [f"--{key}={value}" for key, value in {**given, **changes}.items()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def lines(folder, split="train"):
    return [line for line in map(json.loads, open(folder / "metrics.jsonl")) if line["split"] == split]


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < tolerance


def test_compiled_with_idle_rank_eval_and_stage_shapes(tmp_path):
    """Compiled blocks: a rank without rows, prompts answered in several batch shapes, other stream sizes: no recompilation
    limit is hit, and the result is that of the eager run."""
    file = tmp_path / "checked.py"
    file.write_text("from tasks.arithmetic.task import is_right as check\n")
    more = dict(config=file, batch_size=1, max_steps=2, eval_prompts="tasks/arithmetic/problems_eval.jsonl", max_new_tokens=3,
                eval_data=ROWS["preference"])
    run(options(tmp_path, "dpo", "eager", **more), ranks=2)
    run(options(tmp_path, "dpo", "compiled", **{**more, "compile": True}), ranks=2)
    assert_close(weights(tmp_path / "eager" / "model"), weights(tmp_path / "compiled" / "model"), 1e-9)
    assert lines(tmp_path / "compiled", "eval")[-1]["exact_match"] == lines(tmp_path / "eager", "eval")[-1]["exact_match"]


@pytest.mark.parametrize("name, batch_size", [*((name, 25) for name in WIRINGS.values()), ("dpo", 1), ("aot", 1)])
def test_micro_batches_and_ranks_do_not_matter(name, batch_size, tmp_path, monkeypatch):
    """float64, 4 AdamW steps: one stream, many small streams, and two ranks, between which rows are shared evenly
    (with one row a step, the second rank has nothing to do but to take part)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    more = dict(batch_size=batch_size, eval_data=ROWS[losses.OBJECTIVES[name].data])
    for out, tokens in (("large", 4096), ("small", 124)):
        train.train(config.load(options(tmp_path, name, out, micro_batch_tokens=tokens, **more)))
    run(options(tmp_path, name, "ranks", micro_batch_tokens=124, **more), ranks=2)
    cfg = config.load(options(tmp_path, name))
    dataset = data.load(cfg.train_data, config.data_kind(cfg), data.Tokenizer(ROOT / "tasks/arithmetic"), cfg, False)
    rows = [data.step_rows(dataset, step, batch_size, 0) for step in range(4)]
    streams = [[len(data.micro_batches(dataset, r, layout(124), rank, 2)[0]) for rank in (0, 1)] for r in rows]
    assert any(first != second for first, second in streams) or batch_size == 1 or name in ROLLED  # ranks had different numbers of micro-batches
    large = weights(tmp_path / "large" / "model")
    for out in ("small", "ranks"):
        assert_close(weights(tmp_path / out / "model"), large, 1e-9)
        for split in ("train", "eval"):
            for ours, theirs in zip(lines(tmp_path / out, split), lines(tmp_path / "large", split), strict=True):
                at_start = abs(theirs.get("rewards/margins", 1)) < 1e-12  # the sign of rounding noise is anybody's guess
                for key in theirs.keys() - ({"rewards/accuracies"} if at_start else set()) - {"split", "seconds", "tokens_per_second", "peak_memory_gb", *TIMES}:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-9), key
    before, *_, after = lines(tmp_path / "large", "eval")
    shown = "reward" if name in ROLLED else "loss"
    assert after[shown] != before[shown]  # it did train


@pytest.mark.parametrize("error, code, said", [("SystemExit('error: no')", 1, "error: no\n"), ("SystemExit(143)", 143, ""),
                                               ("KeyError('x')", 1, "KeyError: 'x'\n")])
def test_a_rank_leaves_with_its_error(error, code, said):
    """What NCCL's ranks do, which nothing here can wait for: the code and the words of a plain end, and output is not lost."""
    left = subprocess.run([sys.executable, "-c", f"import machine\nprint('out')\nmachine.leave({error})\nprint('not here')"], cwd=ROOT, capture_output=True, text=True)
    assert (left.returncode, left.stdout) == (code, "out\n") and left.stderr.endswith(said) and bool(left.stderr) == bool(said)


def test_under_nccl_an_error_does_not_wait():
    """As if there were a group of it: its end, which would wait for the others, is not called."""
    script = "import train, machine\nmachine.dist.is_initialized, machine.dist.get_backend, train.train = lambda: True, lambda: 'nccl', lambda cfg: 1 / 0\ntrain.main([])"
    left = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert left.returncode == 1 and left.stderr.endswith("ZeroDivisionError: division by zero\n") and "During handling" not in left.stderr


def test_a_rank_that_cannot_answer_stops_all(tmp_path):
    """A prompt of the second rank has a token that makes logits NaN; no row that is trained on has it."""
    broken = model.scratch({**SMALL, "vocab_size": 16, "eos_token_id": 0, "tie_word_embeddings": False}, 5).double()
    with torch.no_grad():
        broken.model.embed_tokens.weight[12] = math.nan  # "9"
    model.save(broken, tmp_path / "broken", torch.float64, ROOT / "tasks/arithmetic")
    (tmp_path / "rows.jsonl").write_text(4 * '{"prompt": "1+2=", "completion": "3"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "1+9="}\n')
    (tmp_path / "check.py").write_text("def check(prompt, completion, row):\n    return True\n")
    given = options(tmp_path, "sft", config=tmp_path / "check.py", init_from=tmp_path / "broken", train_data=tmp_path / "rows.jsonl",
                    eval_prompts=tmp_path / "prompts.jsonl", batch_size=4, max_new_tokens=3)
    done = run([word for word in given if not word.startswith("--scratch")], ranks=2, check=False, timeout=60)
    assert done.returncode == 1 and done.stderr.count("the model's logits are not finite") == 2, done.stderr
    assert (tmp_path / "run" / "checkpoint-0").is_dir()


def test_torchrun(tmp_path):
    """Ranks that torchrun has started end as they should, after the same run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *options(tmp_path, "dpo", "torchrun")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    run(options(tmp_path, "dpo", "forked"), ranks=2)
    assert_close(weights(tmp_path / "torchrun" / "model"), weights(tmp_path / "forked" / "model"), 1e-12)


def test_rows_couple_across_ranks_of_one_micro_batch_each(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for out, tokens, ranks in (("large", 4096, 1), ("ranks", 512, 2)):
        run(options(tmp_path, "aot", out, micro_batch_tokens=tokens, max_steps=2), ranks=ranks)
    cfg = config.load(options(tmp_path, "aot"))
    dataset = data.load(cfg.train_data, "preference", data.Tokenizer(ROOT / "tasks/arithmetic"), cfg, False)
    assert [len(data.pack([dataset.examples[i].length for i in data.step_rows(dataset, step, 26, 0)], 512)) for step in range(2)] == [2, 2]
    assert_close(weights(tmp_path / "ranks" / "model"), weights(tmp_path / "large" / "model"), 1e-9)


def test_first_gradient_in_fp32(tmp_path, monkeypatch):
    """Adam's first moment after one step is a tenth of the gradient."""
    monkeypatch.chdir(ROOT)
    more = dict(max_steps=1, save_every=1, dtype="float32", grad_clip=0)
    for out, tokens in (("large", 4096), ("small", 128)):
        train.train(config.load(options(tmp_path, "dpo", out, micro_batch_tokens=tokens, **more)))
    run(options(tmp_path, "dpo", "ranks", micro_batch_tokens=128, **more), ranks=2)
    large, small, ranks = (load_file(tmp_path / out / "checkpoint-1" / "optimizer.safetensors") for out in ("large", "small", "ranks"))
    flat = lambda state: torch.cat([state[n].flatten() for n in sorted(state) if n.endswith("exp_avg")])
    for other in (small, ranks):
        assert (flat(other) - flat(large)).norm() < 1e-5 * flat(large).norm()


@pytest.mark.parametrize("name, compiled, ranks, dtype", [
    ("sft", False, 1, "float32"), ("dpo", False, 1, "float32"), ("dpo", False, 2, "float32"), ("bco_pair", False, 2, "float64"),
    ("aot", False, 2, "float32"), ("dpo", True, 1, "float32"), ("rm", False, 1, "float32"), ("kto", False, 2, "float32"),
    ("prm", False, 1, "float32"), ("kd", False, 1, "float32"), ("dpo-gpt2", False, 1, "float32"), ("prm-gpt2", False, 1, "float64"),
    ("value-gpt2", False, 1, "float64"), ("dpo-muon", False, 2, "float32")])  # of kd with top logits: test_distillation
def test_resume_is_bitwise(name, compiled, ranks, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    name, _, family = name.partition("-")
    more = dict(dtype=dtype, save_dtype=dtype, compile=compiled, save_every=2, micro_batch_tokens=384 if compiled else 128)
    more |= {"gpt2": {"scratch": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128)}, "muon": {"optimizer": "muon"}}.get(family, {})
    go = (lambda arguments, ranks: train.train(config.load(arguments))) if ranks == 1 else run
    go(options(tmp_path, name, "whole", **more), ranks)
    go(options(tmp_path, name, "parts", **{**more, "max_steps": 2}), ranks)
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 3, "split": "train", "loss": 9}\n{"step": 4, "sp')
    go([*options(tmp_path, name, "parts", **more), "--resume"], ranks)
    whole, parts = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])


@pytest.mark.parametrize("label", [True, False])
def test_a_run_with_one_class(label, tmp_path, monkeypatch):
    """All desirable or all undesirable: KTO starts at 1/2 and moves, and reports no metric of the class that is not there."""
    monkeypatch.chdir(ROOT)
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": label} for r in map(json.loads, open(ROWS["preference"]))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:60]))
    for name in ("kto", "kto_vanilla", "bco"):
        train.train(config.load(options(tmp_path, name, name, train_data=tmp_path / "rows.jsonl")))
        first, *_, last = lines(tmp_path / name)
        assert first["loss"] == pytest.approx(math.log(2) if name == "bco" else 0.5, abs=1e-12) and last["loss"] != first["loss"]
        assert ("rewards/desirable" in last, "rewards/undesirable" in last, "rewards/margins" in last) == (label, not label, False)


def test_the_kl_of_an_eval_does_not_depend_on_micro_batches(tmp_path, monkeypatch):
    """Pieces of the eval rows have their own z0: its mean is over responses."""
    monkeypatch.chdir(ROOT)
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in map(json.loads, open(ROWS["preference"]))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:400]))
    for out, tokens in (("large", 4096), ("small", 128)):
        train.train(config.load(options(tmp_path, "kto", out, train_data=tmp_path / "rows.jsonl", eval_data=tmp_path / "rows.jsonl", micro_batch_tokens=tokens)))
    large, small = (lines(tmp_path / out, "eval")[-1] for out in ("large", "small"))
    assert large["kl"] > 0.01 and large["kl"] == pytest.approx(small["kl"], rel=1e-9)


def test_mixed_rows_report_their_margin(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "kto")))
    last = lines(tmp_path / "run")[-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/desirable"] - last["rewards/undesirable"], abs=1e-12) and last["rewards/margins"] != 0


def test_the_reference_is_the_start_and_not_the_policy(tmp_path, monkeypatch):
    """Step 1 starts at margin 0; a live reference, a cached one and a second use of the cache agree; steps move away."""
    monkeypatch.chdir(ROOT)
    for out, more in (("cached", {}), ("again", {}), ("live", dict(reference_live=True))):
        train.train(config.load(options(tmp_path, "dpo", out, **more)))
    cached, again, live = (lines(tmp_path / out) for out in ("cached", "again", "live"))
    assert abs(cached[0]["rewards/margins"]) < 1e-12 and cached[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-12)
    assert abs(cached[-1]["rewards/margins"]) > 1e-3
    for a, b, c in zip(cached, again, live, strict=True):
        assert a["loss"] == b["loss"] == pytest.approx(c["loss"], abs=1e-12)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text() + "# edited\n")
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))  # of a fork: what its model says may be something else
    train.train(config.load(options(tmp_path, "dpo", "edited", max_steps=1)))
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("name, cached, live", [("dpo", {}, dict(reference_live=True)), ("kto", {}, dict(reference_live=True)), ("kd", dict(teacher_top_k=16), {})])
def test_a_short_run_asks_the_reference_about_its_own_rows(name, cached, live, tmp_path, monkeypatch, capsys):
    """The steps' rows, in pieces of 64, and all eval rows; one more step in the same pieces reads the cache, as does any after a run of
    all rows. Training is that of a live reference."""
    monkeypatch.chdir(ROOT)
    read = []
    monkeypatch.setattr(reference, "sweep", lambda of, dataset, layout, machine, what, parts, sweep=reference.sweep: read.append(
        sorted(i for rows in parts for i in rows.tolist())) or sweep(of, dataset, layout, machine, what, parts))
    (tmp_path / "eval.jsonl").write_text("".join(open(ROWS[losses.OBJECTIVES[name].data]).readlines()[:40]))
    given = dict(eval_data=tmp_path / "eval.jsonl", batch_size=30)
    for out, more in (("cached", cached | dict(max_steps=1)), ("more", cached | dict(max_steps=2)), ("live", live | dict(max_steps=2))):
        train.train(config.load(options(tmp_path, name, out, **given, **more)))
    cfg = config.load(options(tmp_path, name))
    dataset = data.load(cfg.train_data, config.data_kind(cfg), data.Tokenizer(ROOT / "tasks/arithmetic"), cfg, False)
    steps = {i for step in range(2) for i in data.step_rows(dataset, step, 30, 0).tolist()}
    assert {len(rows) for rows in read} == {40, 64} and all(steps < {*rows} for rows in read if len(rows) == 64)
    assert "of 64 rows: read from the cache" in capsys.readouterr().out
    read.clear()
    for out, more in (("whole", ONE_EPOCH), ("after", dict(max_steps=1))) if name == "dpo" else ():
        train.train(config.load(options(tmp_path, name, out, seed=1, **given, **more)))
        assert len(read) == 2 and {len(rows) for rows in read} == {40, 500}  # by the first
    for split in ("train", "eval"):
        for a, b in zip(lines(tmp_path / "more", split), lines(tmp_path / "live", split), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-12) and a.get("kl") == pytest.approx(b.get("kl"), abs=1e-12)


def test_machines_may_have_a_cache_each(tmp_path):
    """One rank of each machine keeps the table; where one has a whole table and the other none, it is made again and nothing is spoiled."""
    (tmp_path / "own.py").write_text(f"import os\nos.environ['LOCAL_RANK'] = '0'\ncache_dir = {str(tmp_path / 'cache')!r} + os.environ['RANK']\n")
    def told(out, **more):
        given = [o for o in options(tmp_path, "dpo", out, config=tmp_path / "own.py", batch_size=50, **more) if not o.startswith("--cache_dir")]
        return "rows: read from the cache" in run(given, ranks=2).stdout
    assert not told("first", **ONE_EPOCH) and told("second", **ONE_EPOCH) and told("short", max_steps=1)
    tables = sorted((tmp_path / "cache1").iterdir())
    assert [path.name for path in tables] == [path.name for path in sorted((tmp_path / "cache0").iterdir())] and len(tables) == 1
    tables[0].unlink()
    assert not told("again", max_steps=1)
    kept = load_file(tmp_path / "cache0" / tables[0].name)["log_probs"]
    assert (kept != 0).all() and len([*(tmp_path / "cache0").iterdir()]) == 2


def test_margin_at_the_start_in_fp32_with_other_packing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "dpo", dtype="float32", max_steps=1)))
    assert abs(lines(tmp_path / "run")[0]["rewards/margins"]) < 1e-3 * 0.1


def test_evals_are_of_every_row_once_and_tokens_are_real(tmp_path, monkeypatch):
    """An eval over micro-batches and ranks is the mean of evals of each row by itself, and is not changed by how steps are logged; tokens
    of an epoch's steps are those of the rows, prompts once and no padding, and tokens_per_second is of them."""
    monkeypatch.chdir(ROOT)
    rows = open(ROOT / ROWS["preference"]).readlines()[:7]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    given = dict(train_data=tmp_path / "rows.jsonl", eval_data=tmp_path / "rows.jsonl", batch_size=3, max_steps=0, micro_batch_tokens=64)
    run(options(tmp_path, "orpo", log_every=2, **given), ranks=2)
    run(options(tmp_path, "orpo", "each", **given))
    (both, last), each = lines(tmp_path / "run"), lines(tmp_path / "each")
    cfg = config.load(options(tmp_path, "orpo", **given))
    lengths = data.load(cfg.train_data, "preference", data.Tokenizer(ROOT / "tasks/arithmetic"), cfg, False).lengths
    assert [line["step"] for line in each] == [1, 2, 3] and sum(line["tokens"] for line in each) == lengths.sum()
    assert both["tokens_per_second"] * both["seconds"] * 2 == pytest.approx(each[0]["tokens"] + each[1]["tokens"])
    assert last["tokens_per_second"] * last["seconds"] == pytest.approx(each[2]["tokens"])
    alone = []
    for i, row in enumerate(rows):
        (tmp_path / "one.jsonl").write_text(row)
        train.train(config.load(options(tmp_path, "orpo", str(i), **{**given, "eval_data": tmp_path / "one.jsonl", "max_steps": 1})))
        alone.append(lines(tmp_path / str(i), "eval")[0])
    for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "nll"):
        assert lines(tmp_path / "run", "eval")[0][key] == pytest.approx(sum(line[key] for line in alone) / len(rows), rel=1e-12), key
    described = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    assert described["train"]["used"] == described["eval"]["used"] == 7


def test_weighted_objectives_add_up(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.train(config.load([*options(tmp_path, "dpo", max_steps=1), "--objective={'dpo': 1.0, 'sft': 0.25}"]))
    line = lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["loss/dpo"] + 0.25 * line["loss/sft"], rel=1e-9)
    assert line["nll"] == line["loss/sft"]


def test_a_run_writes_what_the_contract_says(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "dpo", eval_data=ROWS["preference"], save_every=1, eval_every=2, dtype="float32", save_dtype="bfloat16")))
    out = tmp_path / "run"
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(out, "eval")] == [0, 2, 4]
    assert {"step", "split", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "peak_memory_gb", "rewards/chosen",
            "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"} <= lines(out)[0].keys()
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]  # keep_checkpoints = 2
    assert {p.name for p in (out / "checkpoint-4").iterdir()} == {p.name for p in (out / "model").iterdir()} | {"optimizer.safetensors", "state.json"}
    assert {p.name for p in (out / "model").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {t.dtype for t in weights(out / "model").values()} == {torch.bfloat16}
    assert {t.dtype for t in weights(out / "checkpoint-4").values()} == {torch.float32}
    with pytest.raises(ValueError, match="not empty; go on with --resume"):
        train.train(config.load(options(tmp_path, "dpo")))


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_every_objective_trains(name, tmp_path, monkeypatch):
    """Two steps on real rows, eval and metrics included."""
    monkeypatch.chdir(ROOT)
    kind = losses.OBJECTIVES[name].data
    given = options(tmp_path, name, eval_data=ROWS.get(kind, ""), max_steps=2)
    assert name in TRAINED
    train.train(config.load(given))
    (before, after), (first, second) = (lines(tmp_path / "run", split) for split in ("eval", "train"))
    assert None not in {**before, **after, **first, **second}.values() and second["loss"] != first["loss"] and (name in ROLLED or after["loss"] != before["loss"])


def test_memory_for_time_changes_no_weight(tmp_path, monkeypatch):
    """More of it: no softmax is made again. Less: every block is."""
    monkeypatch.chdir(ROOT)
    again, body = [], losses._chunk_grad
    monkeypatch.setattr(losses, "head_chunk", lambda vocab, device: 16)
    monkeypatch.setattr(losses, "_chunk_grad", lambda *given: again.append(given[-1] is None) or body(*given))
    for out, more in (("plain", {}), ("more", dict(head_memory=0.1)), ("less", dict(activation_checkpointing=True))):
        again.clear()
        train.train(config.load(options(tmp_path, "dpo", out, **more)))
        assert any(again) == (out != "more") and not all(again)
        assert_close(weights(tmp_path / "plain" / "model"), weights(tmp_path / out / "model"), 1e-12)


@pytest.mark.parametrize("option", [dict(reference_free=True), dict(ld_alpha=0.2), dict(f_divergence="js"), dict(f_divergence=0.5), dict(wpo=True)])
def test_options_train_and_do_not_depend_on_micro_batches(option, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for out, more in (("plain", dict(micro_batch_tokens=4096)), ("large", dict(micro_batch_tokens=4096, **option)), ("small", dict(micro_batch_tokens=128, **option))):
        train.train(config.load(options(tmp_path, "dpo", out, max_steps=2, **more)))
    plain, large, small = (weights(tmp_path / out / "model") for out in ("plain", "large", "small"))
    assert_close(large, small, 1e-9)
    assert max((plain[n] - large[n]).abs().max().item() for n in plain) > 1e-6


def test_the_running_mean_is_of_all_steps_before(tmp_path, monkeypatch):
    """bco_pair's d, from the logged metrics of each step; a resumed run carries it on (test_resume_is_bitwise)."""
    monkeypatch.chdir(ROOT)
    for out, more in (("delta", {}), ("none", dict(delta=False))):
        train.train(config.load(options(tmp_path, "bco_pair", out, save_every=1, keep_checkpoints=9, **more)))
    logged = [line["rewards/mean"] for line in lines(tmp_path / "delta")]
    for step in range(1, 5):
        total, count = json.loads((tmp_path / "delta" / f"checkpoint-{step}" / "state.json").read_text())["running"]["running_reward"]
        assert total / count == pytest.approx(sum(logged[:step]) / step, abs=1e-12)
    with pytest.raises(ValueError, match="dpo was trained there, and this run trains bco_pair; name another --out_dir"):
        for name, steps in (("dpo", 1), ("bco_pair", 2)):
            train.train(config.load([*options(tmp_path, name, "other", save_every=1, max_steps=steps), "--resume"]))
    assert abs(logged[1]) > 1e-3 and lines(tmp_path / "delta")[1]["loss"] == pytest.approx(lines(tmp_path / "none")[1]["loss"], rel=1e-12)
    assert lines(tmp_path / "delta")[-1]["loss"] != pytest.approx(lines(tmp_path / "none")[-1]["loss"], rel=1e-6)


def test_a_step_that_is_not_finite_is_left_out_of_the_running_mean():
    running, alone = {"running_reward": torch.zeros(2, dtype=torch.float64)}, Machine(0, 1, "cpu", torch.float32, False)
    for value in (3.0, float("nan"), float("inf"), 5.0):
        meter = train.Meter()
        meter.add(torch.zeros(()), {"rewards/mean": (torch.tensor(value), torch.tensor(2.0))})
        train.add_step(running, meter, alone)
    assert running["running_reward"].tolist() == [8.0, 4.0]


def test_counts_are_those_that_losses_know():
    assert data.count([]).keys() - {"stream_tokens"} <= set(losses.COUNTS)
    with pytest.raises(ValueError, match="the running mean of the metric 'rewards/mean', and no loss of this run reports it"):
        train.add_step({"running_reward": torch.zeros(2)}, train.Meter(), None)


def test_bad_input_is_one_line(tmp_path):
    done = run(["--config=configs/dpo.py", "--bta=0.1"], check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: command line: unknown key 'bta'. Did you mean 'beta'?")
    assert "Traceback" not in done.stderr


def test_a_failed_start_leaves_nothing_and_a_run_is_a_start(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no such file"):
        train.train(config.load([*options(tmp_path, "dpo"), "--train_data=nowhere.jsonl"]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="'scratch' needs tokenizer, a folder with tokenizer.json"):
        train.train(config.load([*options(tmp_path, "dpo"), "--tokenizer="]))
    with pytest.raises(ValueError, match="eval_prompts need check"):
        train.train(config.load([*options(tmp_path, "dpo"), "--eval_prompts=tasks/arithmetic/problems_eval.jsonl"]))
    train.train(config.load(options(tmp_path, "dpo", chat_template="chatml", max_steps=1)))
    assert "im_start" in (tmp_path / "run" / "model" / "chat_template.jinja").read_text()
    from test_data import with_marks
    marked = with_marks(tmp_path / "marked").folder
    (marked / "generation_config.json").write_text('{"max_length": 99, "eos_token_id": 0}')
    train.train(config.load(options(tmp_path, "dpo", "ended", chat_template="chatml", tokenizer=marked, max_steps=1)))
    saved = tmp_path / "ended" / "model"  # what ends a turn ends an answer elsewhere, too
    described = [json.loads((saved / name).read_text()) for name in ("config.json", "generation_config.json")]
    tokenizer = data.Tokenizer(saved)
    assert [d["eos_token_id"] for d in described] == [sorted({tokenizer.eos, tokenizer.fast.token_to_id("<|im_end|>")})] * 2 and described[1]["max_length"] == 99
    assert tokenizer.stops == set(described[0]["eos_token_id"])
    train.train(config.load(options(tmp_path, "dpo", "again", tokenizer=saved, max_steps=1)))  # a new model, with a tokenizer that ends turns
    sample.main(["merge", f"--model={tmp_path / 'again'}", f"--out={tmp_path / 'merged'}", "--device=cpu"])
    for folder in (tmp_path / "again" / "model", tmp_path / "merged"):
        assert [json.loads((folder / name).read_text())["eos_token_id"] for name in ("config.json", "generation_config.json")] == [sorted(tokenizer.stops)] * 2
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["eos_token_id"] == 0  # EOS ends a turn there
    train.train(config.load(options(tmp_path, "dpo", "on", init_from=tmp_path / "run", max_steps=1)))  # a config's own out_dir


def test_a_missing_stage_is_run_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = dict(line[2:].split("=", 1) for line in options(tmp_path, "sft", "first", max_steps=2))
    plain = ("batch_size", "max_steps", "lr", "max_length", "compile", "scratch", "samples")
    file = tmp_path / "first.py"
    file.write_text("".join(f"{k} = {v if k in plain else repr(v)}\n" for k, v in stage.items()))
    for out, more in (("second", []), ("third", []), ("fourth", ["--seed=5"])):
        train.train(config.load([*options(tmp_path, "dpo", out, max_steps=1, init_from=file), *more]))
        made = (tmp_path / "first" / "model" / "model.safetensors").stat().st_mtime_ns
        if out == "third":
            assert made == before  # it was there
        elif out == "fourth":
            assert made != before and (tmp_path / "first.old1" / "model").is_dir()  # another seed: run again, nothing lost
        before = made
    for out, name in (("by config", file), ("by folder", tmp_path / "first")):  # a stage may be the reference, too
        train.train(config.load(options(tmp_path, "dpo", out, max_steps=1, seed=6, reference=name)))
    by_config, by_folder = (lines(tmp_path / out)[0]["rewards/margins"] for out in ("by config", "by folder"))
    assert by_config == by_folder != 0 and (tmp_path / "first.old2").is_dir()
    changed = (ROOT / "tasks/arithmetic/tokenizer.json").read_text().replace('"7": 10', '"7": 11').replace('"8": 11', '"8": 10')
    (tmp_path / "first" / "model" / "tokenizer.json").write_text(changed)
    with pytest.raises(ValueError, match="first/model: token '[78]' has id 1[01] there and 1[01] in .*; models that are used together need the same ids"):
        train.train(config.load(options(tmp_path, "dpo", "other tokens", max_steps=1, reference=tmp_path / "first", cache_dir=tmp_path / "empty")))


def test_two_stages_do_not_share_a_folder(tmp_path, monkeypatch):
    """out_dir has a default: a run would overwrite the stage that it begins from, or one stage another."""
    monkeypatch.chdir(ROOT)
    for name, out in (("one", "shared"), ("other", "shared"), ("apart", "apart")):
        (tmp_path / f"{name}.py").write_text(f"objective = 'sft'\ninit_from = 'scratch'\nout_dir = {str(tmp_path / out)!r}\n")
    refused = lambda message, **more: pytest.raises(ValueError, train.train, config.load(options(tmp_path, "dpo", **more))).match(message)
    refused("this run and .*one.py would both write to out_dir = .*shared", out="shared", init_from=tmp_path / "one.py")
    (tmp_path / "inner.py").write_text(f"objective = 'sft'\ninit_from = 'scratch'\nout_dir = {str(tmp_path / 'run' / 'first')!r}\n")
    refused("this run and .*inner.py would both write .*; give each its own folder, none nested", init_from=tmp_path / "inner.py")
    refused("one.py and .*other.py would both write", init_from=tmp_path / "one.py", reference=tmp_path / "other.py")
    assert not (tmp_path / "shared").exists() and not (tmp_path / "run").exists()
    cfg = config.load(options(tmp_path, "dpo", init_from=tmp_path / "one.py", reference=tmp_path / ".." / tmp_path.name / "one.py"))
    assert {name: stage.out_dir for name, stage in config.stages(cfg).items()} == {os.path.relpath(tmp_path / "one.py"): str(tmp_path / "shared")}  # one stage, named in two ways


def test_a_run_goes_on_in_another_dtype_and_not_with_another_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    go = lambda *more, **changes: train.train(config.load([*options(tmp_path, "dpo", **{"max_steps": 2, "save_every": 1, **changes}), *more]))
    go(dtype="float32")
    with pytest.raises(ValueError, match="checkpoint-2: another optimizer was used there; go on with that one"):
        go("--resume", dtype="float32", max_steps=3, optimizer="muon")
    for steps, dtype in enumerate(("float64", "float16", "float32"), 3):
        go("--resume", dtype=dtype, max_steps=steps)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5] and all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
    capsys.readouterr()
    go("--resume", dtype="float32", max_steps=6, objective={"dpo": 0.5})  # a weight is no other objective
    assert "weights.dpo 1.0 -> 0.5" in capsys.readouterr().out


def test_a_run_that_came_and_went_is_not_written_over(tmp_path, monkeypatch):
    """While this one was preparing: it looked into its folder before."""
    monkeypatch.chdir(ROOT)
    prepared = train.prepared

    def meanwhile(*given):
        monkeypatch.undo()
        monkeypatch.chdir(ROOT)
        run(options(tmp_path, "sft", max_steps=1))
        return prepared(*given)
    monkeypatch.setattr(train, "prepared", meanwhile)
    with pytest.raises(ValueError, match="out_dir .*run is not empty"):
        train.train(config.load(options(tmp_path, "dpo")))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1] and checkpoint.run_json(tmp_path / "run")["finished"]


def test_what_scratch_does_not_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train.train(config.load(options(tmp_path, "sft", max_steps=1, scratch={**SMALL, "num_key_value_head": 4, "softcap": 30.0})))
    assert "scratch: num_key_value_head, softcap: not used by a llama model" in capsys.readouterr().err
    train.train(config.load(options(tmp_path, "sft", "plain", max_steps=1)))
    assert "not used" not in capsys.readouterr().err


def test_a_slip_is_found_before_the_stages(tmp_path, monkeypatch):
    """Files that are not there, and what a run lacks."""
    monkeypatch.chdir(ROOT)
    stage = f"objective = 'sft'\ninit_from = 'scratch'\nscratch = {SMALL}\ntokenizer = 'tasks/arithmetic'\nout_dir = {str(tmp_path / 'first')!r}\n"
    (tmp_path / "first.py").write_text(stage + f"train_data = {ROWS['sft']!r}\n")
    (tmp_path / "second.py").write_text(stage.replace("first", "second"))
    for key in ("train_data", "eval_data"):
        with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
            train.train(config.load(options(tmp_path, "dpo", init_from=tmp_path / "first.py", **{key: tmp_path / "nowhere.jsonl"})))
    for name, wrong, message in (("kd", dict(teacher=""), "distillation needs teacher"), ("ppo", dict(reward=""), "rollouts need reward"),
                                 ("ppo", dict(reward={"x": "y"}), "reward = {'x': 'y'}; expected a function"),
                                 ("ppo", dict(advantages="gae"), "needs a critic"), ("rm", dict(eval_prompts="x"), "eval_prompts need check"),
                                 ("dpo", dict(reference=tmp_path / "second.py"), "second.py: train_data is empty")):
        with pytest.raises(ValueError, match=message):
            train.train(config.load(options(tmp_path, name, init_from=tmp_path / "first.py", **wrong)))
    assert not (tmp_path / "first").exists()


def test_two_runs_do_not_work_in_one_folder(tmp_path, monkeypatch):
    """A run that goes on while it is still at work elsewhere, or a stage that would be moved away from under a run, is refused."""
    monkeypatch.chdir(ROOT)
    stage = dict(line[2:].split("=", 1) for line in options(tmp_path, "sft", "first", max_steps=2))
    plain = ("batch_size", "max_steps", "lr", "max_length", "compile", "scratch", "samples")
    (tmp_path / "first.py").write_text("".join(f"{k} = {v if k in plain else repr(v)}\n" for k, v in stage.items()))
    given = lambda out, **more: options(tmp_path, "dpo", out, init_from=tmp_path / "first.py", **more)
    running = start(given("long", max_steps=10**6))
    try:
        while not (tmp_path / "long" / "metrics.jsonl").exists():
            assert running.is_alive()
            time.sleep(0.1)
        before = sorted(tmp_path.iterdir())
        for message, arguments in (("long: another run is writing there", [*given("long", max_steps=1), "--resume"]),
                                   ("first: another run is writing there or has started from it", given("short", seed=5))):
            with pytest.raises(ValueError, match=message):
                train.train(config.load(arguments))
        assert sorted(tmp_path.iterdir()) == before
        train.train(config.load(given("beside", max_steps=1)))  # from the same stage
    finally:
        running.kill()
        running.join()
    train.train(config.load(given("short", seed=5, max_steps=1)))
    assert (tmp_path / "first.old1" / "model").is_dir()
    (tmp_path / "without" / "lock").mkdir(parents=True)  # where there can be no lock, there is none
    checkpoint.hold(tmp_path / "without", Machine(0, 1, "cpu", torch.float32, False), alone=False)


def test_what_goes_on_is_the_run_that_was(tmp_path, monkeypatch, capsys):
    """A finished run is not trained again, and not another one in its place; what has changed is said."""
    monkeypatch.chdir(ROOT)
    go = lambda *more, **changes: train.train(config.load([*options(tmp_path, "dpo", **changes), *more]))
    go(max_steps=2, save_every=1)
    model_file = tmp_path / "run" / "model" / "model.safetensors"
    made, written = model_file.stat().st_mtime_ns, (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    go("--resume", max_steps=2, save_every=1)
    go("--resume", max_steps=2, log_every=5, device="auto")  # neither changes the result
    assert capsys.readouterr().out.count("is finished already") == 2 and model_file.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="dpo was trained there, and this run trains ipo; name another --out_dir"):
        train.train(config.load([*options(tmp_path, "ipo", max_steps=3), "--resume"]))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == written
    go("--resume", max_steps=3, lr=1e-4)
    assert "continues with changed settings: lr 0.01 -> 0.0001; max_steps 2 -> 3" in capsys.readouterr().out
    there = (tmp_path / "run" / "metrics.jsonl").read_text()
    for steps in (1, 2):  # 3 was not saved
        with pytest.raises(ValueError, match=f"its newest checkpoint is of step 2, and the run ends at step {steps}: no step is left"):
            go("--resume", max_steps=steps)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == there
    go(out="other dtype", max_steps=1, save_every=1)
    go("--resume", out="other dtype", max_steps=1, save_every=1, save_dtype="bfloat16")  # takes no step
    assert {t.dtype for t in weights(tmp_path / "other dtype" / "model").values()} == {torch.bfloat16}
    go(out="bare", max_steps=1)
    with pytest.raises(ValueError, match="is finished and holds no checkpoint to go on from .max_steps 1 -> 2."):
        go("--resume", out="bare", max_steps=2)


@pytest.mark.parametrize("name, key, heads", [("dpo", "reference", model.LANGUAGE), ("kd", "teacher", model.LANGUAGE), ("ppo", "reference", model.LANGUAGE),
                                               ("value", "critic", {"score": 1})])
def test_every_model_of_a_run_has_positions_for_its_rows(name, key, heads, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    gpt2 = dict(model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    short = model.scratch({**gpt2, "n_positions": 16, "vocab_size": 16, "eos_token_id": 0}, 0, heads)
    model.save(short, tmp_path / "short", torch.float32, ROOT / "tasks/arithmetic")
    more = {"kl_coef": 0.1} if (name, key) == ("ppo", "reference") else {}
    with pytest.raises(ValueError, match=r"\.jsonl:\d+: \d+ tokens, and the model has 16 positions; set max_length"):
        train.train(config.load(options(tmp_path, name, scratch={**gpt2, "n_positions": 64}, **{key: tmp_path / "short"}, **more)))


def test_a_critic_does_not_read_what_is_only_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    gpt2 = dict(model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    short = model.scratch({**gpt2, "n_positions": 24, "vocab_size": 16, "eos_token_id": 0}, 0, {"score": 1})
    model.save(short, tmp_path / "short", torch.float32, ROOT / "tasks/arithmetic")
    (tmp_path / "long.jsonl").write_text('{"prompt": "1+1+1+1+1+1+1+1+1+1+1+1+1+1="}\n')
    train.train(config.load([*options(tmp_path, "value", scratch={**gpt2, "n_positions": 64}, critic=tmp_path / "short", max_steps=1,
                                      eval_prompts=tmp_path / "long.jsonl")]))


def test_what_others_refuse_without_a_file_is_theirs_to_say(monkeypatch):
    def refuse(cfg):
        raise PermissionError("no key for the tracker")
    monkeypatch.setattr(train, "train", refuse)
    with pytest.raises(PermissionError, match="no key"):
        train.main([])


def test_an_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    failed = run(options(tmp_path, "sft"), check=False)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1] == f"error: {tmp_path / 'run'}: Not a directory"


def test_learning_rate():
    cfg = config.load(["--lr=1.0", "--warmup_steps=4", "--schedule=linear", "--min_lr=0.2"])
    assert [train.learning_rate(cfg, cfg.lr, s, 8) for s in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4])
    cfg = config.load(["--lr=1.0", "--schedule=cosine"])
    assert [train.learning_rate(cfg, cfg.lr, s, 4) for s in range(4)] == pytest.approx([1, 0.8535533, 0.5, 0.1464466])


# ---------------------------------------------------------------------------------------------------------------------
# More ranks than rows, and long runs


ONE_EPOCH = {"epochs": 1, "max_steps": 0}


@pytest.mark.parametrize("ranks, nones", [(1, "all"), (2, "none")])
def test_gradients_between_steps(ranks, nones, tmp_path):
    """One rank frees them; those of several are views of DDP's buckets, and stay: in the next step new ones would be second copies."""
    (tmp_path / "watch.py").write_text("""
import torch
clear = torch.optim.AdamW.zero_grad
def watched(self, *given, **named):
    clear(self, *given, **named)
    nones = [p.grad is None for group in self.param_groups for p in group["params"]]
    print("nones:", "all" if all(nones) else "some" if any(nones) else "none", flush=True)
torch.optim.AdamW.zero_grad = watched
""")
    done = run(options(tmp_path, "dpo", config=tmp_path / "watch.py", micro_batch_tokens=128), ranks)
    assert done.stdout.count("nones:") == 4 * ranks == done.stdout.count(f"nones: {nones}\n")


@pytest.mark.parametrize("name, rows, more", [
    ("dpo", 2, {}), ("kd", 2, {"teacher_top_k": 8}), ("dpo", 9, {**ONE_EPOCH, "batch_size": 8, "micro_batch_tokens": 32}),
    *(pytest.param(*given, marks=pytest.mark.crash) for given in [
        ("sft", 1, {}), ("bco_pair", 2, {}), ("kto", 3, {}), ("rm", 5, {**ONE_EPOCH, "batch_size": 4}), ("prm", 2, {})])])
def test_fewer_rows_than_ranks(name, rows, more, tmp_path):
    """Of the train rows, of the last step, of the eval rows: three ranks end where one does, and none waits for ever (a run that is not
    done after two minutes fails the test)."""
    for split, source, count in (("train", ROWS[losses.OBJECTIVES[name].data], rows), ("eval", ROWS[losses.OBJECTIVES[name].data], 2)):
        (tmp_path / f"{split}.jsonl").write_text("".join(open(ROOT / source).readlines()[:count]))
    given = {"train_data": tmp_path / "train.jsonl", "eval_data": tmp_path / "eval.jsonl", "max_steps": 3, **more}
    for ranks in (3, 1):  # the tables are made by three
        run(options(tmp_path, name, str(ranks), **given), ranks, timeout=120)
    assert_close(weights(tmp_path / "1" / "model"), weights(tmp_path / "3" / "model"), 1e-9)
    for one, three in zip(lines(tmp_path / "1", "eval"), lines(tmp_path / "3", "eval"), strict=True):
        assert one["loss"] == pytest.approx(three["loss"], abs=1e-12)


def test_the_order_of_files_does_not_depend_on_the_rank(tmp_path):
    """Globs are sorted: however a file system lists its files, ranks agree on which row is which."""
    rows = open(ROOT / ROWS["preference"]).readlines()
    for i in (2, 0, 1):
        (tmp_path / f"part{i}.jsonl").write_text("".join(rows[10 * i:10 * i + 10]))
    (tmp_path / "all.jsonl").write_text("".join(rows[:30]))
    run(options(tmp_path, "dpo", "glob", train_data=f"{tmp_path}/part*.jsonl"), ranks=2)
    run(options(tmp_path, "dpo", "all", train_data=tmp_path / "all.jsonl"))
    assert_close(weights(tmp_path / "glob" / "model"), weights(tmp_path / "all" / "model"), 1e-9)


@pytest.mark.crash
def test_two_thousand_steps_are_as_good_as_two_hundred(tmp_path):
    """Memory, open files and the time of a step stay; metrics can be read while they are written."""
    process = subprocess.Popen([sys.executable, "train.py", *options(tmp_path, "dpo", max_steps=2000, save_every=500, dtype="float32")], cwd=ROOT,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    status = lambda: next(int(line.split()[1]) / 1024 for line in open(f"/proc/{process.pid}/status") if line.startswith("VmRSS"))
    seen, metrics = {}, tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and (whole := metrics.read_text().rpartition("\n")[0]):
            done = [json.loads(line) for line in whole.split("\n")]  # every line is whole
            with contextlib.suppress(OSError, StopIteration):
                seen[done[-1]["step"]] = status(), len(os.listdir(f"/proc/{process.pid}/fd"))
        time.sleep(0.2)
    assert process.returncode == 0 and len(lines(tmp_path / "run")) == 2000
    median = lambda values: sorted(values)[len(values) // 2]
    early, late = ([v for step, v in seen.items() if a < step <= b] for a, b in ((20, 220), (1800, 2000)))
    seconds = [median([line["seconds"] for line in lines(tmp_path / "run")][a:b]) for a, b in ((20, 220), (1800, 2000))]
    memory, files = ([median([v[i] for v in part]) for part in (early, late)] for i in (0, 1))
    print(f"steps 21 to 220 against 1,801 to 2,000: {memory} MB, {files} open files, {seconds} s a step")
    assert memory[1] < memory[0] + 10 and files[1] <= files[0] and seconds[1] < 1.2 * seconds[0]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
def test_freed_memory_is_used_again():
    """Without being given back and taken anew, page by page."""
    script = """
import resource, torch, machine
machine.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
made = lambda: torch.ones(200 * 2**18).sum()
for _ in range(5):
    made()
before = faults()
for _ in range(10):
    made()
print(faults() - before)
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2 * 200 * 256  # pages of 4 kB: 10 times 200 MB have 512,000


def test_a_checkpoint_that_one_rank_does_not_see(tmp_path):
    """On a disk that machines do not share, only rank 0's has it: an error on all of them, where they would go on from other steps."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "own.py").write_text(f"import os\nos.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n")
    given = options(tmp_path, "sft", config=tmp_path / "own.py", out_dir="run", tokenizer=ROOT / "tasks/arithmetic", train_data=ROOT / ROWS["sft"], save_every=1, max_steps=2)
    run(given, ranks=2)
    before = {path: path.read_bytes() for path in (tmp_path / "0/run").rglob("*.*") if path.is_file()}
    failed = run([*given, "--resume", "--max_steps=4"], ranks=2, check=False, timeout=120)
    assert failed.returncode == 1 and "run/checkpoint-2: not every rank can see it; put out_dir on a file system" in failed.stderr
    assert before == {path: path.read_bytes() for path in before}
