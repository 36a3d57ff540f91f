"""The pytest plugin, as a project that has installed crosstrain meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from plugin_project import USES, outcomes, project, run  # noqa: F401 (a fixture)

# Imported before pytester takes note of what is: torch cannot be imported twice.
import crosstrain.engine  # noqa: F401
from crosstrain.backends import names, probe
from crosstrain.ci.matrix.selection import available_specs

pytest_plugins = ("pytester",)

WRITTEN_OUT = """
import pytest

@pytest.mark.backends("cpu")
def test_plain(backend): pass

@pytest.mark.backends("cpu:fp32", "cpu:bf16")
def test_written_out(backend): pass
"""


pytestmark = pytest.mark.usefixtures("project")


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
        (("--backends=cpu,,cuda",), "--backends: 'cpu,,cuda' has an empty entry"),
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


@pytest.mark.parametrize("mark", ["world(2)", "needs('loss_scaling')", "backends('cuda')"])
def test_a_mark_without_the_fixture_is_an_error(pytester: pytest.Pytester, mark: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass")
    result = run(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    words = f"test_it: the mark {mark.partition('(')[0]} does nothing without a fixture"
    assert words in result.stderr.str()


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
