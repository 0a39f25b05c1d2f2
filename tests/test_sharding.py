import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lfjax import cli
from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.sharding import (
    Step,
    abstract,
    batch_shards,
    constrainer,
    global_batch,
    jit_step,
    make_mesh,
    place,
    replicated,
    shardings_for,
    spec_for,
)
from lfjax.state import LMState, PPOState, RewardNorm, RewardState, ValueState
from lfjax.steps.ppo_experience import ppo_experience
from lfjax.steps.ppo_forward import PPOModels
from lfjax.steps.ppo_rollout import ppo_rollout
from lfjax.steps.ppo_update import ppo_update
from lfjax.steps.reward import reward_step
from lfjax.steps.sft import sft_step
from lfjax.types import leaf_name

pytestmark = pytest.mark.xdist_group("mesh")
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
on_meshes = pytest.mark.parametrize("shape", MESHES, ids=str)
KEY = jax.random.key(0)


def shape_of(mesh):
    return dict(mesh.shape)


@pytest.mark.parametrize(
    "sizes, expected",
    [((-1, 1, 1), (8, 1, 1)), ((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((2, 4, 1), (2, 4, 1))],
)
def test_one_axis_may_take_what_is_left(sizes, expected):
    assert shape_of(make_mesh(*sizes)) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))


