"""Tables of cost: training and evaluation steps, memory, scaling, layers and their kernels."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from .accuracy_tables import Maker, Named
from .tables import NOTHING, Row, Table, median_and_range, numbers, read_rows, runs, select, significant

__all__ = [
    "blocks",
    "evaluation",
    "gpu_goals",
    "host",
    "kernels",
    "latest_runs",
    "layers",
    "loop_cost",
    "memory",
    "operations",
    "published_steps",
    "readme_cost",
    "scaling",
    "scaling_rows",
    "step_runs",
    "steps",
]

BENCHMARK = "python scripts/benchmark.py {task}"

NETWORKS = (
    *("resnet18_cifar", "vgg16_cifar", "densenet121_cifar", "mobilenetv2_cifar", "senet18_cifar"),
    *("pnasnet_a_cifar", "efficientnet_b0_cifar", "resnet18", "resnet50"),
)
"""In the order in which tables list them."""

MODES = {"": "", "default": "compiled", "reduce-overhead": "compiled, CUDA graphs", "captured": "one CUDA graph"}

ENDS = ("", "_lower", "_upper")

RUN = "task network width batch image_size amp compile device hardware torch date rounds".split()


def step_runs(rows: Iterable[Row], forms: Named, **wanted: str) -> list[dict[str, Row]]:
    """Return the runs of `benchmark.csv` that have all of some forms, each with the row of each form in channels_last.

    Args:
        rows: of `benchmark.csv`.
        forms: form -> the preset of its rows.
        wanted: texts of other columns.
    """
    found = []
    for run in runs(select(rows, **wanted), RUN):
        last = {(row["form"], row["preset"]): row for row in run if row["memory_format"] == "channels_last"}
        if all(key in last for key in forms.items()):
            found.append({form: last[form, preset] for form, preset in forms.items()})
    return found


def latest_runs(found: Iterable[Mapping[str, Row]]) -> list[Mapping[str, Row]]:
    """Return the last run of each network at each batch, size, precision and mode, in the order of NETWORKS."""
    last: dict[str, Mapping[str, Row]] = {}
    for run in found:
        last[_name(next(iter(run.values())))] = run
    return sorted(last.values(), key=lambda run: NETWORKS.index(next(iter(run.values()))["network"]))


def _name(row: Row) -> str:
    """Name a network with its images, precision and compilation."""
    size = f" of {row['image_size']}x{row['image_size']}" if row["image_size"] else ""
    more = [f"{row['batch']} images{size}", row.get("amp", "")]
    more.append(MODES[row.get("compile", "")])
    return f"`{row['network']}`, " + ", ".join(text for text in more if text)


FAST_STEP: Named = {"none": "", "twin": "", "deconv": "fast"}

PROFILED = (("resnet18_cifar", "128", "cpu"), ("resnet18", "16", "cpu"), ("resnet18", "256", "cuda"))

README_STEPS = (
    ("device", "network", "batch", "amp", "compile"),
    ("cpu", "resnet18_cifar", "128", "", ""),
    ("cpu", "mobilenetv2_cifar", "128", "", ""),
    ("cpu", "resnet18", "16", "", ""),
    ("cuda", "resnet18_cifar", "128", "", ""),
    ("cuda", "resnet18_cifar", "128", "", "reduce-overhead"),
    ("cuda", "resnet18", "256", "", ""),
)
"""Columns, and their texts in the lines of the README's table."""


def steps(*, price: bool = True, **wanted: str) -> Maker:
    """Make a table of milliseconds of a training step, the latest run of each network.

    Args:
        price: add what `fast` adds to the network without norms, in units of what batch norm adds, over all runs.
        wanted: texts of columns of `benchmark.csv`: device, compile, amp.
    """

    def make(results: Path) -> Table:
        every = step_runs(read_rows(results / "benchmark.csv"), FAST_STEP, task="step", **wanted)
        body, used = [], []
        for latest in latest_runs(every):
            row = latest["deconv"]
            same = [run["deconv"] for run in every if _name(run["deconv"]) == _name(row)]
            prices = [median_and_range(numbers(same, "price"))] if price else []
            body.append([_name(row), *_times(latest, FAST_STEP), _ratio(latest), *prices])
            used += [*latest.values(), *same]
        head = ["ms a training step", "no norm", "batch norm", "`fast`", "`fast` / batch norm"]
        head += ["price in batch norms"] if price else []
        return Table(head, body, used, "benchmark.csv", BENCHMARK.format(task="step"))

    return make


def gpu_goals(results: Path) -> Table:
    """Make the table of what `gpu_check.py` last found of each part, in numbers that have a goal, beside it."""
    parts: dict[tuple[str, str], dict[str, Row]] = {}
    for row in select(read_rows(results / "gpu_check.csv"), size="full"):
        parts.setdefault((row["part"], row["measure"]), {})[row["form"]] = row
    body, used = [], []
    for (part, measure), forms in parts.items():
        found = forms.get("deconv")
        if found is None or not found["goal"]:
            continue
        values = [significant(float(forms[form]["value"])) if form in forms else NOTHING for form in FAST_STEP]
        ratio = f"{float(found['ratio_to_twin']):.2f}" if found["ratio_to_twin"] else NOTHING
        body.append([part, measure, *values, ratio, f"{found['goal']} ({found['least']})", found["verdict"]])
        used += forms.values()
    head = ["part", "measure", "no norm", "batch norm", "`fast`", "`fast` / batch norm", "goal (least)", "verdict"]
    return Table(head, body, used, "gpu_check.csv", "python scripts/gpu_check.py")


