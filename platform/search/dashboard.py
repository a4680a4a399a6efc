"""Studies as Optuna knows them: a mirror of what is stored, for its own dashboard to show."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.rows import JobRow
from kvlab.db.store import Store
from kvlab.platform.search.described import space_of
from kvlab.platform.search.rows import TRIAL
from kvlab.platform.search.space import Space
from kvlab.platform.tracking.ui import HOST

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

EVERY_SECONDS = 5.0


class Mirror:
    """Optuna studies in memory, one for each of a store's; it only ever follows the store."""

    def __init__(self, store: Store) -> None:
        from optuna.storages import InMemoryStorage

        self._store = store
        self.storage: BaseStorage = InMemoryStorage()
        self._studies: dict[int, tuple[Study, Space]] = {}
        self._seen: dict[int, int] = {}

    def refresh(self) -> int:
        """Add the trials that ended since the last time; return how many studies there are."""
        for row in self._store.workflows():
            for event in self._store.events(row.id, self._seen.get(row.id, 0)):
                self._seen[row.id] = event.id
                if event.kind == TRIAL and event.job_id is not None:
                    self._take(row.id, event.job_id, event.data)
        return len(self._studies)

    def _take(self, workflow: int, job: int, data: Mapping[str, Any]) -> None:
        from optuna.trial import TrialState, create_trial

        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        if job not in self._studies:
            row = next(one for one in self._store.load(workflow).jobs if one.id == job)
            self._studies[job] = self._opened(workflow, row)
        study, space = self._studies[job]
        if data["state"] not in states or data.get("same_as") is not None or "values" not in data:
            return
        params, distributions = space.encode(dict(data["values"]))
        complete = data["state"] == "complete"
        study.add_trial(
            create_trial(
                state=states[data["state"]],
                values=list(data["objectives"].values()) if complete else None,
                params=params,
                distributions=distributions,
                user_attrs={"trial": data["number"], **data["constraints"]},
            )
        )

    def _opened(self, workflow: int, row: JobRow) -> tuple[Study, Space]:
        from optuna import create_study, logging

        logging.set_verbosity(logging.WARNING)
        study = create_study(
            storage=self.storage,
            study_name=f"{row.name} (workflow {workflow})",
            directions=list(row.spec["objectives"].values()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # called experimental since 2023
            study.set_metric_names(list(row.spec["objectives"]))
        return study, Space(space_of(row.spec))


def serve(store: Store, port: int, say: Callable[[str], None]) -> None:
    """Run optuna-dashboard until it is interrupted; `say` gets its address.

    It listens on the loopback interface only, and shows new trials as they end.

    Raises:
        KvlabError: there is no study yet, or the port is taken.
    """
    from optuna_dashboard import run_server

    mirror = Mirror(store)
    if not mirror.refresh():
        raise KvlabError("there is no study yet: a `search` job makes one (docs/search.md)")
    closed = threading.Event()
    follower = threading.Thread(target=_follow, args=(mirror, closed), daemon=True)
    follower.start()
    try:
        say(f"optuna-dashboard is at http://{HOST}:{port} (Ctrl-C ends it)")
        run_server(mirror.storage, host=HOST, port=port)
    except OSError as error:
        raise KvlabError(f"port {port} cannot be used ({error.strerror})") from error
    except KeyboardInterrupt:
        pass
    finally:
        closed.set()
        follower.join()


def _follow(mirror: Mirror, closed: threading.Event) -> None:
    while not closed.wait(EVERY_SECONDS):
        mirror.refresh()
