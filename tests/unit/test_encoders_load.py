"""Names, tables, and what importing the room costs."""

import subprocess
import sys
from importlib import import_module

import pytest

from cvlm.config import TextSpec, VisionSpec
from cvlm.encoders import TEXT_SCHEMES, VISION_SCHEMES, Encoder, Scheme, load_text_encoder, load_vision_encoder
from cvlm.errors import CvlmError


@pytest.mark.parametrize("scheme", [*VISION_SCHEMES.values(), *TEXT_SCHEMES.values()])
def test_every_row_of_the_tables_points_at_a_factory(scheme: Scheme) -> None:
    module, function = scheme.factory.split(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("schemes", [VISION_SCHEMES, TEXT_SCHEMES])
def test_examples_carry_their_scheme(schemes: dict[str, Scheme]) -> None:
    assert all(scheme.example.startswith(f"{name}:") for name, scheme in schemes.items())


def test_encoders_keep_the_protocol() -> None:
    vision = load_vision_encoder(VisionSpec(name="timm:test_vit", pretrained=False))
    assert isinstance(vision, Encoder)
    assert not vision.training


def test_errors_name_the_way_out() -> None:
    with pytest.raises(CvlmError, match=r"unknown vision encoder scheme 'tim' \(did you mean 'timm'\?\)"):
        load_vision_encoder(VisionSpec(name="tim:x"))
    with pytest.raises(CvlmError, match=r"unknown text encoder scheme 'timm'.*Known: hf, open_clip, package"):
        load_text_encoder(TextSpec(name="timm:test_vit"))
    with pytest.raises(CvlmError, match=r"'resnet18' must read scheme:name, for instance 'timm:"):
        load_vision_encoder(VisionSpec(name="resnet18"))
    with pytest.raises(CvlmError, match=r"must read scheme:name, for instance 'hf:"):
        load_text_encoder(TextSpec(name="hf:"))
    with pytest.raises(CvlmError, match=r"'custom', which stands for an instance of your own"):
        load_text_encoder(TextSpec(name="custom"))


def test_importing_the_room_loads_no_model_library() -> None:
    code = "import sys, cvlm.encoders; print(sorted({'timm', 'transformers', 'open_clip'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
