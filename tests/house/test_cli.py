"""The command line loads only the chosen command and reports errors of backends in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from crosstrain.backends.errors import BackendError, BackendUnavailable, UnknownBackend
from crosstrain.ci import cli


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], cwd="/", capture_output=True, text=True, check=False
    )


def test_help_lists_every_command(console_script: Path) -> None:
    result = run(console_script, "--help")
    assert result.returncode == 0
    assert all(f"\n    {name} " in result.stdout for name in cli.COMMANDS)
    assert result.stderr == ""


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(console_script: Path, name: str) -> None:
    result = run(console_script, name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: crosstrain {name}")


def test_version_is_that_of_the_project(console_script: Path, repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert run(console_script, "--version").stdout == f"crosstrain {project['version']}\n"


@pytest.mark.parametrize("arguments", [(), ("train",), ("--nonsense",)])
def test_a_wrong_call_names_the_commands(console_script: Path, arguments: tuple[str, ...]) -> None:
    result = run(console_script, *arguments)
    assert result.returncode == 2
    assert "usage: crosstrain" in result.stderr
    assert "Traceback" not in result.stderr


def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> dict[str, cli.Command]:
    """A command of its own, in a module that nothing has imported yet."""
    name = f"command_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"work": cli.Command("do some work", name)}


def test_a_command_gets_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def add_arguments(parser): parser.add_argument('--code', type=int)\n"
        "def run(args): return args.code\n"
    )
    commands = command(tmp_path, monkeypatch, source)
    assert cli.main(["work", "--code", "7"], commands) == 7


def test_help_does_not_load_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = command(tmp_path, monkeypatch, "raise SystemError('loaded')")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"], commands)
    assert stop.value.code == 0
    assert "do some work" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["add_arguments", "run"])
def test_a_backend_error_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    source = (
        "from crosstrain.backends.errors import BackendError\n"
        "def add_arguments(parser): fail('add_arguments')\n"
        "def run(args): fail('run')\n"
        "def fail(place):\n"
        f"    if place == {where!r}: raise BackendError('no such thing:\\n  do this')\n"
    )
    commands = command(tmp_path, monkeypatch, source)
    assert cli.main(["work"], commands) == 2
    output = capsys.readouterr()
    assert output.err == "crosstrain work: error: no such thing: do this\n"
    assert output.out == ""


def test_another_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def add_arguments(parser): pass\ndef run(args): raise ValueError('a bug')\n"
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["work"], command(tmp_path, monkeypatch, source))


def test_the_errors_of_the_backends_are_backend_errors() -> None:
    assert issubclass(BackendUnavailable, BackendError)
    assert issubclass(UnknownBackend, BackendError)


def test_an_unknown_backend_in_the_environment_is_one_line(console_script: Path) -> None:
    environment = {**os.environ, "CROSSTRAIN_BACKEND": "cpuu"}
    result = subprocess.run(
        [console_script, "demo"], env=environment, cwd="/", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "cpuu" in result.stderr


@pytest.mark.parametrize("module", ["crosstrain.ci", "crosstrain.ci.cli"])
def test_the_module_runs_as_a_script(console_script: Path, module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        cwd="/", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == run(console_script, "--version").stdout


MISTAKES = {
    ("demo", "--workers", "-1"): "argument --workers: '-1' is not a whole number of at least 0",
    ("demo", "--epochs", "none"): "argument --epochs: 'none' is not a whole number",
    ("demo", "--out", "FILE"): "argument --out: 'FILE' is a file; name a folder",
    ("demo", "--out", "FILE/below"): "argument --out: 'FILE' is a file; name a folder",
    ("matrix", "--report", "FILE"): "argument --report: 'FILE' is a file; name a folder",
    ("verify", "x:y", "--kills", "-1"): "argument --kills: '-1' is not",
    ("verify", "x:y", "--workers", "0,-1"): "argument --workers: '-1' is not",
    ("verify", "x:y", "--at", "five"): "argument --at: 'five' is not a whole number",
    ("verify", "x:y", "--time-limit", "nan"): "argument --time-limit: 'nan' is not a number",
    ("verify", "x:y", "--json", "nowhere/x.json"): "argument --json: there is no folder 'nowhere'",
    ("verify", "x:y", "--keep", "FILE"): "argument --keep: 'FILE' is a file; name a folder",
    ("diff", "FILE", "FILE", "--tolerance", "-1"): "argument --tolerance: '-1' is not",
    ("diff", "nowhere", "nowhere"): "nowhere cannot be read",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_told_in_words_that_name_the_option(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("mine")
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert MISTAKES[arguments] in said
    assert "Traceback" not in said
    assert Path("FILE").read_text() == "mine"


@pytest.mark.parametrize("name", ["demo", "matrix"])
def test_a_command_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"crosstrain {name}: error: sklearn ")
    assert said.endswith("not installed: pip install 'crosstrain[demo]'\n")
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "def add_arguments(parser): pass\ndef run(args): open('/proc/no/such', 'w')\n"
    assert cli.main(["work"], command(tmp_path, monkeypatch, source)) == 2
    said = capsys.readouterr().err
    assert said == "crosstrain work: error: /proc/no/such: No such file or directory\n"


@pytest.mark.parametrize("arguments", [("doctor",), ("--help",)])
def test_a_reader_that_has_gone_is_no_traceback(
    console_script: Path, arguments: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    # Unbuffered, --help is written by argparse, which takes no notice of a reader that has gone.
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(
        [console_script, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, cwd="/",
        check=False, env=buffered,
    )  # fmt: skip
    os.close(writing)
    assert result.returncode != 0
    assert result.stderr == ""
