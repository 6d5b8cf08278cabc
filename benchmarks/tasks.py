"""What `scripts/benchmark.py` can measure: a table of tasks, each with its settings, options and file of results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from timm_deconv.convert.policy import DEFAULT_PRESET

from . import conversion, exports, host, kernels, layer, loop, memory, plots, profiling, rows, scaling, step, transfer

__all__ = ["OPTIONS", "TASKS", "Task", "run"]


@dataclass(frozen=True)
class Task:
    """What a task takes, measures and shows.

    Attributes:
        settings: makes the settings of the options that are given.
        measure: measures; rows are written as they come.
        options: names of OPTIONS.
        columns: of the file of results.
        shown: columns of the table that is printed.
        file: name of the file of results.
        quick: settings with --quick.
        summary: what is said under the table.
        picture: draws the rows into a file.
        resumes: settings have `done`, values of the first column that the file has rows of.
    """

    settings: Callable[..., Any]
    measure: Callable[[Any], Iterable[rows.Row]]
    options: str
    columns: Sequence[str]
    shown: Sequence[str]
    file: str
    quick: dict[str, Any] = field(default_factory=dict)
    summary: Callable[[Sequence[rows.Row]], str] | None = None
    picture: Callable[[Sequence[rows.Row], Path], None] | None = None
    resumes: bool = False


OPTIONS: dict[str, dict[str, Any]] = {
    "data-dir": {"required": True, "help": "folder or tar of images by class; of transfer photographs"},
    "axis": {"choices": scaling.AXES, "help": "what changes; default batch"},
    "values": {
        "nargs": "+",
        "type": float,
        "help": "what it takes; default 16 ... 1024, 32 ... 224, 0.5 ... 2, 2 ... 128",
    },
    "rows": {"nargs": "+", "type": int, "help": "numbers of rows of the table, from 1; default all"},
    "layers": {"nargs": "+", "help": f"of {', '.join(kernels.LAYERS)}; of host {', '.join(host.LAYERS)}; default all"},
    "network": {"help": "a registered pair, without _deconv; of transfer a batch-norm network of timm"},
    "networks": {"nargs": "+", "help": "shell patterns of timm's names, in the order to go; default all"},
    "time-limit": {"type": int, "help": "seconds of processor time for a network; default 600"},
    "checkpoint": {"help": "file of the network's weights, in place of timm's or a package's"},
    "preset": {"help": f"of the form deconv; default {DEFAULT_PRESET}"},
    "presets": {"nargs": "+", "help": "of the form deconv; default fast paper, of profile fast"},
    "forms": {"nargs": "+", "help": "of none, twin, deconv, published, in inference fused too; default all"},
    "memory-formats": {"nargs": "+", "help": "of contiguous, channels_last"},
    "width": {"type": float, "help": "multiplies the channels, in networks that have the argument"},
    "batch": {"type": int, "help": "images; default 128, of transfer 50"},
    "images": {"type": int, "help": "use so many photographs; default all"},
    "calibration-images": {"type": int, "help": "calibrate on so many of them; default 256"},
    "int8-images": {"type": int, "help": "find ranges of eight bits on so many of them; default 256"},
    "run": {"help": "folder of a run of a deconvolution network, in place of transferred weights"},
    "twin-run": {"help": "folder of a run of its twin, in place of --network"},
    "image-size": {"type": int, "help": "height and width; default the network's own"},
    "rounds": {"type": int, "help": "measurements of each"},
    "warmup": {"type": int, "help": "rounds before them"},
    "updates": {"type": int, "help": "in a measurement; default 16"},
    "workers": {"type": int, "help": "processes that load images; default 2"},
    "threads": {"type": int},
    "device": {"help": "cpu (default) or cuda"},
    "amp": {"choices": ("bfloat16", "float16")},
    "compile": {"nargs": "?", "const": "default", "help": "time torch.compile of each network; mode, of default, ..."},
}

ALL = "device threads batch"
NETWORK = f"{ALL} network width image-size amp memory-formats"
STEP = f"{NETWORK} preset forms rounds warmup compile"
EXPORT = "data-dir threads network run twin-run images calibration-images int8-images"
QUICK = {"rounds": 3, "warmup": 1, "memory_formats": ("channels_last",)}

TASKS = {
    "step": Task(
        step.StepSettings,
        step.training_rows,
        STEP,
        step.COLUMNS,
        step.SHOWN,
        "benchmark.csv",
        {"batch": 32, **QUICK},
    ),
    "inference": Task(
        step.EvaluationSettings,
        step.evaluation_rows,
        STEP,
        step.COLUMNS,
        step.SHOWN,
        "benchmark.csv",
        {"batch": 32, **QUICK},
    ),
    "layer": Task(
        layer.LayerSettings,
        layer.layer_rows,
        f"{ALL} rows rounds warmup",
        layer.COLUMNS,
        layer.SHOWN,
        "benchmark_layer.csv",
        {"batch": 4, "rows": (1, 3, 5, 16), "rounds": 3},
        layer.layer_summary,
    ),
    "kernels": Task(
        kernels.KernelSettings,
        kernels.kernel_rows,
        "device layers presets",
        kernels.COLUMNS,
        kernels.SHOWN,
        "benchmark_kernels.csv",
        {"layers": ("pointwise",), "compiled": False},
    ),
    "host": Task(
        host.HostSettings,
        host.host_rows,
        "threads layers rounds warmup",
        host.COLUMNS,
        host.SHOWN,
        "benchmark_host.csv",
        {"layers": ("pointwise",), "rounds": 20},
    ),
    "memory": Task(
        memory.MemorySettings,
        memory.memory_rows,
        f"{NETWORK} presets forms",
        memory.COLUMNS,
        memory.SHOWN,
        "benchmark_memory.csv",
        {"batch": 32, "width": 0.25},
    ),
    "profile": Task(
        profiling.ProfileSettings,
        profiling.profile_rows,
        f"{NETWORK} presets forms",
        profiling.COLUMNS,
        profiling.SHOWN,
        "benchmark_profile.csv",
        {"batch": 16, "width": 0.25},
    ),
    "scaling": Task(
        scaling.ScalingSettings,
        scaling.scaling_rows,
        f"{NETWORK} axis values preset rounds warmup compile",
        scaling.COLUMNS,
        scaling.SHOWN,
        "benchmark_scaling.csv",
        {"batch": 16, "width": 0.25, "points": 3, **QUICK},
        scaling.scaling_summary,
        plots.share_picture,
    ),
    "loop": Task(
        loop.LoopSettings,
        loop.loop_rows,
        "data-dir threads batch network width rounds warmup updates workers",
        loop.COLUMNS,
        loop.SHOWN,
        "benchmark_loop.csv",
        {"width": 0.125, "updates": 2, "rounds": 2, "warmup": 0},
    ),
    "transfer": Task(
        transfer.TransferSettings,
        transfer.transfer_rows,
        "data-dir threads batch network checkpoint presets images calibration-images",
        transfer.COLUMNS,
        transfer.SHOWN,
        "transfer.csv",
        {"images": 100, "calibration_images": 100, "presets": (DEFAULT_PRESET,)},
    ),
    "exports": Task(
        exports.ExportSettings,
        exports.export_rows,
        EXPORT + " rounds",
        exports.COLUMNS,
        exports.SHOWN,
        "export.csv",
        {"images": 100, "int8_images": 20, "rounds": 5},
    ),
    "export-ranges": Task(
        exports.ExportSettings,
        exports.range_rows,
        EXPORT,
        exports.RANGES,
        exports.SHOWN_RANGES,
        "export_ranges.csv",
        {"int8_images": 20},
    ),
    "convert": Task(
        conversion.ConversionSettings,
        conversion.conversion_rows,
        "networks time-limit",
        conversion.COLUMNS,
        conversion.SHOWN,
        "convert.csv",
        {"networks": ("test_*",)},
        resumes=True,
    ),
}


def run(
    name: str, options: dict[str, Any], *, quick: bool = False, output: Path | None = None, record: bool = False
) -> None:
    """Measure, add the rows to files and print them.

    Args:
        name: of TASKS.
        options: fields of the task's settings, and `threads`.
        quick: measure something small.
        output: CSV file to add rows to; default output/FILE of the task.
        record: add them to the checkout's results too.

    Raises:
        InputError: a setting that makes no sense, or a file with other columns.
    """
    task = TASKS[name]
    options = (task.quick if quick else {}) | options
    if threads := options.pop("threads", None):
        torch.set_num_threads(threads)
    output = output or Path("output", task.file)
    files = rows.result_files(output, record, task.file)
    if task.picture:
        plots.need_matplotlib()
    if task.resumes:
        options["done"] = rows.rows_done(files, task.columns)
    settings = task.settings(**options)
    measured = []
    for row in task.measure(settings):
        rows.add_rows(files, task.columns, [row])
        measured.append(row)
    rows.print_table(measured, task.shown)
    if task.summary and measured:
        print(task.summary(measured))
    if task.picture:
        picture = output.with_name(f"{output.stem}_{settings.axis}.png")
        task.picture(measured, picture)
        print(f"picture: {picture}")
