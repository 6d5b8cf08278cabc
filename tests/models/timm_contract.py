"""What timm asks of a model, as checks of a registered name: timm's own model tests, by meaning and not by shape alone.

A check takes a `Subject` and raises AssertionError. `CHECKS` are for classifiers, `DENSE_CHECKS` for dense prediction.
"""

import copy
import json
import math
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.layers import get_graph_node_names, is_scriptable, set_scriptable
from timm.models import FeatureInfo, GraphExtractNet, group_parameters, save_for_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn

RTOL, ATOL = 1e-4, 1e-5
KEPT: dict[str, Any] = {}
"""The subject of the last check, and its network."""


@dataclass(frozen=True)
class Subject:
    """A name with the arguments to create it, and the image size to run it at (None: its default_cfg's).

    `checkpointing`: whether the network can recompute activations; a few of timm's cannot.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    checkpointing: bool = True

    def create(self, **more: Any) -> nn.Module:
        """The network in evaluation mode, the same weights at every call with equal arguments.

        Checks that follow one another mostly ask for the same one: what is created without more arguments is kept, and
        copied, which takes a tenth of the time.
        """
        if more or is_scriptable():
            return self._create(**more)
        if KEPT.get("subject") != self:
            KEPT.update(subject=self, model=self._create())
        return copy.deepcopy(KEPT["model"])

    def _create(self, **more: Any) -> nn.Module:
        """Create it.

        Unless they are loaded, the convolutions start by He's rule: with untrained statistics PyTorch's default lets
        the signal vanish on its way, and a comparison of outputs would see the classifier's bias alone.
        """
        torch.manual_seed(0)
        model = timm.create_model(self.name, **{**self.kwargs, **more}).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not more.get("pretrained"):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return model

    def image(self, batch: int = 2, chans: int = 3) -> Tensor:
        """Random images."""
        size = self.size or timm.get_pretrained_cfg_value(self.name, "input_size")[-1]
        return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(1))


def same(a: Tensor, b: Tensor) -> None:
    """Assert equality up to rounding, of values that are not all zero."""
    size = float(b.detach().abs().max())
    assert size > 0
    torch.testing.assert_close(a, b, rtol=RTOL, atol=ATOL * size)


def hooked(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of the modules that `feature_info` names, copied as they pass, and the network's output."""
    names, maps = [info["module"] for info in model.feature_info], {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: maps.__setitem__(name, out.clone()))
        for name in names
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    return [maps[name] for name in names], output


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output in the model's mode, and the gradients of a random projection of it."""
    torch.manual_seed(2)
    output = model(x)
    (output * torch.randn_like(output)).sum().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def check_forward(subject: Subject) -> None:
    """Finite logits of the class count that default_cfg names."""
    model = subject.create()
    with torch.no_grad():
        output = model(subject.image())
    assert output.shape[:2] == (2, model.default_cfg["num_classes"])
    assert output.isfinite().all()


def check_backward(subject: Subject) -> None:
    """Batch 2 in training mode: every parameter gets a gradient."""
    model = subject.create(num_classes=42).train()
    output = model(subject.image())
    output.mean().backward()
    assert output.shape[:2] == (2, 42)
    assert output.isfinite().all()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"


def check_grad_checkpointing(subject: Subject) -> None:
    """`set_grad_checkpointing` changes neither outputs nor gradients."""
    for train in (False, True):
        model, other = subject.create().train(train), subject.create().train(train)
        other.set_grad_checkpointing()
        (output, grads), (output2, grads2) = (gradients(m, subject.image(4)) for m in (model, other))
        same(output, output2)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, grads2[name], rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
        other.set_grad_checkpointing(False)


def check_default_cfg(subject: Subject) -> None:
    """default_cfg and the model agree; the data configuration resolves; everything is JSON."""
    model = subject.create()
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert cfg["architecture"] == subject.name
    assert cfg["num_classes"] == model.num_classes
    assert f"{cfg['first_conv']}.weight" in keys
    assert f"{cfg['classifier']}.weight" in keys
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert resolve_data_config(model=model)["input_size"] == cfg["input_size"]
    json.dumps([cfg, model._model_args])


def check_head(subject: Subject) -> None:
    """Features, pre-logits, logits, and what `reset_classifier`, `num_classes=0` and `global_pool=''` make of them."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert features.shape[:2] == (2, model.num_features)
        if subject.size is None:
            assert features.shape[2:] == tuple(model.default_cfg["pool_size"])
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        classifier = model.get_classifier()
        as_map = isinstance(classifier, nn.Conv2d)
        same(classifier(pooled[..., None, None] if as_map else pooled).flatten(1), logits)
        same(model.forward_head(features), logits)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        assert model.num_classes == 7
        model.reset_classifier(0)
        same(model(x), pooled)
        model.reset_classifier(0, "")
        same(model(x), features)
        for options, expected in (({}, pooled), ({"global_pool": ""}, features)):
            headless = subject.create(num_classes=0, **options)
            assert not headless.load_state_dict(model.state_dict(), strict=False).missing_keys
            same(headless(x), expected)


def check_dense_head(subject: Subject) -> None:
    """The same for dense prediction, where nothing is pooled and the classifier is a 1x1 convolution."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert features.shape[:2] == (2, model.num_features)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape[:2] == (2, model.head_hidden_size)
        assert logits.shape[2:] == x.shape[2:]
        small = model.get_classifier()(hidden)
        same(nn.functional.interpolate(small, x.shape[2:], mode="bilinear"), logits)
        model.reset_classifier(7)
        assert model(x).shape[:2] == (2, 7)
        model.reset_classifier(0)
        same(model(x), hidden)


