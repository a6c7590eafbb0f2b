"""Sentences that are true or false of pictures, as classification: NLVR2 (two pictures) and SNLI-VE (one)."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cvlm.data.importers.lines import decode_text, good, json_rows
from cvlm.data.importers.records import (
    IMAGE_SUFFIXES,
    ImageSource,
    ImportOptions,
    Skips,
    Source,
    Text,
    find_image,
    group,
    id_at,
    read_file,
    text_at,
)
from cvlm.data.pixels import safe_name
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS

NLVR2_FILES = {"train": ("train.json",), "val": ("dev.json",), "test": ("test1.json", "test.json")}
NLVR2_ANSWERS = {"True": "true", "False": "false"}
NLVR2_ID = re.compile(r"[^-]+-[0-9]+-[0-9]+-[0-9]+")
SNLI_VE_FILES = {"train": ("snli_ve_train.jsonl",), "val": ("snli_ve_dev.jsonl",), "test": ("snli_ve_test.jsonl",)}
SNLI_VE_ANSWERS = TASKS["snli_ve"].answers

MakeRow = Callable[[Any, str], tuple[str, tuple[ImageSource, ...], Text]]


def read_nlvr2(path: Path, options: ImportOptions) -> Source:
    """Read NLVR2 (Suhr et al., ACL 2019): JSON lines `train.json`, `dev.json`, `test1.json`, and the pictures.

    The pictures of `dev-850-0-0` are `dev-850-0-img0.png` and `-img1.png`, under `images/`, `dev/` or
    `images/train/DIRECTORY/`. Consistency is computed by identifier.

    Raises:
        CvlmError: files are missing or damaged.
    """
    root = options.images if options.images is not None else path

    def row(raw: Any, split: str) -> tuple[str, tuple[ImageSource, ...], Text]:
        name = id_at(raw, "identifier")
        stem = name.rpartition("-")[0]
        label = raw.get("label")
        if not NLVR2_ID.fullmatch(name):
            raise CvlmError(f"'identifier' is {name!r}; it reads SPLIT-SET-PAIR-SENTENCE")
        if str(label) not in NLVR2_ANSWERS:
            raise CvlmError(f"'label' is {label!r:.80}; it must be True or False")
        answer = NLVR2_ANSWERS[str(label)]
        folders = _nlvr2_folders(root, stem, raw.get("directory"))
        pair = tuple(find_image(folders, f"{stem}-img{side}.png") for side in (0, 1))
        return stem, pair, Text(id=name, text=text_at(raw, "sentence"), answers=(answer,), answer=answer)

    return _read(path, "NLVR2", "nlvr2", NLVR2_FILES, row)


def read_snli_ve(path: Path, options: ImportOptions) -> Source:
    """Read SNLI-VE (Xie et al., 2019): `snli_ve_train.jsonl`, `_dev`, `_test`, and Flickr30k's pictures.

    Raises:
        CvlmError: files are missing or damaged.
    """
    given = [options.images] if options.images is not None else []
    folders = given or [path / "flickr30k-images", path / "flickr30k_images", path / "images", path]

    def row(raw: Any, split: str) -> tuple[str, tuple[ImageSource, ...], Text]:
        image = text_at(raw, "Flickr30K_ID")
        label = text_at(raw, "gold_label")
        if label not in SNLI_VE_ANSWERS:
            raise CvlmError(f"'gold_label' is {label!r:.80}; known are {', '.join(SNLI_VE_ANSWERS)}")
        text = Text(id=id_at(raw, "pairID"), text=text_at(raw, "sentence2"), answers=(label,), answer=label)
        name = image if Path(image).suffix.lower() in IMAGE_SUFFIXES else f"{image}.jpg"
        return image, (find_image(folders, name),), text

    return _read(path, "SNLI-VE", "snli_ve", SNLI_VE_FILES, row)


def _read(
    path: Path, name: str, task: Literal["nlvr2", "snli_ve"], names: Mapping[str, tuple[str, ...]], make: MakeRow
) -> Source:
    skips, total = Skips(), 0
    rows: list[tuple[str, str, tuple[ImageSource, ...], Text]] = []
    files = []
    for split, candidates in names.items():
        file = next((p for n in candidates for p in (path / n, path / "data" / n) if p.is_file()), None)
        if file is None:
            continue
        content, entry = read_file(file)
        files.append(entry)
        seen: set[str] = set()
        for place, raw in json_rows(decode_text(content, file), file):
            total += 1
            row = skips.keep(place, _once, make, raw, split, seen)
            if row is not None:
                rows.append((split, *row))
    if not files:
        raise CvlmError(f"{path} has no {names['train'][0]}, nor has its folder data/")
    splits = {split for split, *_ in rows}
    return Source(
        name=name,
        task=task,
        rule="exact",
        evaluate="test" if "test" in splits else "val",
        samples=group(rows),
        files=tuple(files),
        rows=total,
        skipped=tuple(skips.found),
        answers=TASKS[task].answers,
    )


def _once(make: MakeRow, raw: Any, split: str, seen: set[str]) -> tuple[str, tuple[ImageSource, ...], Text]:
    row = make(good(raw), split)
    if row[2].id in seen:
        raise CvlmError(f"the id {row[2].id!r} stands twice")
    seen.add(row[2].id)
    return row


def _nlvr2_folders(root: Path, stem: str, directory: Any) -> list[Path]:
    split = safe_name(stem).partition("-")[0]
    parts = [root / "images" / split, root / split, root / "images", root]
    if isinstance(directory, int) and not isinstance(directory, bool):
        parts = [root / "images" / split / str(directory), root / split / str(directory), *parts]
    return parts
