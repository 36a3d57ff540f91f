"""ReproducibleBatchSampler and update_dataloader, on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ignite.engine.deterministic
import pytest
import torch
from dataflow_objects import EagerSampler, GrowingBatches, Images, LazySampler, Stream
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from crosstrain.engine import (
    DeterministicEngine,
    PermutationSampler,
    ReproducibleBatchSampler,
    manual_seed,
    update_dataloader,
)
from crosstrain.engine.data import order

SIZE = 23
SAMPLERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: SequentialSampler(range(SIZE)),
    "random": lambda: RandomSampler(range(SIZE)),
    "replacement": lambda: RandomSampler(range(SIZE), True, 100),
    "more": lambda: RandomSampler(range(SIZE), num_samples=60),
    "subset": lambda: SubsetRandomSampler(range(3, SIZE)),
    "weighted": lambda: WeightedRandomSampler([1.0] * SIZE, 31),
    "distributed": lambda: DistributedSampler(range(SIZE), 2, 1),  # type: ignore[arg-type]
    "permutation": lambda: PermutationSampler(SIZE),
    "user's": lambda: EagerSampler(SIZE),
    "user's, lazy": lambda: LazySampler(SIZE),
}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_it_gives_the_batches_of_the_sampler_from_any_batch_on(kind: str, drop_last: bool) -> None:
    sampler = BatchSampler(SAMPLERS[kind](), 4, drop_last)
    manual_seed(5)
    whole = list(sampler)
    after = torch.get_rng_state()
    for start in (None, *range(len(whole) + 1)):
        manual_seed(5)
        ours = ReproducibleBatchSampler(sampler, start)
        assert len(ours) == len(whole)
        assert list(ours) == whole[start or 0 :]
        assert torch.equal(torch.get_rng_state(), after)
        # Only the first iteration starts there.
        assert ours.start_iteration is None
        manual_seed(5)
        assert list(ours) == whole


def test_it_takes_any_batch_sampler() -> None:
    manual_seed(5)
    whole = list(GrowingBatches())
    manual_seed(5)
    assert list(ReproducibleBatchSampler(GrowingBatches(), 2)) == whole[2:]
    with pytest.raises(TypeError, match=r"should be torch\.utils\.data\.sampler\.BatchSampler"):
        ReproducibleBatchSampler(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_rewound_as_ignite_documents_it(workers: int) -> None:
    """`update_dataloader`, then `start_iteration`: both libraries, the same batches."""

    def batches(update: Any, kind: Any, start: int) -> list[list[int]]:
        loader = DataLoader(torch.arange(SIZE), 4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
        loader = update(loader, kind(loader.batch_sampler))
        loader.batch_sampler.start_iteration = start
        manual_seed(6)
        return [batch.tolist() for batch in loader]

    theirs = ignite.engine.deterministic
    for start in (0, 1, 5):
        wanted = batches(theirs.update_dataloader, theirs.ReproducibleBatchSampler, start)
        assert batches(update_dataloader, ReproducibleBatchSampler, start) == wanted


class Titled(DataLoader[Any]):
    """A subclass whose constructor nobody else can call."""

    def __init__(self, title: str, *, rows: int) -> None:
        super().__init__(torch.arange(rows), batch_size=4)  # type: ignore[arg-type]
        self.title = title


def test_update_dataloader_changes_nothing_else() -> None:
    loader = Titled("ten", rows=10)
    before = dict(vars(loader))
    sampler = ReproducibleBatchSampler(loader.batch_sampler)
    updated = update_dataloader(loader, sampler)
    assert isinstance(updated, Titled)
    assert updated.batch_sampler is sampler
    assert {**vars(updated), "batch_sampler": loader.batch_sampler} == before
    assert dict(vars(loader)) == before


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DataLoader(Images(), batch_size=None), "batch_size=None and a Images"),
        (lambda: DataLoader(Stream()), "batch_size=1 and a Stream"),
    ],
)
def test_update_dataloader_refuses_what_has_no_batch_sampler(
    make: Callable[[], Any], named: str
) -> None:
    with pytest.raises(TypeError, match=named):
        update_dataloader(make(), [[0]])


def test_computed_order_of_each_pass() -> None:
    """Every pass over data larger than a block has the whole order of its own epoch."""
    size, passes = 3 * 8192, 3
    sampler = PermutationSampler(size, seed=4)
    given: list[int] = []
    engine = DeterministicEngine(lambda engine, batch: given.extend(batch.tolist()), seed=1)
    engine.run(DataLoader(torch.arange(size), 512, sampler=sampler), max_epochs=passes)
    for epoch in range(passes):
        sampler.set_epoch(epoch)
        assert given[epoch * size : (epoch + 1) * size] == sampler.indices(0, size).tolist()


def test_a_torch_whose_samplers_draw_in_another_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its orders are drawn here, so that they can be entered anywhere: that has to be the same."""
    plain = RandomSampler.__iter__
    monkeypatch.setattr(RandomSampler, "__iter__", lambda self: reversed(list(plain(self))))
    order._check_copies.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the order of a RandomSampler in another way"):
            list(ReproducibleBatchSampler(BatchSampler(RandomSampler(range(9)), 2, False)))
    finally:
        order._check_copies.cache_clear()
