"""INT8 fake quantisation with nvidia-modelopt; the only module that imports it.

Weights are symmetric INT8 per output channel (axis 0), activations symmetric INT8 per tensor, ranges by absolute
maximum. Ranges are fixed at calibration; quantisation-aware training moves the weights under them. Where the identity
branch of a residual add also feeds a convolution, the two quantizers on that value see the same maximum, hence hold
the same scale, and an engine can merge them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparsify_deploy.errors import MissingExtra, ModelError
from sparsify_deploy.quantization import attention, joins, placement
from sparsify_deploy.quantization.folding import fold_batchnorm
from sparsify_deploy.quantization.padding import split_padding_
from sparsify_deploy.quantization.placement import Place, Row
from sparsify_deploy.quantization.table import check_patterns, layer_rows, unquantised_rows
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.types import Batch


_STEPS = 127
"""INT8 steps from 0 to the end of a range."""

_BIAS_STEPS = 2**28
"""How many steps of input scale times weight scale a bias may be long: an eighth of INT32, for training moves it."""

_FIELDS = {
    "residual add": "residual",
    "concatenation": "concat",
    "average pooling": "pooling",
    "attention product": "attention",
}
"""Kinds of places to the setting that turns their quantizers off."""


@dataclass(frozen=True)
class Int8Settings:
    """What shapes the quantised network. `keep_float`: shell patterns over the names in the placement table."""

    keep_float: tuple[str, ...] = ()
    residual: bool = True
    concat: bool = True
    pooling: bool = True
    attention: bool = True
    stream: bool = False


@dataclass(frozen=True)
class Quantized:
    """A folded network with quantizers, and why each layer has or lacks one.

    `tied`: names of quantizers that hold one range, group by group.
    """

    module: fx.GraphModule
    placement: tuple[Row, ...]
    tied: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_` did. By layer, how many output channels have weights that are all zero (`dead_channels`), or so
    small beside their bias that their range was widened (`faint_channels`)."""

    batches: int
    quantizers: int
    dead_channels: Mapping[str, int]
    faint_channels: Mapping[str, int] = dataclasses.field(default_factory=dict)


def prepare(model: nn.Module, settings: Int8Settings) -> Quantized:
    """A copy of `model` with BatchNorm folded and quantizers inserted, not calibrated, in eval mode.

    The same model and settings give the same module names, so that `load_` can fill it on another day. Parameter
    names are those of `model`.

    Raises:
        ModelError: the network cannot be traced, a pattern of `keep_float` matches nothing, or nothing is left to
            quantise.
        MissingExtra: nvidia-modelopt is not installed.
    """
    mtq = _modelopt()
    module = fold_batchnorm(model)
    _disable_fast_paths_(module)
    split_padding_(module)
    rows = {row.name: row for row in layer_rows(module, settings.keep_float, _default_patterns())}
    chosen = [name for name, row in rows.items() if row.quantised]
    if settings.attention:
        attention.write_out_(module)
    places = [_decided(place, settings) for place in _places(module, chosen, settings)]
    broken = list(joins.breaks(module, chosen))
    check_patterns(settings.keep_float, [*rows, *(place.name for place in places)])
    if not chosen:
        raise ModelError("no Conv or Linear layer is left to quantise: drop the quantize section or keep_float")
    with _quiet(), _recurrent_aside(module):
        mtq.quantize(module, _config(chosen), None)
    for name in chosen:
        if not hasattr(module.get_submodule(name), "weight_quantizer"):
            kind = rows[name].kind
            raise ModelError(f"{name}: nvidia-modelopt cannot quantise a {kind}; add it to quantize.keep_float")
    tied = joins.groups(module, places, chosen)
    for place in places:
        _insert_(module, place)
        rows[place.name] = Row(place.name, place.kind, bool(place.sides), place.rule)
    module.graph.lint()
    module.recompile()
    others = (row for row in (*broken, *unquantised_rows(module)) if row.name not in rows)
    return Quantized(module, (*rows.values(), *others), tied)


@contextlib.contextmanager
def _recurrent_aside(module: nn.Module) -> Iterator[None]:
    """Within it, recurrent layers are not in `module`: modelopt writes them out as loops over a length that tracing
    then fixes, and a runtime loses its fused kernel, though none of their quantizers is switched on."""
    recurrent = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.RNNBase)}
    for name in recurrent:
        module.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, layer in recurrent.items():
            module.set_submodule(name, layer)


