"""Secrets go, whatever they stand in; everything else stays to the letter."""

from __future__ import annotations

import dataclasses
import json
import string
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify_deploy.safety import redaction
from sparsify_deploy.safety.redaction import HIDDEN, redact, redacted, secrets

NOTHING: dict[str, str] = {}

FORMS = [
    ("https://ann:pa55word@host.example/x", "https://[hidden]@host.example/x"),
    ("https://ann:p@ss@w0rd@host.example/x?y=1", "https://[hidden]@host.example/x?y=1"),
    ("cannot fetch ftp://:0p3n@h/x, giving up", "cannot fetch ftp://[hidden]@h/x, giving up"),
    ("git+https://9f8e7d6c5b4a@git.example/a/b", "git+https://[hidden]@git.example/a/b"),
    ("https://h/blob?sv=1&sig=aB%2Fc%3D&se=2", "https://h/blob?sv=1&sig=[hidden]&se=2"),
    ("https://h/x?token=abc", "https://h/x?token=[hidden]"),
    ("?X-Amz-Signature=00ff&X-Amz-Date=1", "?X-Amz-Signature=[hidden]&X-Amz-Date=1"),
    ("Authorization: Bearer abcd.efgh-1234", "Authorization: Bearer [hidden]"),
    ("{'authorization': 'Basic dXNlcjpwdw=='}", "{'authorization': 'Basic [hidden]'}"),
    ("sent bearer 0123456789abcdef0123", "sent bearer [hidden]"),
    ("--set data.params.arguments.password=hunter22 -q", "--set data.params.arguments.password=[hidden] -q"),
    ("client_secret='s3cr3t s'", "client_secret='[hidden] s'"),
    ('{"api_key": "0123abc"}', '{"api_key": "[hidden]"}'),
    ("login hf_AbCdEfGhIjKlMnOpQrSt failed", "login [hidden] failed"),
    ("AKIAIOSFODNN7EXAMPLE", HIDDEN),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", HIDDEN),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", HIDDEN),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", f"{HIDDEN} RSA PRIVATE KEY-----"),
]

INNOCENT = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "runs/digits/store/train-8bde7bb9f89b5389da76cbe035623a57efd1256bfbdc3257582c9c1c1ccd65b8/weights.safetensors",
    "recipe.yaml:23:9: train.params.drop_fraction: 2 is more than 1",
    "https://docs.example/a/b?page=2#token",
    "layer1.0.conv1.weight, token_type_ids, pad_token 0, max_tokens 128",
    "docker://registry.example/team/image@sha256:e3b0c44298fc1c14",
    "git@github.example:team/repository.git, ann@host.example",
    "a basic building block; bearer of news; the key is data.params.path",
    "settings.params.rounds: 100 -> 50, secret sauce, password: too short",
    "task-specific-disk-usage-of-very-long-names, sk-learn",
    "sha256 0123456789ab, not ba9876543210; 64 x 3 x 3; p50 1.25 ms; --set training.steps=400",
    "C:\\Users\\x, ~/x, ./x y=z&k=v",
    "",
]


@pytest.mark.parametrize(("text", "wanted"), FORMS)
def test_known_forms_of_secrets_go(text: str, wanted: str) -> None:
    assert redact(text, NOTHING) == wanted


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, {"HOME": "/srv/ann", "LANG": "C.UTF-8"}) == text


@pytest.mark.parametrize("text", [text for text, _ in FORMS])
def test_what_is_redacted_is_so_once_and_for_all(text: str) -> None:
    once = redact(text, NOTHING)
    assert redact(once, NOTHING) == once


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "token", "PGPASSWD", "X_TOKENS"]
)
def test_values_of_variables_with_a_secret_name_go_wherever_they_stand(name: str) -> None:
    found = redact("a=Zx9-qq_17~w!; Zx9-qq_17~w!b", {name if name != "PGPASSWD" else "PG_PASSWD": "Zx9-qq_17~w!"})
    assert found == f"a={HIDDEN}; {HIDDEN}b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/keys/account.json"),
        ("SSH_AUTH_SOCK", "/tmp/agent.1"),
        ("DB_PASSWORD", "short"),
        ("KEYBOARD", "dvorak-us"),
        ("XDG_SESSION_PATH", "something"),
        ("PWD", "a-relative-folder"),
    ],
)
def test_values_of_other_variables_stay(name: str, value: str) -> None:
    assert secrets({name: value}) == []
    assert redact(f"x {value} y", {name: value}) == f"x {value} y"


