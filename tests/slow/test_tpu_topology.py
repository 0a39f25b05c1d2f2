"""The SFT step of a 1 B Llama form, compiled for a real TPU topology by TPU's own compiler; no TPU is needed.

`pip install 'jax[tpu]'` gives the compiler, in the version that fits; without it these tests skip.
"""

import functools
import importlib.util
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
TOPOLOGY, HBM = "v5p:2x2x2", 95e9  # 8 chips; bytes each
ROWS, LENGTH = 32, 2048
LLAMA_1B = presets.llama(
    vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, context=LENGTH, tied=True,
    dtype="bfloat16", remat="full", unroll=1, vocab_multiple=128,
)  # fmt: skip
COLLECTIVE = re.compile(r"= (\([^=]*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\(")


@functools.cache
def devices():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices


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


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_a_billion_parameters_fit_v5p_and_logits_stay_where_they_are(monkeypatch, compiler, shape):
    """A device's own rows of the residual stream, layers' matrices and its part of the table are all that moves."""
    mesh = make_mesh(*shape, devices=devices())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the code that a TPU would run
    compiled = lowered(mesh).compile()
    memory = compiled.memory_analysis()
    parameters = 1.2359e9  # float32 parameters and two moments, spread over fsdp and tensor
    state = 12 * parameters / (mesh.size / shape[0])
    assert state < memory.argument_size_in_bytes < 1.05 * state
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.5 * HBM
    own = ROWS // batch_shards(mesh) * LENGTH * LLAMA_1B.width
    table = LLAMA_1B.padded_vocab // shape[2] * LLAMA_1B.width
    sizes = []
    for types, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes += [(math.prod(map(int, s.split(","))), kind) for s in re.findall(r"\w+\[([\d,]+)\]", types)]
    assert sizes and all(size <= own or size == table for size, _ in sizes), sorted(set(sizes))[-5:]


def lowered(mesh):
    model, tx = Transformer(LLAMA_1B, constrain=constrainer(mesh)), make_optimizer(1e-4, clip_norm=1.0)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    state = jax.eval_shape(lambda p: LMState.create(p, tx), params)
    shardings = shardings_for(state, mesh)
    rows = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    batch = SftBatch(
        rows((ROWS, LENGTH + 1), jnp.int32), rows((ROWS, LENGTH), jnp.bool_), rows((ROWS, LENGTH), jnp.int32)
    )
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    out = shardings, replicated(mesh)
    step = functools.partial(sft_step, model=model, tx=tx, chunk_size=256)
    return jax.jit(step, out_shardings=out, donate_argnums=0).lower(abstract(state, shardings), batch, key)
