"""CVLM: compositional vision-language models out of pretrained unimodal encoders.

Public names are loaded on first use, so that `import cvlm` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.runner import evaluate
    from cvlm.api import DistillResult, build, distill, load_teacher
    from cvlm.config import Recipe, load_recipe
    from cvlm.data import Examples, PictureFile, load_data
    from cvlm.encoders import Encoder, EncoderOutput
    from cvlm.errors import CvlmError
    from cvlm.model import CVLM
    from cvlm.tasks import TASKS
    from distill.layout import ImageLayout, TextLayout

__version__ = "0.1.0"

_HOMES = {
    "build": "cvlm.api",
    "distill": "cvlm.api",
    "load_teacher": "cvlm.api",
    "DistillResult": "cvlm.api",
    "evaluate": "benchmarks.runner",
    "CVLM": "cvlm.model",
    "TASKS": "cvlm.tasks",
    "Encoder": "cvlm.encoders",
    "EncoderOutput": "cvlm.encoders",
    "ImageLayout": "distill.layout",
    "TextLayout": "distill.layout",
    "Examples": "cvlm.data",
    "PictureFile": "cvlm.data",
    "load_data": "cvlm.data",
    "Recipe": "cvlm.config",
    "load_recipe": "cvlm.config",
    "CvlmError": "cvlm.errors",
}

__all__ = [
    "CVLM",
    "TASKS",
    "CvlmError",
    "DistillResult",
    "Encoder",
    "EncoderOutput",
    "Examples",
    "ImageLayout",
    "PictureFile",
    "Recipe",
    "TextLayout",
    "build",
    "distill",
    "evaluate",
    "load_data",
    "load_recipe",
    "load_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cvlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
