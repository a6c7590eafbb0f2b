"""Vision encoders from transformers: tiny models saved to a folder, one per kind of output."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from cvlm.config import VisionSpec
from cvlm.encoders import load_vision_encoder
from cvlm.encoders.hf_vision import HfVision
from cvlm.errors import CvlmError

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56, "hidden_size": 40}
PLAIN = {**SIZES, "image_size": 64, "patch_size": 16}


def load(folder: Path, **settings: object) -> HfVision:
    encoder = load_vision_encoder(VisionSpec.model_validate({"name": f"hf:{folder}", **settings}))
    assert isinstance(encoder, HfVision)
    return encoder


def vit() -> PreTrainedModel:
    return ViTModel(ViTConfig(**PLAIN))


def dino() -> PreTrainedModel:
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            num_register_tokens=4,
        )
    )


def siglip() -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(**PLAIN))


def swin() -> PreTrainedModel:
    return SwinModel(
        SwinConfig(image_size=64, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4)
    )


def convnext() -> PreTrainedModel:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], image_size=64))


def resnet() -> PreTrainedModel:
    return ResNetModel(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic")
    )


@pytest.mark.parametrize(
    ("family", "size", "grid", "special", "width"),
    [
        (vit, None, (4, 4), 1, 40),
        (vit, 96, (6, 6), 1, 40),
        (dino, None, (4, 4), 5, 40),
        (dino, 84, (6, 6), 5, 40),
        (siglip, None, (4, 4), 0, 40),
        (swin, None, (8, 8), 0, 48),
        (convnext, None, (2, 2), 0, 40),
        (resnet, 96, (3, 3), 0, 40),
    ],
)
def test_layout_and_parameters(
    tmp_path: Path, family: type, size: int | None, grid: tuple[int, int], special: int, width: int
) -> None:
    torch.manual_seed(0)
    plain = family().eval()
    plain.save_pretrained(tmp_path)
    encoder = load(tmp_path, image_size=size, train="full")
    prepared = encoder.prepare([Image.new("RGB", (30, 20), "red"), Image.new("L", (70, 90), 90)])
    output = encoder(**prepared)
    assert (output.layout.grid, output.layout.special, encoder.width) == (grid, special, width)
    assert output.tokens.shape == (2, output.layout.tokens, width)
    torch.testing.assert_close(output.pooled, output.tokens[:, special:].mean(dim=1))
    if size is None:
        expected = plain(pixel_values=prepared["pixel_values"]).last_hidden_state
        expected = expected.flatten(2).transpose(1, 2) if expected.dim() == 4 else expected
        torch.testing.assert_close(output.tokens, expected)
    output.tokens.square().sum().backward()
    idle = [name for name, item in encoder.named_parameters() if item.grad is None and "mask_token" not in name]
    assert idle == []
    listed = [name for layer in encoder.layers() for name in layer]
    assert sorted(listed) == sorted(dict(encoder.named_parameters()))


def test_random_weights_have_the_same_names(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    assert list(load(tmp_path).state_dict()) == list(load(tmp_path, pretrained=False).state_dict())


def test_layer_is_the_raw_output_of_that_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = vit().eval()
    plain.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    encoder = load(tmp_path, layer=1)
    expected = plain(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(encoder(pixel_values=pixels).tokens, expected)
    assert len(encoder.layers()) == 3
    assert not [name for name, _ in encoder.named_parameters() if name.startswith("model.layernorm")]


@pytest.mark.parametrize(("family", "layer", "width"), [(resnet, 1, 24), (convnext, 2, 32)])
def test_stage_of_a_convolutional_model(tmp_path: Path, family: type, layer: int, width: int) -> None:
    family().save_pretrained(tmp_path)
    encoder = load(tmp_path, layer=layer, image_size=64)
    assert encoder.width == width
    assert len(encoder.layers()) == layer + 2


def test_vision_tower_of_a_clip_checkpoint(tmp_path: Path) -> None:
    text = CLIPTextConfig(**{**SIZES, "vocab_size": 50, "max_position_embeddings": 20, "eos_token_id": 2})
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**PLAIN).to_dict())).eval()
    whole.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    expected = whole.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixel_values=pixels).tokens, expected)
    # The norm behind the blocks serves the pooled output alone.
    assert not [name for name, _ in encoder.named_parameters() if "text" in name or "post_layernorm" in name]
    assert list(encoder.state_dict()) == list(load(tmp_path, pretrained=False).state_dict())


def test_processor_gives_mean_std_and_size(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    assert load(tmp_path).picture.mean == (0.5, 0.5, 0.5)
    ViTImageProcessor(
        size={"height": 96, "width": 96}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path)
    picture = load(tmp_path).picture
    assert (picture.height, picture.width) == (96, 96)
    assert (picture.mean, picture.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert load(tmp_path, image_size=80).picture.height == 80


def test_half_precision_checkpoints_are_read_in_float32(tmp_path: Path) -> None:
    vit().half().save_pretrained(tmp_path)
    assert {item.dtype for item in load(tmp_path).parameters()} == {torch.float32}


def test_a_size_below_one_patch_is_refused_at_construction(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(CvlmError, match=r"ViTModel cannot encode pixel_values \[1, 3, 8, 8\]|form no grid"):
        load(tmp_path, image_size=8)


def test_missing_folder_says_so() -> None:
    with pytest.raises(CvlmError, match=r"there is no folder /nowhere/at/all"):
        load(Path("/nowhere/at/all"))
