"""The command line end to end on a recipe with every stage: results, caching, exit codes, refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAST = ("--set", "dense_branch=false", "--set", "deploy=[]", "--set", "nm=null", "--set", "quantize=null")


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of the finished folder as the working directory of `cli`."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_run_ends_with_the_verdict_on_stdout_and_progress_on_stderr(finished):
    lines = (finished / "stdout").read_text().splitlines()
    assert lines[-1].startswith("Verdict: ")
    assert "first time" in (finished / "stderr").read_text()
    assert "first time" not in "\n".join(lines)


def test_the_run_directory_holds_reports_recipe_and_engines_of_both_branches(finished):
    run = finished / "runs" / "tiny"
    report = json.loads((run / "report.json").read_text())
    assert [row["label"] for row in report["rows"]] == [
        "dense FP32",
        "dense FP32, fine-tuned",
        "dense INT8",
        "sparse FP32",
        "2:4 FP32",
        "2:4 INT8",
    ]
    assert (run / "recipe.yaml").read_text() == (finished / "tiny.yaml").read_text()
    for engine in report["engines"]:
        assert (run / engine["file"]).stat().st_size > 0
        assert 0.0 <= engine["metrics"]["accuracy"] <= 1.0
    assert report["verdict"] in (run / "report.md").read_text()


def test_each_row_of_the_report_was_measured(finished):
    report = json.loads((finished / "runs" / "tiny" / "report.json").read_text())
    for row in report["rows"]:
        model = row["model"]
        assert model["examples"] == 360
        assert model["latency"][0]["p50_ms"] > 0
        assert model["latency"][0]["p50_ms"] <= model["latency"][0]["p99_ms"]
        assert len(model["layers"]) == 10
    by_label = {row["label"]: row["model"] for row in report["rows"]}
    held = {layer["weight"] for layer in by_label["2:4 INT8"]["layers"] if layer["pattern_held"]}
    assert len(held) == 8
    assert not any(layer["pattern_held"] for layer in by_label["dense INT8"]["layers"])
    assert by_label["2:4 INT8"]["onnx_bytes"] < 0.5 * by_label["2:4 FP32"]["onnx_bytes"]


def test_both_branches_take_the_same_optimizer_steps(finished):
    report = json.loads((finished / "runs" / "tiny" / "report.json").read_text())
    steps = {"dense": 0, "sparse": 0}
    for row in report["rows"]:
        steps[row["step"].split("/")[0]] += row["optimizer_steps"]
    assert steps == {"dense": 22, "sparse": 22}


def test_a_second_run_has_nothing_to_do_imports_no_torch_and_leaves_the_reports(cli, again):
    reports = [again / "runs" / "tiny" / f"report.{kind}" for kind in ("json", "md", "html")]
    before = [path.read_bytes() for path in reports]
    program = (
        "import sys; from sparsify_deploy.__main__ import main; code = main(['run', 'tiny.yaml', '--json']); "
        "found = sorted({'torch', 'numpy', 'onnx', 'openvino'} & set(sys.modules)); "
        "assert not found, found; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["verdict"].startswith("Verdict: ")
    assert {step["state"] for step in shown["steps"]} == {"cached"}
    assert [path.read_bytes() for path in reports] == before


def test_reports_are_written_again_where_one_is_gone_or_a_gate_differs(cli, again):
    folder = again / "runs" / "tiny"
    (folder / "report.md").unlink()
    assert cli("run", "tiny.yaml", "-q").returncode == 0
    assert (folder / "report.md").is_file()
    limit = json.loads((folder / "report.json").read_text())["gates"]
    cli("run", "tiny.yaml", "-q", "--set", "gates.min_sparsity=0.999")
    assert json.loads((folder / "report.json").read_text())["gates"] != limit


def test_status_explain_and_report_tell_the_same_from_the_run_directory(cli, again):
    status = json.loads(cli("status", "tiny.yaml", "--json").stdout)
    assert {row["state"] for row in status} == {"cached"}
    explained = cli("explain", "tiny.yaml", "sparse/train", "--set", "train.params.drop_fraction=0.2")
    assert "settings.fit.params.drop_fraction: 0.3 -> 0.2" in explained.stdout
    report = cli("report", "runs/tiny")
    assert report.returncode == 0
    assert report.stdout.splitlines()[-1].startswith("Verdict: ")


@pytest.mark.parametrize(
    ("change", "first", "untouched"),
    [
        ("init.params.rounds=6", "sparse/init_mask", "dense/quantize"),
        ("train.params.drop_fraction=0.2", "sparse/train", "sparse/init_mask"),
        ("nm.fill_batches=3", "sparse/project_nm", "sparse/train"),
        ("quantize.calibration_batches=3", "dense/quantize", "dense/fine_tune"),
        ("export.opset=16", "dense/train.report", "dense/train"),
        ("benchmark.rounds=6", "dense/train.report", "sparse/quantize"),
        ("data.params.size=16", "sparse/init_mask", None),
        ("seed=4", "sparse/init_mask", None),
    ],
)
def test_a_changed_field_runs_its_stage_again_and_no_earlier_one(cli, again, change, first, untouched):
    found = json.loads(cli("status", "tiny.yaml", "--json", "--set", change).stdout)
    states = {row["step"]: row["state"] for row in found}
    assert next(step for step, state in states.items() if state != "cached") == first
    assert untouched is None or states[untouched] == "cached"


def test_again_runs_a_stage_anew_and_what_follows_only_if_its_bytes_changed(cli, again, digests):
    store = again / "runs" / "tiny" / "store"
    before = digests(store)
    done = cli("run", "tiny.yaml", "--again", "sparse/project_nm", "--json")
    assert done.returncode == 0, done.stderr
    ran = [step["id"] for step in json.loads(done.stdout)["steps"] if step["state"] == "ran"]
    assert ran == ["sparse/project_nm"]
    assert digests(store) == before


def test_from_runs_that_stage_and_all_after_it(cli, again):
    done = cli("run", "tiny.yaml", "--from", "sparse/export_onnx", "--json")
    ran = [step["id"] for step in json.loads(done.stdout)["steps"] if step["state"] == "ran"]
    assert ran == ["sparse/export_onnx", "sparse/build_engine.openvino", "benchmark/openvino"]


def test_a_changed_byte_in_the_store_is_exit_9_and_again_mends_it(cli, again):
    (mask,) = (again / "runs" / "tiny" / "store").glob("init_mask-*/mask.safetensors")
    data = bytearray(mask.read_bytes())
    data[-1] ^= 1
    mask.write_bytes(data)
    broken = cli("run", "tiny.yaml")
    assert broken.returncode == 9
    assert "mask.safetensors" in broken.stderr
    assert cli("run", "tiny.yaml", "--again", "init_mask").returncode == 0


def test_a_gate_that_is_not_met_is_exit_4_and_the_artifacts_stay(cli, again):
    done = cli("run", "tiny.yaml", "--set", "gates.min_sparsity=0.99")
    assert done.returncode == 4
    assert "NOT MET" in done.stdout
    assert list((again / "runs" / "tiny" / "engines").rglob("model.xml"))


def test_parity_beyond_the_limit_is_exit_4_names_the_file_and_is_not_cached(cli, again):
    strict = ("--set", "quantize=null", "--set", "export.max_relative_difference=1e-12")
    for _ in range(2):
        done = cli("run", "tiny.yaml", *strict, "--until", "sparse/export_onnx")
        assert done.returncode == 4
        (line,) = [text for text in done.stderr.splitlines() if "differs from torch" in text]
        kept = Path(re.search(r"(\S+model\.onnx)", line).group(1))
        assert (again / kept).is_file()


def test_until_stops_after_that_stage_and_says_that_there_is_no_verdict(cli, recipe):
    done = cli("run", recipe, *FAST, "--until", "init_mask")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Verdict: none")


def test_a_locked_run_directory_is_exit_8(cli, start, recipe, tmp_path):
    process = start("run", recipe, *FAST, "--set", "training.steps=4000")
    until = time.monotonic() + 60
    while not (tmp_path / "runs" / "tiny" / "store").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    other = cli("run", recipe, *FAST)
    process.kill()
    process.wait()
    assert other.returncode == 8
    assert len(other.stderr.splitlines()) == 1


def test_divergence_is_exit_6_and_says_what_to_change(cli, recipe):
    done = cli("run", recipe, *FAST, "--set", "training.optimizer.lr=1e30", "--until", "train")
    assert done.returncode == 6
    assert "optimizer.lr" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("run", "missing.yaml"), 2, "missing.yaml"),
        (("run", "tiny.yaml", "--again", "trian"), 2, "did you mean 'train'"),
        (("run", "tiny.yaml", "--until", "nothing"), 2, "no stage 'nothing'"),
        (("run",), 2, "RECIPE"),
        (("run", "tiny.yaml", "--nonsense"), 2, "--nonsense"),
        (("report", "."), 5, "no report"),
        (("list", "methds"), 2, "did you mean 'methods'"),
        (("validate", "tiny.yaml", "--set", "data.sorce=npz"), 2, "did you mean 'source'"),
        (("plan", "tiny.yaml", "--set", "model.params.name=resnet21"), 2, "model.params.name"),
        (("run", "tiny.yaml", "--set", "model.params.in_channels=3"), 5, "does not fit the data"),
        (("run", "tiny.yaml", "--set", "init.keep_dense=[nope]"), 5, "nope"),
        (("run", "tiny.yaml", "--set", "data={source: npz, params: {path: gone.npz}}"), 5, "gone.npz"),
        (("run", "tiny.yaml", "--set", "model={source: file, params: {path: tiny.yaml}}"), 2, "--trust-code"),
        (("build", "gone.onnx"), 5, "gone.onnx"),
        (("bench", "tiny.yaml"), 5, "tiny.yaml"),
        (("inspect", "tiny.yaml"), 5, "tiny.yaml"),
    ],
)
def test_nonsense_is_a_line_and_its_exit_code(cli, recipe, arguments, code, text):
    done = cli(*arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


def test_plan_shows_every_step_its_cost_and_which_layers_could_run_sparse(cli, recipe):
    done = cli("plan", recipe, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    steps = {row["step"]: row for row in found["steps"]}
    assert steps["sparse/train"]["optimizer_steps"] == 12
    assert steps["dense/train"]["dense_training_flops"] > 0
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["layer1.0.conv1"]["projected"]
    assert not layers["conv1"]["projected"]
    assert "C_in 1" in layers["conv1"]["reason"]


def test_layers_left_in_float_are_named_in_the_notes(cli, recipe):
    short = ("--set", "training.steps=2", "--set", "nm=null", "--set", "quantize={keep_float: [fc]}")
    done = cli("run", recipe, *short, "--set", "dense_branch=false", "--json")
    assert done.returncode == 0, done.stderr
    assert any("fc not quantised" in note for note in json.loads(done.stdout)["notes"])


def test_without_a_dense_branch_two_runtimes_are_raced_and_nothing_is_recommended(cli, recipe):
    short = ("--set", "training.steps=2", "--set", "nm.fine_tune=null", "--set", "quantize.qat=null")
    two = ("--set", "deploy=[{runtime: openvino}, {runtime: onnxruntime}]", "--set", "export.min_top1_agreement=0.1")
    done = cli("run", recipe, *short, *two, "--set", "dense_branch=false")
    assert done.returncode == 0, done.stderr
    assert "no recommendation" in done.stdout.splitlines()[-1]
    assert "None" not in done.stdout


def test_mistakes_that_need_no_training_show_before_any(cli, recipe, tmp_path):
    for change in ("init.keep_dense=[nope]", "nm.keep_dense=[nope]", "quantize.keep_float=[nope]"):
        done = cli("run", recipe, "--set", change)
        assert done.returncode == 5
        assert "'nope'" in done.stderr
        assert not list((tmp_path / "runs" / "tiny").rglob("manifest.json"))


def test_the_onnx_files_are_published_beside_the_engines(finished):
    for branch in ("dense", "sparse"):
        assert (finished / "runs" / "tiny" / "onnx" / branch / "model.onnx").stat().st_size > 0


def test_a_reader_that_goes_away_is_no_error(again):
    shell = f"{sys.executable} -m sparsify_deploy report runs/tiny | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=again, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_no_colour_and_no_control_characters_where_there_is_no_terminal(cli, again):
    done = cli("run", "tiny.yaml")
    assert "\x1b" not in done.stdout + done.stderr
