"""What each part drags in when it is imported: GPU machines have little but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import importlib, json, sys

class Absent:
    names = set(json.loads(sys.argv[1]))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked in this test", name=name)

sys.meta_path.insert(0, Absent())
failed = {}
for module in json.loads(sys.argv[2]):
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps(failed))
"""

HELP = """
import json, sys
from kvlab.platform.cli.main import main
sys.argv = ["kvlab", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules(files: list[Path]) -> list[str]:
    """Import names of files of the storeys."""
    names = [".".join(("kvlab", *file.with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def import_without(blocked: list[str], names: list[str]) -> dict[str, str]:
    """Import `names` in a fresh interpreter where `blocked` cannot be; return what failed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, json.dumps(blocked), json.dumps(names)],
        check=True,
        capture_output=True,
        text=True,
    )
    failed: dict[str, str] = json.loads(done.stdout)
    return failed


def test_what_validate_and_plan_need_of_methods_is_pure_python(storey_files: list[Path]) -> None:
    light = {"params.py", "cost.py", "config.py", "axis.py", "catalog.py"}
    named = [f for f in storey_files if f.parts[0] == "methods" and f.name in light]
    assert {f.name for f in named} == light
    blocked = ["torch", "numpy", "pydantic", "ray", "transformers", "safetensors"]
    assert not import_without(blocked, ["kvlab.methods", *modules(named)])


def test_methods_and_kernels_import_with_torch_alone(storey_files: list[Path]) -> None:
    files = [f for f in storey_files if f.parts[0] in {"methods", "kernels"}]
    blocked = ["ray", "mlflow", "optuna", "vllm", "sqlalchemy", "alembic", "pydantic", "yaml"]
    blocked += ["transformers", "safetensors", "tokenizers", "peft", "huggingface_hub"]
    assert not import_without(blocked, modules(files))


def test_the_store_imports_without_what_it_may_not_use(storey_files: list[Path]) -> None:
    # A migration and its environment run inside alembic alone.
    files = [f for f in storey_files if f.parts[0] == "db" and "migrations" not in f.parts]
    blocked = ["torch", "ray", "mlflow", "pydantic", "transformers", "yaml", "typer"]
    assert not import_without(blocked, modules(files))


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert "validate" in done.stdout
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    heavy = {"torch", "ray", "mlflow", "pydantic", "sqlalchemy", "transformers", "plotly", "numpy"}
    assert not loaded & heavy
