"""How much of two models meets on common units: what alignment keeps, before anything is trained."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.alignment import align_attention, image_units, text_units
from distill.layout import ImageLayout, TextLayout
from distill.signal import Signal


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How a student's tokens meet a teacher's.

    Attributes:
        student_tokens: word tokens of the student per text, on average.
        teacher_tokens: of the teacher.
        units: common pieces of text per text, on average.
        student_share: share of the student's word tokens that stand in a unit.
        teacher_share: of the teacher's.
        grid: rows and columns that both patch grids are brought to; None without an image layout.
        attention: direction -> share of the teacher's attention mass on keys that have a counterpart, averaged over
            the query units. The rest lies on special tokens and on words that only the teacher reads; aligned rows are
            scaled back to one.
    """

    student_tokens: float
    teacher_tokens: float
    units: float
    student_share: float
    teacher_share: float
    grid: tuple[int, int] | None
    attention: dict[str, float] = field(default_factory=dict)


def coverage(student_text: TextLayout, student_image: ImageLayout, teacher: Signal) -> Coverage:
    """Measure what alignment keeps of a batch.

    Args:
        student_text: spans of the student's tokens `[b, n_text, 2]`.
        student_image: the student's patch grid.
        teacher: the teacher's signal of the same batch; the last recorded layer of its attention counts.

    Raises:
        ValueError: the teacher gave no text layout.
    """
    if teacher.text_layout is None:
        raise ValueError("the teacher's signal has no text layout; nothing can be aligned")
    units_s, units_t = text_units(student_text, teacher.text_layout)
    cells_t = image_units(student_image, teacher.image_layout)[1] if teacher.image_layout is not None else None
    grid = None
    if teacher.image_layout is not None:
        a, b = student_image.grid, teacher.image_layout.grid
        grid = (min(a[0], b[0]), min(a[1], b[1]))
    attention = {}
    for direction, layers in (("text_to_image", teacher.text_to_image), ("image_to_text", teacher.image_to_text)):
        if layers and cells_t is not None:
            last = layers[max(layers)].float().mean(1)
            sides = (units_t, cells_t) if direction == "text_to_image" else (cells_t, units_t)
            attention[direction] = _kept_mass(last, *sides)
    return Coverage(
        student_tokens=_mean_count(student_text.words),
        teacher_tokens=_mean_count(teacher.text_layout.words),
        units=_mean_count(units_t.sum(-1) > 0),
        student_share=float(units_s.sum() / student_text.words.sum().clamp_min(1)),
        teacher_share=float(units_t.sum() / teacher.text_layout.words.sum().clamp_min(1)),
        grid=grid,
        attention=attention,
    )


def _kept_mass(attention: Tensor, queries: Tensor, keys: Tensor) -> float:
    """Return the share of `[b, q, k]` that lies on keys in units, averaged over the query units that exist."""
    queries = queries / queries.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    exists = align_attention(attention, queries, keys)[1]
    mass = (queries @ attention @ keys.transpose(-1, -2)).sum(-1)
    return float(mass[exists].mean()) if bool(exists.any()) else 0.0


def _mean_count(flags: Tensor) -> float:
    return float(flags.sum(-1).float().mean())
