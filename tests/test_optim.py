import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lfjax.config import base_config
from lfjax.models import presets
from lfjax.models.encoder import EncoderConfig
from lfjax.models.lstm import LSTMConfig
from lfjax.optim import DEFAULT_GROUPS, coupled_grads, make_optimizer, schedule, weighted_grads
from lfjax.types import Mean, leaf_name, map_named

LAYERS = 2


@pytest.fixture(scope="module")
def params():
    """A language model's parameters, every one away from zero."""
    model = tiny.language_model(layers=LAYERS, tied=False, attention_bias=True)
    return jax.tree.map(lambda x: np.asarray(x) + 0.3, tiny.init(model))


def gradients(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(0.1 * rng.standard_normal(x.shape)), params)


def train(tx, params, steps, *, at=lambda i: i, grads=gradients):
    @jax.jit
    def update(params, state, step, grads):
        updates, state = tx.update(grads, state, params, step=step)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for i in range(steps):
        params, state = update(params, state, jnp.int32(at(i)), grads(params, i))
    return params


def change(tx, params, grads, step=0):
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, step=jnp.int32(step))[0])(grads, params)


def rate_by_formula(kind, step, *, peak, total, warmup, end):
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / (total - warmup), 1.0)
    if kind == "constant":
        return peak
    if kind == "linear":
        return peak * (1 - (1 - end) * progress)
    return peak * (end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_is_its_formula(kind, warmup):
    rate = schedule(kind, learning_rate=3e-3, total_steps=20, warmup_steps=warmup, end_factor=0.1)
    expected = [rate_by_formula(kind, s, peak=3e-3, total=20, warmup=warmup, end=0.1) for s in range(25)]
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(np.arange(25)), expected, rtol=1e-5)


def test_first_steps_rate_is_not_zero_and_the_peak_comes_right_after_the_warmup():
    rate = schedule("cosine", learning_rate=1.0, total_steps=10, warmup_steps=4)
    np.testing.assert_allclose([rate(0), rate(3), rate(4)], [0.25, 1.0, 1.0])


def test_warmup_longer_than_the_training_still_reaches_the_peak():
    rate = schedule("linear", learning_rate=1.0, total_steps=3, warmup_steps=100)
    np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0.5, 1.0, 1.0])


def test_unknown_schedules_and_optimisers_are_refused():
    with pytest.raises(ValueError, match=r"'step'; allowed: constant, linear, cosine"):
        schedule("step", learning_rate=1.0, total_steps=1)
    with pytest.raises(ValueError, match=r"'adam'; allowed: adamw, adafactor, lion, muon"):
        make_optimizer(1e-3, name="adam")


def test_adamw_is_optaxs(params):
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
    ours = train(make_optimizer(1e-2, groups=(), **settings), params, 4)
    theirs = train(optax.with_extra_args_support(optax.adamw(1e-2, **settings)), params, 4)
    tiny.close_trees(ours, theirs, rtol=1e-6)


