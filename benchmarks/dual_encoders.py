"""CLIP-like models that CVLM did not build, opened to be scored: the dual encoders that teach, and any other type."""

from PIL import Image

from cvlm.errors import CvlmError
from distill.errors import DistillError
from distill.teachers.dual_encoders import DualEncoder, OpenClipDualEncoder, TransformersDualEncoder
from distill.teachers.transformers_common import read_config


def open_dual_encoder(library: str, name: str, device: str) -> DualEncoder:
    """Load a dual encoder and try it on a blank picture and a word.

    Args:
        library: `hf` for a transformers model with `get_image_features` and `get_text_features`, or `open_clip`.
        name: a hub name or a folder; of open_clip `MODEL/WEIGHTS`, `local-dir:FOLDER` or `hf-hub:NAME`.
        device: where it runs.

    Raises:
        CvlmError: there is no such model, it is no dual encoder, or weights or its processor are missing.
    """
    try:
        encoder: DualEncoder = OpenClipDualEncoder(name) if library == "open_clip" else _of_transformers(name)
        encoder.to(device)
        encoder.embed_images([Image.new("RGB", (64, 64))])
        encoder.embed_texts(["a"])
    except DistillError as error:
        raise CvlmError(str(error)) from error
    return encoder


def _of_transformers(name: str) -> TransformersDualEncoder:
    from transformers import AutoModel

    source, config = read_config(name, example="openai/clip-vit-base-patch32")
    kind = AutoModel._model_mapping.get(type(config), None)
    if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
        raise CvlmError(
            f"'hf:{name}' is a model of type {config.model_type!r}, which embeds not both pictures and texts; give "
            "a dual encoder (clip, siglip, align, chinese_clip, ...), or wrap the model yourself: module:callable"
        )
    return TransformersDualEncoder(source, config)
