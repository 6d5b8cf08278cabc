"""Training and evaluation steps of the forms of one network, timed interleaved, and the price of whitening."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_deconv.convert import fuse
from timm_deconv.convert.policy import DEFAULT_PRESET
from timm_deconv.errors import InputError, NonFiniteError, unknown_name
from timm_deconv.timing import Timings, interleave, synchroniser

from .graphs import captured
from .networks import FORMS, build
from .rows import CONDITIONS, Row, conditions, rounded

__all__ = [
    "CAPTURED",
    "COLUMNS",
    "MEMORY_FORMATS",
    "SHOWN",
    "EvaluationSettings",
    "Step",
    "StepSettings",
    "check_published",
    "check_training",
    "evaluation_rows",
    "price",
    "random_batch",
    "step_rows",
    "time_evaluation",
    "time_training",
    "training_rows",
    "training_step",
]

COLUMNS = [
    *"task network width form preset memory_format batch image_size amp compile seconds seconds_lower".split(),
    *"seconds_upper ratio_to_none ratio_to_twin price rounds".split(),
    *CONDITIONS,
]

SHOWN = "form memory_format seconds seconds_lower seconds_upper ratio_to_none ratio_to_twin price".split()

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

CAPTURED = "captured"

LEARNING_RATE = 1e-3
"""Of updates: small, as all steps are on one batch."""

FEW_ROWS = "if a layer sees fewer rows than features, raise the batch or leave out the form 'published'"

Step = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What is timed.

    Attributes:
        network: a registered pair, without '_deconv'.
        preset: of the form 'deconv'.
        forms, memory_formats: what is compared; each form is timed in each memory format.
        width: multiplies the channels, in networks that have the argument.
        batch: images a step.
        image_size: height and width in pixels; None takes the network's own.
        device: 'cpu', 'cuda'.
        amp: autocast dtype, 'bfloat16' or 'float16'; None for float32.
        compile: mode of `torch.compile`, by which each network is compiled: 'default', 'reduce-overhead' (CUDA graphs)
            and so on; CAPTURED: not compiled, forward and backward pass one CUDA graph; '' for eager mode.
        update: a training step ends with the update of SGD with momentum.
        rounds, warmup: see `timing.interleave`.

    Raises:
        InputError: a form, memory format or mode that is not known.
    """

    network: str = "resnet18_cifar"
    preset: str = DEFAULT_PRESET
    forms: Sequence[str] = FORMS
    memory_formats: Sequence[str] = tuple(MEMORY_FORMATS)
    width: float = 1.0
    batch: int = 128
    image_size: int | None = None
    device: str = "cpu"
    amp: str | None = None
    compile: str = ""
    update: bool = False
    rounds: int = 7
    warmup: int = 2

    known_forms: ClassVar[tuple[str, ...]] = FORMS

    def __post_init__(self) -> None:
        named = (("form", self.forms, self.known_forms), ("memory format", self.memory_formats, MEMORY_FORMATS))
        for kind, names, known in named:
            for name in names:
                if name not in known:
                    raise unknown_name(kind, name, known)
        if self.compile not in ("", CAPTURED, *(modes := torch._inductor.list_mode_options())):
            raise unknown_name("mode of torch.compile", self.compile, (CAPTURED, *modes))
        if self.compile == CAPTURED and torch.device(self.device).type != "cuda":
            raise InputError(f"compile='{CAPTURED}': CUDA graphs are of GPUs, and the device is {self.device}")

    def labels(self, form: str) -> list[str]:
        """List the labels of a form's timings, one a memory format."""
        return [f"{form} {memory_format}" for memory_format in self.memory_formats]

    def deconv(self, preset: str) -> str | dict[str, Any]:
        """Return what the form 'deconv' is made with for a preset."""
        return preset

    def build(self, form: str, preset: str | None = None) -> nn.Module:
        """Build the network in a form, on the device; `preset` takes the place of that of the settings."""
        sizes = {} if self.width == 1 else {"width": self.width}
        return build(form, self.network, self.deconv(preset or self.preset), **sizes).to(self.device)

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Compile the network, where that is asked for."""
        return model if self.compile in ("", CAPTURED) else torch.compile(model, mode=self.compile)

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        dtype = getattr(torch, self.amp) if self.amp else None
        return torch.autocast(torch.device(self.device).type, dtype, enabled=bool(self.amp))

    def described(self) -> Row:
        """Return the columns that say what was measured and where."""
        return {
            "network": self.network,
            "width": self.width,
            "batch": self.batch,
            "image_size": self.image_size or "",
            "amp": self.amp or "",
            **conditions(self.device),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(StepSettings):
    """What is timed in evaluation mode: one form more, 'fused', the form 'deconv' as deployed. 'none' has the layers of
    timm's network with its batch norm folded away."""

    forms: Sequence[str] = (*FORMS, "fused")
    known_forms: ClassVar[tuple[str, ...]] = (*FORMS, "fused")


