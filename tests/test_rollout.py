"""Generation is what the model says, and rollouts are what the losses take them for. Real models, tokenizers and runs."""
import functools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import data
import losses
import model
import reward
import rollout
import train
from conftest import ROOT, TINY, tiny, tiny_folder
from test_train import REWARD, ROWS, SMALL, TIMES, assert_close, lines, options, run, weights

DRAW = rollout.Sampling(0.8)


def prompts_of(count: int, vocab: int = 97, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, rng.integers(1, longest)).tolist() for _ in range(count)]


def trainer_log_probs(decoder, prompt, ids, temperature=1.0):
    logits = decoder.logits(torch.tensor([*prompt, *ids])) / temperature
    return logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(ids)[:, None])[:, 0]


# Generation


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", TINY)
def test_tokens_and_log_probs_are_those_of_whole_sequences(family, compiled):
    """Prompts of all lengths in small batches, several samples of each, rows that leave early: the cache says what a forward over
    each whole sequence says, sliding windows and learned positions included. Greedy tokens are its argmax."""
    decoder, prompts = tiny(family, torch.float64), prompts_of(7)
    drawn = rollout.generate(decoder, prompts, max_new_tokens=24, stop={5, 6}, n=3, sampling=DRAW, keys=[(1, i) for i in range(7)],
                             batch=6, check=4, compiled=compiled)
    assert any(answer.ended for some in drawn for answer in some) and any(len(answer.ids) == 24 for some in drawn for answer in some)
    for prompt, some in zip(prompts, drawn):
        assert len({tuple(answer.ids) for answer in some}) == 3
        for answer in some:
            assert answer.ended == (answer.ids[-1] in {5, 6}) and not {5, 6} & set(answer.ids[:-1])
            expected = trainer_log_probs(decoder, prompt, answer.ids, 0.8)
            # rotary angles are fp32 in every precision, and a compiled cosine of them differs in its last bit
            within = 1e-6 if compiled else 1e-10
            assert (torch.tensor(answer.log_probs, dtype=torch.float64) - expected).abs().max() < within
    for prompt, (answer,) in zip(prompts, rollout.generate(decoder, prompts, max_new_tokens=9, stop=set(), batch=4, compiled=compiled)):
        logits = decoder.logits(torch.tensor([*prompt, *answer.ids]))
        assert answer.ids == logits.argmax(-1)[len(prompt) - 1:-1].tolist() and len(answer.ids) == 9


def test_learned_positions_end_an_answer():
    decoder = tiny("gpt2", torch.float64, n_positions=32)
    (long,), (short,) = rollout.generate(decoder, [list(range(20)), [1]], max_new_tokens=50, stop=set())
    assert (len(long.ids), len(short.ids), long.ended) == (12, 31, False)
    assert long.ids == decoder.logits(torch.tensor([*range(20), *long.ids])).argmax(-1)[19:-1].tolist()
    with pytest.raises(ValueError, match="a prompt has 33 tokens, and the model has 32 positions"):
        rollout.generate(decoder, [list(range(33))], max_new_tokens=1, stop=set())


def test_what_an_answer_is_depends_on_its_key_alone():
    decoder, prompts = tiny("llama", torch.float64), prompts_of(9)
    given = dict(max_new_tokens=12, stop={5}, sampling=rollout.Sampling(1.0, top_p=0.9))
    keys = [(3, i) for i in range(9)]
    whole = rollout.generate(decoder, prompts, n=4, keys=keys, **given)
    order = [8, 2, 5, 0]
    some = rollout.generate(decoder, [prompts[i] for i in order], n=4, keys=[keys[i] for i in order], batch=5, check=1, **given)
    assert [[a.ids for a in x] for x in some] == [[a.ids for a in whole[i]] for i in order]
    other = rollout.generate(decoder, prompts, n=4, keys=[(4, i) for i in range(9)], **given)
    assert [[a.ids for a in x] for x in other] != [[a.ids for a in x] for x in whole]


@pytest.fixture
def steps(monkeypatch):
    """Of each decoding step, its rows and how many places of the cache are seen that no answer has."""
    made, decode = [], rollout.decode

    def counted(decoder, cache, tokens, positions, seen):
        made.append((len(tokens), seen - int(positions.max()) - 1))
        return decode(decoder, cache, tokens, positions, seen)
    monkeypatch.setattr(rollout, "decode", counted)
    return made


