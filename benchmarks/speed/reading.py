"""Reading shards in random order: `ShardReader` in the order of `EpochOrder`, beside webdataset with a shuffle buffer.

Both read every sample of the same shards once, picture and json, in one process, once with decoding the pictures to RGB
and once without. webdataset's order is no more than locally random; ours is a permutation of everything.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.speed.timing import Work, setting, time_pair
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.order import EpochOrder
from cvlm.data.shards import ShardReader, read_member

SAMPLES = 5000
BUFFER = 1000
_SIZE = (320, 240)


def compare(samples: int = SAMPLES, repeats: int = 3) -> dict[str, Any]:
    """Time both over one epoch of made-up photographs, and check that they read the same.

    Raises:
        AssertionError: If a sample is missing, or differs.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(folder / "source", samples)
        settings = ImportSettings(shard_samples=500)
        import_data("folder", folder / "source", folder / "shards", settings)
        ours, theirs = (_digest(read(folder / "shards", 0, False)) for read in (read_ours, read_theirs))
        assert ours == theirs, "the two ways disagree"
        timings = {
            name: time_pair(
                partial(_prepare, read_ours, folder / "shards", decode),
                partial(_prepare, read_theirs, folder / "shards", decode),
                repeats,
            )
            for name, decode in (("decoded", True), ("bytes", False))
        }
        size = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    return {
        "work": "one epoch of pictures, decoded, and their json in random order",
        "beside": f"webdataset with shuffled shards and a shuffle buffer of {BUFFER}",
        "size": {"samples": samples, "pixels": list(_SIZE), "bytes": size},
        **timings["decoded"],
        "without_decoding": timings["bytes"],
        "equal": "every picture file and json",
        **setting(["webdataset", "pillow", "numpy"]),
    }


def write_pictures(folder: Path, number: int) -> None:
    """Write JPEG files of smooth noise, about as many bytes as a photograph of their size, and a caption each."""
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        fine = rng.integers(-12, 12, (_SIZE[1], _SIZE[0], 3))
        pixels = np.clip(np.asarray(coarse.resize(_SIZE, Image.Resampling.BICUBIC)) + fine, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{i:06d}.jpg", quality=85)
        (folder / "train" / f"{i:06d}.txt").write_text(f"picture number {i}\n")


def read_ours(folder: Path, seed: int, decode: bool) -> Iterator[tuple[Any, Any]]:
    """Yield picture and json of every sample; opening the index and comparing every checksum included."""
    reader = ShardReader(folder, "train")
    order = EpochOrder(index=np.arange(len(reader)), seed=seed, batch=1, batches=len(reader))
    for (position,) in order:
        (picture,) = reader.pictures(position)
        (member,) = picture.members
        yield picture.load() if decode else read_member(picture.shard, member, picture.name), reader.record(position)


def read_theirs(folder: Path, seed: int, decode: bool) -> Iterator[tuple[Any, Any]]:
    """Yield the same through webdataset, as its manual has it."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=len(urls), seed=seed).shuffle(BUFFER):
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB") if decode else sample["jpg"]
        yield picture, json.loads(sample["json"])


def _prepare(read: Callable[[Path, int, bool], Iterator[Any]], folder: Path, decode: bool) -> Work:
    return lambda: deque(read(folder, 1, decode), maxlen=0)


def _digest(samples: Iterator[tuple[bytes, Any]]) -> list[tuple[int, str]]:
    return sorted((hash(data), json.dumps(record, sort_keys=True)) for data, record in samples)
