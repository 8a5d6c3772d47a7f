"""The command line. Each command is one call of the Python interface, then its printing.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.runtime.errors import EdgewiseError

if TYPE_CHECKING:
    from edgewise.calibration.images import Preprocess
    from edgewise.optimizer.benchmarking import Benchmark
    from edgewise.optimizer.console import Answer
    from edgewise.optimizer.profiling import ProfileReport
    from edgewise.optimizer.recipe import Recipe
    from edgewise.training.options import TrainOptions

_INTERRUPTED = 130  # what a shell gives for a process that SIGINT ended

app = typer.Typer(
    name="edgewise",
    add_completion=False,
    rich_markup_mode=None,  # importing rich for the help alone takes as long as everything else
    pretty_exceptions_enable=False,
    help="Make an ONNX model smaller and faster on the machine it will run on, "
    "and prove that it still does its job.",
)


def main() -> None:
    """The entry point of the `edgewise` command."""
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # what it finds wrong in a file, `load` tells
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files go
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and give its exit code: 0 done, 1 the job failed, 2 the user's input is wrong.

    An expected failure is one line on stderr. A bug is raised, with its traceback.
    """
    try:
        return app(list(arguments) or ["--help"], prog_name="edgewise", standalone_mode=False) or 0
    except EdgewiseError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(f"{error.format_message()} (see edgewise --help)", error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED


def _fail(message: str, code: int) -> int:
    typer.echo(f"edgewise: {' '.join(message.split())}", err=True)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        from edgewise.optimizer.version import VERSION

        typer.echo(f"edgewise {VERSION}")
        raise typer.Exit


def _check_folder(file: Path | None) -> Path | None:
    """Find out before the job, not after it, that its result cannot be written."""
    if (
        file is not None
        and str(file) != "-"
        and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK))
    ):
        raise typer.BadParameter(f"{file} cannot be written")
    return file


def _check_report(folder: Path | None) -> Path | None:
    """Find out before the job, not after it, that its report cannot be written."""
    from edgewise.optimizer.files import make_folder

    if folder is not None:
        make_folder(folder)
    return folder


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="An .onnx file, or package.module:callable of a torch module.")
]
OnnxFile = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The .onnx file to write.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Samples: an .npz, a folder of .npy, .npz or images, module:function, or random.",
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Samples that only judge; without them some of --data are held back for that."
    ),
]
Preprocessing = Annotated[
    str | None,
    typer.Option(
        "--preprocess", metavar="OPTIONS", help="For images: resize=256,crop=224,scale=255,mean=..,std=.."
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="NAME=SHAPE", help="Input of a torch module: x=1x3x224x224[:dtype]. Repeatable."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="A YAML file with the options of the job.")
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="top1, agreement, fidelity, equality, psnr, ssim, frechet:FEATURES.onnx,REAL, or "
        "module:function(outputs, labels).",
    ),
]
MaxDrop = Annotated[
    float | None, typer.Option(metavar="X", help="How much the metric may fall; 0.01 of top1 is one point.")
]
Target = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where it will run: cpu, cuda, tensorrt or openvino.")
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Threads to run with; all cores by default.")]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of everything that is drawn; 0 by default.")
]
FixDims = Annotated[
    list[str] | None,
    typer.Option(
        "--fix-dim", metavar="NAME=N", help="Fix an open dimension: batch=1, or x.0=1 by input. Repeatable."
    ),
]
Outputs = Annotated[
    str | None,
    typer.Option("--outputs", metavar="LIST", help="Keep these outputs, a,b, and what they need."),
]
Uint8Input = Annotated[
    str | None,
    typer.Option(
        "--uint8-input", metavar="LAYOUT", help="Take raw pixels, nchw or nhwc; --preprocess goes inside."
    ),
]
Runtime = Annotated[
    str | None, typer.Option(metavar="VERSION", help="Write what onnxruntime of this version reads: 1.16.")
]
Strip = Annotated[bool, typer.Option("--strip", help="Remove documentation and exporters' notes.")]
ShortNames = Annotated[bool, typer.Option("--short-names", help="Name layers and values a, b, ...")]
Emit = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Write onnxruntime's own format beside it: ort.")
]
Fusions = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="Fuse a transformer (bert, gpt2, vit, ...) for onnxruntime alone."),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="DIR", callback=_check_report, help="Folder for report.html, to be looked at."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Objective = Annotated[
    str | None, typer.Option(metavar="NAME", help="What counts: latency (default), size or balanced.")
]
Portable = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN", help="Keep int8 from saturating on x86 without VNNI: auto (default), on or off."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="auto, qdq, qoperator, dynamic, int8-weights, int4-weights, float16 or bfloat16.",
    ),
]
Fast = Annotated[bool, typer.Option("--fast", help="No searches: the target's rules and a short benchmark.")]
NoBenchmark = Annotated[
    bool, typer.Option("--no-benchmark", help="Do not measure the latency: the target's rules place int8.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_check_folder,
        help="Write the result as JSON as well; with - to stdout, and no table.",
    ),
]


