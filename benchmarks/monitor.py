"""What the live monitor costs on the clock: ``python benchmarks/monitor.py``.

Steps of a training are taken in turn without the monitor and watched, so that a machine that grows slower meanwhile is
slower for both: what watching costs on the clock, beside the monitor's own account of it. Then steps with the default
budget: their share of the time by that account, corrected by what the clock said.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tokendyn.diagnose import Monitor
from tokendyn.torch.models import MambaLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps, one of them watched")
    parser.add_argument("--steps", type=int, default=60, help="steps with the default budget")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MambaLM(vocab_size=129, d_model=options.width, n_layer=options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(129, (options.batch, options.length))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    for _ in range(3):
        step()
    always = Monitor(model, budget=1.0)
    plain, watched = [], []
    for number in range(options.rounds):
        begun = time.perf_counter()
        step()
        between = time.perf_counter()
        with always.step(number):
            step()
        plain.append(between - begun)
        watched.append(time.perf_counter() - between)
    longer = [w - p for w, p in zip(watched, plain, strict=True)]
    low, clock, high = statistics.quantiles(longer, n=4)
    own = always.spent / len(always.records)
    print(f"width {options.width}, {options.layers} layers, {options.batch} x {options.length} tokens")
    print(f"a step without: {statistics.median(plain) * 1e3:.1f} ms (median of {options.rounds})")
    print(
        f"watched: longer by {clock * 1e3:.1f} ms on the clock (median; quartiles {low * 1e3:.1f} to {high * 1e3:.1f})"
    )
    print(f"the monitor's own account of a watched step: {own * 1e3:.1f} ms")
    default = Monitor(model)
    for number in range(options.steps):
        with default.step(number):
            step()
    share = default.share
    print(
        f"default budget: {len(default.records)} of {options.steps} steps watched, {100 * share:.2f} % by its account"
    )
    print(f"on the clock, at the ratio above: {100 * share * clock / own:.2f} %")


if __name__ == "__main__":
    main()
