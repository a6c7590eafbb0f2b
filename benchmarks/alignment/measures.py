"""What a student is asked: its answer, how far its attention is from the teacher's, and whether it finds the object."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tasks import answer_accuracy
from cvlm.data import Examples
from cvlm.model import CVLM
from cvlm.training import ModelInputs
from distill import Request, Signal
from distill.alignment import align_attention, grid_overlap, image_units, text_units

METRICS = ("accuracy", "divergence", "pointing", "mass_on_object")
NOUN = re.compile(r"\b(shape|circle|rectangle|triangle)\b")
"""Every question names the one object of its picture with one of these."""


def run_split(model: CVLM, inputs: ModelInputs, batch: int = 256) -> list[Signal]:
    """Return a model's logits and last cross-attention over a split, batch by batch."""
    request = Request(fields=frozenset({"logits", "text_to_image"}), attention_layers=frozenset({model.depth - 1}))
    model.eval()
    with torch.inference_mode():
        rows = np.arange(len(inputs.examples))
        return [model(**inputs.pairs(rows[i : i + batch]), request=request) for i in range(0, len(rows), batch)]


def measure(student: Sequence[Signal], teacher: Sequence[Signal], test: Examples) -> dict[str, NDArray[np.float64]]:
    """Return every metric of a model, one value per held-out pair.

    `accuracy`; `divergence`, KL from the teacher's to the student's attention under the true maps, the mean over words;
    `pointing`, 1 where the cell that the question's noun attends to most holds most of the object; `mass_on_object`,
    the noun's attention on cells that the object touches. Cells are those of the common grid.
    """
    logits = np.concatenate([signal.logits.numpy() for signal in student if signal.logits is not None])
    found: dict[str, list[Tensor]] = {name: [] for name in METRICS[1:]}
    shares, start = None, 0
    for own, other in zip(student, teacher, strict=True):
        assert own.image_layout is not None
        assert other.image_layout is not None
        grid = tuple(map(min, own.image_layout.grid, other.image_layout.grid))
        shares = object_shares(test, grid) if shares is None else shares
        pairs = np.arange(start, start := start + len(_last(own)))
        found["divergence"].append(divergence(own, other))
        looks = noun_attention(own, other, [test.texts[i] for i in test.text_of[pairs]])
        there = shares[test.image_of[pairs]]
        found["pointing"].append((looks.argmax(-1) == there.argmax(-1)).double())
        found["mass_on_object"].append((looks * (there > 0)).sum(-1).double())
    values = {name: torch.cat(parts).double().numpy() for name, parts in found.items()}
    return {"accuracy": answer_accuracy(test, logits.argmax(-1)), **values}


def divergence(student: Signal, teacher: Signal) -> Tensor:
    """Return KL(teacher || student) of aligned text-to-image attention, the mean over words `[b]`."""
    assert student.text_layout is not None
    assert student.image_layout is not None
    assert teacher.text_layout is not None
    assert teacher.image_layout is not None
    words = text_units(student.text_layout, teacher.text_layout)
    cells = image_units(student.image_layout, teacher.image_layout)
    (s, rows), (t, _) = (
        align_attention(_last(signal), words[side], cells[side]) for side, signal in enumerate((student, teacher))
    )
    kl = (t * (t.clamp_min(1e-8).log() - s.clamp_min(1e-8).log())).sum(-1)
    return (kl * rows).sum(-1) / rows.sum(-1)


def noun_attention(signal: Signal, other: Signal, texts: Sequence[str]) -> Tensor:
    """Return where the noun of each question looks on the grid that a signal shares with another `[b, cells]`."""
    assert signal.text_layout is not None
    assert signal.image_layout is not None
    assert other.image_layout is not None
    nouns = []
    for text in texts:
        match = NOUN.search(text)
        assert match is not None, f"no noun in {text!r}"
        nouns.append(match.span())
    start, end = torch.tensor(nouns).T[..., None]
    spans = signal.text_layout.spans
    inside = signal.text_layout.words & (spans[..., 0] < end) & (spans[..., 1] > start)
    cells = image_units(signal.image_layout, other.image_layout)[0]
    return align_attention(_last(signal), inside[:, None].float(), cells)[0][:, 0]


def object_shares(examples: Examples, grid: tuple[int, ...]) -> Tensor:
    """Return which share of each picture's object stands in each cell `[pictures, cells]`; the corner is background."""
    shares = []
    for picture in examples.pictures:
        pixels = np.asarray(picture.load()).astype(int)
        drawn = torch.from_numpy(np.abs(pixels - pixels[0, 0]).sum(-1) > 30).float()
        overlap = grid_overlap((drawn.shape[0], drawn.shape[1]), (grid[0], grid[1]))
        shares.append(overlap @ drawn.flatten() / drawn.sum())
    return torch.stack(shares)


def _last(signal: Signal) -> Tensor:
    """Return the last layer's text-to-image attention, the mean over heads `[b, t, i]`."""
    assert signal.text_to_image
    return signal.text_to_image[max(signal.text_to_image)].mean(1)


def measure_teacher(teacher: Sequence[Signal], student: Sequence[Signal], test: Examples) -> dict[str, Any]:
    """Return the teacher's means, and what attention that is spread evenly over the common grid scores."""
    values = measure(teacher, student, test)
    first, other = teacher[0].image_layout, student[0].image_layout
    assert first is not None
    assert other is not None
    grid = tuple(map(min, first.grid, other.grid))
    touched = (object_shares(test, grid)[test.image_of] > 0).double().mean(-1)
    even = {"pointing": 1 / (grid[0] * grid[1]), "mass_on_object": float(touched.mean())}
    names = ("accuracy", "pointing", "mass_on_object")
    return {"grid": list(grid), "teacher": {name: float(values[name].mean()) for name in names}, "even": even}
