"""What a trace costs: a training with and without one, in one run, and the ratio of their times.

python benchmarks/trace_cost.py [--backend cpu] [--width 512] [--every-sync 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from crosstrain.backends import add_backend_argument
from crosstrain.ci import TraceRecorder
from crosstrain.engine import create_supervised_trainer, manual_seed


def seconds(
    backend: str, width: int, batch: int, iterations: int, trace: TraceRecorder | None
) -> float:
    """Returns how long a training takes, an iteration."""
    manual_seed(1)
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend=backend, deterministic=True
    )
    if trace is not None:
        trace.attach(trainer)
    data = [(torch.randn(batch, width), torch.randint(0, 10, (batch,)))] * iterations
    trainer.run(data[:2])
    started = time.perf_counter()
    trainer.run(data, max_epochs=1)
    # The last step is waited for.
    float(trainer.state.output)
    return (time.perf_counter() - started) / iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_backend_argument(parser)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--every-sync", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"without": [], "digests": [], "digests and norms": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeat):
            for name, found in times.items():
                path = Path(folder) / f"{name}{number}"
                recorder = TraceRecorder(path, args.every_sync, norms=name.endswith("norms"))
                trace = None if name == "without" else recorder
                found.append(seconds(args.backend, args.width, args.batch, args.iterations, trace))
    plain = statistics.median(times["without"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:<18} {median * 1e3:8.3f} ms an iteration, ratio {median / plain:.3f}")


if __name__ == "__main__":
    main()
