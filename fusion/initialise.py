"""Begin a fusion module with the weights of a teacher's multimodal encoder, wherever shapes match."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# transformers' FLAVA layers are pre-norm, like `MergedBlock`: part of our name -> part of theirs.
FLAVA_NAMES: dict[str, str] = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.output": "attention.output.dense",
    "mlp.0": "intermediate.dense",
    "mlp.3": "output.dense",
    "mlp_norm": "layernorm_after",
    "norm": "layernorm_before",
}


def flava_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the multimodal encoder of a transformers FLAVA state dict to the names of `Fusion(kind="merged")`.

    Args:
        state: `FlavaModel.state_dict()`, or that of its `multimodal_model`.
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("multimodal_model.")
        if name.startswith("layernorm."):
            renamed[name.replace("layernorm", "text_norm")] = renamed[name.replace("layernorm", "image_norm")] = tensor
        if not name.startswith("encoder.layer."):
            continue
        layer, _, rest = name.removeprefix("encoder.layer.").partition(".")
        for ours, theirs in FLAVA_NAMES.items():
            if rest.removeprefix(theirs) in (".weight", ".bias") and rest.startswith(theirs):
                renamed[f"blocks.{layer}.{ours}{rest.removeprefix(theirs)}"] = tensor
    return renamed


def initialise_fusion(fusion: nn.Module, source: Mapping[str, Tensor]) -> list[str]:
    """Copy every tensor of `source` whose name and shape `fusion` has; leave the rest as it is.

    Args:
        fusion: the module to write to.
        source: the state dict of another `Fusion`, or the result of `flava_names`.

    Returns:
        The names that were copied, in order; an empty list means that nothing matched.
    """
    own = fusion.state_dict()
    matching = [name for name, tensor in own.items() if name in source and source[name].shape == tensor.shape]
    with torch.no_grad():
        for name in matching:
            own[name].copy_(source[name])
    return matching
