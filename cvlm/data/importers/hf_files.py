"""Loading Hugging Face datasets: a folder of `save_to_disk`, parquet or arrow files, or a name on the hub."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvlm.data.importers.records import HUB
from cvlm.data.importers.tables import SPLIT_NAMES
from cvlm.data.shard_index import SourceFile
from cvlm.errors import CvlmError

_FILES = ("*.parquet", "*.arrow", "*.json")
_UNNAMED = "unnamed"
"""What files are loaded under whose names tell no split."""


def load(path: Path) -> tuple[dict[str | None, Any], list[SourceFile], str]:
    """Return data sets by split (None where none is named), what they were read from, and a name.

    Raises:
        CvlmError: the library is not installed, or cannot load this.
    """
    try:
        import datasets
    except ImportError as error:
        raise CvlmError("the format hf_datasets needs the package datasets: pip install 'cvlm[hf]'") from error
    name = str(path).removeprefix(HUB) if str(path).startswith(HUB) and not path.exists() else None
    files = [] if name is not None else _hashed(path)
    try:
        if name is not None:
            repository, config = ("/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None)
            loaded = datasets.load_dataset(repository, config)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(*_data_files(path))
        found = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split) if loaded.split else None: loaded}
        for dataset in found.values():
            dataset.data.validate(full=True)  # arrow trusts the offsets of a file that it maps into memory
    except CvlmError:
        raise
    except Exception as error:  # the library and arrow raise whatever a damaged file or a missing network leads to
        raise CvlmError(f"datasets cannot load {path}: {str(error) or type(error).__name__}") from error
    if name is not None:
        files = [_hub_entry(name, found)]
    parts = {SPLIT_NAMES.get(split, split) if split not in (None, _UNNAMED) else None: d for split, d in found.items()}
    if len(parts) < len(found):
        raise CvlmError(f"{path} has several splits that mean the same: {', '.join(map(str, found))}")
    return parts, files, name if name is not None else path.resolve().stem


def _data_files(path: Path) -> tuple[str, None, None, dict[str, list[str]]]:
    """Return the arguments of `load_dataset` for parquet or arrow files; splits by the first word of their names."""
    for kind in ("parquet", "arrow"):
        files = [path] if path.suffix == f".{kind}" and path.is_file() else sorted(path.rglob(f"*.{kind}"))
        by_split: dict[str, list[str]] = {}
        for file in files:
            words = [word.lower() for word in (*re.findall(r"[A-Za-z]+", file.stem)[:1], file.parent.name)]
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), _UNNAMED)
            by_split.setdefault(split, []).append(str(file))
        if by_split:
            return kind, None, None, by_split
    raise CvlmError(f"{path} holds neither what datasets.save_to_disk writes, nor *.parquet or *.arrow files")


def _hashed(path: Path) -> list[SourceFile]:
    files = [path] if path.is_file() else sorted(file for kind in _FILES for file in path.rglob(kind))
    entries = []
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = file.stat().st_size
        except OSError as error:
            raise CvlmError(f"cannot read {file}: {error.strerror}") from error
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        entries.append(SourceFile(name=name, bytes=size, sha256=digest))
    return entries


def _hub_entry(name: str, found: Mapping[str | None, Any]) -> SourceFile:
    """Stand for what the hub sent: its files with the checksums or revisions that the library noted."""
    facts = [(split, len(d), sorted((d.info.download_checksums or {}).items(), key=str)) for split, d in found.items()]
    return SourceFile(name=f"{HUB}{name}", bytes=0, sha256=hashlib.sha256(repr(facts).encode()).hexdigest())
