"""kvlab: which way of shrinking the KV cache is worth it, for your model, on your hardware?"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


class KvlabError(Exception):
    """A mistake that a person can mend: what was wrong, where, what was found, what to do.

    Every error that kvlab raises on purpose is one of these. The command line prints it as one line
    and exits with `exit_code`; anything else is a bug and keeps its traceback.
    """

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from one process to another whatever arguments a subclass is made of."""
        return _arrived, (type(self), self.args, self.__dict__)


def _arrived(kind: type[KvlabError], args: tuple[Any, ...], state: dict[str, Any]) -> KvlabError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
