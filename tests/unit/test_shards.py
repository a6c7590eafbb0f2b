"""Shards: plain webdataset, random-access by index, equal bytes for equal input, refusal of everything that changed."""

import io
import json
import pickle
import random
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cvlm.data.pixels import MAX_PIXELS, Resize, check, decode, perceptual_hash, safe_name, shrink
from cvlm.data.shard_index import FolderIndex, read_folder_index, write_folder_index
from cvlm.data.shards import ShardReader, ShardWriter, make_key
from cvlm.errors import CvlmError


def picture(seed: int, suffix: str = "png", size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def record(number: int) -> dict:
    return {"id": f"image {number}", "texts": [{"id": str(number), "text": f"what is № {number}?"}]}


def write(folder: Path, samples: int = 5, name: str = "train-000000.tar") -> Path:
    """One complete import of one split."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, name) as writer:
        for number in range(samples):
            writer.add(f"k{number}", [("png", picture(number))], record(number))
    entry = writer.written.entry
    write_folder_index(
        folder,
        FolderIndex(
            schema="cvlm-shards/1",
            name="made up",
            data_format="karpathy",
            task="retrieval",
            rule="none",
            evaluate="test",
            licence=None,
            sources=(),
            options={},
            fingerprint="0" * 64,
            splits={"train": (entry,)},
        ),
    )
    return folder


def test_reader_gives_back_what_the_writer_was_given(tmp_path):
    reader = ShardReader(write(tmp_path / "d"), "train")
    assert len(reader) == 5
    for number in (3, 0, 4, 4):
        assert reader.record(number) == record(number)
        assert reader.picture(number).key == sha256(picture(number)).hexdigest()
        expected = np.asarray(Image.open(io.BytesIO(picture(number))))
        assert np.array_equal(np.asarray(reader.picture(number).load()), expected)


def test_webdataset_reads_the_shard_as_it_is(tmp_path):
    write(tmp_path / "d")
    found = list(webdataset.WebDataset(str(tmp_path / "d" / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"k{i}" for i in range(5)]
    assert [sample["png"] for sample in found] == [picture(i) for i in range(5)]
    assert json.loads(found[2]["json"]) == record(2)


def test_tarfile_agrees_with_the_index(tmp_path):
    reader = ShardReader(write(tmp_path / "d"), "train")
    with tarfile.open(tmp_path / "d" / "train-000000.tar") as archive:
        places = {member.name: (member.offset_data, member.size) for member in archive}
    ours = {f"{s.key}.{suffix}": m[:2] for s in reader.samples for suffix, m in s.members.items()}
    assert places == ours


def test_equal_input_gives_equal_bytes(tmp_path):
    left, right = write(tmp_path / "a"), write(tmp_path / "b")
    for path in sorted(left.iterdir()):
        assert path.read_bytes() == (right / path.name).read_bytes()


def test_an_error_leaves_no_file(tmp_path):
    def stop() -> None:
        with ShardWriter(tmp_path, "train-000000.tar") as writer:
            writer.add("a", [("png", picture(0))], record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert list(tmp_path.iterdir()) == []


def test_two_pictures_stand_side_by_side(tmp_path):
    with ShardWriter(tmp_path, "train-000000.tar") as writer:
        writer.add("pair", [("png", picture(0)), ("png", picture(1, size=(10, 30)))], record(0))
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        names = archive.getnames()
    assert names == ["pair.0.png", "pair.1.png", "pair.json"]


def test_pictures_survive_pickling(tmp_path):
    one = ShardReader(write(tmp_path / "d"), "train").picture(1)
    assert pickle.loads(pickle.dumps(one)).load().size == (24, 16)


@pytest.mark.parametrize("name", ["a b/c.jpg", "x" * 200, "ünï", "dots.in.name", ""])
def test_keys_are_fit_for_tar_and_webdataset(name):
    key = make_key(name)
    assert len(key) <= 80
    assert "." not in key
    assert key == make_key(key)
    assert key != make_key(name + "!")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "C:\\x", "a\\b", "a\0b", "\ud800"])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(CvlmError, match="leaves its folder"):
        safe_name(name)


def test_a_bomb_is_refused_before_it_is_decoded():
    side = int(MAX_PIXELS**0.5) + 10
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(CvlmError, match="pixels; more than"):
        check(buffer.getvalue(), "bomb")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_refused(suffix):
    data = picture(3, suffix, (200, 160))
    for use in (check, decode):
        with pytest.raises(CvlmError, match="here: cannot decode"):
            use(data[: len(data) // 2], "here")


def test_resize_only_shrinks():
    assert shrink(picture(0), "x", Resize(shortest=16)) == ("png", picture(0))
    assert check(shrink(picture(0), "x", Resize(shortest=8))[1], "x") == ("png", (12, 8))
    assert check(shrink(picture(0, "jpg"), "x", Resize(longest=12))[1], "x") == ("jpg", (12, 8))
    with pytest.raises(CvlmError, match="at least 8"):
        Resize(longest=2)


def test_a_copy_at_another_size_has_the_same_hash():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((90, 90))
    other = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((90, 90))
    distance = (perceptual_hash(smooth) ^ perceptual_hash(smooth.resize((60, 60)))).bit_count()
    assert distance <= 2
    assert (perceptual_hash(smooth) ^ perceptual_hash(other)).bit_count() > 10


def read_all(folder: Path) -> list:
    reader = ShardReader(folder, "train")
    return [(reader.record(i), np.asarray(reader.picture(i).load()).tobytes()) for i in range(len(reader))]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_changed_is_refused(tmp_path, seed):
    """Flip, cut or insert a byte in any of the three files: an error, or the very same content."""
    dice = random.Random(seed)
    folder = write(tmp_path / "d")
    good = read_all(folder)
    path = folder / dice.choice(["index.json", "train-000000.json", "train-000000.tar"])
    data = bytearray(path.read_bytes())
    place = dice.randrange(len(data))
    how = dice.choice(["flip", "cut", "insert"])
    if how == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif how == "cut":
        del data[place:]
    else:
        data.insert(place, dice.randrange(256))
    # Another file in its place, as a copy or download would leave it; reading keeps the old one open.
    path.unlink()
    path.write_bytes(data)
    try:
        content = read_all(folder)
    except CvlmError:
        return
    assert content == good


def test_no_import_says_what_to_do(tmp_path):
    with pytest.raises(CvlmError, match="see cvlm data import"):
        read_folder_index(tmp_path)
    (tmp_path / ".import.json").write_text("{}")
    with pytest.raises(CvlmError, match="the same command again"):
        read_folder_index(tmp_path)
    with pytest.raises(CvlmError, match="no split 'x'; it has train"):
        ShardReader(write(tmp_path / "d"), "x")
