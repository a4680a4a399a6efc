"""Run by alembic. The connection is handed over by kvlab.db.versions, inside its transaction."""

from __future__ import annotations

from alembic import context

from kvlab.db.migrations import VERSION_TABLE
from kvlab.db.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    version_table_schema=context.config.attributes["schema"],
)
with context.begin_transaction():
    context.run_migrations()
