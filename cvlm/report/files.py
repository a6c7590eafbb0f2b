"""Reading the files of a run folder."""

import json
from pathlib import Path
from typing import Any

from cvlm.errors import CvlmError


def read_text(run_dir: Path, name: str) -> str:
    """Return the text of a file that the run folder must hold.

    Raises:
        CvlmError: If it is missing or cannot be read.
    """
    path = run_dir / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CvlmError(
            f"{path} is missing, and a report needs it. Is {run_dir} a run folder whose run has finished? "
            f"`cvlm run RECIPE.yaml --out {run_dir}` resumes it."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CvlmError(f"{path} cannot be read: {error}") from error


def read_json(run_dir: Path, name: str) -> dict[str, Any]:
    """Return the object of a JSON file that the run folder must hold.

    Raises:
        CvlmError: If it is missing, is no JSON, or holds no object.
    """
    try:
        content = json.loads(read_text(run_dir, name))
    except json.JSONDecodeError as error:
        raise CvlmError(f"{run_dir / name} is not valid JSON: {error}. Delete it and evaluate again.") from error
    if not isinstance(content, dict):
        raise CvlmError(f"{run_dir / name} must hold a JSON object, not a {type(content).__name__}")
    return content