PIECES = [text for text, _ in FORMS] + ["model.onnx", "conv1 2:4", " ", "\n", "a=b", "p50 1.25 ms", "AbC", "://", "@"]


@given(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.integers(0, 400), st.integers(0, 400))
def test_no_text_is_passed_over_that_a_form_would_change(text: str, start: int, length: int) -> None:
    part = text[start % (len(text) + 1) :][:length]
    whole = part
    for form, replacement in redaction._forms():
        whole = form.sub(replacement, whole)
    assert redact(part, NOTHING) == whole


@pytest.mark.parametrize("secret", ["pa'ss word1", 'pä"ss\\word1', "a+b&c=d/e f", "tab\tand\nline"])
def test_a_value_goes_in_whatever_quotes_it_stands(secret: str) -> None:
    written = [secret, repr(secret), ascii(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False)]
    written += [repr(["x", secret]), f"https://host/?q={quote_plus(secret)}", f"https://host/{quote(secret, safe='')}"]
    for text in written:
        assert redact(text, {"DB_PASSWORD": secret}).strip("[]'\"x, ") in (
            HIDDEN.strip("[]"),
            f"https://host/?q={HIDDEN}".strip("]"),
            f"https://host/{HIDDEN}".strip("]"),
        )


def test_the_longer_of_two_secrets_goes_first() -> None:
    found = redact("abcdefgh-ijkl abcdefgh", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-ijkl"})
    assert found == f"{HIDDEN} {HIDDEN}"


value = st.text(string.ascii_letters + string.digits + "-_.~!$", min_size=8, max_size=40).filter(
    lambda text: not text.startswith(("/", "./", "~")) and text not in HIDDEN and text == text.strip()
)


@given(value, st.text(max_size=60), st.text(max_size=60))
def test_no_variable_with_a_secret_name_is_in_what_comes_out(secret: str, before: str, after: str) -> None:
    assert secret not in redact(f"{before}{secret}{after}{secret}", {"MY_TOKEN": secret}).replace(HIDDEN, "\0")


@given(st.from_regex(r"[a-z]{1,8}", fullmatch=True), value)
def test_a_password_in_an_address_never_comes_out(user: str, secret: str) -> None:
    assert redact(f"see https://{user}:{secret}@host/path", NOTHING) == f"see https://{HIDDEN}@host/path"


@given(st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
def test_digests_stay(sha256: str) -> None:
    text = f"sha256 {sha256}  model.onnx; {sha256[:12]}; store/train-{sha256}.partial"
    assert redact(text, NOTHING) == text


@given(st.lists(st.from_regex(r"[A-Za-z0-9_.+-]{1,30}", fullmatch=True), min_size=1, max_size=8))
def test_paths_of_plain_names_stay(names: list[str]) -> None:
    text = "/" + "/".join(names)
    if not any(
        name.startswith(("hf_", "gh", "glpat", "AKIA", "ASIA", "xox", "sk-", "nvapi", "AIza")) for name in names
    ):
        assert redact(text, NOTHING) == text


@given(st.text(max_size=300))
def test_any_text_is_taken_and_stays_as_it_is_the_second_time(text: str) -> None:
    once = redact(text, NOTHING)
    assert redact(once, NOTHING) == once


def test_a_long_text_takes_no_long_time() -> None:
    import time

    hostile = ["a.b-" * 50_000, "://" * 50_000, "https://" + "a:" * 50_000, "password" * 30_000, "a@" * 50_000]
    began = time.process_time()
    for text in hostile:
        redact(text, NOTHING)
    assert time.process_time() - began < 20  # a quadratic form would take minutes


@dataclasses.dataclass(frozen=True)
class Inner:
    text: str
    number: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    facts: dict[str, object]


def test_values_of_every_shape_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "zzyyxxww")
    outer = Outer((Inner("a zzyyxxww"), Inner("b", 2)), {"list": ["zzyyxxww", 1.5, None], "password": "x", "n": True})
    found = redacted(outer)
    assert found == Outer(
        (Inner(f"a {HIDDEN}"), Inner("b", 2)), {"list": [HIDDEN, 1.5, None], "password": HIDDEN, "n": True}
    )
    assert found.inner[1] is outer.inner[1]
    assert redacted({"of zzyyxxww": 1, 2: "b"}) == {f"of {HIDDEN}": 1, 2: "b"}
