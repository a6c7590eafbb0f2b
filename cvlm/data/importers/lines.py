"""JSON lines and text files, read so that one bad line is one skip."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cvlm.errors import CvlmError


def decode_text(content: bytes, path: Path) -> str:
    """Decode UTF-8, with or without a byte-order mark.

    Raises:
        CvlmError: it is no UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CvlmError(f"{path} is not UTF-8 text: {error}") from error


def json_rows(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every line that is not blank; the value of a bad line is a `CvlmError`, not raised."""
    # No splitlines: it also breaks at characters that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path.name} line {number}", CvlmError(f"not JSON: {error}")


def good(row: Any) -> Any:
    """Return a row of `json_rows`, or raise what it holds instead."""
    if isinstance(row, CvlmError):
        raise row
    return row
