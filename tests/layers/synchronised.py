"""Run on four processes (gloo): trains with synchronised statistics in many ways, and reports as JSON how far each ends
from one process, or what was said."""

import copy
import io
import json
import sys
import warnings

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

import timm_deconv
from benchmarks.equivalence import OPTIONS, compare, digits, distance, layers, pooled, train
from timm_deconv.errors import InputError

STEPS = 3

CASES = ("layers fast", "layers paper", "layers capped", "layers freezing", "pooled paper", "channels paper")


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint_sequential(self.net, 3, x, use_reentrant=False)


def parallel(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


def accumulate(model, batches, no_sync):
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for i, (images, classes) in enumerate(batches):
        context = no_sync() if no_sync and i + 1 < len(batches) else io.StringIO()
        with context:
            nn.functional.cross_entropy(model(images), classes).backward()
    optimizer.step()


def fresh(dtype=torch.float64, options="fast"):
    torch.manual_seed(0)
    return layers(OPTIONS[options]).to(dtype)


def said(action):
    try:
        action()
    except InputError as error:
        return str(error)
    return "nothing"


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sharded(dtype, policy):
    model = timm_deconv.convert_sync(fresh(dtype))
    for layer in [each for each in model if list(each.parameters())] + [model]:
        fully_shard(layer, mp_policy=policy)
    return model


def main():
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    report = {"unconverted": said(lambda: timm_deconv.convert_sync(fresh()))}
    dist.init_process_group("gloo")
    rank, ones = dist.get_rank(), [1.0] * STEPS
    everything = digits(4, torch.float64)[:STEPS]
    own = [(images.chunk(4)[rank], classes.chunk(4)[rank]) for images, classes in everything]
    report["rows"] = [compare(case, "float64") for case in CASES]
    pair = dist.new_group([0, 1])
    if rank < 2:
        report["rows"] += [compare(case, "float64", pair) for case in CASES]

    one = fresh()
    train(one, everything, ones)

    model = fresh()
    train(parallel(timm_deconv.convert_sync(Checkpointed(model))), own, ones)
    report["checkpointed activations"] = distance(one, model)

    model, eager = (pooled(OPTIONS["fast"]).double() for _ in range(2))
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(parallel(timm_deconv.convert_sync(compiled)), own, ones)
    train(eager, everything, ones)
    report["compiled"] = distance(eager, model)

    model, accumulated = parallel(timm_deconv.convert_sync(fresh())), fresh()
    accumulate(model, own, model.no_sync)
    accumulate(accumulated, everything, None)
    report["accumulated gradients"] = distance(accumulated, model.module)

    model = timm_deconv.convert_sync(fresh())
    average = ModelEmaV3(model)
    train(copy.deepcopy(model), own, ones)
    pickled = io.BytesIO()
    torch.save(average.module, pickled)
    pickled.seek(0)
    alone = torch.load(pickled, weights_only=False)
    if rank == 0:  # neither evaluation nor a pickled network waits for the other process
        average.module(everything[0][0])
        train(alone.train(), everything, ones)
        report["a pickled network is that of one process"] = distance(one, alone)

    model, estimated = timm_deconv.convert_sync(fresh()), fresh()
    timm_deconv.update_statistics(model, own)
    timm_deconv.update_statistics(estimated, everything)
    report["update_statistics"] = distance(estimated, model)

    model = sharded(torch.float64, MixedPrecisionPolicy())
    train(model, own, ones)
    state = {name: whole(value) for name, value in model.state_dict().items()}
    report["fully_shard"] = max((state[k] - v).abs().max().item() for k, v in one.state_dict().items())

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(torch.float32, policy)
    train(model, [(images.float(), classes) for images, classes in own], ones)
    report["dtypes of sharded statistics"] = sorted({str(b.dtype) for b in model.buffers() if b.is_floating_point()})
    report["sharded statistics are finite"] = all(bool(b.isfinite().all()) for b in model.buffers())

    model = timm_deconv.convert_sync(fresh())
    images = own[0][0].clone()
    if rank == 1:
        images[0, 0, 0, 0] = torch.nan
    model(images)
    seen = [None] * 4
    dist.all_gather_object(seen, [bool(layer.saw_nonfinite) for layer in model if hasattr(layer, "saw_nonfinite")])
    report["all see what is not finite in one"] = all(map(all, seen))

    report["no images"] = said(lambda: model(own[0][0][: int(rank != 1)]))
    report["other sizes"] = said(lambda: model(own[0][0][:, :, : 16 - 4 * (rank == 1)]))
    report["beside the network"] = said(lambda: timm_deconv.convert_sync(fresh())[0](own[0][0]))
    if rank == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
