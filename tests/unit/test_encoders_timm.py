"""Vision encoders from timm: layouts, layers and sizes of each family, with random weights."""

import inspect

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from cvlm.config import VisionSpec
from cvlm.encoders import load_vision_encoder
from cvlm.encoders.timm_vision import TimmVision, create, picture_of
from cvlm.errors import CvlmError


def load(name: str, **settings: object) -> TimmVision:
    torch.manual_seed(0)
    spec = VisionSpec.model_validate({"name": f"timm:{name}", "pretrained": False, **settings})
    encoder = load_vision_encoder(spec)
    assert isinstance(encoder, TimmVision)
    return encoder


def swin(**settings: object) -> nn.Module:
    sizes = {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "img_size": 64, "window_size": 4, "num_classes": 0}
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **{**sizes, **settings})


@pytest.mark.parametrize(
    ("name", "size", "layer", "grid", "special", "width"),
    [
        ("test_vit", None, None, (10, 10), 1, 64),
        ("test_vit", 96, None, (6, 6), 1, 64),
        ("test_vit", 96, 2, (6, 6), 0, 64),
        ("test_vit_relpos", None, None, (10, 10), 0, 96),
        ("deit_tiny_distilled_patch16_224", 64, None, (4, 4), 2, 192),
        ("test_efficientnet", 96, None, (3, 3), 0, 256),
        ("test_efficientnet", 96, 0, (48, 48), 0, 16),
        ("test_efficientnet", 96, 3, (6, 6), 0, 48),
        ("test_efficientnet", 96, -2, (6, 6), 0, 48),
        ("test_mambaout", 96, None, (3, 3), 0, 64),
        ("test_resnet", 100, None, (4, 4), 0, 96),
        ("tf_efficientnet_lite0", 64, 3, (4, 4), 0, 112),
    ],
)
def test_layout(
    name: str, size: int | None, layer: int | None, grid: tuple[int, int], special: int, width: int
) -> None:
    encoder = load(name, image_size=size, layer=layer)
    prepared = encoder.prepare([Image.new("L", (30, 20), 90), Image.new("RGB", (70, 90), "red")])
    output = encoder(**prepared)
    assert output.layout.grid == grid
    assert output.layout.special == special
    assert output.tokens.shape == (2, output.layout.tokens, width)
    assert encoder.width == width
    assert output.mask.all()
    torch.testing.assert_close(output.pooled, output.tokens[:, special:].mean(dim=1))


def test_tokens_of_a_map_run_row_by_row() -> None:
    encoder = load("test_efficientnet", image_size=96, layer=3)
    pixels = torch.randn(2, 3, 96, 96)
    features = encoder.model.forward_intermediates(pixels, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(encoder(pixel_values=pixels).tokens[:, 7], features[:, :, 1, 1])


def test_channels_last_features_of_swin() -> None:
    model = swin()
    encoder = TimmVision(model, picture=picture_of(model, 64))
    pixels = torch.randn(2, 3, 64, 64)
    output = encoder(pixel_values=pixels)
    assert output.layout.grid == (8, 8)
    assert output.tokens.shape == (2, 64, 48)
    torch.testing.assert_close(output.tokens[:, 9], model.forward_features(pixels)[:, 1, 1])


def test_stage_of_swin() -> None:
    model = swin()
    encoder = TimmVision(model, picture=picture_of(model, 64), layer=0)
    assert encoder.width == 24
    assert encoder(pixel_values=torch.randn(1, 3, 64, 64)).layout.grid == (16, 16)


def test_oblong_pictures_have_oblong_grids() -> None:
    encoder = load("test_efficientnet", layer=3)
    assert encoder(pixel_values=torch.randn(1, 3, 64, 128)).layout.grid == (4, 8)


def test_an_early_layer_drops_the_rest_of_the_network() -> None:
    encoder = load("test_vit", layer=1)
    whole = create("test_vit", image_size=None, pretrained=False, num_classes=0)
    kept = {f"model.{name}" for name, _ in whole.named_parameters() if not name.startswith(("blocks.", "norm."))}
    kept |= {f"model.{name}" for name, _ in whole.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))}
    assert {name for name, _ in encoder.named_parameters()} == kept
    assert len(encoder.layers()) == 3


@pytest.mark.parametrize("name", ["test_vit4", "test_convnext", "test_efficientnet", "test_mambaout", "test_byobnet"])
@pytest.mark.parametrize("layer", [None, 1])
def test_every_parameter_matters_and_has_one_layer(name: str, layer: int | None) -> None:
    encoder = load(name, layer=layer, train="full")
    encoder(pixel_values=torch.randn(1, 3, 160, 160)).tokens.square().sum().backward()
    assert [key for key, item in encoder.named_parameters() if item.grad is None] == []
    listed = [key for group in encoder.layers() for key in group]
    assert sorted(listed) == sorted(dict(encoder.named_parameters()))


def test_last_layer_is_the_last_block_with_the_final_norm() -> None:
    names = load("test_vit").layers()[-1]
    assert {name.split(".")[1] for name in names} == {"blocks", "norm"}
    assert all(name.startswith(("model.blocks.5.", "model.norm.")) for name in names)


def test_same_names_at_every_construction() -> None:
    first, second = load("test_convnext", train="full"), load("test_convnext", train="frozen")
    assert list(first.state_dict()) == list(second.state_dict())


def test_a_misspelt_model_names_the_nearest() -> None:
    with pytest.raises(CvlmError, match=r"timm has no model 'vit_base_patch16_225' \(did you mean 'vit_base_patch16_2"):
        load("vit_base_patch16_225")


def test_an_unknown_weights_tag_is_one_readable_message() -> None:
    with pytest.raises(CvlmError, match=r"cannot load 'timm:test_vit\.nothing': Invalid pretrained tag"):
        load("test_vit.nothing", pretrained=True)


def test_an_unreachable_hub_is_one_readable_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CvlmError, match=r"cannot load 'timm:test_vit': Network is unreachable -- check") as caught:
        load("test_vit", pretrained=True)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("layer", [6, -7])
def test_a_layer_out_of_range_says_the_range(layer: int) -> None:
    with pytest.raises(CvlmError, match=rf"layer is {layer}, but VisionTransformer has 6 layers; use -6 to 5"):
        load("test_vit", layer=layer)


def test_an_impossible_size_is_refused_at_construction() -> None:
    with pytest.raises(CvlmError, match=r"cannot encode pixel_values \[1, 3, 100, 100\].*divisible by patch size"):
        load("test_vit", image_size=100)


def test_a_pooling_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(CvlmError, match=r"0 patch tokens form no grid.*layer: -1"):
        load("pit_ti_224")


def test_timm_is_imported_inside_functions_only() -> None:
    import cvlm.encoders.timm_vision as module

    head = inspect.getsource(module).split("def build")[0]
    assert "import timm" not in head