def test_lion_is_optaxs(params):
    settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1}
    ours = train(make_optimizer(1e-2, name="lion", groups=(), **settings), params, 3)
    theirs = train(optax.with_extra_args_support(optax.lion(1e-2, **settings)), params, 3)
    tiny.close_trees(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("name, peak", [("adamw", 0.05), ("adafactor", 0.05), ("lion", 0.05), ("muon", 0.5)])
def test_every_optimiser_reduces_a_loss(name, peak, params):
    def loss(p):
        return sum(np.sum(np.square(np.asarray(x) - 1.0)) for x in jax.tree.leaves(p))

    def slope(p, _):
        return jax.tree.map(lambda x: 2 * (np.asarray(x) - 1.0), p)

    tx = make_optimizer(schedule("linear", learning_rate=peak, total_steps=30), name=name, b2=0.99)
    after = train(tx, params, 30, grads=slope)
    assert loss(after) < 0.5 * loss(params)


SIZE = {"vocab_size": 130, "width": 128, "layers": LAYERS, "heads": 4}
GPT2 = presets.gpt2(**SIZE, context=130)
LLAMA = presets.llama(**SIZE, kv_heads=2, mlp_width=192, context=16, tied=False)
TABLES = {
    "gpt2": GPT2.parameters(),
    "llama": dataclasses.replace(LLAMA, qk_norm=True, post_norm=True).parameters(),
    "reward": dataclasses.replace(LLAMA, num_labels=1, head_bias=True).parameters(),
    "lstm": LSTMConfig(vocab_size=130, width=128, layers=LAYERS).parameters(),
    "encoder": EncoderConfig(**SIZE, num_labels=3).parameters(),
}
ATTENTION_AND_MLP = {f"layers/attention/{n}" for n in "qkvo"} | {f"layers/mlp/{n}" for n in ("up", "down")}
DECAYED = {
    "gpt2": {"embed/tokens"} | ATTENTION_AND_MLP,
    "llama": {"embed/tokens", "unembed/kernel", "layers/mlp/gate"} | ATTENTION_AND_MLP,
    "reward": {"embed/tokens", "head/kernel", "layers/mlp/gate"} | ATTENTION_AND_MLP,
    "lstm": {"embed/tokens", "layers/lstm/input", "layers/lstm/recurrent"},
    "encoder": {"embed/tokens", "pooler/kernel", "head/kernel"} | ATTENTION_AND_MLP,
    "adapters": {f"lora/layers/attention/{n}/{part}" for n in "qo" for part in "ab"} | {"head/kernel"},
}


@functools.cache
def every_form():
    """Parameters of all forms in one tree, of many scales."""
    is_entry = lambda x: isinstance(x, tuple)  # noqa: E731
    trees = {form: jax.tree.map(lambda entry: entry[0], table, is_leaf=is_entry) for form, table in TABLES.items()}
    adapters = {n: {"a": (LAYERS, 128, 8), "b": (LAYERS, 8, 128)} for n in "qo"}
    trees["adapters"] = {"lora": {"layers": {"attention": adapters}}, "head": {"kernel": (128, 1), "cutpoints": (4,)}}
    leaves, structure = jax.tree.flatten(trees, is_leaf=is_entry)
    rng = np.random.default_rng(0)
    scales = [10.0 ** rng.uniform(-2, 2, (shape[0],) + (1,) * (len(shape) - 1)) for shape in leaves]
    draws = [s * rng.normal(size=shape) for s, shape in zip(scales, leaves, strict=True)]
    return jax.tree.unflatten(structure, [x.astype(np.float32) for x in draws])


def decays(name):
    form, _, leaf = name.partition("/")
    return leaf in DECAYED[form]


def test_matrices_decay_and_nothing_else_does_in_any_form():
    params = every_form()
    zero = jax.tree.map(np.zeros_like, params)
    updates = change(make_optimizer(0.5, weight_decay=0.1), params, zero)
    found = {n for n, u in named(updates).items() if np.any(u)}
    assert found == {f"{form}/{leaf}" for form, leaves in DECAYED.items() for leaf in leaves}
    expected = map_named(lambda name, p: -0.5 * 0.1 * p if decays(name) else np.zeros_like(p), params)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)
    assert base_config().optim.groups == DEFAULT_GROUPS


def named(tree):
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def apart(tree):
    """Every leaf of a layer on its own: matrices [inputs, outputs], vectors, and what no layer has as it is."""
    found = {}
    for name, x in named(tree).items():
        if "/layers/" not in name:
            found[name] = x
            continue
        for index, own in enumerate(x):
            if re.search(r"attention/[qkv]$", name):
                own = own.reshape(own.shape[0], -1)
            elif name.endswith("attention/o"):
                own = own.reshape(-1, own.shape[-1])
            elif name.endswith("bias"):
                own = own.reshape(-1)
            found[f"{name}/{index}"] = own
    return found


def test_adafactor_is_optaxs_on_each_layers_matrices_alone():
    params, steps = {form: every_form()[form] for form in ("llama", "encoder", "lstm", "adapters")}, 2
    lone = apart(params)
    mask = {name: decays(re.sub(r"/\d+$", "", name)) for name in lone}
    theirs = optax.with_extra_args_support(optax.adafactor(0.01, weight_decay_rate=0.001, weight_decay_mask=mask))
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(steps)]
    expected = train(theirs, lone, steps, grads=lambda _, i: apart(grads[i]))
    ours = train(make_optimizer(0.01, name="adafactor", weight_decay=0.1), params, steps, grads=lambda _, i: grads[i])
    for name, x in apart(ours).items():
        moved, exact = x - lone[name], expected[name] - lone[name]
        np.testing.assert_allclose(moved, exact, rtol=1e-4, atol=3e-7 * np.abs(lone[name]).max(), err_msg=name)


