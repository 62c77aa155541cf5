"""The CUDA kernels of the selective scan against the spec.

On a GPU they run there; elsewhere a C++ compiler builds them for the CPU (``cuda_emulator.hpp``), with small sizes.
Everything that they allocate is filled with NaN first, so that an element which no kernel writes shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tokendyn._tolerances import tolerance
from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_plan import CLUSTERS_FROM
from tokendyn.backends.torch.ops import _scan_cuda

from . import cuda_emulator
from .scan_cases import CASES as SHARED
from .scan_cases import DEVICE, arguments, by_spec, check, check_apart, error, evaluate, tensors

if DEVICE == "cpu" and cuda_emulator.COMPILER is None:
    pytest.skip("neither a GPU nor a C++ compiler to build the kernels for the CPU", allow_module_level=True)

#: Beside the shared cases: several chunks, odd and whole 16-byte runs, one, two, four and eight lanes a channel.
CASES = SHARED | {
    "four lanes": {"b": 2, "d": 37, "L": 140, "N": 13},
    "many sequences": {"b": 19, "d": 3, "L": 5, "N": 2},
    "whole runs": {"b": 1, "d": 40, "L": 136, "N": 16, "without": ("z",)},
    "half runs": {"b": 2, "d": 21, "L": 76, "N": 8},
    "whole runs, channels last": {"b": 1, "d": 40, "L": 70, "N": 16, "last": True, "without": ("z",)},
    "two lanes, packed and padded": {"b": 2, "d": 16, "L": 100, "N": 8, "packed": True, "padded": True},
    "scalar A, spans of 64": {"b": 1, "d": 19, "L": 40, "N": 5, "scalar": True},
    "scalar A, whole runs": {"b": 2, "d": 40, "L": 136, "N": 13, "scalar": True, "without": ("z",)},
    "scalar A, odd rows": {"b": 1, "d": 37, "L": 151, "N": 16, "scalar": True},
    "scalar A, channels last": {"b": 1, "d": 40, "L": 70, "N": 16, "scalar": True, "last": True},
    "scalar A, channels last, odd": {"b": 1, "d": 38, "L": 70, "N": 5, "scalar": True, "last": True},
    "scalar A, wide": {"b": 1, "d": 20, "L": 260, "N": 30, "scalar": True, "packed": True, "padded": True},
    "scalar A, decays of all sizes": {"b": 1, "d": 18, "L": 40, "N": 5, "scalar": True, "scale": 8.0},
    "scalar A, huge steps": {"b": 1, "d": 18, "L": 40, "N": 5, "scalar": True, "scale": 1e3},
    "scalar A, tiny steps": {"b": 1, "d": 18, "L": 40, "N": 5, "scalar": True, "scale": 1e-6},
}
RUNS = [
    ("one token", "float32"),
    ("plain", "float16"),
    ("all options, two blocks of channels", "bfloat16"),
    ("blocks of states", "float32"),
    ("groups", "float32"),
    ("many sequences", "float32"),
    ("four lanes", "bfloat16"),
    ("four lanes", "float32"),
    ("whole runs", "bfloat16"),
    ("half runs", "bfloat16"),
    ("half runs", "float32"),
    ("whole runs, channels last", "bfloat16"),
    ("two lanes, packed and padded", "float32"),
    ("scalar A, spans of 64", "float32"),
    ("scalar A, whole runs", "bfloat16"),
    ("scalar A, odd rows", "float32"),
    ("scalar A, odd rows", "float16"),
    ("scalar A, channels last", "bfloat16"),
    ("scalar A, channels last", "float32"),
    ("scalar A, channels last, odd", "float16"),
    ("scalar A, wide", "float32"),
    ("scalar A, decays of all sizes", "float32"),
    ("scalar A, huge steps", "float32"),
    ("scalar A, tiny steps", "float32"),
    ("scalar A, packed and padded", "float32"),
    ("large steps", "float32"),
    ("small steps", "float32"),
    ("scalar A, large steps", "float32"),
]


@pytest.fixture(autouse=True)
def _engine(monkeypatch):
    """Off a GPU kernels run emulated."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_scan_cuda, "launch", cuda_emulator.launch)


@pytest.fixture
def _in_segments(monkeypatch):
    """Sequences are cut, and blocks of channels add dB and dC to one copy in turn."""
    monkeypatch.setattr(_scan_cuda_layout, "BLOCKS_A_PROCESSOR", {"general": 1000, "scalar": 1000})
    monkeypatch.setattr(_scan_cuda_layout, "PARTS", 1)
    for costs in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(_scan_cuda_layout, costs, _scan_cuda_layout.Costs(0.0, 0.0, 0.0, 0.0, 0.0))
    _scan_cuda_layout.layout.cache_clear()
    yield
    _scan_cuda_layout.layout.cache_clear()


