"""Names of tables and users' `package.module:object`: what is found, and what each mistake is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_vlrl.config.names import resolve_name
from megatron_vlrl.errors import ConfigError

TABLE = {"count": 1, "read": 2}


def test_a_name_of_the_table_and_a_users_object() -> None:
    assert resolve_name("read", TABLE, "data.task") == 2
    assert resolve_name("math:tau", TABLE, "data.task") == math.tau


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("coumt", ["data.task", "'coumt'", "did you mean 'count'", "package.module:object"]),
        ("", ["unknown ''", "count, package.module:object, read"]),
        ("no_such_package.rewards:score", ["no module 'no_such_package.rewards'", "PYTHONPATH"]),
        ("math:tan_", ["in module math", "did you mean 'tan'"]),
        (".math:tan", ["unknown '.math:tan'"]),
        ("math:", ["unknown 'math:'"]),
    ],
)
def test_mistakes_are_named(name: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_name(name, TABLE, "data.task")
    for part in parts:
        assert part in str(caught.value)


def test_an_import_that_fails_inside_the_users_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_rewards.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve_name("user_rewards:score", TABLE, "data.task")
