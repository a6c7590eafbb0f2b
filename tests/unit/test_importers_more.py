"""The smaller formats: each in its official layout, loaded back, and damaged."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import (
    write_csv,
    write_gqa,
    write_karpathy,
    write_lines,
    write_nlvr2,
    write_picture,
    write_snli_ve,
    write_vqav2,
)
from PIL import Image

from benchmarks.tasks import answer_accuracy
from cvlm.cli.main import main
from cvlm.config import ShardsData
from cvlm.data import Splits, load_data
from cvlm.data.importers import ImportOptions
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.shard_index import FolderIndex
from cvlm.errors import CvlmError


def imported(data_format: str, src: Path, out: Path, **options: Any) -> tuple[FolderIndex, Splits]:
    settings = ImportSettings(source=ImportOptions(**{"skip": 0, **options}), workers=1, min_count=1)
    index = import_data(data_format, src, out, settings)
    return index, load_data(ShardsData(kind="shards", path=out), index.task)


def test_okvqa_is_read_from_files_named_as_vqa_v1(tmp_path):
    index, splits = imported("okvqa", write_vqav2(tmp_path / "src", prefix=""), tmp_path / "out")
    assert (index.name, index.rule, len(splits.train), len(splits.test.references)) == ("OK-VQA", "vqa", 12, 12)
    with pytest.raises(CvlmError, match="has no OpenEnded_mscoco_train2014_questions"):
        imported("okvqa", write_vqav2(tmp_path / "v2"), tmp_path / "out2")


def test_gqa_compares_exactly_and_scores_on_testdev(tmp_path):
    index, splits = imported("gqa", write_gqa(tmp_path / "src"), tmp_path / "out")
    assert (index.rule, index.answers, splits.test.split, splits.test.references) == (
        "exact",
        ("left", "no"),
        "testdev",
        (),
    )
    assert {split: shards[0].samples for split, shards in index.splits.items()} == {"train": 4, "val": 4, "testdev": 4}
    assert answer_accuracy(splits.test, np.array([1, 0] * 4)).mean() == 1
    assert answer_accuracy(splits.test, np.array([1, 1] * 4)).mean() == 0.5


def test_nlvr2_puts_two_pictures_side_by_side(tmp_path):
    index, splits = imported("nlvr2", write_nlvr2(tmp_path / "src"), tmp_path / "out")
    assert index.answers == ("true", "false")
    train = splits.train
    assert (len(train), len(train.pictures), splits.test.split) == (6, 6, "test")
    assert train.image_of.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    for side in (0, 1):
        file = tmp_path / "src" / "images" / "train" / "1" / f"train-11-0-img{side}.png"
        assert np.array_equal(np.asarray(train.pictures[2 + side].load()), np.asarray(Image.open(file)))
    assert train.ids[:2] == ("train-10-0-0", "train-10-0-1")
    assert train.labels[:2].tolist() == [0, 1]
    assert (len(set(train.texts)), len(train.texts)) == (2, 6), "one wording in three sets is three statements"


def test_snli_ve_has_three_answers(tmp_path):
    index, splits = imported("snli_ve", write_snli_ve(tmp_path / "src"), tmp_path / "out")
    assert index.answers == ("entailment", "neutral", "contradiction")
    assert (len(splits.train), len(splits.train.pictures)) == (12, 4)
    assert splits.train.texts == ("It is entailment.", "It is neutral.", "It is contradiction.")
    assert splits.train.labels.tolist() == [0, 1, 2] * 4


def test_csv_with_a_split_column(tmp_path):
    index, splits = imported("csv", write_csv(tmp_path / "src"), tmp_path / "out")
    assert (index.task, index.rule, index.answers) == ("vqa", "exact", ("blue", "red"))
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert splits.train.texts == ("what, then?",)


def test_columns_can_have_other_names(tmp_path, capsys):
    src = write_csv(tmp_path / "src", header="file;frage;antwort;teil".replace(";", ","))
    columns = ["image=file", "text=frage", "answer=antwort", "split=teil"]
    command = ["data", "import", "csv", str(src), str(tmp_path / "out"), "--min-count", "1", "--quiet", "--columns"]
    assert main([*command, *columns]) == 0
    assert "12" not in capsys.readouterr().err
    assert main([*command, "image=fiel", "text=frage"]) == 2
    assert "no column 'fiel' for 'image' (did you mean 'file'?)" in capsys.readouterr().err
    assert main([*command, "imag=file"]) == 2
    assert "no field 'imag' (did you mean 'image'?)" in capsys.readouterr().err
    assert main([*command, "image"]) == 2
    assert "must read FIELD=COLUMN" in capsys.readouterr().err


def test_jsonl_by_file_name_with_several_peoples_answers(tmp_path):
    for split in ("train", "test"):
        write_picture(tmp_path / "src" / "images" / f"{split}.png", 1 if split == "train" else 2)
        rows = [{"image": f"{split}.png", "question": f"q{n}?", "answers": ["x"] * 3 + ["y"] * n} for n in range(1, 5)]
        write_lines(tmp_path / "src" / f"{split}.jsonl", rows)
    index, splits = imported("jsonl", tmp_path / "src", tmp_path / "out")
    assert (index.rule, index.answers) == ("vqa", ("x", "y"))
    expected = np.array([[1, n / 3] for n in (1, 2, 3, 3)], dtype=np.float32)
    assert np.array_equal(splits.test.labels[np.arange(4)], expected)


def test_a_table_without_splits_is_split_by_picture(tmp_path):
    rows = []
    for number in range(60):
        write_picture(tmp_path / "src" / f"{number}.png", number)
        rows += [{"image": f"{number}.png", "caption": f"caption {number} {side}"} for side in "ab"]
    write_lines(tmp_path / "src" / "captions.jsonl", rows)
    index, splits = imported("jsonl", tmp_path / "src", tmp_path / "out")
    assert index.task == "retrieval"
    sizes = {split: sum(shard.samples for shard in shards) for split, shards in index.splits.items()}
    assert sum(sizes.values()) == 60
    assert sizes["train"] > 35
    assert min(sizes.values()) > 1
    assert len(splits.train) == 2 * sizes["train"], "both captions stay with their picture"


def test_a_folder_of_pictures_with_captions(tmp_path):
    _, splits = imported("folder", write_folder(tmp_path / "src"), tmp_path / "out")
    assert (len(splits.train), splits.test.texts[:2]) == (6, ("test 0", "another of it"))
    (tmp_path / "src" / "train" / "0.txt").unlink()
    with pytest.raises(CvlmError, match=r"1 of 6 rows are damaged, 0 may be(?s:.*)cannot read"):
        imported("folder", tmp_path / "src", tmp_path / "out2")


@pytest.mark.slow
def test_package_data_imports(tmp_path):
    index, splits = imported("openmoji", tmp_path, tmp_path / "moji")
    assert (index.task, splits.train.pictures[0].load().size) == ("retrieval", (128, 128))
    index, splits = imported("easy_vqa", tmp_path, tmp_path / "easy")
    assert (len(splits.train), len(splits.test), len(index.answers)) == (38_575, 9_673, 13)


def write_folder(folder: Path) -> Path:
    for split in ("train", "test"):
        for number in range(3):
            path = write_picture(folder / split / f"{number}.jpg", number)
            path.with_suffix(".txt").write_text(f"{split} {number}\n\nanother of it\n")
    return folder


def write_jsonl(folder: Path) -> Path:
    for split in ("train", "test"):
        write_picture(folder / "images" / f"{split}.png", 1)
        rows = [{"image": f"{split}.png", "question": f"q{n}?", "answers": ["x"] * 3 + ["y"] * n} for n in range(4)]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "gqa": write_gqa,
    "nlvr2": write_nlvr2,
    "snli_ve": write_snli_ve,
    "csv": write_csv,
    "folder": write_folder,
    "jsonl": write_jsonl,
    "karpathy": write_karpathy,
}


@pytest.mark.parametrize("data_format", MAKERS)
def test_damaged_bytes_are_refused_or_skipped(tmp_path, data_format):
    """Tables and pictures alike; what was imported decodes, or says that it does not."""
    src = MAKERS[data_format](tmp_path / "src")
    files = sorted(path for path in src.rglob("*") if path.is_file())
    tables = [path for path in files if path.suffix in (".json", ".jsonl", ".csv", ".txt")]
    for seed in range(40):
        dice = random.Random(seed)
        path = dice.choice(tables if seed % 4 else files)
        good = path.read_bytes()
        data = bytearray(good)
        for _ in range(dice.choice([1, 3, 30])):
            data[dice.randrange(len(data))] = dice.choice([*b'"\\{}[]:,\n\0', dice.randrange(256)])
        path.write_bytes(data if dice.random() < 0.7 else data[: dice.randrange(len(data))])
        with suppress(CvlmError):
            _, splits = imported(data_format, src, tmp_path / f"out{seed}", skip=0.5)
            for picture in (*splits.train.pictures, *splits.test.pictures):
                with suppress(CvlmError):
                    picture.load()
        path.write_bytes(good)


@pytest.mark.parametrize("value", [None, 7, [], {}, "", "x" * 20_000, "\ud800", True, -1, "../x", {"a": []}])
@pytest.mark.parametrize("key", ["image", "text", "answer", "answers", "split", "id", "type"])
def test_any_value_in_any_field_of_a_table(tmp_path, key, value):
    write_picture(tmp_path / "src" / "0.png", 0)
    row = {"image": "0.png", "text": "what?", "answer": "yes"}
    rows = [{**row, "split": s, "answer": a} for s in ("train", "test") for a in ("yes", "no")]
    write_lines(tmp_path / "src" / "t.jsonl", [*rows, {**row, key: value}])
    with suppress(CvlmError):
        imported("jsonl", tmp_path / "src", tmp_path / "out", skip=0.2)
