"""Does every batch-norm network of timm convert, train, fuse, save and load? One network at a time, as a row.

Checked with random weights and images: that no batch norm is left; that one training step is finite and reaches every
parameter that it reaches in timm's network; that nothing is overwritten that another branch reads, now that norms no
longer stand between; that the fused network, the one that timm re-parameterises and the one saved and loaded again
compute the same.
"""

import copy
import itertools
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection

import timm
import torch
from timm.models import model_entrypoint, save_for_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_deconv.convert import ConversionReport, convert_deconv_model, fuse
from timm_deconv.convert.fuse import SelfFusing
from timm_deconv.layers import WhiteningMixin

from .rows import Row

__all__ = [
    "COLUMNS",
    "SHOWN",
    "ConversionRow",
    "ConversionSettings",
    "check_in_process",
    "check_network",
    "conversion_rows",
    "is_batch_norm_network",
]

LARGE = 100_000_000
BATCH = 4
TOLERANCE = 1e-4
SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256)


@dataclass
class ConversionRow:
    """What came of one network; `outcome` is 'pass', 'pass (meta)' for large ones, or what went wrong.

    Differences are relative to the largest output. `unused` counts whitened layers that no input reached, as where a
    network takes a layer's weight and does not call it; they stay at the identity.
    """

    network: str
    outcome: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    converted: int = 0
    left_plain: int = 0
    norms_removed: int = 0
    batch_norms_left: int = 0
    other_norms: int = 0
    input_size: int | str = ""
    loss: float | str = ""
    output_size: float | str = ""
    no_gradient: int | str = ""
    unused: int | str = ""
    fused_difference: float | str = ""
    reparameterized_difference: float | str = ""
    reloaded_difference: float | str = ""
    fused_reloaded_difference: float | str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """Return the row for a CSV file."""
        short = (f"{value:.3g}" if isinstance(value, float) else value for value in asdict(self).values())
        return dict(zip(COLUMNS, short, strict=True))


COLUMNS = [field.name for field in fields(ConversionRow)]

SHOWN = "network outcome parameters_before parameters_after converted left_plain fused_difference seconds".split()


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """What is converted.

    Attributes:
        networks: shell patterns of timm's names, in the order to go; those with batch norm are converted.
        time_limit: seconds of processor time for a network.
        done: names that are passed over.
    """

    networks: Sequence[str] = ("*",)
    time_limit: int = 600
    done: Set[str] = frozenset()


def conversion_rows(settings: ConversionSettings, progress: Callable[[str], object] = print) -> Iterator[Row]:
    """Yield a row for each network as soon as it is checked, see `ConversionRow`; each in a process of its own."""
    for name in dict.fromkeys(name for pattern in settings.networks for name in timm.list_models(pattern)):
        if name not in settings.done and is_batch_norm_network(name):
            row = check_in_process(name, settings.time_limit)
            progress(f"{name}: {row.outcome} ({row.seconds} s)")
            yield row.as_dict()



class Failure(Exception):
    """A check that did not hold."""


def is_batch_norm_network(name: str) -> bool:
    """Tell whether a network is timm's own and holds a batch norm; it is built without storage."""
    if not model_entrypoint(name).__module__.startswith("timm.models."):
        return False
    try:
        model = _on_meta(name)
    except Exception:  # whatever keeps timm from building one of its networks is not ours to judge
        return False
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def check_network(name: str) -> ConversionRow:
    """Convert one network and check it; whatever goes wrong is the row's outcome."""
    row = ConversionRow(name)
    begin = time.perf_counter()
    try:
        large = sum(p.numel() for p in _on_meta(name).parameters()) > LARGE
        if large:
            _convert(_on_meta(name), row)
        else:
            _check_small(name, row)
        row.outcome = "pass (meta)" if large else "pass"
    except Failure as failure:
        row.outcome = str(failure)
    except Exception as error:
        row.outcome = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    row.seconds = round(time.perf_counter() - begin, 1)
    return row


def check_in_process(name: str, time_limit: int) -> ConversionRow:
    """Check a network in a process of its own, which may end badly, within so many seconds of processor time."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send_row, args=(name, time_limit, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        reason = f"more than {time_limit} s" if process.exitcode == -signal.SIGXCPU else f"status {process.exitcode}"
        return ConversionRow(name, outcome=f"ended before it was done: {reason}")


def _send_row(name: str, time_limit: int, send: Connection) -> None:
    """Check a network on one thread."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (time_limit, time_limit + 1))
    send.send(check_network(name))


