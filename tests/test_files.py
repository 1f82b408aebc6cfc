"""Whether a file can be written is asked before the work, and changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mamba_trace.errors import FileError, MissingExtraError
from mamba_trace.results.files import check_writable


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    there, link = tmp_path / "there.json", tmp_path / "link.json"
    there.write_text("old", encoding="utf-8")
    link.symlink_to(tmp_path / "new.json")
    for path in (there, link, tmp_path / "other.safetensors"):
        assert check_writable(path) == path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "there.json"]
    assert there.read_text(encoding="utf-8") == "old"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(FileError) as caught:
            check_writable(tmp_path / name)
        return str(caught.value)

    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert "folder.json cannot be written: Is a directory. Choose another place" in refusal("folder.json")
    assert "loop.json cannot be written: " in refusal("loop.json")
    assert "there is no folder" in refusal("no/grid.json")
    assert "saved as .html, .png, .json, .safetensors, not .pdf" in refusal("grid.pdf")
    assert "not without a suffix" in refusal("grid")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "loop.json"]


def test_a_folder_that_takes_no_new_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there.json"
    path.write_text("old", encoding="utf-8")

    def refuse(self: Path) -> None:
        assert self.parent == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(FileError, match=r"there\.json cannot be written: Permission denied"):
        check_writable(path)


@pytest.mark.parametrize(("module", "suffix"), [("plotly.graph_objects", "html"), ("matplotlib.figure", "png")])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        check_writable(tmp_path / f"grid.{suffix}")
    assert f"needs {module.partition('.')[0]}: pip install 'mamba_trace[plot]'" in str(caught.value)
