"""What `gpu_check` measures of a GPU, each part by what the other benchmarks measure with; small on a CPU."""

import importlib
import importlib.util
import multiprocessing
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timm_deconv.convert.policy import DEFAULT_PRESET
from timm_deconv.kernels import GPU_MODULES
from timm_deconv.layers import Deconv2d

from .gpu_path import MODULES
from .kernels import LAYERS
from .memory import MemorySettings, checked_step, memory_rows
from .profiling import kernel_seconds
from .step import CAPTURED, Step, StepSettings, random_batch, time_training, training_step

__all__ = [
    "KINDS",
    "Found",
    "Network",
    "compile_kernels",
    "differences_of_losses",
    "kernel_times",
    "kernels_of_a_layer",
    "kind_of",
    "peak_memory",
    "run_tests",
    "step_times",
    "waits",
]

ROOT = Path(__file__).resolve().parent.parent
TESTS = tuple(f"tests/kernels/test_gpu{name}.py" for name in ("", "_folding", "_roots", "_tracking"))
TESTS += ("tests/layers/test_cuda.py",)
TESTS_LIMIT = 80
"""Seconds after which the tests are stopped; those that ran are counted."""

FORMS = ("none", "twin", "deconv")
FORMAT = "channels_last"
BYTES = 14e9
"""What a step of the largest network takes, with room."""

KINDS = {
    "batch norm": r"batch_?norm|bn_[fb]w",
    "convolution": r"conv|cudnn|implicit|[wd]grad|fprop|winograd|nchwTo|nhwcTo",
    "matrix product": r"gemm|gemv|cutlass|splitK|nvjet",
    "update": r"multi_tensor",
    "copy or fill": r"memcpy|memset|copy|Fill",
    "sum or mean": r"reduce",
    "elementwise": r"elementwise|vectorized|clamp|threshold",
}
"""Kinds of kernels of libraries and torch, by what their names hold: the first that fits."""

WHITENING = "whitening"


class Found(NamedTuple):
    """A number that was found; the goal of a part is for what its form 'deconv' has.

    Attributes:
        form: of the network or layer; '' where there is no such thing.
        measure: what the value is.
        value, lower, upper: median and quartiles, where there are some.
        ratio: to what the twin has, where that is of interest.
    """

    form: str
    measure: str
    value: float
    lower: float | str = ""
    upper: float | str = ""
    ratio: float | str = ""


class Network(NamedTuple):
    """A network in training: a registered pair, images a step, autocast's dtype and what compiles it."""

    name: str
    batch: int
    amp: str = ""
    compile: str = ""

    def settings(self, tiny: bool, **changes: Any) -> StepSettings:
        """Return what is timed on this machine's device; `tiny` takes one small network for all, and seconds."""
        image_size = None if self.name.endswith("_cifar") else 224
        sizes = {"network": self.name, "batch": self.batch, "image_size": image_size, "rounds": 20, "warmup": 5}
        if tiny:
            sizes = {"network": "resnet18_cifar", "width": 0.125, "batch": 16, "rounds": 2, "warmup": 0}
        shared = {"forms": FORMS, "memory_formats": (FORMAT,), "device": "cuda" if torch.cuda.is_available() else "cpu"}
        named = {"amp": self.amp or None, "compile": self.compile, "update": True}
        return StepSettings(**(sizes | shared | named | changes))


def compile_kernels(*networks: Network) -> Callable[[bool], Iterator[Found]]:
    """Make a part that takes a step of each whitened network in processes side by side, and says how long it took.

    Kernels are compiled when they are first launched, and kept on the disk; what follows finds them there. Networks
    that are compiled are so in every form.
    """

    def measure(tiny: bool) -> Iterator[Found]:
        steps = [(form, one.settings(tiny)) for one in networks for form in (FORMS if one.compile else FORMS[-1:])]
        fitting = int(torch.cuda.get_device_properties(0).total_memory // BYTES)
        started = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(min(fitting, len(steps)), 1), mp_context=context) as pool:
            list(pool.map(_take_a_step, steps))
        yield Found("deconv", "seconds to compile kernels", time.perf_counter() - started)

    return measure


def _take_a_step(named: tuple[str, StepSettings]) -> None:
    form, settings = named
    _step(form, settings)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def run_tests(tiny: bool) -> Iterator[Found]:
    """Run the tests of kernels and layers that need a GPU, and count outcomes, up to a limit of time."""
    files = [file for file in TESTS if (ROOT / file).exists()]
    beside = ["-n", "4"] if importlib.util.find_spec("xdist") and not tiny else []
    without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # which warns of processes side by side
    command = [sys.executable, "-m", "pytest", "-v", "-rN", *without, *beside, *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_LIMIT, check=False)
        said, stopped = done.stdout, 0
    except subprocess.TimeoutExpired as error:
        said, stopped = (error.stdout or b"").decode(), 1
    outcomes = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", said))
    for line in re.findall(r"^.* (?:FAILED|ERROR)\b.*$|^E  .*$", said, re.MULTILINE):
        print(line)
    if not outcomes:
        raise RuntimeError(f"no test ran: {said[-300:]}")
    ran = outcomes["PASSED"] or outcomes["FAILED"]
    yield Found("deconv" if ran else "", "tests failed", outcomes["FAILED"] + outcomes["ERROR"])
    yield Found("", "tests passed", outcomes["PASSED"])
    yield Found("", "tests skipped", outcomes["SKIPPED"])
    yield Found("", "tests stopped by the limit", stopped)


