"""The pytest plugin where tests run in several processes: the mark `world`, and pytest-xdist."""

from __future__ import annotations

import sys

import pytest
from plugin_project import USES, outcomes, project, run  # noqa: F401 (a fixture)

# Imported before pytester takes note of what is: torch cannot be imported twice.
import crosstrain.engine  # noqa: F401

pytest_plugins = ("pytester",)
pytestmark = pytest.mark.usefixtures("project", "forked_programs")


@pytest.mark.slow
def test_a_world_runs_the_test_in_each_process(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os

        import pytest
        import torch

        pytestmark = [pytest.mark.world(2), pytest.mark.backends("cpu", "absent")]

        @pytest.fixture
        def rank():
            # In the process that starts the world this would be a KeyError.
            return int(os.environ["RANK"])

        def test_together(backend, rank):
            assert backend.world.size == 2
            assert backend.world.rank == rank
            total = torch.tensor([rank + 1.0])
            torch.distributed.all_reduce(total)
            assert total.item() == 3

        def test_apart(backend, rank):
            print("said by", rank)
            assert rank == 0, "rank one differs"

        def test_without(backend, rank): pytest.skip("not today")
        """
    )
    result = run(pytester)
    assert {name: found for name, found in outcomes(result).items() if "[cpu]" in name} == {
        "test_together[cpu]": "PASSED",
        "test_apart[cpu]": "FAILED",
        "test_without[cpu]": "SKIPPED",
    }
    result.assert_outcomes(passed=1, failed=1, skipped=4)
    text = result.stdout.str()
    assert "Rank 1 of 2:" in text
    assert "rank one differs" in text
    assert "said by 1" in text
    assert "Rank 0 of 2" not in text
    assert "Skipped by 2 of 2 ranks: not today" in text


def test_its_tests_may_be_spread_over_processes(pytester: pytest.Pytester) -> None:
    """With pytest-xdist, whose first process collects nothing, and whose workers end no session."""
    pytester.makepyfile(
        test_one=USES,
        test_other="""
        import pytest

        @pytest.mark.world(2)
        @pytest.mark.backends("cpu")
        def test_together(backend): assert backend.world.size == 2
        """,
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n"]
    result = pytester.run(*command, "2", "--backends=cpu,cpu:bf16")
    result.assert_outcomes(passed=3)
    assert result.ret == 0
    command.append("1")
    lacking = pytester.run(*command, "--backends=cpu", "--require-backends=absent", "test_one.py")
    lacking.assert_outcomes(passed=1, errors=1)
    lacking.stdout.fnmatch_lines(["*Nobody has such a device. Remedy: Invent one.*"])
    unused = pytester.run(*command, "--require-backends=absent", "-k", "nothing")
    assert unused.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_a_rank_that_dies_fails_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os

        import pytest

        @pytest.mark.world(2)
        @pytest.mark.backends("cpu")
        def test_it(backend):
            if backend.world.rank == 1:
                os._exit(3)
        """
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Ranks *1 of 2 did not come to an end; *exit code 1:*"])


@pytest.mark.parametrize("mark", ["world()", "world(0)", "world('two')", "world(2, 3)"])
def test_a_world_without_a_size_is_a_usage_error(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.{mark}
        def test_it(backend): pass
        """
    )
    result = run(pytester, "--backends=cpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "takes the number of processes" in result.stdout.str() + result.stderr.str()
