"""What tests of every folder share."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key that engines are signed with is a test's own, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, and SIGINT where a script runs the tests in the background, here and in all that
    tests start: what they test of those would wait for ever.
    """
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ignored = [number for number in heard if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, heard[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets: SPARSIFY_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SPARSIFY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set SPARSIFY_DATA to the folder that holds mnist/ and cifar10/")
    return folder


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, whose binary from PyPI does not load beside a torch for the CPU alone: it asks for two operators
    of its own by name while it is imported, which are declared here without an implementation where they are missing.
    """
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module("torchvision")


_DECLARED: list[object] = []
"""The declarations last as long as the objects do."""


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Path]:
    """`make_tokenizer(folder, pad="[PAD]")`: a BERT-like WordPiece tokenizer of a few words, as a folder.

    Its numbers: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then good, bad, film, plot, very, not, ##ly, a.
    """
    tokenizers = pytest.importorskip("tokenizers")

    def make(folder: Path, pad: str | None = "[PAD]", side: str = "right") -> Path:
        words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "very", "not", "##ly", "a")
        vocabulary = {word: number for number, word in enumerate(words)}
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.BertNormalizer()
        made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        folder.mkdir(parents=True, exist_ok=True)
        made.save(str(folder / "tokenizer.json"))
        if pad is not None:
            settings = {"pad_token": pad, "padding_side": side}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return make
