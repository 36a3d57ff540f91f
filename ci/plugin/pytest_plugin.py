"""The pytest plugin: tests that run on every backend, by one fixture. See docs/testing.md.

pytest imports it in every session, whatever is tested: it imports nothing heavy until a test uses
it or an option asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from crosstrain.backends import Backend, UnknownBackend, get

from .selection import EVERYTHING, Row, Selection, from_options
from .world import RankReports, folder_of_rank, run_in_world, world_size

_SELECTION = pytest.StashKey[Selection]()

# The fixture that is parametrised. Tests that use it use this plugin, and no others do: a project
# may have a fixture `backend` or a mark `needs` of its own.
_ROW = "_crosstrain_row"

_OUR_MARKS = frozenset({"backends", "needs", "world"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the options."""
    group = parser.getgroup("crosstrain", "training on every backend (crosstrain)")
    group.addoption(
        "--backends",
        metavar="SPEC,...",
        action="append",
        default=[],
        help="the backends that tests with the fixture 'backend' run on, such as cpu,cuda:tf32 "
        "(default: $CROSSTRAIN_BACKENDS, or every one that is available here)",
    )
    group.addoption(
        "--require-backends",
        metavar="SPEC,...",
        action="append",
        nargs="?",
        const=EVERYTHING,
        default=[],
        help="these have to be available: their tests fail, and are not skipped, where they are "
        "not; without a value: all that are selected",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks and reads the options."""
    for mark in (
        "backends(spec, ...): it is about these backends (crosstrain)",
        "needs(capability, ...): it runs on backends that can do this: loss_scaling (crosstrain)",
        "world(size): it runs in so many processes, under torchrun (crosstrain)",
    ):
        config.addinivalue_line("markers", mark)
    chosen: list[str] = config.getoption("--backends") or []
    required: list[str] = config.getoption("--require-backends") or []
    try:
        config.stash[_SELECTION] = from_options(chosen, required, os.environ)
    except UnknownBackend as error:
        hint = ""
        if any("/" in text or text.endswith(".py") for text in required):
            hint = " Write --require-backends=SPEC,... with '=', or put it last: it took a path."
        raise pytest.UsageError(f"{error}{hint}") from None
    folder = folder_of_rank()
    if folder is not None:
        config.pluginmanager.register(RankReports(folder), "crosstrain-rank")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Returns the table of backends, if an option has asked for any."""
    selection = config.stash[_SELECTION]
    return _header(selection) if selection.explicit or selection.all_required else []


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Returns the table of backends, if a test has turned out to use them."""
    selection = config.stash[_SELECTION]
    asked = selection.explicit or selection.all_required
    return _header(selection) if selection.used and not asked else []


def _header(selection: Selection) -> list[str]:
    first, *rest = selection.table()
    return [f"backends: {first}", *(f"          {line}" for line in rest)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test that uses the fixtures on each backend."""
    if _ROW not in metafunc.fixturenames:
        return
    selection = metafunc.config.stash[_SELECTION]
    try:
        rows = selection.rows(
            _words(metafunc.definition, "backends"), _words(metafunc.definition, "needs")
        )
    except UnknownBackend as error:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: {error}") from None
    selection.used.update(row.spec for row in rows)
    ids = [row.spec or "no-backend" for row in rows]
    metafunc.parametrize(_ROW, rows, ids=ids, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has the fixtures of a test in several processes made in these; refuses useless marks."""
    ours = _OUR_MARKS - _marks_of_the_project(config)
    for item in items:
        names = ours & {mark.name for mark in item.iter_markers()}
        if names and _ROW not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(
                f"{item.nodeid}: the mark {sorted(names)[0]} does nothing without a fixture of "
                "crosstrain. Give the test the argument backend or backend_spec; a mark of your "
                "own with this name is registered under `markers` in pytest's configuration."
            )
        if isinstance(item, pytest.Function) and _is_started_here(item):
            item.fixturenames = [_ROW]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Starts the devices of several backends before the first test.

    torch counts the devices of a process at its first backward pass, and runs none on a device
    that starts later, as XLA's does when a test on the CPU has come before.
    """
    if not session.config.option.collectonly and "WORLD_SIZE" not in os.environ:
        session.config.stash[_SELECTION].start()


def _marks_of_the_project(config: pytest.Config) -> set[str]:
    """Returns the names of ours that the project has registered as its own."""
    lines: list[str] = config.getini("markers")
    own = [line for line in lines if not line.endswith("(crosstrain)")]
    return {line.partition(":")[0].partition("(")[0].strip() for line in own}


def _is_started_here(item: pytest.Function) -> bool:
    """Tells whether a test runs in several processes and this is none of them."""
    return folder_of_rank() is None and _ROW in item.fixturenames and world_size(item) > 1


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test with the mark `world` in as many processes."""
    if not _is_started_here(pyfuncitem):
        return None
    run_in_world(pyfuncitem, str(pyfuncitem.funcargs[_ROW]), world_size(pyfuncitem))
    return True


def _words(item: pytest.Item, mark: str) -> list[str]:
    """Returns the words of a mark, of the test and of what it is in, each once."""
    found = [word for each in item.iter_markers(mark) for word in each.args]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module", name=_ROW)
def _row(request: pytest.FixtureRequest) -> str:
    row: Row = request.param
    if row.skip:
        if row.fail:
            pytest.fail(row.skip, pytrace=False)
        pytest.skip(row.skip)
    return row.spec


@pytest.fixture(scope="module")
def backend_spec(_crosstrain_row: str) -> str:
    """The spec of the backend that the test runs on, such as `cpu:bf16`."""
    return _crosstrain_row


@pytest.fixture
def backend(_crosstrain_row: str) -> Iterator[Backend]:
    """The backend that the test runs on, opened, and closed after the test."""
    with get(_crosstrain_row) as opened:
        yield opened


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a session that lacks a required backend, even if no test has asked for it."""
    if hasattr(session.config, "workerinput"):
        return
    selection = session.config.stash[_SELECTION]
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if exitstatus in fine and _is_lacking(selection):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_lacking(selection: Selection) -> bool:
    return bool((selection.required or selection.all_required) and selection.missing())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names the required backends that are missing."""
    selection: Selection = terminalreporter.config.stash[_SELECTION]
    if _is_lacking(selection):
        terminalreporter.section("required backends that are not available", red=True)
        for text in selection.missing().values():
            terminalreporter.line(text)
