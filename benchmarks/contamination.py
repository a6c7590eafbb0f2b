"""The contamination guard: was a model, or its teacher, trained on what it is scored on?

The same file, or the same id with the same wording, is a hit, and its number is refused. Pictures that merely look
alike are counted and never refused: the hash is coarse, and simple pictures share it without being copies.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cvlm.data import Examples, Picture
from cvlm.data.training_record import look_of, picture_digests, text_digests
from cvlm.errors import CvlmError
from cvlm.lineage import TrainingRecord
from cvlm.progress import Progress

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """What the scored split shares with the training data.

    Attributes:
        pictures: pictures of the split whose file was trained on.
        texts: pairs of the split whose id and wording were trained on.
        looks: pictures of the split, same files included, whose perceptual hash equals that of a training picture;
            None where that was not compared.
        examples: names of the first hits.
        trained_on: `data (split)` of everything that was compared.
        unknown: what the model learned from without a record.
    """

    pictures: int
    texts: int
    looks: int | None
    examples: tuple[str, ...]
    trained_on: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`contaminated`, `clean`, or `clean as far as recorded` where a teacher has no record."""
        if self.pictures or self.texts:
            return "contaminated"
        return "clean as far as recorded" if self.unknown else "clean"

    def as_json(self) -> dict[str, Any]:
        """Return the stamp that a result carries."""
        return {"verdict": self.verdict, **{name: _plain(value) for name, value in asdict(self).items()}}

    def describe(self, examples: Examples) -> str:
        """Say in one line what was found."""
        pictures, texts = f"{self.pictures:,} of {len(examples.pictures):,}", f"{self.texts:,} of {len(examples):,}"
        return (
            f"{pictures} pictures and {texts} texts of {examples.name} ({examples.split}) stand in the training data "
            f"({', '.join(self.trained_on)}), such as {', '.join(self.examples)}"
        )


def find_contamination(record: TrainingRecord, examples: Examples, progress: Progress | None = None) -> Contamination:
    """Compare a split with everything that a model was trained on; decodes its pictures for the perceptual hash."""
    looks = {look for source in record.sources for look in source.looks}
    alike = 0
    for done, picture in enumerate(examples.pictures if looks else (), start=1):
        alike += look_of(picture) in looks
        if progress is not None:
            progress(done, len(examples.pictures))
    pictures, texts, shown = _hits(
        {digest for source in record.sources for digest in source.pictures},
        {digest for source in record.sources for digest in source.texts},
        examples,
    )
    return Contamination(
        pictures=pictures,
        texts=texts,
        looks=alike if looks else None,
        examples=shown,
        trained_on=tuple(f"{source.data} ({source.split})" for source in record.sources),
        unknown=record.unknown,
    )


def shared_between(train: Examples, test: Examples) -> Contamination:
    """Compare two splits by file and by id; no picture is decoded."""
    files = {digest for picture in train.pictures for digest in picture_digests(picture)}
    pictures, texts, shown = _hits(files, set(text_digests(train)), test)
    named = (f"{train.name} ({train.split})",)
    return Contamination(pictures=pictures, texts=texts, looks=None, examples=shown, trained_on=named)


def refuse_contaminated(found: Contamination, examples: Examples, model: str) -> None:
    """Refuse a number that says nothing about new data.

    Raises:
        CvlmError: the split holds pictures or texts that the model was trained on.
    """
    if found.verdict == "contaminated":
        raise CvlmError(
            f"{model} is scored on what it was trained on: {found.describe(examples)}. Score it on other data, or "
            "print the number with a stamp: --allow-contaminated (in Python: allow_contaminated=True)"
        )


def _hits(files: set[str], texts: set[str], examples: Examples) -> tuple[int, int, tuple[str, ...]]:
    """Count pictures and pairs that were trained on, and name the first."""
    pictures = [picture for picture in examples.pictures if files.intersection(picture_digests(picture))]
    pairs = [place for place, digest in enumerate(text_digests(examples)) if digest in texts]
    names = [f"picture {_name(picture)}" for picture in pictures[:SHOWN]]
    names += [f"text {examples.ids[place]}" for place in pairs[: SHOWN - len(names)]]
    return len(pictures), len(pairs), tuple(names)


def _name(picture: Picture) -> str:
    path = getattr(picture, "path", None)
    return str(path.name) if path is not None else str(getattr(picture, "name", picture.key[:24]))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
