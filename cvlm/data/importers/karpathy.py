"""Karpathy splits (Karpathy & Fei-Fei, CVPR 2015) of COCO, Flickr30k and Flickr8k: `dataset_coco.json` and so on.

Beside the file stand the pictures: in `images/`, in the folder itself, or in any folder one level below; COCO's rows
say `filepath` (`train2014`, `val2014`). Its split `restval` (COCO val pictures that are in no test) joins `train`, as
usual.
"""

from pathlib import Path
from typing import Any

from cvlm.data.importers.records import (
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
    list_at,
    read_json,
    text_at,
)
from cvlm.data.pixels import safe_name
from cvlm.errors import CvlmError

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(path: Path, options: ImportOptions) -> Source:
    """Read a Karpathy JSON; `path` is the file, or a folder with one `dataset*.json`.

    Raises:
        CvlmError: there is none, or several, or it is damaged.
    """
    file = path if path.is_file() else _find(path)
    raw, entry = read_json(file)
    images = list_at(raw, "images", file)
    folders = _image_folders(file.parent, options.images)
    skips = Skips()
    rows: list[Row] = []
    seen: set[str] = set()
    for position, image in enumerate(images):
        rows += skips.keep(f"images[{position}]", _captions, image, folders, seen, skips) or []
    given = raw.get("dataset")
    name = given if isinstance(given, str) and 0 < len(given) <= 100 else file.stem.removeprefix("dataset_")
    splits = {split for split, *_ in rows}
    return Source(
        name=clean_text(name, "dataset"),
        task="retrieval",
        rule="none",
        evaluate="test" if "test" in splits or "val" not in splits else "val",
        samples=group(rows),
        files=(entry,),
        rows=len(images) + sum(_count(image) - 1 for image in images if _count(image)),
        skipped=tuple(skips.found),
    )


def _captions(image: Any, folders: list[Path], seen: set[str], skips: Skips) -> list[Row]:
    """Return one row per caption of a picture; bad captions are noted and left out."""
    filename, split = text_at(image, "filename"), text_at(image, "split")
    if split not in SPLITS:
        raise CvlmError(f"'split' is {split!r:.80}; known are {', '.join(SPLITS)}")
    filepath = image.get("filepath") or ""
    if not isinstance(filepath, str):
        raise CvlmError(f"'filepath' must be a text, got {filepath!r:.80}")
    name = safe_name(f"{filepath}/{filename}" if filepath else filename)
    if name in seen:
        raise CvlmError(f"the image {name!r} stands twice")
    found = _image(folders, name, filename)
    captions: list[Row] = []
    for position, sentence in enumerate(list_at(image, "sentences", Path(name))):
        text = skips.keep(f"{name} sentences[{position}]", _text, sentence, f"{name}#{position}")
        if text is not None:
            captions.append((SPLITS[split], name, (found,), text))
    seen.add(name)
    return captions


def _text(sentence: Any, fallback_id: str) -> Text:
    has_id = isinstance(sentence, dict) and sentence.get("sentid") is not None
    return Text(id=id_at(sentence, "sentid") if has_id else fallback_id, text=text_at(sentence, "raw"))


def _image(folders: list[Path], name: str, filename: str) -> ImageFile:
    """Look under `filepath/`, then for the bare name: many keep all COCO pictures in one folder."""
    try:
        return find_image(folders, name)
    except CvlmError:
        if name == filename:
            raise
        return find_image(folders, filename)


def _find(folder: Path) -> Path:
    files = sorted(folder.glob("dataset*.json"))
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise CvlmError(f"{folder} must hold one dataset*.json, it has {listed}; give the file itself as the source")
    return files[0]


def _image_folders(folder: Path, given: Path | None) -> list[Path]:
    if given is not None:
        if not given.is_dir():
            raise CvlmError(f"the folder of images {given} does not exist")
        return [given]
    below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "images")
    return [folder / "images", folder, *below]


def _count(image: Any) -> int:
    sentences = image.get("sentences") if isinstance(image, dict) else None
    return len(sentences) if isinstance(sentences, list) else 0
