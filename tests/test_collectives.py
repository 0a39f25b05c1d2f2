"""What crosses the mesh in each compiled step: the collectives of its HLO, how much they carry, in which loops."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.sharding import abstract, batch_sharding, batch_shards, constrainer, make_mesh, replicated, shardings_for
from lfjax.state import LMState, PPOState, RewardNorm, RewardState, ValueState
from lfjax.steps.ppo_experience import ppo_experience
from lfjax.steps.ppo_forward import PPOModels
from lfjax.steps.ppo_rollout import ppo_rollout
from lfjax.steps.ppo_update import ppo_update
from lfjax.steps.reward import reward_step
from lfjax.steps.sft import sft_step
from lfjax.types import Generation, PromptBatch, RewardBatch, Rollout, SftBatch

pytestmark = pytest.mark.xdist_group("mesh")
ROWS, LENGTH, WIDTH, VOCAB = 16, 128, 64, 5000  # VOCAB is no multiple of 128: padded to 5120
PROMPT = RESPONSE = LENGTH // 2
SIZE = {"vocab_size": VOCAB, "width": WIDTH, "layers": 1, "heads": 8, "context": 256, "vocab_multiple": 128}
FORMS = {
    "gpt2": presets.gpt2(**SIZE, mlp_width=256),
    "llama": presets.llama(**SIZE, kv_heads=4, mlp_width=192, tied=False),
}
TX = make_optimizer(1e-3, clip_norm=1.0)
COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*"
)


class Moved(NamedTuple):
    """One collective: its kind, the shapes that one device gets, and how many loops it runs in."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    loops: int

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))


def pinned(mesh):
    return constrainer(mesh)


def without_tables(mesh):
    """The constrainer, blind to parameters: what a model would get that only pins its activations."""
    constrain = constrainer(mesh)
    return lambda x, name: x if "/" in name else constrain(x, name)


@functools.cache
def collectives(step: str, form: str, shape: tuple[int, int, int], constraint=pinned) -> list[Moved]:
    mesh = make_mesh(*shape)
    lm = Transformer(FORMS[form], constrain=constraint(mesh))
    scorer = Transformer(dataclasses.replace(FORMS[form], num_labels=1), constrain=constraint(mesh))
    function, args, out = SETTINGS[step](lm, scorer, mesh)
    lowered = jax.jit(function, out_shardings=out).lower(*args)
    found = []
    for line in COLLECTIVE.finditer(lowered.compile().as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", line[1])
        name = re.search(r'op_name="([^"]*)"', line[0])
        sizes = tuple(tuple(map(int, filter(None, s.split(",")))) for s in shapes)
        found.append(Moved(line[2], sizes, name[1].count("while/body") if name else 0))
    return found


def on(mesh, tree):
    return abstract(tree, shardings_for(tree, mesh))


def params_of(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def state_of(kind, model):
    return jax.eval_shape(lambda params: kind.create(params, TX), params_of(model))


def key_on(mesh):
    return abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))


def batch_of(kind, mesh, **shapes):
    """A batch of `kind`; a field is (dtype, shape after the rows)."""
    leaves = {
        n: jax.ShapeDtypeStruct((ROWS, *s), dtype, sharding=batch_sharding(mesh)) for n, (dtype, *s) in shapes.items()
    }
    return kind(**leaves)


