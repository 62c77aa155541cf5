"""JAX on two devices, which a CPU is told to be: data-parallel training, and shard_map."""

from __future__ import annotations

import os
import subprocess
import sys

TWO_DEVICES = """
import warnings
warnings.simplefilter("error")
import functools
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
import tokendyn
from tokendyn.backends.jax.models import MambaVision
from tokendyn.backends.jax.ops import _scan_pallas, _engines
from tokendyn.experiments.imagenet._jax import Training

devices = jax.devices()
assert len(devices) == 2
rng = np.random.default_rng(0)

# The scan, divided over the batch and over the channels, with its gradients.
def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

arguments = (normal(2, 4, 9), normal(2, 4, 9), -jnp.exp(normal(4, 3)), normal(2, 3, 9), normal(2, 3, 9))
small = _scan_pallas.Tiling(chunk=4, tile=2, elements=4, interpret=True)
def plain(u, delta, A, B, C):
    return tokendyn.selective_scan(u, delta, A, B, C, delta_softplus=True)
def kernels(u, delta, A, B, C):
    return _scan_pallas.run(tiling=small, u=u, delta=delta, A=A, B=B, C=C, delta_softplus=True)[0]
def loss(scan, *arguments):
    return jnp.sin(scan(*arguments)).sum()
want = jax.jit(jax.value_and_grad(functools.partial(loss, plain), range(5)))(*arguments)
mesh = Mesh(np.array(devices), ("both",))
sequences = (P("both"), P("both"), P(), P("both"), P("both"))
channels = (P(None, "both"), P(None, "both"), P("both"), P(), P())
for scan, specs in ((plain, channels), (kernels, sequences)):
    divided = jax.shard_map(scan, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=scan is plain)
    got = jax.jit(jax.value_and_grad(functools.partial(loss, divided), range(5)))(*arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)

# XLA cannot divide a kernel, so outside of shard_map "auto" leaves it to XLA; inside it need not.
seen = []
def look(u):
    seen.append(_engines.split_by_the_compiler(u))
    return u
jax.jit(look)(arguments[0])
jax.jit(jax.shard_map(look, mesh=mesh, in_specs=P("both"), out_specs=P("both")))(arguments[0])
assert seen == [True, False]

# Training: two updates on one device, and on two with half a batch each.
batches = [(rng.integers(0, 256, (4, 8, 8, 3), np.uint8), rng.integers(0, 5, 4, np.int32)) for _ in range(2)]
def trained(devices):
    model = MambaVision(
        dims=(4, 6, 8, 8), in_dim=4, depths=(1, 1, 1, 1), num_heads=(2, 2), window_size=(2, 2), num_classes=5,
        stem_stride=2, downsample=(True, False, False), drop_path_rate=0.0, order="softsort", rngs=nnx.Rngs(0),
    )
    training = Training(model, optax.sgd(0.1), devices)
    losses = [float(training.step(batch)) for batch in batches]
    return losses, jax.tree.map(np.asarray, training.state[:2]), training
one, two = trained(devices[:1]), trained(devices)
assert one[0][0] != one[0][1]
np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
leaves = jax.tree.leaves(two[2].state[0])
assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 2 for leaf in leaves)
statistics = [jax.tree.leaves(nnx.filter_state(found[1][1], nnx.BatchStat)) for found in (one, two)]
for a, b in zip(*statistics, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # of the whole batch, not of each half
"""


def test_two_devices_compute_what_one_does() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
