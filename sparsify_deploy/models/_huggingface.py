"""Classifiers of Hugging Face transformers as graphs: loaded, told how to be called, exported."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._exported import Exported, export
from sparsify_deploy.models._zoo import imported, near, offline, unloadable

if TYPE_CHECKING:
    from sparsify_deploy.models.transformers import Params

_MASKED = -10000.0
"""Added to the score of a position that is masked: its weight is 0 in float32, and the number exists in float16."""

_LENGTHS = (8, 5)
_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_GRAPHS: dict[str, Exported] = {}
"""Graphs of this process by configuration: they hold no weights, and a run builds its network many times."""


def classifier(params: Params) -> fx.GraphModule:
    """The network of `params` as a graph that returns `{"logits": (B, classes)}`."""
    transformers = imported("transformers", extra="hf")
    with _silent(transformers):
        config = _config(transformers, params)
        network, notes = _network(transformers, config, params)
    text = params.task == "sequence_classification"
    settings = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "name_or_path")}
    key = json.dumps([settings, params.task, params.inputs], default=str, sort_keys=True)
    if key not in _GRAPHS:
        _GRAPHS[key] = _text_graph(network, params.inputs) if text else _image_graph(network)
    module = _GRAPHS[key].over(network)
    module.meta["notes"] = notes
    if not any(note.endswith("start new") for note in notes):
        module.meta["classes"] = tuple(config.id2label.values())
    return module


def _config(transformers: Any, params: Params) -> Any:
    """config.json with the recipe's values over it."""
    where = str(params.path or params.name)
    given: dict[str, Any] = {**params.arguments}
    if params.classes is not None:
        given["num_labels"] = params.classes
    try:
        config = _loaded(transformers, "AutoConfig").from_pretrained(
            where, local_files_only=params.path is not None, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{_key(params)}: {where}: {_reason(error)}") from error
    except OSError as error:
        if params.path is not None:
            raise ModelError(f"{_key(params)}: {where}/config.json: {_reason(error)}") from error
        raise offline(error, f"transformers {where}", "model.params.path a local folder of it") from error
    if unknown := sorted(name for name in given if not hasattr(config, name)):
        hint = near(unknown[0], sorted(config.to_dict()))
        raise ModelError(f"model.params.arguments: {where}/config.json has no {unknown[0]!r}{hint}")
    try:
        config.update(given)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.params.arguments: {_reason(error)}") from error
    config.problem_type = None
    return config


def _network(transformers: Any, config: Any, params: Params) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with its weights, or without any, and what is to be said of them."""
    where = str(params.path or params.name)
    chosen = _loaded(transformers, _CLASSES[params.task])
    try:
        if not params.pretrained:
            model: nn.Module = chosen.from_config(
                config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
            return model, ()
        model, loaded = chosen.from_pretrained(
            where,
            config=config,
            local_files_only=params.path is not None,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # told apart below: a new classifier is wanted, another network is not
            output_loading_info=True,
        )
    except OSError as error:
        if params.path is not None:
            raise ModelError(f"{_key(params)}: {where}: {_reason(error)}") from error
        raise offline(error, f"transformers {where}", "model.params.path a local folder of it") from error
    except ImportError as error:  # a module of transformers, when the class is first asked for
        raise unloadable("transformers", _root(error)) from error
    except Exception as error:  # safetensors, pickle and transformers each have errors of their own
        raise ModelError(f"{_key(params)}: {where}: {_unfit(error, config, params)}") from error
    return model, _notes(model, loaded, where, params)


def _notes(model: nn.Module, loaded: Mapping[str, Any], where: str, params: Params) -> tuple[str, ...]:
    """Raises ModelError where more than the classifier is missing; else what is new, and what was not used."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    other = {
        str(name[0] if isinstance(name, tuple) else name): "of another shape" for name in loaded["mismatched_keys"]
    }
    wrong = {**dict.fromkeys(sorted(loaded["missing_keys"]), "missing"), **other}
    for name, why in wrong.items():
        if name.startswith(prefix):
            raise ModelError(
                f"{_key(params)}: {where}: its weights do not fit its config.json: {name} is {why}"
                f" ({len(wrong)} such tensors)"
            )
    notes = []
    if wrong:
        notes.append(f"the weights of {where} bring no classifier of this size: {', '.join(sorted(wrong))} start new")
    if unused := sorted(loaded["unexpected_keys"]):
        more = ", ..." if len(unused) > 3 else ""
        notes.append(f"of the weights of {where} {len(unused)} are not used: {', '.join(unused[:3])}{more}")
    return tuple(notes)


def _text_graph(network: nn.Module, inputs: tuple[str, ...]) -> Exported:
    longest = _longest(network)
    lengths = [min(length, longest) if longest else length for length in _LENGTHS]
    batches = [_tokens(network, inputs, count, length) for count, length in zip((2, 3), lengths, strict=True)]
    single = _tokens(network, inputs, 1, lengths[0])
    free = dict.fromkeys(inputs, (0, 1))

    call = _prepared if _agree(network, batches) else _plain
    found = export(network, batches[0], (batches[1], single), free=free, call=call)
    if longest:
        _limit_(found.graph, longest)
    return found


