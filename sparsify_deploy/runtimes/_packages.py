"""Whether a runtime's package is installed and in which version, without importing it."""

from __future__ import annotations

from importlib import util

from sparsify_deploy.artifacts import environment


def installed(module: str) -> bool:
    """True where `import module` would find code; the folder that a removed package left behind has none."""
    try:
        spec = util.find_spec(module)
    except ModuleNotFoundError:  # a parent package is not there
        return False
    return spec is not None and spec.origin is not None


def version_of(module: str) -> str | None:
    """The version of the distribution that brings `module`, None where it is not installed."""
    return environment.package(module) if installed(module) else None


def missing(name: str, module: str, extra: str) -> str | None:
    """None where `module` is installed, else one line with what to install."""
    if installed(module):
        return None
    return f"{name} is not installed: pip install 'sparsify-deploy[{extra}]'"