@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_free_slot_goes_to_the_next_answer(n, steps):
    """Answers of all lengths in four slots: as many decoding steps as a queue needs, where whole batches would wait for their longest."""
    decoder, prompts = tiny("llama", torch.float64), prompts_of(48 // n)
    given = dict(max_new_tokens=40, stop=set(range(5, 12)), n=n, sampling=rollout.Sampling(1.0), check=1)
    answers = rollout.generate(decoder, prompts, batch=4, **given)
    lengths = [len(answer.ids) for some in answers for answer in some]
    waiting = sum(max(lengths[i:i + 4]) - 1 for i in range(0, len(lengths), 4))
    assert max(lengths) > 3 * min(lengths) and len(steps) <= sum(lengths) / 4 + max(lengths) < waiting and max(steps) == (4, 0)
    assert [[a.ids for a in x] for x in answers] == [[a.ids for a in x] for x in rollout.generate(decoder, prompts, batch=64, **given)]


def test_answers_without_room_end_together(steps):
    """Two batches of 20 tokens, whose ends are looked at when they are due: 19 decoding steps each."""
    answers = rollout.generate(tiny("llama", torch.float64), prompts_of(8), max_new_tokens=20, stop=set(), batch=4)
    assert {len(answer.ids) for (answer,) in answers} == {20} and steps == [(4, 0)] * 38


@pytest.mark.parametrize("check", [1, 4])
def test_a_slot_that_a_string_made_free_starts_clean(check):
    """The long answer behind a long prompt ends by a string, and what follows in its slot sees nothing of it, in a window too."""
    decoder, rng = tiny("mistral", torch.float64), np.random.default_rng(0)
    prompts = [rng.integers(3, 97, length).tolist() for length in (40, 2, 3, 60)]
    text = lambda ids: "".join(f"<{i}>" for i in ids)
    given = dict(max_new_tokens=20, stop=set(), text=text, check=check)
    plain = rollout.generate(decoder, prompts, **given)
    cut = rollout.generate(decoder, prompts, batch=2, strings=(text(plain[0][0].ids[:2]),), **given)
    assert len(cut[0][0].ids) == 2 and cut[0][0].ended
    for (before,), (after,) in zip(plain[1:], cut[1:]):
        assert after.ids == before.ids and after.log_probs == pytest.approx(before.log_probs, abs=1e-12)


def test_draws_follow_the_distribution():
    """Random numbers that fill [0, 1) evenly take each token as often as its probability, to one in their number."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    token, log_prob = rollout.pick(logits.expand(10_000, -1), uniform, rollout.Sampling(0.7))
    p = (logits[0].double() / 0.7).softmax(-1)
    assert (torch.bincount(token, minlength=50) / 10_000 - p).abs().max() < 2e-4
    assert (log_prob.double() - p.log()[token]).abs().max() < 1e-5
    for edge in (0.0, 1 - 2**-24):  # the ends of the range take tokens that are possible
        far = torch.tensor([[-200.0, 0.0, 1.0, -200.0]])
        assert rollout.pick(far, torch.tensor([edge]), rollout.Sampling())[0].item() in (1, 2)


@pytest.mark.parametrize("sampling", [rollout.Sampling(0.7, top_k=5), rollout.Sampling(1.3, top_p=0.8), rollout.Sampling(1.0, min_p=0.1),
                                      rollout.Sampling(0.9, top_k=20, top_p=0.9, min_p=0.05), rollout.Sampling(1.0, top_k=1)])
def test_what_is_left_out_is_what_transformers_leaves_out(sampling):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)) * 3
    theirs = logits / sampling.temperature
    for of, value in ((processors.TopKLogitsWarper, sampling.top_k), (processors.TopPLogitsWarper, sampling.top_p if sampling.top_p < 1 else 0),
                      (processors.MinPLogitsWarper, sampling.min_p)):
        theirs = of(value)(None, theirs) if value else theirs
    ours = rollout.truncated((logits / sampling.temperature).log_softmax(-1), sampling)
    assert torch.equal(ours.isfinite(), theirs.isfinite()) and 1 <= ours.isfinite().sum(-1).min() < 300


@pytest.mark.parametrize("check", [1, 3, 16])
def test_strings_end_answers_where_they_are_whole(check):
    """Whenever the host looks, the answer is cut at the first token with which its text holds the string."""
    decoder, prompts = tiny("llama", torch.float64), prompts_of(6)
    text = lambda ids: "".join(f"<{i}>" for i in ids)
    plain = rollout.generate(decoder, prompts, max_new_tokens=20, stop=set(), n=2, sampling=DRAW, keys=[(0, i) for i in range(6)])
    strings = (f"{plain[0][0].ids[6] % 10}><", f"<{plain[1][1].ids[4]}>")
    cut = rollout.generate(decoder, prompts, max_new_tokens=20, stop=set(), n=2, sampling=DRAW, keys=[(0, i) for i in range(6)],
                           strings=strings, text=text, check=check)
    for before, after in zip((a for x in plain for a in x), (a for x in cut for a in x)):
        ends = [i for i in range(1, 21) if any(s in text(before.ids[:i]) for s in strings)]
        assert after.ids == before.ids[:ends[0] if ends else 20] and after.ended == bool(ends)
        assert after.log_probs == pytest.approx(before.log_probs[:len(after.ids)])
    assert cut[0][0].ended


def greedy_of_transformers(folder, prompts, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=sorted(tokenizer.stops),
                            pad_token_id=tokenizer.eos)[0, len(ids):].tolist() for ids in prompts]


def agree_for_64_tokens(folder, texts):
    decoder, tokenizer = model.load(folder)[0], data.Tokenizer(folder)
    prompts = [tokenizer.fast.encode(text).ids for text in texts]
    ours = rollout.generate(decoder, prompts, max_new_tokens=64, stop=tokenizer.stops)
    theirs = greedy_of_transformers(folder, prompts, tokenizer)
    assert len(texts) == 20 and [a.ids for (a,) in ours] == theirs
    assert [rollout.written(tokenizer, a) for (a,) in ours] == [tokenizer.fast.decode(ids) for ids in theirs]
    for prompt, (answer,) in zip(prompts, ours):
        with torch.no_grad():
            assert (torch.tensor(answer.log_probs) - trainer_log_probs(decoder, prompt, answer.ids)).abs().max() < 1e-4


BEGINNINGS = [f"{a}{b}" for a in ("Once upon a time", "Lily and Tom", "The dog", "One day, a girl", "There was a big")
              for b in ("", " was", " had a", " said")]


def test_greedy_text_is_that_of_transformers(pieces, tmp_path):
    agree_for_64_tokens(tiny_folder(tmp_path / "model", pieces), BEGINNINGS)


def test_greedy_text_of_stories260k_is_that_of_transformers(stories):
    agree_for_64_tokens(stories, BEGINNINGS)


@pytest.mark.slow
def test_greedy_text_of_smollm2_is_that_of_transformers(smollm2):
    begin = ["The capital of France is", "def fibonacci(n):", "Water boils at", "My favourite", "In 1969,"]
    agree_for_64_tokens(smollm2, [f"{a}{b}" for a in ("", "Question: ", "Well, ", "\n") for b in begin])


# Rewards


def example(row: dict, where: str = "rows.jsonl:1") -> data.Example:
    return data.Example(np.array([1], np.int32), [], [], [], [], [], [], where, [], row)


def test_rewards_of_functions():
    """One answer at a time or all of them; what is wrong with one is said with the row, and the others have theirs."""
    rows = [example({"prompt": "p", "answer": "3"}, "rows.jsonl:1"), example({"prompt": "q", "answer": "4"}, "rows.jsonl:2")]
    texts = [["3", "4"], ["4", "x"]]
    one = lambda prompt, completion, row: int(completion) - int(row["answer"])
    some = lambda prompts, completions, rows: [len(p + c) + int(r["answer"]) for p, c, r in zip(prompts, completions, rows)]
    said = reward.by_function(one)(rows, texts)
    assert said[0] == [0.0, 1.0] and said[1][0] == 0.0
    assert said[1][1].startswith("rows.jsonl:2: reward <lambda>: ValueError: invalid literal") and "completion 'x'" in said[1][1]
    assert reward.by_function(some)(rows, texts) == [[5.0, 5.0], [6.0, 6.0]]
    for value in (math.nan, math.inf, None, "1", [1.0], 10**400):
        assert "rows.jsonl:1: reward <lambda>: returned" in reward.by_function(lambda prompt, completion, row: value)(rows[:1], [["a"]])[0][0]
    assert reward.by_function(lambda prompt, completion, row: torch.tensor(2.0))(rows[:1], [["a"]]) == [[2.0]]
    assert "4 answers, but 1 values returned" in reward.by_function(lambda prompts, completions, rows: [1.0])(rows, texts)[0][0]


def test_a_reward_that_hangs_is_ended(tmp_path):
    """Real processes: the one that hangs costs its timeout and its own answer."""
    file = tmp_path / "slow.py"
    file.write_text("import enum, os, time\nclass Level(enum.IntEnum):\n    high = 7\nclass Odd(Exception):\n    def __init__(self, a, b):\n        pass\ndef judge(prompt, completion, row):\n    if completion == 'hang':\n        time.sleep(600)\n"
                    "    if completion == 'raise':\n        raise KeyError('answer')\n"
                    "    if completion == 'odd':\n        raise Odd(1, 2)\n    if completion == 'die':\n        os._exit(1)\n    return {'text': '1', 'huge': 10**400, 'enum': Level.high}.get(completion, len(completion))\n")
    function = config.runpy.run_path(str(file))["judge"]
    give = reward.by_function(function, workers=2, timeout=1.0)
    said = give([example({"prompt": "p"}, "rows.jsonl:7")], [["a", "hang", "bbb", "raise", "cc", "odd", "die", "dddd", "text", "huge", "enum"]])[0]
    assert (said[0], said[2], said[4], said[7], said[10]) == (1.0, 3.0, 2.0, 4.0, 7.0) and "OverflowError" in said[9]
    assert said[1].startswith("rows.jsonl:7: reward judge: TimeoutError: no answer within reward_timeout = 1 seconds")
    assert said[3].startswith(f"rows.jsonl:7: reward judge: KeyError: 'answer' ({file}:11); for") and "reward judge: Odd:" in said[5]
    assert "no answer within reward_timeout = 1 seconds: it hangs, or its process died" in said[6]
    assert said[8].startswith("rows.jsonl:7: reward judge: returned '1', expected a number")
    for other in (lambda prompt, completion, row: 1.0, functools.partial(function, row={})):
        with pytest.raises(ValueError, match="is not a function at the top level of"):
            reward.by_function(other, workers=1)


@pytest.mark.parametrize("ends, message", [("raise OSError('no network')", r"a process cannot load judge: OSError: no network \(.*mine.py:4\)"),
                                           ("raise SystemExit(3)", r"a process cannot load judge: SystemExit: 3 \(.*mine.py:4\)"),
                                           ("os._exit(3)", "no process was ready after 2 seconds; .*mine.py may end them")])
def test_a_reward_that_no_worker_can_load_is_said(ends, message, tmp_path, monkeypatch):
    """A process of the pool that ended there would be started again, for ever, and the run would wait. No prompt is left out for it."""
    monkeypatch.setattr(reward, "START", 2 if "exit" in ends else 600)
    file = tmp_path / "mine.py"
    file.write_text(f"import multiprocessing\nimport os\nif multiprocessing.current_process().name != 'MainProcess':\n    {ends}\ndef judge(prompt, completion, row):\n    return 1.0\n")
    give = reward.by_function(config.runpy.run_path(str(file))["judge"], workers=1, timeout=30.0)
    with pytest.raises(ValueError, match=message):
        give([example({"prompt": "p"}, "rows.jsonl:7")], [["a"]])


# Rollouts in a run


@pytest.fixture
def recorded(monkeypatch):
    """Every rollout of the runs of a test."""
    made, make = [], rollout.Rollouts.make
    monkeypatch.setattr(rollout.Rollouts, "make", lambda self: made.append(make(self)) or made[-1])
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    return made


def start(tmp_path, name="ppo", out="run", **more):
    train.train(config.load(options(tmp_path, name, out, **more)))
    return tmp_path / out


def by_answer(made: rollout.Rollout, name: str) -> list[list[float]]:
    return [part.tolist() for part in made.columns[name].split([len(a.ids) for g in made.groups for a in g.answers])]


SHAPED = dict(gamma=0.9, kl_coef=0.3, reward_clip=0.8, missing_eos_penalty=0.25, overlong_buffer=3, overlong_penalty=0.5)


@pytest.mark.parametrize("name", losses.ADVANTAGES)
def test_advantages_are_those_of_the_formulas(name, tmp_path, recorded, capsys):
    """Float64 restatement in plain loops, from answers, rewards and log-probs on; groups are cut into pieces by the stream."""
    start(tmp_path, objective={"ppo": 1.0, "value": 0.5}, advantages=name, micro_batch_tokens=26, max_steps=4, rollout_epochs=2,
          lr=1e-2, **SHAPED, **(dict(lam=0.7) if name == "gae" else {}))
    made = recorded[1]  # the policy has left the reference
    assert max(map(len, made.pieces)) > 1 and len(recorded) == 2
    beyond = [[abs(x) > 0.8 for g in each.groups for x in g.rewards] for each in recorded]
    assert [each.metrics["reward/clipped"] for each in recorded] == pytest.approx([*map(np.mean, beyond)]) and any(map(any, beyond))
    assert capsys.readouterr().err.count("beyond reward_clip = 0.8 and are clipped to it") == 1
    rewards, steps = [], []
    old, reference, values = (by_answer(made, f"{column}") for column in ("old_log_probs", "reference_log_probs", "old_values"))
    for g in made.groups:
        for answer, reward_of in zip(g.answers, g.rewards):
            n, score = len(answer.ids), min(max(reward_of, -0.8), 0.8)
            score -= 0.0 if answer.ended else 0.25
            score -= 0.5 * max(0, n - (6 - 3)) / 3
            rewards.append(score)
            steps.append([-0.3 * (old[len(steps)][t] - reference[len(steps)][t]) for t in range(n)])
    assert max(abs(x) for s in steps for x in s) > 1e-3 and {a.ended for g in made.groups for a in g.answers} == {True, False}
    advantages, returns = [], []
    for i, penalties in enumerate(steps):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        totals = [rewards[j] + sum(steps[j]) for j in group]
        mean = sum(totals) / 3
        centered = {"reinforce_baseline": rewards[i] - sum(rewards[j] for j in group) / 3}.get(name, rewards[i])
        token = [p + (centered if t == len(penalties) - 1 else 0) for t, p in enumerate(penalties)]
        to_go = [sum(0.9 ** (u - t) * token[u] for u in range(t, len(token))) for t in range(len(token))]
        if name == "gae":
            v = [*values[i], 0.0]
            deltas = [token[t] + 0.9 * v[t + 1] - v[t] for t in range(len(token))]
            mine = [sum((0.9 * 0.7) ** (u - t) * deltas[u] for u in range(t, len(token))) for t in range(len(token))]
            to_go = [a + b for a, b in zip(mine, v)]
        elif name in ("reinforce", "reinforce_baseline"):
            mine = to_go
        else:
            total = rewards[i] + sum(penalties)
            std = (sum((x - mean) ** 2 for x in totals) / 2) ** 0.5
            of = {"rloo": total - (sum(totals) - total) / 2, "group_norm": (total - mean) / (std + 1e-6), "group_center": total - mean}
            mine = [of[name]] * len(token)
        advantages.append(mine)
        returns.append(to_go)
    if name in ("gae", "reinforce", "reinforce_baseline"):
        flat = np.concatenate(advantages)
        advantages = [[(x - flat.mean()) / math.sqrt(flat.var() + 1e-8) for x in mine] for mine in advantages]
    for column, expected in (("advantages", advantages), ("returns", returns)):
        for ours, theirs in zip(by_answer(made, column), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)


def hidden_of(decoder, ids):
    """The last norm's output over one whole sequence."""
    kept = []
    hook = decoder.model.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = decoder.logits(torch.tensor(ids))
    hook.remove()
    return kept[0], logits


def with_critic(checkpoint):
    return weights(checkpoint) | load_file(checkpoint / "critic.safetensors")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_s_gradient_is_that_of_a_plain_restatement(temperature, tmp_path, recorded):
    """The second step on a rollout, where ratios are not 1 and clips bind: loss and gradient of policy, critic, entropy and KL terms,
    against sequences one by one in float64."""
    weigh = {"ppo": 1.0, "value": 0.5, "kl": 0.1, "entropy_bonus": 0.02}
    out = start(tmp_path, objective=weigh, advantages="gae", rollout_epochs=2, max_steps=2, save_every=1, grad_clip=0, lr=3e-2,
                kl_coef=0.1, clip_eps_low=0.02, clip_eps_high=0.03, value_clip=0.05, micro_batch_tokens=128, temperature=temperature)
    made = recorded[0]
    one, two = (load_file(out / f"checkpoint-{i}" / "optimizer.safetensors") for i in (1, 2))
    after = with_critic(out / "checkpoint-1")
    tokens = dict(vocab_size=16, eos_token_id=0, bos_token_id=1)
    decoder = model.scratch({**tokens, **SMALL}, 0, {"lm_head": 0, "values": 1}).double()
    decoder.load_state_dict(after)
    parts, binds, count = {name: 0 for name in weigh}, 0, sum(len(a.ids) for g in made.groups for a in g.answers)
    columns = {name: iter(by_answer(made, name)) for name in made.columns}
    prompts = data.load(ROWS["prompts"], "prompts", data.Tokenizer(ROOT / "tasks/arithmetic"), config.load(options(tmp_path, "ppo")), False)
    for g in made.groups:
        prompt = prompts.examples[g.example].prompt.tolist()
        for answer in g.answers:
            hidden, logits = hidden_of(decoder, [*prompt, *answer.ids])
            places = slice(len(prompt) - 1, len(prompt) + len(answer.ids) - 1)
            logps, values = (logits[places] / temperature).log_softmax(-1), decoder.values(hidden[places])[:, 0]
            get = {name: next(column) for name, column in columns.items()}
            for t, token in enumerate(answer.ids):
                new, advantage = logps[t, token], get["advantages"][t]
                ratio = (new - get["old_log_probs"][t]).exp()
                clipped = ratio.clamp(0.98, 1.03)
                binds += bool(clipped * advantage < ratio * advantage)
                parts["ppo"] += -torch.min(ratio * advantage, clipped * advantage)
                error, old = values[t] - get["returns"][t], get["old_values"][t]
                near = old + (values[t] - old).clamp(-0.05, 0.05) - get["returns"][t]
                parts["value"] += 0.5 * torch.max(error**2, near**2)
                d = new - get["reference_log_probs"][t]
                parts["kl"] += (-d).exp() - 1 + d
                parts["entropy_bonus"] += (logps[t].exp() * logps[t]).sum()
    loss = sum(weigh[name] * part / count for name, part in parts.items())
    loss.backward()
    line = lines(out)[1]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-9) and line["policy/clip_fraction"] == pytest.approx(binds / count) and binds > 5
    for name, parameter in decoder.named_parameters():
        ours = (two[f"{name}.exp_avg"] - 0.9 * one[f"{name}.exp_avg"]) / 0.1
        assert (ours - parameter.grad).norm() < 1e-9 * (1 + parameter.grad.norm()), name


