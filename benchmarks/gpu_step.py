"""Our training step on a GPU beside the same loop written by hand, and pytorch-ignite's.

Run ``python benchmarks/gpu_step.py`` on a machine with an NVIDIA GPU; ``--device cpu`` is a dry run
of the same code. A transformer of some 100 million parameters learns to predict the next token, in
fp32, in fp16 with a loss scaler and in bf16. All take turns, round by round, in one process, with
the same model, data and optimizer; who begins changes from round to round. A round is timed by CUDA
events around all of its steps, with the device idle before, so that what is taken is the time of
the stream that trains. The ratio is the median over the rounds of ours over the one by hand.
`captured` is ours with capture=True, whose step is one CUDA graph: its ratio has no bound.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TARGET = 1.01

Batch = tuple[Tensor, Tensor]
# Trains over some batches; made once for each contestant, with a model of its own.
Training = Callable[[list[Batch]], object]


class Size(NamedTuple):
    """The model and the work of a step."""

    width: int
    layers: int
    vocabulary: int
    batch: int
    sequence: int


# The large one is the default on a GPU, which it keeps busy. What a step of the small one takes is
# the launching of its kernels: it shows what a graph saves.
SIZES = {
    "large": Size(width=1024, layers=8, vocabulary=16384, batch=32, sequence=256),
    "small": Size(width=128, layers=2, vocabulary=512, batch=8, sequence=32),
}

# Of each precision: our spec on each kind of device, and what autocast computes in.
PRECISIONS: dict[str, tuple[dict[str, str], torch.dtype | None]] = {
    "fp32": ({"cuda": "cuda", "cpu": "cpu"}, None),
    "fp16": ({"cuda": "cuda-amp", "cpu": "cpu:fp16"}, torch.float16),
    "bf16": ({"cuda": "cuda-amp:bf16", "cpu": "cpu:bf16"}, torch.bfloat16),
}


class Transformer(nn.Module):
    """Predicts each next token.

    Args:
        size: its size.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            size.width,
            size.width // 64,
            4 * size.width,
            dropout=0.1,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(size.sequence)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give each next token's scores: (batch, vocabulary, sequence) of (batch, sequence)."""
        hidden = self.encoder(self.embedding(tokens), mask=self.mask, is_causal=True)
        scores: Tensor = self.head(hidden).transpose(1, 2)
        return scores


def make(
    size: Size, device: str, *, capturable: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Transformer(size).to(device)
    told = {"fused": True, "capturable": capturable}
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, **told)


def make_data(size: Size, count: int, device: str) -> list[Batch]:
    """Give batches in the host's memory, pinned where the device copies from it."""
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.sequence + 1)
    data: list[Batch] = []
    for _ in range(count):
        tokens = torch.randint(size.vocabulary, shape, generator=generator)
        pair = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        data.append((pair[0].pin_memory(), pair[1].pin_memory()) if device == "cuda" else pair)
    return data


def by_hand(size: Size, device: str, precision: str) -> Training:
    model, optimizer = make(size, device)
    dtype = PRECISIONS[precision][1]
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def train(data: list[Batch]) -> Tensor:
        model.train()
        output = torch.zeros(())
        for x, y in data:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            with nullcontext() if dtype is None else torch.autocast(device, dtype):
                loss = nn.functional.cross_entropy(model(x), y)
            if scaler.is_enabled():
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            output = loss.detach()
        return output

    return train


def ours(size: Size, device: str, precision: str) -> Training:
    from crosstrain.engine import create_supervised_trainer

    model, optimizer = make(size, device)
    spec = PRECISIONS[precision][0][device]
    loss_fn = nn.functional.cross_entropy
    return create_supervised_trainer(model, optimizer, loss_fn, backend=spec).run


def captured(size: Size, device: str, precision: str) -> Training:
    from crosstrain.engine import create_supervised_trainer

    model, optimizer = make(size, device, capturable=True)
    spec = PRECISIONS[precision][0][device]
    loss_fn = nn.functional.cross_entropy
    trainer = create_supervised_trainer(model, optimizer, loss_fn, backend=spec, capture=True)
    return trainer.run


