"""Hugging Face datasets: each layout on disk, columns of several kinds, and damage."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvlm.config import ShardsData
from cvlm.data import Splits, load_data
from cvlm.data.importers import ImportOptions, read_source
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.shard_index import FolderIndex
from cvlm.data.shards import ShardReader
from cvlm.errors import CvlmError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def columns(split: str, rows: int = 6) -> dict[str, list[Any]]:
    first = {"train": 0, "validation": 50, "test": 90}[split]
    return {
        "image": [{"bytes": encoded(first + i), "path": None} for i in range(rows)],
        "question": [f"what is it, {i}?" for i in range(rows)],
        "answer": [("cat", "dog")[i % 2] for i in range(rows)],
        "id": [f"{split}{i}" for i in range(rows)],
    }


def dataset(name: str, /, **changes: Any) -> Any:
    values = {field: column for field, column in {**columns(name), **changes}.items() if column is not None}
    return datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())


def dataset_dict(**changes: Any) -> Any:
    return datasets.DatasetDict({split: dataset(split, **changes) for split in ("train", "test")})


def imported(src: Path, out: Path, **options: Any) -> tuple[FolderIndex, Splits]:
    settings = ImportSettings(source=ImportOptions(**{"skip": 0, **options}), workers=1, min_count=1)
    index = import_data("hf_datasets", src, out, settings)
    return index, load_data(ShardsData(kind="shards", path=out), index.task)


def texts(folder: Path, split: str) -> list[dict[str, Any]]:
    reader = ShardReader(folder, split)
    return [text for i in range(len(reader)) for text in reader.record(i)["texts"]]


def stored(folder: Path, split: str) -> list[bytes]:
    reader = ShardReader(folder, split)
    shard = (folder / f"{split}-000000.tar").read_bytes()
    return [shard[offset:][:size] for sample in reader.samples for offset, size, _ in sample.pictures]


@pytest.mark.parametrize("layout", ["disk", "parquet", "arrow", "hub"])
def test_every_layout_gives_the_same_samples_and_the_stored_bytes(tmp_path, layout, monkeypatch):
    src, whole = tmp_path / "owner" / "name", dataset_dict()
    src.mkdir(parents=True)
    if layout == "disk":
        whole.save_to_disk(src)
    for split in whole if layout != "disk" else []:
        if layout == "arrow":
            whole[split].save_to_disk(tmp_path / split)
            next((tmp_path / split).glob("*.arrow")).rename(src / f"{split}.arrow")
        else:
            whole[split].to_parquet(src / f"{split}-00000-of-00001.parquet")
    # The library takes a name for a local folder where one has it, which stands in for the hub here.
    monkeypatch.chdir(tmp_path)
    index, splits = imported(Path("hf:owner/name") if layout == "hub" else src, tmp_path / "out")
    assert (index.task, index.rule, index.answers, index.evaluate) == ("vqa", "exact", ("cat", "dog"), "test")
    assert index.name == ("owner/name" if layout == "hub" else "name")
    assert (len(splits.train), splits.test.ids) == (6, tuple(f"test{i}" for i in range(6)))
    assert stored(tmp_path / "out", "train") == [encoded(i) for i in range(6)]
    assert index.sources
    assert imported(Path("hf:owner/name") if layout == "hub" else src, tmp_path / "out2")[0] == index
    two = ImportSettings(source=ImportOptions(skip=0), workers=2, min_count=1, shard_samples=2)
    shards = import_data("hf_datasets", src, tmp_path / "out3", two).splits["train"]
    assert [shard.samples for shard in shards] == [2, 2, 2]


def test_lists_of_captions_become_several_texts(tmp_path):
    captions = [[f"a {i}", f"the {i}"] for i in range(6)]
    dataset_dict(question=None, answer=None, caption=captions).save_to_disk(tmp_path / "d")
    index, splits = imported(tmp_path / "d", tmp_path / "out")
    assert (index.task, len(splits.train), len(splits.train.pictures)) == ("retrieval", 12, 6)
    assert splits.train.texts[:2] == ("a 0", "the 0")
    assert splits.train.ids[:2] == ("train0#0", "train0#1")


def test_answers_of_several_people_as_vqa_v2_has_them(tmp_path):
    said = [["x"] * 3 + ["y"] * 2, ["y"] * 4] * 3
    people = [[{"answer": answer, "answer_id": n} for n, answer in enumerate(row)] for row in said]
    same = [7, 7, 7, 8, 8, 9]
    dataset_dict(answer=None, answers=people, image_id=same).save_to_disk(tmp_path / "d")
    index, splits = imported(tmp_path / "d", tmp_path / "out")
    assert (index.rule, index.answers, len(splits.train.pictures)) == ("vqa", ("x", "y"), 3)
    assert splits.train.image_of.tolist() == [0, 0, 0, 1, 1, 2]
    assert texts(tmp_path / "out", "train")[0]["answers"] == ["x", "x", "x", "y", "y"]


def test_classes_become_their_names_and_columns_can_have_other_names(tmp_path):
    whole = dataset_dict(question=None, answer=None, frage=["was?"] * 6, label=[0, 1, 0, 1, 1, -1])
    whole = whole.cast_column("label", datasets.ClassLabel(names=["Katze", "Hund"]))
    whole = whole.rename_column("image", "bild")
    whole.save_to_disk(tmp_path / "d")
    settings = ImportSettings(source=ImportOptions(columns={"image": "bild", "text": "frage"}), workers=1, min_count=1)
    index = import_data("hf_datasets", tmp_path / "d", tmp_path / "out", settings)
    assert index.answers == ("Hund", "Katze")
    assert [text.get("answer") for text in texts(tmp_path / "out", "train")] == [
        "Katze", "Hund", "Katze", "Hund", "Hund", None,
    ]  # fmt: skip
    with pytest.raises(CvlmError, match=r"no column 'bid' for 'image' \(did you mean 'bild'\?\)"):
        imported(tmp_path / "d", tmp_path / "out2", columns={"image": "bid"})
    with pytest.raises(CvlmError, match="no field 'picture'"):
        imported(tmp_path / "d", tmp_path / "out2", columns={"picture": "bild"})
    with pytest.raises(CvlmError, match="no column 'image' for 'image'; there are"):
        imported(tmp_path / "d", tmp_path / "out2")


def test_one_dataset_without_a_split_is_split_by_picture_or_by_its_column(tmp_path):
    dataset("train", split=["train", "train", "train", "val", "test", "test"]).save_to_disk(tmp_path / "d")
    index, _ = imported(tmp_path / "d", tmp_path / "out")
    assert {split: shards[0].samples for split, shards in index.splits.items()} == {"train": 3, "val": 1, "test": 2}
    source = datasets.Dataset.from_dict(columns("train", 60)).cast_column("image", datasets.Image())
    source.save_to_disk(tmp_path / "big")
    settings = ImportSettings(workers=1, min_count=1)
    splits = import_data("hf_datasets", tmp_path / "big", tmp_path / "out2", settings).splits
    assert sum(shard.samples for shards in splits.values() for shard in shards) == 60
    assert splits["train"][0].samples > 35


def test_pictures_by_path_stay_inside_the_data_set(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded(0))
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "images" / "a.jpg").write_bytes(encoded(1))
    for name, path in {"inside": "a.jpg", "outside": "../secret.jpg", "absolute": str(tmp_path / "secret.jpg")}.items():
        (tmp_path / "d" / "train.parquet").unlink(missing_ok=True)
        rows = {"image": [{"bytes": None, "path": path}] * 2, "text": ["a", "b"], "split": ["train", "test"]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d" / "train.parquet")
        if name == "inside":
            imported(tmp_path / "d", tmp_path / "out")
            assert stored(tmp_path / "out", "test") == [encoded(1)]
        else:
            with pytest.raises(CvlmError, match="leaves its folder"):
                imported(tmp_path / "d", tmp_path / name)


def test_what_is_no_data_set_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CvlmError, match=r"holds neither what datasets\.save_to_disk writes"):
        read_source("hf_datasets", tmp_path, ImportOptions())
    with pytest.raises(CvlmError, match="does not exist"):
        read_source("hf_datasets", tmp_path / "x", ImportOptions())
    with pytest.raises(CvlmError, match="does not exist"):
        read_source("csv", Path("hf:owner/name"), ImportOptions())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CvlmError, match=r"pip install 'cvlm\[hf\]'"):
        read_source("hf_datasets", tmp_path, ImportOptions())


DAMAGE = """
import random, sys
from contextlib import suppress
from pathlib import Path
import datasets
from cvlm.data.importers import ImportOptions
from cvlm.data.importing import ImportSettings, import_data
from cvlm.errors import CvlmError
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
datasets.config.HF_DATASETS_CACHE = folder / "cache"
datasets.disable_progress_bars()
refused = 0
for seed in range(first, last):
    dice = random.Random(seed)
    src = folder / dice.choice(["disk", "parquet"])
    path = dice.choice(sorted(p for p in src.rglob("*") if p.is_file()))
    good = path.read_bytes()
    data = bytearray(good)
    for _ in range(dice.choice([1, 3, 30])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    path.write_bytes(data if dice.random() < 0.7 else data[: dice.randrange(len(data))])
    print(seed, path.relative_to(folder), flush=True)
    try:
        settings = ImportSettings(source=ImportOptions(skip=0.5), workers=1, min_count=1)
        import_data("hf_datasets", src, folder / f"out{seed}", settings)
    except CvlmError:
        refused += 1
    path.write_bytes(good)
print("refused", refused)
"""


def test_damaged_files_are_refused_or_skipped(tmp_path):
    """In a process of its own: a damaged arrow file that is trusted would take the process down."""
    whole = dataset_dict()
    whole.save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    for split in whole:
        whole[split].to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    command = [sys.executable, "-c", DAMAGE, str(tmp_path), "0", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 10