def test_the_first_step_on_a_rollout_is_on_policy(tmp_path, recorded):
    """fp32: the sampler's log-probs are the trainer's, the ratio is 1 and nothing is clipped; in later steps it is not so."""
    out = start(tmp_path, objective={"ppo": 1.0, "value": 0.5}, advantages="gae", rollout_epochs=2, rollout_prompts=26, max_steps=12,
                dtype="float32", lr=2e-2, temperature=0.8)
    every = lines(out)
    for line in every[::4]:
        assert abs(line["policy/ratio"] - 1) < 1e-3 and line["policy/clip_fraction"] == 0 and abs(line["policy/rollout_kl"]) < 1e-4
    assert all(line["policy/clip_fraction"] > 0 for line in every[3::4])
    for made in recorded:
        assert (made.columns["old_log_probs"] - made.columns["rollout_log_probs"]).abs().max() < 1e-4
    assert len(recorded) == 3 and {"reward", "reward/std", "entropy", "response_length", "ended", "value/explained_variance", "value/loss",
                                   "policy/approx_kl", "rollout/tokens_per_second"} <= every[0].keys()


@pytest.mark.parametrize("critic", ["", "separate"])
def test_answers_that_are_trained_on_once_need_no_pass_before(critic, tmp_path, recorded, monkeypatch):
    """Then the policy before its update is the one that is trained: the same steps as with its log-probs of before, which a penalty
    of nearly nothing asks for."""
    passes, hidden = [], model.Decoder.hidden
    monkeypatch.setattr(model.Decoder, "hidden", lambda self, batch: passes.append(
        hasattr(self, "lm_head") and not torch.is_grad_enabled()) or hidden(self, batch))
    more = dict(objective={"ppo": 1.0, "value": 0.5, "entropy_bonus": 0.01} if critic else {"ppo": 1.0, "entropy_bonus": 0.01},
                advantages="gae" if critic else "group_norm", rollout_epochs=1, max_steps=3, lr=2e-2, correction="tis",
                micro_batch_tokens=26, eval_data="", eval_prompts="",
                **({"critic": str(critic_folder(tmp_path))} if critic else {}))
    recorded.clear()
    passes.clear()
    once = start(tmp_path, out="once", **more)
    assert passes and not any(passes) and not any("old_log_probs" in made.columns for made in recorded)
    both = start(tmp_path, out="both", kl_coef=1e-30, **more)
    assert any(passes) and all("old_log_probs" in made.columns for made in recorded[3:])
    for name, value in weights(once / "model").items():
        assert (value - weights(both / "model")[name]).abs().max() < 1e-9
    said = ("loss", "grad_norm", "entropy", "policy/ratio", "policy/clip_fraction", "policy/rollout_kl")
    for one, two in zip(lines(once), lines(both), strict=True):
        assert all(one[key] == pytest.approx(two[key], abs=1e-9) for key in said)