@pytest.fixture
def _few_states(monkeypatch):
    """States are kept before every second chunk, as they are in long sequences before every fourth."""
    monkeypatch.setattr(_scan_cuda_layout, "KEPT", 2)
    monkeypatch.setattr(_scan_cuda_layout, "LONG", 1)
    _scan_cuda_layout.layout.cache_clear()
    yield
    _scan_cuda_layout.layout.cache_clear()


@pytest.fixture
def _in_clusters(monkeypatch):
    """Blocks of channels add dB and dC in each other's shared memory; on a GPU they do where it can."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_scan_cuda, "_gpu", lambda device: (1, CLUSTERS_FROM))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=[f"{n}-{d}" for n, d in RUNS])
def test_kernels_agree_with_the_spec(name, dtype):
    options = dict(CASES[name])
    check(_scan_cuda.run, arguments(name, **options), getattr(torch, dtype), options.get("last", False))


@pytest.mark.usefixtures("poisoned", "_in_segments", "_few_states")
@pytest.mark.parametrize("name", ["four lanes", "two lanes, packed and padded", "scalar A, odd rows", "scalar A, wide"])
def test_sequences_in_segments_agree_with_the_spec(name):
    check(_scan_cuda.run, arguments(name, **CASES[name]), torch.float32)


@pytest.mark.usefixtures("_in_segments")
@pytest.mark.parametrize("scalar", [False, True])
def test_a_state_of_0_survives_growth_beyond_float32(scalar):
    values = arguments("growth", 1, 3, 420, 4, scalar=scalar, scale=2.0, without=("z", "initial_state"))
    values["A"] = -values["A"]
    values["u"][..., :400], values["delta"][..., 400:] = 0.0, 0.1
    want = by_spec(values, torch.float32)
    y, last = _scan_cuda.run(**tensors(values, torch.float32, False), return_last_state=True)
    bound = tolerance("selective_scan", "float32").values
    assert error(y.detach(), want["y"]) <= bound
    assert error(last.detach(), want["last_state"]) <= bound


#: Channels of three blocks, which are one cluster, and of four.
WHOLE: dict[str, Any] = {"b": 2, "d": 70, "L": 76, "N": 9, "G": 1}
CLUSTERED: dict[str, Any] = {"b": 1, "d": 128, "L": 140, "N": 16, "without": ("z",)}


@pytest.mark.usefixtures("poisoned", "_in_clusters")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cluster_of_all_channels_agrees_with_the_spec(dtype):
    check(_scan_cuda.run, arguments("whole", **WHOLE), getattr(torch, dtype))


@pytest.mark.usefixtures("poisoned", "_in_clusters", "_in_segments", "_few_states")
@pytest.mark.parametrize("packed", [False, True])
def test_clusters_one_after_the_other_agree_with_the_spec(packed, monkeypatch):
    monkeypatch.setattr(_scan_cuda_layout, "CLUSTERS", (2,))
    check(_scan_cuda.run, arguments("clusters", **CLUSTERED, packed=packed, padded=packed), torch.float32)


#: What `check` says of values that are wrong.
WRONG_VALUES = r"exceeds|not finite"
#: What is done to the general kernels' barriers of clusters, and what is then found: values, or what no GPU would bear.
SUM = "        add_to_part(s.starts, p, block, part, chained == 0, begin);\n"
BARRIERS = {
    "sums are read before they are there": (
        f"        cluster_wait();\n{SUM}",
        f"{SUM}        cluster_wait();\n",
        WRONG_VALUES,
    ),
    "sums are given up before they are read": (
        f"{SUM}        __syncthreads();\n        cluster_arrive();\n",
        f"        cluster_arrive();\n{SUM}        __syncthreads();\n",
        WRONG_VALUES,
    ),
    "a block ends before its sums are read": (
        "    cluster_wait();  // no block ends",
        "    // no block ends",
        WRONG_VALUES,
    ),
    "a wait is missing": ("if (chunk < (block.last - 1) / CHUNK) cluster_wait();", "", "twice without a wait"),
    "an arrival is missing": (
        "        cluster_arrive();  // this block's",
        "        // this block's",
        "without an arrival",
    ),
    "one thread passes a barrier by": (
        "        __syncthreads();\n        cluster_arrive();  // this block's",
        "        if (threadIdx.x) __syncthreads();\n        cluster_arrive();  // this block's",
        "no thread can go on",
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="faults are planted in what the CPU runs")
@pytest.mark.usefixtures("poisoned", "_in_clusters", "_few_states")
@pytest.mark.parametrize("which", BARRIERS)
def test_faults_in_barriers_of_clusters_are_found(which, monkeypatch):
    expect_fault(monkeypatch, *BARRIERS[which], arguments("whole", **WHOLE))


#: What is done to the turns in which clusters add to a copy of dB and dC, and what is then found.
TURNS = {
    "clusters do not number themselves": (
        "index = load_from(0, &s.index) * CLUSTER + cluster_rank();",
        "index = blockIdx.x;",
        "a block waits for one",
    ),
    "nothing says that a turn is over": (
        "write_flag(flags + chunk * CLUSTER, chained + 1);",
        "{}",
        "a block waits for one",
    ),
    "a turn is not waited for": (
        "if (threadIdx.x == 0) await_flag(flags + chunk * CLUSTER, chained);",
        "",
        "did not wait for its turn",
    ),
    "blocks share flags": (
        "(unsigned*)p.counters + 1 + part_index * p.chunks * KEPT * CLUSTER + cluster_rank();",
        "(unsigned*)p.counters + 1;",
        "share it",
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="faults are planted in what the CPU runs")
@pytest.mark.usefixtures("_in_clusters", "_in_segments", "_few_states")
@pytest.mark.parametrize("which", TURNS)
def test_faults_in_turns_of_clusters_are_found(which, monkeypatch):
    monkeypatch.setattr(_scan_cuda_layout, "CLUSTERS", (2,))
    expect_fault(monkeypatch, *TURNS[which], arguments("clusters", **CLUSTERED))


def expect_fault(monkeypatch, good, bad, found, values, kernels="general", dtype=torch.float32, last=False):
    """With ``bad`` in the place of ``good``, comparing with the spec ends in a message that has ``found``."""
    plant(monkeypatch, kernels, good, bad)
    with pytest.raises(AssertionError, match=found):
        check(_scan_cuda.run, values, dtype, last)


def plant(monkeypatch, kernels, good, bad):
    source = _scan_cuda_layout.source(kernels)
    assert source.count(good) == 1
    monkeypatch.setattr(_scan_cuda_layout, "source", lambda _: source.replace(good, bad))


#: What is planted, and the scale of steps: with either, results are the spec's.
WALKS = {
    "every chunk is walked through": ("return total[0] <= LIMIT", "return total[0] < 0.0f", 1.0),
    "no ordinary chunk is, in tiles without all channels": (
        "whole[0] = whole[1] = 1.0f;",
        "whole[0] = whole[1] = NAN;",
        0.1,
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="it is planted in what the CPU runs")
@pytest.mark.parametrize("which", WALKS)
def test_walks_token_by_token(which, monkeypatch):
    good, bad, scale = WALKS[which]
    plant(monkeypatch, "scalar", good, bad)
    check(_scan_cuda.run, arguments("walks", 1, 18, 40, 5, scalar=True, scale=scale), torch.float32)


@pytest.mark.parametrize("name", ["u", "delta"])
def test_scalar_A_what_is_not_a_number_reaches_the_tokens_after_it(name):
    given = tensors(arguments("NaN", 1, 3, 40, 5, scalar=True, without=("z",)), torch.float32, False)
    clean = _scan_cuda.run(**given)
    with torch.no_grad():
        given[name][0, 1, 20] = float("nan")
    y = _scan_cuda.run(**given).detach()
    assert torch.isnan(y[0, 1, 20:]).all()
    y[0, 1, 20:] = clean[0, 1, 20:]
    torch.testing.assert_close(y, clean)


@pytest.mark.parametrize("scalar", [False, True])
def test_padding_reaches_nothing(scalar):
    values = arguments("padding", 2, 16, 40, 8, packed=True, padded=True, scalar=scalar)
    clean = evaluate(_scan_cuda.run, tensors(values, torch.float32, False))
    for key in ("u", "delta", "z", "B", "C"):
        for batch, length in enumerate(values["lengths"]):
            values[key][batch, ..., length:] = np.nan
    dirty = evaluate(_scan_cuda.run, tensors(values, torch.float32, False))
    assert all(torch.equal(clean[key], dirty[key]) for key in clean)


@pytest.mark.parametrize("pieces", ["whole", "in segments"])
@pytest.mark.parametrize("scalar", [False, True])
def test_packed_sequences_are_apart_even_in_what_is_not_a_number(scalar, pieces, request):
    if pieces == "in segments":
        request.getfixturevalue("_in_segments")
    check_apart(_scan_cuda.run, arguments("apart", 1, 9, 300, 5, scalar=scalar), 173)


def test_mixed_dtypes_are_computed_in_float32():
    values = arguments("mixed", 1, 3, 10, 2)
    given = tensors(values, torch.float32, False)
    given["u"] = given["u"].detach().bfloat16().requires_grad_()
    y = _scan_cuda.run(**given)
    (du,) = torch.autograd.grad(y.float().sum(), given["u"])
    assert y.dtype == du.dtype == torch.bfloat16
    want = _scan_cuda.run(**{**given, "u": given["u"].detach().float()})
    torch.testing.assert_close(y, want.bfloat16())


@pytest.mark.parametrize("scalar", [False, True])
def test_a_division_leaves_nothing_out(scalar):
    rng = np.random.default_rng(0)
    for _ in range(500):
        groups, length, batch = (int(np.exp(rng.uniform(0, top))) for top in (2, 11, 6))
        rows, state, processors = (
            int(np.exp(rng.uniform(0, 9))),
            int(rng.integers(1, 33)),
            int(rng.choice([1, 108, 132])),
        )
        backward, clusters = (bool(half < 0.5) for half in rng.random(2))
        found = _scan_cuda_layout.layout(
            scalar, batch, groups, rows, length, state, processors, 4 if scalar else 3, clusters, backward
        )
        assert found.padded >= state
        assert found.chunks * found.chunk >= length > (found.chunks - 1) * found.chunk
        assert found.tiles * found.block_rows >= rows > (found.tiles - 1) * found.block_rows
        assert found.segments * found.segment_tokens >= length > (found.segments - 1) * found.segment_tokens
        assert found.parts <= found.copies
        assert found.parts * found.chain * found.cluster >= found.tiles
        assert found.tiles % found.cluster == 0
        assert found.shared_bytes(gated=True)[backward] <= 163 << 10


#: A fault, and a case that must notice it.
FAULTS = {
    "dC of the token before": ("dout[i] * before[k + 1][j]", "dout[i] * before[k][j]", "blocks of states"),
    "a reset without effect backward": (
        "e[j] = cut(t + k) ? 0.0f : decay[k][j] * g;",
        "e[j] = decay[k][j] * g;",
        "two lanes, packed and padded",
    ),
    "one warp's channels not added": ("warp < WARPS; warp++", "warp < WARPS - 1; warp++", "four lanes"),
    "a state kept too late": ("start % BETWEEN == 0", "start % BETWEEN == HALF", "four lanes"),
    "half a chunk passed over": ("t < CHUNK && !lane.idle; t += 4) step_on", "t < HALF; t += 4) step_on", "four lanes"),
    "scalar A: nothing crosses a chunk's end": (
        "add_over_quad(through[h]) +",
        "0.0f +",
        "scalar A, spans of 64",
    ),
    "scalar A: the diagonal crosses its token": ("s < t ? operand(v)", "s <= t ? operand(v)", "scalar A, spans of 64"),
    "scalar A: weights that leave out a token's decay": (
        "source < t ? weight.v[h][i] * d : 1.0f",
        "source < t ? weight.v[h][i] : 1.0f",
        "scalar A, decays of all sizes",
    ),
    "scalar A: factors without a limit": (
        "return total[0] <= LIMIT",
        "return true || total[0] <= LIMIT",
        "scalar A, huge steps",
    ),
    "scalar A: a reset that does not cut states off": (
        "h = decay < 0.0f ? local : fmaf(decay, h, local);",
        "h = fmaf(fabsf(decay), h, local);",
        "scalar A, packed and padded",
    ),
    "scalar A: pieces with a channel's neighbour": (
        "place / 2 + place % 2 * 8",
        "place",
        "scalar A, channels last",
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="faults are planted in what the CPU runs")
@pytest.mark.usefixtures("_few_states")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    good, bad, name = FAULTS[fault]
    kernels, last = "scalar" if "scalar A" in name else "general", CASES[name].get("last", False)
    dtype = torch.bfloat16 if last else torch.float32
    expect_fault(monkeypatch, good, bad, WRONG_VALUES, arguments(name, **CASES[name]), kernels, dtype, last)


def test_operator_is_registered_rightly():
    given = tensors(arguments("opcheck", 1, 2, 4, 1), torch.float32, False)
    B, C = given["B"].unsqueeze(1), given["C"].unsqueeze(1)
    args = (given["u"], given["delta"], given["A"], B, C, given["D"], None, None, None, None, None, True, True, True)
    torch.library.opcheck(
        torch.ops.tokendyn.selective_scan_cuda.default, args, test_utils=("test_schema", "test_faketensor")
    )
