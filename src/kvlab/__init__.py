"""kvlab: which way of shrinking the KV cache is worth it, for your model, on your hardware?"""

__version__ = "0.1.0"


class KvlabError(Exception):
    """A mistake that a person can mend: what was wrong, where, what was found, what to do.

    Every error that kvlab raises on purpose is one of these. The command line prints it as one line
    and exits with `exit_code`; anything else is a bug and keeps its traceback.
    """

    exit_code = 2