@pytest.mark.parametrize("kl_target", [0.0, 0.1])
def test_a_resumed_run_takes_the_kl_coef_that_it_is_given(kl_target, tmp_path, recorded):
    """...but where it adapts: then it goes on from where it was."""
    more = dict(save_every=2, kl_horizon=100.0, kl_target=kl_target) if kl_target else dict(save_every=2)
    coefs = lambda: [line["kl_coef"] for line in lines(start(tmp_path, rollout_epochs=1, **more, **changed))]
    changed = dict(kl_coef=0.25, max_steps=2)
    before = coefs()
    changed = dict(kl_coef=0.5, max_steps=4, resume=True)
    after = coefs()
    assert before[0] == 0.25 and before == after[:2] and len(after) == 4
    assert abs(after[2] - before[1]) < 0.1 and before[1] != 0.25 if kl_target else after[2:] == [0.5, 0.5]


def critic_folder(tmp_path):
    train.train(config.load(options(tmp_path, "rm", "critic", max_steps=1)))
    return tmp_path / "critic" / "model"


def test_groups_are_cut_into_the_ranks_shares(tmp_path, monkeypatch):
    """Where there are fewer prompts than ranks, their answers are shared out; one rank cuts none that a stream holds."""
    monkeypatch.chdir(ROOT)
    suppliers, make = [], rollout.Rollouts.make
    monkeypatch.setattr(rollout.Rollouts, "make", lambda self: suppliers.append(self) or make(self))
    start(tmp_path, batch_size=2, samples_per_prompt=6, max_steps=1)
    supply = suppliers[0]
    groups = supply.now.groups
    for world, most in ((1, 1), (2, 2), (6, 6)):
        supply.machine = supply.machine._replace(world=world)
        made = supply.assemble(groups)
        assert 1 <= max(map(len, made.pieces)) <= most and len(made.dataset) >= min(world, 4)
        assert np.concatenate(made.pieces).tolist() == [*range(len(made.dataset))]
        for group, piece in zip(groups, made.pieces):
            parts = [made.dataset.examples[i] for i in piece]
            assert [ids.tolist() for part in parts for ids in part.responses] == [answer.ids for answer in group.answers]
            assert all(part.prompt.tolist() == parts[0].prompt.tolist() for part in parts)


