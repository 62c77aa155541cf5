"""What the live monitor costs: ``python benchmarks/monitor.py`` trains a small model without it and with it."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tokendyn.diagnose import Monitor
from tokendyn.torch.models import MambaLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="steps of each arm")
    parser.add_argument("--width", type=int, default=96)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MambaLM(vocab_size=129, d_model=options.width, n_layer=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        ids = torch.randint(129, (8, 128))
        begun = time.perf_counter()
        optimizer.zero_grad()
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        return time.perf_counter() - begun

    for _ in range(3):
        step()
    monitor = Monitor(model)
    plain, watched = [], []
    for _ in range(options.steps):
        plain.append(step())
    for number in range(options.steps):
        begun = time.perf_counter()
        with monitor.step(number):
            step()
        watched.append(time.perf_counter() - begun)
    print(f"{options.steps} steps each; {statistics.median(plain) * 1e3:.1f} ms a step without the monitor (median)")
    print(f"watched {len(monitor.records)} steps; the monitor's own time {monitor.spent * 1e3:.1f} ms")
    print(f"of the time of its {options.steps} steps: {100 * monitor.spent / sum(watched):.2f} %")
    ratio = statistics.median(watched) / statistics.median(plain)
    print(f"median step with it over without: {100 * (ratio - 1):+.2f} % (the machine's noise included)")


if __name__ == "__main__":
    main()