INT, BOOL, FLOAT = jnp.int32, jnp.bool_, jnp.float32
PROMPTS = {"prompts": (INT, PROMPT), "prompt_mask": (BOOL, PROMPT)}
PER_TOKEN = ("sampled_logprobs", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def sft(lm, scorer, mesh):
    state = state_of(LMState, lm)
    batch = batch_of(SftBatch, mesh, tokens=(INT, LENGTH + 1), loss_mask=(BOOL, LENGTH), segment_ids=(INT, LENGTH))
    step = functools.partial(sft_step, model=lm, tx=TX, num_microbatches=2)
    return step, (on(mesh, state), batch, key_on(mesh)), (shardings_for(state, mesh), replicated(mesh))


def reward(lm, scorer, mesh):
    state, two = state_of(RewardState, scorer), 2
    tokens = {"tokens": (INT, two, LENGTH), "mask": (BOOL, two, LENGTH), "ratings": (FLOAT, two), "rated": (BOOL, two)}
    batch = batch_of(RewardBatch, mesh, **tokens, ranks=(INT, two), ranked=(BOOL, two), margin=(FLOAT,))
    step = functools.partial(reward_step, model=scorer, tx=TX)
    return step, (on(mesh, state), batch, key_on(mesh)), (shardings_for(state, mesh), replicated(mesh))


def rollout(lm, scorer, mesh):
    batch = batch_of(PromptBatch, mesh, tokens=(INT, PROMPT), mask=(BOOL, PROMPT), row_ids=(INT,))
    step = functools.partial(ppo_rollout, model=lm, eos_ids=(2,), max_new_tokens=RESPONSE)
    return step, (on(mesh, params_of(lm)), batch, key_on(mesh)), batch_sharding(mesh)


def experience(lm, scorer, mesh):
    tokens = {"tokens": (INT, RESPONSE), "mask": (BOOL, RESPONSE), "logprobs": (FLOAT, RESPONSE)}
    written = batch_of(Generation, mesh, **tokens, **PROMPTS)
    scores = jax.ShapeDtypeStruct((ROWS,), FLOAT, sharding=batch_sharding(mesh))
    params = [on(mesh, params_of(model)) for model in (lm, scorer, lm)]
    step = functools.partial(ppo_experience, models=PPOModels(lm, scorer), eos_ids=(2,), kl_coef=0.1, minibatches=2)
    return step, (*params, written, scores), batch_sharding(mesh)


def update(lm, scorer, mesh):
    scalar = jax.ShapeDtypeStruct((), FLOAT)
    state = PPOState(
        policy=state_of(LMState, lm),
        value=state_of(ValueState, scorer),
        kl_coef=scalar,
        reward_norm=RewardNorm(scalar, scalar),
        step=jax.ShapeDtypeStruct((), INT),
    )
    rows = {"responses": (INT, RESPONSE), "mask": (BOOL, RESPONSE), **{name: (FLOAT, RESPONSE) for name in PER_TOKEN}}
    batch = batch_of(Rollout, mesh, **PROMPTS, **rows, scores=(FLOAT,), raw_scores=(FLOAT,), ended=(BOOL,))
    step = functools.partial(ppo_update, models=PPOModels(lm, scorer), txs=(TX, TX), epochs=1, minibatches=2)
    return step, (on(mesh, state), batch, key_on(mesh)), (shardings_for(state, mesh), replicated(mesh))


SETTINGS = {f.__name__: f for f in (sft, reward, rollout, experience, update)}
TOKENS = {  # of a forward pass over all devices
    "sft": ROWS * LENGTH // 2,
    "reward": 2 * ROWS * LENGTH,
    "rollout": ROWS * PROMPT,
    "experience": ROWS * LENGTH // 2,
    "update": ROWS * LENGTH // 2,
}
# Loops around a forward pass: microbatches or minibatches.
LOOPS = {"sft": 1, "reward": 0, "rollout": 0, "experience": 1, "update": 1}
# Forward passes of networks with logits, and of those with scores.
NETWORKS = {"sft": (1, 0), "reward": (0, 1), "rollout": (1, 0), "experience": (2, 1), "update": (1, 1)}


def is_table(shape, form, mesh_shape) -> bool:
    return sorted(shape) == sorted((WIDTH, FORMS[form].padded_vocab // mesh_shape[2]))


def foreign(step, form, shape, constraint=pinned) -> list[Moved]:
    """Collectives larger than a device's own rows of the residual stream, a layer's matrix or a table."""
    own = TOKENS[step] // batch_shards(make_mesh(*shape)) * WIDTH
    largest = max(own, WIDTH * FORMS[form].mlp_width)
    moved = collectives(step, form, shape, constraint)
    return [m for m in moved if any(math.prod(s) > largest and not is_table(s, form, shape) for s in m.shapes)]


def table_gathers(step, form, shape, constraint=pinned) -> list[Moved]:
    """All-gathers of anything as long as a device's part of the vocabulary."""
    part = FORMS[form].padded_vocab // math.prod(shape)
    moved = collectives(step, form, shape, constraint)
    return [m for m in moved if m.kind == "all-gather" and any(s and max(s) >= part for s in m.shapes)]


def gathered_once(step, form, shape, constraint=pinned) -> bool:
    found = table_gathers(step, form, shape, constraint)
    with_logits, with_scores = NETWORKS[step]
    count = with_logits * (1 if FORMS[form].tied else 2) + with_scores
    return len(found) == count and all(m.loops == LOOPS[step] and is_table(m.shapes[0], form, shape) for m in found)


QUICK = [
    *((step, "gpt2", (2, 2, 2)) for step in SETTINGS),
    ("sft", "llama", (1, 2, 4)),
    ("rollout", "llama", (1, 2, 4)),
    ("sft", "gpt2", (1, 8, 1)),
]
ALL = [(step, form, shape) for step in SETTINGS for form in FORMS for shape in ((2, 2, 2), (1, 2, 4), (1, 8, 1))]
EACH = [pytest.param(*x, id="-".join(map(str, x)), marks=[] if x in QUICK else pytest.mark.slow) for x in ALL]


@pytest.mark.parametrize("step, form, shape", EACH)
def test_no_logits_and_no_foreign_activations_cross_the_mesh(step, form, shape):
    """A device's own rows, summed over tensor, and parameters are all that moves."""
    assert foreign(step, form, shape) == []


@pytest.mark.parametrize("step, form, shape", EACH)
def test_each_table_is_gathered_over_fsdp_once_a_pass_and_never_over_tensor(step, form, shape):
    """Not again for a chunk of the loss, nor for a sampled token."""
    assert gathered_once(step, form, shape), table_gathers(step, form, shape)


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_a_sampled_tokens_logits_cross_tensor_once(shape):
    """Tensor exchanges vocabulary for rows: [B/tensor V] a device, where gathering would bring [B V]."""
    mesh = make_mesh(*shape)
    moved = [m for m in collectives("rollout", "gpt2", shape) if m.kind == "all-to-all"]
    logits = ROWS // batch_shards(mesh) // shape[2] * FORMS["gpt2"].padded_vocab
    assert sorted(m.loops for m in moved) == [0, 1] and all(m.size == logits for m in moved), moved


def test_parameters_of_layers_are_gathered_too():
    """The test reads what it should: with fsdp, a layer's matrices come from its devices."""
    shapes = [m.shapes[0] for m in collectives("sft", "gpt2", (1, 8, 1)) if m.kind == "all-gather"]
    assert shapes.count((WIDTH, 256)) >= 1 and shapes.count((WIDTH, WIDTH)) >= 4


@pytest.mark.parametrize("step", ["sft", "rollout", pytest.param("update", marks=pytest.mark.slow)])
def test_the_tables_constraints_are_what_keeps_it_so(step):
    """Without them the same step gathers other devices' rows, or the vocabulary for each chunk or token."""
    at = step, "gpt2", (2, 2, 2), without_tables
    assert not gathered_once(*at)
    assert foreign(*at) or step == "rollout"
