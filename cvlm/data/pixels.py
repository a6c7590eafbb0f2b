"""Picture files of unknown origin: what is refused, how they are decoded, and how two are found to look alike."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from cvlm.data.structure import whole
from cvlm.encoders.pictures import to_rgb
from cvlm.errors import CvlmError

MAX_PIXELS = 64_000_000
"""A larger picture is refused before it is decoded: a file of a few kilobytes can hold gigabytes of one colour."""

MAX_FILE_BYTES = 64 * 2**20
"""A larger picture file is refused before it is read."""

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Formats that are read, and the member suffix of each."""

MAX_NAME = 1000
"""Characters of a file name with its folders; a longer one is taken for damage."""

_PLAIN_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_FORMATS = tuple(name for name in SUFFIXES if name != "MPO")  # the JPEG reader finds MPO by itself

Check = Literal["structure", "decode"]
"""How a picture is checked: by the structure of its file where that leaves no doubt, or always by its decoder."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Shrink pictures at import; a picture that is small enough stays as it is, byte for byte.

    Attributes:
        shortest: largest allowed shorter side in pixels; None leaves it.
        longest: largest allowed longer side in pixels; None leaves it.
    """

    shortest: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        for name, side in (("shortest", self.shortest), ("longest", self.longest)):
            if side is not None and side < 8:
                raise CvlmError(f"the {name} side is {side} pixels; give at least 8")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size in pixels that a picture gets."""
        scale = 1.0
        if self.shortest is not None:
            scale = min(scale, self.shortest / min(width, height))
        if self.longest is not None:
            scale = min(scale, self.longest / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


def safe_name(name: str) -> str:
    """Return a relative file name that stays inside its folder.

    Raises:
        CvlmError: it is absolute, climbs out with `..`, or holds a character that no file name has.
    """
    if _PLAIN_NAME.fullmatch(name) and len(name) <= MAX_NAME:
        return name
    parts = PurePosixPath(name).parts
    bad = not parts or PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).drive) or ".." in parts
    if bad or "\0" in name or "\\" in name or len(name) > MAX_NAME or not _encodable(name):
        raise CvlmError(f"the file name {name[:200]!r} leaves its folder or is no file name; correct it in the data")
    return "/".join(parts)


def decode(data: bytes, where: str) -> Image.Image:
    """Decode picture bytes to RGB; what is transparent becomes white.

    Raises:
        CvlmError: not a picture of a known format, truncated, or above `MAX_PIXELS`; the text begins with `where`.
    """
    return _guarded(data, where, _as_rgb)


def check(data: bytes, where: str, how: Check = "decode") -> tuple[str, tuple[int, int]]:
    """Read a picture to its end without keeping it; returns its member suffix and its size in pixels.

    Raises:
        CvlmError: as `decode` does; `structure` does not notice wrong data that is complete.
    """
    found = whole(data) if how == "structure" and len(data) <= MAX_FILE_BYTES else None
    if found is not None:
        _check_pixels(found[1], where)
        return found

    def run(image: Image.Image) -> tuple[str, tuple[int, int]]:
        suffix, size = SUFFIXES[str(image.format)], image.size
        # A JPEG at an eighth of its size: every byte is still parsed, only the inverse transform is saved.
        image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
        image.load()
        return suffix, size

    return _guarded(data, where, run)


def shrink(data: bytes, where: str, resize: Resize, how: Check = "decode") -> tuple[str, bytes]:
    """Return suffix and bytes of a picture after `resize`; JPEG stays JPEG (quality 90), all else becomes PNG.

    Raises:
        CvlmError: as `decode` does.
    """
    suffix, size = check(data, where, how)
    target = resize.size(*size)
    if target == size:
        return suffix, data
    small = decode(data, where).resize(target, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if suffix == "jpg":
        small.save(buffer, "JPEG", quality=90)
        return "jpg", buffer.getvalue()
    small.save(buffer, "PNG")
    return "png", buffer.getvalue()


def perceptual_hash(image: Image.Image) -> int:
    """Return a 64-bit difference hash (dHash): equal for copies that were resized or saved again.

    A bit says whether a cell of a 9 x 8 grey miniature is brighter than its right neighbour.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, :-1] > small[:, 1:]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image  # nothing to convert: a copy would cost a tenth of decoding
    return to_rgb(image)


def _guarded(data: bytes, where: str, use: Callable[[Image.Image], T]) -> T:
    if len(data) > MAX_FILE_BYTES:
        raise CvlmError(f"{where}: {len(data):,} bytes; picture files above {MAX_FILE_BYTES:,} bytes are refused")
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than Pillow's warning, and warnings about odd metadata concern nobody here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_pixels(image.size, where)
                return use(image)
    except CvlmError:
        raise
    except Exception as error:
        # Pillow's readers raise whatever a damaged file makes them trip over: struct, zlib, index and key errors too.
        reason = "not a picture of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise CvlmError(f"{where}: cannot decode the picture: {reason or type(error).__name__}") from error


def _check_pixels(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise CvlmError(f"{where}: {size[0]} x {size[1]} pixels; more than {MAX_PIXELS:,} are refused")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
