"""The verbs, without logic: read the options, call one function, hand its result to the console."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify_deploy import __version__, console
from sparsify_deploy.errors import DataError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a PyTorch model to a 2:4-sparse INT8 engine, with a measured verdict on what that bought.",
)

# Newer versions of typer carry a click of their own, so the class is taken from where typer has it.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_CTRL_C = 130
"""What typer returns where a verb was interrupted."""

_WHERE = "where training runs; auto: a GPU if torch sees one"
_GPUS = "a100, a100-pcie, a10, a30, l4, l40s, h100, h100-pcie, h200, orin-agx"

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, a YAML file")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a field, as in training.epochs=3; repeatable"),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="where the run lives; default runs/NAME")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run directory, such as runs/digits")]
Store = Annotated[Path | None, typer.Option("--store", help="a store shared with other recipes; default RUN_DIR/store")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Trust = Annotated[bool, typer.Option("--trust-code", help="allow the recipe to run the Python files it names")]
TrustEngine = Annotated[
    bool, typer.Option("--trust-engine", help="open an engine that you did not build here: it is executable code")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1x3x224x224", help="the whole shape of an input with free axes; repeatable"),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="more progress")]


class Device(str, Enum):
    """Where training runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def call(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code, raises `SparsifyError` for what went wrong."""
    out, err = sys.stdout, sys.stderr
    try:
        result = app(list(arguments), standalone_mode=False, prog_name="sparsify-deploy")
    except typer.Abort:
        raise KeyboardInterrupt from None
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer puts others in their place and ends the process
            sys.stdout, sys.stderr = out, err
            raise stop.__context__ from None
        raise _ended(f"sys.exit({stop.code!r})") from stop
    except _ClickException as error:
        console.error(error.format_message())
        if (context := getattr(error, "ctx", None)) is not None:
            console.error(f"try: {context.command_path} --help")
        return 2
    except BaseException as stop:
        if isinstance(stop, (Exception, KeyboardInterrupt)):
            raise
        raise _ended(f"raise {type(stop).__name__}") from stop
    if result == _CTRL_C:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _ended(how: str) -> DataError:
    return DataError(f"code of the recipe's ended the program ({how}): let it raise an exception that says why")


def _version(value: bool) -> None:
    if value:
        console.out(f"sparsify-deploy {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="show the traceback of an internal error")] = False,
) -> None:
    pass


@app.command(short_help="Take a recipe to its engines, skipping what is done.")
def run(
    recipe: RecipeFile,
    sets: Sets = None,
    run_dir: RunDir = None,
    store: Store = None,
    start: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="run again from this stage on")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="stop after this stage")] = None,
    again: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="run this stage again; repeatable")] = None,
    device: Annotated[Device, typer.Option(help=_WHERE)] = Device.auto,
    checkpoint_every: Annotated[float, typer.Option(metavar="SECONDS", help="step checkpoints while training")] = 30.0,
    trust_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Take a recipe to its engines; what is finished already is not run again."""
    from sparsify_deploy import workspace

    with console.progress(quiet=quiet, verbose=verbose) as progress:
        report = workspace.open_run(recipe, sets or (), run_dir, store, trust_code=trust_code).run(
            progress,
            device=device.value,
            checkpoint_every_s=checkpoint_every,
            start=start,
            until=until,
            again=again or (),
        )
    console.run_report(report, as_json=as_json)
    return workspace.exit_code(report)


@app.command(short_help="Measure what each layer alone loses in N:M and in INT8.")
def sensitivity(
    recipe: RecipeFile,
    sets: Sets = None,
    run_dir: RunDir = None,
    store: Store = None,
    device: Annotated[Device, typer.Option(help=_WHERE)] = Device.auto,
    trust_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure, layer by layer, what is lost if it alone is projected on N:M, and if it alone is INT8.

    Trains what the recipe trains before projection, unless that is done, and adds the table to the run's report.
    """
    from sparsify_deploy import workspace

    with console.progress(quiet=quiet, verbose=False) as progress:
        opened = workspace.open_run(recipe, sets or (), run_dir, store, trust_code=trust_code)
        found = opened.sensitivity(progress, device=device.value)
    console.sensitivity(found, as_json=as_json)


@app.command(short_help="Write a first recipe for a trained network.")
def init(
    model: Annotated[
        str,
        typer.Option(
            metavar="SOURCE:NAME",
            help="timm:resnet50, torchvision:NAME, transformers:DIR, file:net.py:build, builtin:NAME, onnx:FILE",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE:PATH",
            help="folder:DIR, npz:FILE, parquet:DIR, text:DIR, huggingface:DIR, torchvision:DIR:NAME, file:FILE, "
            "digits",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE:NAME", help="other than the targets suggest: file:task.py:Task, classification, regression"
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the recipe")] = Path("recipe.yaml"),
    checkpoint: Annotated[Path | None, typer.Option(help="trained weights: .safetensors, or a .pt of tensors")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="as in data.params.test_fraction=0.2, model.params...; repeatable"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that is there")] = False,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe that takes a trained network to 2:4 and INT8, with defaults that follow from it and the data."""
    from sparsify_deploy import starter

    found = starter.start(
        model,
        data,
        output,
        checkpoint=checkpoint,
        trust_code=trust_code,
        force=force,
        sets=sets or (),
        task=task,
    )
    console.started(found, as_json=as_json)


@app.command(short_help="Check a recipe and name every mistake.")
def validate(recipe: RecipeFile, sets: Sets = None, as_json: AsJson = False) -> None:
    """Check a recipe and name every mistake; needs neither torch nor the data."""
    from sparsify_deploy import recipe_source

    console.validated(recipe, recipe_source.load(recipe, sets or ()), as_json=as_json)


@app.command(short_help="Dry run: what would run and why, cost, eligible layers.")
def plan(
    recipe: RecipeFile,
    sets: Sets = None,
    run_dir: RunDir = None,
    store: Store = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{_GPUS}, or a .json file of more; in place of prediction.gpus; repeatable"),
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N[,N...]", help="in place of prediction.batch_sizes")] = None,
    trust_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what would run and why, its estimated cost, which layers could run sparse, and what that is predicted to
    gain on GPUs, from shapes. Runs no step; what the user's code is needed for is left out without --trust-code."""
    from sparsify_deploy import deploy, workspace

    opened = workspace.open_run(recipe, sets or (), run_dir, store, trust_code=trust_code or None)
    sizes = deploy.parse_batches(batch) if batch is not None else ()
    console.forecast(opened.forecast(gpu or (), sizes), as_json=as_json)


@app.command(short_help="Show which steps of a recipe are done.")
def status(
    recipe: RecipeFile, sets: Sets = None, run_dir: RunDir = None, store: Store = None, as_json: AsJson = False
) -> None:
    """Show which steps of a recipe are done."""
    from sparsify_deploy import workspace

    console.status(workspace.open_run(recipe, sets or (), run_dir, store).status(), as_json=as_json)


@app.command(short_help="Say which field makes a stage run again.")
def explain(
    recipe: RecipeFile,
    stage: Annotated[str | None, typer.Argument(help="one step or stage; default all")] = None,
    sets: Sets = None,
    run_dir: RunDir = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Say which field makes a stage run again."""
    from sparsify_deploy import workspace

    found = workspace.open_run(recipe, sets or (), run_dir, store).status(stage)
    console.explained(found, as_json=as_json)


@app.command(short_help="Print the report of a finished run.")
def report(
    run_dir: RunDirectory,
    as_json: AsJson = False,
) -> int:
    """Print the report of a finished run."""
    from sparsify_deploy import workspace

    found = workspace.read_report(run_dir)
    console.run_report(found, as_json=as_json)
    return workspace.exit_code(found)


@app.command(short_help="Check that a run directory holds what was committed.")
def verify(
    run_dir: RunDirectory,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Check all that a run directory holds: bytes, N:M in masks, weights and ONNX files, engines, copies, parity.

    Exit code 9 where bytes are not those that were committed, 4 where a pattern or parity is not met. Needs no torch.
    """
    from sparsify_deploy.checkup.verify import verify as check

    with console.progress(quiet=quiet, verbose=False) as progress:
        found = check(run_dir, store, progress)
    console.verified(found, as_json=as_json)
    return found.exit_code


@app.command(short_help="Delete what a run directory does not need.")
def clean(
    run_dir: RunDirectory,
    store: Store = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="also attempts that a run would go on from, with their checkpoints")
    ] = False,
    unused: Annotated[bool, typer.Option("--unused", help="also results that the last report does not use")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="delete nothing, say what would go")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what killed runs left half written in a run directory and, where asked to, what can be made again.

    Goes by names and marks that nothing else has, follows no links, and holds the run's lock.
    """
    from sparsify_deploy.checkup.clean import clean as sweep

    console.cleaned(sweep(run_dir, store, unfinished=unfinished, unused=unused, dry_run=dry_run), as_json=as_json)


@app.command(name="list", short_help="List what a recipe may name.")
def list_(
    which: Annotated[
        str | None, typer.Argument(metavar="[MENU]", help="one menu, such as methods; default all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a recipe may name: criteria, methods, models, data sets, tasks, runtimes."""
    from sparsify_deploy import menu
    from sparsify_deploy.errors import UsageError

    if which is not None and which not in menu.MENUS:
        raise UsageError(f"no menu {which!r}{menu.did_you_mean(which, menu.MENUS)}")
    chosen = [which] if which else list(menu.MENUS)
    console.menus({m: {n: menu.summary(m, n) for n in menu.names(m)} for m in chosen}, as_json=as_json)


@app.command(short_help="Build an engine from an ONNX file.")
def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="an ONNX file")],
    runtime: Annotated[str, typer.Option(help="see: list runtimes")] = "openvino",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the engine; default beside the model")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a parameter of the runtime; repeatable")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="DIR", help="also put the engine into this Triton model repository")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Build an engine from an ONNX file. Needs no torch."""
    from sparsify_deploy import deploy

    with console.progress(quiet=quiet, verbose=False) as progress:
        made = deploy.build(model, runtime, output, sets or (), triton, progress=progress)
    console.built(made, as_json=as_json)


@app.command(short_help="Time engines or ONNX files against each other.")
def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="engines or ONNX files; the first is the baseline")
    ],
    runtime: Annotated[str, typer.Option(help="what ONNX files run in; see: list runtimes")] = "openvino",
    batch: Annotated[str, typer.Option(metavar="N[,N...]", help="batch sizes")] = "1",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads")] = 1,
    rounds: Annotated[int, typer.Option(min=5, help="interleaved rounds")] = 20,
    round_ms: Annotated[float, typer.Option(min=1, help="time for each file in a round, ms")] = 30.0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a parameter of --runtime; repeatable")
    ] = None,
    shape: Shapes = None,
    int_range: Annotated[str, typer.Option(metavar="LOW:HIGH", help="values of integer inputs")] = "0:1",
    trust_engine: TrustEngine = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time engines or ONNX files on random inputs, interleaved, with an A/A control. Needs no torch."""
    from sparsify_deploy import deploy

    with console.progress(quiet=quiet, verbose=False) as progress:
        result = deploy.bench(
            models,
            runtime=runtime,
            batch_sizes=deploy.parse_batches(batch),
            threads=threads,
            rounds=rounds,
            round_ms=round_ms,
            trust=trust_engine,
            progress=progress,
            sets=sets or (),
            shapes=deploy.parse_shapes(shape or ()),
            integers=deploy.parse_range(int_range),
        )
    console.raced(result, as_json=as_json)


