"""`auto` chooses, says what and why, and nothing else ever does."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from crosstrain import backends
from crosstrain.backends import Availability, BackendUnavailable, UnknownBackend
from crosstrain.backends.auto import choose

HARDWARE = ("apex", "cuda", "cuda-amp", "tpu", "xla")


def only(*specs: str) -> Any:
    def probe(spec: str) -> Availability:
        return Availability(spec in specs, "" if spec in specs else f"No {spec}.", "Get one.")

    return probe


@pytest.mark.parametrize(
    ("available", "chosen"),
    [
        (("cpu:fp32",), "cpu:fp32"),
        (("cpu:fp32", "cuda:fp32", "cuda-amp:fp16"), "cuda-amp:fp16"),
        (("cpu:fp32", "cuda:fp32", "cuda-amp:fp16", "cuda-amp:bf16"), "cuda-amp:bf16"),
        (("cpu:fp32", "cuda:fp32"), "cuda:fp32"),
        (("cpu:fp32", "tpu:bf16", "xla:bf16"), "tpu:bf16"),
    ],
)
def test_auto_chooses_what_the_hardware_supports(
    available: tuple[str, ...], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "crosstrain.backends"):
        choice = choose(only(*available))
    assert choice.spec == chosen
    (record,) = caplog.records
    assert record.getMessage().startswith(f"auto chose {chosen}. {choice.why}")
    refused = [spec for spec in ("cuda-amp:bf16", "cuda:fp32") if spec not in available]
    if chosen == "cpu:fp32":
        assert all(f"{spec} (No {spec}.)" in record.getMessage() for spec in refused)


@pytest.mark.parametrize(("device", "chosen"), [("CPU", "cpu:fp32"), ("TPU", "xla:bf16")])
def test_auto_takes_xla_for_a_tpu_only(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: str
) -> None:
    monkeypatch.setenv("PJRT_DEVICE", device)
    assert choose(only("cpu:fp32", "xla:bf16")).spec == chosen


def test_auto_without_any_backend_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=r"'auto'.*No cpu:fp32\. Remedy: Get one"):
        choose(only())


def test_auto_is_a_spec() -> None:
    assert "auto" in backends.names()
    backend = backends.get("auto")
    found = backends.probe("auto")
    assert found.ok
    assert found.devices[0].startswith(f"chooses {backend.name}:{backend.option}: ")
    with pytest.raises(UnknownBackend, match="is not a spec"):
        backends.get("auto:bf16")


def test_only_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name in HARDWARE if not backends.probe(name).ok]
    for name in missing:
        monkeypatch.setenv("CROSSTRAIN_BACKEND", name)
        with pytest.raises(BackendUnavailable):
            backends.get()
