"""The units on which two signals meet: words or parts of words, and cells of a common patch grid."""

import torch
from torch import Tensor

from distill.alignment import image_units, text_units
from distill.errors import DistillError
from distill.signal import Signal


def common_text(kind: str, student: Signal, teacher: Signal, tokens: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return both sides' membership of text tokens in common units; see `distill.alignment.text_units`.

    Args:
        kind: name of the objective, for the message.
        student: its signal.
        teacher: its signal.
        tokens: number of text tokens of the student and of the teacher; where a layout is missing, they must be equal
            and tokens meet one by one.

    Raises:
        DistillError: a layout is missing and the numbers differ.
    """
    if student.text_layout is not None and teacher.text_layout is not None:
        return text_units(student.text_layout, teacher.text_layout)
    return _one_by_one(kind, tokens, "text")


def common_image(kind: str, student: Signal, teacher: Signal, tokens: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return both sides' shares of image tokens in cells of the common grid; otherwise as `common_text`."""
    if student.image_layout is not None and teacher.image_layout is not None:
        return image_units(student.image_layout, teacher.image_layout)
    return _one_by_one(kind, tokens, "image")


def _one_by_one(kind: str, tokens: tuple[int, int], modality: str) -> tuple[Tensor, Tensor]:
    if tokens[0] != tokens[1]:
        raise DistillError(
            f"objective {kind!r}: {tokens[0]} {modality} tokens of the student and {tokens[1]} of the teacher cannot "
            f"be aligned without a {modality}_layout on both signals"
        )
    identity = torch.eye(tokens[0])
    return identity, identity