def training_rows(settings: StepSettings) -> list[Row]:
    """Time training steps; see `time_training` and `step_rows`."""
    return step_rows("step", time_training(settings), settings)


def evaluation_rows(settings: EvaluationSettings) -> list[Row]:
    """Time evaluation steps; see `time_evaluation` and `step_rows`."""
    return step_rows("inference", time_evaluation(settings), settings)


def time_training(settings: StepSettings, progress: Callable[[str], object] = print) -> Timings:
    """Time forward pass, cross entropy and backward pass; seconds are labelled 'FORM MEMORY_FORMAT'.

    Raises:
        RuntimeError, NonFiniteError: a network does not compute what it should.
    """
    if "published" in settings.forms:
        check_published(settings)
    steps = {}
    for label, model, memory_format in _networks(settings):
        steps[label] = training_step(model, *random_batch(settings, model, memory_format), settings)
        check_training(label, model, steps[label]())
    return _interleave(steps, settings, progress)


def time_evaluation(settings: EvaluationSettings, progress: Callable[[str], object] = print) -> Timings:
    """Time a forward pass in evaluation mode, after one training step; seconds are labelled 'FORM MEMORY_FORMAT'.

    Raises:
        RuntimeError, NonFiniteError: a network does not compute what it should.
    """
    if "published" in settings.forms:
        check_published(settings)
    steps = {}
    for label, model, memory_format in _networks(settings):
        images, labels = random_batch(settings, model, memory_format)
        training_step(model, images, labels, settings)()
        evaluated = fuse(model) if label.startswith("fused") else model.eval()
        steps[label] = _evaluation_step(evaluated, images, settings)
        if not steps[label]().isfinite().all():
            raise NonFiniteError(f"{label}: output is not finite; {FEW_ROWS}")
    return _interleave(steps, settings, progress)


def step_rows(task: str, timings: Timings, settings: StepSettings) -> list[Row]:
    """Make a row for each form and memory format.

    `seconds` is the median, `_lower` and `_upper` are quartiles; `ratio_to_*` are medians over rounds, in the same
    memory format; `price` is in batch norms, see `price`; it is in the row of a whitened form's faster format.
    """
    shared = {"task": task, "compile": settings.compile, "rounds": settings.rounds, **settings.described()}
    return [
        shared | _measured(form, memory_format, timings, settings)
        for form in settings.forms
        for memory_format in settings.memory_formats
    ]


def price(timings: Timings, settings: StepSettings, form: str = "deconv") -> float:
    """Return (form - none) / (twin - none), medians, each in its fastest memory format: 1 is what batch norm costs."""
    none, twin, seconds = (
        timings.spread(timings.fastest(settings.labels(label))).median for label in ("none", "twin", form)
    )
    return (seconds - none) / (twin - none) if twin != none else float("nan")


def check_published(settings: StepSettings) -> None:
    """Check that both whitened forms under 'paper' have the same training loss and evaluation output, within 1e-3.

    Raises:
        RuntimeError: they have not.
    """
    losses, outputs = [], []
    for form in ("deconv", "published"):
        model = settings.build(form, "paper")
        images, labels = random_batch(settings, model, "contiguous")
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(images), labels)))
            outputs.append(model.eval()(images))
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
    if not (abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[1]) and difference <= 1e-3):
        raise RuntimeError(
            f"{settings.network}: training loss {losses[0]:.6g}, published {losses[1]:.6g}, evaluation differs by "
            f"{difference:.1e}; {FEW_ROWS}"
        )


