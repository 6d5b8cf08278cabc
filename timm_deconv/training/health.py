"""How well each layer whitens the batch at hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_deconv.convert import kept_buffers
from timm_deconv.data.sampling import kept_random_states
from timm_deconv.layers import WhiteningMixin
from timm_deconv.layers.functional import estimate, root_of

__all__ = ["whitening_health"]


@torch.no_grad()
def whitening_health(model: nn.Module, repeat: Callable[[], object]) -> dict[str, float]:
    """Measure, for each layer that whitens a batch by its own statistics, and return as `LAYER/MEASURE`:

    residual: ||D Cov D - I|| (Frobenius) over the root of the number of features, of covariance and whitener of the
        batch: 0 where each direction has variance 1, 1 where none has any left.
    condition: largest over smallest eigenvalue of the covariance, eps added to both.
    rows_to_features: rows that a covariance was taken from, over its features.

    Where a layer has several covariances (groups), the largest measure counts. Costs a forward pass and the
    eigenvalues of every covariance.

    Args:
        model: in training; it is left as it was, running values and random numbers too.
        repeat: runs a batch through the model.
    """
    found: dict[str, float] = {}

    def look(name: str, layer: WhiteningMixin, input: Tensor) -> None:
        measures = _measures(layer, input)
        found.update({f"{name}/{measure}": value for measure, value in measures.items()})

    with _as_it_was(model), torch.compiler.set_stance("force_eager"):  # compiled code passes hooks by
        handles = [
            layer.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs[0]))
            for name, layer in model.named_modules()
            if isinstance(layer, WhiteningMixin) and not layer.statistics_frozen
        ]
        try:
            repeat()
        finally:
            for handle in handles:
                handle.remove()
    return found


def _measures(layer: WhiteningMixin, input: Tensor) -> dict[str, float]:
    moments = layer.moments(input)
    whitener = estimate(moments, root_of(layer.cfg)).whitener
    features, zeros = whitener.shape[-1], moments.padding
    # as the whitener counts zeros of padding that are not among the rows
    cov = (1 - zeros) * (moments.cov + zeros * moments.mean[..., None] * moments.mean[:, None]).to(whitener.dtype)
    eye = torch.eye(features, device=cov.device, dtype=cov.dtype)
    residuals = (whitener @ cov @ whitener - eye).norm(dim=(-2, -1)) / features**0.5
    residual, condition = torch.stack([residuals.max(), _condition(cov, layer.cfg.eps)]).tolist()
    return {"residual": residual, "condition": condition, "rows_to_features": moments.row_count / features}


def _condition(cov: Tensor, eps: float) -> Tensor:
    """Return the largest condition () of covariances (S, F, F); NaN where they are not finite."""
    try:
        values = torch.linalg.eigvalsh(cov).clamp(min=0) + eps
    except torch.linalg.LinAlgError:
        return cov.new_tensor(torch.nan)
    return (values[..., -1] / values[..., 0]).max()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), kept_random_states(), kept_buffers(model):
        yield