def _recipe(
    path: Path | None,
    *,
    preprocess: str | None = None,
    benchmark: bool = True,
    fast: bool = False,
    quantize: Mapping[str, str | None] = MappingProxyType({}),
    **options: Any,
) -> Recipe:
    """The recipe of the file, or the default one, with the options of the command line over it."""
    from edgewise.optimizer.recipe import Recipe, load_recipe

    recipe = load_recipe(path) if path else Recipe()
    chosen = {key: value for key, value in quantize.items() if value is not None}
    if chosen and recipe.quantize is not None:
        options["quantize"] = {**recipe.quantize.model_dump(), **chosen}
    recipe = recipe.with_options(preprocess=_preprocess(preprocess), **options)
    recipe = recipe.fast() if fast else recipe
    return recipe if benchmark else recipe.model_copy(update={"benchmark": None})


def _preprocess(text: str | None) -> Preprocess | None:
    from edgewise.calibration.images import Preprocess

    return None if text is None else Preprocess.parse(text)


def _names(text: str, option: str) -> list[str]:
    """The names of a list such as a,b."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise typer.BadParameter(f"{text!r} is no list of names such as a,b ({option})")
    return names


def _integers(text: str, option: str, least: int = 1) -> list[int]:
    """The numbers of a list such as 1,2,4."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers from {least} such as 1,2,4 ({option})")
    return [int(part) for part in parts]


def _share(text: str, option: str) -> float:
    """A share, written 5% or 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is no share such as 5% or 0.05 ({option})")
    return value


def _bytes(text: str, option: str) -> int:
    """A size, written 1.5G, 512M or 512 (MiB)."""
    unit = {"G": 1 << 30, "M": 1 << 20}.get(text[-1:].upper())
    try:
        value = float(text if unit is None else text[:-1]) * (unit or 1 << 20)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is no size such as 512M or 2G ({option})")
    return int(value)


def _draw(answer: Benchmark | ProfileReport, folder: Path | None) -> None:
    """Write the page that people look at, where one is wanted."""
    if folder is not None:
        from edgewise.optimizer.page import write_page  # brings matplotlib, which takes a second

        write_page(answer, folder)


def _answer(answer: Answer, json_file: Path | None) -> None:
    """Give the result to machines, to people, or to both."""
    from edgewise.optimizer.console import show
    from edgewise.optimizer.files import write_text
    from edgewise.optimizer.report import plain

    text = json.dumps(plain(answer.to_dict()), indent=2, allow_nan=False)
    if str(json_file) == "-":
        typer.echo(text)
        return
    if json_file is not None:
        write_text(json_file, text + "\n", force=True)
    show(answer)


@app.callback()
def _edgewise(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before the command."""


@app.command()
def optimize(
    model: Model,
    output: Output,
    data: Data = None,
    validation: Validation = None,
    preprocess: Preprocessing = None,
    inputs: Inputs = None,
    fix_dims: FixDims = None,
    outputs: Outputs = None,
    uint8_input: Uint8Input = None,
    runtime: Runtime = None,
    strip: Strip = False,
    short_names: ShortNames = False,
    emit: Emit = None,
    fuse_for_onnxruntime: Fusions = None,
    recipe: RecipeFile = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
    objective: Objective = None,
    format_: Format = None,
    portable: Portable = None,
    fast: Fast = False,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for report.html, report.json and report.md.")
    ] = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Make MODEL smaller and faster, verified and never slower.

    Without samples only exact passes run, and the result says what samples would add.
    """
    from edgewise.optimizer import optimize as job
    from edgewise.optimizer.console import progress_bars

    options = _recipe(
        recipe,
        preprocess=preprocess,
        fix_dims=fix_dims or None,
        outputs=None if outputs is None else _names(outputs, "--outputs"),
        uint8_input=uint8_input,
        runtime=runtime,
        strip=strip or None,
        short_names=short_names or None,
        emit=emit,
        fuse_for_onnxruntime=fuse_for_onnxruntime,
        metric=metric,
        max_drop=max_drop,
        objective=objective,
        quantize={"format": format_, "portable": portable},
        fast=fast,
        target=target,
        threads=threads,
        seed=seed,
    )
    with progress_bars() as progress:
        result = job(
            model,
            output,
            data=data,
            validation=validation,
            inputs=inputs or (),
            recipe=options,
            report=report,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


@app.command()
def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:callable of a torch module.")
    ],
    inputs: Inputs,
    output: Output,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:AXIS=SYMBOL", help="An axis of any length, such as x:0=batch. Repeatable."
        ),
    ] = None,
    seed: Seed = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Write a torch module as .onnx, held against torch's outputs."""
    from edgewise.optimizer import export as job
    from edgewise.optimizer.console import progress_bars

    with progress_bars() as progress:
        progress("export", 0, 0)
        result = job(target, inputs or (), output, dynamic=dynamic or (), seed=seed or 0, force=force)
    _answer(result, json_file)