def random_batch(settings: StepSettings, model: nn.Module, memory_format: str) -> tuple[Tensor, Tensor]:
    """Draw images (N, C, H, W) of a network's size and labels (N), the same ones for all networks."""
    channels, height, width = model.default_cfg["input_size"]
    height, width = settings.image_size or height, settings.image_size or width
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch, channels, height, width, generator=generator)
    labels = torch.randint(model.num_classes, (settings.batch,), generator=generator)
    return (
        images.to(settings.device, memory_format=MEMORY_FORMATS[memory_format]),
        labels.to(settings.device),
    )


def training_step(model: nn.Module, images: Tensor, labels: Tensor, settings: StepSettings) -> Step:
    """Make a function of forward pass, cross entropy and backward pass, and the update if `settings` ask for it.

    Args:
        model: the network, which `settings` may ask to compile.
        images: (N, C, H, W).
        labels: (N,), integers.
        settings: precision, compilation, update.

    Returns:
        A function that drops the gradients of the step before and returns the loss, a scalar.
    """
    network = settings.compiled(model)

    def step() -> Tensor:
        model.zero_grad(set_to_none=settings.compile != CAPTURED)
        with settings.autocast():
            output = network(images)
        loss = F.cross_entropy(output.float(), labels)
        loss.backward()
        return loss.detach()

    whole = captured(step, model) if settings.compile == CAPTURED else step
    return _with_update(whole, model) if settings.update else whole


def _with_update(step: Step, model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def updating() -> Tensor:
        loss = step()
        optimizer.step()
        return loss

    return updating


def check_training(label: str, model: nn.Module, loss: Tensor) -> None:
    """Check that a training step's loss, a scalar, is finite, and so is the gradient of every parameter.

    Raises:
        RuntimeError, NonFiniteError: one is not.
    """
    if not loss.isfinite():
        raise NonFiniteError(f"{label}: loss {float(loss)}; {FEW_ROWS}")
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise RuntimeError(f"{label}: no finite gradient for {name}")


def _networks(settings: StepSettings) -> Iterator[tuple[str, nn.Module, str]]:
    for form in settings.forms:
        for label, memory_format in zip(settings.labels(form), settings.memory_formats, strict=True):
            model = settings.build("deconv" if form == "fused" else form)
            yield label, model.to(memory_format=MEMORY_FORMATS[memory_format]), memory_format


def _evaluation_step(model: nn.Module, images: Tensor, settings: StepSettings) -> Step:
    network = settings.compiled(model)

    def step() -> Tensor:
        with torch.inference_mode(), settings.autocast():
            return network(images)

    return step


def _interleave(steps: dict[str, Step], settings: StepSettings, progress: Callable[[str], object]) -> Timings:
    return interleave(
        steps,
        rounds=settings.rounds,
        warmup=settings.warmup,
        synchronise=synchroniser(settings.device),
        progress=progress,
    )


def _measured(form: str, memory_format: str, timings: Timings, settings: StepSettings) -> Row:
    label = f"{form} {memory_format}"
    spread = timings.spread(label)
    priced = (
        form in ("deconv", "published")
        and {"none", "twin"} <= set(settings.forms)
        and label == timings.fastest(settings.labels(form))
    )
    return {
        "form": form,
        "memory_format": memory_format,
        "preset": {"deconv": settings.preset, "fused": settings.preset, "published": "paper"}.get(form, ""),
        "seconds": rounded(spread.median),
        "seconds_lower": rounded(spread.lower),
        "seconds_upper": rounded(spread.upper),
        "ratio_to_none": _ratio(timings, label, f"none {memory_format}"),
        "ratio_to_twin": _ratio(timings, label, f"twin {memory_format}"),
        "price": rounded(price(timings, settings, form)) if priced else "",
    }


def _ratio(timings: Timings, label: str, reference: str) -> float | str:
    return rounded(timings.ratio(label, reference).median) if reference in timings.seconds else ""