@pytest.mark.parametrize("width", [8, 160])  # of moments that are not factored, and that are
def test_adafactor_does_not_count_the_padding_of_a_vocabulary(width):
    rng = np.random.default_rng(2)
    shapes = {"embed": {"tokens": (300, width)}, "unembed": {"kernel": (width, 300), "bias": (300,)}}
    whole = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), whole) for _ in range(2)]

    def padded(tree):
        def pad(name, x):
            axis = 0 if name.endswith("tokens") else x.ndim - 1
            return np.pad(x, [(0, 84 if i == axis else 0) for i in range(x.ndim)])

        return map_named(pad, tree)

    expected = train(make_optimizer(0.01, name="adafactor"), whole, 2, grads=lambda _, i: grads[i])
    optimizer = make_optimizer(0.01, name="adafactor", vocab_size=300)
    found = train(optimizer, padded(whole), 2, grads=lambda _, i: padded(grads[i]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), found, padded(expected))


def test_adafactors_state_is_a_row_and_a_column_a_matrix():
    model = presets.gpt2(vocab_size=50257, width=768, layers=12, heads=12)
    is_entry = lambda x: isinstance(x, tuple)  # noqa: E731
    shapes = jax.tree.map(lambda e: jax.ShapeDtypeStruct(e[0], jnp.float32), model.parameters(), is_leaf=is_entry)
    state = jax.eval_shape(make_optimizer(0.1, name="adafactor").init, shapes)
    attention, mlp, vectors = 4 * (768 + 768), 2 * (768 + 3072), 2 * 2 * 768 + 4 * 768 + 3072 + 768
    tables, norm = (50257 + 768) + (1024 + 768), 2 * 768
    moments = 12 * (attention + mlp + vectors) + tables + norm
    assert moments < sum(math.prod(x.shape) for x in jax.tree.leaves(state)) < 1.002 * moments


def test_a_groups_multipliers_scale_rate_and_decay_and_zero_freezes(params):
    groups = ((r"^embed/", 0.0, 1.0), (r"^unembed/", 3.0, 2.0), *DEFAULT_GROUPS)
    settings = {"weight_decay": 0.1, "clip_norm": 0.0}
    grads = gradients(params)
    plain = change(make_optimizer(0.01, groups=(), **settings), params, grads)
    grouped = change(make_optimizer(0.01, groups=groups, **settings), params, grads)
    assert not np.any(grouped["embed"]["tokens"])
    kernel = params["unembed"]["kernel"]
    adam = np.asarray(plain["unembed"]["kernel"]) + 0.01 * 0.1 * kernel
    np.testing.assert_allclose(grouped["unembed"]["kernel"], 3 * (adam - 0.01 * 2 * 0.1 * kernel), rtol=1e-5)
    np.testing.assert_array_equal(grouped["layers"]["mlp"]["up"], plain["layers"]["mlp"]["up"])


def test_the_first_matching_group_wins(params):
    frozen_first = make_optimizer(0.1, groups=((r"mlp/", 0.0, 1.0), (r"mlp/up$", 1.0, 1.0)))
    updates = change(frozen_first, params, gradients(params))
    assert not any(np.any(x) for x in updates["layers"]["mlp"].values())
    assert np.all(np.any(np.asarray(updates["layers"]["attention"]["q"]) != 0, axis=(1, 2, 3)))


def test_an_invalid_group_regex_is_refused_when_the_optimiser_is_made():
    with pytest.raises(re.error):
        make_optimizer(0.1, groups=(("(", 1.0, 1.0),))


MUON_NAMES = {
    "layers/attention/q": 1, "layers/attention/k": 1, "layers/attention/v": 1, "layers/attention/o": 2,
    "layers/mlp/up": 1, "layers/mlp/gate": 1, "layers/mlp/down": 1,
}  # fmt: skip
"""The leaves Muon takes, and how many of a layer's axes are inputs."""


