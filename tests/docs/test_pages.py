"""What README and docs say holds: their code runs, their commands parse, their links lead somewhere, their tables are
those of the rows."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_deconv
from benchmarks.kernels import eager_kernels
from benchmarks.pages import TABLES, stale_pages
from benchmarks.pictures import NOT_OF_ROWS, PICTURES
from benchmarks.tables import read_rows
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, links
from tests.hub_server import hub
from timm_deconv import __main__ as runner
from timm_deconv.cli import app
from timm_deconv.training import load_recipe

README, RESULTS = ROOT / "README.md", ROOT / "hub_configs" / "results"
PLACES = ("runs/", "hf-hub:", "local-dir:")
"""How models begin that are no names of the registry."""
COMMANDS = [(page, block) for page in PAGES for block in blocks(page, "sh")]


def test_every_python_block_runs(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "timm" / "resnet18.a1_in1k"
    save_for_hf(timm.create_model("resnet18"), str(repository), safe_serialization=True)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # blocks read a picture of the checkout, and write elsewhere
    places = {"HF_HOME": tmp_path / "cache", "TORCH_HOME": tmp_path / "torch", "PYTHONPATH": ROOT}
    with hub(tmp_path / "hub") as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-m", "tests.docs.run_blocks", *map(str, PAGES)]
        environment = os.environ | settings | {name: str(place) for name, place in places.items()}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert not errors, "\n".join(f"{place}\n{error}" for place, error in errors.items())


@pytest.mark.parametrize(("page", "block"), COMMANDS, ids=lambda value: getattr(value, "stem", ""))
def test_every_command_is_one_that_its_script_takes(monkeypatch: pytest.MonkeyPatch, page: Path, block: Block) -> None:
    for words in _commands(block.text):
        if "timm_deconv" in words[:3]:
            runner.parse(words[words.index("timm_deconv") + 1 :] if "--calibrate" not in words else ["train.py"])
        elif "timm-deconv" in words:
            _check_command(words[words.index("timm-deconv") + 1 :])
        elif script := next((word for word in words if word.startswith("scripts/")), None):
            arguments = words[words.index(script) + 1 :]
            if command := re.search(r'^    main\("(\w+)"\)$', (ROOT / script).read_text(), re.MULTILINE):
                _check_command([command[1], *arguments])
            else:
                monkeypatch.setattr(sys, "argv", [script, *arguments])
                _check_arguments(_module(ROOT / script))


def _commands(text: str) -> list[list[str]]:
    """The commands of a block, without the variables before them and comments behind."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _module(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_command(words: list[str]) -> None:
    if words[:1] not in (["--help"], ["--install-completion"]):
        _, bound, _ = app.parse_args(words)
        _check_values(bound.arguments)


def _check_arguments(module: ModuleType) -> None:
    if not hasattr(module, "parse"):
        assert len(sys.argv) == 1 or sys.argv[1].startswith("--"), f"{sys.argv}: has no arguments but options"
        return
    _check_values(vars(module.parse()))


