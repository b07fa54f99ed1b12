"""Files -> rows: parquet, Arrow, folders of `save_to_disk`, data sets of the hub; and several files with weights."""
import datetime
import decimal
import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import config
import data
import train
from conftest import ROOT, as_dataset, random_trees
from launch import run
from parts import rows as files
from test_train import assert_close, lines, options, weights

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

ARITHMETIC = ROOT / "tasks/arithmetic"
ROWS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "9", "margin": 0.5 * i, "score": None, "ids": [i, None],
         "meta": {"source": "a", "turns": [{"role": "user", "content": "\u00e9"}]}} for i in range(3)]


def write_parquet(path, rows: list, **options) -> str:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def write_arrow(path, rows: list, kind: str = "stream") -> str:
    """As datasets' `save_to_disk` writes (stream), or Feather (file)."""
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return str(path)


def write_jsonl(path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_to_disk(folder, rows: list) -> str:
    folder.mkdir(parents=True)
    write_arrow(folder / "data-00000-of-00002.arrow", rows[:2])
    write_arrow(folder / "data-00001-of-00002.arrow", rows[2:])
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def read(paths) -> list:
    return [json.loads(row) if isinstance(row, bytes) else row for _, row in data.read_rows(paths)]


def load(paths, kind: str = "preference", **given):
    return data.load(paths, kind, data.Tokenizer(ARITHMETIC), config.load([f"--{key}={value}" for key, value in given.items()]), False)


# ---------------------------------------------------------------------------------------------------------------------
# Parquet and Arrow


@pytest.mark.parametrize("write", [
    lambda path: write_parquet(path / "a.parquet", ROWS),
    lambda path: write_parquet(path / "a.parquet", ROWS, row_group_size=1, compression="zstd"),
    lambda path: write_arrow(path / "a.arrow", ROWS),
    lambda path: write_arrow(path / "a.arrow", ROWS, "file"),
    lambda path: save_to_disk(path / "saved", ROWS)], ids=["parquet", "row groups", "stream", "file", "save_to_disk"])
def test_the_same_rows_as_from_jsonl(write, tmp_path):
    file = write(tmp_path)
    assert read(file) == read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == ROWS
    here, there = load(file).examples, load(str(tmp_path / "a.jsonl")).examples
    assert [e.prompt.tolist() for e in here] == [e.prompt.tolist() for e in there]
    assert [e.margin for e in here] == [e.margin for e in there] == [[0.0], [0.5], [1.0]]
    assert here[1].where.endswith(("a.parquet[1]", "a.arrow[1]", "data-00000-of-00002.arrow[1]"))


def test_globs_of_folders_and_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", ROWS)
    save_to_disk(tmp_path / "c", ROWS)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert read(f"{tmp_path}/*") == ROWS * 3


def test_a_split_of_a_saved_dict_is_named(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        save_to_disk(tmp_path / "saved" / split, ROWS)
    saved = f"{tmp_path}/saved"
    assert read(f"{saved}/test") == ROWS
    with pytest.raises(ValueError, match=re.escape(f"{saved} has several splits; name one of them: {saved}/train, {saved}/test")):
        read(saved)
    with pytest.raises(ValueError, match=re.escape(f"{saved}/dev: no such file; did you mean {saved}/train or {saved}/test?")):
        read(f"{saved}/dev")
    os.remove(f"{saved}/test/data-00001-of-00002.arrow")
    with pytest.raises(ValueError, match="data-00001-of-00002.arrow: no such file, and .*state.json names it"):
        read(f"{saved}/test")


def test_what_json_has_no_type_for(tmp_path):
    """A prompt's row goes to the reward as JSON would have it."""
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    row = {"prompt": b"1+1=", "at": day, "day": day.date(), "price": decimal.Decimal("1.50"), "deep": [{"at": day}],
           "counts": [("a", 1)]}
    schema = pa.schema([("prompt", pa.binary()), ("at", pa.timestamp("us")), ("day", pa.date32()), ("price", pa.decimal128(5, 2)),
                        ("deep", pa.list_(pa.struct([("at", pa.timestamp("us"))]))), ("counts", pa.map_(pa.string(), pa.int64()))])
    pa.parquet.write_table(pa.Table.from_pylist([row], schema), tmp_path / "a.parquet")
    text = "2024-05-06 07:08:09"
    expected = {"prompt": "1+1=", "at": text, "day": text[:10], "price": "1.50", "deep": [{"at": text}], "counts": {"a": 1}}
    assert read(str(tmp_path / "a.parquet")) == [expected]
    assert load(str(tmp_path / "a.parquet"), "prompts").examples[0].row == expected


def test_a_file_is_read_piece_by_piece(tmp_path):
    """The first row is there when little of the file has been decoded."""
    rows = [{"text": "x" * 1000} for _ in range(20000)]
    for file in (write_parquet(tmp_path / "a.parquet", rows, row_group_size=1000, compression="none", use_dictionary=False),
                 write_arrow(tmp_path / "a.arrow", rows)):
        before = pa.total_allocated_bytes()
        stream = data.read_rows(file)
        assert next(stream)[1] == rows[0] and pa.total_allocated_bytes() - before < 4e6 < os.path.getsize(file) / 4
        assert sum(1 for _ in stream) == len(rows) - 1


def test_the_bar_ends_at_the_size_of_the_files(tmp_path):
    class Bar:
        n = 0

        def update(self, n):
            self.n += n
    for read_file, file in ((files.arrow_rows, write_parquet(tmp_path / "a.parquet", ROWS * 1000)),
                            (files.arrow_rows, write_arrow(tmp_path / "a.arrow", ROWS))):
        bar = Bar()
        assert len(list(read_file(file, bar))) in (3, 3000) and 0 <= os.path.getsize(file) - bar.n < 16


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_row_is_named(kind, tmp_path):
    file = {"parquet": write_parquet, "arrow": write_arrow}[kind](tmp_path / f"a.{kind}", [*ROWS, {"prompt": "1"}])
    with pytest.raises(ValueError, match=re.escape(f"{file}[3]: ")):
        load(file)
    assert load(file, bad_rows="skip").counts["bad"] == 1


def test_without_pyarrow(tmp_path):
    """JSONL needs nothing but Python; a parquet file says what to install."""
    code = ("import sys, importlib.util; find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name: None if name == 'pyarrow' else find(name)\n"
            "from parts.rows import read_rows\n"
            "print(len(list(read_rows(sys.argv[1]))), 'pyarrow' in sys.modules)\n"
            "try:\n    next(read_rows(sys.argv[2]))\nexcept ValueError as error:\n    print(error)")
    names = write_jsonl(tmp_path / "a.jsonl", ROWS), write_parquet(tmp_path / "a.parquet", ROWS)
    ended = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["3 False", f"{names[1]}: reading parquet needs pyarrow: pip install pyarrow"], ended.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Files that hold something else than their names say


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", b"PAR1\x15\x04\x15\xff", "holds parquet, and its name says JSON; rename it to end in .parquet"),
    ("a.json", b"ARROW1\0\0\xff\xff", "holds arrow, and its name says JSON; rename it to end in .arrow"),
    ("a.jsonl", b"\xff\xff\xff\xff\x10\0\0\0", "holds arrow, and its name says JSON; rename it to end in .arrow"),
    ("a.jsonl", gzip.compress(b"{}\n"), "holds gzip, and its name says JSON; rename it to end in .jsonl.gz"),
    ("a.jsonl.gz", gzip.compress(b"PAR1\x15\x04"), "holds parquet, and its name says JSON; rename"),
    ("a.jsonl.gz", b"PAR1\x15\x04", "holds parquet, and its name says JSON; rename"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\xff", "holds zstd, and its name says JSON; files are JSONL or JSON, .gz of either"),
    ("a.zip", b"PK\x03\x04\xff", "holds zip, and its name says JSON; files are"),
    ("a.pkl", b"\x80\x04\x95\x1a\0\0\0\xff", "holds binary data, and its name says JSON; files are"),
    ("a.parquet", b'{"text": "1"}\n', "holds JSON, and its name says parquet; files are"),
    ("a.arrow", b"PAR1\x15\x04", "holds parquet, and its name says arrow; rename"),
    ("a.parquet", b"", ""), ("a.parquet", b"PAR1" * 5, ""), ("a.arrow", b"ARROW1\0\0" + b"x" * 40, "")],
    ids=[str(i) for i in range(14)])
def test_a_file_that_is_no_json_is_called_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: {said}")) as error:
        load(str(tmp_path / name))
    assert "codec" not in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the hub


def snapshot(folder, names: list[str], readme: str = "") -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    if readme:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n")
    return str(folder)


LAYOUTS = {
    "shards in data/": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
                        {("", "train"): ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                         ("default", "test"): ["data/test-00000-of-00001.parquet"]}),
    "splits that begin alike": (["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"],
                                {("default", "train_prefs"): ["data/train_prefs-00000-of-00001.parquet"]}),
    "a folder for each config": (["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"],
                                 {("main", "train"): ["main/train-00000-of-00001.parquet"]}),
    "one config alone has the split": (["a/train.jsonl.gz", "b/test.jsonl.gz"], {("", "train"): ["a/train.jsonl.gz"]}),
    "files at the top": (["train.jsonl", "test.jsonl", "LICENSE"], {("", "train"): ["train.jsonl"], ("", "test"): ["test.jsonl"]}),
    "converted by the hub": (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
                             {("", "train"): ["default/train/0000.parquet", "default/train/0001.parquet"]})}


