"""bench.py's commands, at sizes that take seconds: `python -m pytest tests/test_bench.py -m slow`. What they measure is in README."""
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("command, rows", [
    ("losses --only=dpo,kto", 2), ("head --vocab=500 --tokens=256", 12), ("generate --model={stories} --only='4 x 8'", 4),
    ("dpo --model={stories} --pairs=2", 27), ("start", 7)])
def test_a_table_is_printed(command, rows, stories):
    words = shlex.split(command.format(stories=stories))
    done = subprocess.run([sys.executable, "bench.py", *words, "--rounds=1", "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if re.search(r"\| [\d,.]+ \|", line)]
    assert len(table) >= rows, done.stdout