def newton_schulz(matrix):
    """Keller Jordan's five quintic steps towards U V', in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_orthogonalises_each_layers_matrices_and_leaves_the_rest_to_adam(params):
    grads = gradients(params)
    muon = change(make_optimizer(1.0, name="muon"), params, grads)
    adam = change(make_optimizer(1.0, name="adamw"), params, grads)
    seen = set()
    rows = zip(jax.tree_util.tree_leaves_with_path(muon), *map(jax.tree.leaves, (adam, grads)), strict=True)
    for (path, update), by_adam, grad in rows:
        name = leaf_name(path)
        if name not in MUON_NAMES:
            np.testing.assert_array_equal(update, by_adam)
            continue
        seen.add(name)
        fan_in = math.prod(grad.shape[1 : 1 + MUON_NAMES[name]])
        shape = (LAYERS, fan_in, -1)
        for layer, matrix in zip(
            np.asarray(update).reshape(shape), np.asarray(grad, np.float64).reshape(shape), strict=True
        ):
            expected = -math.sqrt(max(1.0, matrix.shape[1] / fan_in)) * newton_schulz(matrix)
            np.testing.assert_allclose(layer, expected, atol=1e-3, err_msg=name)
            assert 0.9 < np.linalg.norm(layer, 2) / math.sqrt(max(1.0, matrix.shape[1] / fan_in)) < 1.3
    assert seen == set(MUON_NAMES)


def test_muon_takes_the_layers_apart(params):
    """Layer 1's update does not depend on layer 0's gradient."""
    grads = gradients(params)
    other = map_named(lambda n, g: np.concatenate([7 * g[:1], g[1:]]) if n.startswith("layers/") else g, grads)
    tx = make_optimizer(1.0, name="muon")
    first, second = (change(tx, params, g)["layers"]["mlp"]["up"] for g in (grads, other))
    np.testing.assert_allclose(first[1], second[1], rtol=1e-6)


def test_muons_momentum_has_no_copy_for_adams_leaves(params):
    state = make_optimizer(1.0, name="muon").init(params)
    leaves = [x for x in jax.tree.leaves(state) if np.size(x) > 3]
    adam = [x for p, x in jax.tree_util.tree_leaves_with_path(params) if leaf_name(p) not in MUON_NAMES]
    muon = [x for p, x in jax.tree_util.tree_leaves_with_path(params) if leaf_name(p) in MUON_NAMES]
    assert sum(np.size(x) for x in leaves) == sum(np.size(x) for x in adam + adam + muon)


def test_clips_the_global_norm_of_the_gradient(params):
    grads = gradients(params)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
    clip = make_optimizer(1.0, name="adamw", clip_norm=norm / 4, eps=1.0, groups=())
    scaled = jax.tree.map(lambda g: g / 4, grads)
    tiny.close_trees(change(clip, params, grads), change(make_optimizer(1.0, eps=1.0, groups=()), params, scaled))
    loose = make_optimizer(1.0, clip_norm=2 * norm, eps=1.0, groups=())
    tiny.close_trees(change(loose, params, grads), change(make_optimizer(1.0, eps=1.0, groups=()), params, grads))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_calls_within_one_step_do_not_advance_the_schedule(name, params):
    """PPO calls its chain epochs x minibatches times a step: all of these calls have the same learning rate."""
    falling = schedule("linear", learning_rate=0.1, total_steps=4)
    at_step_2 = train(make_optimizer(falling, name=name), params, 5, at=lambda i: 2)
    constant = train(make_optimizer(float(falling(2)), name=name), params, 5, at=lambda i: i)
    tiny.close_trees(at_step_2, constant, rtol=1e-6)


ROWS = 12


def uneven_batch():
    """Rows that count 0..5 of 5 targets: microbatches of very different weight."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 5, 3)).astype(np.float32)
    mask = np.arange(5)[None] < (np.arange(ROWS) % 6)[:, None]
    return {"x": x, "y": rng.normal(size=(ROWS, 5)).astype(np.float32), "mask": mask}


def squared_error(params, micro):
    error = (micro["x"] @ params["w"] + params["b"] - micro["y"]) ** 2
    return Mean.over(error, micro["mask"])


