"""Pictures of every mode arrive as the same normalised RGB tensor."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlm.encoders.pictures import PictureInput, to_rgb

PICTURE = PictureInput(height=16, width=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_values_are_normalised_per_channel() -> None:
    image = Image.new("RGB", (50, 40), (255, 51, 0))
    pixels = PICTURE.batch([image, image])
    assert pixels.shape == (2, 3, 16, 24)
    assert pixels.dtype == torch.float32
    expected = torch.tensor([(1.0 - 0.1) / 0.4, (0.2 - 0.2) / 0.5, (0.0 - 0.3) / 0.6])
    torch.testing.assert_close(pixels[0].mean(dim=(1, 2)), expected)


def test_exact_size_is_not_resampled() -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    plain = PictureInput(height=16, width=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = plain.batch([Image.fromarray(values)])
    torch.testing.assert_close(pixels[0], torch.from_numpy(values).permute(2, 0, 1) / 255.0)


def test_stretching_keeps_the_corners() -> None:
    image = Image.new("RGB", (100, 20), "black")
    image.paste("white", (80, 0, 100, 20))
    pixels = PICTURE.batch([image])
    assert pixels[0, 0, :, -1].min() > pixels[0, 0, :, 0].max() + 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA", "1", "YCbCr"])
def test_white_is_white_in_every_mode(mode: str) -> None:
    image = Image.new("RGB", (9, 7), "white").convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.asarray(to_rgb(image)).min() >= 254


def test_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((3, 2), (0, 0, 255, 255))
    values = np.asarray(to_rgb(image))
    assert values[2, 3].tolist() == [0, 0, 255]
    assert values[0, 0].tolist() == [255, 255, 255]


def test_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    image.info["transparency"] = 0
    values = np.asarray(to_rgb(image))
    assert values[0, 0].tolist() == [255, 255, 255]
    assert values[1, 1].tolist() == [200, 100, 50]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((8, 8), 32_768, dtype=np.uint16))
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [128, 128, 128]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        PICTURE.batch([])