@pytest.mark.parametrize("critic, prompts", [("shared", 13), ("separate", 13), ("shared", 1)])
def test_ranks_and_micro_batches_do_not_matter_to_ppo(critic, prompts, tmp_path, recorded):
    """Three steps in float64, two on one rollout: the same samples and, to 1e-9, the same weights, critic included. (The answers to one
    prompt are shared between both ranks.)"""
    more = dict(objective={"ppo": 1.0, "value": 0.5, "entropy_bonus": 0.01}, advantages="gae", rollout_epochs=2, max_steps=3, save_every=3,
                kl_coef=0.1, critic_lr=2e-2, critic_warmup=1, missing_eos_penalty=0.5, temperature=0.9, grad_clip=0.5, batch_size=prompts)
    more |= dict(critic=critic_folder(tmp_path)) if critic == "separate" else {}
    start(tmp_path, "ppo", "large", **more)
    start(tmp_path, "ppo", "small", micro_batch_tokens=32, **more)
    run(options(tmp_path, "ppo", "ranks", micro_batch_tokens=32, **more), ranks=2)
    large, *others = (with_critic(tmp_path / out / "checkpoint-3") for out in ("large", "small", "ranks"))
    assert any(name.startswith("critic." if critic == "separate" else "values.") for name in large)
    for other in others:
        assert_close(other, large, 1e-9)
    saved = [load_file(tmp_path / out / "checkpoint-3" / "rollout.safetensors") for out in ("large", "ranks")]
    assert torch.equal(saved[0]["ids"], saved[1]["ids"]) and torch.equal(saved[0]["example"], saved[1]["example"])
    for ours, theirs in zip(lines(tmp_path / "ranks"), lines(tmp_path / "large"), strict=True):
        repeated = {"tokens"} if prompts == 1 else set()  # the prompt, once on each rank
        for key in theirs.keys() - {"split", "seconds", "tokens_per_second", "peak_memory_gb", *TIMES} - repeated:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-9), key
    model_of = load_file(tmp_path / "large" / "model" / "model.safetensors")
    assert not any(name.startswith(("values", "critic")) for name in model_of)  # transformers loads a policy


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_critic_warm_up_is_exactly_so_many_steps(critic, tmp_path, recorded):
    """The policy and its Adam state are untouched for 3 steps, the critic is not; then both move."""
    more = dict(objective={"ppo": 1.0, "value": 0.5}, advantages="gae", max_steps=5, save_every=1, keep_checkpoints=9, critic_warmup=3,
                critic_lr=1e-3)
    more |= dict(critic=critic_folder(tmp_path)) if critic == "separate" else {}
    out = start(tmp_path, **more)
    states = [with_critic(out / f"checkpoint-{i}") for i in range(1, 6)]
    critics = {name for name in states[0] if name.split(".")[0] in model.CRITIC}
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in zip(states, states[1:])]
    assert moved[0] == moved[1] == critics and moved[2] == moved[3] == states[0].keys()
    counts = load_file(out / "checkpoint-5" / "optimizer.safetensors")
    assert {name.removesuffix(".step") in critics: value.item() for name, value in counts.items() if name.endswith(".step")} == {True: 5, False: 2}


