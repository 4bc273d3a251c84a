"""Whether a TensorRT engine can be opened here, found out before it is opened in this process."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import DataError
from sparsify_deploy.runtimes import _child, _gpu, _metadata, _packages
from sparsify_deploy.runtimes._trt_build import new_logger
from sparsify_deploy.types import Json

if TYPE_CHECKING:
    from sparsify_deploy.runtimes._trt import Flavour


def ready(flavour: Flavour, engine: Path, time_limit_s: float) -> bool:
    """Check an engine against its record and load it once in a child process.

    Returns whether it may run the host code in it: only a version-compatible engine needs that (NVIDIA's runtime of
    the version that built it), and only one whose sha256 its record lists gets it.

    Raises CorruptArtifact where the engine is not the one its record lists, DataError where it was built by another
    version or for another GPU or does not load, NativeCrash where loading it crashes or outruns `time_limit_s`.
    """
    record = _metadata.check(engine, trust=True)  # who opens an engine has asked for trust before
    if record is not None and (reason := mismatch(flavour, engine, record)):
        raise DataError(reason)
    host_code = record is not None and bool(record.get("params", {}).get("version_compatible"))
    if (said := _loaded(flavour, str(engine.resolve()), file_digest(engine), host_code, time_limit_s)) is not None:
        raise DataError(
            f"{engine}: {flavour.name} cannot load it here: {said or 'it gave no reason'}; it was built by another "
            "version or for another GPU, or is damaged: build it again"
        )
    return host_code


def mismatch(flavour: Flavour, engine: Path, record: Json) -> str | None:
    """One line where the record's version or architecture is not what is here and nothing was built to span that."""
    params, facts = record.get("params", {}), record.get("facts", {})
    built, here = _short(record.get("version")), _short(_packages.version_of(flavour.package))
    found = _gpu.gpus()
    now = found[0].architecture if found else ""
    targets = [facts["architecture"]] if facts.get("architecture") else list(params.get("targets", ()))
    other_version = bool(built and here and built != here) and not params.get("version_compatible")
    spans = params.get("ampere_plus") and now and number(now) >= 80
    other_gpu = bool(targets and now and now not in targets) and not spans
    if not (other_version or other_gpu):
        return None
    ways = [way for wanted, way in ((other_version, "version_compatible"), (other_gpu, "ampere_plus")) if wanted]
    if flavour.package != "tensorrt":
        ways = [f"targets that hold {now}"] if other_gpu else []
    option = f", or once with {' and '.join(ways)} where it was built" if ways else ""
    return (
        f"{engine}: built by {flavour.name} {built or 'unknown'} for {' and '.join(targets) or 'an unknown GPU'}, "
        f"here are {here or 'unknown'} and {now or 'no GPU'}: build it again here{option}"
    )


def _short(version: str | None) -> str:
    """`10.3.0` of `10.3.0 (tensorrt-cu12)`."""
    return (version or "").partition(" ")[0]


def number(architecture: str) -> int:
    """86 of `sm86`."""
    return int(architecture.removeprefix("sm"))


@cache
def _loaded(flavour: Flavour, engine: str, digest: str, host_code: bool, time_limit_s: float) -> str | None:
    """None where a child process could load the file with this digest, else the last error it heard."""
    answer = _child.call(
        f"{__name__}:load_here",
        {"package": flavour.package, "engine": engine, "host_code": host_code},
        what=f"loading {Path(engine).name} into {flavour.name}",
        time_limit_s=time_limit_s,
        advice="the engine is damaged or was built elsewhere: build it again",
    )
    said: str | None = answer["reason"]
    return said


def load_here(request: Json) -> Json:
    """The child's side: `{"reason": None or the last error}`."""
    trt = importlib.import_module(request["package"])
    logger, messages = new_logger(trt, None)
    runtime = trt.Runtime(logger)
    if request["host_code"]:
        runtime.engine_host_code_allowed = True
    if runtime.deserialize_cuda_engine(Path(request["engine"]).read_bytes()) is not None:
        return {"reason": None}
    errors = [message for level, message in messages if level.endswith("ERROR")]
    return {"reason": " ".join(" ".join(errors[-1:]).split())}
