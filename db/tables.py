"""The six tables. docs/store.md explains them on one page.

On PostgreSQL they live in the schema `kvlab` (see engine.py), on SQLite in a file of their own.
JSON is kept as text: results may hold NaN and Infinity, which PostgreSQL's json type refuses.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

WORKFLOWS = Table(
    "workflows",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, index=True),
    Column("state", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),
    # The lease: who may change this workflow, until when, and the fencing number.
    Column("owner", Text),
    Column("expires_at", Double),
    Column("token", Integer, nullable=False),
    Column("request", Text),
    Column("report", Text, nullable=False),
    Column("text", Text, nullable=False),
)

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("workflow_id", ForeignKey("workflows.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("job", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("cause", Text),
    Column("message", Text),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("reused_from", ForeignKey("jobs.id")),
    # Whether later jobs of this identity may take its result.
    Column("reusable", Boolean, nullable=False),
    Column("mirrored_step", BigInteger),
    Column("mirrored_state", Text),
    Column("identity", Text, nullable=False),
    Column("axes", Text, nullable=False),
    Column("parents", Text, nullable=False),
    Column("needs", Text, nullable=False),
    Column("parts", Text, nullable=False),
    Column("resources", Text, nullable=False),
    Column("retries", Text, nullable=False),
    Column("timeout", Double),
    Column("spec", Text, nullable=False),
    Column("result", Text),
    UniqueConstraint("workflow_id", "name"),
    Index("ix_jobs_identity_state", "identity", "state"),
)

ATTEMPTS = Table(
    "attempts",
    METADATA,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("worker", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("cause", Text),
    Column("message", Text),
    Column("lost_seconds", Double, nullable=False),
    Column("from_step", BigInteger),
    sqlite_with_rowid=False,
)

METRICS = Table(
    "metrics",
    METADATA,
    # The primary key is the rule "one point per job, key and step".
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("value", Double),  # NULL is NaN: SQLite cannot store NaN
    Column("time_ms", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

ARTIFACTS = Table(
    "artifacts",
    METADATA,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("role", Text, primary_key=True),  # "checkpoint" or "result"
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger),
    Column("uri", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    sqlite_with_rowid=False,
)

EVENTS = Table(
    "events",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("workflow_id", ForeignKey("workflows.id"), nullable=False, index=True),
    Column("job_id", ForeignKey("jobs.id")),
    Column("attempt", Integer),
    Column("kind", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("at", Double, nullable=False),
)
