"""What crosses the mesh in a compiled training step: the collectives of its HLO, and how much they carry."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.sharding import (
    abstract,
    batch_sharding,
    batch_shards,
    constrainer,
    make_mesh,
    replicated,
    shardings_for,
)
from lfjax.state import LMState
from lfjax.steps.sft import sft_step
from lfjax.types import SftBatch

pytestmark = pytest.mark.xdist_group("mesh")
ROWS, LENGTH, WIDTH, VOCAB = 16, 128, 64, 5000
SHAPE = {"vocab_size": VOCAB, "width": WIDTH, "layers": 1, "heads": 8, "context": 256, "vocab_multiple": 128}
FORMS = {
    "gpt2": presets.gpt2(**SHAPE, mlp_width=256),
    "llama": presets.llama(**SHAPE, kv_heads=4, mlp_width=192, tied=False),
}
COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@functools.cache
def collectives(form: str, shape: tuple[int, int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape on one device) of every array that a collective of the SFT step gives."""
    mesh = make_mesh(*shape)
    model, tx = Transformer(FORMS[form], constrain=constrainer(mesh)), make_optimizer(1e-3, clip_norm=1.0)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    state = jax.eval_shape(lambda p: LMState.create(p, tx), params)
    shardings = shardings_for(state, mesh)
    rows = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    batch = SftBatch(
        rows((ROWS, LENGTH + 1), jnp.int32), rows((ROWS, LENGTH), jnp.bool_), rows((ROWS, LENGTH), jnp.int32)
    )
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = jax.jit(
        functools.partial(sft_step, model=model, tx=tx), out_shardings=(shardings, replicated(mesh)), donate_argnums=0
    )
    text = step.lower(abstract(state, shardings), batch, key).compile().as_text()
    found = []
    for types, kind in COLLECTIVE.findall(text):
        found += [(kind, tuple(map(int, filter(None, s.split(","))))) for s in re.findall(r"\w+\[([\d,]*)\]", types)]
    return found


ON_MESHES = pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (1, 8, 1)], ids=str)
OF_FORMS = pytest.mark.parametrize("form", FORMS)


@ON_MESHES
@OF_FORMS
def test_no_logits_and_no_foreign_activations_cross_the_mesh(form, shape):
    """A device's own rows, summed over tensor, are all that moves; logits and other devices' rows never do."""
    own = ROWS // batch_shards(make_mesh(*shape)) * LENGTH * WIDTH
    padded = FORMS[form].padded_vocab
    for kind, size in collectives(form, shape):
        table = sorted(size) in (sorted((WIDTH, padded)), sorted((WIDTH, padded // shape[2])))
        assert table or math.prod(size) <= max(own, WIDTH * 256), (kind, size)


@ON_MESHES
@OF_FORMS
def test_a_vocabulary_table_is_gathered_once_over_fsdp_and_never_over_tensor(form, shape):
    padded = FORMS[form].padded_vocab
    gathered = [size for kind, size in collectives(form, shape) if kind == "all-gather" and max(size) >= padded // 8]
    assert len(gathered) == (1 if FORMS[form].tied else 2)
    assert all(sorted(size) == sorted((WIDTH, padded // shape[2])) for size in gathered), gathered


def test_parameters_of_layers_are_gathered_too():
    """The test reads what it should: with fsdp, a layer's matrices come from its four devices."""
    kinds = [kind for kind, size in collectives("llama", (1, 8, 1)) if sorted(size) == [WIDTH, 192]]
    assert kinds.count("all-gather") >= 3