def calibrate_(quantized: Quantized, batches: Iterable[Batch], inputs: Sequence[str]) -> Calibration:
    """Set every range to the largest magnitude seen over `batches`, moved to the module's device.

    An output channel without a weight has no range: it gets the smallest one of its layer (1 if the whole layer is
    empty), for a scale must be above 0; its zeros stay zeros. One whose weights are next to nothing beside its bias
    gets a range in which the bias can be an integer too.

    Raises:
        ModelError: there is no batch, or a quantizer saw nothing, only zeros, or values that are not finite.
    """
    module = quantized.module
    device = next(module.parameters()).device
    count = 0

    def run(model: nn.Module) -> None:
        nonlocal count
        for batch in batches:
            outputs_of(model, {name: batch[name].to(device) for name in inputs}, inputs)
            count += 1

    with _quiet(), torch.no_grad(), _finite(module):
        _modelopt().calibrate(module, algorithm="max", forward_loop=run)
    if not count:
        raise ModelError("calibration got no batch")
    dead = {}
    _tie_(quantized)
    for name, quantizer in _quantizers(module):
        if quantizer.amax is None:
            raise ModelError(f"{name}: no calibration batch reached it; keep its layer in float with keep_float")
        if name.endswith("weight_quantizer") and (zeros := _fill_dead_(quantizer.amax)):
            dead[name.removesuffix(".weight_quantizer")] = zeros
        if not bool((quantizer.amax > 0).all()):
            raise ModelError(f"{name}: saw only zeros during calibration; {_why_zero(module)}")
    return Calibration(count, sum(1 for _ in _quantizers(module)), dead, _widen_faint_(module))


def _widen_faint_(module: nn.Module) -> dict[str, int]:
    """Widen ranges of output channels whose bias would not fit into INT32; layer to how many there were.

    ONNX Runtime makes integers of biases, in steps of input scale times weight scale, and cuts off what is beyond
    2^31. Channels that training switched off, common in networks with depthwise layers, keep a bias and weights a
    hundred millionth of the others'. The wider range changes their sum by far less than an INT8 step of their bias.
    """
    enabled = dict(_quantizers(module))
    found = {}
    for name, layer in module.named_modules():
        dot = f"{name}." if name else ""
        weight, given = (enabled.get(f"{dot}{kind}_quantizer") for kind in ("weight", "input"))
        bias = layer._parameters.get("bias")
        if weight is None or given is None or bias is None or weight.amax.numel() != bias.numel():
            continue
        least = bias.detach().abs() * (_STEPS**2 / _BIAS_STEPS) / given.amax
        faint = weight.amax < least.view_as(weight.amax).to(weight.amax)
        if bool(faint.any()):
            weight.amax[faint] = least.view_as(weight.amax).to(weight.amax)[faint]
            found[name] = int(faint.sum())
    return found


def _tie_(quantized: Quantized) -> None:
    """Give the quantizers of each tied group the largest of their ranges."""
    for group in quantized.tied:
        members = [quantized.module.get_submodule(name) for name in group]
        ranges = [member.amax for member in members if isinstance(member.amax, Tensor)]
        for member in members if ranges else ():
            member.amax = torch.stack(ranges).max()


def _why_zero(module: nn.Module) -> str:
    """What to do about an activation that is always 0."""
    weights = {name: m._parameters.get("weight") for name, m in module.named_modules()}
    empty = [n for n, weight in weights.items() if weight is not None and weight.ndim > 1 and not bool(weight.any())]
    if not empty:
        return "does a ReLU before it let nothing through?"
    return f"no weight is left in {', '.join(empty)}: lower the sparsity, or keep such layers dense"


@contextlib.contextmanager
def only(quantized: Quantized, layers: Collection[str]) -> Iterator[None]:
    """Within it, of all enabled quantizers only those of the weights and inputs of `layers` act; none: all is float.

    Raises:
        ModelError: one of `layers` is not quantised.
    """
    wanted = {
        f"{layer}.{kind}" if layer else kind for layer in layers for kind in ("weight_quantizer", "input_quantizer")
    }
    enabled = dict(_quantizers(quantized.module))
    if missing := sorted(wanted - set(enabled)):
        raise ModelError(f"{missing[0]}: there is no such quantizer; the placement table says why")
    others = [quantizer for name, quantizer in enabled.items() if name not in wanted]
    for quantizer in others:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in others:
            quantizer.enable()


