"""Commands that the pages show exist."""

from __future__ import annotations

import re
from pathlib import Path

from kvlab.platform.cli.main import COMMANDS
from kvlab.platform.spec.read import check


def shown_commands(page: str) -> list[list[str]]:
    """Words of every line in ```sh fences that starts with kvlab or make (a `$ ` prompt aside)."""
    fences = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for fence in fences for line in fence.splitlines()]
    words = [line.removeprefix(".venv/bin/").split() for line in lines if line]
    return [line for line in words if line[0] in {"kvlab", "make"}]


def test_shown_commands_exist(repository: Path) -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE)
    )
    pages = [repository / "README.md", *(repository / "docs").rglob("*.md")]
    unknown = [
        f"{page.relative_to(repository)}: {' '.join(words)}"
        for page in pages
        for words in shown_commands(page.read_text())
        if words[1:] and words[1] not in ({"--help", *COMMANDS} if words[0] == "kvlab" else targets)
    ]
    assert not unknown


def test_shown_workflows_are_valid(repository: Path) -> None:
    pages = [repository / "README.md", *(repository / "docs").rglob("*.md")]
    shown = [
        text
        for page in pages
        for text in re.findall(r"^```yaml\n(version: 1\n.*?)^```", page.read_text(), re.M | re.S)
    ]
    assert shown
    for text in shown:
        check(text)
