"""Names of files in KVLAB_HOME."""

from __future__ import annotations

from pathlib import Path

from kvlab.platform.home import Home


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
