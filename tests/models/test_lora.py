"""Adapters: the start is the base, merged is unmerged, only they are trained, and PEFT's formula gives the same."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from lfjax import config as configs
from lfjax import stages
from lfjax.config import InputError
from lfjax.interop import hf, peft
from lfjax.losses import lm
from lfjax.models import blocks, lora, presets
from lfjax.models.lora import LoRA
from lfjax.models.transformer import Transformer
from lfjax.optim import make_optimizer
from lfjax.sharding import constrainer, global_batch, make_mesh, place, shardings_for
from lfjax.state import LMState, RewardState
from lfjax.steps.ppo_experience import ppo_experience
from lfjax.steps.ppo_forward import PPOModels
from lfjax.steps.reward import reward_step
from lfjax.steps.sft import sft_step

HOW = LoRA(rank=3, alpha=6.0)
SIZES = {"vocab_size": tiny.VOCAB, "width": 16, "layers": 2, "heads": 4, "context": 32, "init_std": 0.25}
LLAMA = presets.llama(**SIZES, kv_heads=2, mlp_width=24, tied=True)
GPT2 = presets.gpt2(**SIZES, mlp_width=24)
FORMS = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % tiny.VOCAB


def noise(tree, seed: int, scale: float = 0.3):
    """Random values in place of all of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(scale * rng.standard_normal(x.shape), np.float32), tree)