def _convert(model: nn.Module, row: ConversionRow) -> ConversionReport:
    report = convert_deconv_model(model)
    row.parameters_before, row.parameters_after = report.parameters_before, report.parameters_after
    row.converted, row.left_plain = len(report.converted), len(report.skipped)
    row.norms_removed, row.other_norms = len(report.norms), len(report.norms_left)
    row.batch_norms_left = sum(isinstance(module, _BatchNorm) for module in model.modules())
    unsaid = row.batch_norms_left - len(report.norms_kept)
    _require(unsaid == 0, f"{unsaid} batch norms left without a reason")
    return report


def _check_small(name: str, row: ConversionRow) -> None:
    torch.manual_seed(0)
    row.input_size = smallest_input(name)
    model = timm.create_model(name)
    report = _convert(model, row)
    x = torch.randn(BATCH, model.pretrained_cfg["input_size"][0], row.input_size, row.input_size)
    _train_one_step(model, x, row)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        row.output_size = float(expected.abs().max())
        _require(bool(expected.isfinite().all()), "the output in evaluation is not finite")
        unshared = _unshared(model, report)(x)
        _require(torch.equal(unshared, expected), "something is overwritten that another branch reads")
        fused = fuse(model)
        row.fused_difference = difference(fused(x), expected)
        _require_same(row.fused_difference, "fused")
        if any(isinstance(child, SelfFusing) for child in itertools.islice(model.modules(), 1, None)):
            row.reparameterized_difference = difference(reparameterize_model(model)(x), expected)
            _require_same(row.reparameterized_difference, "re-parameterised")
        row.reloaded_difference = difference(reloaded(model)(x), expected)
        _require_same(row.reloaded_difference, "reloaded")
        row.fused_reloaded_difference = difference(reloaded(fused)(x), expected)
        _require_same(row.fused_reloaded_difference, "fused and reloaded")


def smallest_input(name: str) -> int:
    """Find the smallest square image of SIZES that the batch-norm network takes, or its own size if that is fixed.

    Raises:
        Failure: it takes none.
    """
    model = _on_meta(name).train()
    channels, *native = model.pretrained_cfg["input_size"]  # type: ignore[index, misc]
    for size in (*(s for s in SIZES if s < native[0]), native[0]):
        try:
            model(torch.empty(BATCH, channels, size, size, device="meta"))
            return size
        except Exception:  # any error means that the network does not take this size
            continue
    raise Failure("the batch-norm network does not run")


def reloaded(model: nn.Module) -> nn.Module:
    """Save a network as timm does, and load it from that folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, safe_serialization=True)
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors of one shape, relative to the largest expected value."""
    return float((output - expected).abs().max() / expected.abs().max())


def _train_one_step(model: nn.Module, x: Tensor, row: ConversionRow) -> None:
    loss = _loss(model.train(), x)
    row.loss = float(loss.detach())
    _require(bool(loss.isfinite()), "the loss is not finite")
    loss.backward()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    if missing:
        missing -= _without_gradient_in_timm(row.network, x)
    row.no_gradient = len(missing)
    _require(not missing, f"{len(missing)} parameters without gradient, such as {min(missing, default='')}")
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    _require(finite, "a gradient is not finite")
    whitened = [module for module in model.modules() if isinstance(module, WhiteningMixin)]
    row.unused = sum(int(module.num_batches_tracked) == 0 for module in whitened)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _without_gradient_in_timm(name: str, x: Tensor) -> set[str]:
    """Name parameters that timm's own network does not reach either, and the biases that conversion added to them."""
    model = timm.create_model(name)
    _loss(model.train(), x).backward()
    unreached = {n for n, parameter in model.named_parameters() if parameter.grad is None}
    return unreached | {f"{n.removesuffix('.weight')}.bias" for n in unreached}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    outputs = output if isinstance(output, tuple | list) else [output]
    return torch.stack([out.square().mean() for out in outputs]).sum()


class _Copy(nn.Module):
    """A norm's place, with a tensor of its own behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _unshared(model: nn.Module, report: ConversionReport) -> nn.Module:
    """Copy the network, with a copy made of its tensors wherever a norm stood."""
    unshared = copy.deepcopy(model)
    for name in report.norms:
        unshared.set_submodule(name, nn.Sequential(_Copy(), unshared.get_submodule(name)))
    return unshared


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def _require_same(value: float, what: str) -> None:
    _require(value < TOLERANCE, f"{what}: another output ({value:.1e})")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Failure(message)