def _times(run: Mapping[str, Row], forms: Iterable[str]) -> list[str]:
    return [significant(1e3 * float(run[form]["seconds"])) for form in forms]


def _ratio(run: Mapping[str, Row]) -> str:
    return f"{float(run['deconv']['seconds']) / float(run['twin']['seconds']):.2f}"


def published_steps(results: Path) -> Table:
    """Make the table of training steps of `paper` beside the published operation sequence."""
    forms = {"none": "", "deconv": "paper", "published": "paper"}
    latest = latest_runs(step_runs(read_rows(results / "benchmark.csv"), forms, task="step"))
    body = []
    for run in latest:
        none, ours, theirs = (float(run[form]["seconds"]) for form in forms)
        body.append([_name(run["deconv"]), *_times(run, forms), significant((ours - none) / (theirs - none), 2)])
    head = ["ms a training step", "no norm", "`paper`", "published operation sequence", "added by `paper` / published"]
    used = [row for run in latest for row in run.values()]
    return Table(head, body, used, "benchmark.csv", BENCHMARK.format(task="step --preset paper"))


def evaluation(results: Path) -> Table:
    """Make the table of evaluation steps, fused and not."""
    forms = {**FAST_STEP, "fused": "fast"}
    latest = latest_runs(step_runs(read_rows(results / "benchmark.csv"), forms, task="inference"))
    body = [[_name(run["deconv"]), *_times(run, forms)] for run in latest]
    head = ["ms an evaluation step", "no norm", "batch norm", "`fast`", "`fast`, fused"]
    used = [row for run in latest for row in run.values()]
    return Table(head, body, used, "benchmark.csv", BENCHMARK.format(task="inference"))


def memory(results: Path) -> Table:
    """Make the table of a training step's peak memory beyond the parameters, over that of the network without norms."""
    forms = {("twin", ""): "batch norm", ("deconv", "fast"): "`fast`", ("deconv", "paper"): "`paper`"}
    forms |= {("published", "paper"): "published operation sequence"}
    latest = {}
    for row in select(read_rows(results / "benchmark_memory.csv"), device="cpu"):
        if row["network"] != "resnet18" or row["image_size"]:
            latest[row["network"], row["form"], row["preset"]] = row
    networks = [name for name in NETWORKS if (name, "deconv", "fast") in latest]
    used, body = [], []
    for network in networks:
        own = [latest.get((network, *form)) for form in forms]
        name = _name(latest[network, "deconv", "fast"])
        body.append([name, *(NOTHING if row is None else f"{float(row['ratio_to_none']):.2f}" for row in own)])
        used += [row for row in own if row is not None]
    head = ["memory over the network without norms", *forms.values()]
    return Table(head, body, used, "benchmark_memory.csv", BENCHMARK.format(task="memory"))


def scaling_rows(results: Path, axis: str) -> list[Row]:
    """Return the rows of the last run of `fast` along an axis."""
    own = select(read_rows(results / "benchmark_scaling.csv"), axis=axis, preset="fast")
    return runs(own, ["exponent"])[-1]


def scaling(results: Path) -> Table:
    """Make the table of whitening's share of a step against batch, image size and width: the latest run of each."""
    axes = {"batch": "{} images of 32x32", "image_size": "16 images of {0}x{0}", "width": "64 images, width {}"}
    rows = [row for axis in axes for row in scaling_rows(results, axis)]
    body = []
    for row in rows:
        times = (significant(1e3 * float(row[f"{form}_seconds"])) for form in ("none", "deconv"))
        body.append([axes[row["axis"]].format(row[row["axis"]]), *times, f"{100 * float(row['share']):.1f}"])
    head = ["`resnet18_cifar`", "no norm, ms a step", "`fast`, ms a step", "share of whitening in %"]
    return Table(head, body, rows, "benchmark_scaling.csv", BENCHMARK.format(task="scaling --axis ..."))


def blocks(results: Path) -> Table:
    """Make the table of whitening's share against the block, of both presets."""
    rows = [row for row in read_rows(results / "benchmark_scaling.csv") if row["axis"] == "block"]
    body = [[f"`{row['preset']}`", row["block"], f"{100 * float(row['share']):.0f}"] for row in rows]
    head = ["preset", "block, in channels", "whitening over the network without norms, in %"]
    return Table(head, body, rows, "benchmark_scaling.csv", BENCHMARK.format(task="scaling --axis block"))


