"""Data sets as image-text pairs, and the stored outputs of frozen encoders over them."""

from cvlm.config import EasyVqaData, JsonLinesData, OpenMojiData, ShardsData, StreamData, TweetsData
from cvlm.data.answers import SoftLabels
from cvlm.data.captions import caption_splits, captions_of_pictures
from cvlm.data.examples import UNLABELLED, Examples, Picture, PictureFile, Splits, index_texts
from cvlm.data.features import StoredTokens, encode_once
from cvlm.data.matching import matching_pairs
from cvlm.data.words import CaptionWords
from cvlm.tasks import TASKS

DATA_KINDS: dict[str, str] = {
    "easy_vqa": "easy-VQA from its PyPI package, official split",
    "openmoji": "OpenMoji pictures and emoji names, split by concept",
    "tweets": "tweets graded as negative, neutral or positive, for classifying texts",
    "jsonl": "your own folder with train.jsonl and test.jsonl",
    "shards": "a folder that cvlm data import wrote",
    "stream": "tar shards read from front to back: URLs, programs, plain files",
}


def load_data(
    spec: EasyVqaData | OpenMojiData | TweetsData | JsonLinesData | ShardsData | StreamData, task: str
) -> Splits:
    """Load the splits of a data specification for a task.

    Raises:
        CvlmError: the data is missing, damaged, or made for another task.
    """
    from cvlm.data import easy_vqa, from_shards, from_stream, json_lines, openmoji, tweets
    from cvlm.errors import CvlmError

    base = TASKS[task].data
    made_for = {"easy_vqa": "vqa", "openmoji": "retrieval", "tweets": "text"}.get(spec.kind, base)
    if made_for != base:
        serves = ", ".join(name for name, facts in TASKS.items() if facts.data == made_for)
        raise CvlmError(
            f"data kind {spec.kind!r} is made for task {serves}, not for {task!r}; take other data, or a model or a "
            "recipe of that task"
        )
    if isinstance(spec, StreamData):
        return from_stream.load(spec, task)
    words = None
    if task == "captioning" and isinstance(spec, JsonLinesData | ShardsData):
        words, spec = spec.answers, spec.model_copy(update={"answers": None})
    if isinstance(spec, EasyVqaData):
        splits = easy_vqa.load(spec)
    elif isinstance(spec, OpenMojiData):
        splits = openmoji.load(spec)
    elif isinstance(spec, TweetsData):
        splits = tweets.load(spec)
    elif isinstance(spec, ShardsData):
        splits = from_shards.load(spec, base)
    else:
        splits = json_lines.load(spec, base)
    if task == "itm":
        return Splits(train=matching_pairs(splits.train), test=matching_pairs(splits.test))
    if task == "captioning":
        return caption_splits(splits, words)
    return splits


__all__ = [
    "DATA_KINDS",
    "UNLABELLED",
    "CaptionWords",
    "Examples",
    "Picture",
    "PictureFile",
    "SoftLabels",
    "Splits",
    "StoredTokens",
    "captions_of_pictures",
    "encode_once",
    "index_texts",
    "load_data",
]