@app.command(short_help="Say layer by layer what could run sparse, and what did.")
def inspect(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="an ONNX file or an engine")],
    pattern: Annotated[str, typer.Option(metavar="N:M", help="the pattern looked for")] = "2:4",
    onnx: Annotated[Path | None, typer.Option(help="the ONNX file an engine was built from")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the reference: run both, name the first layer that differs")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="with --compare: what both are fed; default random")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="with --compare: relative L2; default 1e-4, 0.1 for INT8 and BF16")
    ] = None,
    shape: Shapes = None,
    profile: Annotated[bool, typer.Option("--profile", help="run an engine here and time its layers")] = False,
    trust_engine: TrustEngine = False,
    as_json: AsJson = False,
) -> int:
    """Say, layer by layer, what could run sparse by the file and what did by the builder's word. Needs no torch.

    With --compare say instead how far its answers are from another file's, and which layer differs first: exit code 4.
    """
    from sparsify_deploy import deploy

    if compare is not None:
        compared = deploy.compare_files(
            compare, model, onnx=onnx, inputs=inputs, tolerance=tolerance, shapes=shape or (), trust=trust_engine
        )
        console.compared(compared, as_json=as_json)
        return 4 if compared.differ else 0
    deploy.only_with_compare(inputs=inputs, tolerance=tolerance, shape=shape)

    found = deploy.inspect(model, pattern, trust=trust_engine, onnx=onnx, profile=profile)
    console.inspected(found, as_json=as_json)
    return 0


