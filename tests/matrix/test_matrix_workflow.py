"""The workflow that users copy: each command, spec, option and name in it exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosstrain import backends
from crosstrain.backends import BackendUnavailable
from crosstrain.ci.cli import COMMANDS, build_parser

# What a repository may have set, and the page of GitHub's variables in the workflow's head names.
VARIABLES = {
    "vars.CROSSTRAIN_GPU_BACKENDS": "cuda,cuda:tf32,cuda-amp,cuda-amp:bf16",
    "vars.CROSSTRAIN_TPU_BACKENDS": "tpu,tpu:bf16",
    "matrix.python": "3.12",
}


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / ".github" / "workflows" / "matrix.yml").read_text()


@pytest.fixture(scope="module")
def workflow(text: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(text)
    return found


def filled(value: str) -> str:
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: VARIABLES[match[1]], value)


def commands(workflow: dict[Any, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each `crosstrain` command as its shell would start it, with the job's name."""
    for name, job in workflow["jobs"].items():
        for step in job["steps"]:
            line = step.get("run", "")
            if line.startswith("crosstrain "):
                variables = {**workflow["env"], **job.get("env", {}), "TARGET": "training:build"}
                printed = subprocess.run(
                    ["bash", "-c", filled(line).replace("crosstrain ", "printf '%q ' ", 1)],
                    env={key: filled(str(value)) for key, value in variables.items()},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                yield name, shlex.split(printed.stdout)


def test_every_command_parses_and_every_spec_exists(workflow: dict[Any, Any]) -> None:
    specs: dict[str, set[str]] = {}
    for job, (name, *arguments) in commands(workflow):
        assert name == "matrix"
        args = build_parser(COMMANDS, name).parse_args([name, *arguments])
        specs[job] = {*args.require, *args.backends}
        for spec in specs[job]:
            # A wrong spec raises UnknownBackend.
            try:
                backends.get(spec)
            except BackendUnavailable:
                continue
        if job == "page":
            assert args.merge
        else:
            assert args.target == "training:build"
            assert args.require
        assert args.report
    assert specs.keys() == workflow["jobs"].keys()
    assert specs["page"] == set().union(*specs.values())


def test_what_is_kept_is_what_is_merged(workflow: dict[Any, Any]) -> None:
    jobs = workflow["jobs"]
    assert set(jobs["page"]["needs"]) == jobs.keys() - {"page"}
    kept: dict[str, str] = {}
    for name, job in jobs.items():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/upload-artifact@"):
                kept[name] = step["with"]["name"]
                assert step["if"] == "${{ !cancelled() }}", "a failed matrix must be kept, too"
    assert kept.keys() == jobs.keys()
    assert all(kept[name].startswith("matrix-") for name in jobs.keys() - {"page"})
    assert not kept["page"].startswith("matrix-")
    (download,) = [
        step["with"]
        for step in jobs["page"]["steps"]
        if step.get("uses", "").startswith("actions/download-artifact@")
    ]
    assert download == {"pattern": "matrix-*", "path": "reports"}


def test_self_hosted_machines_are_used_only_where_configured(
    workflow: dict[Any, Any], text: str
) -> None:
    for name in ("gpu", "tpu"):
        job = workflow["jobs"][name]
        variable = f"CROSSTRAIN_{name.upper()}_BACKENDS"
        assert job["if"] == f"${{{{ vars.{variable} != '' }}}}"
        assert "self-hosted" in job["runs-on"]
        assert f"#   {variable}" in text
    # `on` is a word for true in YAML 1.1, which is what PyYAML reads.
    assert "pull_request" not in workflow[True]


def test_the_pythons_and_the_extra_are_the_projects(
    workflow: dict[Any, Any], repo_root: Path
) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    versions = [line.removeprefix(prefix) for line in project["classifiers"] if prefix in line]
    assert workflow["jobs"]["cpu"]["strategy"]["matrix"]["python"] == versions
    (extra,) = re.findall(r"\[(.*?)\]", workflow["env"]["INSTALL"])
    assert extra in project["optional-dependencies"]
