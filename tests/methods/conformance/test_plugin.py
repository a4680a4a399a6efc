"""The plug-in from outside: a method of another package, and mistakes on the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvlab

PAGE = Path(kvlab.__file__).parents[2] / "docs" / "conformance.md"
Suite = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A function that runs the suite on methods, beside the package that the page shows."""
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
    points = re.findall(
        r"^```toml\n\[project\.entry-points\.(.*?)^```", PAGE.read_text(), re.M | re.S
    )
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(
        "[" + points[0].replace('"kvlab.methods"', "kvlab.methods").replace('"', "")
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "--pyargs", "kvlab.methods.conformance", "-q"]
        paths = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [*command, "-p", "no:cacheprovider", *words],
            cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_a_method_of_another_package(suite: Suite, tmp_path: Path) -> None:
    done = suite("--kvlab-method", "mine", "-k", "gqa or shared")
    assert "18 passed" in done.stdout, done.stdout
    policy = tmp_path / "my_policy.py"
    code = policy.read_text()
    policy.write_text(code.replace("min(self.params.window, rows)", "min(self.params.window, 5)"))
    assert policy.read_text() != code
    broken = suite("--kvlab-method", '{"mine": {"window": 6}}', "-k", "gqa")
    assert broken.returncode == 1
    for name in ("parity", "bytes_held"):
        assert f"test_{name}[mine-gqa] - Failed: mine-gqa: " in broken.stdout
    assert "2 failed, 7 passed" in broken.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kvlab-method", "mind"], "unknown method 'mind': did you mean 'mine'?"),
        (["--kvlab-method", "{h2o"], "is no JSON"),
        (["--kvlab-method", '{"h2o": {"recent": 2}}'], "recent: must be float from 0.0 to 1.0"),
        ([], "name the methods to test: --kvlab-method h2o"),
    ],
)
def test_mistakes_are_one_line(suite: Suite, words: list[str], message: str) -> None:
    done = suite(*words)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_shown_python_runs() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (code,) = [code for code in shown if not code.startswith("#")]
    exec(compile(code, str(PAGE), "exec"), {})
