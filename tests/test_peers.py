"""Our losses against the code of TRL, Liger-Kernel and OpenRLHF, where it is installed: `python -m pytest tests -m peers`.

TRL's DPO, KTO and GRPO losses live in trainers, so these are built on a tiny Llama and asked for the loss and the gradient of
a real batch; ours get the log-probs of the same batch. Its other losses are functions, or methods that are called as such.
README lists where the peers differ; `test_where_*` show it, but for what TRL's CPO and ORPO trainers add to their losses.
"""
import itertools
import os
import types
from pathlib import Path

import jinja2
import pytest
import torch

import data
import losses
from conftest import ROOT, TINY
from parts import formats

pytestmark = pytest.mark.peers


def mean(loss, *inputs, **options):
    return ratio(*losses.reduced(*loss(*inputs, **options)[:2]))


def ratio(total, count):
    return total / count


def assert_same(ours, theirs, wanted=(), tolerance=1e-5):
    """Two losses, and their gradients with respect to the tensors wanted."""
    assert abs(ours - theirs) <= tolerance * (1 + abs(theirs)), (ours, theirs)
    if not wanted:
        return
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(x, wanted, retain_graph=True, materialize_grads=True)]) for x in (ours, theirs))
    assert (a - b).norm() <= tolerance * b.norm()


def pairs(count=6, seed=0, spread=8.0):
    generator = torch.Generator().manual_seed(seed)
    return [(-30 + spread * torch.randn(count, generator=generator)).requires_grad_(i < 2) for i in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# TRL


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def tiny_llama(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY["llama"], "vocab_size": 40, "rope_scaling": None}))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p) if p.dim() > 1 else 0
    return model


