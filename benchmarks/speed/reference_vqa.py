"""The loop of the official VQA evaluation tool (GT-Vision-Lab/VQA, vqaEval.py), ported as directly as Python 3 allows.

It is what `benchmarks.metrics.vqa_accuracies` is timed beside and compared with, so nothing here is made faster. The
word tables are those of `cvlm.data.vqa_answers`. Left out: the progress bar on the terminal and the tables per
question type and answer type.
"""

import re
from collections.abc import Mapping
from typing import Any

from cvlm.data.vqa_answers import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

_COMMA_STRIP = re.compile(r"(\d)(\,)(\d)")
_PERIOD_STRIP = re.compile(r"(?!<=\d)(\.)(?!\d)")


def evaluate(gts: Mapping[int, Any], res: Mapping[int, Any]) -> list[float]:
    """Return each question's accuracy, a fraction; rewrites the answers in place, as the tool does.

    Args:
        gts: question id -> official annotation, with ``answers`` as a list of ``{"answer": ...}``.
        res: question id -> result, with ``answer``.
    """
    accuracies = []
    for question in gts:
        answers = gts[question]["answers"]
        for answer in answers:
            answer["answer"] = _clean(answer["answer"])
        given = _clean(res[question]["answer"])
        if len({answer["answer"] for answer in answers}) > 1:
            for answer in answers:
                answer["answer"] = _process_digit_article(_process_punctuation(answer["answer"]))
            given = _process_digit_article(_process_punctuation(given))
        turns = []
        for left_out in answers:
            others = [item for item in answers if item != left_out]
            matching = [item for item in others if item["answer"] == given]
            turns.append(min(1, float(len(matching)) / 3))
        accuracies.append(float(sum(turns)) / len(turns))
    return accuracies


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _process_punctuation(text: str) -> str:
    out = text
    for mark in PUNCTUATION:
        if (mark + " " in text or " " + mark in text) or re.search(_COMMA_STRIP, text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return _PERIOD_STRIP.sub("", out, int(re.UNICODE))


def _process_digit_article(text: str) -> str:
    out = []
    for word in text.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ARTICLES:
            out.append(word)
    for position, word in enumerate(out):
        if word in CONTRACTIONS:
            out[position] = CONTRACTIONS[word]
    return " ".join(out)
