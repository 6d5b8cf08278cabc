"""Tables of results: pure functions on the project's own rows, and what a page gets of them."""

from pathlib import Path

import pytest

from benchmarks.accuracy_tables import RECIPE, by_rate, final_rows, networks_by_form, settings
from benchmarks.cost_tables import latest_runs, step_runs, steps
from benchmarks.pages import filled, stale_pages
from benchmarks.tables import (
    Table,
    conditions,
    markdown,
    mean_and_deviation,
    median_and_range,
    read_rows,
    runs,
    select,
    significant,
)
from timm_deconv.errors import InputError

RESULTS = Path(__file__).parents[2] / "hub_configs" / "results"
FORMS = {"twin": "batch norm", "fast": "`fast`"}


def test_means_say_their_deviation_and_number_where_there_are_several() -> None:
    assert mean_and_deviation([68.0, 70.0]) == "69.0 ± 1.4 (2)"
    assert mean_and_deviation([68.04]) == "68.0"
    assert mean_and_deviation([]) == "-"
    assert median_and_range([0.5, 0.2, 0.9]) == "0.50 (0.20 to 0.90 in 3)"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0842, "0.0842"), (9.996, "10.0"), (1304.2, "1304"), (303.4, "303"), (0.5, "0.500"), (0, "0")]
)
def test_significant_digits_have_no_exponent(value: float, text: str) -> None:
    assert significant(value) == text


def test_rows_are_selected_by_text_and_grouped_by_run() -> None:
    rows = [{"form": form, "date": date} for form, date in (("a", "1"), ("b", "1"), ("a", "2"), ("a", "1"))]
    assert len(select(rows, form="a")) == 3
    assert len(select(rows, form=("a", "b"), date="1")) == 3
    assert [len(run) for run in runs(rows, ["date"])] == [2, 1, 1]


def test_conditions_name_each_machine_with_its_versions() -> None:
    rows = select(read_rows(RESULTS / "study.csv"), network="vgg11_cifar", epochs="5", variant="twin")
    assert conditions(rows) == (
        "AMD EPYC, 1 thread, torch 2.14.1, timm 1.0.31; NVIDIA H200, torch 2.11.0, timm 1.0.31; 2026-11-27"
    )


def test_a_variant_is_the_same_in_any_order_of_its_settings() -> None:
    assert settings("fast deconv.b=1 deconv.a=2 lr=0.1 epochs=2") == settings("fast lr=0.3 deconv.a=2 deconv.b=1")
    assert settings("fast") != settings("paper")


def test_old_rows_are_not_mixed_with_those_of_the_preset_as_it_is() -> None:
    rows = final_rows(RESULTS / "study.csv")
    own = select(rows, network="vgg11_cifar", width="0.5", epochs="1", amp="bfloat16", variant="fast")
    assert sorted(float(row["top1"]) for row in own) == [71.77, 71.94, 72.0, 72.09, 72.37]
    earlier = [row for row in rows if "quartic=false" in row["variant"]]
    assert len(earlier) > 30, "rows of before say what was other then"


def test_a_table_of_networks_has_the_figures_of_the_rows() -> None:
    make = networks_by_form(["resnet18_cifar"], FORMS, epochs="1", width="1.0", amp="", device="cuda")
    table = make(RESULTS)
    assert table.body == [["`resnet18_cifar`", "45.0 ± 1.7 (3)", "68.7 ± 0.4 (5)"]]
    assert {row["device"] for row in table.rows} == {"cuda"}


def test_a_table_by_rate_leaves_out_the_recipes_of_before() -> None:
    table = by_rate("mobilenetv2_100", "jpeg75", {"twin": "batch norm", RECIPE: "the recipe"})(RESULTS)
    assert table.body[0][3] == "70.5 ± 0.8 (3)"
    assert table.body[1][1:] == ["66.7", "73.9 ± 0.2 (3)", "77.2 ± 0.8 (3)", "75.7 ± 1.5 (3)", "69.6"]


def test_a_step_is_that_of_the_latest_run_with_all_forms() -> None:
    rows = read_rows(RESULTS / "benchmark.csv")
    found = step_runs(rows, {"none": "", "twin": "", "deconv": "fast"}, task="step", device="cpu", compile="")
    (run,) = (run for run in latest_runs(found) if run["deconv"]["network"] == "mobilenetv2_cifar")
    assert [run[form]["seconds"] for form in ("none", "twin", "deconv")] == ["0.5639", "0.9062", "0.69"]
    (line,) = (line for line in steps(device="cpu", compile="", amp="")(RESULTS).body if "mobilenetv2" in line[0])
    assert line == ["`mobilenetv2_cifar`, 128 images", "564", "906", "690", "0.76", "0.41 (0.37 to 0.46 in 2)"]


def test_markdown_has_the_conditions_file_and_command_below() -> None:
    row = {"hardware": "a card", "torch": "2.9.0+cu1", "timm": "1.0", "date": "2026-01-02"}
    assert markdown(Table(["a", "b"], [["1", "2"]], [row], "f.csv", "python x.py")).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
        "",
        "<small>a card, torch 2.9.0, timm 1.0; 2026-01-02. Rows: `f.csv`, by `python x.py`.</small>",
    ]


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"a table of study\.csv has no rows"):
        networks_by_form(["resnet18_cifar"], FORMS, epochs="7")(RESULTS)


def test_a_page_is_stale_until_its_tables_are_those_of_the_rows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- table: levers -->\nold figures\n<!-- end of table -->\n\nMore.\n")
    (fresh,) = stale_pages([page], RESULTS).values()
    assert "old figures" not in fresh
    assert "| iterative normalisation (Huang et al., 2019) | 71.0 |" in fresh
    assert fresh.startswith("# A page\n\n<!-- table: levers -->\n| ")
    assert fresh.endswith("\n<!-- end of table -->\n\nMore.\n")
    page.write_text(fresh)
    assert stale_pages([page], RESULTS) == {}
    assert filled(fresh, RESULTS) == fresh


def test_an_unknown_table_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="no table 'lever'; nearest: layers, levers"):
        filled("<!-- table: lever -->\n<!-- end of table -->", RESULTS)
