"""A recipe becomes a plan: a small graph of stages in two branches, `dense` and `sparse`, and their race at the end.

Inside a branch the order is a line and later outputs replace earlier ones of the same logical name, so every stage
is optional without wiring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sparsify_deploy import menu
from sparsify_deploy.recipe import NM, Quantize, Recipe, Target
from sparsify_deploy.recipe import Train as TrainSection
from sparsify_deploy.reports import AS_GIVEN, IN_FLOAT, SAME_GRAPH
from sparsify_deploy.stages.base import Stage
from sparsify_deploy.stages.benchmark import BenchmarkEngines, Variant
from sparsify_deploy.stages.build_engine import BuildEngine
from sparsify_deploy.stages.export_onnx import ExportOnnx
from sparsify_deploy.stages.fitting import Fit, hold
from sparsify_deploy.stages.flavours import ExportFlavour
from sparsify_deploy.stages.given import NO_DATA, Given, given
from sparsify_deploy.stages.import_onnx import GivenFlavour, ImportOnnx, RaceGiven
from sparsify_deploy.stages.init_mask import InitMask
from sparsify_deploy.stages.measure import Measure
from sparsify_deploy.stages.project_nm import ProjectNM
from sparsify_deploy.stages.quantize import Quantize as QuantizeStage
from sparsify_deploy.stages.sensitivity import Sensitivity
from sparsify_deploy.stages.subject import Subject, TrustedSubject
from sparsify_deploy.stages.train import Train
from sparsify_deploy.training.settings import Training


@dataclass(frozen=True)
class Ref:
    """An output of an earlier step."""

    step: str
    output: str


@dataclass(frozen=True)
class PlannedStep:
    """One stage in its place: `id` is `branch/stage`, `inputs` are wired, `label` names the model it leaves."""

    id: str
    stage: Stage
    inputs: Mapping[str, Ref]
    label: str = ""

    @property
    def branch(self) -> str:
        """`dense` or `sparse`, or `given` for an ONNX file that is not trained; for a race the stage's name."""
        return self.id.partition("/")[0]


@dataclass
class _Branch:
    """A line of steps while it is being planned; `at_hand` is the latest step for each logical name."""

    name: str
    subject: Subject
    recipe: Recipe
    steps: list[PlannedStep] = field(default_factory=list)
    at_hand: dict[str, Ref] = field(default_factory=dict)
    rows: list[PlannedStep] = field(default_factory=list)

    def add(self, stage: Stage, step: str | None = None, label: str = "") -> PlannedStep:
        identifier = f"{self.name}/{step or stage.name}"
        wired = {name: self.at_hand[name] for name in stage.inputs if name in self.at_hand}
        planned = PlannedStep(identifier, stage, wired, label)
        self.steps.append(planned)
        self.at_hand |= {name: Ref(identifier, name) for name in stage.outputs}
        return planned

    def measure(self, after: str, label: str, nm: NM | None, quantize: Quantize | None) -> None:
        first = self.recipe.deploy[0] if self.recipe.deploy else None
        stage = Measure(
            subject=self.subject,
            export=self.recipe.export,
            quantize=quantize,
            nm=nm,
            sparsity=self.recipe.sparsity if self.name == "sparse" else None,
            runtime=first.runtime if first else None,
            params=first.params if first else None,
            benchmark=self.recipe.benchmark,
        )
        self.rows.append(self.add(stage, f"{after}.report", label))


@dataclass(frozen=True)
class Plan:
    """The steps in the order they run; the ids of the steps whose reports are the rows of the waterfall."""

    recipe: Recipe
    subject: Subject
    steps: tuple[PlannedStep, ...]
    rows: tuple[str, ...]

    def select(self, name: str) -> tuple[str, ...]:
        """The ids a user means by `name`: one step's id, or all steps of a stage."""
        return tuple(s.id for s in self.steps if name in (s.id, s.stage.name, s.id.partition("/")[2]))

    def leading_to(self, name: str) -> Plan:
        """The steps that `name` means and those they take inputs from, directly or not; no others."""
        needed = set(self.select(name))
        for step in reversed(self.steps):  # an input is made before it is taken
            if step.id in needed:
                needed |= {ref.step for ref in step.inputs.values()}
        return Plan(
            self.recipe,
            self.subject,
            tuple(step for step in self.steps if step.id in needed),
            tuple(row for row in self.rows if row in needed),
        )


