"""BERT and RoBERTa: checkpoints written here by hand, against a float64 encoder and the peer."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from folders import stored, write
from reference import encoder

from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models.encoder import EncoderConfig
from lfjax.optim import make_optimizer
from lfjax.sharding import make_mesh
from lfjax.state import RewardState
from lfjax.steps.reward import reward_step

V, D, F, L, N, T, C = 29, 16, 20, 2, 4, 9, 3
TOKENS = np.arange(T) * 7 % (V - 2) + 2
TYPES = (np.arange(T) > 5).astype(int)
STEMS = {"bert": "Bert", "roberta": "Roberta"}
FIRST, EPS = {"bert": 0, "roberta": 2}, {"bert": 1e-12, "roberta": 1e-5}
HEADS = {
    ("bert", "SequenceClassification"): ("bert.pooler.dense", "classifier"),
    ("roberta", "SequenceClassification"): ("classifier.dense", "classifier.out_proj"),
    ("bert", "TokenClassification"): (None, "classifier"),
    ("roberta", "TokenClassification"): (None, "classifier"),
}


def config_of(name, architecture="ForSequenceClassification", **changes):
    """config.json; None leaves a key out."""
    config = {
        "architectures": [STEMS[name] + architecture],
        "model_type": name,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "max_position_embeddings": 24,
        "layer_norm_eps": EPS[name],
        "pad_token_id": {"bert": 0, "roberta": 1}[name],
        "id2label": {str(i): f"L{i}" for i in range(C)},
        "dtype": "float32",
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def tensors_of(name, dense=None, out=None, base=None, dtype="float32"):
    """A trunk's tensors under `base`, and those of a head's two layers where they have names."""
    base = f"{name}." if base is None else base
    layer = {f"attention.self.{n}": (D, D) for n in ("query", "key", "value")}
    layer |= {"attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}
    layer |= {"attention.output.LayerNorm": (D,), "output.LayerNorm": (D,)}
    parts = {f"{base}encoder.layer.{i}.{part}": shape for i in range(L) for part, shape in layer.items()}
    parts |= {f"{base}embeddings.LayerNorm": (D,)}
    parts |= {n: shape for n, shape in ((dense, (D, D)), (out, (C, D))) if n}
    shapes = {f"{n}.weight": shape for n, shape in parts.items()} | {f"{n}.bias": s[:1] for n, s in parts.items()}
    for table, rows in {"word": V, "position": 24, "token_type": 2}.items():
        shapes[f"{base}embeddings.{table}_embeddings.weight"] = (rows, D)
    rng = np.random.default_rng(0)
    return {n: (0.4 * rng.standard_normal(shape)).astype(dtype) for n, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def outputs(model, params, tokens, mask=None, method=None, types=None, segments=None):
    return model.apply({"params": params}, tokens, mask, token_type_ids=types, segment_ids=segments, method=method)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def expected_scores(name, kind, tensors, types=None):
    """[C] of the text, or [T C] of its tokens, in float64."""
    states = encoder.hidden(tensors, TOKENS, base=f"{name}.", heads=N, eps=EPS[name], first=FIRST[name], types=types)
    return encoder.scores(tensors, states[0] if kind.startswith("Seq") else states, *HEADS[name, kind])


def padded():
    """The text padded on the right and on the left, with any ids there: [2 T+3], mask."""
    rows = np.stack([np.pad(TOKENS, (0, 3)), np.pad(TOKENS, (3, 0), constant_values=7)])
    return rows, np.stack([np.arange(T + 3) < T, np.arange(T + 3) >= 3])


# --- values


@pytest.mark.parametrize("name", STEMS)
def test_scores_are_those_of_a_float64_encoder_whatever_the_padding(tmp_path, name):
    kind = "SequenceClassification"
    tensors = tensors_of(name, *HEADS[name, kind])
    model, params, *_ = hf.load(write(tmp_path / "model", config_of(name), tensors))
    expected = expected_scores(name, kind, tensors)
    rows, mask = padded()
    close(outputs(model, params, TOKENS[None]), expected[None])
    close(outputs(model, params, rows, mask), np.stack([expected] * 2))
    close(outputs(model, params, rows, mask, "values"), np.broadcast_to(expected, (2, T + 3, C)))
    close(outputs(model, params, TOKENS[None], types=TYPES[None]), expected_scores(name, kind, tensors, TYPES)[None])


@pytest.mark.parametrize("name", STEMS)
def test_scores_of_tokens_are_those_of_a_float64_encoder(tmp_path, name):
    kind = "TokenClassification"
    tensors = tensors_of(name, *HEADS[name, kind])
    model, params, *_ = hf.load(write(tmp_path / "model", config_of(name, f"For{kind}"), tensors))
    expected = expected_scores(name, kind, tensors)
    rows, mask = padded()
    close(np.asarray(outputs(model, params, rows, mask, "values"))[mask].reshape(2, T, C), np.stack([expected] * 2))
    close(outputs(model, params, rows, mask), np.stack([expected[-1]] * 2))


def test_documents_packed_in_one_row_do_not_see_each_other(tmp_path):
    tensors = tensors_of("bert")
    model, params, *_ = hf.load(write(tmp_path / "model", config_of("bert", "Model"), tensors))
    segments = np.r_[np.ones(T, int), np.full(T, 2)][None]
    both = outputs(model, params, np.r_[TOKENS, TOKENS[::-1]][None], None, "hidden", segments=segments)
    each = [encoder.hidden(tensors, x, base="bert.", heads=N, eps=EPS["bert"]) for x in (TOKENS, TOKENS[::-1])]
    close(both[0], np.concatenate(each))


def test_layers_scanned_and_rematerialised_are_those_in_line():
    form = EncoderConfig(vocab_size=V, width=D, layers=L, heads=N, mlp_width=F, num_labels=1, init_std=0.4)
    params = tiny.init(form.build())

    def gradients(**changes):
        model = EncoderConfig(**{**vars(form), **changes}).build()
        loss = lambda params: jnp.square(model.apply({"params": params}, TOKENS[None])).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, grads), (scanned, others) = gradients(), gradients(unroll=1, remat="full")
    close(scanned, loss)
    tiny.close_trees(others, grads)


@pytest.mark.parametrize("name, kind", HEADS)
def test_an_exported_encoder_is_opened_by_transformers_to_the_same_scores(tmp_path, name, kind):
    torch = pytest.importorskip("torch", reason="torch and transformers are absent: the peer did not run")
    transformers = pytest.importorskip("transformers", reason="transformers is absent: the peer did not run")
    config = config_of(name, f"For{kind}")
    loaded = hf.load(write(tmp_path / "model", config, tensors_of(name, *HEADS[name, kind])))
    hf.save(tmp_path / "kept", loaded)
    hf.save(tmp_path / "written", hf.loaded_from(loaded.model, loaded.params))
    rows = np.pad(TOKENS, (0, 3), constant_values=config["pad_token_id"])[None]
    mask = np.arange(T + 3)[None] < T
    ours = outputs(loaded.model, loaded.params, rows, mask, "values" if kind.startswith("Token") else None)
    for folder in ("kept", "written"):
        peer = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            expected = peer(torch.tensor(rows), attention_mask=torch.tensor(mask.astype(int))).logits.numpy()
        real = mask if kind.startswith("Token") else slice(None)
        np.testing.assert_allclose(np.asarray(ours)[real], expected[real], rtol=0, atol=2e-4, err_msg=folder)


# --- round trips


@pytest.mark.parametrize("name, kind", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_on_an_encoder_comes_back_bit_equal(tmp_path, name, kind, dtype):
    config = config_of(name, f"For{kind}", dtype=dtype)
    folder = write(tmp_path / "model", config, tensors_of(name, *HEADS[name, kind], dtype=jnp.dtype(dtype)))
    loaded = hf.load(folder)
    hf.save(tmp_path / "copy", loaded)
    assert stored(tmp_path / "copy") == stored(folder)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config
    anew = hf.loaded_from(loaded.model, loaded.params, labels=("no", "maybe", "yes"))
    assert (anew.config["model_type"], anew.config["architectures"]) == (name, config["architectures"])
    assert anew.config["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    hf.save(tmp_path / "anew", anew)
    again = hf.load(tmp_path / "anew")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("pooler", [True, False])
def test_a_trunk_comes_back_bit_equal_with_and_without_its_pooler(tmp_path, name, pooler):
    tensors = tensors_of(name, "pooler.dense" if pooler else None, base="")
    folder = write(tmp_path / "model", config_of(name, "Model"), tensors)
    loaded = hf.load(folder)
    assert loaded.model.config.pooler == pooler == ("pooler" in loaded.params)
    hf.save(tmp_path / "copy", loaded)
    assert stored(tmp_path / "copy") == stored(folder)
    states = encoder.hidden(tensors, TOKENS, base="", heads=N, eps=EPS[name], first=FIRST[name])
    close(outputs(loaded.model, loaded.params, TOKENS[None], None, "hidden")[0], states)


MASKED = {
    "bert": {
        "cls.predictions.bias": (V,),
        "cls.predictions.transform.dense.weight": (D, D),
        "cls.predictions.transform.LayerNorm.gamma": (D,),
        "cls.seq_relationship.weight": (2, D),
        "bert.embeddings.position_ids": (24,),
    },
    "roberta": {"lm_head.bias": (V,), "lm_head.dense.weight": (D, D), "lm_head.layer_norm.weight": (D,)},
}


@pytest.mark.parametrize("name", STEMS)
def test_of_a_masked_language_model_the_trunk_is_read_and_old_names_of_norms_are_known(tmp_path, name):
    plain = tensors_of(name)
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {next((n.replace(a, b) for a, b in ends.items() if n.endswith(a)), n): x for n, x in plain.items()}
    assert old.keys() != plain.keys()
    more = {n: np.ones(shape, np.float32) for n, shape in MASKED[name].items()}
    loaded = hf.load(write(tmp_path / "old", config_of(name, "ForMaskedLM"), old | more))
    assert loaded.model.config.num_labels == 0 and not loaded.model.config.pooler
    bare = hf.load(write(tmp_path / "plain", config_of(name, "Model"), plain))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, bare.params)
    hf.save(tmp_path / "copy", loaded)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["architectures"] == [f"{STEMS[name]}Model"]


def test_on_a_mesh_it_is_split_as_a_decoder_is(tmp_path):
    folder = write(tmp_path / "model", config_of("bert"), tensors_of("bert", *HEADS["bert", "SequenceClassification"]))
    params = hf.load(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2)).params
    assert params["embed"]["tokens"].shape == (128, D)  # rows of padding, so that tensor divides them
    assert params["layers"]["attention"]["q"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)


# --- learning


@pytest.mark.parametrize("name", STEMS)
def test_a_reward_step_on_an_encoder_learns_a_batch_whatever_lies_in_its_padding(name):
    form = EncoderConfig(
        vocab_size=tiny.VOCAB,
        width=D,
        layers=1,
        heads=N,
        mlp_width=F,
        position_rows=24,
        first_position=FIRST[name],
        num_labels=1,
        init_std=0.2,
    )
    model, tx = form.build(), make_optimizer(1e-2)
    state = RewardState.create(tiny.init(model), tx)
    batch = tiny.reward_batch()
    step = jax.jit(functools.partial(reward_step, model=model, tx=tx, num_microbatches=2))
    other = batch._replace(tokens=np.where(batch.mask, batch.tokens, 17))
    after, metrics = step(state, batch, jax.random.key(0))
    elsewhere, same = step(state, other, jax.random.key(0))
    assert float(same["reward/loss"].value) == float(metrics["reward/loss"].value)
    jax.tree.map(np.testing.assert_array_equal, elsewhere.params, after.params)
    for _ in range(40):
        after, latest = step(after, batch, jax.random.key(0))
    assert float(latest["reward/loss"].value) < 0.5 * float(metrics["reward/loss"].value)


# --- what is refused


@pytest.mark.parametrize("name", STEMS)
def test_damage_is_one_line_naming_file_and_tensor(tmp_path, name):
    tensors = tensors_of(name, *HEADS[name, "SequenceClassification"])
    last = f"{name}.encoder.layer.1.output.dense.weight"
    for changed, message in (
        ({n: x for n, x in tensors.items() if n != last}, f"tensor '{last}' is missing"),
        ({n: x for n, x in tensors.items() if "class" not in n}, "tensor 'classifier.*' is missing"),
        (tensors | {"bert.extra.weight": np.ones(2, np.float32)}, "tensor 'bert.extra.weight' has no place"),
        (tensors | {last: np.ones((3, 3), np.float32)}, rf"tensor '{last}': found shape \[3, 3\]"),
        (tensors | {last: np.full((D, F), np.nan, np.float32)}, rf"tensor '{last}': holds NaN"),
    ):
        folder = write(tmp_path / "model", config_of(name), changed)
        with pytest.raises(InputError, match=rf"model\.safetensors: {message}") as caught:
            hf.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type': found 'relative_key'"),
        ("bert", {"is_decoder": True}, "'is_decoder': found True"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "'architectures': found 'BertForQuestionAnswering'"),
        ("bert", {"num_attention_heads": 3}, "model.heads: found 3; it must divide model.width = 16"),
        ("roberta", {"pad_token_id": -1}, "'pad_token_id': found -1"),
        ("roberta", {"max_position_embeddings": 2}, "model.context: found 0; it must be at least 1"),
    ],
)
def test_a_wrong_key_is_one_line_naming_the_file(tmp_path, name, changes, message):
    folder = write(tmp_path / "model", config_of(name, **changes), tensors_of(name))
    with pytest.raises(InputError, match=rf"config\.json: .*{message}") as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_no_language_model(tmp_path):
    folder = write(tmp_path / "model", config_of("bert", "ForMaskedLM"), tensors_of("bert"))
    with pytest.raises(InputError, match=r"config\.json: .*'bert' is an encoder, not a language model"):
        hf.load(folder, task="lm")
    loaded = hf.load(folder)
    with pytest.raises(InputError, match=r"^it is an encoder \(bert\), not a language model"):
        hf.check_language_model(loaded, "it")
    with pytest.raises(InputError, match="no language model"):
        loaded.model.apply({"params": loaded.params}, TOKENS[None])
    with pytest.raises(InputError, match="no language model"):
        loaded.model.unembed(loaded.params)


def test_a_text_beyond_the_positions_is_refused(tmp_path):
    loaded = hf.load(write(tmp_path / "model", config_of("roberta", "Model"), tensors_of("roberta")))
    assert loaded.model.config.context == 22
    with pytest.raises(InputError, match="found 22; the input has 23 positions"):
        loaded.model.apply({"params": loaded.params}, np.ones((1, 23), int), method="hidden")
