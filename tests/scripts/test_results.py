"""scripts/results.py: --check fails on a stale page and names it, the script without options makes it fresh."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "results.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, of a checkout with two pages: a README without tables, a page with a stale one."""
    spec = importlib.util.spec_from_file_location("results_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Nothing measured\n")
    (tmp_path / "docs" / "page.md").write_text("<!-- table: levers -->\nold\n<!-- end of table -->\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_a_stale_page_fails_the_check_until_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: ModuleType
) -> None:
    page = tmp_path / "docs" / "page.md"
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit, match=r"docs/page\.md: tables are not those of the rows; run "):
        script.main()
    assert "old" in page.read_text(), "a check writes nothing"
    monkeypatch.setattr(sys, "argv", ["results.py"])
    script.main()
    assert capsys.readouterr().out == "written: docs/page.md\n"
    assert "| `paper` | 70.1 | 1 | 519 |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    script.main()
    assert capsys.readouterr().out == "the tables are those of the rows\n"
