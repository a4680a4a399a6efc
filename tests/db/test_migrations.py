"""Migrations: they make the tables that the code expects, beside anybody else's."""

from __future__ import annotations

import threading

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from kvlab.db import migrations, versions
from kvlab.db.engine import SCHEMA, connect
from kvlab.db.errors import StoreError
from kvlab.db.store import Store
from kvlab.db.tables import METADATA
from kvlab.db.url import parse


def test_every_revision_is_listed_in_order() -> None:
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0])
    scripts = ScriptDirectory.from_config(config)
    found = [script.revision for script in scripts.walk_revisions()]
    assert tuple(reversed(found)) == migrations.REVISIONS


def test_migrating_from_empty_makes_the_tables_of_the_code(store_url: str) -> None:
    engine = connect(parse(store_url))
    schema = SCHEMA if engine.dialect.name == "postgresql" else None
    with engine.begin() as connection:
        # The search path makes `kvlab` the default schema, which alembic calls None.
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": migrations.VERSION_TABLE}
        )
        differences = compare_metadata(context, METADATA)
        names = inspect(connection).get_table_names(schema=schema)
    engine.dispose()
    assert differences == []
    assert sorted(names) == [
        "artifacts", "attempts", "events", "jobs", "kvlab_version", "metrics", "workflows",
    ]  # fmt: skip


def test_going_down_leaves_no_table(store_url: str) -> None:
    engine = connect(parse(store_url))
    schema = SCHEMA if engine.dialect.name == "postgresql" else None
    config = Config()
    config.set_main_option("script_location", migrations.__path__[0])
    with engine.begin() as connection:
        config.attributes.update(connection=connection, schema=schema)
        command.downgrade(config, "base")
    with engine.begin() as connection:
        assert inspect(connection).get_table_names(schema=schema) == [migrations.VERSION_TABLE]
    engine.dispose()
    assert versions.upgrade(store_url) == (None, versions.HEAD)


def test_upgrading_twice_changes_nothing(empty_url: str) -> None:
    assert versions.version_of(empty_url) is None
    assert versions.upgrade(empty_url) == (None, versions.HEAD)
    assert versions.upgrade(empty_url) == (versions.HEAD, versions.HEAD)
    assert versions.version_of(empty_url) == versions.HEAD


def test_of_two_upgrades_at_once_one_does_it(empty_url: str) -> None:
    found: list[tuple[str | None, str]] = []
    gate = threading.Barrier(2)

    def run() -> None:
        gate.wait()
        found.append(versions.upgrade(empty_url))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found, key=str) == [(versions.HEAD, versions.HEAD), (None, versions.HEAD)]


@pytest.mark.postgres
def test_kvlab_lives_beside_mlflows_tables_in_one_database(postgres_url: str) -> None:
    engine = connect(parse(postgres_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE public.metrics (run text)"))
        connection.execute(text("CREATE TABLE public.alembic_version (version_num text)"))
        connection.execute(text("INSERT INTO public.alembic_version VALUES ('theirs')"))
    versions.upgrade(postgres_url)
    with Store.open(postgres_url) as store:
        assert store.create_workflow("w", "", {}, [], 0.0) == 1
    with engine.begin() as connection:
        theirs = connection.execute(text("SELECT version_num FROM public.alembic_version"))
        assert theirs.scalar() == "theirs"
        assert connection.execute(text("SELECT count(*) FROM public.metrics")).scalar() == 0
    engine.dispose()


@pytest.mark.postgres
def test_a_schema_of_that_name_with_other_tables_is_refused(postgres_url: str) -> None:
    engine = connect(parse(postgres_url))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
        connection.execute(text(f"CREATE TABLE {SCHEMA}.theirs (run text)"))
    engine.dispose()
    with pytest.raises(StoreError, match=r"not kvlab's \(theirs\)"):
        versions.upgrade(postgres_url)


@pytest.mark.postgres
def test_a_user_without_rights_is_told_what_to_grant(postgres_url: str) -> None:
    versions.upgrade(postgres_url)
    engine = connect(parse(postgres_url))
    with engine.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS guest"))
        connection.execute(text("CREATE ROLE guest LOGIN"))
    engine.dispose()
    guest = parse(postgres_url).set(username="guest").render_as_string(hide_password=False)
    with pytest.raises(StoreError, match="grant the user") as caught:
        versions.upgrade(guest)
    assert "\n" not in str(caught.value)
