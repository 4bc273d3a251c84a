"""Networks of Hugging Face transformers, from a folder of config.json and weights, or by name from the hub.

https://huggingface.co/docs/transformers. Text classifiers take the data's input_ids and attention_mask (and
token_type_ids), image classifiers pixels; both give `logits`. Code of a model's repository never runs. Attention is
computed step by step (`eager`), so that its products can be quantised. The version of transformers is not part of a
run's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

VERSION = 1
RUNS_USER_CODE = False


class Params(Base):
    """Which network, with how many classes, and whether with its weights."""

    path: InputPath | None = Field(None, description="a folder with config.json and model.safetensors")
    name: str | None = Field(None, min_length=1, description="a name on the hub, such as distilbert-base-uncased")
    task: Literal["sequence_classification", "image_classification"] = Field(
        "sequence_classification", description="which of the AutoModelFor... classes"
    )
    classes: int | None = Field(None, ge=1, le=1_000_000, description="none: as many as its config.json has")
    pretrained: bool = Field(True, description="its weights, with a new classifier where classes differ")
    inputs: tuple[Literal["input_ids", "attention_mask", "token_type_ids"], ...] = Field(
        ("input_ids", "attention_mask"),
        min_length=1,
        strict=False,
        description="of text: the data's inputs, in their order",
    )
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="other values for its config.json")

    @model_validator(mode="after")
    def _one_place(self) -> Params:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path, a folder, or name, one of the hub")
        if "input_ids" not in self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise ValueError("inputs: input_ids once, the others once at most")
        return self


def files(params: Params) -> Mapping[str, Path]:
    """The folder's config.json and weights; what comes from the hub is known by its name."""
    if params.path is None:
        return {}
    weights = _weights(params.path) if params.pretrained else []
    return {"config.json": params.path / "config.json"} | {path.name: path for path in weights}


def build(params: Params) -> nn.Module:
    """A classifier as a graph over its own modules; torch's global RNG decides what has no weights.

    Raises ModelError for a folder, name or number of classes that does not fit, EnvironmentProblem where transformers
    or the hub fails. What is worth knowing of the weights stands in `meta["notes"]` of the network.
    """
    from sparsify_deploy.models._huggingface import classifier

    if params.path is not None:
        _check_folder(params)
    return classifier(params)


def _weights(folder: Path) -> list[Path]:
    """The files transformers reads, safetensors before pickles; none where there are none."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return [*sorted(folder.glob(f"{pattern.partition('*')[0]}*.index.json")), *found]
    return []


def _check_folder(params: Params) -> None:
    """Raises ModelError where the folder is not one that transformers' save_pretrained writes."""
    from sparsify_deploy.errors import ModelError

    folder = params.path
    assert folder is not None
    if not folder.is_dir():
        raise ModelError(f"model.params.path: {folder}: no such folder; name the one that holds config.json")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.params.path: {folder} holds no config.json: name a folder that transformers' save_pretrained wrote"
        )
    if (folder / "adapter_config.json").exists():  # transformers would follow it to a network elsewhere
        raise ModelError(
            f"model.params.path: {folder} holds an adapter, whose network lies elsewhere: merge the two "
            "(merge_and_unload) and save that"
        )
    if params.pretrained and not _weights(folder):
        raise ModelError(
            f"model.params.path: {folder} holds no model.safetensors: add its weights, "
            "or set pretrained to false for an untrained network"
        )
