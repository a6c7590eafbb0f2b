"""Your own table: JSON lines or CSV with one question or caption per row, and a folder of pictures with captions.

Fields and the columns they are read from by default: `image`, `text` (or `question`, `caption`), `answer`, `split`,
`id`, `type`; other names are given as FIELD=COLUMN. `answers` is a JSON list, or texts joined by `|`, of what several
people said. Pictures are relative to the table's folder, or to --images. A table without a `split` column is taken
from its file name (`train.jsonl`, `val.csv`), else it is split by picture, by hash: 80 % train, 10 % val, 10 % test.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from cvlm.data.importers.lines import decode_text, good, json_rows
from cvlm.data.importers.records import (
    IMAGE_SUFFIXES,
    ImageFile,
    ImportOptions,
    Row,
    Skips,
    Source,
    Text,
    clean_text,
    find_image,
    group,
    id_at,
    read_file,
    text_at,
)
from cvlm.data.shard_index import SourceFile
from cvlm.errors import CvlmError, nearest

FIELDS = ("image", "text", "answer", "answers", "split", "id", "type")
TEXT_COLUMNS = ("text", "question", "caption")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLIT_NAMES |= {"test": "test", "testing": "test"}


def read_jsonl(path: Path, options: ImportOptions) -> Source:
    """Read a file of JSON lines, or every `*.jsonl` of a folder.

    Raises:
        CvlmError: there is none, a column is missing, or nothing can be read.
    """
    return _read(path, options, ".jsonl", json_rows)


def read_csv(path: Path, options: ImportOptions) -> Source:
    """Read a CSV file with a header (comma, semicolon or tab), or every `*.csv` of a folder.

    Raises:
        CvlmError: as `read_jsonl`.
    """
    return _read(path, options, ".csv", _csv_rows)


def read_folder(path: Path, options: ImportOptions) -> Source:
    """Read pictures with a text file beside each: `x.jpg` and `x.txt`, one caption per line.

    Pictures below a folder named `train`, `val` or `test` are of that split.

    Raises:
        CvlmError: there is no picture with captions.
    """
    if not path.is_dir():
        raise CvlmError(f"the source {path} must be a folder of pictures and text files")
    skips, rows, total = Skips(), list[Row](), 0
    files = list[SourceFile]()
    for image in sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = image.relative_to(path).as_posix()
        total += 1
        found = skips.keep(name, _captions, image, path, files)
        rows += found or []
    return table_source(path.resolve().stem, rows, files, total, skips)


def _captions(image: Path, root: Path, files: list[SourceFile]) -> list[Row]:
    content, entry = read_file(image.with_suffix(".txt"))
    lines = [clean_text(line, "caption") for line in decode_text(content, image.with_suffix(".txt")).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise CvlmError(f"{image.with_suffix('.txt')} holds no caption")
    name = image.relative_to(root).as_posix()
    files.append(entry.model_copy(update={"name": Path(name).with_suffix(".txt").as_posix()}))
    folders = [SPLIT_NAMES[part] for part in Path(name).parts[:-1] if part in SPLIT_NAMES]
    split = folders[0] if folders else split_by_hash(name)
    return [(split, name, (ImageFile(image),), Text(id=f"{name}#{i}", text=line)) for i, line in enumerate(lines)]


def _read(path: Path, options: ImportOptions, suffix: str, parse: Any) -> Source:
    check_columns(options.columns)
    tables = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    if not tables:
        raise CvlmError(f"{path} holds no *{suffix} file")
    folder = tables[0].parent
    folders = [options.images] if options.images is not None else [folder, folder / "images"]
    skips, rows, files = Skips(), list[Row](), list[SourceFile]()
    total, seen = 0, set[tuple[str, str]]()
    for table in tables:
        content, entry = read_file(table)
        files.append(entry)
        for place, raw in parse(decode_text(content, table), table):
            total += 1
            row = skips.keep(place, _row, raw, options.columns, folders, table, f"{table.stem}:{total}", seen)
            if row is not None:
                rows.append(row)
    return table_source(path.resolve().stem, rows, files, total, skips)


def _row(
    raw: Any, columns: Mapping[str, str], folders: list[Path], table: Path, number: str, seen: set[tuple[str, str]]
) -> Row:
    if not isinstance(good(raw), dict):
        raise CvlmError(f"a row must be an object, got {raw!r:.80}")
    column = {name: columns.get(name, name) for name in FIELDS}
    if "text" not in columns:
        column["text"] = next((name for name in TEXT_COLUMNS if name in raw), "text")
    check_present(raw, columns)
    image = text_at(raw, column["image"])
    split = given_split(raw, column["split"]) or SPLIT_NAMES.get(table.stem) or split_by_hash(image)
    text_id = id_at(raw, column["id"]) if raw.get(column["id"]) not in (None, "") else number
    if (split, text_id) in seen:
        raise CvlmError(f"the id {text_id!r} stands twice in the split {split!r}")
    kind = raw.get(column["type"])
    text = Text(
        id=text_id,
        text=text_at(raw, column["text"]),
        type=clean_text(kind, column["type"]) if isinstance(kind, str) else "",
        **answers_at(raw, column),
    )
    found = find_image(folders, image)
    seen.add((split, text_id))
    return split, image, (found,), text


def answers_at(raw: dict[str, Any], column: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields `answers` and `answer` of a text.

    Raises:
        CvlmError: they are no texts.
    """
    several = raw.get(column["answers"])
    if isinstance(several, str) and several.strip():
        several = json.loads(several) if _is_json_list(several) else several.split("|")
    if several not in (None, ""):
        if not isinstance(several, list) or not several or not all(isinstance(one, str) for one in several):
            raise CvlmError(f"{column['answers']!r} must be a list of texts, got {several!r:.80}")
        people = tuple(clean_text(one, column["answers"]) for one in several)
        return {"answers": people, "answer": max(people, key=people.count)}
    one = raw.get(column["answer"])
    if one in (None, ""):
        return {}
    if isinstance(one, bool) or not isinstance(one, str | int):
        raise CvlmError(f"{column['answer']!r} must be a text, got {one!r:.80}")
    answer = text_at({column["answer"]: str(one)}, column["answer"])
    return {"answers": (answer,), "answer": answer}


