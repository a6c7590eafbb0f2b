"""Tiny random dual encoders, saved as the real classes save themselves."""

import json
from pathlib import Path

import torch
from conftest import wordpiece_tokenizer

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "hidden_size": 40}
VISION = {**TEXT, "hidden_size": 48, "image_size": 32, "patch_size": 8}
LENGTH = 20


def save_dual(folder: Path, kind: str) -> Path:
    """Save a `CLIP`, a `Siglip` or a `ChineseCLIP`."""
    import transformers

    text = {**TEXT, "vocab_size": 90, "max_position_embeddings": LENGTH, "eos_token_id": 3, "pad_token_id": 0}
    width = {} if kind == "Siglip" else {"projection_dim": 24}
    if kind == "Siglip":  # its two towers have one width, for there is no projection
        text |= {"hidden_size": 48, "projection_size": 48}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **width)
    torch.manual_seed(4)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    pictures = getattr(transformers, f"{kind}ImageProcessor")(size=size, do_center_crop=False)
    tokenizer = wordpiece_tokenizer()
    tokenizer.model_max_length = 1000  # as many a saved tokenizer has it; the model's positions are the limit
    getattr(transformers, f"{kind}Processor")(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_siglip2(folder: Path) -> Path:
    """Save a SigLIP 2 of the NaFlex kind, which cuts pictures of any shape into at most 16 patches."""
    import transformers

    sizes = {**TEXT, "hidden_size": 48}
    text = {**sizes, "vocab_size": 90, "max_position_embeddings": LENGTH, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**sizes, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config={**text, "projection_size": 48}, vision_config=vision)
    torch.manual_seed(6)
    model = transformers.Siglip2Model(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    pictures = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    tokenizer = wordpiece_tokenizer()
    transformers.Siglip2Processor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_open_clip(folder: Path) -> Path:
    """Save a CLIP of open_clip for `open_clip:local-dir:FOLDER`."""
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(5)
    model = open_clip.model.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "size": [64, 64]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
