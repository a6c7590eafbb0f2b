"""Encoders: one vision and one text tower behind one small protocol. `cvlm list encoders` prints the two tables."""

from cvlm.encoders.base import Encoder, EncoderOutput
from cvlm.encoders.fingerprint import fingerprint
from cvlm.encoders.load import TEXT_SCHEMES, VISION_SCHEMES, Scheme, load_text_encoder, load_vision_encoder
from cvlm.encoders.partition import is_frozen, keep_frozen_in_eval, set_trainable

__all__ = [
    "TEXT_SCHEMES",
    "VISION_SCHEMES",
    "Encoder",
    "EncoderOutput",
    "Scheme",
    "fingerprint",
    "is_frozen",
    "keep_frozen_in_eval",
    "load_text_encoder",
    "load_vision_encoder",
    "set_trainable",
]
