"""The pytest plugin, as a project that has installed crosstrain meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Imported before pytester takes note of what is: torch cannot be imported twice.
import crosstrain.engine  # noqa: F401
from crosstrain.backends import names, probe
from crosstrain.ci.matrix_selection import available_specs

pytest_plugins = ("pytester",)

# A package of somebody else's, whose backend is nowhere available.
ABSENT = """
from crosstrain.backends import Availability
from crosstrain.backends.torch_backend import TorchBackend

class AbsentBackend(TorchBackend):
    options = ("fp32", "tiny")
    name = "absent"

    @classmethod
    def probe(cls, option=None):
        return Availability(False, "Nobody has such a device.", "Invent one.")
"""

USES = """
def test_uses(backend, backend_spec):
    assert f"{backend.name}:{backend.option}" in (backend_spec, f"{backend_spec}:fp32")
"""

WRITTEN_OUT = """
import pytest

@pytest.mark.backends("cpu")
def test_plain(backend): pass

@pytest.mark.backends("cpu:fp32", "cpu:bf16")
def test_written_out(backend): pass
"""


@pytest.fixture(autouse=True)
def _project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSTRAIN_BACKENDS", raising=False)
    pytester.makepyfile(absent_backend=ABSENT)
    info = pytester.mkdir("absent-1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: absent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[crosstrain.backends]\nabsent = absent_backend:AbsentBackend\n"
    )
    pytester.syspathinsert()
    # For the processes that torchrun starts.
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-ra", "-v", *arguments)


def outcomes(result: pytest.RunResult) -> dict[str, str]:
    """What became of each test, by its name."""
    found: dict[str, str] = {}
    for line in result.outlines:
        name, _, rest = line.partition(" ")
        if "::" in name and rest.split()[:1]:
            found[name.partition("::")[2]] = rest.split()[0]
    return found


# What a test runs on


def test_each_selected_backend_has_a_row_with_its_spec(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(USES)
    result = run(pytester, "--backends", "cpu,cpu:bf16")
    assert outcomes(result) == {"test_uses[cpu]": "PASSED", "test_uses[cpu:bf16]": "PASSED"}


def test_a_default_option_that_is_written_out_is_the_plain_name(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(USES + WRITTEN_OUT)
    result = run(pytester, "--backends=cpu:fp32,cpu", "--require-backends=cpu:fp32")
    assert set(outcomes(result).values()) == {"PASSED"}
    assert set(outcomes(result)) == {"test_uses[cpu]", "test_plain[cpu]", "test_written_out[cpu]"}


def test_by_default_those_that_are_available(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(USES)
    result = run(pytester)
    assert outcomes(result) == {f"test_uses[{spec}]": "PASSED" for spec in available_specs()}
    result.stdout.fnmatch_lines(["backends: cpu *torch*", "*absent *not here: Nobody has such*"])
    for name in names():
        if name not in ("auto", "null") and not probe(name).ok:
            result.stdout.fnmatch_lines([f"*{name} *not here: *"])


def test_the_variable_names_them_and_the_option_wins(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(USES)
    monkeypatch.setenv("CROSSTRAIN_BACKENDS", "cpu:bf16, cpu:fp16")
    assert set(outcomes(run(pytester))) == {"test_uses[cpu:bf16]", "test_uses[cpu:fp16]"}
    assert set(outcomes(run(pytester, "--backends=cpu"))) == {"test_uses[cpu]"}


def test_a_backend_is_open_in_the_test_and_closed_after(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        calls = []

        def test_first(backend):
            assert backend.calls == ["open"]
            calls.append(backend.calls)

        def test_second(): assert calls == [["open", "close"]]
        """
    )
    assert set(outcomes(run(pytester, "--backends=null")).values()) == {"PASSED"}


