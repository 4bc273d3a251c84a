"""Secrets taken out of text before it is shown or written: logs, reports, recorded messages, errors on a terminal.

Known by their form: credentials in an address, keys of known makers, an Authorization header, a signature or token in
a query, an assignment to what is called a password or key. And by their value: whatever this process was given in an
environment variable whose name says that it is secret. What has neither mark is not found: SECURITY.md says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

T = TypeVar("T")

HIDDEN = "[hidden]"

_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|CREDENTIALS?|AUTH|PAT|DSN)(S|_[A-Z0-9]+)?$|_(PWD|KEY)$",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Characters: a shorter value of a variable may stand in any text by chance."""

_CALLED = (
    r"(?:password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?token|access[_-]?token"
    r"|refresh[_-]?token)"
)
_IN_QUERY = (
    r"(?:sig|signature|token|access_token|auth|key|api_?key|password|secret|x-amz-signature|x-amz-credential"
    r"|x-amz-security-token|x-goog-signature|x-goog-credential)"
)
_KEPT = r"\g<kept>" + HIDDEN
_MARK = re.compile(
    r"://|[?&][a-z_-]+=|authorization|bearer |pass|secret|key|token|hf_|gh[pousr]_|github_pat_|glpat-|akia|asia|xox"
    r"|sk-|nvapi-|aiza|eyj",
    re.IGNORECASE,
)
"""Every text that `_forms` changes holds one of these: most texts hold none, and need no closer look."""
_KEY = re.compile(_CALLED + "$", re.IGNORECASE)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with `HIDDEN` in place of each secret; anything else stays as it is.

    `environment` is where variables are looked up, that of this process by default.
    """
    return _without(text, secrets(os.environ if environment is None else environment))


def secrets(environment: Mapping[str, str]) -> list[str]:
    """The values of variables whose names say that they are secret, the longest first, plain and as they are quoted.

    A value that is a path, or too short to be told from other text, is none.
    """
    found = {
        form
        for name, value in environment.items()
        if _is_secret(name) and len(value.strip()) >= _SHORTEST and not value.startswith(("/", "./", "~"))
        for form in _written(value.strip())
    }
    return sorted(found, key=lambda value: (-len(value), value))


@cache
def _is_secret(name: str) -> bool:
    return _NAMES.search(name) is not None


def _written(value: str) -> tuple[str, ...]:
    """A value as it stands in text, in Python's and JSON's quotes, in bytes that are shown, and in an address."""
    quoted = repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]
    return value, *quoted, ascii(value)[1:-1], quote(value, safe=""), quote_plus(value)


def redacted(value: T) -> T:
    """The same value with every text in it as `redact` has it: mappings, sequences and dataclasses are walked.

    What stands in a mapping under the name of a password or key is hidden whole. What holds no secret comes back equal.
    """
    found: T = _walked(value, secrets(os.environ))
    return found


@cache
def _forms() -> tuple[tuple[re.Pattern[str], str], ...]:
    return (
        # scheme://user:password@host, then https://token@host
        (re.compile(r"(?P<kept>[a-z0-9+.-]://)[^\s/?#\"'<>:]*:[^\s/?#\"'<>]+(?=@)", re.IGNORECASE), _KEPT),
        (re.compile(r"(?P<kept>https?://)[^\s/?#\"'<>:@]{8,}(?=@)", re.IGNORECASE), _KEPT),
        (re.compile(rf"(?P<kept>[?&]{_IN_QUERY}=)[^\s&#\"'<>]+", re.IGNORECASE), _KEPT),
        (re.compile(r"(?P<kept>authorization[\"']?\s?[:=]\s?[\"']?(?:\w{1,20} )?)[^\s\"']{4,}", re.IGNORECASE), _KEPT),
        (re.compile(r"(?P<kept>\bbearer )[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE), _KEPT),
        (re.compile(rf"(?P<kept>{_CALLED}=[\"']?)[^\s\"'&,;]{{4,}}", re.IGNORECASE), _KEPT),
        (re.compile(rf"(?P<kept>{_CALLED}[\"']\s?:\s?[\"'])[^\"']{{4,}}", re.IGNORECASE), _KEPT),
        (
            re.compile(
                r"\b(?:hf_[A-Za-z0-9]{16,}"  # Hugging Face
                r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"  # GitHub
                r"|glpat-[A-Za-z0-9_-]{16,}"  # GitLab
                r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS, the name of a key
                r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
                r"|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"  # several makers of hosted models
                r"|nvapi-[A-Za-z0-9_-]{20,}"  # NVIDIA
                r"|AIza[A-Za-z0-9_-]{30,}"  # Google
                r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"  # a signed JSON token
            ),
            HIDDEN,
        ),
        (re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(?:-----END|\Z)", re.DOTALL), HIDDEN),
    )


def _without(text: str, values: Sequence[str]) -> str:
    for value in values:
        if value in text:
            text = text.replace(value, HIDDEN)
    if _MARK.search(text):
        for form, replacement in _forms():
            text = form.sub(replacement, text)
    return text


def _walked(value: Any, values: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _without(value, values)
    if value is None or isinstance(value, (int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := _walked(old, values)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        return {
            _walked(key, values): HIDDEN if isinstance(each, str) and _KEY.search(str(key)) else _walked(each, values)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)([_walked(each, values) for each in value])
    return value
