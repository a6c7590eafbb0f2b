"""Caption metrics through pycocoevalcap, COCO's official evaluation: BLEU, ROUGE-L, CIDEr; with Java METEOR and SPICE.

A caption is compared with all references of its picture. Every metric is given as one value per picture whose mean is
the official number, so that intervals and paired differences come out of the same bootstrap as everywhere else:

- CIDEr and ROUGE-L (and SPICE) are such means by definition.
- BLEU is one number over sums of counts. A picture's value is the score plus its influence on it: the derivative along
  the picture's counts. Resampling these values is the linearised bootstrap of the corpus score.
- METEOR is aggregated over a corpus by its own program. A picture's value is its own METEOR, all of them shifted so
  that the mean is the corpus score.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.caption_tokens import has_java, official_tokens, simple_tokens
from cvlm.data import Examples, captions_of_pictures
from cvlm.errors import CvlmError

logger = logging.getLogger(__name__)

Values = NDArray[np.float64]

PTB, SIMPLE = "Stanford's PTBTokenizer", "benchmarks.caption_tokens.simple_tokens"
_SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"


def caption_values(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = False
) -> dict[str, Values]:
    """Score captions.

    Args:
        captions: one per picture ``[n]``.
        references: what people wrote about each picture ``[n]``, at least one each.
        java: also METEOR and SPICE, as far as this machine can run them; they take half a minute and more.

    Returns:
        Metric -> value per picture ``[n]``; the metric is their mean. ``cider`` runs from 0 to 10: papers print it
        times 100. The others run from 0 to 1.

    Raises:
        CvlmError: If pycocoevalcap is not installed.
        ValueError: If the lengths differ, there is no picture, or one has no reference.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(f"{len(captions)} captions need as many lists of references ({len(references)}), none empty")
    check_installed()
    words, truths = tokenize(captions, references)
    return values_of_tokens(words, truths) | (_java_values(words, truths) if java else {})


def values_of_tokens(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Values]:
    """Score tokens (a space between them) with the metrics that need no Java; see `caption_values`."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, said = _by_picture(captions, references)
    return {
        "cider": np.asarray(Cider().compute_score(given, said)[1], dtype=np.float64),
        "rouge_l": np.asarray(Rouge().compute_score(given, said)[1], dtype=np.float64),
        **bleu_values(captions, references),
    }


def bleu_values(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Values]:
    """Return ``bleu_1`` to ``bleu_4``: the corpus BLEU plus each picture's influence on it ``[n]``.

    With sums over pictures of correct and guessed n-grams c_k, g_k, lengths l and closest reference lengths r,
    ``log BLEU-K = mean over k <= K of log(c_k / g_k) + min(0, 1 - r / l)`` (Papineni et al. 2002). A score of 0 has no
    derivative, and no picture has any influence.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for caption, truths in zip(captions, references, strict=True):
        scorer += (caption, truths)
    scores, _ = scorer.compute_score(option="closest")
    correct, guess = (np.array([one[key] for one in scorer.ctest], dtype=np.float64) for key in ("correct", "guess"))
    length = guess[:, 0]
    reference = np.array(
        [min((abs(r - n), r) for r in one["reflen"])[1] for one, n in zip(scorer.ctest, length, strict=True)]
    )
    n = len(captions)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = n * (correct / correct.sum(0) - guess / guess.sum(0))
        short = reference.sum() / length.sum()
        brevity = -n * short * (reference / reference.sum() - length / length.sum()) * (short > 1)
    values = {}
    for k in range(1, 5):
        influence = gains[:, :k].mean(1) + brevity if correct[:, :k].sum(0).all() else np.zeros(n)
        values[f"bleu_{k}"] = scores[k - 1] * (1 + influence)
    return values


