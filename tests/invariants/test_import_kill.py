"""An import that is killed at random moments, workers and all, ends in the bytes of one that was not."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import write_vqav2
from killing import kill_after

# 400 pictures per split, 16 per shard.
SHARDS = 2 * 25
# What the command line does, without the seconds that it takes to load torch for the other commands.
IMPORT = """
import sys
from pathlib import Path
from cvlm.data.importing import ImportSettings, import_data
print("ready", flush=True)
settings = ImportSettings(workers=2, shard_samples=16)
import_data("vqav2", Path(sys.argv[1]), Path(sys.argv[2]), settings)
"""


def start(src: Path, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IMPORT, str(src), str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(src: Path, out: Path) -> None:
    process = start(src, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def shards(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_imports_end_in_the_same_bytes(tmp_path, kills):
    src = write_vqav2(tmp_path / "src", pictures=400)
    finish(src, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert len(expected) == 2 * SHARDS + 1
    dice = random.Random(kills)
    out, killed, in_the_middle = tmp_path / "killed", 0, 0
    while killed < kills:
        more, pause = dice.randint(0, 9), dice.uniform(0, 0.02)
        killed += kill_after(start(src, out), lambda: shards(out), more, pause)
        found = content(out) if out.exists() else {}
        in_the_middle += 0 < shards(out) < SHARDS
        # What stands under its final name is final, however early the kill came.
        for name, data in found.items():
            assert name.startswith(".") or data == expected[name], name
        if "index.json" in found and killed < kills:
            shutil.rmtree(out)
    assert in_the_middle > 0
    finish(src, out)
    assert content(out) == expected