def _plain(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(**given).logits}


def _prepared(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a mask that is ready to be added and the types written out, which leaves a dozen operators out."""
    ready = dict(given)
    if "attention_mask" in given:
        mask = given["attention_mask"]
        added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, _MASKED)
        ready["attention_mask"] = added.unsqueeze(1).unsqueeze(1)
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        ready.setdefault("token_type_ids", torch.zeros_like(given["input_ids"]))
    return _plain(model, ready)


def _image_graph(network: nn.Module) -> Exported:
    config: Any = network.config
    size = config.image_size if hasattr(config, "image_size") else 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    generator = torch.Generator().manual_seed(0)
    channels = getattr(config, "num_channels", 3)
    batches = [{"input": torch.randn(n, channels, height, width, generator=generator)} for n in (2, 3, 1)]
    return export(
        network,
        batches[0],
        batches[1:],
        free={"input": (0,)},
        call=lambda model, given: {"logits": model(pixel_values=given["input"]).logits},
    )


def _tokens(network: nn.Module, inputs: tuple[str, ...], count: int, length: int) -> dict[str, Tensor]:
    """Texts of which the last positions are masked, of another number in each."""
    config: Any = network.config
    generator = torch.Generator().manual_seed(count)
    mask = torch.ones(count, length, dtype=torch.int64)
    for row in range(count):
        mask[row, length - min(row, length - 1) :] = 0
    numbers = torch.randint(0, config.vocab_size, (count, length), generator=generator)
    padding = config.pad_token_id
    if padding is not None:
        numbers = torch.where(mask == 0, padding, torch.where(numbers == padding, (padding + 1) % 2, numbers))
    made = {"input_ids": numbers, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    return {name: made[name] for name in inputs}


@torch.no_grad()
def _agree(network: nn.Module, batches: list[dict[str, Tensor]]) -> bool:
    """Whether the network takes inputs made ready by `_prepared`, and answers as it does without."""
    was = network.training
    network.eval()
    try:
        for batch in batches:
            expected, given = _plain(network, batch)["logits"], _prepared(network, batch)["logits"]
            if expected.shape != given.shape or not torch.allclose(expected, given, rtol=1e-5, atol=1e-6):
                return False
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants the mask as it was given
        return False
    finally:
        network.train(was)
    return True


def _longest(network: nn.Module) -> int | None:
    """How many tokens have a position, or None where that is not bounded."""
    config: Any = network.config
    table = [m for n, m in network.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    if not table:
        return None
    # RoBERTa counts its positions from behind the padding's number
    offset = config.pad_token_id + 1 if table[0].padding_idx is not None else 0
    return int(table[0].num_embeddings) - int(offset)


def within(numbers: Tensor, longest: int) -> Tensor:
    """`numbers` `(B, L)` as they are. Raises ModelError where L is more than `longest`."""
    if numbers.shape[1] > longest:
        raise ModelError(
            f"a text of the data has {int(numbers.shape[1])} tokens, and the model has {longest} positions: "
            f"set data.params.max_length to {longest} or less"
        )
    return numbers


def _limit_(graph: fx.Graph, longest: int) -> None:
    """Put `within` behind the numbers of the tokens."""
    (numbers,) = (node for node in graph.nodes if node.op == "placeholder" and node.target == "input_ids")
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        checked = graph.call_function(within, (numbers, longest))
    numbers.replace_all_uses_with(checked, lambda user: user is not checked)


def _loaded(transformers: Any, name: str) -> Any:
    """A class of transformers, whose modules are imported when first asked for."""
    try:
        return getattr(transformers, name)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise unloadable("transformers", _root(error)) from error


def _root(error: BaseException) -> BaseException:
    """What an error began with."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _key(params: Params) -> str:
    return f"model.params.{'path' if params.path is not None else 'name'}"


def _reason(error: Exception) -> str:
    """The first sentence of what transformers says, which goes on for paragraphs."""
    text = " ".join(str(error).split())
    return (text.partition(". ")[0] or type(error).__name__)[:240]


def _unfit(error: Exception, config: Any, params: Params) -> str:
    text = " ".join(str(error).split())
    if text.startswith("Unrecognized configuration class"):
        kind = params.task.replace("_", " ")
        return f"transformers has no network for {kind} of type {config.model_type!r}; is model.params.task right?"
    if "Weights only load failed" in text or "weights_only" in text:
        return (
            "its weights are a pickle that holds Python objects besides tensors, and reading those could run code: "
            "save it again with model.save_pretrained(folder), which writes model.safetensors"
        )
    return _reason(error)


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """No progress bars and load reports: what they say stands in the notes."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
