"""The model that CVLM builds, and how it is stored."""

from cvlm.model.cvlm import CVLM, Inputs, take
from cvlm.model.storage import compose, load_model, save_model

__all__ = ["CVLM", "Inputs", "compose", "load_model", "save_model", "take"]
