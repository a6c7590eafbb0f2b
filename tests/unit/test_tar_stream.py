"""Reading tars of unknown origin as streams: good samples pass, odd ones are refused, damage is no end."""

import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from cvlm.data.tar_stream import RawSample, read_samples
from cvlm.errors import CvlmError


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (seed * 40 % 255, 90, 20)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(number: int = 3) -> list[tuple[str, bytes]]:
    rows = []
    for i in range(number):
        rows += [(f"k{i}.jpg", jpeg(i)), (f"k{i}.json", json.dumps({"caption": f"text {i}"}).encode())]
    return rows


def problems(samples: Iterable[RawSample]) -> dict[str, str | None]:
    return {sample.key: sample.problem for sample in samples}


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_files_programs_and_compressed_tars(tmp_path, suffix, mode):
    path = write_tar(tmp_path / f"a.{suffix}", pairs(), mode)
    expected = [("k0", jpeg(0)), ("k1", jpeg(1)), ("k2", jpeg(2))]
    for url in (str(path), f"pipe:cat {path}", f"file:{path}"):
        samples = list(read_samples(url))
        assert [(sample.key, sample.members["jpg"]) for sample in samples] == expected
        assert all(sample.problem is None for sample in samples)
        assert samples[1].name == f"{url}: 'k1'"


def test_folders_and_hidden_files_are_no_samples(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    rows = [(folder, b""), ("a/._k.jpg", b"x"), ("a/k.jpg", jpeg()), ("a/k.txt", b"t"), ("README", b"x")]
    assert problems(read_samples(str(write_tar(tmp_path / "a.tar", rows)))) == {"a/k": None}


@pytest.mark.parametrize("name", ["../k.jpg", "/etc/k.jpg", "a/../../k.jpg", "a\\..\\k.jpg"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    found = list(read_samples(str(write_tar(tmp_path / "a.tar", [*pairs(1), (name, jpeg()), *pairs(1)]))))
    assert [sample.problem is None for sample in found] == [True, False, True]
    assert "leaves its folder" in str(found[1].problem)
    assert set(found[1].members.values()) == {b""}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("evil.jpg")
    link.type, link.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "a.tar", [*pairs(1), (link, b""), ("evil.txt", b"a caption"), *pairs(1)])
    found = list(read_samples(str(path)))
    assert [sample.key for sample in found] == ["k0", "evil", "k0"]
    assert found[1].problem == "a link or device, not a plain file"


def test_a_large_member_is_refused_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("cvlm.data.tar_stream.MAX_FILE_BYTES", 5000)
    rows = [("big.jpg", bytes(3_000_000)), ("big.txt", b"caption"), *pairs(1)]
    found = list(read_samples(str(write_tar(tmp_path / "a.tar", rows))))
    assert found[0].problem == "3,000,000 bytes; more than 5,000 are refused"
    assert found[0].members["jpg"] == b""
    assert found[1].problem is None


@pytest.mark.parametrize("size", [10**9, 8**11 - 1, 2**60])
def test_a_size_without_data_behind_it_ends_at_once(tmp_path, size):
    info = tarfile.TarInfo("k.jpg")
    info.size = size
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(CvlmError, match="cannot read the shard"):
        list(read_samples(str(path)))


def test_absurd_extra_headers_and_sparse_files_are_refused(tmp_path):
    for kind, size in ((tarfile.XHDTYPE, 2**33), (tarfile.GNUTYPE_LONGNAME, 2**32), (tarfile.GNUTYPE_SPARSE, 10)):
        info = tarfile.TarInfo("k.jpg")
        info.type, info.size = kind, size
        path = tmp_path / "a.tar"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(CvlmError, match="sparse files and headers above one megabyte"):
            list(read_samples(str(path)))


def test_a_suffix_that_stands_twice_is_refused(tmp_path):
    rows = [("k.jpg", jpeg()), ("k.JPG", jpeg(1)), ("k.txt", b"x")]
    assert problems(read_samples(str(write_tar(tmp_path / "a.tar", rows)))) == {"k": "'JPG' stands twice"}


@pytest.mark.parametrize("url", ["nothing/here.tar", "pipe:false", "pipe:echo no tar"])
def test_what_cannot_be_opened_is_named(url):
    with pytest.raises(CvlmError, match="cannot read the shard"):
        list(read_samples(url))


def test_stopping_early_is_no_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(400))
    reading = read_samples(f"pipe:cat {path} {path}")
    assert next(reading).key == "k0"
    reading.close()


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_an_error_or_leaves_the_number_of_samples(tmp_path, seed):
    """Flip a bit or cut the end off: never fewer samples without a word. Content is for others to check."""
    dice = random.Random(seed)
    path = write_tar(tmp_path / "a.tar", pairs(4))
    data = bytearray(path.read_bytes())
    used = len(pairs(4)) * 1024 + 512
    if dice.random() < 0.4:
        del data[dice.randrange(used) :]
    else:
        data[dice.randrange(used)] ^= 1 << dice.randrange(8)
    path.write_bytes(data)
    try:
        found = list(read_samples(str(path)))
    except CvlmError:
        return
    assert len(found) == 4
