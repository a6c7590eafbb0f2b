"""`cvlm data inspect` and `verify`: what they say of sound data, and what they find in data that is not."""

import json
import os
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from data_files import write_karpathy, write_picture, write_vqav2
from PIL import Image

from cvlm.cli.main import main
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.inspecting import contact_sheet, summarise
from cvlm.data.shard_index import read_folder_index, write_folder_index
from cvlm.data.verifying import verify


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    import_data("vqav2", write_vqav2(tmp_path / "src"), tmp_path / "out", ImportSettings(workers=1, min_count=1))
    return tmp_path / "out"


def test_import_says_what_it_wrote_and_how_to_use_it(tmp_path, capsys):
    src = write_vqav2(tmp_path / "src")
    assert main(["data", "import", "vqav2", str(src), str(tmp_path / "out"), "--min-count", "1", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "train       1        6         12" in said
    assert "Answer vocabulary: 3 answers, each 1+ times in train" in said
    assert f"data: {{kind: shards, path: {tmp_path / 'out'}}}" in said


def test_import_refuses_without_a_traceback(tmp_path, capsys):
    assert main(["data", "import", "vqav3", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "unknown data format 'vqav3' (did you mean 'vqav2'?)" in capsys.readouterr().err
    assert main(["data", "import", "vqav2", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "v2_OpenEnded_mscoco_train2014_questions.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_prints_and_draws(vqa, capsys):
    assert main(["data", "inspect", str(vqa)]) == 0
    said = capsys.readouterr().out
    for line in ("Question types (2)", "what color  50.0%  50.0%", "licence: CC BY 4.0", "contact-sheet.png"):
        assert line in said
    with Image.open(vqa / "contact-sheet.png") as sheet:
        assert sheet.size == (800, 864)
    assert main(["data", "verify", str(vqa), "--quiet"]) == 0, "the sheet is no part of the data"


def test_summary_by_hand(vqa):
    train = summarise(vqa)[0]
    assert (train.split, train.per_picture, train.words) == ("train", 2.0, (4, 4, 4, 4))
    assert train.types == {"what color": 6, "how many": 6}
    assert train.answers == {"2": 6, "blue": 3, "red": 3}


def test_the_sheet_of_few_pictures_shows_each_once(vqa):
    pixels = np.asarray(contact_sheet(vqa))
    tiles = [pixels[216 * (n // 5) : 216 * (n // 5) + 160, 160 * (n % 5) :][:, :160] for n in range(20)]
    assert sum(tile.min() < 250 for tile in tiles) == 12


def test_verify_finds_pictures_in_two_splits(tmp_path, capsys):
    src = write_karpathy(tmp_path / "src", pictures=8)
    # 3 is a test picture, 2 a val picture: the one becomes the very file of train's 0, the other a small copy of 1.
    (src / "images" / "3.jpg").write_bytes((src / "images" / "0.jpg").read_bytes())
    write_picture(src / "images" / "2.jpg", seed=1, size=(60, 48))
    import_data("karpathy", src, tmp_path / "out", ImportSettings(workers=1))
    found = {overlap.splits: overlap for overlap in verify(tmp_path / "out").overlaps}
    assert (found["train", "test"].files, found["train", "test"].looks) == (1, 1)
    assert found["train", "test"].examples == (("0", "3"),)
    assert (found["train", "val"].files, found["train", "val"].looks) == (0, 1)
    assert all(overlap.ids == 0 for overlap in found.values())
    assert main(["data", "verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert "alike: train 0, test 3" in capsys.readouterr().out


def test_verify_names_a_changed_byte(vqa, capsys):
    path = vqa / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.unlink()
    path.write_bytes(data)
    assert main(["data", "verify", str(vqa), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "val-000000.tar: the checksum does not fit" in said
    assert "COCO_val2014_000000000501" in said


@pytest.mark.parametrize("kind", ["symbolic link", "climbing name"])
def test_verify_refuses_hostile_archives_even_with_fitting_checksums(vqa, kind):
    path = vqa / "train-000000.tar"
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("k.jpg" if kind == "symbolic link" else "../../evil.jpg")
        if kind == "symbolic link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    index = read_folder_index(vqa)
    raw = json.loads((vqa / "train-000000.json").read_text())
    raw |= {"bytes": os.path.getsize(path), "sha256": sha256(path.read_bytes()).hexdigest()}
    (vqa / "train-000000.json").write_text(json.dumps(raw))
    fitting = {"sha256": raw["sha256"], "index_sha256": sha256((vqa / "train-000000.json").read_bytes()).hexdigest()}
    entry = index.splits["train"][0].model_copy(update=fitting)
    write_folder_index(vqa, index.model_copy(update={"splits": {**index.splits, "train": (entry,)}}))
    (problem,) = verify(vqa).problems
    assert ("is a link" if kind == "symbolic link" else "leaves its folder") in problem
