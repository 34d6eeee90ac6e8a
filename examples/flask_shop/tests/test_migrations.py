"""pytest-alembic's own tests, with sagalog's step among the shop's revisions."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from pytest_alembic.tests import (
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)
from sqlalchemy import Engine, inspect

__all__ = [
    "test_model_definitions_match_ddl",
    "test_single_head_revision",
    "test_up_down_consistency",
    "test_upgrade",
]


def test_downgrade_to_base_leaves_nothing_of_either(alembic_engine: Engine, alembic_config: Config) -> None:
    alembic_config.attributes["connection"] = alembic_engine
    command.upgrade(alembic_config, "head")
    assert {"shop_order", "saga", "saga_step"} < set(inspect(alembic_engine).get_table_names())
    command.check(alembic_config)
    command.downgrade(alembic_config, "base")
    assert inspect(alembic_engine).get_table_names() == ["alembic_version"]
