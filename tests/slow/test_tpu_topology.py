"""The SFT step of a 1 B Llama form, compiled for a real TPU topology by TPU's own compiler; no TPU is needed.

`pip install 'jax[tpu]'` gives the compiler, in the version that fits; without it these tests skip.
"""

import functools
import importlib.util
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.sharding import abstract, batch_sharding, batch_shards, constrainer, make_mesh, replicated, shardings_for
from lfjax.state import LMState
from lfjax.steps.sft import sft_step
from lfjax.types import SftBatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="no libtpu (pip install 'jax[tpu]'): nothing was compiled for a TPU",
    ),
]
HBM = 95e9  # bytes of a v5p chip
LENGTH = 2048
LLAMA_1B = presets.llama(
    vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, context=LENGTH, tied=True,
    dtype="bfloat16", remat="full", unroll=1, vocab_multiple=128,
)  # fmt: skip
COLLECTIVE = re.compile(r"= (\([^=]*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\(")


@functools.cache
def devices(topology):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.fixture
def compiler(monkeypatch):
    """jax as a TPU run has it; no cache, since a program for an absent device cannot be read back."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    changes = {"jax_default_matmul_precision": None, "jax_enable_compilation_cache": False}
    before = {name: getattr(jax.config, name) for name in changes}
    for settings in (changes, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is changes:
            yield


@pytest.mark.parametrize(
    "topology", ["v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x8", "v5e:4x4", "v5e:8x8", "v6e:2x4", "v6e:8x8"]
)
def test_every_mesh_of_powers_of_two_can_be_made_and_as_before_where_no_axis_has_to_be_split(compiler, topology):
    chips = devices(topology)
    sizes = [2**k for k in range(len(chips).bit_length())]
    for fsdp, tensor in itertools.product(sizes, sizes):
        if fsdp * tensor > len(chips):
            continue
        mesh = make_mesh(-1, fsdp, tensor, devices=chips)
        assert len(set(mesh.devices.flat)) == len(chips)
        try:
            expected = jax.make_mesh(mesh.devices.shape, mesh.axis_names, devices=chips)
        except NotImplementedError:
            continue
        assert (mesh.devices == expected.devices).all()


@pytest.mark.parametrize(
    "topology, shape",
    [("v5p:2x2x2", (1, 8, 1)), ("v5p:2x2x2", (2, 2, 2)), ("v5p:2x2x2", (1, 2, 4)), ("v5p:4x4x4", (8, 8, 1))],
    ids=str,
)
def test_a_billion_parameters_fit_v5p_and_logits_stay_where_they_are(monkeypatch, compiler, topology, shape):
    """A device's own rows of the residual stream, layers' matrices and its part of the table are all that moves."""
    mesh = make_mesh(*shape, devices=devices(topology))
    rows = 4 * mesh.size
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the code that a TPU would run
    compiled = lowered(mesh, rows).compile()
    memory = compiled.memory_analysis()
    parameters = 1.2359e9  # float32 parameters and two moments, spread over fsdp and tensor
    state = 12 * parameters / (mesh.size / shape[0])
    assert state < memory.argument_size_in_bytes < 1.05 * state
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.5 * HBM
    own = rows // batch_shards(mesh) * LENGTH * LLAMA_1B.width
    table = LLAMA_1B.padded_vocab // shape[2] * LLAMA_1B.width
    sizes = []
    for types, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes += [(math.prod(map(int, s.split(","))), kind) for s in re.findall(r"\w+\[([\d,]+)\]", types)]
    assert sizes and all(size <= own or size == table for size, _ in sizes), sorted(set(sizes))[-5:]


def lowered(mesh, count):
    model, tx = Transformer(LLAMA_1B, constrain=constrainer(mesh)), make_optimizer(1e-4, clip_norm=1.0)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    state = jax.eval_shape(lambda p: LMState.create(p, tx), params)
    shardings = shardings_for(state, mesh)
    rows = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    batch = SftBatch(
        rows((count, LENGTH + 1), jnp.int32), rows((count, LENGTH), jnp.bool_), rows((count, LENGTH), jnp.int32)
    )
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    out = shardings, replicated(mesh)
    step = functools.partial(sft_step, model=model, tx=tx, chunk_size=256)
    return jax.jit(step, out_shardings=out, donate_argnums=0).lower(abstract(state, shardings), batch, key)
