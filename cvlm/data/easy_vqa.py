"""easy-VQA (Zhou 2020): questions about one coloured shape, with an official split, from its PyPI package."""

from pathlib import Path

import numpy as np

from cvlm.config import EasyVqaData
from cvlm.data.examples import Examples, PictureFile, Splits, index_texts
from cvlm.errors import CvlmError

ANSWER_TYPES = {
    **dict.fromkeys(("yes", "no"), "yes/no"),
    **dict.fromkeys(("circle", "rectangle", "triangle"), "shape"),
}


def load(spec: EasyVqaData) -> Splits:
    """Load the official splits; 38,575 training and 9,673 test questions, 13 answers.

    Raises:
        CvlmError: the package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise CvlmError("data kind 'easy_vqa' needs the package easy-vqa: pip install 'cvlm[demo]'") from error
    answers = tuple(easy_vqa.get_answers())
    train = _split("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), answers)
    test = _split("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), answers)
    return Splits(train=train.limit(spec.limit), test=test.limit(spec.limit))


def _split(
    split: str, columns: tuple[list[str], list[str], list[int]], paths: dict[int, str], answers: tuple[str, ...]
) -> Examples:
    questions, given, image_ids = columns
    image_index = {image_id: index for index, image_id in enumerate(sorted(paths))}
    texts, text_of = index_texts(questions)
    answer_index = {answer: index for index, answer in enumerate(answers)}
    return Examples(
        name="easy-VQA",
        split=split,
        pictures=[PictureFile(Path(paths[image_id])) for image_id in sorted(paths)],
        texts=texts,
        image_of=np.array([image_index[image_id] for image_id in image_ids], dtype=np.int64),
        text_of=text_of,
        labels=np.array([answer_index[answer] for answer in given], dtype=np.int64),
        answers=answers,
        answer_types=tuple(ANSWER_TYPES.get(answer, "colour") for answer in given),
    )