@app.command()
def inspect(model: OnnxFile, json_file: Json = None) -> None:
    """Show what MODEL takes, gives, holds, costs and could become."""
    from edgewise.optimizer import inspect as job
    from edgewise.optimizer.console import progress_bars

    with progress_bars() as progress:
        result = job(model, progress=progress)
    _answer(result, json_file)


@app.command()
def calibrate(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="An .onnx file; with --merge, tables: A.npz B.npz")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="TABLE", help="The .npz table to write.")],
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Samples, as in optimize.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge tables of one model into one.")] = False,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Values held at once: 512M or 2G; MiB without a unit.")
    ] = "1G",
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes that share the samples; 1 by default.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A Ray cluster that shares the samples: auto, host:port or local."
        ),
    ] = None,
    preprocess: Preprocessing = None,
    recipe: RecipeFile = None,
    threads: Threads = None,
    seed: Seed = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Observe the values of MODEL on samples, for quantize.

    An interrupted run goes on when the same command is given again.
    """
    from edgewise.optimizer import calibrate as job
    from edgewise.optimizer.console import progress_bars
    from edgewise.optimizer.jobs import merge_tables

    if merge:
        _answer(merge_tables(models, output, force=force), json_file)
        return
    if len(models) != 1 or data is None:
        raise typer.BadParameter("calibrate takes one MODEL and --data, or --merge and tables")
    options = _recipe(recipe, preprocess=preprocess, threads=threads, seed=seed)
    with progress_bars() as progress:
        result = job(
            models[0],
            data,
            output,
            recipe=options,
            memory=_bytes(memory, "--memory"),
            workers=workers,
            ray=ray,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


@app.command()
def plan(
    model: OnnxFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The .yaml file to write.")],
    data: Data = None,
    table: Annotated[Path | None, typer.Option(metavar="TABLE", help="A table that calibrate wrote.")] = None,
    preprocess: Preprocessing = None,
    recipe: RecipeFile = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Write how rules would quantize MODEL, to be edited.

    The rules are the target's, and the file is for quantize --plan. The exact passes run first, as in
    quantize; nothing is timed.
    """
    from edgewise.optimizer.console import progress_bars
    from edgewise.optimizer.plan_files import make_plan as job

    options = _recipe(recipe, preprocess=preprocess, target=target, threads=threads, seed=seed)
    with progress_bars() as progress:
        result = job(model, output, data=data, table=table, recipe=options, force=force, progress=progress)
    _answer(result, json_file)


