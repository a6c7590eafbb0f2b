"""The model that CVLM builds, and how it is stored."""

from cvlm.model.cvlm import CVLM, Inputs, Projected, take
from cvlm.model.storage import compose, load_model, save_model
from cvlm.model.text_only import TextClassifier

__all__ = ["CVLM", "Inputs", "Projected", "TextClassifier", "compose", "load_model", "save_model", "take"]