def kernels(results: Path) -> Table:
    """Make the table of kernels that a layer of `fast` launches, forward and backward: the latest rows."""
    rows = select(read_rows(results / "benchmark_kernels.csv"), preset="fast")
    latest = {(row["path"], row["layer"]): row for row in rows}
    plain = sorted((row for (path, _), row in latest.items() if path == "plain"), key=lambda row: int(row["eager"]))
    body, used = [], []
    for row in plain:
        on_gpu = latest.get(("triton", row["layer"]))
        counts = [row[column] for column in "eager_plain compiled compiled_plain".split()]
        body.append([row["layer"], row["eager"], on_gpu["eager"] if on_gpu else NOTHING, *counts])
        used += [row, on_gpu] if on_gpu else [row]
    head = ["launches of a layer", "`fast`, plain form", "`fast`, kernels for GPUs", "plain layer"]
    head += ["`fast`, plain form, compiled", "plain layer, compiled"]
    return Table(head, body, used, "benchmark_kernels.csv", BENCHMARK.format(task="kernels"))


def host(results: Path) -> Table:
    """Make the table of how long the host is busy with a layer's step: the latest rows."""
    latest = {(row["layer"], row["form"]): row for row in read_rows(results / "benchmark_host.csv")}
    titles = {"none": "no norm", "twin": "batch norm", "plain": "`fast`, plain form", "triton": "`fast`, by kernels"}
    body = [
        [layer, *(significant(float(latest[layer, form]["microseconds"])) for form in titles)]
        for layer in dict.fromkeys(layer for layer, _ in latest)
    ]
    head = ["µs of the host", *titles.values()]
    return Table(head, body, list(latest.values()), "benchmark_host.csv", BENCHMARK.format(task="host"))


def layers(results: Path) -> Table:
    """Make the table of whitening alone beside one convolution, on the layers of the paper's table 3:
    the latest row of each."""
    latest = {row["row"]: row for row in read_rows(results / "benchmark_layer.csv")}
    rows = sorted(latest.values(), key=lambda row: int(row["row"]))
    body = []
    for row in rows:
        side, channels = f"{row['height']}x{row['width']}", f"{row['in_channels']} to {row['out_channels']}"
        times = (significant(1e3 * float(row[form])) for form in ("convolution", "fast", "paper", "published"))
        body.append([row["row"], side, channels, f"{row['kernel_size']}x{row['kernel_size']}", *times])
    head = ["row", "image", "channels", "kernel", "convolution, ms", "`fast`, ms", "`paper`, ms", "published, ms"]
    return Table(head, body, rows, "benchmark_layer.csv", BENCHMARK.format(task="layer"))


def operations(results: Path) -> Table:
    """Make the table of where the time of a training step goes, by form: convolutions, and the rest."""
    titles = {"none": "no norm", "twin": "batch norm", "deconv": "`fast`", "published": "published sequence"}
    presets = {"deconv": "fast", "published": "paper"}
    rows = read_rows(results / "benchmark_profile.csv")
    body, used = [], []
    for network, batch, device in PROFILED:
        for form, title in titles.items():
            own = select(rows, network=network, batch=batch, device=device, form=form, preset=presets.get(form, ""))
            if own:
                spent = {row["operation"]: float(row["milliseconds"]) for row in own}
                convolutions = sum(ms for name, ms in spent.items() if "conv" in name)
                cells = significant(convolutions), significant(sum(spent.values()) - convolutions)
                body.append([_name(own[0]), own[0]["hardware"], title, *cells])
                used += own
    head = ["", "on", "form", "convolutions, ms", "other operations, ms"]
    return Table(head, body, used, "benchmark_profile.csv", BENCHMARK.format(task="profile"))


def readme_cost(results: Path) -> Table:
    """Make the README's table of cost: steps of three networks on a processor and on a GPU, eager and compiled."""
    latest = latest_runs(step_runs(read_rows(results / "benchmark.csv"), FAST_STEP, task="step", device="cpu"))
    latest += latest_runs(step_runs(read_rows(results / "benchmark.csv"), FAST_STEP, task="step", device="cuda"))
    shown = {tuple(run["deconv"][column] for column in README_STEPS[0]): run for run in latest}
    chosen = [shown[key] for key in README_STEPS[1:]]
    body = [[_name(run["deconv"]), run["deconv"]["hardware"], *_times(run, FAST_STEP)] for run in chosen]
    head = ["ms a training step", "on", "no norm", "batch norm", "`fast`"]
    used = [row for run in chosen for row in run.values()]
    return Table(head, body, used, "benchmark.csv", BENCHMARK.format(task="step"))


def loop_cost(results: Path) -> Table:
    """Make the table of what the training loop adds to a bare one."""
    rows = read_rows(results / "benchmark_loop.csv")
    body = [[f"`{row['network']}`, {row['batch']} images", row["updates"], *_added(row)] for row in rows]
    head = ["network", "updates from the start of the loaders", "time over a bare loop", "processors' time"]
    return Table(head, body, rows, "benchmark_loop.csv", "python scripts/benchmark.py loop --data-dir IMAGES")


def _added(row: Row) -> list[str]:
    """Return what a loop adds by the clock and in processors' time, with quartiles, in %."""
    keys = ("overhead", "cpu_overhead")
    return ["{:.1f} % ({:.1f} to {:.1f})".format(*(100 * float(row[key + end]) for end in ENDS)) for key in keys]