def test_resume_in_the_middle_of_a_rollout_is_bitwise(tmp_path, recorded):
    """Four steps on a rollout, saved after the sixth of eight: its answers come back from the checkpoint, as does the KL coefficient."""
    more = dict(objective={"ppo": 1.0, "value": 0.5}, advantages="gae", rollout_epochs=2, rollout_prompts=26, save_every=3, kl_coef=0.1,
                kl_target=0.001, kl_horizon=100, critic_warmup=2, dtype="float32", save_dtype="float32", micro_batch_tokens=128)
    start(tmp_path, "ppo", "whole", max_steps=12, **more)
    start(tmp_path, "ppo", "parts", max_steps=6, **more)
    with pytest.raises(ValueError, match="checkpoint-6: step 6 is inside a rollout with 3 samples_per_prompt; resume with the same number"):
        train.train(config.load([*options(tmp_path, "ppo", "parts", max_steps=12, **more), "--resume", "--samples_per_prompt=2"]))
    train.train(config.load([*options(tmp_path, "ppo", "parts", max_steps=12, **more), "--resume"]))
    assert len(recorded) == 3 + 2 + 1
    whole, parts = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES + ["seconds", "tokens_per_second", "peak_memory_gb"]} == {
            k: v for k, v in b.items() if k not in TIMES + ["seconds", "tokens_per_second", "peak_memory_gb"]}
    assert len({line["kl_coef"] for line in lines(tmp_path / "whole")}) == 3


FAILS = REWARD + """
import os, pathlib
def failing(prompt, completion, row):
    calls = pathlib.Path(os.environ["CALLS"])
    if calls.exists() and prompt == calls.read_text():
        return {"raises": lambda: 1 / 0, "nan": lambda: float("nan")}[os.environ["HOW"]]()
    return reward(prompt, completion, row)
"""