@pytest.mark.parametrize("names, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_files_of_a_split_by_layout(names, expected, tmp_path):
    folder = snapshot(tmp_path, names)
    for asked, chosen in expected.items():
        assert files.split_files(folder, *asked) == [f"{folder}/{name}" for name in chosen]


README = """configs:
- config_name: pairs
  data_files:
  - split: train
    path: raw/p-*.jsonl
  - split: dev
    path: [raw/d.jsonl, 'more/**/*.jsonl', https://elsewhere/x.jsonl]
- config_name: all
  default: true
  data_files: "raw/*.jsonl"
- config_name: deep
  data_dir: more
  data_files: [x/*.jsonl, /etc/*.jsonl]"""


def test_the_readme_decides_which_files_a_split_has(tmp_path):
    folder = snapshot(tmp_path, ["raw/p-1.jsonl", "raw/p-2.jsonl", "raw/d.jsonl", "more/x/e.jsonl", "raw/note.txt"], README)
    chosen = lambda *asked: [name.removeprefix(f"{folder}/") for name in files.split_files(folder, *asked)]
    assert chosen("pairs", "train") == ["raw/p-1.jsonl", "raw/p-2.jsonl"] and chosen("deep", "train") == ["more/x/e.jsonl"]
    assert chosen("pairs", "dev") == chosen("", "dev") == ["raw/d.jsonl", "more/x/e.jsonl"]
    assert chosen("", "train") == chosen("all", "train") == ["raw/d.jsonl", "raw/p-1.jsonl", "raw/p-2.jsonl"]


@pytest.mark.parametrize("names, readme, asked, said", [
    (["main/train.jsonl", "socratic/train.jsonl"], "", ("", "train"), "it has main/train, socratic/train"),
    (["test.jsonl"], "license: mit", ("", "train"), "it has default/test"), (["a.py", "a.csv"], "", ("", "train"), "it has nothing that can be read"),
    (["main/train.jsonl"], "", ("other", "train"), "expected one split as in org/name:config/split; it has main/train"),
    (["a.jsonl"], "configs: [", ("", "train"), "README.md: its list of configs cannot be read: "),
    (["a.jsonl"], "configs: [{data_files: a.jsonl}]", ("", "train"), "README.md: its list of configs cannot be read: 'config_name'")])
def test_a_choice_that_is_not_unique_lists_what_there_is(names, readme, asked, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        files.split_files(snapshot(tmp_path, names, readme), *asked)
    assert "\n" not in str(error.value)


def test_a_hub_name_without_a_network(tmp_path):
    """What the hub's own cache holds is read; else one line says that it is no file, and why it cannot be downloaded."""
    pytest.importorskip("huggingface_hub")
    home = tmp_path / "hub/datasets--own--pairs"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("abc")
    (home / "snapshots/abc/data").mkdir(parents=True)
    write_parquet(home / "snapshots/abc/data/train-00000-of-00001.parquet", ROWS)
    write_parquet(home / "snapshots/abc/data/test-00000-of-00001.parquet", ROWS[:1])
    code = ("import sys\nfrom parts.rows import read_rows\nfor name in sys.argv[1:]:\n"
            "    try:\n        print(len(list(read_rows(name))))\n    except ValueError as error:\n        print(error)")
    names = ["own/pairs", "own/pairs:default/test", "own/pairs:default/dev", "own/none", "own/none:train", "out/none", "own/none.jsonl"]
    ended = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    said = ended.stdout.splitlines()
    assert said[:2] == ["3", "1"], ended.stderr
    assert said[2] == "own/pairs:default/dev: expected one split as in org/name:config/split; it has default/test, default/train"
    assert said[3].startswith("own/none: not a local file, and cannot be downloaded from the hub: ") and len(said) == 7
    assert said[4] == "own/none:train: no such file; a split of a hub data set is named org/name:config/split"
    assert said[5:] == ["out/none: no such file", "own/none.jsonl: no such file"]


# ---------------------------------------------------------------------------------------------------------------------
# Several files with weights


def mixture(sizes: dict, shares: dict) -> data.Dataset:
    """A dataset of made-up trees, so many of each source."""
    sources = np.repeat(np.arange(len(sizes)), [*sizes.values()])
    examples = random_trees(np.random.default_rng(0), len(sources), 9)
    return data.as_dataset(examples, {}, sources=sources, shares={name: share / sum(shares.values()) for name, share in shares.items()})


@pytest.mark.parametrize("sizes, shares, batch_size", [
    ({"a": 100, "b": 100}, {"a": 0.7, "b": 0.3}, 10), ({"a": 7, "b": 500}, {"a": 0.5, "b": 0.5}, 8),
    ({"a": 50, "b": 90, "c": 31}, {"a": 5, "b": 2, "c": 1}, 16), ({"a": 64, "b": 3}, {"a": 0.9, "b": 0.1}, 1)])
def test_every_step_has_the_files_in_their_shares(sizes, shares, batch_size):
    """To within one row, in each step and in all steps together; a file's rows all come before one comes again."""
    dataset = mixture(sizes, shares)
    steps = data.steps_of(dataset, batch_size, 3)
    counts = np.zeros((200, len(sizes)), int)
    for step in range(200):
        rows = steps(step)
        assert np.array_equal(rows, data.step_rows(dataset, step, batch_size, 3))
        counts[step] = np.bincount(dataset.sources[rows], minlength=len(sizes))
    share = np.array([*dataset.shares.values()])
    assert np.abs(counts - counts.sum(1, keepdims=True) * share).max() <= (1 if len(sizes) == 2 else 1.5)
    epochs = 200 // data.steps_per_epoch(dataset, batch_size)
    of_epoch = np.array([data.rows_per_epoch(dataset)]) * epochs
    assert np.array_equal(counts[:epochs * data.steps_per_epoch(dataset, batch_size)].sum(0, keepdims=True), of_epoch)
    assert np.abs(np.array(data.rows_per_epoch(dataset)) - len(dataset) * share).max() < 1
    order = np.concatenate([data.epoch_order(dataset, epoch, 3) for epoch in range(4)])
    for source, count in enumerate(sizes.values()):
        mine = order[dataset.sources[order] == source]
        for begin in range(0, len(mine) - count + 1, count):
            assert len({*mine[begin:begin + count].tolist()}) == count
    assert not np.array_equal(data.epoch_order(dataset, 0, 3), data.epoch_order(dataset, 0, 4))


def test_without_weights_an_epoch_is_one_pass():
    """In the order that (seed, epoch) has always given."""
    dataset = as_dataset(random_trees(np.random.default_rng(0), 50, 9, responses=(2, 4)))
    for epoch in range(3):
        assert np.array_equal(data.epoch_order(dataset, epoch, 7), np.random.default_rng((7, epoch)).permutation(50))


def test_labels_are_interleaved_in_each_file(tmp_path):
    """A step of KTO has desirable and undesirable rows as each file has them."""
    rows = lambda every, count: [{"prompt": f"{i}=", "completion": "1", "label": i % every > 0} for i in range(count)]
    paths = {write_jsonl(tmp_path / "a.jsonl", rows(2, 40)): 0.5, write_jsonl(tmp_path / "b.jsonl", rows(10, 160)): 0.5}
    dataset = load(paths, "kto", objective="kto")
    assert [*dataset.shares.values()] == [0.5, 0.5] and np.bincount(dataset.sources).tolist() == [40, 160]
    for step in range(10):
        chosen = data.step_rows(dataset, step, 20, 0)
        first, second = (dataset.kinds[chosen[dataset.sources[chosen] == source]] for source in (0, 1))
        assert len(first) == len(second) == 10 and abs((first == 1).sum() - 5) <= 1 and abs((second == 1).sum() - 1) <= 1


def test_the_order_of_the_names_does_not_matter(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS * 3), write_parquet(tmp_path / "b.parquet", ROWS)
    one, other = load({a: 7, b: 3}), load({b: 0.3, a: 0.7})
    assert [e.where for e in one.examples] == [e.where for e in other.examples]
    assert data.step_rows(one, 1, 4, 0).tolist() == data.step_rows(other, 1, 4, 0).tolist()
    assert data.sources_said(one) == [f"  {a}: 70.0% of every step; 9 rows, an epoch has each 0.89 times",
                                      f"  {b}: 30.0% of every step; 3 rows, an epoch has each 1.3 times"]
    hashes = {config.hashed(config.settings(config.load([f"--train_data={paths}"]))) for paths in ({a: 0.7, b: 0.3}, {b: 0.3, a: 0.7})}
    assert len(hashes) == 1 and data.sources_said(load(a)) == []


def test_a_file_that_cannot_have_its_share_is_named(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ROWS)
    empty = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "1"}])
    with pytest.raises(ValueError, match="e.jsonl: no usable row is left, and its weight asks for 50.0% of every step"):
        load({a: 1, empty: 1}, bad_rows="skip")
    with pytest.raises(ValueError, match="b.jsonl: its weight is 0.001 of all, less than one of the 6 rows of an epoch"):
        load({a: 0.999, write_jsonl(tmp_path / "b.jsonl", ROWS): 0.001})


