"""Backends are found by name, and a spec that cannot be used says why and what to do."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crosstrain import backends
from crosstrain.backends import BackendError, BackendUnavailable, UnknownBackend, registry

Register = Callable[..., None]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Installs a package of someone else's, with a backend and its entry point, for one test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, value: str, source: str = "", package: str = "someones") -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[crosstrain.backends]\n{name} = {value}\n")
        if source:
            (tmp_path / f"{value.partition(':')[0]}.py").write_text(source)

    return install


def test_names_are_sorted_and_hold_ours() -> None:
    names = backends.names()
    assert names == sorted(set(names))
    assert {"cpu", "null"} <= set(names)


@pytest.mark.parametrize(
    ("spec", "name", "option"),
    [
        ("cpu", "cpu", "fp32"),
        ("cpu:fp32", "cpu", "fp32"),
        ("cpu:bf16", "cpu", "bf16"),
        ("cpu:fp16", "cpu", "fp16"),
        ("null", "null", "record"),
    ],
)
def test_a_spec_names_a_backend_and_an_option(spec: str, name: str, option: str) -> None:
    backend = backends.get(spec)
    assert (backend.name, backend.option) == (name, option)
    assert isinstance(backend, backends.Backend)


def test_each_get_makes_another_backend() -> None:
    assert backends.get("cpu") is not backends.get("cpu")


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("cpuu", "Did you mean 'cpu'?"),
        ("CPU", "Did you mean 'cpu'?"),
        ("nul", "Did you mean 'null'?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_suggests_the_nearest(spec: str, hint: str) -> None:
    with pytest.raises(UnknownBackend) as caught:
        backends.get(spec)
    message = str(caught.value)
    assert f"no backend '{spec}'" in message
    assert ("Did you mean" in message) == bool(hint)
    assert hint in message
    assert ", ".join(backends.names()) in message


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("cpu:bf61", "Did you mean 'cpu:bf16'?"),
        ("cpu:FP16", "Did you mean 'cpu:fp16'?"),
        ("cpu:", ""),
        ("cpu:xyz", ""),
        ("cpu:bf16:fast", "Did you mean 'cpu:bf16'?"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(spec: str, hint: str) -> None:
    with pytest.raises(UnknownBackend) as caught:
        backends.get(spec)
    message = str(caught.value)
    assert f"(of spec '{spec}')" in message
    assert ("Did you mean" in message) == bool(hint)
    assert hint in message
    assert "Options: fp32, bf16, fp16, fsdp, fsdp-bf16, fsdp-fp16." in message


@pytest.mark.parametrize("spec", ["cpu:nope", "null:nope"])
def test_the_class_itself_refuses_an_unknown_option(spec: str) -> None:
    name, _, option = spec.partition(":")
    kind = type(backends.get(name))
    with pytest.raises(UnknownBackend, match=f"Backend '{name}' has no option 'nope'"):
        kind(option)  # type: ignore[call-arg]


def test_a_package_that_comes_or_goes_in_the_meantime_is_noticed(
    register: Register, tmp_path: Path
) -> None:
    assert "late" not in backends.names()
    register("late", "someones_late:Late")
    assert "late" in backends.names()
    shutil.rmtree(tmp_path / "someones-1.0.dist-info")
    assert "late" not in backends.names()


def test_what_cannot_run_here_says_why_and_what_to_do(register: Register) -> None:
    register(
        "away",
        "someones_away:Away",
        "from crosstrain.backends import Availability\n"
        "class Away:\n"
        "    options = ('near', 'far')\n"
        "    @classmethod\n"
        "    def probe(cls, option=None):\n"
        "        return Availability(False, 'It is on the moon.', 'Fetch it.')\n",
    )
    assert "away" in backends.names()
    with pytest.raises(BackendUnavailable) as caught:
        backends.get("away:far")
    error = caught.value
    assert (error.spec, error.reason, error.remedy) == (
        "away:far",
        "It is on the moon.",
        "Fetch it.",
    )
    assert str(error) == (
        "Backend 'away:far' is not available: It is on the moon. Remedy: Fetch it."
    )
    found = backends.probe("away")
    assert (found.ok, found.reason, found.remedy) == (False, "It is on the moon.", "Fetch it.")


@pytest.mark.parametrize(
    ("value", "source", "reason"),
    [
        ("someones_missing:Kind", "", "someones_missing"),
        ("someones_empty:Kind", "x = 1\n", "Kind"),
        ("someones_broken:Kind", "import a_library_that_is_not_installed\n", "a_library_that"),
    ],
)
def test_a_backend_that_does_not_import(
    register: Register, value: str, source: str, reason: str
) -> None:
    register("absent", value, source)
    found = backends.probe("absent")
    assert not found.ok
    assert value in found.reason
    assert reason in found.reason
    assert found.remedy
    with pytest.raises(BackendUnavailable, match=reason):
        backends.get("absent")


def test_a_probe_that_raises_does_not_break_the_table(register: Register) -> None:
    register(
        "rash",
        "someones_rash:Rash",
        "class Rash:\n"
        "    options = ('x',)\n"
        "    @classmethod\n"
        "    def probe(cls, option=None):\n"
        "        raise RuntimeError('no driver')\n",
    )
    found = backends.probe("rash")
    assert not found.ok
    assert "RuntimeError: no driver" in found.reason
    assert backends.probe("cpu").ok


def test_two_packages_with_one_name_are_refused(register: Register) -> None:
    register("cpu", "someones_cpu:FastCpu")
    with pytest.raises(BackendError, match="Several installed packages register a backend 'cpu'"):
        backends.get("cpu")
    assert "someones_cpu:FastCpu" in backends.probe("cpu").reason
    assert backends.names().count("cpu") == 1


def test_probe_of_a_spec_that_does_not_exist() -> None:
    found = backends.probe("cpu:fp61")
    assert not found.ok
    assert "Did you mean 'cpu:fp16'?" in found.reason
    assert found.remedy


def test_settings_reach_the_class() -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        backends.get("cpu", no_such_setting=1)


@pytest.mark.parametrize(
    ("value", "spec"), [(None, "cpu"), ("", "cpu"), ("cpu:bf16", "cpu:bf16"), ("null", "null")]
)
def test_the_variable_sets_the_default(
    monkeypatch: pytest.MonkeyPatch, value: str | None, spec: str
) -> None:
    monkeypatch.delenv("CROSSTRAIN_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("CROSSTRAIN_BACKEND", value)
    assert backends.default_spec() == spec
    backend = backends.get()
    assert backend.name == spec.partition(":")[0]


def test_a_wrong_variable_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSTRAIN_BACKEND", "cpux")
    with pytest.raises(UnknownBackend, match="'cpux'"):
        backends.get()


def test_the_argument_of_a_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSTRAIN_BACKEND", "cpu:bf16")
    parser = argparse.ArgumentParser()
    backends.add_backend_argument(parser)
    assert parser.parse_args([]).backend == "cpu:bf16"
    assert parser.parse_args(["--backend", "null"]).backend == "null"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "--backend SPEC" in shown
    assert "CROSSTRAIN_BACKEND" in shown
    # The lines of the help may end within a name.
    assert all(name in "".join(shown.split()) for name in backends.names())


@pytest.mark.parametrize(
    ("spec", "shortest"),
    [
        ("cpu", "cpu"),
        ("cpu:fp32", "cpu"),
        ("cpu:bf16", "cpu:bf16"),
        ("cuda-amp:fp16", "cuda-amp"),
        ("auto", "auto"),
        ("cpu:fp31", "cpu:fp31"),
        ("nothing:fp32", "nothing:fp32"),
    ],
)
def test_the_shortest_spec_that_means_the_same(spec: str, shortest: str) -> None:
    assert registry.short(spec) == shortest
