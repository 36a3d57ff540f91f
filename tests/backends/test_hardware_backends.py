"""Backends whose hardware may be absent: what is missing, said exactly, and nothing started.

What each computes on its hardware is tested where that is: `tox -e xla`, `cuda`, `apex`, `tpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain import backends
from crosstrain.backends import BackendUnavailable, UnknownBackend
from crosstrain.backends.apex import LAST_WITH_AMP, amp_absence
from crosstrain.backends.cuda import deterministic_kernels, tensor_float_32
from crosstrain.backends.cuda_devices import CudaDevice, needed_capability, parse_devices
from crosstrain.backends.tpu_host import hardware_absence, import_risk, tpu_chips
from crosstrain.ci.conformance.case import flags

ACCELERATORS = ("accelerator", "hpu", "mps", "npu", "xpu")
HARDWARE = (*ACCELERATORS, "apex", "cuda", "cuda-amp", "tpu", "xla", "xla-spmd")

OPTIONS = {
    **dict.fromkeys(ACCELERATORS, ("fp32", "bf16", "fp16", "fsdp", "fsdp-bf16", "fsdp-fp16")),
    "apex": ("O1", "O0", "O2", "O3"),
    "cuda": ("fp32", "tf32", "fsdp", "fsdp-tf32"),
    "cuda-amp": ("fp16", "bf16", "fsdp", "fsdp-bf16"),
    "tpu": ("fp32", "bf16"),
    "xla": ("fp32", "bf16"),
    "xla-spmd": ("fp32", "bf16"),
}

# Ends the process at once where it is imported: no probe may.
DEADLY = "import os\nos._exit(77)\n"


def package(folder: Path, name: str, *parts: str, source: str = DEADLY, version: str = "") -> None:
    """Installs the files of a package, which must not be imported."""
    for part in ("", *parts):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        (folder / name / part / "__init__.py").write_text(source)
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)


# Every backend


@pytest.mark.parametrize("name", HARDWARE)
def test_every_backend_is_registered(name: str) -> None:
    assert name in backends.names()


@pytest.mark.parametrize("name", HARDWARE)
def test_a_missing_backend_gives_its_own_reason(name: str) -> None:
    found = backends.probe(name)
    if found.ok:
        assert found.devices
        assert found.versions
        return
    with pytest.raises(BackendUnavailable) as caught:
        backends.get(name)
    assert caught.value.reason == found.reason
    assert caught.value.remedy == found.remedy
    assert found.reason.endswith(".")
    assert found.remedy


def test_each_missing_library_is_named() -> None:
    words = {"apex": "apex", "cuda": "CUDA", "cuda-amp": "CUDA", "tpu": "TPU", "xla": "XLA"}
    words |= {"npu": "torch_npu", "hpu": "habana_frameworks", "mps": "Mac", "xpu": "'xpu'"}
    # A torch that is built for one names it.
    built = torch.accelerator.current_accelerator()
    words |= {"accelerator": "any accelerator" if built is None else f"'{built.type}'"}
    for name, word in words.items():
        found = backends.probe(name)
        # Where there is another accelerator, that is what is said.
        told = (word.lower(), "pjrt_device", f"not '{name}'")
        assert found.ok or any(one in found.reason.lower() for one in told)


@pytest.mark.parametrize(("name", "options"), OPTIONS.items())
def test_an_unknown_option_is_told_from_missing_hardware(
    name: str, options: tuple[str, ...]
) -> None:
    with pytest.raises(UnknownBackend) as caught:
        backends.get(f"{name}:nope")
    assert f"Options: {', '.join(options)}." in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("gpu", "cuda"),
        ("GPU", "cuda"),
        ("amp", "cuda-amp"),
        ("cuda_amp", "cuda-amp"),
        ("tpus", "tpu"),
        ("rocm", "cuda"),
        ("Metal", "mps"),
    ],
)
def test_what_people_write_leads_to_the_backend(wrong: str, right: str) -> None:
    with pytest.raises(UnknownBackend, match=f"Did you mean '{right}'"):
        backends.get(wrong)


def test_probes_start_nothing() -> None:
    code = (
        "import sys, threading, torch\n"
        "from crosstrain import backends\n"
        "for name in backends.names(): backends.probe(name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    vendors = {"apex", "torch_xla", "torch_tpu", "libtpu"} & set(result.stdout.split())
    # torch itself imports torch_tpu where that is installed.
    assert vendors <= {"torch_tpu", "libtpu"}


@pytest.mark.parametrize("name", HARDWARE)
def test_the_class_says_what_its_probe_says(name: str) -> None:
    (point,) = (p for p in _points() if p.name == name)
    if backends.probe(name).ok:
        assert point.load()().name == name
        return
    with pytest.raises(BackendUnavailable, match=name):
        point.load()()


def _points() -> Any:
    from importlib.metadata import entry_points

    return entry_points(group="crosstrain.backends")


# apex


@pytest.fixture
def _no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    if any((Path(place) / "apex").exists() for place in sys.path):
        pytest.skip("an apex is installed here, so its absence cannot be shown")


@pytest.mark.usefixtures("_no_apex")
@pytest.mark.parametrize(
    ("parts", "reason", "remedy"),
    [
        (None, "apex is not installed", LAST_WITH_AMP),
        (("lib", "ext"), "is not NVIDIA's", "pip uninstall apex"),
        (("multi_tensor_apply", "optimizers"), "whose amp was removed", LAST_WITH_AMP),
        (("multi_tensor_apply", "optimizers"), "whose amp was removed", "cuda-amp"),
    ],
)
def test_the_reasons_for_no_apex(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[str, ...] | None,
    reason: str,
    remedy: str,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if parts is not None:
        package(tmp_path, "apex", *parts, version="0.1")
    found = backends.probe("apex")
    assert not found.ok
    assert reason in found.reason
    assert remedy in found.remedy
    assert found.versions == ({} if parts is None else {"apex": "0.1"})
    assert "apex" not in sys.modules


@pytest.mark.usefixtures("_no_apex")
def test_an_apex_with_amp_still_needs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "apex", "amp", "multi_tensor_apply", version="0.1")
    assert amp_absence() is None
    found, cuda = backends.probe("apex"), backends.probe("cuda")
    assert (found.ok, found.reason, found.remedy) == (cuda.ok, cuda.reason, cuda.remedy)


# torch_xla


@pytest.mark.parametrize(
    ("ours", "variable", "reason"),
    [
        ("2.1.0", "CPU", "torch_xla 2.1.0 does not fit torch"),
        (torch.__version__.partition("+")[0], None, "PJRT_DEVICE is not set"),
        (torch.__version__.partition("+")[0], "CUDA", "PJRT_DEVICE is 'CUDA'"),
        (torch.__version__.partition("+")[0], "TPU", "no TPU"),
        (torch.__version__.partition("+")[0], "CPU", ""),
    ],
)
def test_the_reasons_for_no_xla(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ours: str,
    variable: str | None,
    reason: str,
) -> None:
    if variable == "TPU" and tpu_chips():
        pytest.skip("there is a TPU here, so its absence cannot be shown")
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "torch_xla", version=ours)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    if variable is not None:
        monkeypatch.setenv("PJRT_DEVICE", variable)
    found = backends.probe("xla")
    assert reason in found.reason
    assert found.ok == (reason == "")
    assert found.versions["torch_xla"] == ours
    if found.ok:
        assert found.devices == ["XLA on the CPU, which is not a TPU"]


# torch_tpu


def pci(folder: Path, *devices: tuple[str, str]) -> Path:
    for number, (vendor, kind) in enumerate(devices):
        entry = folder / f"0000:00:0{number}.0"
        entry.mkdir(parents=True)
        (entry / "vendor").write_text(vendor + "\n")
        (entry / "device").write_text(kind + "\n")
    return folder


def test_chips_are_told_from_googles_other_devices(tmp_path: Path) -> None:
    bus = pci(tmp_path, ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063"))
    assert tpu_chips(bus) == ["TPU v5e"]
    assert tpu_chips(tmp_path / "nothing") == []


def test_what_a_tpu_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = hardware_absence([])
    assert missing is not None
    assert "no TPU on its PCI bus" in missing.reason
    package(tmp_path, "libtpu")
    monkeypatch.syspath_prepend(tmp_path)
    assert hardware_absence(["TPU v4"]) is None


def test_a_torch_that_would_abort_is_not_imported(tmp_path: Path) -> None:
    # As torch_tpu without libtpu does: torch loads it by entry point, and the process ends.
    package(tmp_path, "torch_tpu", version="0.2.0")
    entry = "[torch.backends]\ntorch_tpu = torch_tpu:load\n"
    (tmp_path / "torch_tpu-0.2.0.dist-info" / "entry_points.txt").write_text(entry)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )

    assert run("-c", "import torch").returncode == 77
    doctor = run("-m", "crosstrain.ci.cli", "doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    for entry in json.loads(doctor.stdout)["backends"]:
        assert not entry["ok"]
        assert "without its library libtpu" in entry["reason"]
        assert "pip install libtpu" in entry["remedy"]
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    doctor = run("-m", "crosstrain.ci.cli", "doctor", "--json", "--require", "cpu")
    assert doctor.returncode == 0, doctor.stderr


def test_there_is_no_risk_without_torch_tpu() -> None:
    assert import_risk() is None


# CUDA


def test_the_drivers_answer_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 9.0\nTesla T4, 7.5\n\nsomething else\nQuadro, x.y\n"
    assert parse_devices(text) == [
        CudaDevice("NVIDIA H100 80GB HBM3", (9, 0)),
        CudaDevice("Tesla T4", (7, 5)),
    ]
    assert str(parse_devices(text)[1]) == "Tesla T4, compute capability 7.5"


def test_precisions_need_hardware_and_not_emulation() -> None:
    t4 = (7, 5)
    assert needed_capability("bf16") > t4
    assert needed_capability("tf32") > t4
    assert needed_capability("fp16") <= t4
    assert needed_capability("fp32") <= t4


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_set_and_restored(allowed: bool, before: str) -> None:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    ours = flags()
    old = (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    try:
        matmul.fp32_precision = before
        inside = flags()
        with tensor_float_32(allowed):
            # torch's own compiler reads the old names: they must not contradict the new ones.
            assert matmul.allow_tf32 is allowed
            assert cudnn.allow_tf32 is allowed
        assert flags() == inside
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = old
    assert flags() == ours


@pytest.mark.parametrize("before", [None, ":16:8", ":0:0"])
def test_kernels_are_made_deterministic_and_restored(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    ours = flags()
    with deterministic_kernels():
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        wanted = before if before == ":16:8" else ":4096:8"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == wanted
    assert flags() == ours
