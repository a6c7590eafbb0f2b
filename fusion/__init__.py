"""Cross-modal fusion in pure torch: two streams, one stream, text-to-image, or none."""

from fusion.blocks import CrossAttention
from fusion.encoder import BLOCKS, Fusion, FusionOutput
from fusion.initialise import flava_names, initialise_fusion

__all__ = ["BLOCKS", "CrossAttention", "Fusion", "FusionOutput", "flava_names", "initialise_fusion"]