@app.command()
def quantize(
    model: OnnxFile,
    output: Output,
    data: Data = None,
    validation: Validation = None,
    table: Annotated[Path | None, typer.Option(metavar="TABLE", help="A table that calibrate wrote.")] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="What plan wrote, perhaps edited.")
    ] = None,
    preprocess: Preprocessing = None,
    recipe: RecipeFile = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
    objective: Objective = None,
    format_: Format = None,
    portable: Portable = None,
    fast: Fast = False,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    report: ReportFolder = None,
    no_benchmark: NoBenchmark = False,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Write MODEL in int8, as far as that pays.

    It is never slower than before, and the metric falls by no more than --max-drop. The exact passes run
    first; a recipe with fewer passes says otherwise. An interrupted run does not calibrate again when the
    same command is given.
    """
    from edgewise.optimizer import quantize as job
    from edgewise.optimizer.console import progress_bars

    options = _recipe(
        recipe,
        preprocess=preprocess,
        benchmark=not no_benchmark,
        metric=metric,
        max_drop=max_drop,
        objective=objective,
        quantize={"format": format_, "portable": portable},
        fast=fast,
        target=target,
        threads=threads,
        seed=seed,
    )
    with progress_bars() as progress:
        result = job(
            model,
            output,
            data=data,
            validation=validation,
            table=table,
            plan=plan,
            recipe=options,
            report=report,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


@app.command()
def prune(
    model: OnnxFile,
    output: Output,
    data: Data = None,
    validation: Validation = None,
    preprocess: Preprocessing = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="X", help="Keep as little as the metric allows that may fall by X."),
    ] = None,
    min_metric: Annotated[
        float | None, typer.Option(metavar="M", help="Keep as little as leaves the metric at M or more.")
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option(metavar="MS", help="Keep what runs in MS milliseconds.")
    ] = None,
    max_macs: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Keep a share of the multiply-accumulates: 50% or 0.5."),
    ] = None,
    max_size: Annotated[
        float | None, typer.Option(metavar="MB", help="Keep what fits into MB megabytes.")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(metavar="R", help="Take a share R of the channels from every layer.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a channel is worth: fisher (default), taylor, gradient, reconstruction, ...",
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            metavar="COST",
            help="What a channel saves: latency, macs, size or balanced; by default what the bound is about.",
        ),
    ] = None,
    recover: Annotated[
        str | None, typer.Option(metavar="HOW", help="distill (default), closed-form, reestimate or none.")
    ] = None,
    effort: Annotated[
        float | None,
        typer.Option(metavar="X", help="Learn X times as long as by default, about two minutes."),
    ] = None,
    schedule: Annotated[
        int | None, typer.Option(metavar="N", help="Cut and recover in N steps; 1 by default.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Static int8 as well, under the same bound.")] = False,
    best_effort: Annotated[
        bool,
        typer.Option("--best-effort", help="Miss a bound that cannot be reached by as little as possible."),
    ] = False,
    candidates: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write every amount that was tried there as well.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Try N amounts at once, in processes of their own.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Try them on a Ray cluster: auto, local or an address."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Samples and values held at once: 1G by default.")
    ] = None,
    recipe: RecipeFile = None,
    metric: MetricName = None,
    objective: Objective = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    report: ReportFolder = None,
    no_benchmark: NoBenchmark = False,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Keep as little of MODEL as a bound allows, and recover it.

    What stays gets its accuracy back; unlabelled samples are enough. Without a bound, only channels leave
    that hold nothing but zeros, and the outputs stay the same. An interrupted run goes on when the same
    command is given.
    """
    from edgewise.optimizer import prune as job
    from edgewise.optimizer.console import progress_bars

    wanted = {
        "min_metric": min_metric,
        "max_latency": max_latency,
        "max_macs": None if max_macs is None else _share(max_macs, "--max-macs"),
        "max_size": max_size,
        "ratio": None if ratio is None else _share(ratio, "--ratio"),
        "score": score,
        "cost": cost,
        "recover": recover,
        "effort": effort,
        "schedule": schedule,
        "best_effort": best_effort or None,
        "candidates": candidates,
        "workers": workers,
        "ray": ray,
        "memory": None if memory is None else _bytes(memory, "--memory"),
    }
    options = _recipe(
        recipe,
        preprocess=preprocess,
        benchmark=not no_benchmark,
        metric=metric,
        max_drop=max_drop,
        objective=objective,
        target=target,
        threads=threads,
        seed=seed,
    ).to_prune(
        {name: value for name, value in wanted.items() if value is not None},
        by_drop=max_drop is not None,
        int8=int8,
    )
    with progress_bars() as progress:
        result = job(
            model,
            output,
            data=data,
            validation=validation,
            recipe=options,
            report=report,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


Epochs = Annotated[int | None, typer.Option(metavar="N", help="Passes over the samples; 30 by default.")]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", metavar="X", help="The highest rate; 0.002 by default.")
]
BatchSize = Annotated[int | None, typer.Option("--batch", metavar="N", help="Samples a step; 64 by default.")]
Frozen = Annotated[
    list[str] | None,
    typer.Option("--freeze", metavar="PATTERN", help="Weights whose names match stay: body.*. Repeatable."),
]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Samples held at once: 1G by default.")]


def _training(memory: str | None, freeze: Sequence[str] | None, **options: Any) -> TrainOptions:
    """The options of a training that were named."""
    from edgewise.training.options import TrainOptions

    given = {name: value for name, value in options.items() if value is not None}
    if memory is not None:
        given["memory"] = _bytes(memory, "--memory")
    return TrainOptions(**given, freeze=tuple(freeze or ()))


