"""What a reward returns, or fails with, is one answer's affair; the log names each part of a sum."""
import functools
import json
import time

import numpy as np
import pytest

import config
import data
import reward
import train
from launch import run
from test_rollout import example, recorded  # noqa: F401
from test_train import ROWS, lines, options

PROMPT = example({"prompt": "p"}, "rows.jsonl:7")
ENDS = {"exit": SystemExit, "generator": GeneratorExit, "own": type("Own", (BaseException,), {})}


# A reward that ends its process


def leaving(prompt, completion, row):
    if completion in ENDS:
        raise ENDS[completion](3)
    return float(len(completion))


def leaving_in_batch(prompts, completions, rows):
    return [leaving(*given) for given in zip(prompts, completions, rows)]


@pytest.mark.parametrize("end", ENDS)
def test_a_reward_that_ends_its_process_has_failed(end):
    """exit() in the policy's code is that answer's failure, in the run's process and in a worker, where it costs no timeout."""
    begin = time.monotonic()
    for give in (reward.by_function(leaving), reward.by_function(leaving, workers=1, timeout=60.0)):
        ((one, failed, two),) = give([PROMPT], [["a", end, "bb"]])
        assert (one, two) == (1.0, 2.0)
        assert failed.startswith(f"rows.jsonl:7: reward leaving: {ENDS[end].__name__}: 3 ({__file__}:")
    ((failed,),) = reward.by_function(leaving_in_batch)([PROMPT], [[end]])
    assert failed.startswith(f"rows.jsonl:7: reward leaving_in_batch: {ENDS[end].__name__}: 3")
    assert time.monotonic() - begin < 30


def test_ctrl_c_in_a_reward_is_ctrl_c():
    def interrupted(prompt, completion, row):
        raise KeyboardInterrupt

    def interrupted_in_batch(prompts, completions, rows):
        raise KeyboardInterrupt
    for function in (interrupted, interrupted_in_batch):
        with pytest.raises(KeyboardInterrupt):
            reward.by_function(function)([PROMPT], [["a"]])


@pytest.mark.parametrize("key", ["reward", "check"])
def test_a_run_whose_reward_calls_exit_says_so_and_saves(key, tmp_path):
    """Not status 0 with nothing saved."""
    (tmp_path / "leaves.py").write_text(f"def {key}(prompt, completion, row):\n    exit()\n")
    given = [f"--config={tmp_path / 'leaves.py'}" if word.startswith("--config") else word
             for word in options(tmp_path, "ppo" if key == "reward" else "sft", max_steps=1)]
    given += [f"--config={tmp_path / 'leaves.py'}", f"--eval_prompts={ROWS['prompts']}", "--max_new_tokens=4"]
    done = run(given, check=False)
    assert done.returncode == 1 and f"{key}: SystemExit: None ({tmp_path / 'leaves.py'}:2)" in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "run" / "checkpoint-0").is_dir()


@pytest.mark.parametrize("text, message", [
    ("lr = 1.0\nexit()\n", r"own.py: .*own.py:2: SystemExit: None"),
    ("import sys\nsys.exit('no data')\n", r"own.py: .*own.py:2: SystemExit: no data")])
