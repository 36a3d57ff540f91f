"""A program for torchrun: trains small models sharded and tells what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard

from crosstrain.backends import BackendError, get
from crosstrain.backends.fsdp import Sharding


class Tied(torch.nn.Module):
    """A small transformer whose embedding and output share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = torch.nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns a score for each token."""
        scores: torch.Tensor = self.out(self.encoder(self.embedding(tokens)))
        return scores


def whole(value: Any) -> Any:
    """Returns a tensor in one piece, as nested lists."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.flatten().tolist()


def share(batch: torch.Tensor, backend: Any) -> torch.Tensor:
    """Returns this rank's part of a batch."""
    rank, size = backend.world.rank, backend.world.size
    return batch[rank * len(batch) // size : (rank + 1) * len(batch) // size]


def mlp(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Returns a model that differs in each process until it is prepared."""
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 1)
    ).to(dtype)


def train_mlp(spec: str, **settings: Any) -> dict[str, Any]:
    """Trains with windows of two and clipping; returns weights, norms and what it was."""
    with get(spec, **settings) as backend:
        model = mlp()
        model[2].eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model, optimizer = backend.prepare(model, optimizer)
        generator = torch.Generator().manual_seed(1)
        norms: list[float] = []
        for iteration in range(6):
            x = share(torch.randn(8, 4, generator=generator, dtype=torch.float64), backend)
            loss: Any = model(x).square().mean() / 2
            if iteration % 2 == 0:
                with backend.accumulating(model):
                    backend.backward(loss, optimizer)
                continue
            backend.backward(loss, optimizer)
            result = backend.step(optimizer, 0.05)
            norms.append(float(result.grad_norm))
            optimizer.zero_grad()
            backend.sync()
        blocks = [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]
        inner = getattr(model, "module", model)
        weights = [whole(value) for value in inner.state_dict().values()]
        parts = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        return {"weights": weights, "norms": norms, "blocks": blocks, "parts": parts}


def train_tied(spec: str) -> dict[str, Any]:
    """Trains the transformer; returns its weights and blocks."""
    with get(spec) as backend:
        torch.manual_seed(3)
        model = Tied().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = backend.prepare(model, optimizer)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            tokens = share(torch.randint(0, 11, (4, 5), generator=generator), backend)
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            backend.backward(loss, optimizer)
            backend.step(optimizer)
            optimizer.zero_grad()
            backend.sync()
        blocks = [name for name, m in model.named_modules() if isinstance(m, FSDPModule)]
        tied = getattr(model, "module", model)
        return {
            "weights": [whole(value) for value in tied.state_dict().values()],
            "blocks": blocks,
            "tied": tied.out.weight is tied.embedding.weight,
        }


def train_low(option: str) -> dict[str, Any]:
    """Trains in a low precision; at the second step a gradient of the first rank overflows."""
    with get(f"cpu:{option}") as backend:
        model = mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = backend.prepare(model, optimizer)
        seen: set[str] = set()
        inner: Any = model[0] if isinstance(model, torch.nn.Sequential) else None
        inner.register_forward_hook(lambda *a: seen.add(str(a[2].dtype)))
        applied: list[bool] = []
        losses: list[float] = []
        generator = torch.Generator().manual_seed(1)
        for iteration in range(3):
            x = share(torch.randn(8, 4, generator=generator), backend)
            with backend.autocast():
                output = model(x)
                loss: Any = output.square().mean()
            backend.backward(loss, optimizer)
            if iteration == 1 and backend.world.rank == 0 and option == "fsdp-fp16":
                parameter: Any = next(model.parameters())
                parameter.grad.to_local()[0, 0] = float("inf")
            result = backend.step(optimizer, 1.0)
            applied.append(result.applied)
            losses.append(loss.item())
            optimizer.zero_grad()
            backend.sync()
        dtypes = sorted(seen | {str(output.dtype), str(next(model.parameters()).dtype)})
        scale = backend.state_dict().get("scale")
        told = {"dtypes": dtypes, "applied": applied, "losses": losses, "scale": scale}
        return {**told, "weights": [whole(value) for value in model.state_dict().values()]}


def own_blocks() -> Iterator[tuple[str, Any]]:
    """Shards by a policy, and a model of which the script has sharded a part."""
    with get("cpu:fsdp", sharding=Sharding(blocks=lambda model: [model[3]])) as backend:
        model, _ = backend.prepare(m := mlp(), torch.optim.SGD(m.parameters(), lr=0.1))
        yield "policy", [n for n, one in model.named_modules() if isinstance(one, FSDPModule)]
        other = mlp()
        fully_shard(other[0])
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        other, optimizer = backend.prepare(other, optimizer)
        yield "own", [n for n, one in other.named_modules() if isinstance(one, FSDPModule)]
        backend.backward(other(torch.ones(2, 4, dtype=torch.float64)).sum(), optimizer)
        yield "own stepped", backend.step(optimizer).applied


def refusals() -> Iterator[tuple[str, str]]:
    """Tries what cannot be done."""
    with get("cpu:fsdp") as backend:
        rank = backend.world.rank
        for name, model in (
            ("differs", torch.nn.Linear(4 + rank, 1)),
            ("meta", torch.nn.Linear(4, 1, device="meta")),
        ):
            try:
                backend.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
                yield name, "nothing"
            except (BackendError, NotImplementedError) as error:
                yield name, f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    """Runs everything in one process group and writes what was seen."""
    told: dict[str, Any] = {}
    with get("cpu") as outer:
        for spec in ("cpu", "cpu:fsdp"):
            told[f"mlp {spec}"] = train_mlp(spec)
            told[f"tied {spec}"] = train_tied(spec)
        told["mlp no_sync"] = train_mlp("cpu:fsdp", sharding=Sharding(no_sync=True))
        told["mlp kept"] = train_mlp("cpu:fsdp", sharding=Sharding(reshard_after_forward=False))
        for option in ("fsdp-bf16", "fsdp-fp16"):
            told[option] = train_low(option)
        told.update(own_blocks())
        told.update(refusals())
        rank, size = outer.world.rank, outer.world.size
    assert not distributed.is_initialized(), "close() leaves the process group"
    (folder / f"{rank}-of-{size}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
