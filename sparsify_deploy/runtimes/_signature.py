"""Whether an engine was built by this user here: a signature on its record that nobody without the user's key can make.

The hashes in a record say that a file is whole, not who wrote the record. A TensorRT engine is code, so one that comes
with a record from elsewhere is opened only where the user says so. The key is 32 random bytes in the user's state
folder, made by the first build; where there is none and none can be made, a record goes unsigned.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sparsify_deploy.safety import regular
from sparsify_deploy.types import Json

FIELD = "signature"
_BYTES = 32


def signed(record: Mapping[str, Json]) -> dict[str, Json]:
    """The record with its signature, or without one where there can be no key."""
    key = _key(make=True)
    return dict(record) if key is None else {**record, FIELD: _signature(record, key)}


def is_own(record: Mapping[str, Json]) -> bool:
    """Whether the record is as `signed` gave it to this user."""
    key, found = _key(make=False), record.get(FIELD)
    return key is not None and isinstance(found, str) and hmac.compare_digest(found, _signature(record, key))


def _signature(record: Mapping[str, Json], key: bytes) -> str:
    plain = {name: value for name, value in record.items() if name != FIELD}
    return hmac.new(key, json.dumps(plain, sort_keys=True).encode("ascii"), hashlib.sha256).hexdigest()


def _place() -> Path:
    home = os.environ.get("XDG_STATE_HOME", "")
    # the XDG specification: a relative path is to be ignored
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
    return base / "sparsify-deploy" / "engines.key"


def _key(*, make: bool) -> bytes | None:
    try:
        path = _place()
        if make and not path.exists():
            _make(path)
        found = regular.read(path, _BYTES + 1)
    except (OSError, RuntimeError):  # a user without a home, a file system that is read-only
        return None
    return found if len(found) == _BYTES else None


def _make(path: Path) -> None:
    """Put a key there whole, or leave the one that another process put there first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    with suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()