@app.command()
def distill(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="The .onnx file to learn from.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The .onnx file that learns.")],
    output: Output,
    data: Data = None,
    validation: Validation = None,
    preprocess: Preprocessing = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch: BatchSize = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="How much scores are softened; 4 by default.")
    ] = None,
    freeze: Frozen = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    metric: MetricName = None,
    threads: Threads = None,
    seed: Seed = None,
    report: ReportFolder = None,
    no_benchmark: NoBenchmark = False,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Train STUDENT to answer like TEACHER.

    Both take the same inputs. Unlabelled samples are enough; labels are used where there are some.
    """
    from edgewise.optimizer import distill as job
    from edgewise.optimizer.console import progress_bars

    options = _recipe(
        recipe, preprocess=preprocess, benchmark=not no_benchmark, metric=metric, threads=threads, seed=seed
    )
    training = _training(
        memory,
        freeze,
        epochs=epochs,
        learning_rate=learning_rate,
        batch=batch,
        temperature=temperature,
        seed=options.seed,
    )
    with progress_bars() as progress:
        result = job(
            teacher,
            student,
            output,
            data=data,
            validation=validation,
            recipe=options,
            options=training,
            report=report,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


@app.command()
def finetune(
    model: OnnxFile,
    output: Output,
    data: Data = None,
    validation: Validation = None,
    preprocess: Preprocessing = None,
    replace_head: Annotated[
        int | None,
        typer.Option(metavar="CLASSES", help="Let the last layer start anew with so many classes."),
    ] = None,
    freeze: Frozen = None,
    penalty: Annotated[
        str | None,
        typer.Option(
            metavar="KIND=X", help="l1, l2, group-lasso or bn-scale=X: channels that it empties leave."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Train the weights for static int8; labels are not needed.")
    ] = False,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch: BatchSize = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
    target: Target = None,
    threads: Threads = None,
    seed: Seed = None,
    report: ReportFolder = None,
    no_benchmark: NoBenchmark = False,
    force: Force = False,
    json_file: Json = None,
) -> None:
    """Train MODEL on labels, then make it smaller and faster.

    With --int8 alone no labels are needed: the int8 model learns the answers of the float model.
    """
    from edgewise.optimizer import finetune as job
    from edgewise.optimizer.console import progress_bars
    from edgewise.training.options import Penalty

    options = _recipe(
        recipe,
        preprocess=preprocess,
        benchmark=not no_benchmark,
        metric=metric,
        max_drop=max_drop,
        target=target,
        threads=threads,
        seed=seed,
    )
    training = _training(
        memory, freeze, epochs=epochs, learning_rate=learning_rate, batch=batch, seed=options.seed
    )
    with progress_bars() as progress:
        result = job(
            model,
            output,
            data=data,
            validation=validation,
            replace_head=replace_head,
            penalty=None if penalty is None else Penalty.parse(penalty),
            int8=int8,
            recipe=options,
            options=training,
            report=report,
            force=force,
            progress=progress,
        )
    _answer(result, json_file)


@app.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="The .onnx files; the first is the reference.")
    ],
    ep: Annotated[
        str, typer.Option(metavar="LIST", help="Execution providers: cpu,cuda,tensorrt,openvino,...")
    ] = "cpu",
    threads: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Threads within an operator: 1,2,4. All cores by default."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Samples a run: 1,8,32.")] = "1",
    concurrency: Annotated[
        str, typer.Option(metavar="LIST", help="Runs at once when throughput is measured: 1,4.")
    ] = "1",
    inter_op_threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that run operators side by side.")
    ] = None,
    cores: Annotated[
        str | None, typer.Option(metavar="LIST", help="Cores to pin to: 2,3. As many as threads by default.")
    ] = None,
    spinning: Annotated[
        bool, typer.Option("--spinning/--no-spinning", help="Whether idle threads spin, as deployed.")
    ] = True,
    io_binding: Annotated[
        bool | None,
        typer.Option(
            "--io-binding/--no-io-binding", help="Keep inputs and outputs on the device. Default: on devices."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A model of which a provider takes only a part has failed.")
    ] = False,
    data: Data = None,
    preprocess: Preprocessing = None,
    precision: Annotated[
        float, typer.Option(metavar="X", help="Stop when the interval is within this share of the ratio.")
    ] = 0.01,
    max_seconds: Annotated[
        float, typer.Option(metavar="S", help="Stop after so many seconds, in each combination.")
    ] = 10.0,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="A model that does not answer for so long has failed.")
    ] = 120.0,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An earlier result (--json) to compare with.")
    ] = None,
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Exit with 1 if a model is slower by more than this, 5% or 0.05: than in the baseline, "
            "or without one than the first model.",
        ),
    ] = None,
    seed: Seed = None,
    report: ReportFolder = None,
    json_file: Json = None,
) -> None:
    """Measure the latency of models side by side.

    Each runs in a process of its own, in rounds that take turns. Lists give every combination.
    """
    from edgewise.optimizer.benchmarking import Benchmark, grid_of, sweep
    from edgewise.optimizer.console import progress_bars

    limit = None if fail_if_slower is None else _share(fail_if_slower, "--fail-if-slower")
    earlier = None if baseline is None else Benchmark.load(baseline)
    grid = grid_of(
        [name.strip() for name in ep.split(",")],
        [None] if threads is None else _integers(threads, "--threads"),
        _integers(batch, "--batch"),
        _integers(concurrency, "--concurrency"),
        inter_op_threads=inter_op_threads,
        cores=() if cores is None else tuple(_integers(cores, "--cores", least=0)),
        spinning=spinning,
        io_binding=io_binding,
        strict=strict,
    )
    with progress_bars() as progress:
        result = sweep(
            models,
            grid,
            data=data,
            preprocess=_preprocess(preprocess),
            precision=precision,
            max_seconds=max_seconds,
            timeout=timeout,
            seed=seed or 0,
            progress=progress,
        )
    if earlier is not None:
        result = result.against(earlier)
    _draw(result, report)
    _answer(result, json_file)
    problems = [*result.failures, *(() if limit is None else result.slower(limit))]
    if problems:
        raise EdgewiseError("; ".join(problems))


@app.command()
def profile(
    model: OnnxFile,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="A second version, to hold against it.")
    ] = None,
    ep: Annotated[
        str, typer.Option(metavar="NAME", help="Execution provider: cpu, cuda, tensorrt, openvino, ...")
    ] = "cpu",
    threads: Threads = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a run.")] = 1,
    data: Data = None,
    preprocess: Preprocessing = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Runs; a few seconds' worth by default.")
    ] = None,
    no_peaks: Annotated[
        bool, typer.Option("--no-peaks", help="Do not measure how fast the machine is at best.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="A model that does not answer for so long has failed.")
    ] = 120.0,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes shown.")] = 10,
    seed: Seed = None,
    report: ReportFolder = None,
    json_file: Json = None,
) -> None:
    """Show where the time of MODEL goes, node by node.

    With OTHER, another version of it such as its int8 form: where the difference comes from.
    """
    from edgewise.optimizer import profile as job
    from edgewise.optimizer.console import progress_bars

    with progress_bars() as progress:
        result = job(
            [model] if other is None else [model, other],
            provider=ep,
            threads=threads,
            batch=batch,
            data=data,
            preprocess=_preprocess(preprocess),
            runs=runs,
            seed=seed or 0,
            peaks=not no_peaks,
            timeout=timeout,
            progress=progress,
        )
    _draw(result, report)
    _answer(dataclasses.replace(result, top=top), json_file)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="The .onnx file that is right.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The .onnx file that is held against it.")],
    data: Data = None,
    preprocess: Preprocessing = None,
    metric: MetricName = None,
    threads: Threads = None,
    seed: Seed = None,
    json_file: Json = None,
) -> None:
    """Tell how far the outputs of B are from those of A."""
    from edgewise.optimizer import compare as job
    from edgewise.optimizer.console import progress_bars

    with progress_bars() as progress:
        progress("compare", 0, 0)
        result = job(
            first,
            second,
            data=data,
            preprocess=_preprocess(preprocess),
            metric=metric,
            threads=threads,
            seed=seed or 0,
        )
    _answer(result, json_file)


@app.command()
def passes(json_file: Json = None) -> None:
    """List the graph passes, what each may change, and its options."""
    from edgewise.optimizer.inspection import list_passes

    _answer(list_passes(), json_file)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")] = Path(
        "edgewise-demo"
    ),
    generator: Annotated[
        bool, typer.Option("--generator", help="A generator of images instead of a classifier.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Take a small trained network through the whole chain."""
    from edgewise.optimizer.console import progress_bars
    from edgewise.optimizer.demo import demo as job

    with progress_bars() as progress:
        result = job(folder, generator=generator, progress=progress)
    _answer(result, json_file)
