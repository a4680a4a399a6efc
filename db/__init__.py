"""The SQL store: the truth about workflows, jobs, attempts and metrics.

Nothing here imports sqlalchemy before `kvlab.db.store` is imported.
"""
