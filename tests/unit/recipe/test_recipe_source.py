"""A recipe's mistakes: all of them, each at its exact place, and nothing that costs memory or time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy.errors import RecipeError, UsageError
from sparsify_deploy.params import GivenHere
from sparsify_deploy.recipe_source import load, name_from

GOOD = """\
version: 1
sparsity: 0.8
model:
  params: {name: resnet8, in_channels: 1}
data:
  params:
    size: 8
training:
  epochs: 2
init: {}
train:
  params:
    drop_fraction: 0.2
deploy:
  - runtime: openvino
"""


def written(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mistakes_of(folder: Path, text: str | bytes, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(written(folder, text), sets)
    assert caught.value.exit_code == 2
    return list(caught.value.lines)


def test_a_good_recipe_is_read_with_defaults_and_named_after_its_file(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, GOOD, "my net.yaml"))
    assert recipe.name == "my-net"
    assert recipe.sparsity == 0.8
    assert recipe.train is not None
    assert recipe.train.params.model_dump(exclude_none=True) == {
        "update_every": 100,
        "drop_fraction": 0.2,
        "end_fraction": 0.75,
    }
    assert recipe.init is not None
    assert recipe.init.params.model_dump() == {"rounds": 100}
    assert recipe.data.params.model_dump() == {"size": 8, "validation_fraction": 0.0, "split_seed": 0}
    assert load(written(tmp_path, GOOD + "name: other\n")).name == "other"
    assert name_from(Path("...yaml")) == "recipe"


def test_five_mistakes_are_five_lines_each_at_its_place(tmp_path: Path) -> None:
    text = (
        GOOD.replace("drop_fraction: 0.2", "drop_fractoin: 0.2")
        .replace("    size: 8", "    size: eight")
        .replace("  epochs: 2", "  epochs: -2")
        .replace("runtime: openvino", "params: {}")
        .replace("init: {}", "init: {criterion: synfow}")
    )
    assert mistakes_of(tmp_path, text) == [
        "recipe.yaml:7:11: data.params.size: expected a whole number, found text 'eight'",
        "recipe.yaml:9:11: training.epochs: expected a number above 0, found -2",
        "recipe.yaml:10:19: init.criterion: unknown name 'synfow'; did you mean 'synflow'?",
        "recipe.yaml:13:5: train.params.drop_fractoin: unknown key; did you mean 'drop_fraction'?",
        "recipe.yaml:15:5: deploy.0.runtime: is required: add it",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1\n", "", "recipe.yaml:1:1: version: is required: add it"),
        ("version: 1", "version: 2", "recipe.yaml:1:10: version: expected 1, found 2"),
        ("sparsity: 0.8", "sparsty: 0.8", "recipe.yaml:2:1: sparsty: unknown key; did you mean 'sparsity'?"),
        ("sparsity: 0.8", "sparsity: 1.5", "recipe.yaml:2:11: sparsity: expected a number below 1, found 1.5"),
        ("sparsity: 0.8", "sparsity: '0.8'", "recipe.yaml:2:11: sparsity: expected a number, found text '0.8'"),
        ("epochs: 2", "epochs: true", "recipe.yaml:9:11: training.epochs: expected a number, found true"),
        ("  epochs: 2", "  epochs: [2]", "recipe.yaml:9:3: training.epochs: expected a number, found a list of 1"),
        (
            "  epochs: 2",
            "  optimizer: {name: sdg}\n  epochs: 2",
            "recipe.yaml:9:21: training.optimizer.name: expected one of sgd, adam, adamw, found text 'sdg'; "
            "did you mean 'sgd'?",
        ),
        ("  epochs: 2", "  epochs: 2\n  steps: 3", "recipe.yaml:8:1: training: give exactly one of epochs and steps"),
        ("init: {}", "init: 3", "recipe.yaml:10:7: init: expected a mapping, found 3"),
        ("data:\n  params:\n    size: 8", "data:", "recipe.yaml:5:1: data: is required: add it"),
        ("  - runtime: openvino", "  runtime: openvino", "recipe.yaml:14:1: deploy: expected a list, found a mapping"),
        ("name: resnet8", "name: 8", "expected one of lenet-300-100, lenet-5, resnet8, resnet20, resnet32, resnet56"),
        ("{name: resnet8, in_channels: 1}", "{}", "recipe.yaml:4:3: model.params.name: is required: add it"),
        ("init: {}\n", "", "needs a starting mask: add an init section"),
        ("training:\n  epochs: 2\n", "", "recipe.yaml:9:1: train.training: has no length: give epochs or steps"),
        (
            "init: {}",
            "gates: {metric: top1}\ninit: {}",
            "recipe.yaml:10:17: gates.metric: classification has no metric",
        ),
    ],
)
def test_a_mistake_is_told_plainly(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    found = mistakes_of(tmp_path, GOOD.replace(old, new))
    assert any(expected in line for line in found), found


def test_cross_checks_are_reported_beside_other_mistakes(tmp_path: Path) -> None:
    text = GOOD.replace("init: {}\n", "").replace("size: 8", "size: 1")
    assert [line.split(" ")[0:2] for line in mistakes_of(tmp_path, text)] == [
        ["recipe.yaml:7:11:", "data.params.size:"],
        ["recipe.yaml:10:1:", "train.method:"],
    ]


def test_cross_checks_do_not_judge_what_a_mistake_touches(tmp_path: Path) -> None:
    assert len(mistakes_of(tmp_path, GOOD.replace("sparsity: 0.8", "sparsity: 2"))) == 1
    assert len(mistakes_of(tmp_path, GOOD.replace("epochs: 2", "epochs: no"))) == 1
    without = GOOD.replace("training:\n  epochs: 2\n", "")
    found = mistakes_of(tmp_path, without.replace("train:\n", "train:\n  training: {epochs: -1}\n"))
    assert found == ["recipe.yaml:10:22: train.training.epochs: expected a number above 0, found -1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", ":2:1: key 'seed' is given twice, first at recipe.yaml:1:1: remove one"),
        ("seed: !!int 3\n", ":1:7: tags such as tag:yaml.org,2002:int are not allowed"),
        ("seed: !!python/object/apply:os.system [x]\n", ":1:7: tags such as "),
        ("sparsity: .nan\n", ":1:11: .nan is not a finite number"),
        ("sparsity: -.inf\n", ":1:11: -.inf is not a finite number"),
        ("sparsity: 1e999\n", ":1:11: 1e999 is not a finite number"),
        (f"seed: {'9' * 5000}\n", ":1:7: 9999999999999999999999999999999999999... is too large"),
        ("a:\n\tb: 1\n", ":2:1: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: [1\n", "not valid YAML: "),
        ("a: &x [*x]\n", ":1:8: *x stands inside its own anchor"),
        ("a: *x\n", ":1:4: *x has no anchor &x before it"),
        ("a: 1\n---\nb: 1\n", ":2:1: a second document starts here"),
        ("%YAML 1.1\n---\na: 1\n", ": recipes are YAML 1.2"),
        ("a: \x07\n", ":1:4: character U+0007 is not allowed"),
        ("1: 2\n", ":1:1: a key must be text, found 1"),
        ("", ":1:1: a recipe is a mapping that starts with version: 1, found nothing"),
        ("- 1\n", ":1:1: a recipe is a mapping that starts with version: 1, found a list of 1"),
        ("just text\n", ":1:1: a recipe is a mapping that starts with version: 1, found text 'just text'"),
        (b"a: 1\nb: \xff\n", ":2:4: byte 0xFF is not UTF-8"),
        ("[" * 100_000, ":1:34: nested more than 32 deep"),
        ("{" * 100_000, ":1:34: nested more than 32 deep"),
        ("- " * 100_000, "nested more than 32 deep"),
        ("a: [" + "1," * 300_000 + "]", "more than 20000 values: shorten it"),
        ("a: 1 #" + "x" * (2 << 20), ":1:1: larger than 1 MiB"),
    ],
)
def test_text_that_is_not_a_recipe(tmp_path: Path, text: str | bytes, expected: str) -> None:
    found = mistakes_of(tmp_path, text)
    assert any(expected in line and line.startswith("recipe.yaml:") for line in found), found
    assert all("\n" not in line for line in found)


def test_an_alias_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    found = mistakes_of(tmp_path, "\n".join(lines))
    assert found == ["recipe.yaml:5:5: more than 20000 values, aliases included: shorten it"]


def test_an_alias_is_fine_and_a_mistake_in_it_is_told_where_it_stands(tmp_path: Path) -> None:
    shared = GOOD + "nm: {fine_tune: &short {epochs: 1}}\nquantize: {qat: *short}\n"
    recipe = load(written(tmp_path, shared))
    assert recipe.quantize is not None
    assert recipe.quantize.qat is not None
    assert recipe.quantize.qat.epochs == 1
    found = mistakes_of(tmp_path, shared.replace("epochs: 1}", "epochs: 0}"))
    assert [line.split(": ")[:2] for line in found] == [
        ["recipe.yaml:16:33", "nm.fine_tune.epochs"],
        ["recipe.yaml:16:33", "quantize.qat.epochs"],
    ]


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    assert load(written(tmp_path, GOOD.replace("sparsity: 0.8", "sparsity: 8e-1"))).sparsity == 0.8
    assert "found text 'yes'" in mistakes_of(tmp_path, GOOD + "dense_branch: yes\n")[0]
    assert "found text '1_0'" in mistakes_of(tmp_path, GOOD + "seed: 1_0\n")[0]
    assert load(written(tmp_path, GOOD + "seed: 0o17\n")).seed == 15
    assert load(written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode())).seed == 0


# -- --set


def test_set_changes_lists_makes_mappings_and_comes_last(tmp_path: Path) -> None:
    sets = ["deploy.0.runtime=onnxruntime", "nm.fine_tune.epochs=3", "seed=1", "seed=2", "benchmark.batch_sizes=[1, 8]"]
    recipe = load(written(tmp_path, GOOD), sets)
    assert recipe.deploy[0].runtime == "onnxruntime"
    assert recipe.nm is not None
    assert recipe.nm.fine_tune is not None
    assert recipe.nm.fine_tune.epochs == 3
    assert recipe.seed == 2
    assert recipe.benchmark.batch_sizes == (1, 8)


def test_set_does_not_reach_through_an_alias(tmp_path: Path) -> None:
    text = GOOD + "nm: {fine_tune: &short {epochs: 1}}\nquantize: {qat: *short}\n"
    recipe = load(written(tmp_path, text), ["quantize.qat.epochs=5"])
    assert recipe.nm is not None
    assert recipe.nm.fine_tune is not None
    assert recipe.nm.fine_tune.epochs == 1


def test_paths_start_at_the_recipe_and_those_of_set_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = written(folder, GOOD + "store: ../kept\n")
    assert load(path).store == folder / "../kept"
    assert load(path, ["store=mine"]).store == elsewhere / "mine"
    assert load(path, ["store=/abs"]).store == Path("/abs")
    assert load(path, ["store="]).store is None
    assert isinstance(load(path, ["name=abc"]).name, str)
    assert not isinstance(Path(GivenHere("x")), GivenHere)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("seed", "--set seed: expected a.b=value, such as train.method=static"),
        ("a..b=1", "--set a..b=1: expected a.b=value, such as train.method=static"),
        ("=1", "--set =1: expected a.b=value, such as train.method=static"),
        ("sede=1", "--set sede=1: sede: unknown key; did you mean 'seed'?"),
        ("seed=x", "--set seed=x: seed: expected a whole number, found text 'x'"),
        ("seed.x=1", "--set seed.x=1: seed: expected a whole number, found a mapping"),
        ("version.x=1", "--set version.x=1: version: is 1 and has no fields: set it as a whole"),
        ("deploy.1.runtime=x", "--set deploy.1.runtime=x: deploy: has no item 1: it is a list, counted from 0; "),
        ("deploy.last=x", "--set deploy.last=x: deploy: has no item last: it is a list"),
        ("train.params.drop=1", "--set train.params.drop=1: train.params.drop: unknown key; "),
        ("name=[", "--set name=[: not valid YAML: "),
        ("seed=.nan", "--set seed=.nan: .nan is not a finite number"),
        ("seed=!!int 3", "--set seed=!!int 3: tags such as "),
        ("name=a: b", "--set name=a: b: a mapping on the command line is written {a: 1}"),
        ("train={method: 3}", "--set train={method: 3}: train.method: expected text, found 3"),
    ],
)
def test_a_wrong_set_is_located_at_itself(tmp_path: Path, item: str, expected: str) -> None:
    found = mistakes_of(tmp_path, GOOD, item)
    assert len(found) == 1, found
    assert found[0].startswith(expected), found


def test_mistakes_of_the_file_come_before_those_of_sets_in_their_order(tmp_path: Path) -> None:
    found = mistakes_of(tmp_path, GOOD + "x: 1\n", "zz=1", "aa=1")
    assert [line.split(": ")[0] for line in found] == ["recipe.yaml:16:1", "--set zz=1", "--set aa=1"]


# -- the file and the imports


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            load(path)
        assert not isinstance(caught.value, RecipeError)
        assert len(caught.value.lines) == 1


def test_a_recipe_is_judged_without_torch_and_numpy(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "nm: {fine_tune: {epochs: 1}}\nquantize: {qat: {epochs: 1}}\n")
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'onnx', 'openvino', 'onnxruntime', 'modelopt'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from sparsify_deploy.recipe_source import load, schema\n"
        "print(load(Path(sys.argv[1])).name, len(schema()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("recipe ")


def test_a_wrong_item_is_not_also_a_list_that_is_too_short(tmp_path: Path) -> None:
    found = mistakes_of(tmp_path, GOOD + "distillation: {phases: [train]}\n")
    assert len(found) == 1, found
    assert "distillation.phases.0: expected one of fine_tune, qat" in found[0]
    found = mistakes_of(tmp_path, GOOD + "distillation: {phases: []}\n")
    assert len(found) == 1, found
    assert "expected at least 1 items" in found[0]