def table_source(name: str, rows: list[Row], files: list[SourceFile], total: int, skips: Skips) -> Source:
    """Put a source together; with any answer it is questions, else captions."""
    task: Literal["vqa", "retrieval"] = "vqa" if any(text.answers for *_, text in rows) else "retrieval"
    splits = {split for split, *_ in rows}
    several = any(len(text.answers) > 1 for *_, text in rows)
    return Source(
        name=name,
        task=task,
        rule="none" if task == "retrieval" else "vqa" if several else "exact",
        evaluate="test" if "test" in splits or "val" not in splits else "val",
        samples=group(rows),
        files=tuple(files),
        rows=total,
        skipped=tuple(skips.found),
    )


def _csv_rows(content: str, table: Path) -> Iterator[tuple[str, Any]]:
    head = content.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{table.name} line {reader.line_num}", CvlmError(f"not CSV: {error}")
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if len(set(header)) < len(header):
                raise CvlmError(f"{table} names a column twice: {', '.join(header)}")
        elif len(cells) != len(header):
            problem = CvlmError(f"{len(cells)} cells under {len(header)} columns") if any(cells) else None
            if problem is not None:
                yield f"{table.name} line {reader.line_num}", problem
        else:
            yield f"{table.name} line {reader.line_num}", dict(zip(header, cells, strict=True))


def given_split(raw: dict[str, Any], column: str) -> str | None:
    """Return the split that a row states.

    Raises:
        CvlmError: it states one of another name.
    """
    given = raw.get(column)
    if given in (None, ""):
        return None
    if not isinstance(given, str) or given.strip().lower() not in SPLIT_NAMES:
        raise CvlmError(f"{column!r} is {given!r:.80}; use train, val or test")
    return SPLIT_NAMES[given.strip().lower()]


def split_by_hash(image: str) -> str:
    """Split by picture, so that no picture is on two sides; by hash, so that it stays where it is when others come."""
    share = int(sha256(image.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def check_columns(columns: Mapping[str, str], fields: tuple[str, ...] = FIELDS) -> None:
    """Refuse a field that a table does not have.

    Raises:
        CvlmError: there is one.
    """
    for name in columns:
        if name not in fields:
            raise CvlmError(f"--columns knows no field {name!r}{nearest(name, fields)}; fields: {', '.join(fields)}")


def check_present(raw: Iterable[str], columns: Mapping[str, str]) -> None:
    """Refuse a named column for picture or text that is not among the columns `raw`.

    Raises:
        CvlmError: there is one.
    """
    for field, column in columns.items():
        if column not in raw and field in ("image", "text"):
            listed = ", ".join(raw)[:300]
            raise CvlmError(f"no column {column!r} for {field!r}{nearest(column, raw)}; there are {listed}")


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False
