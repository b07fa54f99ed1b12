"""What the tests share: the repo on the path, real models where they are, tiny ones and their tokenizers made here."""
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side have a core each
    os.environ["OMP_NUM_THREADS"] = "1"
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"
STORIES, SMOLLM2 = SHARED / "models" / "stories260K-hf", os.environ.get("SMOLLM2", "")

import data  # noqa: E402
import model  # noqa: E402
from parts import tokens  # noqa: E402

TINY = {
    "llama": dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=False,
                  rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                    original_max_position_embeddings=64)),
    "mistral": dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=256, sliding_window=7, tie_word_embeddings=False),
    "qwen2": dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, use_sliding_window=True, sliding_window=9,
                  max_window_layers=1, tie_word_embeddings=True),
    "qwen3": dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True),
    "gpt2": dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256),
}


def tiny(family: str = "llama", dtype=torch.float32, heads: dict = model.LANGUAGE, **changes) -> model.Decoder:
    """A scratch model whose weights are large enough that attention and positions matter."""
    decoder = model.scratch({"model_type": family, **TINY[family], **changes}, 0, heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.15 if p.dim() > 1 else 0.05))
    return decoder.to(dtype)


def random_trees(rng, count: int, vocab: int, longest: int = 30, responses: tuple = (1, 4), holes: bool = True) -> list:
    """Examples of a random prompt with 1 to 4 random responses, some tokens of which are not scored."""
    examples = []
    for i in range(count):
        ids = [rng.integers(0, vocab, rng.integers(1, longest)).astype(np.int32) for _ in range(1 + rng.integers(*responses, endpoint=True))]
        scored = [np.ones(len(r), bool) if not holes else rng.random(len(r)) < 0.8 for r in ids[1:]]
        for mask in scored:
            mask[rng.integers(len(mask))] = True
        pairs = ([0], [1], [0.0]) if len(ids) > 2 else ([], [], [])
        examples.append(data.Example(ids[0], ids[1:], scored, [True] + [False] * (len(ids) - 2), *pairs, f"random:{i}"))
    return examples


def as_dataset(examples: list) -> data.Dataset:
    return data.as_dataset(examples, {})


def layout(tokens: int, static: bool = False) -> data.Layout:
    return data.Layout(tokens, False, static, "cpu")


@pytest.fixture(scope="module", autouse=True)
def old_objects():
    """What earlier modules left, graphs of inductor above all, is not searched again for garbage in every run of this one."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


WORDS = ("Once upon a time there was a little girl named Lily. She was so happy and she liked to play outside in the park with her "
         "mom. One day, Tom said yes and no to the big sky: it is blue, it is red, be brief. Add the numbers and answer the question. "
         "system user assistant You are a helpful AI assistant named SmolLM, trained by Hugging Face ") * 3
CHAT_TEMPLATE = (  # ChatML, which begins with a system's message of its own where there is none, as SmolLM2's does
    "{% if messages and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\\n' }}{% endif %}" + tokens.CHATML)


def tokenizer_folder(folder: Path, fast: tokenizers.Tokenizer, **described) -> Path:
    fast.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **described}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Path:
    """The folder of a small tokenizer for chats, in the manner of SmolLM2-Instruct: BPE on bytes, digits one by one, no BOS."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast.train_from_iterator([WORDS], trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer_folder(tmp_path_factory.mktemp("chat"), fast, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
                            unk_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> Path:
    """The folder of a small tokenizer in the manner of SentencePiece: a space is a part of the word after it, one stands before the
    text, other characters are bytes; BOS is added."""
    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.train_from_iterator(WORDS.split(" "), trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False))
    described = json.loads(fast.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    fast = tokenizers.Tokenizer.from_str(json.dumps(described))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer_folder(tmp_path_factory.mktemp("pieces"), fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True,
                            add_eos_token=False)


def tiny_folder(folder: Path, tokenizer: Path) -> Path:
    """A tiny Llama in a folder, as large as the vocabulary of a tokenizer, which is saved with it."""
    decoder = tiny(vocab_size=data.Tokenizer(tokenizer).fast.get_vocab_size(), max_position_embeddings=1024)
    model.save(decoder, folder, torch.float32, tokenizer)
    return folder


@pytest.fixture(scope="session")
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not here")
    return STORIES


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct; SMOLLM2 names its folder."""
    if not SMOLLM2:
        pytest.skip("SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    return Path(SMOLLM2)


@pytest.fixture(params=["chat", *["smollm2"] * bool(SMOLLM2)])
def each_chat(request) -> Path:
    """The tokenizer for chats that is made here, then the real one, where it is."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["pieces", *["stories"] * STORIES.is_dir()])
def each_pieces(request) -> Path:
    """The tokenizer of pieces that is made here, then a real one, where it is."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def real() -> Path:
    folder = SHARED / "real"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