def step_times(network: Network) -> Callable[[bool], Iterator[Found]]:
    """Make a part that times a training step, update included, in three forms by turns."""

    def measure(tiny: bool) -> Iterator[Found]:
        settings = network.settings(tiny)
        timings = time_training(settings, lambda message: None)
        for form in FORMS:
            label, twin = f"{form} {FORMAT}", f"twin {FORMAT}"
            spread = timings.spread(label)
            milliseconds = (1e3 * seconds for seconds in (spread.median, spread.lower, spread.upper))
            yield Found(form, "ms a step", *milliseconds, timings.ratio(label, twin).median)

    return measure


def kernel_times(network: Network, *, kinds: bool = False) -> Callable[[bool], Iterator[Found]]:
    """Make a part that adds up the time of all that the GPU does in a step, by kind too if `kinds`."""

    def measure(tiny: bool) -> Iterator[Found]:
        settings = network.settings(tiny)
        spent = {form: kernel_seconds(_step(form, settings)) for form in FORMS}
        totals = {form: sum(seconds for _, seconds in kernels.values()) for form, kernels in spent.items()}
        for form, kernels in spent.items():
            yield Found(form, "ms of kernels", 1e3 * totals[form], ratio=totals[form] / totals["twin"])
            yield Found(form, "kernels a step", sum(count for count, _ in kernels.values()))
            of_kinds: Counter[str] = Counter()
            for name, (_, seconds) in kernels.items():
                of_kinds[kind_of(name)] += seconds
            for kind, seconds in of_kinds.most_common() if kinds else ():
                yield Found(form, f"ms of kernels: {kind}", 1e3 * seconds)

    return measure


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel: whitening's own, one of KINDS, or 'other'."""
    if kernel in _own_kernels():
        return WHITENING
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def _own_kernels() -> set[str]:
    modules = [importlib.import_module(f"{MODULES}.{name}") for name in set(GPU_MODULES.values())]
    return {name for module in modules for name in vars(module) if name.startswith("_")}


def kernels_of_a_layer(tiny: bool) -> Iterator[Found]:
    """Count what a 3x3 layer launches, forward and backward, its convolution included, and list it."""
    example = LAYERS["spatial"]
    x = torch.randn(example.shape, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    plain = torch.nn.Conv2d(**example.arguments, bias=False)
    layers = {
        "none": torch.nn.Conv2d(**example.arguments),
        "twin": torch.nn.Sequential(plain, torch.nn.BatchNorm2d(plain.out_channels)),
        "deconv": Deconv2d(**example.arguments, cfg=DEFAULT_PRESET),
    }
    for form, layer in layers.items():
        layer.to("cuda", memory_format=torch.channels_last)
        cotangent = torch.randn_like(layer(x))

        def step(layer: torch.nn.Module = layer, cotangent: torch.Tensor = cotangent) -> torch.Tensor:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(cotangent)
            return cotangent

        step()
        counts = {name: count for name, (count, _) in kernel_seconds(step).items()}
        print(f"{form}:", *(f"\n    {count:g} {name[:120]}" for name, count in counts.items()))
        yield Found(form, "kernels", sum(counts.values()))


def peak_memory(network: Network) -> Callable[[bool], Iterator[Found]]:
    """Make a part that measures the peak memory of a step without the update."""

    def measure(tiny: bool) -> Iterator[Found]:
        one = network.settings(tiny, update=False)
        settings = MemorySettings(
            network=one.network,
            width=one.width,
            batch=one.batch,
            image_size=one.image_size,
            device=one.device,
            amp=one.amp,
            forms=FORMS,
            presets=(DEFAULT_PRESET,),
        )
        peaks = {row["form"]: row["peak_bytes"] for row in memory_rows(settings, lambda message: None)}
        for form, peak in peaks.items():
            yield Found(form, "peak bytes of a step", peak, ratio=peak / peaks["twin"])

    return measure


def waits(network: Network) -> Callable[[bool], Iterator[Found]]:
    """Make a part that counts how often the host waits for the device in two steps after the first."""

    def measure(tiny: bool) -> Iterator[Found]:
        step = _step("deconv", network.settings(tiny))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                step()
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Found("deconv", "host waits", sum("synchroniz" in str(warning.message) for warning in said))

    return measure


def differences_of_losses(network: Network, steps: int = 5) -> Callable[[bool], Iterator[Found]]:
    """Make a part that trains eagerly and by replays of one CUDA graph, and compares the losses."""

    def measure(tiny: bool) -> Iterator[Found]:
        losses = []
        for compile in ("", CAPTURED):
            settings = replace(network.settings(tiny), compile=compile)
            model = settings.build("deconv").to(memory_format=torch.channels_last)
            step = training_step(model, *random_batch(settings, model, FORMAT), settings)
            losses.append([float(step()) for _ in range(steps)])
        largest = max(abs(ours - eager) / abs(eager) for eager, ours in zip(*losses, strict=True))
        yield Found("deconv", "largest relative difference of losses", largest)

    return measure


def _step(form: str, settings: StepSettings) -> Step:
    preset = settings.preset if form == "deconv" else ""
    return checked_step(form, preset, FORMAT, settings)[1]