def test_one_device_is_a_mesh_too():
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), r"data=3 x fsdp=1 x tensor=1 does not multiply to 8 devices"),
        ((-1, 3, 1), r"data=-1 x fsdp=3 x tensor=1 does not multiply to 8 devices"),
        ((-1, 16, 1), r"does not multiply to 8 devices"),
        ((-1, -1, 1), r"data, fsdp are all -1; only one"),
        ((0, 1, 1), r"config\.mesh\.data: 0; allowed: a positive size, or -1"),
        ((-1, 1, -2), r"config\.mesh\.tensor: -2; allowed"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_input_error(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made from: a device of a machine that is not here."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0


def torus(*bounds, kind="TPU v5"):
    places = [place[::-1] for place in np.ndindex(*bounds[::-1])]
    return [Chip(i, "tpu", kind, i // 4, place) for i, place in enumerate(places)]


@pytest.mark.parametrize("bounds, kind", [((4, 4, 4), "TPU v5"), ((2, 2, 4), "TPU v5"), ((8, 8, 1), "TPU v6 lite")])
def test_every_factorisation_of_a_torus_is_a_mesh_whose_tensor_axis_is_a_box_of_neighbours(bounds, kind):
    chips, unsplit = torus(*bounds, kind=kind), 0
    divisors = [k for k in range(1, len(chips) + 1) if len(chips) % k == 0]
    for fsdp, tensor in itertools.product(divisors, divisors):
        if len(chips) % (fsdp * tensor):
            continue
        mesh = make_mesh(-1, fsdp, tensor, devices=chips)
        assert shape_of(mesh) == {"data": len(chips) // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        assert set(mesh.devices.flat) == set(chips)
        for group in mesh.devices.reshape(-1, tensor):
            at = np.array([chip.coords for chip in group])
            assert np.prod(at.max(0) - at.min(0) + 1) == tensor
        try:
            expected = jax.make_mesh(mesh.devices.shape, mesh.axis_names, devices=chips)
        except NotImplementedError:
            continue
        assert (mesh.devices == expected.devices).all()
        unsplit += 1
    assert unsplit > 5


def test_gpus_of_several_hosts_are_in_process_order_and_several_slices_of_tpus_are_refused():
    gpus = [Chip(i, "gpu", "NVIDIA H100", i // 4, slice_index=i // 4) for i in range(8)]
    mesh = make_mesh(2, 1, 4, devices=gpus)
    assert [[chip.id for chip in row] for row in mesh.devices.reshape(2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    chips = [dataclasses.replace(chip, id=n, slice_index=n // 4) for n, chip in enumerate(torus(2, 2, 1) * 2)]
    with pytest.raises(InputError, match=r"config\.mesh: the devices are of 2 TPU slices"):
        make_mesh(-1, 4, devices=chips)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("embed/tokens", (32, 16), P("tensor", "fsdp")),
        ("embed/positions", (32, 16), P(None, "fsdp")),
        ("layers/attention/q", (2, 16, 4, 4), P(None, "fsdp", "tensor", None)),
        ("layers/attention/o", (2, 4, 4, 16), P(None, "tensor", None, "fsdp")),
        ("layers/attention/q_bias", (2, 4, 4), P(None, "tensor", None)),
        ("layers/mlp/gate", (2, 16, 32), P(None, "fsdp", "tensor")),
        ("layers/mlp/down", (2, 32, 16), P(None, "tensor", "fsdp")),
        ("unembed/kernel", (16, 32), P("fsdp", "tensor")),
        ("layers/norm1/scale", (2, 16), P()),
        ("head/kernel", (16, 1), P()),
        ("step", (), P()),
    ],
)
def test_default_rules_lay_out_every_kind_of_parameter(name, shape, expected):
    assert spec_for(name, shape, make_mesh(2, 2, 2)) == expected


def test_an_axis_that_does_not_divide_its_dimension_is_left_out():
    mesh = make_mesh(1, 2, 4)
    assert spec_for("layers/attention/k", (2, 16, 2, 4), mesh) == P(None, "fsdp", None, None)
    assert spec_for("embed/tokens", (30, 15), mesh) == P(None, None)


def test_a_leaf_of_another_rank_than_its_rules_is_replicated():
    """Factored second moments carry their parameter's name, but are vectors."""
    assert spec_for("opt_state/1/v_row/layers/mlp/up", (2, 16), make_mesh(2, 2, 2)) == P()


def test_the_first_matching_rule_wins_and_no_match_is_replicated():
    mesh = make_mesh(2, 2, 2)
    rules = ((r"special$", ("fsdp",)), (r"al$", ("tensor",)))
    assert spec_for("a/special", (8,), mesh, rules) == P("fsdp")
    assert spec_for("a/final", (8,), mesh, rules) == P("tensor")
    assert spec_for("a/other", (8,), mesh, rules) == P()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_optimiser_state_lies_as_its_parameters(name):
    mesh = make_mesh(2, 2, 2)
    params = jax.eval_shape(lambda: tiny.language_model(layers=2).init(KEY, jnp.zeros((1, 2), jnp.int32))["params"])
    state = jax.eval_shape(lambda p: LMState.create(p, make_optimizer(0.1, name=name)), params)
    found = jax.tree_util.tree_leaves_with_path(shardings_for(state, mesh))
    shapes = dict((leaf_name(p), x.shape) for p, x in jax.tree_util.tree_leaves_with_path(state))
    moments = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings_for(params, mesh)):
        parameter = leaf_name(path)
        shape = shapes[f"params/{parameter}"]
        for other, their in found:
            if leaf_name(other).endswith(parameter) and shapes[leaf_name(other)] == shape:
                assert their.spec == sharding.spec, leaf_name(other)
                moments += leaf_name(other).startswith("opt_state/")
    assert moments >= len(jax.tree.leaves(params))


def add(x, y):
    return {"sum": x["a"] + y, "twice": 2 * x["b"]}


def args(rows=4, dtype=np.float32):
    return {"a": np.ones((rows, 3), dtype), "b": np.float32(2.0)}, np.ones((rows, 3), dtype)


def test_a_step_compiles_once_for_each_declared_shape():
    step, before = jit_step(add, name="add"), Step.compiled.total()
    first = step.compile(*args())
    assert step.compile(*abstract(args())) is first
    step.compile(*args(8))
    assert Step.compiled.total() - before == 2 and len(step.programs) == 2
    for rows in (4, 8, 4):
        np.testing.assert_array_equal(step(*args(rows))["sum"], np.full((rows, 3), 2.0))
    assert Step.compiled.total() - before == 2


def test_a_shape_that_was_not_declared_names_the_leaf_and_both_shapes():
    step = jit_step(add, name="add")
    step.compile(*args())
    with pytest.raises(ValueError, match=r"step add: argument 0/a is float32\[5, 3\], compiled for float32\[4, 3\]"):
        step(*args(5))
    with pytest.raises(ValueError, match=r"0/a is float16\[4, 3\], compiled for float32\[4, 3\]"):
        step(*args(dtype=np.float16))
    x, y = args()
    with pytest.raises(ValueError, match=r"0/b is missing, compiled for float32\[\]"):
        step({"a": x["a"]}, y)


def test_the_nearest_declared_shapes_are_named():
    step = jit_step(add, name="add")
    step.compile(*args(4))
    step.compile(*args(64))
    x, y = args(64)
    with pytest.raises(ValueError, match=r"argument 1 is float32\[63, 3\], compiled for float32\[64, 3\]"):
        step(x, y[:63])


def test_a_step_that_was_never_compiled_says_so():
    with pytest.raises(ValueError, match=r"step add: called before compile\(\)"):
        jit_step(add, name="add")(*args())


def test_a_donated_argument_is_gone():
    step = jit_step(lambda x: x + 1, name="one", donate=(0,))
    x = jnp.zeros(4)
    step.compile(x)
    step(x)
    assert x.is_deleted()


def test_a_batch_is_spread_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    batch = global_batch(tiny.sft_batch(), mesh)
    assert batch_shards(mesh) == 4
    assert {s.data.shape for s in batch.tokens.addressable_shards} == {(2, tiny.LENGTH + 1)}
    np.testing.assert_array_equal(batch.tokens, tiny.sft_batch().tokens)


def test_activations_are_pinned_where_they_divide_and_left_alone_on_one_device():
    mesh = make_mesh(2, 2, 2)
    constrain = constrainer(mesh)
    out = jax.jit(lambda x: constrain(x, "mlp"))(jnp.zeros((8, 3, 6)))
    assert {s.data.shape for s in out.addressable_shards} == {(2, 3, 3)}
    odd = jax.jit(lambda x: constrain(x, "mlp"))(jnp.zeros((8, 3, 5)))
    assert {s.data.shape for s in odd.addressable_shards} == {(2, 3, 5)}
    x = jnp.zeros((8, 3, 6))
    assert constrain(x, "no such activation") is x and constrain(x[0], "mlp").ndim == 2
    assert constrainer(make_mesh(devices=jax.devices()[:1]))(x, "mlp") is x


ROWS, LAYERS = 16, 2
CHANGES = {"layers": LAYERS, "vocab_multiple": 1, "unroll": 1}
TX = make_optimizer(3e-3, weight_decay=0.1, clip_norm=1.0)


def on_mesh(shape):
    return make_mesh(*shape) if shape else make_mesh(devices=jax.devices()[:1])


def models_on(mesh):
    plain = tiny.language_model(**CHANGES), tiny.scorer(**CHANGES)
    return tuple(Transformer(m.config, constrain=constrainer(mesh)) for m in plain)


def start(state, mesh):
    shardings = shardings_for(state, mesh)
    return place(state, shardings), shardings


@functools.cache
def stage(name, shape):
    """(compiled step, its first state on the mesh as a function, batch on the mesh, key on the mesh)."""
    mesh = on_mesh(shape)
    lm, scorer = models_on(mesh)
    fresh_lm, fresh_scorer = tiny.init(tiny.language_model(**CHANGES)), tiny.init(tiny.scorer(**CHANGES), 1)
    if name == "sft":
        function, state, batch = sft_step, LMState.create(fresh_lm, TX), tiny.sft_batch(ROWS)
        options = {"model": lm, "tx": TX, "num_microbatches": 2}
    elif name == "reward":
        function, state, batch = reward_step, RewardState.create(fresh_scorer, TX), tiny.reward_batch(ROWS, 2)
        options = {"model": scorer, "tx": TX, "hinge": 0.5, "plackett_luce": 0.1}
    else:
        function, batch = ppo_update, saved_rollout()
        state = PPOState(
            policy=LMState.create(fresh_lm, TX),
            value=ValueState.create(fresh_scorer, TX),
            kl_coef=jnp.float32(0.1),
            reward_norm=RewardNorm.identity(),
            step=jnp.int32(0),
        )
        options = {"models": PPOModels(lm, scorer), "txs": (TX, TX), "epochs": 2, "minibatches": 2, "kl_target": 1.0}
    state = jax.device_get(state)
    placed, shardings = start(state, mesh)
    step = jit_step(functools.partial(function, **options), name=name, out_shardings=(shardings, replicated(mesh)))
    batch, key = global_batch(batch, mesh), jax.device_put(KEY, replicated(mesh))
    step.compile(placed, batch, key)
    return step, placed, batch, key


@functools.cache
def saved_rollout():
    """One rollout, made on one device and the same for every mesh."""
    lm, scorer = tiny.language_model(**CHANGES), tiny.scorer(**CHANGES)
    step = functools.partial(ppo_experience, models=PPOModels(lm, scorer), eos_ids=(tiny.EOS,), kl_coef=0.1)
    scores = np.random.default_rng(5).normal(size=ROWS).astype(np.float32)
    made = jax.jit(step)(tiny.init(lm), tiny.init(scorer, 1), tiny.init(lm, 3), tiny.generation(ROWS), scores)
    return jax.device_get(made)


@functools.cache
def history(name, shape, count):
    """[{metric: value}] of `count` steps, the final state, and whether every step left it laid out as it was."""
    step, state, batch, key = stage(name, shape)
    rows = []
    for _ in range(count):
        state, metrics = step(state, batch, key)
        rows.append({metric: float(mean.value) for metric, mean in metrics.items()})
    return rows, jax.device_get(state)


@on_meshes
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_ten_steps_on_a_mesh_are_ten_steps_on_one_device(name, shape):
    (alone, _), (meshed, state) = (history(name, s, 10) for s in (None, shape))
    loss = f"{name}/loss"
    np.testing.assert_allclose(meshed[0][loss], alone[0][loss], rtol=1e-5)
    np.testing.assert_allclose(meshed[0]["optim/grad_norm"], alone[0]["optim/grad_norm"], rtol=1e-4)
    np.testing.assert_allclose([m[loss] for m in meshed], [m[loss] for m in alone], rtol=1e-4)
    assert meshed[-1][loss] < 0.9 * meshed[0][loss] and state.step == 10 and state.skipped == 0


@on_meshes
def test_a_ppo_update_of_one_rollout_on_a_mesh_is_that_on_one_device(shape):
    (alone, one), (meshed, many) = (history("ppo_update", s, 1) for s in (None, shape))
    for metric, value in alone[0].items():
        np.testing.assert_allclose(meshed[0][metric], value, rtol=1e-4, atol=2e-6, err_msg=metric)
    start = {"policy": tiny.init(tiny.language_model(**CHANGES)), "value": tiny.init(tiny.scorer(**CHANGES), 1)}
    for kind, before in start.items():
        moved = [jax.tree.map(lambda a, b: a - b, getattr(x, kind).params, before) for x in (one, many)]
        norms = [np.sqrt(sum(np.sum(np.square(d, dtype=np.float64)) for d in jax.tree.leaves(m))) for m in moved]
        np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
        assert norms[0] > 0
    assert many.step == 1 and meshed[0]["ppo/first_ratio_error"] <= 1e-6
    np.testing.assert_allclose(many.kl_coef, one.kl_coef, rtol=1e-6)


@on_meshes
@pytest.mark.parametrize("name", ["sft", "reward", "ppo_update"])
def test_states_stay_sharded_by_the_rules(name, shape):
    step, state, batch, key = stage(name, shape)
    after, _ = step(state, batch, key)
    before_and_after = zip(*(jax.tree_util.tree_leaves_with_path(s) for s in (state, after)), strict=True)
    for (path, a), (_, b) in before_and_after:
        assert b.sharding.is_equivalent_to(a.sharding, a.ndim), leaf_name(path)
    params = after.policy.params if name == "ppo_update" else after.params
    up = params["layers"]["mlp"]["up"]
    expected = up.size // (shape[1] * shape[2])
    assert {s.data.size for s in up.addressable_shards} == {expected}


@on_meshes
def test_nothing_compiles_after_the_declaration(shape):
    for name in ("sft", "reward", "ppo_update"):
        stage(name, shape)
    before = Step.compiled.total()
    for name in ("sft", "reward", "ppo_update"):
        step, state, batch, key = stage(name, shape)
        for _ in range(2):  # one at a time: eight devices share the threads that two programs would wait for
            state, _ = jax.block_until_ready(step(state, batch, key))
        assert len(step.programs) == 1
    assert Step.compiled.total() == before


def test_virtual_cpu_devices_get_spare_threads(monkeypatch):
    """One pool runs a launch's devices and the dispatch of the next: a thread a device and no more can deadlock."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1 --xla_force_host_platform_device_count=100")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    cli.spare_threads()
    assert os.environ["PJRT_NPROC"] == "400"
    monkeypatch.setenv("PJRT_NPROC", "3")
    cli.spare_threads()
    assert os.environ["PJRT_NPROC"] == "3"
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setenv("XLA_FLAGS", "")
    cli.spare_threads()
    assert "PJRT_NPROC" not in os.environ


def test_gpt2s_vocabulary_is_padded_inside_and_exported_whole(tmp_path):
    """50,257 is odd: on tensor=2 the table has 50,304 rows. What they hold is no token's: loss, samples, file."""
    true, mesh = 50257, make_mesh(2, 2, 2)
    plain = Transformer(presets.gpt2(vocab_size=true, width=8, layers=1, heads=2, context=16, init_std=0.25))
    whole = tiny.init(plain)
    hf.save(tmp_path / "gpt2", hf.loaded_from(plain, jax.device_get(whole)))
    loaded = hf.load(tmp_path / "gpt2", mesh=mesh)
    padded = Transformer(loaded.model.config, constrain=constrainer(mesh))
    table = loaded.params["embed"]["tokens"]
    assert padded.config.padded_vocab == 50304 and table.sharding.shard_shape(table.shape) == (25152, 4)

    def junk(params):  # a counted column would win every softmax, or lose it by far
        columns = jnp.concatenate([params["embed"]["tokens"][:true], jnp.full((47, 8), 30.0)])
        return {**params, "embed": {**params["embed"], "tokens": columns}}

    tx = make_optimizer(1e-2)
    state = LMState.create(junk(jax.device_get(loaded.params)), tx)
    shardings = shardings_for(state, mesh)
    batch, results = tiny.sft_batch(8), {}
    for name, model, at, start_state, out in (
        ("one", plain, make_mesh(devices=jax.devices()[:1]), LMState.create(whole, tx), None),
        ("mesh", padded, mesh, place(state, shardings), (shardings, replicated(mesh))),
    ):
        prompts, key = global_batch(tiny.prompt_batch(8), at), jax.device_put(KEY, replicated(at))
        rollout = functools.partial(ppo_rollout, model=model, eos_ids=(), max_new_tokens=4)
        step = functools.partial(sft_step, model=model, tx=tx)
        written = jax.block_until_ready(jit_step(rollout, name="rollout", shapes=1)(start_state.params, prompts, key))
        train = jit_step(step, name="sft", out_shardings=out, shapes=1)
        results[name] = written, *jax.block_until_ready(train(start_state, global_batch(batch, at), key))
    (one, after_one, metrics_one), (many, after, metrics) = results["one"], results["mesh"]
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-5)
    for name, mean in metrics_one.items():
        np.testing.assert_allclose(metrics[name].value, mean.value, rtol=1e-5 if name == "sft/loss" else 1e-4)
    np.testing.assert_array_equal(np.asarray(after.params["embed"]["tokens"])[true:], 30.0)  # no gradient
    hf.save(tmp_path / "out", loaded._replace(params=after.params))
    exported = hf.load(tmp_path / "out")
    assert exported.config["vocab_size"] == true == len(exported.params["embed"]["tokens"])
    tokens = np.asarray(after.params["embed"]["tokens"])[:true]
    np.testing.assert_array_equal(exported.params["embed"]["tokens"], tokens)
    np.testing.assert_allclose(tokens, after_one.params["embed"]["tokens"], atol=1e-4)