def arithmetic_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(ROOT / "tasks/arithmetic")


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_of_models_render_as_in_transformers(trl, add_generation_prompt, tmp_path):
    """Those that TRL ships, with {% generation %} and without: conversations with a system's turn, thoughts, functions."""
    theirs, equal = arithmetic_tokenizer(), 0
    user, call = {"role": "user", "content": "é <b>?"}, {"name": "add", "arguments": {"a": 2, "b": ["é"]}}
    answer = {"role": "assistant", "content": "So."}
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "description": "é"}}, "required": ["a"]}}}]
    talks = [([user, answer, user, answer], None), ([{"role": "system", "content": "Be."}, user, answer], None),
             ([user, {**answer, "reasoning_content": "hm"}], None), ([user, answer], tools),
             ([user, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "abcdefghi", "function": call}]},
               {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"}, answer], tools)]
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    for file, (talk, tools) in itertools.product(files, talks):
        talk = talk[:-1] if add_generation_prompt else talk
        try:
            expected = theirs.apply_chat_template(talk, tools=tools, chat_template=file.read_text(), tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError):
            continue  # it takes no such conversation
        tokenizer = data.Tokenizer(ROOT / "tasks/arithmetic", str(file))
        if "tool_calls" in tokenizer.chat_template or not any("tool_calls" in m for m in talk):
            talk = formats.messages_field({"messages": talk}, "messages")
            assert tokenizer.render(talk, add_generation_prompt, tools) == expected, (file.name, talk)
            equal += 1
    assert equal > 3 * len(files) > 100


def sums(model, ids, attention_mask, completion_mask):
    """Summed log-probs (B,), their per-token table and its mask, from plain logits."""
    logps = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
    mask = completion_mask[:, 1:].bool()
    return torch.where(mask, logps, 0).sum(-1), logps, mask


@pytest.fixture(scope="module")
def dpo_trainer(trl, tmp_path_factory):
    return make_dpo_trainer(trl, tmp_path_factory.mktemp("dpo"))


def make_dpo_trainer(trl, folder, **options):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("json", data_files=str(ROOT / "tasks/arithmetic/pairs_eval.jsonl"), split="train").select(range(8))
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    rows = rows.map(lambda row, i: {"rejected": row["rejected"] + " 7" * (i % 3)}, with_indices=True)  # other lengths
    args = trl.DPOConfig(output_dir=str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
                         gradient_checkpointing=False, **options)
    return trl.DPOTrainer(model=tiny_llama(0), ref_model=tiny_llama(1), args=args, train_dataset=rows, processing_class=arithmetic_tokenizer())


@pytest.mark.parametrize("loss_type, name, options", [
    ("sigmoid", "dpo", {}), ("hinge", "hinge", {}), ("ipo", "ipo", dict(length_normalized=True)), ("exo_pair", "exo_pair", dict(label_smoothing=1e-2)),
    ("nca_pair", "nca_pair", {}), ("robust", "robust", dict(label_smoothing=0.2)), ("bco_pair", "bco_pair", dict(delta=False)),
    ("sppo_hard", "sppo_hard", {}), ("aot", "aot", dict(label_smoothing=0.1)), ("aot_unpaired", "aot_unpaired", dict(label_smoothing=0.1)),
    ("apo_zero", "apo_zero", {}), ("apo_down", "apo_down", {}), ("discopop", "discopop", dict(tau=0.05)), ("sigmoid_norm", "sigmoid_norm", {})])
def test_preference_losses_against_trl(dpo_trainer, loss_type, name, options):
    theirs, parts = trl_dpo(dpo_trainer, loss_type, label_smoothing=options.get("label_smoothing", 0.0))
    read = {**parts, "running_reward": None}
    o = losses.OBJECTIVES[name]
    ours = mean(o.loss, *(read[r] for r in o.reads), beta=0.1, **options)
    wanted = [p for p in dpo_trainer.model.parameters()]
    assert_same(ours, theirs, wanted)


def trl_dpo(trainer, loss_type, **attributes):
    """TRL's loss of a batch, and the readings of ours on the same batch."""
    defaults = dict(loss_types=[loss_type], loss_weights=[1.0], beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", ld_alpha=None,
                    use_weighting=False)
    for key, value in {**defaults, **attributes}.items():
        assert hasattr(trainer, key), key
        setattr(trainer, key, value)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    readings = {}
    for whose, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        with torch.set_grad_enabled(whose == "policy"):
            total, logps, mask = sums(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        readings[f"{whose}_chosen_logps"], readings[f"{whose}_rejected_logps"] = total.chunk(2)
        readings[f"{whose}_tokens"] = logps
    readings["chosen_lengths"], readings["rejected_lengths"] = mask.sum(-1).chunk(2)
    readings["mask"] = mask
    return theirs, readings


def as_stream(readings):
    """TRL's padded batch as one of ours: (batch, outputs) of `losses.total`."""
    mask = readings["mask"]
    rows, _ = mask.nonzero().T
    pairs = len(mask) // 2
    lengths = mask.sum(-1)
    batch = {"num_responses": len(mask), "longest": int(lengths.max()), "lengths": lengths, "response": rows,
             "place": torch.cat([torch.arange(n) for n in lengths.tolist()]), "chosen": torch.arange(pairs), "rejected": torch.arange(pairs) + pairs,
             "reference_log_probs": readings["reference_tokens"][mask], "demonstrated": torch.arange(len(mask)) < pairs}
    return batch, {"log_probs": readings["policy_tokens"][mask]}


@pytest.mark.parametrize("option, value, attributes", [
    ("ld_alpha", 0.3, dict(ld_alpha=0.3)), ("f_divergence", "forward_kl", dict(f_divergence_type="forward_kl")),
    ("f_divergence", "js", dict(f_divergence_type="js_divergence")),
    ("f_divergence", 0.3, dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3))])
def test_options_against_trl(dpo_trainer, option, value, attributes):
    theirs, readings = trl_dpo(dpo_trainer, "sigmoid", **attributes)
    batch, outputs = as_stream(readings)
    term = losses.OPTIONS[option](losses.bind("dpo", 1.0, dict(beta=0.1, label_smoothing=0.0)), value)
    ours, _ = losses.total([term], outputs, batch, {"pairs": len(batch["chosen"])})
    assert_same(ours, theirs, list(dpo_trainer.model.parameters()))


def test_wpo_against_trl(trl, tmp_path):
    dpo_trainer = make_dpo_trainer(trl, tmp_path, use_weighting=True)
    theirs, readings = trl_dpo(dpo_trainer, "sigmoid", use_weighting=True)
    batch, outputs = as_stream(readings)
    inputs = next(iter(dpo_trainer.get_train_dataloader()))
    logps = dpo_trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
    outputs["collision"] = (2 * logps).logsumexp(-1)[readings["mask"]]
    term = losses.OPTIONS["wpo"](losses.bind("dpo", 1.0, dict(beta=0.1, label_smoothing=0.0)), True)
    ours, _ = losses.total([term], outputs, batch, {"pairs": len(batch["chosen"])})
    assert_same(ours, theirs, list(dpo_trainer.model.parameters()))


def test_where_trl_ignores_an_option(dpo_trainer):
    """nca_pair, bco_pair, sppo_hard, apo_* take no notice of f_divergence_type in TRL, whose constructor refuses the two
    together; here they heed it."""
    plain, readings = trl_dpo(dpo_trainer, "nca_pair")
    theirs, _ = trl_dpo(dpo_trainer, "nca_pair", f_divergence_type="js_divergence")
    batch, outputs = as_stream(readings)
    term = losses.OPTIONS["f_divergence"](losses.bind("nca_pair", 1.0, dict(beta=0.1)), "js")
    ours, _ = losses.total([term], outputs, batch, {"pairs": len(batch["chosen"])})
    assert plain.item() == theirs.item() and abs(ours - theirs) > 1e-3


def test_where_discopop_overflows():
    """exp(-x) sigmoid(x / tau) is inf * 0 for a very wrong pair in Liger's form, which is TRL's; here it is finite."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    x, zero = torch.tensor([-200.0]), torch.zeros(1)
    assert liger.preference_loss_fn(x, zero, torch.zeros(2), zero, zero, beta=1.0, loss_type="discopop")[0].isnan()
    assert losses.discopop(x, zero, zero, zero, beta=1.0)[0].isfinite().all()


def test_where_trl_counts_a_tie_as_wrong(trl, tmp_path):
    trainer = make_dpo_trainer(trl, tmp_path)
    trainer.ref_model.load_state_dict(trainer.model.state_dict())
    _, x = trl_dpo(trainer, "sigmoid")
    metrics = losses.dpo(*(x[name].detach() for name in losses.OBJECTIVES["dpo"].reads))[2]
    assert trainer._metrics["train"]["rewards/accuracies"] == [0.0] and (metrics["rewards/accuracies"][0] == 0.5).all()


def test_the_nll_term_against_trl(dpo_trainer):
    """loss_type "sft" of TRL's DPO is what nll_coef adds."""
    theirs, x = trl_dpo(dpo_trainer, "sft")
    batch, outputs = as_stream(x)
    term = losses.bind("sft", 1.0, losses.OBJECTIVES["sft"].hyperparameters)
    ours, _ = losses.total([term], outputs, batch, {"demonstrated_tokens": int(batch["lengths"][:len(batch["chosen"])].sum())})
    assert_same(ours, theirs, list(dpo_trainer.model.parameters()))


@pytest.mark.parametrize("loss_type, name", [("kto", "kto"), ("apo_zero_unpaired", "apo_zero_unpaired")])
def test_unpaired_losses_against_trl(trl, loss_type, name, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("json", data_files=str(ROOT / "tasks/arithmetic/pairs_eval.jsonl"), split="train").select(range(8))
    rows = rows.map(lambda row, i: {"completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}, with_indices=True)
    rows = rows.select_columns(["prompt", "completion", "label"])
    args = trl.KTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False, loss_type=loss_type,
                         gradient_checkpointing=False, desirable_weight=1.2, undesirable_weight=0.7 if name == "kto" else 1.2)
    trainer = trl.KTOTrainer(model=tiny_llama(0), ref_model=tiny_llama(1), args=args, train_dataset=rows, processing_class=arithmetic_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    label, readings = torch.as_tensor(batch["label"]).bool(), {}
    for whose, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        total = sums(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])[0]
        readings.update({f"{whose}_chosen_logps": total[label], f"{whose}_rejected_logps": total[~label]})
        if name == "kto":
            readings[f"{whose}_KL_logps"] = sums(model, batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])[0]
    o = losses.OBJECTIVES[name]
    options = dict(desirable_weight=1.2, undesirable_weight=0.7) if name == "kto" else {}
    ours = mean(o.loss, *(readings[r] for r in o.reads), beta=0.1, **options) * (1 if name == "kto" else 1.2)
    assert_same(ours, theirs, list(trainer.model.parameters()))


@pytest.mark.parametrize("name, options", [("simpo", dict(beta=2.0, gamma=1.0)), ("cpo", dict(beta=0.1, alpha=0.0))])
def test_simpo_and_cpo_against_trl(trl, name, options):
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    pc, pr, *_ = pairs()
    n, m = torch.tensor([3, 5, 9, 4, 7, 2]), torch.tensor([6, 2, 8, 3, 3, 9])
    me = types.SimpleNamespace(alpha=0.0, beta=options["beta"], label_smoothing=0.0, loss_type="simpo" if name == "simpo" else "sigmoid",
                               simpo_gamma=options.get("gamma"), accelerator=types.SimpleNamespace(device="cpu"))
    theirs = trainer.cpo_loss(me, pc / n if name == "simpo" else pc, pr / m if name == "simpo" else pr)[0].mean()
    inputs = (pc, pr, n, m) if name == "simpo" else (pc, pr, n)
    assert_same(mean(losses.OBJECTIVES[name].loss, *inputs, **options), theirs, [pc, pr])


def test_orpo_against_trl(trl):
    """TRL adds the NLL of prompt and response, a mean over the batch's tokens; ours is the response's, per pair (the paper)."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    pc, pr, *_ = pairs()
    n, m = torch.tensor([13, 15, 9, 14, 17, 12]), torch.tensor([6, 12, 8, 13, 13, 9])
    me = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    theirs = -trainer.odds_ratio_loss(me, pc / n, pr / m)[0].mean() - (pc / n).mean()
    assert_same(mean(losses.orpo, pc, pr, n, m, beta=0.3), theirs, [pc, pr])


@pytest.mark.parametrize("jsd_beta", [0.0, 0.3, 1.0])
def test_distillation_against_trl_and_liger(trl, jsd_beta):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(7, 20, generator=generator, requires_grad=True), torch.randn(7, 20, generator=generator)
    label = torch.tensor([3, -100, 5, 6, -100, 0, 1])
    values, mask, metrics = losses.kd(student, teacher, label, alpha=1.0, jsd_beta=jsd_beta)
    ours = values.sum() / mask.sum()
    if jsd_beta == 0:  # theirs is the KL, ours the cross-entropy: apart by the teacher's entropy
        ours = ours - (-(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1))[mask].sum() / mask.sum()
        assert_same(ratio(*losses.reduced(*metrics["kl"])), ours)
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss(student, teacher, label, beta=jsd_beta)
    assert_same(ours, theirs, [student])
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction
    theirs = liger.distillation_loss_fn(student, teacher, beta=jsd_beta, target=label) / mask.sum()
    assert_same(ours, theirs, [student])


def rollouts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old, rollout, reference = (-2 + 0.3 * torch.randn(4, 9, generator=generator) for _ in range(4))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6], [1]])
    return new.requires_grad_(True), old, rollout, reference, torch.randn(4, generator=generator), mask


@pytest.fixture(scope="module")
def grpo_trainer(trl, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "1+1="}] * 4)
    args = trl.GRPOConfig(output_dir=str(tmp_path_factory.mktemp("grpo")), per_device_train_batch_size=4, num_generations=2, report_to=[], use_cpu=True,
                          bf16=False, max_completion_length=9, gradient_checkpointing=False, use_bias_correction_kl=False)
    return trl.GRPOTrainer(model=tiny_llama(0), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=rows,
                           processing_class=arithmetic_tokenizer())


@pytest.mark.parametrize("loss_type, level, name, options", [
    ("grpo", "token", "ppo", dict(reduction="sequence")), ("bnpo", "token", "ppo", {}), ("dapo", "token", "ppo", {}),
    ("dr_grpo", "token", "ppo", dict(reduction="dr_grpo", max_new_tokens=9)), ("grpo", "sequence", "gspo", dict(clip_eps_low=0.2, clip_eps_high=0.2)),
    ("cispo", "token", "cispo", {}), ("sapo", "token", "sapo", {})])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_policy_losses_against_trl(grpo_trainer, loss_type, level, name, options, beta):
    ours, theirs = policy_pair(grpo_trainer, loss_type, level, name, options, beta)
    assert_same(ours, theirs, list(grpo_trainer.model.parameters()))


def test_where_trl_weighs_its_kl_by_the_ratio(grpo_trainer):
    """use_bias_correction_kl, its default: another value once the ratio is not 1, another gradient at once."""
    grpo_trainer.args.use_bias_correction_kl = True
    for stale in (True, False):
        ours, theirs = policy_pair(grpo_trainer, "bnpo", "token", "ppo", {}, 5.0, stale)
        assert (abs(ours - theirs) > 2e-5) == stale
        a, b = (torch.autograd.grad(x, grpo_trainer.model.lm_head.weight)[0] for x in (ours, theirs))
        assert (a - b).norm() > 1e-3 * b.norm()
    grpo_trainer.args.use_bias_correction_kl = False


def policy_pair(grpo_trainer, loss_type, level, name, options, beta, stale=True):
    """Our loss and TRL's of a batch whose old log-probs are an older policy's (stale) or this one's."""
    _, old, rollout, reference, advantages, mask = rollouts()
    t = grpo_trainer
    t.loss_type, t.importance_sampling_level, t.beta, t.max_completion_length = loss_type, level, beta, 9
    t.epsilon_low, t.epsilon_high, t.current_gradient_accumulation_steps = 0.2, 1.2 if loss_type == "cispo" else 0.2, 1
    generator = torch.Generator().manual_seed(0)
    prompt, completion = torch.randint(3, 13, (4, 3), generator=generator), torch.randint(3, 13, (4, 9), generator=generator)
    ids, attention = torch.cat([prompt, completion], 1), torch.cat([torch.ones_like(prompt), mask.long()], 1)  # padding of the right is no key
    logits = t.model(input_ids=ids, attention_mask=attention).logits[:, 2:-1] / t.temperature
    new = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    old, reference = new.detach() + 0.3 * stale * (old + 2), new.detach() + 0.3 * (reference + 2)
    theirs = t._compute_loss(t.model, {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()})
    table = advantages[:, None].expand(4, 9)
    ours = total_of(losses.OBJECTIVES[name].loss(new, old, table, mask, **options), mask)
    if beta:
        reduction = {"reduction": "sequence"} if loss_type in ("grpo", "sapo") else {k: v for k, v in options.items() if k in ("reduction", "max_new_tokens")}
        ours = ours + beta * total_of(losses.kl(new, reference, mask, **reduction), mask)
    return ours, theirs


def total_of(result, action_mask):
    """A policy loss as a scalar: over tokens, or over all sequences."""
    values, mask, _ = result
    return losses.reduced(values, mask)[0] / (action_mask.sum() if values.dim() == 2 else len(values))


# ---------------------------------------------------------------------------------------------------------------------
# Liger-Kernel: the loss functions of its chunked heads


@pytest.mark.parametrize("loss_type, name, options", [
    ("sigmoid", "dpo", {}), ("hinge", "hinge", {}), ("exo_pair", "exo_pair", dict(label_smoothing=1e-2)), ("nca_pair", "nca_pair", {}),
    ("robust", "robust", dict(label_smoothing=0.2)), ("bco_pair", "bco_pair", dict(delta=False)), ("sppo_hard", "sppo_hard", {}),
    ("apo_zero", "apo_zero", {}), ("apo_down", "apo_down", {}), ("discopop", "discopop", dict(tau=0.05))])
def test_preference_losses_against_liger(loss_type, name, options):
    liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    inputs = pairs()
    pc, pr, rc, rr = inputs
    kwargs = {"label_smoothing": options["label_smoothing"]} if "label_smoothing" in options else {}
    theirs = liger.LigerFusedLinearDPOFunction.preference_loss_fn(pc, pr, torch.zeros(12), rc, rr, beta=0.1, loss_type=loss_type, **kwargs)[0]
    inputs += [None] * (len(losses.OBJECTIVES[name].reads) - 4)
    assert_same(mean(losses.OBJECTIVES[name].loss, *inputs, beta=0.1, **options), theirs, [pc, pr])


@pytest.mark.parametrize("name, theirs, options", [
    ("simpo", "SimPO", dict(beta=2.0, gamma=0.7)), ("orpo", "ORPO", dict(beta=0.3)), ("cpo", "CPO", dict(beta=0.1, alpha=0.5))])
def test_chunked_heads_against_liger(name, theirs, options):
    """Head and loss in one, NLL terms included, on responses of one length: there a mean over the batch's tokens is a mean of
    means over responses."""
    liger = getattr(pytest.importorskip("liger_kernel.chunked_loss"), f"LigerFusedLinear{theirs}Loss")
    generator, o = torch.Generator().manual_seed(0), losses.OBJECTIVES[name]
    hidden, weight = torch.randn(6, 5, 16, generator=generator).requires_grad_(True), torch.randn(40, 16, generator=generator).requires_grad_(True)
    target = torch.randint(40, (6, 5), generator=generator)
    loss = liger(compiled=False, **{"compute_nll_loss": False} if name == "simpo" else {}, **options)(weight, hidden, target)[0]
    logps = losses.linear_log_probs(hidden.flatten(0, 1), weight, target.flatten())[0].view(6, 5).sum(-1)
    given = {"policy_chosen_logps": logps[:3], "policy_rejected_logps": logps[3:], "chosen_lengths": torch.full((3,), 5), "rejected_lengths": torch.full((3,), 5)}
    assert_same(mean(o.loss, *(given[r] for r in o.reads), **options), loss, [hidden, weight])


def test_kto_against_liger():
    liger = pytest.importorskip("liger_kernel.chunked_loss.kto_loss").LigerFusedLinearKTOFunction
    logps, reference, labels = pairs()[0], pairs(seed=1)[2], torch.tensor([True, False, True, True, False, False])
    kl = torch.tensor(1.7)
    theirs = liger.preference_loss_fn(logps, labels, torch.zeros(6), reference, beta=0.1, kl=kl)[0]
    ours = mean(losses.kto, logps[labels], logps[~labels], kl[None], reference[labels], reference[~labels], torch.zeros(1), beta=0.1)
    assert_same(ours, theirs, [logps])


@pytest.mark.parametrize("loss_type, level, name, options", [
    ("grpo", "token", "ppo", dict(reduction="sequence")), ("bnpo", "token", "ppo", {}), ("dr_grpo", "token", "ppo", dict(reduction="dr_grpo", max_new_tokens=9)),
    ("grpo", "sequence", "gspo", dict(clip_eps_low=0.2, clip_eps_high=0.2)), ("sapo", "token", "sapo", {})])
def test_policy_losses_against_liger(loss_type, level, name, options):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    new, old, rollout, reference, advantages, mask = rollouts()
    theirs, _ = liger.ppo_loss_fn(new, mask.float(), advantages, mask.float(), reference, old, beta=0.05, loss_type=loss_type, max_completion_length=9,
                                  importance_sampling_level=level)
    reduction = {"reduction": "sequence"} if loss_type in ("grpo", "sapo") else options
    ours = total_of(losses.OBJECTIVES[name].loss(new, old, advantages[:, None].expand(4, 9), mask, **options), mask)
    assert_same(ours + 0.05 * total_of(losses.kl(new, reference, mask, **reduction), mask), theirs, [new])


# ---------------------------------------------------------------------------------------------------------------------
# OpenRLHF: OPENRLHF_LOSS names its openrlhf/models/loss.py; KTO, KD and PRM are in versions before it removed them


@pytest.fixture(scope="module")
def openrlhf():
    path = os.environ.get("OPENRLHF_LOSS", "")
    if not path:
        pytest.skip("OPENRLHF_LOSS names no openrlhf/models/loss.py")
    module = types.ModuleType("openrlhf_loss")
    module.masked_mean = lambda x, mask, dim=None: (x * mask).sum(dim) / mask.sum(dim)
    source = open(path).read().replace("from .utils import masked_mean", "")
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def of(module, name):
    if not hasattr(module, name):
        pytest.skip(f"this version has no {name}")
    return getattr(module, name)


@pytest.mark.parametrize("ours, options, theirs", [("dpo", dict(beta=0.1), dict(beta=0.1)), ("dpo", dict(beta=0.1, label_smoothing=0.2), dict(beta=0.1, label_smoothing=0.2)),
                                                   ("ipo", dict(beta=0.1), dict(beta=0.1, ipo=True))])
def test_dpo_ipo_cdpo_against_openrlhf(openrlhf, ours, options, theirs):
    inputs = pairs()
    o = losses.OBJECTIVES[ours]
    found = mean(o.loss, *inputs, *[None] * (len(o.reads) - 4), **options)
    assert_same(found, openrlhf.DPOLoss(**theirs)(*inputs)[0], inputs[:2])


def test_kto_against_openrlhf(openrlhf):
    inputs = pairs()
    found = mean(losses.kto_vanilla, *inputs, beta=0.1, detach_kl=False)
    assert_same(found, of(openrlhf, "VanillaKTOLoss")(0.1)(*inputs)[0], inputs[:2])
    pc, pr, rc, rr = inputs
    kl, reference_kl = pairs(seed=3)[2:]
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    theirs = openrlhf.KTOLoss(0.1, 1.3, 0.8, 1, torch.device("cpu"))(pc, pr, kl, rc, rr, reference_kl)[0]
    torch.distributed.destroy_process_group()
    assert_same(mean(losses.kto, pc, pr, kl, rc, rr, reference_kl, beta=0.1, desirable_weight=1.3, undesirable_weight=0.8), theirs, [pc, pr])


def test_reward_losses_against_openrlhf(openrlhf):
    c, r, margin = (x.detach() + 30 for x in pairs()[:3])
    c, r = c.requires_grad_(True), r.requires_grad_(True)
    assert_same(mean(losses.rm, c, r, margin), openrlhf.PairWiseLoss()(c, r, margin), [c, r])
    assert_same(mean(losses.rm_logexp, c, r), openrlhf.LogExpLoss()(c, r), [c, r])


def test_where_openrlhf_logexp_overflows_and_drops_its_margin(openrlhf):
    c, r, margin = torch.tensor([-60.0]), torch.tensor([60.0]), torch.ones(1)
    assert openrlhf.LogExpLoss()(c, r).isinf() and losses.rm_logexp(c, r)[0].item() == 120
    assert openrlhf.LogExpLoss()(c / 60, r / 60, margin) == openrlhf.LogExpLoss()(c / 60, r / 60)
    assert losses.rm_logexp(c / 60, r / 60, margin)[0] > losses.rm_logexp(c / 60, r / 60)[0]


def test_language_model_losses_against_openrlhf(openrlhf):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 7, 13, generator=generator).requires_grad_(True) for _ in range(2))
    labels = torch.randint(13, (2, 7), generator=generator)
    labels[0, :3] = -100
    assert_same(mean(losses.lm, logits, losses.next_label(labels)), openrlhf.GPTLMLoss()(logits, labels), [logits])
    label = losses.next_label(labels)  # it masks with the labels as they are given: here the right ones are given
    theirs = of(openrlhf, "KDLoss")()(logits, teacher.detach(), label)
    assert_same(mean(losses.kd, logits, teacher.detach(), label, alpha=1.0), theirs, [logits])
    as_they_come = openrlhf.KDLoss()(logits, teacher.detach(), labels)  # of logits that predict the next token
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0].abs().sum(-1) > 0 for x in (theirs, as_they_come)]
    assert grads[0][0].tolist() == [False, False, True, True, True, True, False]  # from the last prompt token on
    assert grads[1][0].tolist() == [False, False, False, True, True, True, True]  # without the first response token