WEIGHTS = {"w": np.float32([0.3, -0.2, 0.5]), "b": np.float32(0.1)}


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_microbatches_of_unequal_weight_are_one_big_batch(n):
    batch = uneven_batch()
    mean, grads = jax.jit(lambda p, b: weighted_grads(squared_error, p, b, n))(WEIGHTS, batch)
    x, y, mask = (batch[k].astype(np.float64) for k in ("x", "y", "mask"))
    error = x @ np.asarray(WEIGHTS["w"], np.float64) + float(WEIGHTS["b"]) - y
    np.testing.assert_allclose(mean.value, (mask * error**2).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(mean.weight, mask.sum())
    np.testing.assert_allclose(grads["b"], 2 * (mask * error).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["w"], 2 * np.einsum("bt,btd->d", mask * error, x) / mask.sum(), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_a_batch_that_counts_nothing_has_zero_gradients(n):
    batch = uneven_batch() | {"mask": np.zeros((ROWS, 5), bool)}
    mean, grads = jax.jit(lambda p, b: weighted_grads(squared_error, p, b, n))(WEIGHTS, batch)
    assert mean.value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("n", [1, 3])
def test_auxiliary_means_add_up(n):
    def loss(params, micro):
        return squared_error(params, micro), {
            "y": Mean.over(micro["y"], micro["mask"]),
            "rows": Mean.of(micro["y"][:, 0]),
        }

    batch = uneven_batch()
    (_, aux), _ = jax.jit(lambda p, b: weighted_grads(loss, p, b, n, has_aux=True))(WEIGHTS, batch)
    np.testing.assert_allclose(aux["y"].value, batch["y"][batch["mask"]].mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["rows"].value, batch["y"][:, 0].mean(), rtol=1e-5)
    assert aux["rows"].weight == ROWS


def test_every_microbatch_has_its_own_key():
    """The loss is its noise: the sum over microbatches is that of the keys folded with their indices."""

    def loss(params, micro, key):
        noise = jax.random.normal(key)
        return Mean(params * noise * micro["x"].shape[0], jnp.float32(micro["x"].shape[0]))

    key = jax.random.key(3)
    noises = jax.jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i))))(np.arange(4))
    mean, grad = jax.jit(lambda p, b: weighted_grads(loss, p, b, 4, rng=key))(np.float32(1.0), uneven_batch())
    assert len({float(x) for x in noises}) == 4
    np.testing.assert_allclose([mean.value, grad], [np.mean(np.asarray(noises))] * 2, rtol=1e-5)


def coupled_loss(outputs):
    """Every pair of rows."""
    gaps = outputs[:, None] - outputs[None, :]
    return jnp.sum(jax.nn.softplus(gaps - 0.3)) / outputs.shape[0], {"mean": Mean.of(outputs)}


@pytest.mark.parametrize("rng", [None, 5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_loss_that_couples_rows_is_the_same_in_microbatches(n, rng):
    def forward(params, micro, key):
        return jnp.tanh(micro["x"][:, 0] @ params["w"] + params["b"])

    batch, key = uneven_batch(), None if rng is None else jax.random.key(rng)
    (loss, aux), grads = jax.jit(lambda p, b: coupled_grads(forward, coupled_loss, p, b, n, rng=key))(WEIGHTS, batch)
    whole_loss = jax.value_and_grad(lambda p: coupled_loss(forward(p, batch, None)), has_aux=True)
    (whole, plain), expected = jax.jit(whole_loss)(WEIGHTS)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(aux["mean"].value, plain["mean"].value, rtol=1e-5)
    tiny.close_trees(grads, expected)


def test_coupled_microbatches_see_the_same_noise_in_both_passes():
    """With multiplicative noise the gradient is right only if the second pass repeats the first one's noise."""

    def forward(params, micro, key):
        return micro["x"][:, 0] @ params["w"] * jax.random.normal(key)

    batch, key, n = uneven_batch(), jax.random.key(1), 3
    _, grads = jax.jit(lambda p, b: coupled_grads(forward, coupled_loss, p, b, n, rng=key))(WEIGHTS, batch)

    def whole(params):
        micros = [jax.tree.map(lambda x, i=i: x[i::n], batch) for i in range(n)]
        outputs = [forward(params, m, jax.random.fold_in(key, i)) for i, m in enumerate(micros)]
        return coupled_loss(jnp.stack(outputs, axis=1).reshape(-1))[0]

    tiny.close_trees(grads, jax.jit(jax.grad(whole))(WEIGHTS))
