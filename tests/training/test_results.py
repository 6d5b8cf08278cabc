"""Result rows."""

import csv
import json
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from timm_deconv.errors import InputError
from timm_deconv.training import load_recipe, results


def test_rows_of_runs_that_end_together_are_all_there(tmp_path):
    rows = [{column: f"{column}-{run}" for column in results.COLUMNS} for run in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: results.append_row(tmp_path / "deep" / "cifar10.csv", row), rows))
    with open(tmp_path / "deep" / "cifar10.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert sorted(row["model"] for row in written) == sorted(row["model"] for row in rows)


def test_a_table_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "old.csv").write_text("model,speed\nx,1\n")
    with pytest.raises(InputError, match="other columns"):
        results.append_row(tmp_path / "old.csv", dict.fromkeys(results.COLUMNS, 1))
    assert (tmp_path / "old.csv").read_text() == "model,speed\nx,1\n"


def test_a_table_that_lacks_its_last_line_break_gets_it(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(",".join(results.COLUMNS))
    results.append_row(path, dict.fromkeys(results.COLUMNS, 1))
    assert len(path.read_text().splitlines()) == 2


def test_rows_are_added_all_or_none(tmp_path):
    path, columns = tmp_path / "r.csv", ["a", "b"]
    with pytest.raises(KeyError):
        results.append_rows(path, columns, [{"a": 1, "b": 2}, {"a": 3}])
    assert not path.exists()
    results.append_rows(path, columns, [{"a": 1, "b": "x,y"}, {"b": 4, "a": 3, "c": 5}])
    assert path.read_text() == 'a,b\n1,"x,y"\n3,4\n'


def test_rows_that_do_not_fit_leave_the_file_as_it_was(tmp_path):
    path, row = tmp_path / "r.csv", {"a": "x" * 50}
    results.append_rows(path, ["a"], [row])
    before, (soft, hard) = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 60, hard))  # room for one row of two
    try:
        with pytest.raises(OSError, match="did not fit"):
            results.append_rows(path, ["a"], [row, row])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before


def test_records_go_to_a_table_a_data_set():
    recipe = load_recipe("cifar10_e20")
    assert results.record_path(recipe).parts[-3:] == ("hub_configs", "results", "cifar10.csv")
    assert results.dataset_name(recipe.merged({"dataset": "", "data_dir": "/data/flowers"})) == "flowers"


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        (["model=vgg11_cifar_deconv", "model_kwargs={}"], {"deconv": {"version": 2, "preset": "fast"}}),
        (
            ["model=resnet18_deconv.bn_a1_in1k", "model_kwargs={deconv: paper}"],
            {"deconv": {"version": 2, "preset": "paper"}},
        ),
        (
            ["model=vgg11_cifar_deconv", "model_kwargs={width: 0.5, deconv: {block: 16}}"],
            {"width": 0.5, "deconv": {"version": 2, "preset": "fast", "block": 16}},
        ),
        (["model=vgg11_cifar", "model_kwargs={width: 0.5}"], {"width": 0.5}),
    ],
)
def test_a_row_names_the_preset_of_a_network_of_this_package(settings, recorded):
    row = results.describe_run(load_recipe("digits", settings))
    assert json.loads(row["model_kwargs"]) == recorded
