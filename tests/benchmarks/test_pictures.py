"""Pictures of the docs: every one is drawn from the rows."""

from pathlib import Path

import pytest

from benchmarks.pictures import PICTURES

RESULTS = Path(__file__).parents[2] / "hub_configs" / "results"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_the_rows(tmp_path: Path, name: str) -> None:
    PICTURES[name](RESULTS, tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
