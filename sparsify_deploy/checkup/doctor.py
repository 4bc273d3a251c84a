"""What this machine has and lacks, one finding a line, each with the command that mends it.

It needs the core packages alone. What may crash while it is imported is imported in a child process.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.checkup import doctor_places
from sparsify_deploy.checkup.findings import Finding, State
from sparsify_deploy.errors import NativeCrash, OutOfResources
from sparsify_deploy.runtimes import _child, _packages
from sparsify_deploy.types import Json

_CORE = ("numpy", "onnx", "pydantic", "rich", "ruamel.yaml", "safetensors", "typer")
_IMPORT_LIMIT_S = 120
_INDEX = "https://download.pytorch.org/whl"
_NVIDIA = "0x10de"


def diagnose(run: Path | None = None) -> tuple[Finding, ...]:
    """Everything there is to say of this machine, and of the run directory `run`, there or yet to be made."""
    return (
        _python(),
        _core(),
        *_training(),
        _torchvision(),
        *_runtimes(),
        _both_onnxruntimes(),
        _gpu(),
        _cpu(environment.fact("cpu")),
        _cores(),
        *doctor_places.memory(),
        *doctor_places.limits(),
        *doctor_places.shared_memory(),
        *doctor_places.disks(Path.cwd()),
        *(doctor_places.run_findings(run) if run is not None else ()),
    )


def _python() -> Finding:
    text = environment.fact("python")
    if sys.version_info < (3, 11):
        newer = "python3.12 -m venv .venv && .venv/bin/pip install 'sparsify-deploy[train,cpu]'"
        advice = f"builds and benchmarks work; training and quantising need 3.11 or newer: {newer}"
        return Finding("python", "warn", text, advice)
    return Finding("python", "ok", text)


def _core() -> Finding:
    lacking = [name for name in _CORE if not _packages.installed(name)]
    if lacking:
        return Finding("core packages", "missing", ", ".join(lacking), "pip install --force-reinstall sparsify-deploy")
    return Finding("core packages", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in _CORE))


def _training() -> Iterator[Finding]:
    yield _imported("torch", "train", "needed to train and quantise, not to build and benchmark")
    lacking = [name for name in ("modelopt", "requests", "huggingface_hub") if not _packages.installed(name)]
    if lacking == [] or not _packages.installed("modelopt"):
        version = _packages.version_of("modelopt")
        state: State = "missing" if version is None else "ok"
        advice = "" if version else "needed to quantise: pip install 'sparsify-deploy[train]'"
        yield Finding("modelopt", state, version or "not installed", advice)
    else:
        yield Finding("modelopt", "warn", f"lacks {', '.join(lacking)}", "pip install 'sparsify-deploy[train]'")


def _torchvision() -> Finding:
    version = _version("torchvision")
    if version is None or not _packages.installed("torchvision"):
        advice = "needed for models of torchvision and timm: pip install 'sparsify-deploy[vision]'"
        return Finding("torchvision", "missing", "not installed", advice)
    torch = _version("torch")
    if torch is None:
        return Finding("torchvision", "warn", f"{version}, without torch", "pip install 'sparsify-deploy[train]'")
    if (broken := _import_failure("torchvision")) is None:
        return Finding("torchvision", "ok", version)
    return Finding("torchvision", "warn", f"{version} beside torch {torch}, {broken}", _matching(torch))


def _matching(torch: str) -> str:
    """The command that installs the torchvision for this torch: 0.28 for 2.13, of the same build and index."""
    number, _, build = torch.partition("+")
    release = re.fullmatch(r"2\.(\d+)(\.\d+)?.*", number)
    if release is None:
        return "pip install --force-reinstall torchvision"
    version = f"0.{int(release[1]) + 15}{release[2] or ''}{f'+{build}' if build else ''}"
    index = f" --index-url {_INDEX}/{build}" if build else ""
    return f"it was built for another torch: pip install --force-reinstall --no-deps torchvision=={version}{index}"


def _runtimes() -> Iterator[Finding]:
    for name in menu.names("runtimes"):
        runtime = menu.entry("runtimes", name)
        version = runtime.version()
        if version is None:
            yield _absent(name, runtime.unavailable_reason() or "")
        elif (broken := _import_failure(name)) is not None:
            yield Finding(name, "warn", f"{version}, {broken}", _reinstall(name))
        elif (reason := runtime.unavailable_reason()) is not None:
            yield Finding(name, "warn", version, reason)
        elif (reason := runtime.cannot_run_reason()) is not None:
            yield Finding(name, "warn", f"{version}, builds engines and cannot run them here", reason)
        else:
            yield Finding(name, "ok", f"{version}, builds and runs engines here")


def _absent(name: str, reason: str) -> Finding:
    """A package that cannot be found; pip may think it is there, and would then install nothing."""
    if (known := _distribution(name)) is not None:
        detail = f"pip lists {' '.join(known)}, and its files are gone"
        return Finding(name, "warn", detail, _reinstall(name))
    return Finding(name, "missing", "not installed", reason)


def _distribution(module: str) -> tuple[str, str] | None:
    """The distribution that brings `module`, as pip lists it, and its version."""
    for name in environment.PACKAGES.get(module, (module,)):
        if (version := _version(name)) is not None:
            return name, version
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _reinstall(module: str) -> str:
    name, version = _distribution(module) or (module, "")
    build = version.partition("+")[2]
    index = f" --index-url {_INDEX}/{build}" if build and name == "torch" else ""
    return f"pip install --force-reinstall {name}{f'=={version}' if version else ''}{index}"


def _imported(package: str, extra: str, purpose: str) -> Finding:
    version = _packages.version_of(package)
    if version is None:
        return _absent(package, f"{purpose}: pip install 'sparsify-deploy[{extra}]'")
    if (broken := _import_failure(package)) is not None:
        return Finding(package, "warn", f"{version}, {broken}", _reinstall(package))
    return Finding(package, "ok", version)


def _import_failure(package: str) -> str | None:
    """None where the package imports in a child process, else one line."""
    try:
        answer: str | None = _child.call(
            f"{__name__}:import_here", package, what=f"importing {package}", time_limit_s=_IMPORT_LIMIT_S
        )
    except (NativeCrash, OutOfResources) as crash:
        return str(crash)
    return answer


def import_here(package: Json) -> Json:
    """The child's side of an import: None, or why it failed."""
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001 a broken package raises whatever it likes, and that is the finding
        return f"does not import: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _both_onnxruntimes() -> Finding:
    names = ("onnxruntime", "onnxruntime-gpu")
    found = [f"{name} {version}" for name in names if (version := _version(name)) is not None]
    if len(found) == 2:
        extra = "cpu" if environment.fact("gpu").startswith(environment.NO_GPU) else "gpu"
        mend = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'sparsify-deploy[{extra}]'"
        advice = f"they share one folder, so only the CPU works, and removing one breaks the other: {mend}"
        return Finding("onnxruntime packages", "warn", " and ".join(found), advice)
    return Finding("onnxruntime packages", "ok", found[0] if found else "none")


