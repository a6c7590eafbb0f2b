"""From a split to its part of a training record (`cvlm.lineage`): digests of pictures and texts, perceptual hashes."""

import json
from hashlib import sha256

from cvlm.data.examples import Examples, Picture
from cvlm.data.pixels import perceptual_hash
from cvlm.lineage import DataSource
from cvlm.progress import Progress

DIGITS = 16


def picture_digests(picture: Picture) -> tuple[str, ...]:
    """Return the digest of a picture's file; of two pictures in one, both."""
    return tuple(file_digest(key) for key in picture.key.split("+"))


def file_digest(key: str) -> str:
    """Shorten a SHA-256; a key that is none (of a picture without a file) is hashed first."""
    is_hash = len(key) == 64 and set(key) <= set("0123456789abcdef")
    return (key if is_hash else sha256(key.encode()).hexdigest())[:DIGITS]


def text_digest(identity: str, text: str) -> str:
    """Return the digest of a question or caption: its id together with its wording."""
    return sha256(json.dumps([identity, text]).encode()).hexdigest()[:DIGITS]


def text_digests(examples: Examples) -> list[str]:
    """Return the digest of each pair's text `[n]`; empty where the source has no ids."""
    return [
        text_digest(identity, examples.texts[text])
        for identity, text in zip(examples.ids, examples.text_of, strict=False)
    ]


def look_of(picture: Picture) -> str:
    """Return the perceptual hash as 16 hexadecimal digits."""
    return f"{perceptual_hash(picture.load()):0{DIGITS}x}"


def source_of(examples: Examples, progress: Progress | None = None) -> DataSource:
    """Describe a split; every picture is decoded once for its perceptual hash."""
    looks = set()
    for done, picture in enumerate(examples.pictures, start=1):
        looks.add(look_of(picture))
        if progress is not None:
            progress(done, len(examples.pictures))
    return DataSource(
        data=examples.name,
        split=examples.split,
        fingerprint=examples.fingerprint,
        used_by=(),
        pairs=len(examples),
        pictures=tuple(sorted({digest for picture in examples.pictures for digest in picture_digests(picture)})),
        texts=tuple(sorted(set(text_digests(examples)))),
        looks=tuple(sorted(looks)),
    )


def beyond_first(streamed: Examples) -> str:
    """Say what a record leaves out of a stream, of which it knows the first pairs."""
    return f"{streamed.name}: streamed, not recorded beyond its first {len(streamed)} pairs"
