"""The version that the server expects is the newest migration."""

from __future__ import annotations

from alembic.config import Config
from alembic.script import ScriptDirectory
from forebay_server.storage.database import HEAD, MIGRATIONS


def test_the_head_that_skips_migrations_is_the_newest_one() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD
