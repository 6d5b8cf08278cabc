"""What is installed: the base runs without the packages of the extra `train`; wheel and sdist hold what they should."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from timm_deconv.data import Digits, digits
from timm_deconv.errors import InputError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"scikit-learn": "sklearn"}
NEEDED_BY_TIMM_AND_HUB = {"pyyaml", "tqdm"}

NOT_FOUND = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

CREATE_CONVERT_FUSE = """
import sys
import timm, torch, timm_deconv

x = torch.randn(4, 3, 32, 32)
created = timm.create_model("resnet18_cifar_deconv", width=0.125).train()
created(x).sum().backward()
converted = timm.create_model("test_resnet")
timm_deconv.convert_deconv_model(converted)
converted.train()(x)
torch.testing.assert_close(timm_deconv.fuse(converted.eval())(x), converted(x))
print([name for name in sys.modules if name.split(".")[:2] in (["timm_deconv", "training"], ["benchmarks"])])
"""

LOAD_PACKAGED = """
import socket
import timm, timm_deconv
from timm_deconv.models.zoo import entries

socket.socket.connect = None
print(timm_deconv.__file__)
packaged = [name for name, entry in entries().items() if "packaged" in entry.files]
print(*[name for name in packaged if timm.create_model(name, pretrained=True)])
"""

RUN_SCRIPTS = """
import runpy, sys

for command in sys.argv[1:]:
    try:
        sys.argv = command.split()
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        print(ended.code)
"""


RUN_COMMANDS = """
import sys
from timm_deconv.cli import main

for words in sys.argv[1:]:
    try:
        sys.argv = ["timm-deconv", *words.split()]
        main()
    except SystemExit as ended:
        print(ended.code)
"""


@pytest.fixture
def without_train(tmp_path: Path) -> dict[str, str]:
    """An environment in which no package can be imported that only the extra `train` brings."""
    names = {requirement.partition(">")[0] for requirement in PROJECT["optional-dependencies"]["train"]}
    missing = sorted(IMPORTED_AS.get(name, name) for name in names - NEEDED_BY_TIMM_AND_HUB)
    assert {"accelerate", "pydantic", "sklearn", "tensorboard"} <= set(missing)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOT_FOUND.format(names=missing))
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT)))}


def test_networks_are_created_converted_and_fused_without_the_packages_of_train(
    without_train: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CREATE_CONVERT_FUSE)
    done = _python(["-m", "timm_deconv", script], without_train)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_scripts_that_need_an_extra_end_with_one_line_that_names_it(without_train: dict[str, str]) -> None:
    scripts = dict.fromkeys(("train.py digits", "validate.py runs/mine", "quickstart.py"), "train")
    scripts |= dict.fromkeys(("benchmark.py step", "study.py"), "benchmark")
    done = _python(["-c", RUN_SCRIPTS, *(f"scripts/{command}" for command in scripts)], without_train)
    lines = done.stdout.splitlines()
    assert len(lines) == len(scripts), done.stdout + done.stderr
    for line, extra in zip(lines, scripts.values(), strict=True):
        assert line.startswith("InputError: ")
        assert line.endswith(f" is not installed; pip install 'timm-deconv[{extra}]'")


def test_digits_say_which_extra_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(InputError, match=r"^sklearn is not installed; pip install 'timm-deconv\[train\]'$"):
        Digits(train=True)


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_the_package_with_its_recipes_and_small_weights_and_nothing_else(wheel_file: Path) -> None:
    with zipfile.ZipFile(wheel_file) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(file.relative_to(ROOT)) for file in (ROOT / "timm_deconv").rglob("*.py")}
    recipes = {f"timm_deconv/hub_configs/recipes/{file.name}" for file in (ROOT / "hub_configs/recipes").iterdir()}
    cards = {f"timm_deconv/hub_configs/{file.name}" for file in (ROOT / "hub_configs").glob("*.yaml")}
    weights = {f"timm_deconv/hub_configs/packaged/{file.name}" for file in (ROOT / "hub_configs/packaged").iterdir()}
    page = {f"timm_deconv/demo/page/{file.name}" for file in (ROOT / "timm_deconv/demo/page").iterdir()}
    assert {"timm_deconv/demo/page/index.html", "timm_deconv/demo/page/app.js"} <= page
    assert names - modules == recipes | cards | weights | page | {"timm_deconv/py.typed"}


def test_weights_of_the_wheel_load_without_a_network(wheel_file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_file) as wheel:
        wheel.extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = _python(["-P", "-c", LOAD_PACKAGED], environment)
    assert done.returncode == 0, done.stderr
    place, loaded = done.stdout.splitlines()
    assert Path(place).parents[1] == tmp_path
    weights = {file.name.removesuffix(".safetensors") for file in (ROOT / "hub_configs/packaged").iterdir()}
    assert set(loaded.split()) == weights


def test_the_wheel_brings_a_command_that_knows_pictures_without_the_packages_of_train(
    without_train: dict[str, str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(_built("wheel", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "installed")
    (listed,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert listed.read_text().split() == ["[console_scripts]", "timm-deconv", "=", "timm_deconv.cli:main"]
    places = (str(tmp_path / "site"), str(tmp_path / "installed"))
    commands = ["list *_025_*", f"predict resnet18_025_cifar_deconv {ROOT}/docs/images/cat.jpg --top 1", "train digits"]
    environment = without_train | {"PYTHONPATH": os.pathsep.join(places)}
    done = _python(["-c", RUN_COMMANDS, *commands], environment, tmp_path)
    _, *networks, _, predicted, missing = done.stdout.splitlines()
    assert len(networks) == 2 and predicted.split()[1] == "cat", done.stdout + done.stderr
    assert missing.endswith(" is not installed; pip install 'timm-deconv[train]'"), missing


def test_the_sdist_holds_the_tests_and_what_they_need(tmp_path: Path) -> None:
    with tarfile.open(_built("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("timm_deconv", "benchmarks", "scripts", "tests", "docs", "hub_configs/recipes"):
        files = {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert {file for file in files if "__pycache__" not in file} <= names, folder
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/golden/layers/index.json"} <= names


def _built(target: str, folder: Path) -> Path:
    done = _python(["-m", "hatchling", "build", "--target", target, "--directory", folder], dict(os.environ))
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl" if target == "wheel" else "*.tar.gz"))


def _python(
    arguments: list[object], environment: dict[str, str], folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
