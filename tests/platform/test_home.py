"""Names of files in KVLAB_HOME."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlab import KvlabError
from kvlab.platform.home import Home, try_write


def test_logs_of_different_cells_are_different_files(tmp_path: Path) -> None:
    home = Home(tmp_path, "")
    long = "job[" + "x" * 300
    cells = [f"{long},seed=0]", f"{long},seed=1]", "a/b", "a_b", "a:b", "a"]
    paths = {home.log(1, cell, 1) for cell in cells}
    assert len(paths) == len(cells)
    assert home.log(1, "a[seed=0]", 2).name == "a[seed=0]-2.log"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("below", ["", "below"])
def test_a_home_that_is_a_file_is_refused_at_once(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / below
    with pytest.raises(KvlabError, match=f"KVLAB_HOME {place} cannot be written"):
        Home.find(place)


def test_a_home_that_no_folder_can_be_made_in_is_refused() -> None:
    with pytest.raises(KvlabError, match="KVLAB_HOME /proc/kv cannot be written"):
        Home.find("/proc/kv").create()


def test_a_folder_that_takes_no_file_is_refused() -> None:
    with pytest.raises(OSError):
        try_write(Path("/proc"))
