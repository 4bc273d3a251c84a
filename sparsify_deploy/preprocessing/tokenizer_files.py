"""The files of a tokenizer's folder, named without reading them."""

from __future__ import annotations

from pathlib import Path

from sparsify_deploy.errors import DataError

FILE = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
"""What may say which token pads a batch, where `FILE` does not."""

_MAKE = "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"


def files(folder: Path) -> dict[str, Path]:
    """The files that say what becomes of a text, by name. Raises DataError where the folder or `FILE` is missing."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; expected a tokenizer's, as transformers makes it: {_MAKE}")
    if not (folder / FILE).is_file():
        raise DataError(f"{folder}: has no {FILE}; make it by transformers: {_MAKE}")
    return {name: folder / name for name in (FILE, *BESIDE) if (folder / name).is_file()}