def state(quantized: Quantized) -> dict[str, Tensor]:
    """Weights, biases, buffers and ranges on the CPU, by name; what `load_` takes."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in quantized.module.state_dict().items()}


def load_(quantized: Quantized, state: Mapping[str, Tensor]) -> None:
    """Fill a module fresh from `prepare`, with the same model and settings, with what `state` returned.

    Raises:
        ModelError: names or shapes differ, so the model or its settings are not the same.
    """
    module = quantized.module
    ranges = {f"{name}._amax": quantizer for name, quantizer in _quantizers(module)}
    expected = {*module.state_dict(), *ranges}
    if odd := sorted(expected ^ set(state)):
        which = "lack" if odd[0] in expected else "also hold"
        raise ModelError(f"the quantised weights {which} {odd[0]!r}: they belong to another model or other settings")
    for name, value in state.items():
        if name in ranges:
            continue
        own = module.state_dict()[name]
        if own.shape != value.shape:
            raise ModelError(f"the quantised weights have {name!r} {tuple(value.shape)}, the model {tuple(own.shape)}")
    device = next(module.parameters()).device
    for name, quantizer in ranges.items():
        quantizer.amax = state[name].to(device)  # a quantizer has no such buffer before it is calibrated
    module.load_state_dict(dict(state), strict=True)


def _places(module: fx.GraphModule, chosen: Sequence[str], settings: Int8Settings) -> list[Place]:
    """Every operation that joins activations, with what the rules say of it, in graph order."""
    found = [
        *placement.residuals(module, chosen, stream=settings.stream),
        *joins.concats(module, chosen),
        *joins.pools(module, chosen),
        *attention.products(module),
    ]
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    return sorted(found, key=lambda place: order[place.node])


def _decided(place: Place, settings: Int8Settings) -> Place:
    """`place` as the rules have it, or without quantizers where the settings say so."""
    field = _FIELDS[place.kind]
    kept = next((pattern for pattern in settings.keep_float if fnmatch.fnmatchcase(place.name, pattern)), None)
    if kept is not None:
        return dataclasses.replace(place, sides=(), rule=f"float: keep_float {kept!r}")
    if not getattr(settings, field):
        return dataclasses.replace(place, sides=(), rule=f"float: quantize.{field} is false")
    return place


def _insert_(module: fx.GraphModule, place: Place) -> None:
    tensor_quantizer = importlib.import_module("modelopt.torch.quantization.nn").TensorQuantizer
    attributes = importlib.import_module("modelopt.torch.quantization.config").QuantizerAttributeConfig
    made = [tensor_quantizer(attributes(num_bits=8, axis=None)) for _ in place.quantizers]
    placement.insert_(module, place, made)


def _config(chosen: Sequence[str]) -> dict[str, Any]:
    """modelopt's list of rules: everything off, then the chosen layers by name."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in chosen:
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
        rules.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    return {"quant_cfg": rules, "algorithm": None}


@cache
def _default_patterns() -> tuple[str, ...]:
    """Names that modelopt's own INT8 configuration leaves in float, such as `output.*` and `*lm_head*`."""
    entries = _modelopt().INT8_DEFAULT_CFG["quant_cfg"]
    off = [e for e in entries if e.get("enable") is False and e.get("parent_class") is None]
    return tuple(e["quantizer_name"] for e in off if e["quantizer_name"] != "*")


def _disable_fast_paths_(module: nn.Module) -> None:
    """Keep nn.TransformerEncoderLayer off the fused kernel that reads weights past the quantizers in eval mode.

    Set on the copy's layers rather than through torch.backends.mha, so that evaluation and export see it too.
    """
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer):
            child.activation_relu_or_gelu = 0
        if isinstance(child, nn.TransformerEncoder):
            child.use_nested_tensor = False


def _quantizers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every enabled quantizer, by name."""
    kind = importlib.import_module("modelopt.torch.quantization.nn").TensorQuantizer
    for name, child in module.named_modules():
        if isinstance(child, kind) and child.is_enabled:
            yield name, child


def _fill_dead_(amax: Tensor) -> int:
    """Give channels without a range the smallest range of the layer; how many there were."""
    dead = amax == 0
    if bool(dead.any()):
        amax[dead] = 1.0 if bool(dead.all()) else amax[~dead].min()
    return int(dead.sum())


@contextlib.contextmanager
def _finite(module: nn.Module) -> Iterator[None]:
    """Stop at the first quantizer that meets NaN or infinity, by name: modelopt's own check has none."""
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"{name}: holds values that are not finite")

    def check(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not bool(arguments[0].isfinite().all()):
                raise ModelError(f"{name}: met values that are not finite during calibration")

        return hook

    handles = [quantizer.register_forward_pre_hook(check(name)) for name, quantizer in _quantizers(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """modelopt prints what it inserted, and warns of packages and features that play no part here."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Cannot find transformers package", category=UserWarning)
        warnings.filterwarnings("ignore", message="Failed to import modelopt .* plugin", category=UserWarning)
        yield


@cache
def _modelopt() -> Any:
    try:
        with _quiet():
            return importlib.import_module("modelopt.torch.quantization")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        names = {"modelopt": "nvidia-modelopt"}
        raise MissingExtra(names.get(package, package), "train", "INT8 quantisation") from error
