"""Result rows."""

import csv
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


def test_records_go_to_a_table_a_data_set():
    recipe = load_recipe("cifar10_e20")
    assert results.record_path(recipe).parts[-3:] == ("hub_configs", "results", "cifar10.csv")
    assert results.dataset_name(recipe.merged({"dataset": "", "data_dir": "/data/flowers"})) == "flowers"