@functools.cache
def model_of(config):
    """(model, base parameters), all random."""
    model = Transformer(config)
    return model, noise(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"], 1)


@functools.cache
def fresh(config, how: LoRA = HOW):
    drawn = jax.jit(lambda: lora.init(jax.random.key(2), config, how))()
    return {"lora": jax.tree.map(np.asarray, drawn)}


def trained(config, how: LoRA = HOW):
    """Adapters as after training: no B is 0."""
    return noise(fresh(config, how), 3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden(model, how, base, params, rng=None, segment_ids=None):
    rngs = None if rng is None else {"dropout": rng}
    bound = lora.bind(model, base, how)
    return bound.apply({"params": params}, TOKENS, segment_ids=segment_ids, method="hidden", rngs=rngs)


@FORMS
def test_fresh_adapters_change_nothing_and_a_has_the_width_of_its_input(config):
    model, base = model_of(config)
    start = fresh(config)
    np.testing.assert_array_equal(hidden(model, HOW, base, start), hidden(model, None, None, base))
    attention, mlp = start["lora"]["layers"]["attention"], start["lora"]["layers"]["mlp"]
    assert attention["o"]["a"].shape == (2, 16, 3) and attention["k"]["b"].shape == (2, 3, 4 * config.kv_heads)
    assert mlp["down"]["a"].shape == (2, 24, 3) and mlp["down"]["b"].shape == (2, 3, 16)
    for leaf in (attention["q"]["a"], mlp["down"]["a"]):
        bound = leaf.shape[1] ** -0.5
        assert bound / 2 < np.abs(leaf).max() <= bound and abs(np.mean(leaf)) < bound / 3


@FORMS
@pytest.mark.parametrize("unroll", [0, 1])
def test_merged_computes_the_same(config, unroll):
    model, base = model_of(config)
    model = Transformer(dataclasses.replace(config, unroll=unroll, remat="full" if unroll else "none"))
    params = trained(config)
    merged = lora.merge(base, params, HOW)
    whole = hidden(model, None, None, merged)
    np.testing.assert_allclose(hidden(model, HOW, base, params), whole, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(whole - hidden(model, None, None, base))) > 0.1
    plain = {name: leaf for name, leaf in merged.items() if name != "layers"}
    jax.tree.map(np.testing.assert_array_equal, plain, {name: base[name] for name in plain})


def test_decoding_goes_through_the_adapters():
    model, base = model_of(LLAMA)
    params = trained(LLAMA)

    @jax.jit
    def logits(base, params):
        bound = lora.bind(model, base, HOW)
        decoder = bound.decoder(params)
        first, cache = decoder.prefill(TOKENS[:, :6], jnp.ones((2, 6), bool), 8)
        second, _ = decoder.decode(TOKENS[:, 6:7], cache)
        return decoder.logits(jnp.concatenate([first, second], axis=1)), bound.apply({"params": params}, TOKENS[:, :7])

    cached, whole = logits(base, params)
    np.testing.assert_allclose(cached, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how, scale", [(LoRA(4, 8.0), 2.0), (LoRA(4, 8.0, rslora=True), 4.0)], ids=["lora", "rslora"])
def test_the_change_is_a_b_times_the_scale(how, scale):
    _, base = model_of(LLAMA)
    params = trained(LLAMA, how)
    o = params["lora"]["layers"]["attention"]["o"]
    change = np.stack([scale * o["a"][i].astype(float) @ o["b"][i] for i in range(2)]).reshape(2, 4, 4, 16)
    merged = lora.merge(base, params, how)["layers"]["attention"]["o"]
    np.testing.assert_allclose(merged - base["layers"]["attention"]["o"], change, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_adapters_input_and_off_without_a_key():
    how = dataclasses.replace(HOW, dropout=0.25)
    model, base = model_of(LLAMA)
    params = trained(LLAMA)
    assert lora.LoRAModel(model, base, how).config.dropout == 0.25  # so that steps pass a key
    plain = hidden(model, HOW, base, params)
    np.testing.assert_array_equal(hidden(model, how, base, params), plain)
    first, second = (hidden(model, how, base, params, jax.random.key(seed)) for seed in (0, 1))
    assert np.max(np.abs(first - plain)) > 0.01 and np.max(np.abs(first - second)) > 0.01
    start = fresh(LLAMA)
    still = hidden(model, how, base, start, jax.random.key(0))
    np.testing.assert_array_equal(still, hidden(model, how, base, start))  # the model's own path has none

    x, a, b = (noise(jax.ShapeDtypeStruct(shape, np.float32), 7) for shape in ((2, 3, 8), (8, 2), (2, 4)))
    key, kernel = jax.random.key(5), np.ones((8, 4), np.float32)
    found = blocks.matmul(x, blocks.LowRank(kernel, a, b, jax.random.key_data(key), 0.5))
    dropped = np.asarray(blocks.dropout(x, key, 0.5))
    np.testing.assert_allclose(found, x @ kernel + dropped @ a @ b, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule():
    """dA = s dW B^T and dB = s A^T dW, dW the gradient of the whole matrix where the merged model stands."""
    model, base = model_of(LLAMA)
    params = trained(LLAMA)

    def loss(apply, unembed):
        stats = lm.chunked_token_stats(apply, unembed, jnp.asarray(TOKENS), chunk_size=64)
        return -jnp.mean(stats.logprobs)

    @jax.jit
    def both(base, params):
        def of(params, base=base, how=HOW):
            bound = lora.bind(model, base, how)
            return loss(bound.apply({"params": params}, TOKENS, method="hidden"), bound.unembed(params))

        return jax.grad(of)(params), jax.grad(lambda whole: of(whole, None))(lora.merge(base, params, HOW))

    found, whole = both(base, params)
    pair, grads = (tree["lora"]["layers"]["mlp"]["down"] for tree in (params, found))
    by_matrix = np.asarray(whole["layers"]["mlp"]["down"], np.float64)
    scale = HOW.alpha / HOW.rank
    tiny.close_trees(grads["a"], scale * np.einsum("lio,lro->lir", by_matrix, pair["b"]))
    tiny.close_trees(grads["b"], scale * np.einsum("lir,lio->lro", pair["a"], by_matrix))


def counted(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def sft_losses(mesh, steps: int = 3):
    """(losses, state, base before, base after) of a few SFT steps with dropout on a mesh."""
    model, base = model_of(LLAMA)
    how = dataclasses.replace(HOW, dropout=0.1)
    tx = make_optimizer(1e-2, clip_norm=1.0)
    whole = noise(base, 1)
    if mesh is not None:
        model = Transformer(LLAMA, constrain=constrainer(mesh))
        base = place(base, shardings_for(base, mesh))
    state = LMState.create(jax.tree.map(jnp.array, fresh(LLAMA)), tx)
    if mesh is not None:
        state = place(state, shardings_for(state, mesh))

    def function(state, batch, base):
        return sft_step(state, batch, state_key(state), model=lora.bind(model, base, how), tx=tx, chunk_size=4)

    step = jax.jit(function, donate_argnums=0)
    losses = []
    for seed in range(steps):
        batch = tiny.sft_batch(seed=seed)
        state, metrics = step(state, batch if mesh is None else global_batch(batch, mesh), base)
        losses.append(float(metrics["sft/loss"].value))
    return losses, state, whole, base


def state_key(state):
    return jax.random.fold_in(jax.random.key(9), state.step)


@functools.cache
def on_one_device():
    return sft_losses(None)


def test_only_adapters_are_trained_and_have_optimiser_state():
    losses, state, before, after = on_one_device()
    start = fresh(LLAMA)
    assert jax.tree.structure(state.params) == jax.tree.structure(start)
    assert counted(state.opt_state) <= 2 * counted(start) + 8 < counted(before)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True):
        assert np.any(old != new)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert losses[0] != losses[1]


@pytest.mark.xdist_group("mesh")
def test_a_mesh_gives_one_devices_losses():
    expected, *_ = on_one_device()
    found, _, _, base = sft_losses(make_mesh(2, 2, 2))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(base["layers"]["mlp"]["up"].sharding.device_set) == 8
    assert not base["layers"]["mlp"]["up"].is_fully_replicated


def test_a_reward_models_head_is_trained_beside_the_adapters():
    model = Transformer(dataclasses.replace(LLAMA, num_labels=1))
    _, base = model_of(LLAMA)
    head = {"kernel": np.full((16, 1), 0.1, np.float32)}
    tx = make_optimizer(1e-2)
    state = RewardState.create({**fresh(LLAMA), "head": head}, tx)

    def function(state, batch, base):
        return reward_step(state, batch, jax.random.key(0), model=lora.bind(model, base, HOW), tx=tx)

    after, metrics = jax.jit(function)(state, tiny.reward_batch(candidates=2), base)
    assert np.isfinite(metrics["reward/loss"].value)
    assert np.any(after.params["head"]["kernel"] != head["kernel"])
    b = after.params["lora"]["layers"]["attention"]["q"]["b"]
    assert np.any(b != 0.0)


def test_ppo_starts_at_its_reference_which_is_the_base_itself():
    model, base = model_of(LLAMA)
    scorer = Transformer(dataclasses.replace(LLAMA, num_labels=1, head_bias=True))
    head = {"kernel": np.full((16, 1), 0.1, np.float32), "bias": np.zeros(1, np.float32)}

    def experience(policy, value, base, generation):
        bound = lora.bind(model, base, HOW), lora.bind(scorer, base, HOW)
        models = PPOModels(*bound, reference=model)
        scores = jnp.ones(tiny.ROWS)
        return ppo_experience(policy, value, base, generation, scores, models=models, kl_coef=0.1, eos_ids=(tiny.EOS,))

    run = jax.jit(experience)
    value = {**fresh(LLAMA), "head": head}
    start = run(fresh(LLAMA), value, base, tiny.generation())
    np.testing.assert_array_equal(start.old_logprobs, start.ref_logprobs)
    moved = run(trained(LLAMA), value, base, tiny.generation())
    np.testing.assert_array_equal(moved.ref_logprobs, start.ref_logprobs)
    assert np.max(np.abs(moved.old_logprobs - moved.ref_logprobs)) > 0.1


CASES = {
    "llama": (LLAMA, HOW),
    "llama rslora": (LLAMA, LoRA(3, 5.0, rslora=True)),
    "gpt2": (GPT2, HOW),
    "gpt2 q and v, rslora": (GPT2, LoRA(2, 5.0, ("attention/[qv]$", "mlp/down"), rslora=True)),
    "llama score": (dataclasses.replace(LLAMA, num_labels=1), LoRA(2, 4.0, ("attention/q$",))),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_s_formula_on_its_files_gives_the_merged_model(case, tmp_path):
    """W + alpha / rank B A (rsLoRA: / sqrt(rank)), with the rank and alpha that the patterns give a module."""
    config, how = CASES[case]
    model, base = model_of(dataclasses.replace(config, num_labels=0))
    params = trained(config, how)
    if config.num_labels:
        params["head"] = {"kernel": noise(jax.ShapeDtypeStruct((16, 1), np.float32), 8)}
        model = Transformer(config)
    merged = hf.loaded_from(model, lora.merge(base, params, how))
    hf.save(tmp_path / "before", hf.loaded_from(model, {**base, **{k: params[k] for k in params if k == "head"}}))
    adapter = peft.export(config, merged.config, params, how, "before")
    for _ in range(2):  # a folder with an adapter is replaced like any other
        hf.save(tmp_path / "after", merged, adapter=adapter)
    names = {path.name for path in (tmp_path / "after" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    said = json.loads((tmp_path / "after" / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (how.rank, how.alpha, how.rslora)
    low = safetensors.numpy.load_file(tmp_path / "after" / "adapter" / "adapter_model.safetensors")
    before, after = (safetensors.numpy.load_file(tmp_path / at / "model.safetensors") for at in ("before", "after"))
    changed = set()
    for name in [name for name in low if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        (short,) = (t for t in said["target_modules"] if module.endswith(f".{t}"))
        rank, alpha = said["rank_pattern"].get(short, said["r"]), said["alpha_pattern"].get(short, said["lora_alpha"])
        a, b = (low[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        weight = before[f"{module}.weight"]
        assert len(a) == rank
        assert (b.shape[0], a.shape[1]) == (weight.shape[::-1] if said["fan_in_fan_out"] else weight.shape)
        change = alpha / (rank**0.5 if said["use_rslora"] else rank) * b @ a
        found = weight + (change.T if said["fan_in_fan_out"] else change)
        np.testing.assert_allclose(after[f"{module}.weight"], found, rtol=1e-5, atol=1e-5)
        changed.add(f"{module}.weight")
    assert {name for name in before if np.any(before[name] != after[name])} == changed
    if config.num_labels:
        assert said["modules_to_save"] == ["score"] and said["task_type"] == "SEQ_CLS"
        np.testing.assert_array_equal(low["base_model.model.score.weight"], after["score.weight"])
    else:
        assert said["modules_to_save"] is None and said["task_type"] == "CAUSAL_LM"


def test_files_have_pefts_names():
    model, _ = model_of(GPT2)
    described = hf.loaded_from(model, {}).config
    adapter = peft.export(GPT2, described, trained(GPT2), HOW, "gpt2")
    first = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    assert {name for name in adapter.tensors if name.startswith(first)} == {f"{first}A.weight", f"{first}B.weight"}
    assert adapter.tensors[f"{first}A.weight"].shape == (9, 16) and adapter.tensors[f"{first}B.weight"].shape == (48, 9)
    assert adapter.config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert adapter.config["rank_pattern"] == {"attn.c_attn": 9} and adapter.config["alpha_pattern"] == {
        "attn.c_attn": 18
    }


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("rank", -1, "config.model.lora.rank: -1; allowed: at least 0"),
        ("alpha", 0.0, "config.model.lora.alpha: 0.0; allowed: above 0"),
        ("dropout", 1.0, "config.model.lora.dropout: 1.0; allowed: 0 up to, not including, 1"),
        ("targets", (), "config.model.lora.targets: (); give regexes"),
        ("targets", ("(",), "config.model.lora.targets: ('(',); give regexes"),
        ("targets", (3,), "config.model.lora.targets: (3,); give regexes"),
    ],
)
def test_what_cannot_be_is_refused(key, value, found):
    config = configs.base_config()
    config.model.lora.update({"rank": 2, **{key: value}})
    with pytest.raises(InputError) as error:
        configs.validate(config, stages.declared())
    assert str(error.value).startswith(found)


def test_a_run_in_which_nothing_starts_from_a_model_is_refused():
    config = configs.base_config()
    config.model.lora.rank, config.stages = 2, ("tokenizer", "pretrain")
    with pytest.raises(InputError, match=r"config\.model\.lora\.rank: 2; no stage of this run starts from a model"):
        configs.validate(config, stages.declared())


def test_a_target_that_no_matrix_has_names_those_there_are():
    with pytest.raises(InputError, match=r"config.model.lora.targets: 'q_proj' is found in no .*layers/attention/q, "):
        lora.targets(LLAMA, LoRA(2, targets=("attention/k$", "q_proj")))
    with pytest.raises(InputError, match="gate"):
        lora.targets(GPT2, LoRA(2, targets=("mlp/gate",)))
