"""Hugging Face datasets: what `save_to_disk` wrote, a folder of parquet or arrow files, or a name on the hub.

Fields and the columns they are read from by default: `image`; `text` from `question`, `text` or `caption`; `answers`;
`answer` from `answer` or `label`; `id` from `id` or `question_id`; `image_id`, `split`, `type`. Other names are given
as FIELD=COLUMN. A list of captions becomes several texts, a list of answers what several people said. Rows of one
`image_id` share one picture. Stored picture bytes are taken as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cvlm.data.importers.hf_files import load
from cvlm.data.importers.records import (
    ImageFile,
    ImageSource,
    ImportOptions,
    Row,
    Skips,
    Source,
    Text,
    clean_text,
    find_image,
    id_at,
    text_at,
)
from cvlm.data.importers.tables import (
    FIELDS,
    answers_at,
    check_columns,
    check_present,
    given_split,
    split_by_hash,
    table_source,
)
from cvlm.errors import CvlmError

HF_FIELDS = (*FIELDS, "image_id")
DEFAULTS = {"text": ("question", "text", "caption"), "answer": ("answer", "label"), "id": ("id", "question_id")}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The picture of one row; `dataset` has the column of pictures alone, undecoded.

    Attributes:
        dataset: a `datasets.Dataset`; survives pickling and forking.
        column: its name.
        position: the row.
        folders: where a picture may lie of which only the path is stored.
    """

    dataset: Any
    column: str
    position: int
    folders: tuple[Path, ...]

    def read(self) -> bytes:
        """Return the bytes as they are stored.

        Raises:
            CvlmError: there are none, or only a path that leads out of the data set's folders.
        """
        try:
            value = self.dataset[self.position][self.column]
        except Exception as error:  # whatever a damaged file makes arrow trip over
            raise CvlmError(f"cannot read the picture of row {self.position}: {error}") from error
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise CvlmError(f"row {self.position} holds no picture in {self.column!r}")
        found = Path(path).resolve()
        if Path(path).is_absolute() and any(found.is_relative_to(folder.resolve()) for folder in self.folders):
            return ImageFile(found).read()
        return find_image(self.folders, path).read()

    def stamp(self) -> str:
        """Return nothing: the data set's own files are hashed."""
        return ""


def read(path: Path, options: ImportOptions) -> Source:
    """Read a data set through the library `datasets`.

    Raises:
        CvlmError: the library is not installed, or cannot read the data set; or a column is missing.
    """
    check_columns(options.columns, HF_FIELDS)
    parts, files, name = load(path)
    folders = _folders(path, options)
    skips, rows, total = Skips(), list[Row](), 0
    seen: set[tuple[str, str]] = set()
    for split, dataset in parts.items():
        check_present(dataset.column_names, options.columns)
        table = _Table.of(dataset, options.columns, split, folders)
        for position, raw in table.rows():
            total += 1
            place = f"{split or 'row'} {position}"
            rows += skips.keep(place, table.texts_of, raw, position, seen) or []
    return table_source(name, rows, files, total, skips)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One split: its rows without pictures, and its pictures."""

    split: str | None
    texts: Any
    pictures: Any
    column: Mapping[str, str]
    folders: tuple[Path, ...]

    @classmethod
    def of(cls, dataset: Any, columns: Mapping[str, str], split: str | None, folders: tuple[Path, ...]) -> "_Table":
        from datasets import ClassLabel, Image

        column = {field: columns.get(field, field) for field in HF_FIELDS}
        for field, names in DEFAULTS.items():
            if field not in columns:
                column[field] = next((name for name in names if name in dataset.column_names), field)
        image = column["image"]
        if image not in dataset.column_names:
            raise CvlmError(f"no column {image!r} for 'image'; there are {', '.join(dataset.column_names)}")
        if isinstance(dataset.features[image], Image):
            dataset = dataset.cast_column(image, Image(decode=False))
        label = dataset.features.get(column["answer"])
        as_path = getattr(dataset.features[image], "dtype", None) in ("string", "large_string")
        wanted = {name for field, name in column.items() if field != "image" or as_path}
        texts = dataset.select_columns([name for name in dataset.column_names if name in wanted])
        if isinstance(label, ClassLabel):
            texts = texts.with_transform(partial(_name_labels, column["answer"], label))
        pictures = None if as_path else dataset.select_columns([image])
        return cls(split=split, texts=texts, pictures=pictures, column=column, folders=folders)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and values of every row.

        Raises:
            CvlmError: the files are damaged.
        """
        if not self.texts.column_names:
            return
        try:
            for start in range(0, len(self.texts), 1000):
                batch = self.texts[start : start + 1000]
                for offset, values in enumerate(zip(*batch.values(), strict=True)):
                    yield start + offset, dict(zip(batch, values, strict=True))
        except CvlmError:
            raise
        except Exception as error:  # whatever a damaged file makes arrow trip over
            raise CvlmError(f"cannot read the rows of the split {self.split!r}: {error}") from error

    def texts_of(self, raw: dict[str, Any], position: int, seen: set[tuple[str, str]]) -> list[Row]:
        """Return one row per question or caption of a picture."""
        column = self.column
        number = f"{self.split or 'row'}:{position}"
        named = raw.get(column["image_id"]) not in (None, "")
        image: ImageSource
        if self.pictures is None:
            image_id = text_at(raw, column["image"])
            image = find_image(self.folders, image_id)
        else:
            image_id = id_at(raw, column["image_id"]) if named else number
            image = StoredImage(self.pictures, column["image"], position, self.folders)
        split = given_split(raw, column["split"]) or self.split or split_by_hash(image_id)
        text_id = id_at(raw, column["id"]) if raw.get(column["id"]) not in (None, "") else number
        if (split, text_id) in seen:
            raise CvlmError(f"the id {text_id!r} stands twice in the split {split!r}")
        given = raw.get(column["text"])
        several = given if isinstance(given, list) and given else [given]
        kind = raw.get(column["type"])
        facts = _answers(raw, column) | {"type": clean_text(kind, column["type"]) if isinstance(kind, str) else ""}
        texts = [
            Text(id=f"{text_id}#{i}" if len(several) > 1 else text_id, text=text_at({"text": one}, "text"), **facts)
            for i, one in enumerate(several)
        ]
        seen.add((split, text_id))
        return [(split, image_id, (image,), text) for text in texts]


def _answers(raw: dict[str, Any], column: Mapping[str, str]) -> dict[str, Any]:
    """Return the answers of a row; a list may stand under either name, and hold records as VQA v2's does."""
    one, several = raw.get(column["answer"]), raw.get(column["answers"])
    if several in (None, "", []) and isinstance(one, list):
        one, several = None, one
    if isinstance(several, list):
        several = [item.get("answer") if isinstance(item, dict) else item for item in several] or None
    return answers_at({"one": one, "several": several}, {"answer": "one", "answers": "several"})


def _name_labels(column: str, feature: Any, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Replace numbers of classes by their names; -1 and None stand for no label."""
    return batch | {column: [None if value in (None, -1) else feature.int2str(value) for value in batch[column]]}


def _folders(path: Path, options: ImportOptions) -> tuple[Path, ...]:
    """Return where picture files may lie: the folder that was given, or the source's own or the library's cache."""
    if options.images is not None:
        return (options.images,)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return (folder, folder / "images")
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