def test_a_config_that_calls_exit_is_an_error(text, message, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load([f"--config={tmp_path / 'own.py'}"])


def test_a_file_that_calls_exit_when_its_function_is_sought_for_workers(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def judge(prompt, completion, row):\n    return 1.0\nif __name__ == '<run_path>':\n    exit()\n")
    function = {"__name__": "module"}
    exec(compile(file.read_text(), file, "exec"), function)
    with pytest.raises(ValueError, match=r"module.py:4: SystemExit"):
        reward.by_function(function["judge"], workers=1)


# Parts of a sum


def of(rewards, **more):
    cfg = config.load([])
    vars(cfg).update(reward=rewards, **more)
    return reward.rewards(cfg, None, None, None)


def length(prompt, completion, row):
    return float(len(completion))


def ones(prompt, completion, row):
    """Digits have a value, other answers have none."""
    return completion.count("1") if completion.isdigit() else None


def ones_in_batch(prompts, completions, rows):
    return [ones(*given) for given in zip(prompts, completions, rows)]


@pytest.mark.parametrize("function, workers", [(ones, 0), (ones, 1), (ones_in_batch, 0)])
def test_none_is_left_out_of_the_sum(function, workers):
    """One answer at a time, in lists and out of other processes."""
    give = of({length: 0.5, function: 2.0}, reward_workers=workers)
    table = give([PROMPT, PROMPT], [["11", "abc"], ["2"]])
    assert table == {"reward": [[5.0, 1.5], [0.5]], "reward/length": [[2.0, 3.0], [1.0]],
                     f"reward/{function.__name__}": [[2.0, None], [0.0]]}


def test_an_answer_to_which_no_reward_applies_has_none():
    """That is a failed reward; None of a check, which has nothing to be left out of, is one by itself."""
    message = "rows.jsonl:7: no reward applies to an answer ({} returned None); bad_rewards = 'skip' leaves such prompts out"
    assert of(ones)([PROMPT], [["a", "1"]]) == {"reward": [[message.format("ones"), 1.0]]}
    both = of({ones: 1.0, functools.partial(ones_in_batch): 1.0})([PROMPT], [["a"]])
    assert both["reward"] == [[message.format("ones, ones_in_batch")]]
    ((wrong,),) = reward.by_function(ones, what="check", mend="")([PROMPT], [["a"]])
    assert "check ones: returned None, expected a number" in wrong


def test_names_in_the_log_are_short_and_distinct():
    def std(prompt, completion, row):
        return 0.0
    other = functools.partial(length)
    names, taken = [], {}
    for what in (length, other, std, "out/rm", "out/big/model", "configs/rm.py", "owner/Judge-2.5B", len):
        names.append(reward.name_of(what, taken))
        taken[names[-1]] = what
    assert names == ["length", "length_2", "std_2", "rm", "big", "rm_2", "Judge-2.5B", "len"]


SUM = """
def long(prompt, completion, row):
    return float(len(completion))
def even(prompt, completion, row):
    return None if int(row["answer"]) % 2 else float(completion.count("2"))
def same(prompts, completions, rows):
    return [0.0 for _ in prompts]
reward = {rewards}
"""


def with_rewards(tmp_path, rewards, name="ppo", **more):
    (tmp_path / "sum.py").write_text(SUM.replace("{rewards}", rewards))
    given = options(tmp_path, name, **more)
    return [f"--config={tmp_path / 'sum.py'}" if word.startswith("--config") else word for word in given]


def test_a_run_logs_each_reward_by_its_name(tmp_path, recorded):  # noqa: F811
    """Unweighted, over the answers it applies to; and in evals. The parts add up to the reward."""
    given = with_rewards(tmp_path, "{long: 0.5, even: -2.0}", max_steps=2, eval_data=ROWS["prompts"])
    train.train(config.load(given))
    rows = [json.loads(line) for line in open(ROWS["prompts"])]
    tokenizer = data.Tokenizer("tasks/arithmetic")
    for made, line in zip(recorded, lines(tmp_path / "run"), strict=True):
        applies = [int(rows[g.example]["answer"]) % 2 == 0 for g in made.groups for _ in g.answers]
        texts = [tokenizer.decode(a.ids) for g in made.groups for a in g.answers]
        twos = [text.count("2") for text, yes in zip(texts, applies) if yes]
        assert 0 < sum(applies) < len(applies) and any(twos)
        assert line["reward/even"] == pytest.approx(np.mean(twos))
        assert line["reward/long"] == pytest.approx(np.mean([*map(len, texts)]))
        totals = [0.5 * len(text) - 2.0 * text.count("2") * yes for text, yes in zip(texts, applies)]
        assert line["reward"] == pytest.approx(np.mean(totals)) and {"reward/std", "reward/clipped"} <= line.keys()
    assert {"reward", "reward/long", "reward/even"} <= lines(tmp_path / "run", "eval")[-1].keys()


def test_ranks_log_the_same_parts(tmp_path, recorded):  # noqa: F811
    more = dict(max_steps=1, eval_data=ROWS["prompts"])
    train.train(config.load(with_rewards(tmp_path, "{long: 0.5, even: -2.0}", out="one", **more)))
    run(with_rewards(tmp_path, "{long: 0.5, even: -2.0}", out="two", **more), ranks=2)
    for split in ("train", "eval"):
        one, two = (lines(tmp_path / out, split)[0] for out in ("one", "two"))
        for key in ("reward", "reward/long", "reward/even", *(["frac_reward_zero_std"] if split == "train" else [])):
            assert two[key] == pytest.approx(one[key], abs=1e-9), key


@pytest.mark.parametrize("rewards, expected", [("same", 1.0), ("long", None)])
@pytest.mark.parametrize("filter_groups", [False, True])
def test_groups_without_signal_are_counted(rewards, expected, filter_groups, tmp_path, recorded):  # noqa: F811
    """frac_reward_zero_std: the share of groups whose answers all have the same reward, whatever is left out then."""
    train.train(config.load(with_rewards(tmp_path, rewards, max_steps=1, filter_groups=filter_groups)))
    (line,) = lines(tmp_path / "run")
    if expected is None:
        same = [len(set(g.rewards)) == 1 for g in recorded[0].groups]
        expected = 1 - line["rollout/kept"] if filter_groups else np.mean(same)
        assert 0 <= expected < 1
    assert line["frac_reward_zero_std"] == pytest.approx(expected) and "reward/same" not in line
