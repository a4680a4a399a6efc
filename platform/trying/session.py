"""A try as a person meets it: what is said before, the table while it runs, and the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvlab import KvlabError
from kvlab.db.states import WorkflowState
from kvlab.platform.cli import before
from kvlab.platform.compare.place import default_place
from kvlab.platform.home import Home, unwritable
from kvlab.platform.spec.read import load_graph
from kvlab.platform.trying import forecast, words
from kvlab.platform.trying.flow import Answer, Try
from kvlab.platform.trying.points import itemsize_of
from kvlab.platform.trying.question import Made
from kvlab.platform.trying.run import Runner
from kvlab.platform.trying.table import draw
from kvlab.platform.trying.view import Screen

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "try"


class Session:
    """Answers one question.

    Args:
        cpus: CPUs that jobs may have; None: all. quiet: print nothing while it runs.
    """

    def __init__(
        self, made: Made, home: Home, console: Console, cpus: int | None, quiet: bool
    ) -> None:
        self._made, self._home, self._console = made, home, console
        self._cpus, self._quiet = cpus, quiet
        self._folder = home.root / FOLDER / made.name
        self.file = self._folder / "workflow.yaml"

    def answer(self, mlflow: bool) -> Answer:
        """Run it.

        Raises:
            KvlabError: it cannot be run, or is being run.
        """
        made = self._made
        self._say(words.about(made.subject, made.asked, self._weights()))
        self._say(words.prompts(made.subject, made.asked))
        data = made.data(self._place)
        one = Try(
            made.subject, made.asked, data, made.candidates, made.memory, made.cpus(self._cpus)
        )
        expected = one.forecast()
        graph = load_graph(
            expected.text(made.cpus(self._cpus)), home=self._home.root, cpus=self._cpus
        )
        seconds = forecast.seconds(graph, self._home, self._cpus)
        composed = len(expected.quality) - len(one.singles) - 1
        self._say(words.expected(seconds, len(one.singles), composed, len(expected.speed)))
        before.look(self._home, graph, self._cpus)
        screen = Screen(
            self._home, self._console, one.sheet, total=len(graph.cells), quiet=self._quiet
        )
        with Runner(self._home, screen.watch, self._cpus, mlflow) as runner:
            return one.run(runner, self._write)

    def show(self, answer: Answer, html: Path | None, yaml: Path | None) -> Path | None:
        """Print the answer, write the report and the YAML; return where the report lies."""
        report = self._report(answer, html)
        if yaml is not None:
            _write(yaml, answer.text)
        self._console.print(draw(answer.sheet))
        for line in (*words.verdicts(answer.sheet), "", *words.footnotes(answer.sheet)):
            self._say(line)
        self._say("")
        if answer.state is not WorkflowState.DONE:
            self._say("not finished: the same command goes on with what is missing")
        if answer.mirror is not None:
            self._say(answer.mirror)
        cpus = "" if self._cpus is None else f" --cpus {self._cpus}"
        self._say(f"again, or more: kvlab run {yaml or self.file}{cpus}")
        self._say(f"in detail: kvlab compare {answer.workflow}")
        if report is not None:
            self._say(f"report: {report}")
        return report

    def as_json(self, answer: Answer, html: Path | None, yaml: Path | None) -> str:
        """Write the files and return the answer as JSON."""
        report = self._report(answer, html) if html is not None else None
        if yaml is not None:
            _write(yaml, answer.text)
        found = {
            "name": self._made.name,
            "workflow": answer.workflow,
            "state": answer.state,
            "yaml": str(yaml or self.file),
            "report": None if report is None else str(report),
            **answer.sheet.to_json(),
        }
        return json.dumps(found, allow_nan=False)

    def _report(self, answer: Answer, html: Path | None) -> Path | None:
        from kvlab.platform.trying.report import render

        place = html or default_place(self._made.name, answer.workflow)
        if place is not None:
            _write(place, render(answer.sheet, self._made.name, answer.text, answer.workflow))
        return place

    def _weights(self) -> int:
        return self._made.subject.weight_bytes(itemsize_of(self._made.asked.device))

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _place(self) -> Path:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._home.root, error) from error
        return self._folder

    def _write(self, text: str) -> None:
        self._place()
        _write(self.file, text)


def _write(file: Path, text: str) -> None:
    """Replace a file whole.

    Raises:
        KvlabError: it cannot be written.
    """
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise KvlabError(f"{file} cannot be written ({error.strerror})") from error