def plan(recipe: Recipe, *, sensitivity: bool = False, trusted: bool = False) -> Plan:
    """The steps of a recipe. Reads no file and imports no torch.

    The sensitivity of the layers is measured where the recipe keeps the worst ones dense, or where `sensitivity` asks
    for it; asking changes no other step. `trusted` lets its checkpoints run the code they hold.
    """
    if is_given(recipe):
        return _given(recipe)
    kind = TrustedSubject if trusted else Subject
    subject = kind(recipe.model, recipe.data or NO_DATA, recipe.task, recipe.seed)  # recipe_checks asks for data
    sparse = _is_sparse(recipe)
    branches = []
    if recipe.dense_branch or not sparse:
        branches.append(_branch(recipe, subject, "dense", sensitivity=sensitivity and not sparse))
    if sparse:
        branches.append(_branch(recipe, subject, "sparse", sensitivity=sensitivity))
    # A mask costs little, and what is wrong with a network or a recipe should not show after a branch has trained.
    steps = sorted((step for branch in branches for step in branch.steps), key=lambda s: s.stage.name != "init_mask")
    rows = [row for branch in branches for row in branch.rows]
    if recipe.deploy:
        steps += [_race(recipe, subject, branches, target.runtime, i) for i, target in enumerate(recipe.deploy)]
    return Plan(recipe, subject, tuple(steps), tuple(row.id for row in rows))


def is_given(recipe: Recipe) -> bool:
    """Whether the recipe starts from a file that has no torch network, and so has the deploy half alone."""
    return recipe.model.source == "onnx"


def _given(recipe: Recipe) -> Plan:
    """The plan of a file that is there: take it in, build it, race it against its own variants."""
    subject = given(recipe)
    imported = PlannedStep("given/import_onnx", ImportOnnx(subject), {}, AS_GIVEN)
    steps = [imported]
    batch_size, batches = 64, Quantize().calibration_batches
    for target in recipe.deploy:
        onnx = Ref(imported.id, "onnx")
        if target.flavour == "onnxruntime":
            flavour = GivenFlavour(subject, recipe.export, batches, batch_size)
            onnx = Ref(f"given/{flavour.name}", "onnx")
            steps += [PlannedStep(onnx.step, flavour, {"onnx": Ref(imported.id, "onnx")})]
        engine = BuildEngine(subject, target.runtime, target.params, batch_size, recipe.export)
        steps.append(PlannedStep(f"given/build_engine.{target.runtime}", engine, {"onnx": onnx}))
    steps += [_given_race(recipe, subject, target, steps) for target in recipe.deploy]
    return Plan(recipe, subject, tuple(steps), (imported.id,))


def _given_race(recipe: Recipe, subject: Given, target: Target, steps: list[PlannedStep]) -> PlannedStep:
    """The file against what `RaceGiven` finds a meaning in, its float form first: a speed-up is over that."""
    engine = f"given/build_engine.{target.runtime}"
    lower = getattr(menu.entry("runtimes", target.runtime), "lower_precision", lambda _: None)(target.params)
    variants = [Variant(IN_FLOAT, "given_onnx", "float", kept=True), Variant(AS_GIVEN, "given_engine", "engine")]
    if lower is not None:
        variants.append(Variant(f"{AS_GIVEN}, in {lower[0]}", "given_onnx", "lower_precision", kept=True))
    variants.append(Variant(SAME_GRAPH, "given_onnx", "dense_weights"))
    (built_from,) = (step.inputs["onnx"] for step in steps if step.id == engine)
    stage = RaceGiven(subject, target.runtime, target.params, recipe.benchmark, tuple(variants))
    inputs = {"given_onnx": built_from, "given_engine": Ref(engine, "engine")}
    return PlannedStep(f"benchmark/{target.runtime}", stage, inputs)


def _is_sparse(recipe: Recipe) -> bool:
    moves = recipe.train is not None and menu.entry("methods", recipe.train.method).LEAVES_MASK
    return moves or recipe.nm is not None


def _branch(recipe: Recipe, subject: Subject, name: str, *, sensitivity: bool) -> _Branch:
    """One branch; the dense one gets the same optimizer steps, folding, quantizers and calibration data."""
    sparse = name == "sparse"
    branch = _Branch(name, subject, recipe)
    batch_size = recipe.training.batch_size if recipe.training else 64
    nm = recipe.nm if sparse else None
    pattern = nm.pattern if nm else ""
    if sparse and recipe.init is not None:
        branch.add(InitMask(subject, recipe.init, recipe.sparsity, batch_size))
    if recipe.train is not None:
        settings = recipe.training_for(recipe.train.training)
        fit = _sparse_fit(recipe, recipe.train, settings) if sparse else hold(False, settings, "train")
        branch.add(Train(subject, fit))
        if recipe.distillation is not None and recipe.distillation.teacher is None:
            branch.at_hand["teacher"] = Ref("dense/train", "weights")
        if fit.method != "dense":
            branch.measure("train", "sparse FP32", None, None)
        elif not sparse or not recipe.dense_branch:  # else it is the dense branch's own model, measured there
            branch.measure("train", "dense FP32", None, None)
    elif not sparse:
        branch.measure("model", "dense FP32", None, None)
    _add_sensitivity(branch, batch_size, sensitivity)
    if recipe.nm is not None:
        training = recipe.training_for(recipe.nm.fine_tune) if recipe.nm.fine_tune else None
        if nm is not None:
            branch.add(ProjectNM(subject, nm, training, batch_size, recipe.distilled("fine_tune")))
            branch.measure("project_nm", f"{pattern} FP32", nm, None)
        elif training is not None:
            fine_tune = Train(subject, hold(False, training, "fine_tune"), recipe.distilled("fine_tune"))
            branch.add(fine_tune, "fine_tune")
            branch.measure("fine_tune", "dense FP32, fine-tuned", None, None)
    if recipe.quantize is not None:
        training = recipe.training_for(recipe.quantize.qat) if recipe.quantize.qat else None
        branch.add(QuantizeStage(subject, recipe.quantize, training, batch_size, recipe.distilled("qat")))
        branch.measure("quantize", f"{pattern or name} INT8", nm, recipe.quantize)
    _add_engines(branch, nm, batch_size)
    return branch


