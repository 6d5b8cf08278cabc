"""What `scripts/benchmark.py` can measure: a table of tasks, each with its settings, options and file of results."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from timm_deconv.convert.policy import DEFAULT_PRESET

from . import kernels, layer, memory, operations, rows, scaling, step

__all__ = ["OPTIONS", "TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """What a task takes, measures and shows; `options` are names of OPTIONS, `quick` the settings with --quick."""

    settings: Callable[..., Any]
    measure: Callable[[Any], list[rows.Row]]
    options: str
    columns: list[str] = field(default_factory=lambda: rows.COLUMNS)
    shown: list[str] = field(default_factory=lambda: rows.SHOWN)
    file: str = "benchmark.csv"
    quick: dict[str, Any] = field(default_factory=dict)
    summary: Callable[[list[rows.Row]], str] = lambda measured: ""


OPTIONS: dict[str, dict[str, Any]] = {
    "axis": {"choices": scaling.AXES, "help": "what changes; default batch"},
    "values": {
        "nargs": "+",
        "type": float,
        "help": "what it takes; default 16 ... 1024, 32 ... 224, 0.5 ... 2, 2 ... 128",
    },
    "rows": {"nargs": "+", "type": int, "help": "numbers of rows of the table, from 1; default all"},
    "layers": {"nargs": "+", "help": f"of {', '.join(kernels.LAYERS)}; default all"},
    "network": {"help": "a registered pair, without _deconv; default resnet18_cifar"},
    "preset": {"help": f"of the form deconv; default {DEFAULT_PRESET}"},
    "presets": {"nargs": "+", "help": "of the form deconv; default fast paper, of profile fast"},
    "forms": {"nargs": "+", "help": "of none, twin, deconv, published, in inference fused too; default all"},
    "memory-formats": {"nargs": "+", "help": "of contiguous, channels_last"},
    "width": {"type": float, "help": "multiplies the channels, in networks that have the argument"},
    "batch": {"type": int, "help": "images; default 128"},
    "image-size": {"type": int, "help": "height and width; default the network's own"},
    "rounds": {"type": int, "help": "measurements of each"},
    "warmup": {"type": int, "help": "rounds before them"},
    "threads": {"type": int},
    "device": {"help": "cpu (default) or cuda"},
    "amp": {"choices": ("bfloat16", "float16")},
    "compile": {"nargs": "?", "const": "default", "help": "time torch.compile of each network; mode, of default, ..."},
}

ALL = "device threads batch"
NETWORK = f"{ALL} network width image-size amp memory-formats"
STEP = f"{NETWORK} preset forms rounds warmup compile"
QUICK = {"rounds": 3, "warmup": 1, "memory_formats": ("channels_last",)}

TASKS = {
    name: Task(
        kind,
        lambda settings, name=name, time=time: rows.step_rows(name, time(settings), settings),
        STEP,
        quick={"batch": 32, **QUICK},
    )
    for name, kind, time in (
        ("step", step.StepSettings, step.time_training),
        ("inference", step.EvaluationSettings, step.time_evaluation),
    )
} | {
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
        operations.ProfileSettings,
        operations.profile_rows,
        f"{NETWORK} presets forms",
        operations.COLUMNS,
        operations.SHOWN,
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
    ),
}
