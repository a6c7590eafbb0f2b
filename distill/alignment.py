"""Bring attention maps and states of unlike models onto common units: words for text, a common grid for images.

Teacher and student differ in tokenizer, patch grid, head count and depth. Every map here keeps rows summing to one,
and neither padding nor special tokens enter either side.
"""

from functools import lru_cache

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout

LayerMap = str | list[tuple[int, int]]


def text_units(student: TextLayout, teacher: TextLayout) -> tuple[Tensor, Tensor]:
    """Cut each text into the smallest pieces on whose ends both tokenizers agree: words, or parts of words.

    A unit ends where a token of the student and a token of the teacher end at the same character. Identical
    tokenizers therefore meet token by token. Tokens behind the last common end (one side was cut shorter) belong to
    no unit, like special tokens and padding.

    Returns:
        Membership of the student's and the teacher's tokens, `[b, units, n]` of zeros and ones each, with the same
        number of units; rows of units that an example does not have are all zero on both sides.
    """
    s_end, t_end = student.spans[..., 1], teacher.spans[..., 1]
    common = (s_end[:, :, None] == t_end[:, None, :]) & student.words[:, :, None] & teacher.words[:, None, :]
    # Several tokens may end at one character (a character of several bytes): count each common end once.
    same_end = (s_end[:, :, None] == s_end[:, None, :]) & student.words[:, None, :]
    first = torch.ones_like(same_end).tril(-1).logical_and(same_end).any(-1).logical_not()
    ends = common.any(-1) & first
    count = ends.sum(-1)
    units = max(int(count.max()), 1) if count.numel() else 1

    def members(end: Tensor, words: Tensor) -> Tensor:
        index = (ends[:, None, :] & (s_end[:, None, :] < end[:, :, None])).sum(-1)
        inside = words & (index < count[:, None])
        one_hot = torch.nn.functional.one_hot(index.clamp_max(units - 1), units)
        return (one_hot * inside[..., None]).transpose(1, 2).float()

    return members(s_end, student.words), members(t_end, teacher.words)


@lru_cache(maxsize=64)
def grid_overlap(source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Share of every source cell's area that falls into each target cell, both grids covering the same picture.

    Returns:
        `[target cells, source cells]`, row-major; every column sums to one, so mass is conserved.
    """

    def axis(source_n: int, target_n: int) -> Tensor:
        source_edges = torch.arange(source_n + 1, dtype=torch.float64) / source_n
        target_edges = torch.arange(target_n + 1, dtype=torch.float64) / target_n
        low = torch.maximum(source_edges[None, :-1], target_edges[:-1, None])
        high = torch.minimum(source_edges[None, 1:], target_edges[1:, None])
        return (high - low).clamp_min(0) * source_n

    return torch.kron(axis(source[0], target[0]), axis(source[1], target[1])).float()


def image_units(student: ImageLayout, teacher: ImageLayout) -> tuple[Tensor, Tensor]:
    """Put both patch grids on the coarser common grid by area; special tokens belong nowhere.

    Returns:
        Area shares of the student's and the teacher's tokens, `[cells, n_image]` each.
    """
    common = (min(student.grid[0], teacher.grid[0]), min(student.grid[1], teacher.grid[1]))

    def shares(layout: ImageLayout) -> Tensor:
        overlap = grid_overlap(layout.grid, common)
        return torch.cat([overlap.new_zeros(overlap.shape[0], layout.special), overlap], dim=1)

    return shares(student), shares(teacher)


def align_attention(attention: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Express attention between tokens as attention between units.

    The mass of a unit's keys is summed, the rows of a unit's queries are averaged, and each row is scaled back to one
    because keys without a counterpart (special tokens) took part of it.

    Args:
        attention: `[b, q, k]`, or head by head `[b, h, q, k]`.
        queries: `[b, u, q]` or `[u, q]` shares of query tokens in units.
        keys: `[b, v, k]` or `[v, k]` shares of key tokens in units.

    Returns:
        `[b, u, v]` (`[b, h, u, v]`) with rows that sum to one, and `[b, u]` (`[b, h, u]`) True where a row exists.
    """
    queries, keys = queries.to(attention), keys.to(attention)
    if attention.dim() == 4:
        queries, keys = (units[:, None] if units.dim() == 3 else units for units in (queries, keys))
    mass = queries @ attention @ keys.transpose(-1, -2)
    total = mass.sum(-1, keepdim=True)
    tiny = torch.finfo(attention.dtype).tiny
    return mass / total.clamp_min(tiny), (total.squeeze(-1) > tiny)


def average_units(states: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Average token states `[b, n, d]` within units `[b, u, n]`; returns `[b, u, d]` and which units have tokens."""
    units = units.to(states)
    size = units.sum(-1, keepdim=True)
    return units @ states / size.clamp_min(1), size.squeeze(-1) > 0


def check_layers(layers: LayerMap) -> None:
    """Refuse what is no layer map at all, before any depth is known.

    Raises:
        DistillError: neither `last` nor `uniform` nor a list of pairs of whole numbers.
    """
    if isinstance(layers, str):
        fits = layers in ("last", "uniform")
    else:
        fits = isinstance(layers, list | tuple) and len(layers) > 0 and all(_is_pair(pair) for pair in layers)
    if not fits:
        raise DistillError(f"layers is {layers!r}; use last, uniform, or pairs such as [[0, 1], [1, 3]]")


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(layer, int) for layer in pair)


def resolve_layers(layers: LayerMap, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Turn a layer map into (student layer, teacher layer) pairs, counted from 0; embeddings are no layer.

    Args:
        layers: `last`; `uniform`, which spreads the student's layers evenly over the teacher's and ends at both last
            ones; or explicit pairs, negative numbers counting from the end.
        student_depth: number of the student's layers.
        teacher_depth: number of the teacher's layers.

    Raises:
        DistillError: the map is unknown or names a layer that does not exist, or a side has no layers.
    """
    check_layers(layers)
    if student_depth < 1 or teacher_depth < 1:
        raise DistillError(f"both need a fusion layer; the student has {student_depth}, the teacher {teacher_depth}")
    if layers == "last":
        layers = [(-1, -1)]
    elif layers == "uniform":
        layers = [(i, (i + 1) * teacher_depth // student_depth - 1) for i in range(student_depth)]
        if teacher_depth < student_depth:
            layers = [((i + 1) * student_depth // teacher_depth - 1, i) for i in range(teacher_depth)]
    assert not isinstance(layers, str)
    pairs = []
    for student, teacher in layers:
        for side, layer, depth in (("student", student, student_depth), ("teacher", teacher, teacher_depth)):
            if not -depth <= layer < depth:
                raise DistillError(f"layer {layer} of the {side} does not exist; it has {depth} fusion layer(s)")
        pairs.append((student % student_depth, teacher % teacher_depth))
    return pairs
