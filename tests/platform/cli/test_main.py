"""The command line: instant help, late imports, and how errors end."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab import KvlabError
from kvlab.platform.cli import main as cli
from kvlab.platform.cli.main import COMMANDS, main

RUN = "from kvlab.platform.cli.main import main; main()"
HEAVY = ["torch", "ray", "mlflow", "transformers", "sqlalchemy", "pydantic", "yaml", "plotly"]


def shell(*arguments: str, code: str = RUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_help_is_instant_and_names_every_command() -> None:
    shell("--help")  # the first run writes bytecode
    best = min(_used("--help") for _ in range(3))
    said = shell("--help").stdout
    assert all(name in said for name in COMMANDS)
    assert best < 0.5, f"kvlab --help took {best:.2f} s of CPU"


def _used(*arguments: str) -> float:
    """CPU seconds of a command: its wall time depends on what else this machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shell(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from kvlab.platform.cli.main import main
try:
    main()
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert shell("--help", code=code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["validate", "plan", "methods", "schema"])
def test_reading_a_workflow_imports_no_torch_and_no_ray(command: str) -> None:
    workflow = str(Path(__file__).parents[3] / "workflows" / "quickstart.yaml")
    arguments = [command, workflow] if command in ("validate", "plan") else [command]
    code = f"""
import sys
for name in ("torch", "ray", "mlflow", "transformers"):
    sys.modules[name] = None
{RUN}
"""
    ended = shell(*arguments, code=code)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvlab", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"kvlab {name}" in capsys.readouterr().out


def test_a_misspelt_command_is_told_the_nearest() -> None:
    ended = shell("validat")
    assert ended.returncode == 2
    assert "Did you mean 'validate'?" in ended.stderr


def raising(error: Exception) -> object:
    class Module:
        @staticmethod
        def command() -> None:
            raise error

    return Module


def test_a_users_mistake_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = raising(KvlabError("the disk is full: free some"))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "argv", ["kvlab", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "the disk is full: free some\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    module = raising(ZeroDivisionError("a bug"))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "argv", ["kvlab", "doctor"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_methods_lists_params_with_ranges_and_the_paper() -> None:
    found = json.loads(shell("methods", "block_transformer", "--json").stdout)
    assert (found["axis"], found["when"], found["paper"]) == ("granularity", "train", "2406.02657")
    assert found["params"]["block_length"] == {"default": 4, "type": "integer", "range": [1, 64]}
    assert found["params"]["token_decoder"]["choices"] == ["prefix", "summation", "cross_attention"]
    assert "from 1 to 64" in shell("methods", "block_transformer").stdout
    everything = {entry["name"] for entry in json.loads(shell("methods", "--json").stdout)}
    assert {"full_attention", "block_transformer", "sliding_window"} <= everything
    shared = json.loads(shell("methods", "cross_layer", "--json").stdout)["params"]
    assert shared["layers"] == {"default": None, "type": "string or list", "optional": True}
    assert shared["layout"]["default"] == "pizza_bottom"


def test_methods_suggests_the_nearest_name() -> None:
    ended = shell("methods", "block_transfomer")
    assert ended.returncode == 2
    assert ended.stderr.startswith("unknown method 'block_transfomer': did you mean ")
    assert "Traceback" not in ended.stderr


def test_schema_is_json() -> None:
    assert json.loads(shell("schema").stdout)["$schema"].endswith("2020-12/schema")