@pytest.mark.parametrize("given, said", [
    ({"a.jsonl": 0}, "train_data['a.jsonl'] = 0.0; expected a weight above 0"), ({"a.jsonl": -1.0}, "= -1.0; expected a weight above 0"),
    ({"a.jsonl": "1"}, "train_data['a.jsonl'] = '1' is a str; expected float"), ({3: 1.0}, "a name in train_data = 3 is a int; expected str")])
def test_weights_are_checked(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config.load([f"--train_data={given}"])


def test_names_with_weights_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert config.load(["--train_data={'~/a.jsonl': 7, 'b.jsonl': 3}"]).train_data == {"/home/me/a.jsonl": 7.0, "b.jsonl": 3.0}


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_rows_that_repeat_in_a_step_train_alike(name, tmp_path, monkeypatch):
    """With a cached or a live reference, on one rank or two."""
    monkeypatch.chdir(ROOT)
    rows = [json.loads(line) for line in open("tasks/arithmetic/pairs_eval.jsonl")]
    paths = {write_jsonl(tmp_path / "a.jsonl", rows[:5]): 1, write_parquet(tmp_path / "b.parquet", rows[5:125]): 1}
    given = dict(train_data=paths, max_steps=2)
    train.train(config.load(options(tmp_path, name, "one", **given)))
    assert "a.jsonl: 50.0% of every step; " in run(options(tmp_path, name, "two", cache_dir=tmp_path / "other", **given), ranks=2).stdout
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-12)
    assert_close(weights(tmp_path / "one/model"), weights(tmp_path / "two/model"), 1e-9)
    if name == "dpo":
        train.train(config.load(options(tmp_path, name, "live", reference_live=True, **given)))
        assert_close(weights(tmp_path / "one/model"), weights(tmp_path / "live/model"), 1e-9)


def test_rollouts_draw_prompts_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    prompts = [json.loads(line) for line in open("tasks/arithmetic/problems_eval.jsonl")]
    paths = {write_jsonl(tmp_path / "a.jsonl", prompts[:4]): 0.75, write_parquet(tmp_path / "b.parquet", prompts[4:40]): 0.25}
    (tmp_path / "seen.py").write_text("def reward(prompt, completion, row):\n"
                                      "    print('asked:', row['prompt'])\n    return len(completion)\n")
    given = options(tmp_path, "reinforce", train_data=paths, batch_size=8, max_steps=2)
    ended = run([o for o in given if not o.startswith("--config")] + [f"--config={tmp_path / 'seen.py'}"])
    asked = re.findall("asked: (.*)", ended.stdout)
    of_a = sum(prompt in [row["prompt"] for row in prompts[:4]] for prompt in asked)
    assert len(asked) == 2 * 8 * 3 and of_a == 2 * 6 * 3
