"""What the vision and the text encoders from transformers share: configuration, weights, and cutting at a layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.encoders.fetch import fetching
from cvlm.encoders.idle import Idle
from cvlm.encoders.partition import INPUT_SIDE, find_blocks, layer_index
from cvlm.errors import CvlmError

# Where AutoModel would build both towers, or does not know the tower: model type and modality -> class.
_TOWERS = {
    ("clip", "vision"): "CLIPVisionModel",
    ("clip", "text"): "CLIPTextModel",
    ("siglip", "vision"): "SiglipVisionModel",
    ("siglip", "text"): "SiglipTextModel",
    ("siglip_text_model", "text"): "SiglipTextModel",
}


def read_config(name: str) -> Any:
    """Read the configuration of a hub name or a local folder.

    Raises:
        CvlmError: the folder is missing, or the hub does not answer or know the name.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    # A hub name is `model` or `owner/model`: anything else can only be meant as a folder.
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise CvlmError(f"'hf:{name}': there is no folder {path}; give the folder that save_pretrained wrote")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CvlmError(f"'hf:{name}': the folder {path} holds no config.json; give the folder save_pretrained wrote")
    with fetching(f"hf:{name}"):
        return AutoConfig.from_pretrained(source_of(name))


def source_of(name: str) -> str:
    """Return what transformers should load: the expanded folder if it exists, else the hub name."""
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def load_model(name: str, config: Any, modality: str, pretrained: bool) -> nn.Module:
    """Build the network of one modality in float32, with its weights or, without `pretrained`, random ones.

    Raises:
        CvlmError: the model mixes modalities, or its weights are missing or incomplete.
    """
    import transformers

    tower = _TOWERS.get((config.model_type, modality))
    if tower is None and hasattr(config, "text_config" if modality == "vision" else "vision_config"):
        known = ", ".join(kind for kind, other in _TOWERS if other == modality)
        raise CvlmError(
            f"'hf:{name}' is a {config.model_type} model, which mixes modalities, and its {modality} tower alone is "
            f"not supported; use a {modality} model, or one of {known}"
        )
    factory: Any = getattr(transformers, tower) if tower else transformers.AutoModel
    with fetching(f"hf:{name}"):
        if not pretrained:
            inner = getattr(config, f"{modality}_config", config)
            return factory(inner).float() if tower else factory.from_config(inner, dtype=torch.float32)
        # The default type is the checkpoint's: half-precision weights would meet a float32 fusion.
        model, info = factory.from_pretrained(source_of(name), dtype=torch.float32, output_loading_info=True)
    # Checkpoints of language models lack the pooler, which no token needs.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise CvlmError(
            f"'hf:{name}': the checkpoint lacks {len(missing)} weights of {type(model).__name__}, for instance "
            f"{missing[0]}; it belongs to another architecture than its config.json says"
        )
    return model


def cut_after(model: Any, layer: int) -> str:
    """Remove the blocks behind a layer, and what stands behind the blocks.

    Returns:
        The name of the last block that is left.

    Raises:
        CvlmError: there is no such layer.
    """
    found = find_blocks(model)
    if found is None or not isinstance(found[1], nn.ModuleList):
        raise CvlmError(f"layer is {layer}, but {type(model).__name__} shows no list of blocks; leave layer unset")
    path, blocks = found
    index = layer_index(layer, len(blocks), model)
    model.set_submodule(path, nn.ModuleList(list(blocks)[: index + 1]))
    if getattr(model.config, "num_hidden_layers", None) == len(blocks):
        model.config.num_hidden_layers = index + 1
    # A final norm would be unused, and in a hierarchical network even of another width than the chosen stage.
    children = list(model.named_children())
    behind = [name for name, _ in children].index(path.split(".")[0]) + 1
    for name, child in children[behind:]:
        if any(True for _ in child.parameters()) and not INPUT_SIDE.search(name):
            setattr(model, name, Idle())
    return f"{path}.{index}"


def states_of(run: Callable[[], Any], block: nn.Module | None) -> Tensor:
    """Run a transformers model and return its last hidden state, or the raw output of one of its blocks.

    A hook instead of `output_hidden_states`: that list starts with the embeddings, ends on a normalised state, and
    keeps every layer in memory.
    """
    if block is None:
        states: Tensor = run().last_hidden_state
        return states
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(catch)
    try:
        run()
    finally:
        handle.remove()
    return caught[-1]
