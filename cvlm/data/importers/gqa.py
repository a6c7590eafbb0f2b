"""GQA (Hudson & Manning, CVPR 2019), balanced questions: one answer each, compared exactly.

`train_balanced_questions.json`, the same for `val` and `testdev`: question id -> object. Pictures
are `images/2386621.jpg`. Scores are reported on testdev where it is there, as usual.
"""

from pathlib import Path
from typing import Any

from cvlm.data.importers.records import (
    ImageSource,
    ImportOptions,
    Row,
    Skips,
    Source,
    Text,
    clean_text,
    find_image,
    group,
    id_at,
    read_json,
    text_at,
)
from cvlm.data.shard_index import SourceFile
from cvlm.errors import CvlmError

SPLITS = ("train", "val", "testdev")


def read(path: Path, options: ImportOptions) -> Source:
    """Read the balanced questions.

    Raises:
        CvlmError: files are missing or damaged.
    """
    folders = [options.images] if options.images is not None else [path / "images", path]
    skips = Skips()
    rows: list[Row] = []
    files: list[SourceFile] = []
    total = 0
    for split in SPLITS:
        name = f"{split}_balanced_questions.json"
        file = next((p for p in (path / name, path / "questions" / name) if p.is_file()), None)
        if file is None:
            continue
        raw, entry = read_json(file)
        if not isinstance(raw, dict) or not raw:
            raise CvlmError(f"{file} must map question ids to questions; is it a file of GQA?")
        files.append(entry)
        total += len(raw)
        for question_id, question in raw.items():
            row = skips.keep(f"{split} {question_id!r:.80}", _row, question_id, question, folders)
            if row is not None:
                rows.append((split, *row))
    if not files:
        raise CvlmError(f"{path} has no train_balanced_questions.json, nor has its folder questions/")
    found = [entry.name.partition("_")[0] for entry in files]
    return Source(
        name="GQA",
        task="vqa",
        rule="exact",
        evaluate="testdev" if "testdev" in found else "val",
        samples=group(rows),
        files=tuple(files),
        licence="CC BY 4.0 (questions)",
        rows=total,
        skipped=tuple(skips.found),
    )


def _row(question_id: str, question: Any, folders: list[Path]) -> tuple[str, tuple[ImageSource, ...], Text]:
    image_id = id_at(question, "imageId")
    answer = text_at(question, "answer") if isinstance(question, dict) and "answer" in question else None
    types = question.get("types") if isinstance(question, dict) else None
    kinds = types if isinstance(types, dict) else {}
    structural, semantic = (str(kinds.get(name) or "") for name in ("structural", "semantic"))
    text = Text(
        id=id_at({"id": question_id}, "id"),
        text=text_at(question, "question"),
        answers=(answer,) if answer is not None else (),
        answer=answer,
        type=clean_text(structural, "types"),
        answer_type=clean_text(semantic, "types"),
    )
    return image_id, (find_image(folders, f"{image_id}.jpg"),), text