@app.command(short_help="Put images, texts or arrays through a deployed model.")
def predict(
    package: Annotated[Path, typer.Argument(metavar="DEPLOY_DIR", help="the folder deploy/ of a finished run")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="images, .npy arrays, or .txt files with a text a line, as it takes"),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="a text; repeatable")] = None,
    top: Annotated[int, typer.Option(min=1, help="how many classes to show of each")] = 5,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads")] = 1,
    trust_engine: TrustEngine = False,
    as_json: AsJson = False,
) -> None:
    """Put images, texts or arrays through a deployed model, as in: predict runs/digits/deploy cat.jpg dog.jpg

    Each is preprocessed as the recipe's data were, by the preprocessing.json that lies beside the engine. Shows the
    likeliest classes with their probability, or the outputs of a model that is no classifier. Needs no torch.
    """
    from sparsify_deploy.predict import predict as ask

    found = ask(package, files or (), text or (), top=top, threads=threads, trust=trust_engine, keep_going=True)
    console.predicted(found, as_json=as_json)
    found.check()


@app.command(short_help="Check this machine and say what to install for what.")
def doctor(
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="[RUN_DIR]", help="also look at this run directory, its lock and its disk")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, devices, limits and disks, with the command that mends each. Needs no torch."""
    from sparsify_deploy.checkup.doctor import diagnose

    console.diagnosis(diagnose(run_dir), as_json=as_json)


@app.command(short_help="Print the version.")
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    console.version(__version__, as_json=as_json)