def tokenize(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return captions and references as tokens with a space between them, by the tokenizer that this machine has."""
    lines = [*captions, *(reference for truths in references for reference in truths)]
    tokens = iter(official_tokens(lines) if has_java() else map(simple_tokens, lines))
    return [next(tokens) for _ in captions], [[next(tokens) for _ in truths] for truths in references]


def check_installed() -> None:
    """Refuse to go on without pycocoevalcap.

    Raises:
        CvlmError: It is not installed.
    """
    if find_spec("pycocoevalcap") is None:
        raise CvlmError("caption metrics come from pycocoevalcap, which is not installed; pip install 'cvlm[caption]'")


def caption_definitions() -> dict[str, str]:
    """Return metric -> what it is, the tokenizer of this machine included."""
    tokens = f"tokens of {PTB if has_java() else SIMPLE}; pycocoevalcap"
    bleu = {
        f"bleu_{k}": f"corpus BLEU-{k} with the closest reference length (Papineni et al. 2002)" for k in range(1, 5)
    }
    kinds = {
        "cider": "CIDEr-D, 0 to 10: papers print it times 100 (Vedantam et al. 2015)",
        "rouge_l": "ROUGE-L with beta 1.2 (Lin 2004)",
        **bleu,
        "meteor": "METEOR 1.5 of the corpus (Denkowski & Lavie 2014)",
        "spice": "mean SPICE F-score (Anderson et al. 2016)",
    }
    return {name: f"{what}; {tokens}" for name, what in kinds.items()}


def shown_captions(examples: Examples, captions: Sequence[str]) -> list[dict[str, Any]]:
    """Return ``{"caption", "references", "ids"}`` of each picture, for people to read; the ids are the references'."""
    ids: dict[int, list[str]] = {}
    for picture, name in zip(examples.image_of.tolist(), examples.ids, strict=False):
        ids.setdefault(picture, []).append(name)
    return [
        {"caption": captions[picture], "references": references, "ids": ids.get(picture, [])}
        for picture, references in captions_of_pictures(examples).items()
    ]


def _by_picture(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[int, Any], dict[int, Any]]:
    return dict(enumerate(map(list, references))), {picture: [caption] for picture, caption in enumerate(captions)}


def _java_values(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Values]:
    """Run METEOR and SPICE as far as they can run here; what is left out is logged once, with the reason."""
    if not has_java():
        _note("METEOR and SPICE are left out: they need Java, and there is no program 'java'")
        return {}
    values = {}
    for name, run in (("meteor", _meteor), ("spice", _spice)):
        try:
            found = run(*_by_picture(captions, references))
        except (OSError, ValueError, SubprocessError, CvlmError) as error:
            _note(f"{name.upper()} is left out: {error}")
        else:
            values[name] = found
    return values


def _meteor(given: dict[int, Any], said: dict[int, Any]) -> Values:
    from pycocoevalcap.meteor.meteor import Meteor

    # Fields of the program's protocol are set apart by |||.
    given = {picture: [truth.replace("|||", "") for truth in truths] for picture, truths in given.items()}
    scorer = Meteor()
    try:
        score, each = scorer.compute_score(given, said)
    except (OSError, ValueError) as error:
        raise CvlmError(f"its program stopped ({error})") from error
    finally:
        if scorer.lock.locked():  # its destructor waits for the lock, which an error leaves closed
            scorer.lock.release()
    return np.asarray(each) - np.mean(each) + score


def _spice(given: dict[int, Any], said: dict[int, Any]) -> Values:
    from pycocoevalcap.spice import spice

    # The package would fetch 400 MB from Stanford; scoring downloads nothing by itself.
    if not (Path(spice.__file__).parent / "lib" / _SPICE_MODELS).is_file():
        raise CvlmError(
            "its language models are missing; python -m pycocoevalcap.spice.get_stanford_models fetches them"
        )
    _, each = spice.Spice().compute_score(given, said)
    values = np.array([one["All"]["f"] for one in each], dtype=np.float64)
    if not np.isfinite(values).all():
        raise CvlmError(f"it gave {np.count_nonzero(~np.isfinite(values))} captions no score")
    return values


@lru_cache
def _note(text: str) -> None:
    logger.warning("%s", text)
