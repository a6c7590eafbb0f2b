"""Retrieval recall: `retrieval_recall` beside clip-benchmark's metric, in time and in peak memory."""

import subprocess
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import retrieval_recall
from benchmarks.speed.timing import peak_growth, setting, time_pair

IMAGES, TEXTS_PER_IMAGE, WIDTH = 5000, 5, 512
KS = (1, 5, 10)
_BATCH = 64  # clip-benchmark's default

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def compare(images: int = IMAGES, texts_per_image: int = TEXTS_PER_IMAGE, repeats: int = 3) -> dict[str, Any]:
    """Time both on random embeddings, measure each one's peak memory, and check that the recalls are the same.

    Raises:
        AssertionError: If a recall differs by more than single precision.
    """
    data = make_embeddings(images, texts_per_image)
    recalls: dict[str, dict[str, float]] = {}
    timing = time_pair(
        lambda: lambda: recalls.update(ours=retrieval_recall(*data, KS)),
        lambda: lambda: recalls.update(reference=reference_recall(*data)),
        repeats,
    )
    for name, value in recalls["reference"].items():
        assert abs(value - recalls["ours"][name]) < 1e-6, f"the two ways disagree in {name}"
    peaks = {way: _peak_in_a_process(way, images, texts_per_image) for way in ("ours", "reference")}
    return {
        "work": "recall@1, @5 and @10 both ways",
        "beside": f"clip_benchmark.metrics.zeroshot_retrieval, batches of {_BATCH}",
        "size": {"images": images, "texts": images * texts_per_image, "width": WIDTH},
        **timing,
        "peak_memory_bytes": peaks,
        "memory_share": peaks["ours"] / peaks["reference"],
        "equal": "every recall, to 1e-6",
        **setting(["numpy", "torch", "clip-benchmark"]),
    }


def make_embeddings(images: int, texts_per_image: int, seed: int = 0) -> Data:
    """Make unit embeddings in which texts lie a little nearer to their own image, and each text's image."""
    rng = np.random.default_rng(seed)
    image = _unit(rng.standard_normal((images, WIDTH), dtype=np.float32))
    text_to_image = np.repeat(np.arange(images), texts_per_image)
    noise = _unit(rng.standard_normal((len(text_to_image), WIDTH), dtype=np.float32))
    return image, _unit(0.2 * image[text_to_image] + noise), text_to_image


def reference_recall(image: np.ndarray, text: np.ndarray, text_to_image: np.ndarray) -> dict[str, float]:
    """Do what clip_benchmark's `evaluate` does once it has the embeddings; the names are ours."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(text) @ torch.from_numpy(image).t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.from_numpy(text_to_image)] = True
    recall = {}
    for k in KS:
        for name, rows, pairs in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            found = batchify(recall_at_k, rows, pairs, _BATCH, "cpu", k=k) > 0
            recall[f"{name}_recall@{k}"] = found.float().mean().item()
    return recall


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _peak_in_a_process(way: str, images: int, texts_per_image: int) -> int:
    command = [sys.executable, "-m", "benchmarks.speed.recall", way, str(images), str(texts_per_image)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak(way: str, images: int, texts_per_image: int) -> None:
    work = {"ours": retrieval_recall, "reference": reference_recall}[way]
    work(*make_embeddings(max(10, *KS), texts_per_image))  # imports and buffers of the libraries are not the metric's
    data = make_embeddings(images, texts_per_image)
    print(peak_growth(lambda: work(*data)))


if __name__ == "__main__":
    _print_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
