"""Metric points in SQL: one per job, key and step; a newer attempt's replaces an older one's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, select

from kvlab.db.rows import Point
from kvlab.db.tables import METRICS
from kvlab.db.text import clean

_M = METRICS.c

# Written out: the statements are sent as they stand, a thousand rows at a time.
_SQLITE = """
INSERT INTO metrics (job_id, attempt, key, step, value, time_ms) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (job_id, key, step) DO UPDATE
SET attempt = excluded.attempt, value = excluded.value, time_ms = excluded.time_ms
WHERE excluded.attempt >= metrics.attempt
"""
# One statement and four arrays: no round trip or plan per row.
_POSTGRES = """
INSERT INTO metrics (job_id, attempt, key, step, value, time_ms)
SELECT %(job)s, %(attempt)s, point.* FROM unnest(
    %(keys)s::text[], %(steps)s::bigint[], %(values)s::double precision[], %(times)s::bigint[]
) AS point
ON CONFLICT (job_id, key, step) DO UPDATE
SET attempt = excluded.attempt, value = excluded.value, time_ms = excluded.time_ms
WHERE excluded.attempt >= metrics.attempt
"""


def write(
    connection: Connection,
    job_id: int,
    attempt: int,
    rows: Iterable[tuple[str, int, float, int]],
) -> int:
    """Upsert rows (key, step, value, time in ms) and return how many points they are.

    Of several rows of one key and step the last counts.
    """
    newest = {(clean(key), step): (value, time) for key, step, value, time in rows}
    if not newest:
        return 0
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(
            _SQLITE,
            [
                (job_id, attempt, key, step, _stored(value), time)
                for (key, step), (value, time) in newest.items()
            ],
        )
    else:
        connection.exec_driver_sql(
            _POSTGRES,
            {
                "job": job_id,
                "attempt": attempt,
                "keys": [key for key, _ in newest],
                "steps": [step for _, step in newest],
                "values": [_stored(value) for value, _ in newest.values()],
                "times": [time for _, time in newest.values()],
            },
        )
    return len(newest)


def drop_after(connection: Connection, job_id: int, attempt: int, after_step: int | None) -> None:
    """Delete what attempts before `attempt` wrote after `after_step` (None: all they wrote)."""
    old = delete(METRICS).where(_M.job_id == job_id, _M.attempt < attempt)
    connection.execute(old if after_step is None else old.where(_M.step > after_step))


def read(
    connection: Connection,
    job_id: int,
    keys: Sequence[str] | None,
    after_step: int | None,
    up_to_step: int | None,
) -> list[Point]:
    """Points of a job by key and step."""
    wanted = select(_M.key, _M.step, _M.value, _M.time_ms, _M.attempt).where(_M.job_id == job_id)
    if keys is not None:
        wanted = wanted.where(_M.key.in_(keys))
    if after_step is not None:
        wanted = wanted.where(_M.step > after_step)
    if up_to_step is not None:
        wanted = wanted.where(_M.step <= up_to_step)
    return [
        Point(key, step, math.nan if value is None else value, time_ms, attempt)
        for key, step, value, time_ms, attempt in connection.execute(
            wanted.order_by(_M.key, _M.step)
        )
    ]


def _stored(value: float) -> float | None:
    value = float(value)
    return None if math.isnan(value) else value