def _gpu() -> Finding:
    gpu, driver = environment.fact("gpu"), environment.fact("driver")
    if not gpu.startswith(environment.NO_GPU):
        return Finding("gpu", "ok", f"{gpu}, driver {driver}")
    if _has_nvidia_card():
        advice = (
            "install NVIDIA's driver (on Ubuntu: sudo ubuntu-drivers install), reboot; nvidia-smi must list the card"
        )
        return Finding(
            "gpu", "warn", f"{gpu}, though an NVIDIA card is in this machine: its driver does not work", advice
        )
    advice = "engines for NVIDIA GPUs cannot be timed here; CPU engines and TensorRT-RTX builds work"
    return Finding("gpu", "missing", gpu, advice)


def _has_nvidia_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus has a display or 3D controller of NVIDIA's."""
    for device in sorted(devices.glob("*")) if devices.is_dir() else ():
        try:
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith("0x03"):
            return True
    return False


def _cpu(text: str) -> Finding:
    flags = set(text.split())
    if "amx_int8" in flags:
        return Finding("cpu", "ok", f"{text}: INT8 in AMX tiles")
    if flags & {"avx512_vnni", "avx_vnni", "i8mm", "asimddp"}:
        return Finding("cpu", "ok", f"{text}: INT8 dot products")
    advice = "INT8 may be slower than FP32 here: race both before shipping"
    return Finding("cpu", "warn", f"{text}: no INT8 dot products", advice)


def _cores() -> Finding:
    cores = environment.available_cores()
    return Finding("cores", "ok", f"{cores} that this process may use")
