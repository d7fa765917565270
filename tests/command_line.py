"""Commands of `fastkd` run inside the tests' process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from fastkd.commands import app
from fastkd.commands.screen import wants_traceback


def fastkd(*arguments: object, stdin: str | None = None) -> Any:
    """Run one command; its result has exit_code, stdout, stderr."""
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments], input=stdin)


def succeeded(*arguments: object, stdin: str | None = None) -> Any:
    result = fastkd(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    """The one error message of a command that must exit with code 2, without a traceback."""
    result = fastkd(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def tracebacks_off() -> Iterator[None]:
    yield
    wants_traceback.set(False)
