"""`module:function` names a user's training; whatever is wrong with it is said in its own words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crosstrain.ci import Target, TargetError, Training
from crosstrain.engine import DeterministicEngine

SOURCE = """
import torch
from crosstrain.ci import Training
from crosstrain.engine import DeterministicEngine, Engine, create_supervised_trainer

number = 3

def training(backend, workers=0):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, backend=backend, deterministic=True
    )
    trainer.workers = workers
    data = [(torch.ones(1, 2), torch.ones(1, 2))] * 3
    return Training(trainer, data, 2, {"model": model, "optimizer": optimizer})

def no_workers(backend):
    return training(backend)

def any_options(backend, **options):
    return training(backend, **options)

def two_arguments(backend, folder):
    return training(backend)

def returns_trainer(backend):
    return training(backend).trainer

def ignores_backend(backend):
    return training("cpu")

def plain_engine(backend):
    return Training(Engine(lambda engine, batch: 0.0), [1], 2, {})

def own_engine(backend):
    return Training(DeterministicEngine(lambda engine, batch: 0.0), [1], 2, {})

def no_epochs(backend):
    found = training(backend)
    return Training(found.trainer, found.data, 0, found.to_save)

def leaves_out(backend):
    found = training(backend)
    return Training(found.trainer, found.data, 2, {"model": found.to_save["model"]})

def saves_number(backend):
    found = training(backend)
    return Training(found.trainer, found.data, 2, {**found.to_save, "number": 7})

def has_run(backend):
    found = training(backend)
    found.run()
    return found
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    # A name of its own: a module is imported once in a process.
    path = tmp_path / f"target_of_{tmp_path.name}.py"
    path.write_text(SOURCE)
    return path


def test_a_file_and_a_module_name_the_same_training(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    for text in (f"{file}:training", f"{file.name}:training", f"{file.stem}:training"):
        target = Target.parse(text)
        assert str(target) == text
        training = target.build("cpu", workers=2)
        assert isinstance(training, Training)
        assert isinstance(training.trainer, DeterministicEngine)
        assert vars(training.trainer)["workers"] == 2
        training.run()
        assert training.trainer.state.iteration == 6


def test_workers_are_passed_where_there_is_an_argument(file: Path) -> None:
    assert Target.parse(f"{file}:any_options").takes_workers()
    without = Target.parse(f"{file}:no_workers")
    assert not without.takes_workers()
    assert without.build("cpu").max_epochs == 2
    with pytest.raises(TargetError, match=r"no argument `workers`.*with 2 of them.*num_workers"):
        without.build("cpu", workers=2)


def test_an_engine_without_a_backend_is_the_cpus(file: Path) -> None:
    target = Target.parse(f"{file}:own_engine")
    assert target.build("cpu").max_epochs == 2
    with pytest.raises(TargetError, match=r"called with 'cpu:bf16'.*runs on no backend"):
        target.build("cpu:bf16")


@pytest.mark.parametrize(
    "text", ["training", "module:", ":training", "a b:training", "module:no-name", "folder/x:f"]
)
def test_another_form_is_refused_with_the_legal_ones(text: str) -> None:
    with pytest.raises(TargetError, match=r"PACKAGE\.MODULE:FUNCTION or PATH/TO/FILE\.py"):
        Target.parse(text)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(TargetError, match=r"no file 'nowhere/x\.py'.*current folder"):
        Target.parse("nowhere/x.py:training")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("trainning", r"no function 'trainning'; it has .*training.*Wanted: def training"),
        ("number", r"is a int\. Wanted: def training"),
        ("two_arguments", r"missing a required argument: 'folder'.*Wanted"),
        ("returns_trainer", r"returned a DeterministicEngine\. Return crosstrain\.ci\.Training"),
        ("ignores_backend", r"called with 'cpu:bf16'.*runs on cpu:fp32.*backend=backend"),
        ("plain_engine", r"type Engine.*deterministic=True"),
        ("no_epochs", r"max_epochs is an integer of at least 1, got 0"),
        ("leaves_out", r"to_save leaves out 'optimizer'"),
        ("saves_number", r"'int'.*state_dict.*'number'"),
        ("has_run", r"at iteration 6"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(file: Path, function: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target.parse(f"{file}:{function}").build("cpu:bf16")


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(TargetError, match=r"no module 'no_such_package'.*looked for in"):
        Target.parse("no_such_package.training:build").build("cpu")


def test_a_module_that_lacks_another_raises_its_own_error(file: Path) -> None:
    file.write_text("import package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="package_that_is_missing"):
        Target.parse(f"{file}:training").build("cpu")


def test_a_file_with_the_name_of_a_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "random.py"
    path.write_text(SOURCE)
    with pytest.raises(TargetError, match=r"cannot be imported as 'random'.*Rename the file"):
        Target.parse(f"{path}:training").build("cpu")


def test_the_package_and_a_target_import_no_torch() -> None:
    program = (
        "import sys; from crosstrain.ci import Target, Training; Target.parse('a.b:c'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