def check_features_only(subject: Subject) -> None:
    """`features_only` gives at least three levels: the maps, channels and reductions that `feature_info` promises."""
    x = subject.image()
    with torch.no_grad():
        model = subject.create()
        maps, _ = hooked(model, x)
        for options in ({}, {"feature_cls": "getter"}):
            net = subject.create(features_only=True, **options)
            channels, reductions = net.feature_info.channels(), net.feature_info.reduction()
            outputs = net(x)
            assert 3 <= len(outputs) == len(channels)
            for output, index, chs, reduction in zip(
                outputs, net.feature_info.get("index"), channels, reductions, strict=True
            ):
                same(output, maps[index])
                assert output.shape[1] == chs
                assert output.shape[2] == math.ceil(x.shape[2] / reduction)
        outputs = subject.create(features_only=True, out_indices=(0, 2))(x)
        for output, index in zip(outputs, (0, 2), strict=True):
            same(output, maps[index])


def check_intermediates(subject: Subject) -> None:
    """`forward_intermediates` gives the maps themselves, in each of its forms, and the output of `forward_features`."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        maps, _ = hooked(model, x)
        assert len(FeatureInfo(model.feature_info, len(model.feature_info)).channels()) == len(maps) >= 3
        output, found = model.forward_intermediates(x)
        same(output, model.forward_features(x))
        for a, b in zip(found, maps, strict=True):
            same(a, b)
        early = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
        for a, b in zip(early, maps[1:3], strict=True):
            same(a, b)
        (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        same(last, maps[-1])
        if subject.checkpointing:
            model.set_grad_checkpointing()
            same(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], last)
        model.forward_intermediates(x, norm=True)


def check_prune(subject: Subject) -> None:
    """`prune_intermediate_layers` drops parameters and keeps the maps that are asked for."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        for kept in ([0, 2], [1]):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers(kept) == kept
            for a, index in zip(pruned.forward_intermediates(x, kept, intermediates_only=True), kept, strict=True):
                same(a, maps[index])
            assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
            assert pruned(x).shape[1] == pruned.num_features == maps[kept[-1]].shape[1]


def check_torchscript(subject: Subject) -> None:
    """Scripting keeps the function."""
    with set_scriptable(True):
        model = subject.create()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        same(torch.jit.script(model)(subject.image()), model(subject.image()))


def check_fx(subject: Subject) -> None:
    """Symbolic tracing keeps the function and, in training mode, the gradients."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        expected = model(x)
    _, eval_nodes = get_graph_node_names(model)
    graph = GraphExtractNet(model, eval_nodes[-1:])
    with torch.no_grad():
        same(graph.eval()(x), expected)
    graph.train()(x).mean().backward()
    missing = [name for name, parameter in graph.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"


def check_pretrained(subject: Subject) -> None:
    """timm's loading: the same function; adapted to other channels and classes; without classifier; features only."""
    model, x = subject.create(), subject.image()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = str(Path(folder) / "weights.safetensors")
        trained = _perturbed(model)
        save_file(trained.state_dict(), file)
        load = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
        same(subject.create(**load)(x), trained(x))
        other = subject.create(in_chans=1, num_classes=5, **load)
        grey = x[:, :1]
        first = {"indices": [0], "intermediates_only": True}
        (expected,) = trained.forward_intermediates(grey.expand(-1, 3, -1, -1), **first)
        same(other.forward_intermediates(grey, **first)[0], expected)
        assert other(grey).shape[:2] == (2, 5)
        same(subject.create(num_classes=0, **load).forward_features(x), trained.forward_features(x))
        maps, _ = hooked(trained, x)
        net = subject.create(features_only=True, **load)
        for output, index in zip(net(x), net.feature_info.get("index"), strict=True):
            same(output, maps[index])


def _perturbed(model: nn.Module) -> nn.Module:
    """A copy with weights that no seed gives, as after training; buffers too, where averages of data are kept.

    The signal keeps its size on average: a gain a layer would be infinite behind a hundred of them.
    """
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.randn_like(tensor)).add_(1e-3 * torch.randn_like(tensor))
    return model


def check_round_trip(subject: Subject) -> None:
    """What `save_for_hf` writes comes back from 'local-dir:' with the same outputs."""
    model, x = subject.create(num_classes=5), subject.image()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_for_hf(model, folder, safe_serialization=True)
        back = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        same(back(x), model(x))


def check_groups(subject: Subject) -> None:
    """`group_matcher` gives every parameter a group, in the order from the stem to the classifier."""
    model = subject.create()
    for coarse in (False, True):
        ids = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert ids.keys() == dict(model.named_parameters()).keys()
        assert ids[f"{model.default_cfg['first_conv']}.weight"] == 0
        assert ids[f"{model.default_cfg['classifier']}.weight"] == max(ids.values()) >= 3


def check_reparameterize(subject: Subject) -> None:
    """`timm.utils.reparameterize_model` keeps the function in evaluation."""
    model, x = subject.create(), subject.image()
    with torch.no_grad():
        same(reparameterize_model(model)(x), model(x))


def check_placement(subject: Subject) -> None:
    """`device=` and `dtype=` are obeyed, by a new classifier too."""
    model = subject.create(device="meta", dtype=torch.float64)
    model.reset_classifier(3)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float64}


COMMON_CHECKS = (
    check_forward,
    check_backward,
    check_grad_checkpointing,
    check_default_cfg,
    check_intermediates,
    check_prune,
    check_torchscript,
    check_fx,
    check_pretrained,
    check_round_trip,
    check_groups,
    check_reparameterize,
    check_placement,
)
CHECKS = (*COMMON_CHECKS, check_head, check_features_only)
DENSE_CHECKS = (*COMMON_CHECKS, check_dense_head, check_features_only)