@pytest.mark.parametrize("how, ranks", [("raises", 1), ("nan", 1), ("raises", 2)])
def test_a_failing_reward_loses_nothing(how, ranks, tmp_path, recorded, monkeypatch):
    """The fourth rollout's reward fails for one prompt (on one of two ranks): an error that names its row, everything saved; with the
    reward mended, the run goes on to the bitwise result of one that never failed."""
    more = dict(max_steps=6, dtype="float64", save_dtype="float64", advantages="reinforce")
    whole = start(tmp_path, "reinforce", "whole", **more)
    broken = recorded[3].groups[5].example
    rows = [json.loads(line) for line in open(ROWS["prompts"])]
    assert broken not in [g.example for made in recorded[:3] for g in made.groups]
    (tmp_path / "prompt").write_text(rows[broken]["prompt"])
    given = options(tmp_path, "reinforce", "parts", **more)
    (tmp_path / "failing.py").write_text(FAILS.replace("def reward", "def plain").replace("return reward(", "return plain(")
                                         .replace("def failing", "def reward"))
    failing = [f"--config={tmp_path / 'failing.py'}" if word.startswith("--config") else word for word in given]
    failed = run(failing, ranks, check=False, CALLS=str(tmp_path / "prompt"), HOW=how)
    line = 1 + next(i for i, text in enumerate((tmp_path / "failing.py").read_text().splitlines()) if "1 / 0" in text)
    said = {"raises": f"ZeroDivisionError: division by zero ({tmp_path / 'failing.py'}:{line})", "nan": "returned nan, expected a number"}[how]
    assert failed.returncode != 0 and f"error: {ROWS['prompts']}:{broken + 1}: reward: {said}; for the completion" in failed.stderr
    assert "Traceback" not in failed.stderr or ranks > 1
    assert [p.name for p in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    run([*failing, "--resume"], ranks, CALLS=str(tmp_path / "nothing"), HOW=how)
    assert_close(weights(tmp_path / "parts" / "model"), weights(whole / "model"), 1e-9 if ranks > 1 else 1e-300)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_prompts_without_a_reward_are_skipped_and_counted(tmp_path, recorded, monkeypatch):
    (tmp_path / "odd.py").write_text("def reward(prompt, completion, row):\n    return float('nan') if int(row['answer']) % 2 else len(completion)\n")
    given = [f"--config={tmp_path / 'odd.py'}" if word.startswith("--config") else word
             for word in options(tmp_path, "ppo", bad_rewards="skip", max_steps=2)]
    train.train(config.load(given))
    rows = [json.loads(line) for line in open(ROWS["prompts"])]
    for made, line in zip(recorded, lines(tmp_path / "run"), strict=True):
        assert line["rollout/skipped"] == 13 - len(made.groups) > 0 and not any(int(rows[g.example]["answer"]) % 2 for g in made.groups)
    (tmp_path / "odd.py").write_text("def reward(prompt, completion, row):\n    return float('nan')\n")
    with pytest.raises(ValueError, match="none of the 13 prompts of a rollout has rewards for all of its answers"):
        train.train(config.load([*given, f"--out_dir={tmp_path / 'none'}"]))


def test_groups_without_variance_are_replaced(tmp_path, recorded):
    """A reward that most groups agree on: those left are trained, more are drawn, and metrics are of all answers."""
    (tmp_path / "rare.py").write_text("def reward(prompt, completion, row):\n    return float(completion.startswith('1'))\n")
    given = [f"--config={tmp_path / 'rare.py'}" if word.startswith("--config") else word
             for word in options(tmp_path, "ppo", filter_groups=True, filter_rounds=2, max_steps=2)]
    train.train(config.load(given))
    for made, line in zip(recorded, lines(tmp_path / "run"), strict=True):
        assert 0 < line["rollout/kept"] < 1 and all(max(g.rewards) > min(g.rewards) for g in made.groups) and len(made.groups) <= 13
        assert line["reward"] < np.mean([g.rewards for g in made.groups])
    trained = [g.example for made in recorded for g in made.groups]
    assert len(trained) > 13 and len(set(trained)) == len(trained)  # no prompt twice before all had their turn


def test_the_kl_coefficient_adapts(tmp_path, recorded):
    """Ziegler et al. section 2.2, from one rollout to the next."""
    out = start(tmp_path, max_steps=4, kl_coef=0.2, kl_target=0.01, kl_horizon=500, lr=2e-2)
    coefficient = 0.2
    for line in lines(out):
        assert line["kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        coefficient *= 1 + min(max(line["kl"] / 0.01 - 1, -0.2), 0.2) * 13 * 3 / 500
    assert lines(out)[-1]["kl"] > 0.01 and coefficient != 0.2


def test_models_judge_answers(tmp_path, recorded):
    """A function, a reward model and a process reward model in one sum: what `sample.py score` says of the same texts."""
    import sample
    for name in ("rm", "prm"):
        train.train(config.load(options(tmp_path, name, name, max_steps=1)))
    (tmp_path / "sum.py").write_text(REWARD + f"reward = {{reward: 1.0, {str(tmp_path / 'rm')!r}: 0.5, {str(tmp_path / 'prm')!r}: -2.0}}\n")
    given = [f"--config={tmp_path / 'sum.py'}" if word.startswith("--config") else word for word in options(tmp_path, "ppo", max_steps=1)]
    train.train(config.load(given))
    tokenizer, rows = data.Tokenizer(ROOT / "tasks/arithmetic"), [json.loads(line) for line in open(ROWS["prompts"])]
    told = [(rows[g.example]["prompt"], rollout.written(tokenizer, a), value) for g in recorded[0].groups for a, value in zip(g.answers, g.rewards)
            if a.ended and a.ids[:-1] == tokenizer.fast.encode(rollout.written(tokenizer, a)).ids]
    plain = config.runpy.run_path(str(tmp_path / "reward.py"))["reward"]
    (tmp_path / "rm.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c, _ in told))
    (tmp_path / "prm.jsonl").write_text("".join(json.dumps({"prompt": p, "completions": [s for s in c.split("\n") if s] or [" "]}) + "\n" for p, c, _ in told))
    found = {}
    for name in ("rm", "prm"):
        sample.main(["score", f"--model={tmp_path / name}", f"--data={tmp_path / name}.jsonl", f"--out={tmp_path / name}.out", "--device=cpu", "--dtype=float64"])
        found[name] = [json.loads(line)["score"] for line in open(tmp_path / f"{name}.out")]
    assert len(told) >= 5
    for (prompt, text, value), a, b in zip(told, found["rm"], found["prm"], strict=True):
        assert value == pytest.approx(plain(prompt, text, {}) + 0.5 * a - 2.0 * b["min"], abs=1e-4)


@pytest.mark.parametrize("more, message", [
    (dict(advantages="gae"), "advantages = 'gae' needs a critic"),
    (dict(samples_per_prompt=1), "advantages = 'group_norm' compares several answers to the same prompt; set samples_per_prompt above 1"),
    (dict(rollout_prompts=20), "rollout_prompts = 20; expected a multiple of batch_size = 13"),
    (dict(temperature=0), "temperature = 0 gives each prompt one fixed answer"),
    (dict(advantages="reinforce", gamma=1.5), "gamma = 1.5: a reward would count more the later it comes; set it to at most 1"),
    (dict(max_new_tokens=64), "max_new_tokens = 64 leaves nothing for the prompt"),
    (dict(micro_batch_tokens=8), "a prompt with its responses takes 18 tokens and micro_batch_tokens is 8"),
    (dict(reward="nowhere"), "nowhere: no such folder"),
    (dict(critic="nowhere"), "critic = 'nowhere' does nothing in ppo without the value loss; leave it out"),
    (dict(samples_per_prompt=1, lam=0.5), "lam = 0.5 does nothing in ppo without advantages = 'gae'"),
    (dict(objective={"ppo": 1.0, "sft": 0.1}), "prompts rows have nothing for sft to imitate; drop it"),
    (dict(kl_target=0.1), "kl_target = 0.1 does nothing in ppo without kl_coef"),
    (dict(top_p=1.5), "top_p = 1.5; expected at most 1"),
    (dict(eval_prompts=ROWS["prompts"], eval_data=ROWS["prompts"]), "eval_data and eval_prompts are both prompts"),
    (dict(objective={"value": 1.0}), "trains a critic and no policy"),
    (dict(train_data="tasks/arithmetic/pairs_eval.jsonl", reward="", config=""), "rollouts need reward"),
])
def test_what_rollouts_refuse(more, message, tmp_path, recorded):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **more)


def test_a_failure_on_one_rank_is_everybody_s(tmp_path):
    """A reward model without room for the answers fails where they are scored; the other rank does not wait for it for ever."""
    scratch = dict(model_type="gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=17)
    train_on = tmp_path / "short.jsonl"
    train_on.write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}) + "\n")
    run(options(tmp_path, "rm", "short", scratch=scratch, train_data=train_on, max_steps=1))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in [*["1+1="] * 12, "29+29+29+29="]))
    failed = run(options(tmp_path, "ppo", reward=tmp_path / "short", train_data=tmp_path / "prompts.jsonl", max_steps=2), ranks=2, check=False)
    assert failed.returncode != 0 and f"error: {tmp_path / 'prompts.jsonl'}:13: 18 tokens, and the model has 17 positions" in failed.stderr
    assert (tmp_path / "run" / "checkpoint-0").is_dir()


def test_the_same_answer_has_the_same_reward(tmp_path, recorded):
    """To the last bit, wherever it is packed: groups that agree have no variance, and no advantage is made of rounding."""
    train.train(config.load(options(tmp_path, "rm", "rm", max_steps=1, dtype="float32")))
    start(tmp_path, reward=tmp_path / "rm", samples_per_prompt=24, max_new_tokens=2, dtype="float32", max_steps=1, micro_batch_tokens=32)
    seen = [{} for _ in recorded[0].groups]
    for g, rewards in zip(recorded[0].groups, seen):
        for answer, value in zip(g.answers, g.rewards):
            rewards.setdefault(tuple(answer.ids), set()).add(value)
    assert all(len(values) == 1 for rewards in seen for values in rewards.values()) and max(map(len, seen)) > 3