def _add_engines(branch: _Branch, nm: NM | None, batch_size: int) -> None:
    """The export, the other flavour of it where a target wants that, and an engine of each target."""
    recipe = branch.recipe
    if not recipe.deploy:
        return
    exported = {"tensorrt": branch.add(ExportOnnx(branch.subject, recipe.export, recipe.quantize, nm)).id}
    for target in recipe.deploy:
        wanted = flavour_of(recipe, target)
        if recipe.quantize is not None and wanted not in exported:
            branch.at_hand["onnx"] = Ref(exported["tensorrt"], "onnx")
            stage = ExportFlavour(branch.subject, recipe.export, recipe.quantize, nm, batch_size)
            exported[wanted] = branch.add(stage).id
        branch.at_hand["onnx"] = Ref(exported.get(wanted, exported["tensorrt"]), "onnx")
        engine = BuildEngine(branch.subject, target.runtime, target.params, batch_size, recipe.export)
        branch.add(engine, f"build_engine.{target.runtime}")


def flavour_of(recipe: Recipe, target: Target) -> Literal["tensorrt", "onnxruntime", "none"]:
    """Where Q/DQ stand in the file a target's engine is built from; "none" where nothing is quantised."""
    if recipe.quantize is None:
        return "none"
    own: Literal["tensorrt", "onnxruntime"] = menu.entry("runtimes", target.runtime).FLAVOUR
    return target.flavour or own


def _add_sensitivity(branch: _Branch, batch_size: int, asked: bool) -> None:
    """Measure each layer alone where the projection leaves out the worst, or where it is asked for.

    The stage gets those settings alone that change what it measures, so that others do not repeat it.
    """
    given, int8 = branch.recipe.nm or NM(), branch.recipe.quantize or Quantize()
    ranked = branch.name == "sparse" and given.keep_worst_dense > 0
    if asked or ranked:
        nm = NM(pattern=given.pattern, layers=given.layers, keep_dense=given.keep_dense)
        int8 = int8.model_copy(update={"qat": None})
        branch.add(Sensitivity(branch.subject, nm, int8, branch.recipe.gates.metric, batch_size))
    if not ranked:  # what was only asked for is nobody's input
        branch.at_hand.pop("sensitivity", None)


def _sparse_fit(recipe: Recipe, train: TrainSection, settings: Training) -> Fit:
    prunes = menu.entry("methods", train.method).NEEDS_SPARSITY
    return Fit(train.method, train.params, settings, "train", recipe.sparsity if prunes else None)


def _race(recipe: Recipe, subject: Subject, branches: list[_Branch], runtime: str, index: int) -> PlannedStep:
    """The benchmark of one runtime: every model of the waterfall on the first one, the final engines on the others.

    The first one also runs the dense float model at its lower precision. Without a dense branch the sparse file with
    dense weights stands in for the twin.
    """
    params = recipe.deploy[index].params
    lower = getattr(menu.entry("runtimes", runtime), "lower_precision", lambda _: None)(params)
    variants: list[Variant] = []
    inputs: dict[str, Ref] = {}
    for branch in branches:
        engine = f"{branch.name}_engine"
        built = f"{branch.name}/build_engine.{runtime}"
        inputs[engine] = Ref(built, "engine")
        for row in branch.rows[:-1]:
            if index > 0 and row.label != "dense FP32":
                continue
            variants.append(Variant(row.label, row.id, "onnx", kept=row.label.startswith("dense FP32")))
            inputs[row.id] = Ref(row.id, "measured_onnx")
        if len(branches) == 1 and branch.name == "sparse":
            (source,) = (step.inputs["onnx"] for step in branch.steps if step.id == built)
            variants.append(Variant(SAME_GRAPH, "sparse_onnx", "dense_weights"))
            inputs["sparse_onnx"] = source
        variants.append(Variant(branch.rows[-1].label if branch.rows else branch.name, engine, "engine"))
        if branch.name == "dense" and index == 0 and lower is not None:
            float_row = [row for row in branch.rows if getattr(row.stage, "quantize", None) is None][-1]
            at = len(variants) - (float_row is not branch.rows[-1])  # after the float model, before the INT8 one
            variants.insert(at, Variant(f"dense {lower[0]}", float_row.id, "lower_precision", kept=True))
            inputs[float_row.id] = Ref(float_row.id, "measured_onnx")
    stage = BenchmarkEngines(subject, runtime, params, recipe.benchmark, tuple(variants))
    return PlannedStep(f"benchmark/{runtime}", stage, inputs)