def test_fixtures_of_a_module_may_use_the_spec(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        made = []

        @pytest.fixture(scope="module")
        def trained(backend_spec):
            made.append(backend_spec)
            return backend_spec

        def test_a(trained, backend): assert trained.startswith(backend.name)
        def test_b(trained, backend): assert len(made) == len(set(made))
        """
    )
    run(pytester, "--backends=cpu,cpu:bf16").assert_outcomes(passed=4)


# Unavailable


def test_an_unavailable_backend_skips_with_its_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(USES)
    result = run(pytester, "--backends=cpu,absent:tiny")
    assert outcomes(result) == {"test_uses[cpu]": "PASSED", "test_uses[absent:tiny]": "SKIPPED"}
    result.stdout.fnmatch_lines(
        ["SKIPPED*Backend 'absent:tiny' is not available: Nobody has such a device."]
    )
    assert result.ret == 0


@pytest.mark.parametrize(
    "arguments",
    [("--backends=absent", "--require-backends"), ("--require-backends", "absent")],
)
def test_a_required_one_fails_with_reason_and_remedy(
    pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    pytester.makepyfile(USES)
    result = run(pytester, *arguments)
    assert outcomes(result)["test_uses[absent]"] == "ERROR"
    result.stdout.fnmatch_lines(
        [
            "*absent *REQUIRED, not here: Nobody has such a device.*",
            "It is required. Backend 'absent' is not available: Nobody has *Remedy: Invent one.",
        ]
    )
    assert result.ret == 1


def test_a_required_one_fails_the_session_though_no_test_uses_it(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("def test_plain(): pass")
    assert run(pytester, "--require-backends=cpu").ret == 0
    result = run(pytester, "--require-backends=absent")
    assert result.ret == 1
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*required backends that are not available*", "Backend 'absent' is not*Invent one."]
    )


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backends=cpu:bf17",), "Did you mean 'cpu:bf16'?"),
        (("--backends=gpu",), "Did you mean 'cuda'?"),
        (("--backends=cpu,,cuda",), "--backends has an empty entry"),
        (("--require-backends=cudda",), "Did you mean 'cuda'?"),
        (("--require-backends", "tests/test_it.py"), "it took a path"),
    ],
)
def test_a_wrong_spec_is_a_usage_error(
    pytester: pytest.Pytester, arguments: tuple[str, ...], words: str
) -> None:
    pytester.makepyfile(USES)
    result = run(pytester, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in result.stderr.str()


def test_a_wrong_spec_in_a_mark_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.backends("cqu")
        def test_it(backend): pass
        """
    )
    result = run(pytester)
    assert result.ret != 0
    assert "There is no backend 'cqu' (of spec 'cqu'). Did you mean 'cpu'?" in result.stdout.str()


# Marks

MARKED = """
import pytest

@pytest.mark.needs("loss_scaling")
def test_scaling(backend): assert "loss_scaling" in backend.capabilities

@pytest.mark.backends("cpu", "absent")
def test_fixed(backend): pass
"""


def test_a_test_runs_on_what_has_what_it_needs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MARKED)
    result = run(pytester, "--backends=cpu,cpu:fp16,absent", "-k", "scaling")
    assert outcomes(result) == {
        "test_scaling[cpu:fp16]": "PASSED",
        "test_scaling[absent]": "SKIPPED",
    }
    result = run(pytester, "--backends=cpu,cpu:bf16", "-k", "scaling")
    assert outcomes(result) == {"test_scaling[no-backend]": "SKIPPED"}
    result.stdout.fnmatch_lines(["SKIPPED*It needs loss_scaling, which cpu, cpu:bf16 lack."])


def test_a_test_about_backends_runs_on_those_that_are_selected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MARKED)
    result = run(pytester, "-k", "fixed")
    assert outcomes(result) == {"test_fixed[cpu]": "PASSED", "test_fixed[absent]": "SKIPPED"}
    result = run(pytester, "-k", "fixed", "--backends=cpu,cpu:bf16")
    assert outcomes(result) == {"test_fixed[cpu]": "PASSED"}
    result = run(pytester, "-k", "fixed", "--backends=cpu:bf16")
    assert outcomes(result) == {"test_fixed[no-backend]": "SKIPPED"}
    result.stdout.fnmatch_lines(["SKIPPED*It is about cpu, absent; selected are cpu:bf16."])


def test_devices_start_before_the_first_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        late_backend="""
        from crosstrain.backends.torch_backend import TorchBackend

        class LateBackend(TorchBackend):
            name = "late"
            opened = 0

            def open(self):
                type(self).opened += 1
                return super().open()
        """,
        test_it="""
        from late_backend import LateBackend

        def test_plain(): assert LateBackend.opened == 1
        def test_backend(backend): pass
        """,
    )
    points = pytester.path / "absent-1.0.dist-info" / "entry_points.txt"
    points.write_text("[crosstrain.backends]\nlate = late_backend:LateBackend\n")
    run(pytester, "--backends=cpu,late").assert_outcomes(passed=3)


# Projects that have nothing to do with it


def test_a_session_that_does_not_use_it_sees_nothing_of_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_plain(): assert not {"torch", "numpy"} & set(sys.modules)
        """
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=pytester.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "backends" not in result.stdout


def test_names_of_a_projects_own_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    needs: ours\n    world: ours\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def backend(): return "postgres"

        @pytest.fixture
        def backend_spec(): return 15

        @pytest.mark.needs("disk")
        @pytest.mark.world("old")
        def test_ours(backend, backend_spec): assert (backend, backend_spec) == ("postgres", 15)

        @pytest.mark.parametrize("backend", ["sqlite"])
        def test_direct(backend): assert backend == "sqlite"
        """
    )
    result = run(pytester)
    assert outcomes(result) == {"test_ours": "PASSED", "test_direct[sqlite]": "PASSED"}
    assert "backends:" not in result.stdout.str()


# Several processes


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
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2"]
    result = pytester.run(*command, "--backends=cpu,cpu:bf16")
    result.assert_outcomes(passed=3)
    assert result.ret == 0
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
