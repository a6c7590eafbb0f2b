"""VQA v2 (Goyal et al., CVPR 2017) and the sets that share its files: VQA v1, OK-VQA.

`v2_OpenEnded_mscoco_train2014_questions.json` and `v2_mscoco_train2014_annotations.json`, the same for val2014, and
questions alone for test2015 and test-dev2015; in the source folder or one below. Pictures are
`train2014/COCO_train2014_000000000009.jpg`, also under `images/`, or any file whose name ends in the image id.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cvlm.data.importers.records import (
    IMAGE_SUFFIXES,
    ImageFile,
    ImageSource,
    ImportOptions,
    Row,
    Skips,
    Source,
    Text,
    clean_text,
    group,
    id_at,
    list_at,
    read_json,
    text_at,
)
from cvlm.data.shard_index import SourceFile
from cvlm.errors import CvlmError

SPLITS = {"train2014": "train", "val2014": "val", "test2015": "test", "test-dev2015": "testdev"}


def read_vqav2(path: Path, options: ImportOptions) -> Source:
    """Read VQA v2; a folder with v1 files alone is read as v1.

    Raises:
        CvlmError: files are missing or damaged.
    """
    return _read(path, options, name="VQAv2", prefixes=("v2_", ""))


def read_okvqa(path: Path, options: ImportOptions) -> Source:
    """Read OK-VQA (Marino et al., CVPR 2019), whose files have the names of VQA v1.

    Raises:
        CvlmError: files are missing or damaged.
    """
    return _read(path, options, name="OK-VQA", prefixes=("",))


def _read(path: Path, options: ImportOptions, *, name: str, prefixes: tuple[str, ...]) -> Source:
    if not path.is_dir():
        raise CvlmError(f"the source {path} must be the folder that holds the question files")
    prefix = next((p for p in prefixes if _file(path, f"{p}OpenEnded_mscoco_train2014_questions.json")), None)
    if prefix is None:
        raise CvlmError(
            f"{path} has no {prefixes[0]}OpenEnded_mscoco_train2014_questions.json, nor has a folder directly below it"
        )
    skips = Skips()
    images = ImageFinder(options.images if options.images is not None else path)
    rows: list[Row] = []
    files: list[SourceFile] = []
    total, licence = 0, None
    for part, split in SPLITS.items():
        questions = _file(path, f"{prefix}OpenEnded_mscoco_{part}_questions.json")
        if questions is None:
            continue
        read = _read_split(questions, _file(path, f"{prefix}mscoco_{part}_annotations.json"), part)
        files += read.files
        total += len(read.questions)
        licence = licence or read.licence
        rows += [(split, *row) for row in _rows(read, images, skips)]
    return Source(
        name=name,
        task="vqa",
        rule="vqa",
        evaluate="val",
        samples=group(rows),
        files=tuple(files),
        licence=licence,
        rows=total,
        skipped=tuple(skips.found),
    )


@dataclass(frozen=True, kw_only=True)
class _Split:
    """One pair of files: `questions` as they stand, annotations by question id, None for splits without."""

    part: str
    questions: list[Any]
    annotations: dict[str, Any] | None
    files: list[SourceFile]
    licence: str | None


def _read_split(questions: Path, annotations: Path | None, part: str) -> _Split:
    if annotations is None and part in ("train2014", "val2014"):
        raise CvlmError(f"{questions} has no annotations beside it; they are part of the same download page")
    raw, entry = read_json(questions)
    files, by_id = [entry], None
    if annotations is not None:
        raw_annotations, annotation_entry = read_json(annotations)
        files.append(annotation_entry)
        by_id = {}
        for row in list_at(raw_annotations, "annotations", annotations):
            # A row without an id, or a second one of the same id, cannot be told to belong to a question.
            key = str(row.get("question_id")) if isinstance(row, dict) else "?"
            by_id[key] = None if key in by_id else row
    licence = raw.get("license") if isinstance(raw, dict) else None
    name = licence.get("name") if isinstance(licence, dict) else None
    return _Split(
        part=part,
        questions=list_at(raw, "questions", questions),
        annotations=by_id,
        files=files,
        licence=clean_text(name, "license") if isinstance(name, str) and name else None,
    )


def _rows(split: _Split, images: "ImageFinder", skips: Skips) -> Iterator[tuple[str, tuple[ImageSource, ...], Text]]:
    seen: set[str] = set()
    for position, question in enumerate(split.questions):
        row = skips.keep(f"{split.part} questions[{position}]", _row, question, split, images, seen)
        if row is not None:
            yield row


def _row(question: Any, split: _Split, images: "ImageFinder", seen: set[str]) -> tuple[str, Any, Text]:
    question_id, image_id = id_at(question, "question_id"), id_at(question, "image_id")
    text = text_at(question, "question")
    if question_id in seen:
        raise CvlmError(f"question_id {question_id} stands twice")
    answered = _answered(split.annotations, question_id, image_id) if split.annotations is not None else {}
    image = images.find(split.part, image_id)
    seen.add(question_id)
    return image.path.stem, (image,), Text(id=question_id, text=text, **answered)


def _answered(annotations: dict[str, Any], question_id: str, image_id: str) -> dict[str, Any]:
    """Return the answer fields of a question."""
    annotation = annotations.get(question_id)
    if annotation is None:
        raise CvlmError(f"question_id {question_id} has no annotation, or several")
    if str(annotation.get("image_id")) != image_id:
        raise CvlmError(f"question {question_id} is about image {image_id}, its annotation about another")
    answers = []
    for given in list_at(annotation, "answers", Path(f"annotation {question_id}")):
        value = given.get("answer") if isinstance(given, dict) else None
        if not isinstance(value, str):
            raise CvlmError(f"question {question_id}: an answer must be a text, got {value!r:.80}")
        # The official tool keeps blank answers: they count among the ten.
        answers.append(clean_text(value, "answer"))
    chosen = annotation.get("multiple_choice_answer")
    if not isinstance(chosen, str) or not chosen.strip():
        chosen = max(answers, key=answers.count)
    kinds = {name: annotation.get(f"{key}_type") for name, key in (("type", "question"), ("answer_type", "answer"))}
    return {
        "answers": tuple(answers),
        "answer": clean_text(chosen, "multiple_choice_answer") or None,
        **{name: clean_text(kind, name) for name, kind in kinds.items() if isinstance(kind, str)},
    }


class ImageFinder:
    """Finds COCO pictures by part and image id.

    Args:
        folder: under it stand the pictures.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CvlmError(f"the folder of images {folder} does not exist")
        self.folder = folder

    def find(self, part: str, image_id: str) -> ImageFile:
        """Return the file of a picture: by its official name, else by the id at the end of a name.

        Raises:
            CvlmError: there is none, or several that could be meant.
        """
        # test-dev shows a part of the pictures of test.
        part = part.replace("test-dev", "test")
        if image_id.isdecimal():
            name = f"COCO_{part}_{int(image_id):012d}.jpg"
            for folder in (self.folder / part, self.folder / "images" / part, self.folder / "images", self.folder):
                if (folder / name).is_file():
                    return ImageFile(folder / name)
        found = self._by_id.get(image_id.lstrip("0") or "0", [])
        in_part = [path for path in found if part[:3] in path.relative_to(self.folder).as_posix()]
        chosen = in_part or found
        if len(chosen) != 1:
            listed = ", ".join(str(path) for path in chosen[:3]) or "none"
            raise CvlmError(f"the picture of image_id {image_id} ({part}) cannot be told: {listed} under {self.folder}")
        return ImageFile(chosen[0])

    @cached_property
    def _by_id(self) -> dict[str, list[Path]]:
        """Every picture by the digits at the end of its name, walked once when an official name is missing."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*")):
            digits = re.search(r"\d+$", path.stem)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                key = (digits.group().lstrip("0") or "0") if digits else path.stem
                found.setdefault(key, []).append(path)
        return found


def _file(folder: Path, name: str) -> Path | None:
    """Return the file of this name in a folder or directly below it."""
    return next((path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()), None)