@pytest.mark.parametrize("soft", [False, True])
def test_process_rewards_against_openrlhf(openrlhf, soft):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.tensor([[1, 9, 2, 9], [9, 3, 4, 9]])
    logits = torch.randn(2, 4, 13, generator=generator).requires_grad_(True)
    label = torch.tensor([0.9, 0.0, 0.3, 1.0]) if soft else torch.tensor([1.0, 0.0, 0.0, 1.0])
    given = torch.zeros(2, 4)
    given[inputs == 9] = label
    if not soft:
        given = torch.where(inputs == 9, torch.where(given > 0.5, 5, 6), -100)
    theirs, accuracy = of(openrlhf, "PRMLoss")(9, [5, 6])(inputs, logits, given, return_acc=True)  # 5: good, 6: bad
    values, mask, metrics = losses.prm(logits[inputs == 9][:, [6, 5]], label, torch.ones(4, dtype=torch.bool))
    assert_same(values.sum() / 4, theirs, [logits])
    assert ratio(*losses.reduced(*metrics["accuracy"])) == accuracy


@pytest.mark.parametrize("options, theirs", [
    ({}, {}), (dict(clip_eps_low=0.1, clip_eps_high=0.3), dict(clip_eps_low=0.1, clip_eps_high=0.3)), (dict(dual_clip=1.5), dict(dual_clip=1.5)),
    (dict(reduction="sequence"), dict(token_level_loss=False)),
    *((dict(correction=c, correction_low=0.8, correction_high=1.3), dict(enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.8, 1.3], vllm_is_correction_type=c))
      for c in ("tis", "icepop", "seq-mask-tis"))])
