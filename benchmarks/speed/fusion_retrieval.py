"""Retrieval with a fusion encoder: re-ranking the nearest few candidates beside scoring every pair, in time and recall.

A small model with a matching head learns 1,000 OpenMoji concepts with their names in five languages, and is then asked
about other views of them: turned, moved, of another size and on another ground. Both ways run the same code over the
same stored tower outputs and in the same batches, so the ratio is what choosing candidates saves, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.retrieval import first_stage_ranks, ranks_of_retrieved
from benchmarks.speed.timing import Work, setting, time_pair
from cvlm.config import (
    EngineSpec,
    FusionSpec,
    ObjectiveSpec,
    OpenMojiData,
    PhaseSpec,
    StudentSpec,
    TextSpec,
    VisionSpec,
)
from cvlm.data import Examples, load_data
from cvlm.data.examples import Picture
from cvlm.model import CVLM, compose
from cvlm.training import (
    ModelInputs,
    PhaseJob,
    Rerank,
    RetrievalSettings,
    Retrieved,
    image_of_texts,
    model_inputs,
    predict,
    train_phase,
)
from distill.objectives import Labels

IMAGES, CANDIDATES, EPOCHS, TRAIN_VIEWS = 1000, 16, 6, 4
FUSION = FusionSpec(kind="cross", width=64, depth=1, heads=4, expansion=2)
LANGUAGES = ("en", "es", "fr", "pt", "de")
SIZE = 96
KS = (1, 5, 10)


@dataclass(frozen=True)
class View:
    """A picture that is turned, moved, drawn smaller and put on a ground of another colour, by a seed."""

    picture: Picture
    seed: int

    @property
    def key(self) -> str:
        """The picture's own key and the seed."""
        return f"{self.picture.key}|view {self.seed}"

    def load(self) -> Image.Image:
        """Draw the view, as large as the picture."""
        rng = np.random.default_rng(self.seed)
        picture = self.picture.load()
        ground = tuple(int(value) for value in rng.integers(190, 256, 3))
        width, height = picture.size
        scale = rng.uniform(0.7, 1.0)
        small = picture.resize((round(width * scale), round(height * scale)))
        small = small.rotate(rng.uniform(-20, 20), resample=Image.Resampling.BILINEAR, fillcolor="white")
        left, top = rng.integers(0, (width - small.width + 1, height - small.height + 1)).tolist()
        view = Image.new("RGB", picture.size, "white")
        view.paste(small, (left, top))
        white = np.asarray(view).min(axis=2, keepdims=True) > 250
        return Image.fromarray(np.where(white, np.array(ground, np.uint8), np.asarray(view)))


def compare(
    images: int = IMAGES, *, epochs: int = EPOCHS, candidates: int = CANDIDATES, repeats: int = 3
) -> dict[str, Any]:
    """Train a model, time both ways of ranking with it, and return what each finds.

    Args:
        images: pictures to rank; each has five texts.
        epochs: of training.
        candidates: how many the two stages re-rank per query.
        repeats: how often each way is timed.
    """
    with TemporaryDirectory() as scratch:
        model, inputs = _train(images, epochs, Path(scratch))
        found: dict[str, Retrieved] = {}
        timing = time_pair(
            lambda: _ranking(model, inputs, candidates, found, "ours"),
            lambda: _ranking(model, inputs, "all", found, "reference"),
            repeats,
        )
    of = image_of_texts(inputs.examples)
    recalls = {
        "embeddings_alone": first_stage_ranks(of, found["ours"]).recall(KS),
        "two_stage": ranks_of_retrieved(of, found["ours"]).recall(KS),
        "exhaustive": ranks_of_retrieved(of, found["reference"]).recall(KS),
    }
    pairs = {name: _distinct_pairs(retrieved) for name, retrieved in found.items()}
    return {
        "work": f"fusion retrieval both ways, {candidates} candidates per query re-ranked",
        "beside": "scoring every pair, as METER and ViLT do, with the same encoder, stored tower outputs and batches",
        "size": {"images": images, "texts": images * len(LANGUAGES), "pairs_scored": pairs},
        "model": f"frozen EfficientNet-Lite0 and MiniLM, cross fusion {FUSION.width} wide, {epochs} epochs",
        "data": f"OpenMoji, {TRAIN_VIEWS} views of each to train on, another to rank; names in {' '.join(LANGUAGES)}",
        **timing,
        "recall": recalls,
        "recall_difference": {
            name: recalls["two_stage"][name] - value for name, value in recalls["exhaustive"].items()
        },
        **setting(["numpy", "torch"]),
    }


def make_data(images: int, split: str, views: Sequence[int]) -> Examples:
    """Show each of some concepts in some views, each with its names in all languages."""
    import emoji

    emoji.config.load_language()
    glyphs: Any = load_data(OpenMojiData(kind="openmoji", size=SIZE), "retrieval").train.pictures[:images]
    names = [
        emoji.EMOJI_DATA[glyph.character][language].strip(":").replace("_", " ")
        for glyph in glyphs
        for language in LANGUAGES
    ]
    concept, view = np.divmod(np.arange(len(glyphs) * len(views)), len(views))
    image_of = np.repeat(np.arange(len(concept)), len(LANGUAGES))
    text_of = (concept[:, None] * len(LANGUAGES) + np.arange(len(LANGUAGES))).ravel()
    return Examples(
        name="OpenMoji views",
        split=split,
        pictures=[View(glyphs[c], 1000 * int(c) + views[v]) for c, v in zip(concept, view, strict=True)],
        texts=tuple(names),
        image_of=image_of,
        text_of=text_of,
        labels=concept[image_of],
    )


def _train(images: int, epochs: int, scratch: Path) -> tuple[CVLM, ModelInputs]:
    """Train on the later views; return the model and how to feed it the first one."""
    torch.manual_seed(0)
    spec = StudentSpec(
        vision=VisionSpec(name="package:efficientnet_lite0", image_size=SIZE, train="frozen"),
        text=TextSpec(name="package:minilm_l6", train="frozen"),
        fusion=FUSION,
        embedding=FUSION.width,
    )
    model = compose(spec, task="retrieval")
    job = PhaseJob(
        student=model,
        phase=PhaseSpec(epochs=epochs, batch_size=128, learning_rate=3e-3, objectives=(ObjectiveSpec(kind="labels"),)),
        objectives=[Labels()],
        inputs=model_inputs(model, make_data(images, "train", range(1, TRAIN_VIEWS + 1)), scratch / "towers"),
        engine=EngineSpec(device="cpu"),
        folder=scratch / "training",
    )
    train_phase(job)
    return model, model_inputs(model, make_data(images, "test", [0]), scratch / "towers")


def _ranking(model: CVLM, inputs: ModelInputs, rerank: Rerank, found: dict[str, Retrieved], name: str) -> Work:
    def work() -> None:
        retrieved = predict(model, inputs, retrieval=RetrievalSettings(rerank=rerank)).retrieved
        assert retrieved is not None, "a retrieval model embeds"
        found[name] = retrieved

    return work


def _distinct_pairs(retrieved: Retrieved) -> int:
    lists = retrieved.reranked
    assert lists is not None, "the model has a matching head"
    texts = lists.text_to_image.query[:, None] * len(retrieved.images) + lists.text_to_image.candidate
    images = lists.image_to_text.candidate * len(retrieved.images) + lists.image_to_text.query[:, None]
    return len(np.unique(np.concatenate([texts.ravel(), images.ravel()])))
