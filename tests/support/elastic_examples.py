"""Worlds of processes that train small models in logical shards, as they are told.

A world is started once for many trainings. Each is described by a dict; each process answers with
a digest of all that the training has come to.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any, TextIO

import torch
from elastic_program import digest
from fork_server import ForkServer
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from crosstrain import backends
from crosstrain.engine import Events, create_supervised_trainer, manual_seed
from crosstrain.engine.training import tree_sum


class Workers:
    """W processes that train what they are told.

    Args:
        server: forks them.
        size: how many.
        folder: where pipes are made.
    """

    def __init__(self, server: ForkServer, size: int, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[tuple[TextIO, TextIO]] = []
        names = [str(folder / f"{rank}-of-{size}") for rank in range(size)]
        for rank, name in enumerate(names):
            os.mkfifo(f"{name}.asked")
            os.mkfifo(f"{name}.answered")
            server.start(work, name, rank, size, port)
        for name in names:
            # Each waits for the other side to be opened.
            asked = Path(f"{name}.asked").open("w")  # noqa: SIM115 - close() closes it
            answered = Path(f"{name}.answered").open()  # noqa: SIM115
            self._pipes.append((asked, answered))

    def ask(self, training: dict[str, Any]) -> None:
        """Has all processes run a training."""
        for asked, _ in self._pipes:
            asked.write(json.dumps(training) + "\n")
            asked.flush()

    def answers(self) -> list[str]:
        """Returns what each of them has come to; nothing of one that has ended."""
        return [answered.readline() for _, answered in self._pipes]

    def close(self) -> None:
        """Lets the processes end."""
        for pipe in itertools.chain.from_iterable(self._pipes):
            pipe.close()


def work(name: str, rank: int, size: int, port: int) -> None:
    """Trains what is asked for, until nobody asks any more."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told |= {"MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()}, MASTER_ADDR="127.0.0.1")
    with Path(f"{name}.asked").open() as asked, Path(f"{name}.answered").open("w") as answered:
        for line in asked:
            # One that fails ends the process: the others would wait for it.
            answered.write(json.dumps(train(json.loads(line))) + "\n")
            answered.flush()


class Observed(nn.Module):
    """Notes what it has seen in buffers of several types, one of which stays as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("largest", torch.tensor(float("-inf")))
        self.register_buffer("stays", torch.tensor([float("-inf"), 0.1, -0.0]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("any", torch.zeros(3, dtype=torch.bool), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            # Anew in place of in place, and only now and then.
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).to(self.mean.dtype)
            if float(x.flatten()[0]) > 0:
                self.largest.copy_(torch.maximum(self.largest, x.max().to(self.largest.dtype)))
            self.seen += len(x)
            self.any[len(x) % 3] = True
        return x + torch.rand_like(x)


class Spectrum(nn.Module):
    """Has parameters that are complex."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors: Any = None
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (x.to(torch.complex64) * self.factors).real.to(x.dtype)
        return found


class Sometimes(nn.Module):
    """Uses its parameters for some batches only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x) if float(x.detach().flatten()[0]) > 0 else x
        return found


class Again(nn.Module):
    """Comes back to its parameters while the backward pass runs, by a reentrant checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True)
        return self.layer(found)


LAYERS: dict[str, Any] = {
    "dropout": lambda width: nn.Dropout(0.5),
    "norm": nn.LayerNorm,
    "linear": lambda width: nn.Linear(width, width, bias=False),
    "gelu": lambda width: nn.GELU(),
    "observed": Observed,
    "spectrum": Spectrum,
    "sometimes": Sometimes,
    "again": Again,
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
}


def model_of(told: dict[str, Any]) -> nn.Module:
    width = told["width"]
    layers = [LAYERS[name](width) for name in told["layers"]]
    whole = [nn.Linear(told["inputs"], width), *layers, nn.Linear(width, 4)]
    model = nn.Sequential(*whole).to(getattr(torch, told["dtype"]))
    for module in model:
        if isinstance(module, Spectrum):
            module.factors = nn.Parameter(torch.randn(module.width, dtype=torch.complex64))
    return model


def data_of(told: dict[str, Any]) -> Any:
    draws = torch.Generator().manual_seed(told["seed"])
    x = torch.randn(told["samples"], told["inputs"], generator=draws)
    y = torch.randint(0, 4, (told["samples"],), generator=draws)
    # Some batch of the loss that leaves class 0 out would have nothing to take a mean over.
    y[:: told["batch"]] = 1
    return TensorDataset(x.to(getattr(torch, told["dtype"])), y)


def loss_of(told: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the loss function, and what it is."""
    if told["reduction"] == "count":
        return nn.CrossEntropyLoss(ignore_index=0), lambda batch: (batch[1] != 0).sum()
    return nn.CrossEntropyLoss(reduction=told["reduction"]), told["reduction"]


def train(told: dict[str, Any]) -> dict[str, Any]:
    # What is sent at once is small here, so that there is more than one of it.
    settings: Any = tree_sum
    settings._FIRST_BUCKET, settings._BUCKET, settings._SMALL = told["buckets"]
    manual_seed(told["seed"])
    model = model_of(told)
    optimizer = OPTIMIZERS[told["optimizer"]](model.parameters())
    scaled = told["spec"] == "cpu:fp16"
    given = {"scaler": GradScaler("cpu", init_scale=2.0**18, growth_interval=4)} if scaled else {}
    loss_fn, reduction = loss_of(told)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        loss_fn,
        backend=backends.get(told["spec"], **given),
        deterministic=True,
        gradient_accumulation_steps=told["window"],
        max_norm=told["max_norm"],
        shards=told["shards"],
        loss_reduction=reduction,
    )
    state: Any = trainer.state
    losses: list[str] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(float(state.output).hex())
    )
    trainer.run(DataLoader(data_of(told), told["batch"]), max_epochs=2)
    buffers = [buffer for _, buffer in model.named_buffers()]
    return {
        "digest": digest([model.state_dict(), optimizer.state_dict(), buffers]),
        "losses": losses,
        "skipped": state.skipped_steps,
    }