def _check_values(arguments: Mapping[str, Any]) -> None:
    if recipe := arguments.get("recipe"):
        load_recipe(recipe, arguments.get("settings", ()))
    model = arguments.get("model")
    if model and not model.startswith(PLACES):
        assert timm.is_model(model.partition(".")[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and not anchor.startswith("timm_deconv."):
            assert anchor in anchors(target), link


def test_the_tables_are_those_of_the_rows() -> None:
    stale = [page.name for page in stale_pages(PAGES, RESULTS)]
    assert not stale, "run python scripts/results.py"


def test_every_table_and_picture_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert {name for name in TABLES if f"<!-- table: {name} -->" not in text} == set()
    assert {name for name in PICTURES.keys() | NOT_OF_ROWS if f"images/{name}" not in text} == set()
    images = {file.name: file.stat().st_size for file in (ROOT / "docs" / "images").iterdir()}
    assert images.keys() == PICTURES.keys() | NOT_OF_ROWS
    assert max(images.values()) < 300_000


def test_the_readme_is_short_and_counts_right() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert f"{len(timm_deconv.list_models())} networks" in text
    for name in ("main job", "test command"):
        assert re.search(rf"^<!-- {name} -->\n```sh\n[^\n]+\n```$", text, re.MULTILINE), name


def test_the_first_example_classifies_its_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks(README, "python")[0].text
    (answer,) = re.findall(r"argmax\(\)\]\)  # (\w+)", code)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert capsys.readouterr().out.strip() == answer == "cat"


def test_the_reference_has_every_public_name() -> None:
    documented = re.findall(r"^::: timm_deconv\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(timm_deconv.__all__)


def test_figures_in_sentences_are_those_of_the_rows() -> None:
    readme, converting = README.read_text(), (ROOT / "docs" / "convert.md").read_text()
    goals = TABLES["GPU goals"](RESULTS).body
    ratios = {line[0]: f"{float(line[5]):.1f}" for line in goals if line[1] == "ms a step"}
    times = f"`resnet18` takes {ratios['resnet18']} times as long, `resnet50` {ratios['resnet50']} (float32)"
    times += f" and {ratios['resnet50, bfloat16']} (bfloat16), `resnet18_cifar` {ratios['resnet18_cifar']}"
    assert f"{times}, as one CUDA graph {ratios['resnet18_cifar, captured']}" in " ".join(readme.split())
    (kernels,) = (float(line[5]) for line in goals if line[0] == "kernel time, resnet18")
    assert f"all kernels of `resnet18` take {100 * (kernels - 1):.0f} % longer" in readme
    networks, *passed = map(int, TABLES["conversions"](RESULTS).body[0][1:4])
    assert f"{sum(passed)} of {networks} convert" in converting


def test_what_the_host_is_spared_is_in_the_rows() -> None:
    rows = [row for row in read_rows(RESULTS / "benchmark_host.csv") if row["form"] == "triton"]
    spared = []
    for layer in {row["layer"] for row in rows} - {"linear"}:  # of which there are no rows of before
        over = [float(row["over_twin"]) for row in rows if row["layer"] == layer]
        spared.append(round(100 * (1 - over[-1] / over[0])))
    page = (ROOT / "docs" / "gpu-and-compile.md").read_text()
    assert f"takes away {min(spared)} to {max(spared)} % of what a whitened convolution costs the host" in page


def test_what_the_readme_admits_of_its_comparison_is_in_the_rows() -> None:
    readme = README.read_text()
    _, _, _, sgd, norm_muon, muon = (cell.partition(" ")[0] for cell in TABLES["five epochs"](RESULTS).body[0])
    assert f"with Muon it reaches {norm_muon} after five epochs (one run)" in readme
    assert f"against {sgd} of `fast` with SGD and {muon} with Muon" in readme
    memory = [[float(cell) for cell in line[1:3]] for line in TABLES["memory"](RESULTS).body]
    norm, fast = (f"{min(column):.2f} to {max(column):.2f} times" for column in zip(*memory, strict=True))
    assert f"{fast} that without norms, batch norm's {norm}" in readme


def test_what_the_readme_admits_of_longer_runs_is_in_the_rows() -> None:
    accuracies = {line[0].strip("`"): line[3] for line in TABLES["zoo"](RESULTS).body}
    names = ("resnet18_025_cifar_deconv.nd_e20_cifar10", "resnet18_025_cifar.e20_cifar10")
    ours, norm = (accuracies[name] for name in names)
    assert f"`resnet18_025_cifar` has {ours} % against batch norm's {norm} (one run each)" in README.read_text()


def test_what_fine_tuning_says_of_frozen_batch_norm_is_in_the_rows() -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text()
    table = TABLES["fine-tuning, CIFAR-10"](RESULTS)
    frozen = next(line for line in table.body if line[0] == "batch norm, frozen")
    assert table.head[1:3] == ["0.001", "0.003"]
    assert f"ahead of all ({frozen[1]} %)" in page
    assert f"collapses ({frozen[2]} %" in page


def test_the_corrected_gain_costs_as_many_operations_as_the_method_says() -> None:
    x = torch.randn(8, 64, 8, 8, requires_grad=True)
    plain, corrected = (
        eager_kernels(timm_deconv.Deconv2d(64, 64, 1, cfg={"preset": "fast", "gain_corrected": on}), x)
        for on in (False, True)
    )
    assert corrected - plain == pytest.approx(60, abs=5)
    assert "at the cost of about sixty small operations" in (ROOT / "docs" / "method.md").read_text()
