"""The cheap check of picture files: whole ones pass without a decoder, whatever is damaged is left to it."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from cvlm.data import pixels
from cvlm.data.pixels import MAX_PIXELS, check
from cvlm.data.structure import whole
from cvlm.errors import CvlmError


def encoded(kind: str, size: tuple[int, int] = (61, 47), mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = {
    "jpeg": encoded("JPEG"),
    "grey jpeg": encoded("JPEG", mode="L"),
    "cmyk jpeg": encoded("JPEG", mode="CMYK"),
    "progressive jpeg": encoded("JPEG", progressive=True, optimize=True),
    "jpeg with restarts": encoded("JPEG", restart_marker_blocks=3),
    "jpeg with a comment": encoded("JPEG", comment=b"drawn", exif=b"Exif\0\0MM"),
    "jpeg with full colour": encoded("JPEG", subsampling=0, quality=100),
    "png": encoded("PNG"),
    "grey png": encoded("PNG", mode="L"),
    "png with a palette": encoded("PNG", mode="P"),
    "png with transparency": encoded("PNG", mode="RGBA"),
    "png of two colours": encoded("PNG", mode="1"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_whole_files_pass_without_a_decoder(name, monkeypatch):
    suffix = "jpg" if "jpeg" in name else "png"
    assert check(PICTURES[name], "x", "decode") == (suffix, (61, 47)), "the decoder agrees"
    monkeypatch.setattr(pixels, "_guarded", lambda *given: pytest.fail("the decoder was asked"))
    assert check(PICTURES[name], "x", "structure") == (suffix, (61, 47))


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_that_ends_early_never_passes(name):
    data = PICTURES[name]
    dice = random.Random(name)
    for end in {*range(40), len(data) - 1, len(data) - 2, *(dice.randrange(len(data)) for _ in range(200))}:
        assert whole(data[:end]) is None, end
    with pytest.raises(CvlmError, match="cannot decode"):
        check(data[: len(data) // 2], "x", "structure")


@pytest.mark.parametrize("name", PICTURES)
def test_what_passes_decodes_or_differs_in_compressed_data_alone(name):
    """Change single bytes: a file that passes has the size that it states, and nearly always decodes."""
    data, passed, failed = PICTURES[name], 0, 0
    dice = random.Random(name)
    for _ in range(300):
        changed = bytearray(data)
        changed[dice.randrange(min(len(data), 800))] = dice.randrange(256)
        found = whole(bytes(changed))
        if found is not None:
            passed += 1
            try:
                assert check(bytes(changed), "x", "decode") == found
            except CvlmError:
                failed += 1
    assert failed <= 0.02 * 300
    assert passed >= (1 if "jpeg" in name else 0)


def test_a_png_with_a_wrong_checksum_never_passes():
    data = PICTURES["png"]
    for place in range(8, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 1
        assert whole(bytes(changed)) is None, place


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP"])
def test_other_formats_are_decoded(kind):
    assert whole(encoded(kind)) is None
    assert check(encoded(kind), "x", "structure")[1] == (61, 47)


def test_no_scan_no_table_and_no_data_are_doubts():
    data = PICTURES["jpeg"]
    scan = data.index(b"\xff\xda")
    quantiser, codes = data.index(b"\xff\xdb"), data.index(b"\xff\xc4")
    first_scan_byte = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])
    length = int.from_bytes(data[quantiser + 2 : quantiser + 4])
    assert whole(data[:scan] + b"\xff\xd9") is None
    assert whole(data[:first_scan_byte] + b"\xff\xd9") is None
    assert whole(data[:quantiser] + data[quantiser + 2 + length :]) is None
    length = int.from_bytes(data[codes + 2 : codes + 4])
    assert whole(data[:codes] + data[codes + 2 + length :]) is None
    full = bytearray(data)
    full[codes + 5 : codes + 21] = b"\xff" * 16  # more codes than bits can tell apart
    assert whole(bytes(full)) is None


def test_a_bomb_is_refused_by_its_header():
    side = int(MAX_PIXELS**0.5) + 10
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert whole(buffer.getvalue()) == ("png", (side, side))
    with pytest.raises(CvlmError, match="pixels; more than"):
        check(buffer.getvalue(), "bomb", "structure")
