"""Samples that were damaged after the import: left out and named within the budget, refused beyond it, checked once."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_files import write_vqav2

from cvlm.config import ShardsData
from cvlm.data import load_data
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.shards import ShardPicture, ShardReader
from cvlm.errors import CvlmError

PICTURES = 20


@pytest.fixture
def folder(tmp_path) -> Path:
    write_vqav2(tmp_path / "src", pictures=PICTURES)
    import_data("vqav2", tmp_path / "src", tmp_path / "data", ImportSettings(workers=1, shard_samples=8))
    return tmp_path / "data"


def damage(folder: Path, split: str, position: int, suffix: str = "jpg") -> str:
    """Change one byte of a member; returns the sample's key."""
    reader = ShardReader(folder, split)
    sample = reader.samples[position]
    (name,) = [key for key in sample.members if key.endswith(suffix)]
    offset, size, _ = sample.members[name]
    with (folder / reader.index.splits[split][position // 8].name).open("r+b") as shard:
        shard.seek(offset + size // 2)
        byte = shard.read(1)
        shard.seek(offset + size // 2)
        shard.write(bytes([byte[0] ^ 255]))
    return sample.key


def load(folder: Path, **settings: object):
    return load_data(ShardsData(kind="shards", path=folder, **settings), "vqa")


def test_broken_samples_leave_with_all_their_texts(folder, caplog):
    whole = load(folder)
    keys = [damage(folder, "train", 3), damage(folder, "train", 12, "json")]
    splits = load(folder, skip=0.1)
    assert len(whole.train) == 2 * PICTURES
    assert len(splits.train) == 2 * (PICTURES - 2)
    assert len(splits.train.pictures) == PICTURES - 2
    assert len(splits.train.skipped) == 2
    for key, said in zip(keys, splits.train.skipped, strict=True):
        assert key in said
        assert said in caplog.text
    gone = {2 * 3, 2 * 3 + 1, 2 * 12, 2 * 12 + 1}
    kept = [place for place in range(len(whole.train)) if place not in gone]
    assert splits.train.ids == tuple(whole.train.ids[place] for place in kept)
    assert np.array_equal(splits.train.labels[:], whole.train.labels[kept])
    for pair, place in enumerate(kept):
        ours = splits.train.pictures[splits.train.image_of[pair]].key
        assert ours == whole.train.pictures[whole.train.image_of[place]].key
    assert splits.test.skipped == ()


def test_beyond_the_budget_the_first_ones_are_named(folder):
    keys = [damage(folder, "train", position) for position in range(7)]
    with pytest.raises(CvlmError, match=r"7 samples of .* split 'train', are broken; of 20 may be 2") as caught:
        load(folder, skip=0.1)
    for key in keys[:5]:
        assert key in str(caught.value)
    assert keys[6] not in str(caught.value)
    assert "and 2 more" in str(caught.value)


def test_one_broken_sample_stops_a_small_split_by_default(folder):
    damage(folder, "val", 0)
    with pytest.raises(CvlmError, match=r"1 samples of .* are broken; of 20 may be 0 \(data.skip: 0.001\)"):
        load(folder)


def test_the_check_is_made_once_and_again_when_a_shard_changes(folder, monkeypatch):
    checked = []
    original = ShardPicture.check
    monkeypatch.setattr(ShardPicture, "check", lambda self: checked.append(self.name) or original(self))
    load(folder)
    assert len(checked) == 2 * PICTURES
    load(folder)
    assert len(checked) == 2 * PICTURES
    damage(folder, "train", 0)
    for _ in range(2):
        with pytest.raises(CvlmError, match="1 samples"):
            load(folder)
    assert len(checked) == 3 * PICTURES, "train again, once; val stayed as it was"


def test_folders_that_cannot_be_written_to_work(folder, monkeypatch):
    if os.geteuid() == 0:
        monkeypatch.setenv("CVLM_CACHE", "/proc/nothing/can/be/written/here")
    else:
        folder.chmod(0o500)
        monkeypatch.setenv("CVLM_CACHE", str(folder))
    before = sorted(folder.iterdir())
    assert len(load(folder).train) == len(load(folder).train) == 2 * PICTURES
    assert sorted(folder.iterdir()) == before


def test_a_limit_checks_no_more_than_it_uses(folder):
    damage(folder, "train", 15)
    assert len(load(folder, limit=10).train) == 10
    with pytest.raises(CvlmError, match="1 samples"):
        load(folder)


def test_a_missing_shard_is_an_error(folder):
    next(folder.glob("train*.tar")).unlink()
    with pytest.raises(CvlmError, match=r"cannot read .*train-000.*Import again"):
        load(folder, skip=0.9)
