"""Migrations of the store, run by `kvlab db upgrade` and, for a fresh SQLite file, on first use."""

REVISIONS: tuple[str, ...] = ("0001",)
"""Every revision, oldest first; the last is what this kvlab needs."""

VERSION_TABLE = "kvlab_version"
