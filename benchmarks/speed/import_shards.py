"""Import of JPEG files with captions: `import_data` beside a plain loop over webdataset's `ShardWriter`."""

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.speed.timing import Work, setting, time_pair
from cvlm.data.importing import ImportSettings, import_data

PICTURES = 5000
_DIFFERENT = 50
_SHARD_SAMPLES = 512
_WIDTH, _HEIGHT, _QUALITY = 640, 480, 85

Way = Callable[[Path, Path], Any]


def compare(pictures: int = PICTURES, repeats: int = 3, workers: int = 2) -> dict[str, Any]:
    """Time both on the same folder in the page cache and check that both wrote every byte of every picture.

    The loop copies bytes. Ours does too, and on top checks each picture's structure, hashes each member and each
    shard, writes the index, and waits until all of it is on the disk. One repeat goes before and is not counted: it
    brings the files into the page cache.

    Raises:
        AssertionError: If a picture or caption is missing or differs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = make_source(folder / "source", pictures)

        def run(name: str, way: Way) -> Work:
            out = folder / name
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what the other way left to write is not this one's work
            return lambda: way(source, out)

        ways: dict[str, Way] = {
            "ours": lambda src, out: import_data("karpathy", src, out, ImportSettings(workers=workers)),
            "reference": plain_loop,
        }
        for name, way in ways.items():
            run(name, way)()
        assert _content(folder / "ours") == _content(folder / "reference"), "the two ways disagree"
        timing = time_pair(lambda: run("ours", ways["ours"]), lambda: run("reference", plain_loop), repeats)
        durable = time_pair(lambda: run("ours", ways["ours"]), lambda: run("reference", durable_loop), repeats)
        size = sum(path.stat().st_size for path in (source / "images").iterdir())
    return {
        "work": "import of JPEG files, one caption each",
        "beside": "a plain loop over webdataset's ShardWriter, one process",
        "size": {"pictures": pictures, "bytes": size, "width": _WIDTH, "height": _HEIGHT, "workers": workers},
        **timing,
        "beside_a_loop_that_waits_for_the_disk": durable,
        "equal": "every byte of every picture, and every caption",
        **setting(["webdataset", "pillow"]),
    }


def make_source(folder: Path, pictures: int, seed: int = 0) -> Path:
    """Write JPEG files of a photo's size and entropy (about 80 kB each) and a Karpathy JSON.

    Some different pictures are drawn; the files among which one repeats differ in a comment.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    drawn = [_draw(rng) for _ in range(min(_DIFFERENT, pictures))]
    rows = []
    for number in range(pictures):
        data, comment = drawn[number % len(drawn)], f"picture {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment
        name = f"{number:06d}.jpg"
        (folder / "images" / name).write_bytes(data[:2] + segment + data[2:])
        sentence = {"raw": f"this is picture number {number}", "imgid": number, "sentid": number}
        rows.append({"filename": name, "imgid": number, "split": "train", "sentences": [sentence]})
    (folder / "dataset_drawn.json").write_text(json.dumps({"images": rows, "dataset": "drawn"}))
    return folder


def plain_loop(source: Path, out: Path) -> None:
    """Do what a user writes who has no importer: read the JSON, copy each picture and its caption into shards."""
    from webdataset import ShardWriter

    out.mkdir()
    images = json.loads((source / "dataset_drawn.json").read_text())["images"]
    with ShardWriter(str(out / "train-%06d.tar"), maxcount=_SHARD_SAMPLES, verbose=0) as sink:
        for image in images:
            name = image["filename"]
            caption = {"texts": [sentence["raw"] for sentence in image["sentences"]]}
            data = (source / "images" / name).read_bytes()
            sink.write({"__key__": name.removesuffix(".jpg"), "jpg": data, "json": caption})


def durable_loop(source: Path, out: Path) -> None:
    """Do the same, and wait until the shards are on the disk, as an import does."""
    plain_loop(source, out)
    for shard in out.glob("*.tar"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())


def _draw(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((_WIDTH, _HEIGHT))
    fine = Image.fromarray(rng.integers(0, 256, (_HEIGHT // 2, _WIDTH // 2, 3), dtype=np.uint8)).resize(coarse.size)
    buffer = io.BytesIO()
    Image.blend(coarse, fine, 0.2).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _content(folder: Path) -> dict[str, Any]:
    """Return pictures and captions of all shards by member name."""
    found: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None, "shards hold plain files only"
                found[member.name] = stream.read() if member.name.endswith("jpg") else _captions(stream.read())
    return found


def _captions(content: bytes) -> list[str]:
    return [text if isinstance(text, str) else text["text"] for text in json.loads(content)["texts"]]