def ignite(size: Size, device: str, precision: str) -> Training:
    from ignite.engine import create_supervised_trainer

    model, optimizer = make(size, device)
    mixed: dict[str, Any] = {"amp_mode": "amp", "scaler": True} if precision == "fp16" else {}
    loss_fn = nn.functional.cross_entropy
    trainer = create_supervised_trainer(
        model,
        optimizer,
        loss_fn,
        device=device,
        non_blocking=True,
        # By default it reads the loss in every step, which waits for the device.
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        **mixed,
    )
    return trainer.run


def contestants(device: str, precision: str) -> dict[str, Callable[..., Training]]:
    """Give those that can take part, and print why others cannot."""
    found: dict[str, Callable[..., Training]] = {"by hand": by_hand, "crosstrain": ours}
    if device == "cuda":
        found["captured"] = captured
    else:
        print("captured: the CPU has no graphs; left out.")
    try:
        importlib.metadata.version("pytorch-ignite")
    except importlib.metadata.PackageNotFoundError:
        print("ignite: not installed; left out. `pip install 'crosstrain[bench]'` installs it.")
        return found
    if precision == "bf16":
        print("ignite: its autocast has no bf16; left out.")
    elif precision == "fp16" and device != "cuda":
        print("ignite: its autocast is CUDA's; left out.")
    else:
        found["ignite"] = ignite
    return found


def milliseconds(training: Training, data: list[Batch], device: str) -> float:
    """Give the time of a step."""
    if device == "cuda":
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        training(data)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / len(data)
    start = time.perf_counter()
    training(data)
    return (time.perf_counter() - start) / len(data) * 1e3


def measure(
    device: str, precision: str, size: Size, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Give the milliseconds of a step of each contestant in each round."""
    data = make_data(size, steps, device)
    trainings = {
        name: start(size, device, precision)
        for name, start in contestants(device, precision).items()
    }
    for training in trainings.values():
        training(data[: max(3, steps // 4)])  # warms up: kernels are chosen, memory is taken
    names = list(trainings)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(milliseconds(trainings[name], data, device))
    return times


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    pairs = zip(times[name], times["by hand"], strict=True)
    return [one / base for one, base in pairs]


def report(precision: str, times: dict[str, list[float]]) -> None:
    print(
        f"\n{precision:<12}{'ms a step':>12}{'least':>10}{'over by hand':>15}{'half of rounds':>18}"
    )
    for name, found in times.items():
        each = ratios(times, name)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        print(
            f"{name:<12}{statistics.median(found):>12.3f}{min(found):>10.3f}"
            f"{statistics.median(each):>15.4f}{f'{low:.4f} to {high:.4f}':>18}"
        )


def describe(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, help="default: large with cuda, small with cpu")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (default 20)")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {TARGET}")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_step: no CUDA device; --device cpu is a dry run", file=sys.stderr)
        return 2
    precisions = options.precisions.split(",")
    if unknown := sorted(set(precisions) - set(PRECISIONS)):
        print(f"gpu_step: no precisions {unknown}; there are {list(PRECISIONS)}", file=sys.stderr)
        return 2
    size = SIZES[options.size or {"cuda": "large", "cpu": "small"}[options.device]]
    parameters = sum(weight.numel() for weight in make(size, "cpu")[0].parameters())
    print(describe(options.device))
    print(f"{parameters / 1e6:.1f} million parameters, {size}")
    found: dict[str, dict[str, list[float]]] = {}
    for precision in precisions:
        found[precision] = measure(options.device, precision, size, options.steps, options.rounds)
        report(precision, found[precision])
    middle = {name: statistics.median(ratios(times, "crosstrain")) for name, times in found.items()}
    worst = max(middle.values())
    if options.json:
        content = {"device": describe(options.device), "size": size._asdict(), "ratios": middle}
        options.json.write_text(json.dumps(content | {"milliseconds": found}, indent=1) + "\n")
    met = worst <= TARGET
    print(
        f"\ncrosstrain over by hand: at most {worst:.4f}; target {TARGET}: "
        f"{'met' if met else 'missed'}"
    )
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
