"""What an import holds: lengths, question types, and a contact sheet. Counts and coverage stand in its index."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cvlm.data.shard_index import read_folder_index
from cvlm.data.shards import ShardReader

TILE, CAPTION, COLUMNS, ROWS = 160, 56, 5, 4


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split.

    Attributes:
        words: 5th, 50th and 95th percentile and largest number of words per question or caption.
        per_picture: mean number of questions or captions.
        types: question type -> number, the most frequent first.
        answer_types: answer type -> number, likewise.
        answers: answer -> number, likewise.
    """

    split: str
    words: tuple[int, int, int, int]
    per_picture: float
    types: dict[str, int]
    answer_types: dict[str, int]
    answers: dict[str, int]


def summarise(folder: Path) -> list[SplitSummary]:
    """Read every text of an import.

    Raises:
        CvlmError: there is no import, or it was changed.
    """
    index = read_folder_index(folder)
    return [_summary(ShardReader(folder, split, index)) for split in index.splits]


def _summary(reader: ShardReader) -> SplitSummary:
    texts = [text for position in range(len(reader)) for text in reader.record(position)["texts"]]
    words = np.array([len(text["text"].split()) for text in texts] or [0])
    low, middle, high = (int(value) for value in np.percentile(words, (5, 50, 95), method="nearest"))
    counts = [
        dict(Counter(text[field] for text in texts if text.get(field)).most_common())
        for field in ("type", "answer_type", "answer")
    ]
    return SplitSummary(
        split=reader.split,
        words=(low, middle, high, int(words.max())),
        per_picture=len(texts) / max(len(reader), 1),
        types=counts[0],
        answer_types=counts[1],
        answers=counts[2],
    )


def contact_sheet(folder: Path) -> Image.Image:
    """Draw twenty pictures, spread evenly over all splits, each with its first text.

    Raises:
        CvlmError: there is no import, or it was changed.
    """
    index = read_folder_index(folder)
    readers = [ShardReader(folder, split, index) for split in index.splits]
    places = [(reader, position) for reader in readers for position in range(len(reader))]
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, COLUMNS * ROWS).astype(int))]
    sheet = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (reader, position) in enumerate(chosen):
        left, top = number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)
        image = reader.picture(position).load()
        image.thumbnail((TILE - 8, TILE - 8))
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        first = reader.record(position)["texts"][0]
        label = _wrap(f"{reader.split}: {first['text']}", f" {first['answer']}" if first.get("answer") else "")
        draw.multiline_text((left + 6, top + TILE), label, fill="black", font=font, spacing=2)
    return sheet


def _wrap(text: str, answer: str) -> str:
    lines: Sequence[str] = textwrap.wrap(text + answer, 26, max_lines=3, placeholder=" ...")
    return "\n".join(lines)
