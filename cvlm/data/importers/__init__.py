"""The table of importers: official files on disk -> one `Source`, the same for every format."""

from importlib import import_module
from pathlib import Path

from cvlm.data.importers.records import ImportOptions, Source
from cvlm.errors import CvlmError, unknown_name

FORMATS: dict[str, str] = {
    "vqav2": "cvlm.data.importers.vqav2:read_vqav2",
    "karpathy": "cvlm.data.importers.karpathy:read",
}
"""Format -> `module:function`; the function takes the source and `ImportOptions` and returns a `Source`."""

DESCRIPTIONS: dict[str, str] = {
    "vqav2": "VQA v2 (or v1): official question and annotation JSON, images in train2014/ and val2014/",
    "karpathy": "Karpathy splits of COCO, Flickr30k or Flickr8k: dataset_*.json and the images",
}


def read_source(data_format: str, path: Path, options: ImportOptions) -> Source:
    """Read everything about a data set but its pictures.

    Raises:
        CvlmError: the format is unknown, files are missing or damaged, or too many rows had to be skipped.
    """
    if data_format not in FORMATS:
        raise unknown_name("data format", data_format, FORMATS)
    if not path.exists():
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
