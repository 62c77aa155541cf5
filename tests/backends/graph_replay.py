"""A CUDA graph of a step gives what the step gives: shared by the tests of the GPU engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def expect_replay(step: Callable[[], Sequence[torch.Tensor]], eager: Sequence[torch.Tensor]) -> None:
    """``step``, captured in a CUDA graph and replayed, gives the bits of ``eager``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