def test_an_eval_whose_reward_fails_loses_nothing(tmp_path, recorded):
    (tmp_path / "odd.py").write_text("def reward(prompt, completion, row):\n    return float('nan') if row['answer'] == '42' else len(completion)\n")
    (tmp_path / "train.jsonl").write_text("".join(line for line in open(ROWS["prompts"]) if '"42"' not in line))
    given = [f"--config={tmp_path / 'odd.py'}" if word.startswith("--config") else word for word in
             options(tmp_path, "ppo", max_steps=2, train_data=tmp_path / "train.jsonl", eval_data=ROWS["prompts"])]
    with pytest.raises(ValueError, match=r"problems_eval.jsonl:1: reward: returned nan.*bad_rewards = 'skip'"):
        train.train(config.load(given))
    assert (tmp_path / "run" / "checkpoint-0").is_dir()
    train.train(config.load([*given, "--bad_rewards=skip", "--resume"]))
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [0, 2] and lines(tmp_path / "run", "eval")[0]["reward"] > 0


# Epochs


def few(tmp_path, count: int, **more) -> dict:
    """Options of a run on the first so many prompts."""
    path = tmp_path / f"{count}.jsonl"
    path.write_text("".join(open(ROWS["prompts"]).readlines()[:count]))
    return dict(train_data=path, max_steps=0, **more)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_is_one_pass_over_few_prompts(epochs, tmp_path, recorded):
    """Three prompts and steps of 64: a rollout of three, and not of each prompt 21 times."""
    out = start(tmp_path, **few(tmp_path, 3, batch_size=64, epochs=epochs))
    assert [sorted(g.example for g in made.groups) for made in recorded] == [[0, 1, 2]] * epochs
    assert len(lines(out)) == epochs


def test_the_last_rollout_of_an_epoch_takes_what_is_left(tmp_path, recorded, monkeypatch):
    """Seven prompts in rollouts of four, two of them a step, each answer twice: 4 steps and then 4 on three prompts, none
    without a group; every pass has every prompt once, and its own answers."""
    stepped, rows = [], rollout.Rollouts.rows

    def noted(self, step):
        dataset, members = rows(self, step)
        stepped.append({dataset.examples[i].where for i in members})
        return dataset, members
    monkeypatch.setattr(rollout.Rollouts, "rows", noted)
    start(tmp_path, **few(tmp_path, 7, batch_size=2, rollout_prompts=4, rollout_epochs=2, epochs=2))
    assert [len(made.groups) for made in recorded] == [4, 3, 4, 3]
    assert [len(step) for step in stepped] == [2, 2, 2, 2, 2, 1, 2, 1] * 2
    first, second = (sorted(g.example for made in recorded[i:i + 2] for g in made.groups) for i in (0, 2))
    assert first == second == [*range(7)]
    ids = [{g.example: [a.ids for a in g.answers] for made in recorded[i:i + 2] for g in made.groups} for i in (0, 2)]
    assert all(ids[0][i] != ids[1][i] for i in range(7))


@pytest.mark.parametrize("saved", [5, 6, 9])
def test_resume_around_a_short_rollout_is_bitwise(saved, tmp_path, recorded):
    """In its first pass, in its second, and in the next epoch."""
    more = few(tmp_path, 7, batch_size=2, rollout_prompts=4, rollout_epochs=2, dtype="float32", save_dtype="float32",
               lr=2e-2, save_every=1, keep_checkpoints=99)
    whole = start(tmp_path, out="whole", **{**more, "max_steps": 12})
    start(tmp_path, out="parts", **{**more, "max_steps": saved})
    train.train(config.load([*options(tmp_path, "ppo", "parts", **{**more, "max_steps": 12}), "--resume"]))
    one, other = weights(whole / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_do_not_matter_to_a_short_rollout(tmp_path, recorded):
    more = few(tmp_path, 3, batch_size=2, rollout_prompts=8, epochs=2)
    start(tmp_path, out="one", **more)
    run(options(tmp_path, "ppo", "two", **more), ranks=2)
    assert len(lines(tmp_path / "one")) == 4
    assert_close(weights(tmp_path / "two" / "model"), weights(tmp_path / "one" / "model"), 1e-9)


def test_other_prompts_stand_in_where_an_epoch_ends_without_a_reward(tmp_path, recorded):
    """Of five prompts, the one that is left for the second rollout has no reward: left out, it does not end the run."""
    start(tmp_path, out="plain", **few(tmp_path, 5, batch_size=4))
    (left,) = recorded[1].groups
    answer = json.loads(open(ROWS["prompts"]).readlines()[left.example])["answer"]
    (tmp_path / "odd.py").write_text(f"def reward(prompt, completion, row):\n"
                                     f"    return None if row['answer'] == {answer!r} else 1.0 * len(completion)\n")
    given = [f"--config={tmp_path / 'odd.py'}" if word.startswith("--config") else word
             for word in options(tmp_path, "ppo", bad_rewards="skip", **few(tmp_path, 5, batch_size=4))]
    train.train(config.load(given))
    assert lines(tmp_path / "run")[0]["rollout/skipped"] == 0 < lines(tmp_path / "run")[1]["rollout/skipped"]
    assert [len(made.groups) for made in recorded[2:]] == [4, 1] and recorded[3].groups[0].example != left.example


def test_further_draws_come_on_top_of_epochs(tmp_path, recorded):
    """filter_rounds goes on through the prompts; the number of steps stays that of epochs."""
    (tmp_path / "same.py").write_text("def reward(prompt, completion, row):\n    return 1.0\n")
    given = [f"--config={tmp_path / 'same.py'}" if word.startswith("--config") else word
             for word in options(tmp_path, filter_groups=True, filter_rounds=2, **few(tmp_path, 3, batch_size=2), name="ppo")]
    train.train(config.load(given))
    assert [len(made.groups) for made in recorded] == [1, 1] and len(lines(tmp_path / "run")) == 2
    assert [line["frac_reward_zero_std"] for line in lines(tmp_path / "run")] == [1.0, 1.0]
