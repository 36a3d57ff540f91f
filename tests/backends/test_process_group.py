"""Several processes: joining and leaving the process group, and the gradients that they share."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from processes import results, run_program, run_world
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends import BackendError, get
from crosstrain.backends.process_group import join_alone, replicate


def test_processes_train_as_one(tmp_path: Path) -> None:
    """Two and four processes end with the weights of one, and each rank with the same bits."""
    run_program("ranks_program.py", str(tmp_path))
    (alone,) = results(tmp_path, 1)
    assert alone["wrapped"] == "Sequential"
    for size in (2, 4):
        run_world(size, "ranks_program.py", str(tmp_path))
        told = results(tmp_path, size)
        assert [one["rank"] for one in told] == list(range(size))
        # Within a window nothing is shared yet.
        assert len({tuple(one["kept"]) for one in told}) == size
        for one in told:
            assert one["wrapped"] == "DistributedDataParallel"
            assert one["weights"] == told[0]["weights"]
            for mine, theirs in zip(one["weights"], alone["weights"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("slow", [0, 1])
def test_nobody_goes_on_before_all_have_joined(slow: int, tmp_path: Path) -> None:
    """One that left at once would break the joining of a slow one; each of them may be slow."""
    run_world(2, "ranks_join_program.py", str(tmp_path), str(slow), CROSSTRAIN_TIMEOUT="20")
    told = results(tmp_path, 2)
    for group in range(2):
        last = max(rank["connected"][group] for rank in told)
        assert all(rank["went_on"][group] >= last for rank in told)


def test_address_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-set environment is an error that names what is missing."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(BackendError, match=r"MASTER_ADDR is not set, but WORLD_SIZE=2"):
        get("cpu").open()


def test_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world that does not come together is an error after the timeout, and nothing stays open."""
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "1", "CROSSTRAIN_TIMEOUT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=r"Rank 1 of 2 could not join .* 127.0.0.1:1"):
        get("cpu").open()
    monkeypatch.setenv("CROSSTRAIN_TIMEOUT", "soon")
    with pytest.raises(BackendError, match=r"CROSSTRAIN_TIMEOUT='soon' is no number"):
        get("cpu").open()


def test_a_torch_that_lays_out_buckets_in_another_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resumed run would differ from one that never stopped: the versions tested are named."""

    def forward(self: DistributedDataParallel, *given: float) -> torch.Tensor:
        """One that keeps the module that it was made with."""
        self.__dict__.setdefault("kept", [self.module])
        return self.__dict__["kept"][0](*given)

    monkeypatch.setattr(DistributedDataParallel, "forward", forward)
    with ExitStack() as stack:
        join_alone("gloo", stack)
        with pytest.raises(BackendError, match=r"does not lay out its buckets.*2\.9 and 2\.13"):
            replicate(torch.nn.Linear(2, 2), torch.device("cpu"))
