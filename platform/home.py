"""KVLAB_HOME: where everything that kvlab keeps lies."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from errno import ENOTDIR
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from kvlab import KvlabError

LONGEST_NAME = 150
"""Characters of a cell's name that are kept in the name of its log."""

_FOLDERS = ("artifacts", "checkpoints", "spool", "work", "logs")


@dataclass(frozen=True, slots=True)
class Home:
    """The folder, and the URL of the database that belongs to it.

    Layout: kvlab.db, mlflow.db, artifacts/<identity>/, spool/<job id>-<attempt>.jsonl,
    checkpoints/<identity>/<job id>/<attempt>-<step>/, work/<job id>-<attempt>/,
    logs/<workflow id>/.
    """

    root: Path
    url: str

    @classmethod
    def find(
        cls, root: str | Path | None = None, url: str | None = None, *, checked: bool = True
    ) -> Home:
        """Return the home at `root`, else $KVLAB_HOME, else .kvlab here. Creates nothing.

        The database is `url`, else $KVLAB_DATABASE, else kvlab.db in the folder.

        Raises:
            KvlabError: it is no folder and cannot become one, unless not `checked`.
        """
        folder = Path(root or os.environ.get("KVLAB_HOME") or ".kvlab").expanduser().absolute()
        there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if checked and not os.path.isdir(there):
            raise unwritable(folder, NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR)))
        own = f"sqlite:///{quote(str(folder), safe='/ ')}/kvlab.db"
        return cls(folder, url or os.environ.get("KVLAB_DATABASE") or own)

    @property
    def tracking_uri(self) -> str:
        """Where MLflow keeps its mirror: $MLFLOW_TRACKING_URI, else mlflow.db in the folder."""
        # Only what SQLAlchemy would misread: MLflow makes the folder of the text as it stands.
        folder = str(self.root).replace("%", "%25").replace("?", "%3F")
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"

    def create(self) -> None:
        """Make the folders. Raises KvlabError when the place cannot be written."""
        try:
            for name in _FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            try_write(self.root)
        except OSError as error:
            raise unwritable(self.root, error) from error

    def artifact(self, identity: str) -> Path:
        return self.root.joinpath("artifacts", identity)

    def checkpoints(self, identity: str, job_id: int) -> Path:
        """Checkpoints are a job's own: another workflow's would come without their points."""
        return self.root.joinpath("checkpoints", identity, str(job_id))

    def spool(self, job_id: int, attempt: int) -> Path:
        return self.root.joinpath("spool", f"{job_id}-{attempt}.jsonl")

    def work(self, job_id: int, attempt: int) -> Path:
        return self.root.joinpath("work", f"{job_id}-{attempt}")

    def logs(self, workflow_id: int) -> Path:
        return self.root.joinpath("logs", str(workflow_id))

    def log(self, workflow_id: int, cell: str, attempt: int, rank: int = 0) -> Path:
        """The log of one attempt; `cell` may hold anything, the file name does not.

        A digest keeps names apart that differ in what was replaced or cut off.
        """
        safe = re.sub(r"[^\w.,=\[\]-]", "_", cell)[:LONGEST_NAME]
        if safe != cell:
            safe += f"~{sha256(cell.encode('utf-8', 'replace')).hexdigest()[:8]}"
        suffix = f".rank{rank}" if rank else ""
        return self.logs(workflow_id) / f"{safe}-{attempt}{suffix}.log"


def try_write(folder: Path) -> None:
    """Write a file that is gone at once: what permissions say is not all there is to it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"kvlab")


def unwritable(root: Path, error: OSError) -> KvlabError:
    """What a person is told when KVLAB_HOME cannot be written."""
    return KvlabError(
        f"KVLAB_HOME {root} cannot be written ({error.strerror}): "
        "set KVLAB_HOME to a folder of yours"
    )