def test_policy_loss_against_openrlhf(openrlhf, options, theirs):
    of(openrlhf, "aggregate_loss")  # the version that has these options
    new, old, rollout, reference, advantages, mask = rollouts()
    table = advantages[:, None].expand(4, 9)
    values, counted, metrics = losses.ppo(new, old, table, mask, rollout, **options)
    expected, clip_ratio, ppo_kl, rollout_kl = openrlhf.PolicyLoss(**theirs)(new, old, table, mask, rollout)
    assert_same(total_of((values, counted, metrics), mask), expected, [new])
    assert_same(ratio(*losses.reduced(*metrics["policy/clip_fraction"])), clip_ratio)
    assert_same(ratio(*losses.reduced(*metrics["policy/approx_kl"])), ppo_kl)
    assert rollout_kl is None or abs(ratio(*losses.reduced(*metrics["policy/rollout_kl"])) - rollout_kl) < 1e-5


def test_gspo_and_value_against_openrlhf(openrlhf):
    of(openrlhf, "aggregate_loss")
    new, old, rollout, reference, advantages, mask = rollouts()
    table = advantages[:, None].expand(4, 9)
    theirs = openrlhf.PolicyLoss(policy_loss_type="gspo", clip_eps_low=0.1, clip_eps_high=0.1)(new, old, table, mask)[0]
    assert_same(total_of(losses.gspo(new, old, table, mask, clip_eps_low=0.1, clip_eps_high=0.1), mask), theirs, [new])
    for clip in (None, 0.2):
        theirs = openrlhf.ValueLoss(clip_eps=clip)(new, old, rollout, mask)
        theirs = theirs if theirs.dim() == 0 else theirs[0]
        assert_same(total_of(losses.value(new, old, rollout, mask, value_clip=clip or 0.0), mask), theirs, [new])
