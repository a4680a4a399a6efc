"""The SQL store: the truth about workflows, jobs, attempts and metrics. sqlalchemy and alembic alone."""
