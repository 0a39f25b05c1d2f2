"""Every family of the Hugging Face layout: checkpoints written here by hand, against a float64 decoder and the peer."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from folders import stored, write
from reference import decoder

from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.models.transformer import Transformer
from lfjax.sharding import make_mesh

V, D, F, L, N, K, H, T = 29, 16, 20, 3, 4, 2, 6, 11
TOKENS = np.arange(T) * 7 % V
SIZE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "max_position_embeddings": 32,
}


def llama_shapes(head_dim=H, *, biases="", more=(), tied=False):
    """Name -> shape of a file in Llama's layout; `biases`: letters of projections; `more`: norms of each layer."""
    q, kv = (N * head_dim, D), (K * head_dim, D)
    layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    layer |= {f"self_attn.{n}_proj.weight": shape for n, shape in (("q", q), ("k", kv), ("v", kv), ("o", q[::-1]))}
    layer |= {f"self_attn.{n}_proj.bias": layer[f"self_attn.{n}_proj.weight"][:1] for n in biases}
    layer |= {f"mlp.{n}_proj.weight": (F, D) for n in ("up", "gate")} | {"mlp.down_proj.weight": (D, F)}
    layer |= {f"{name}.weight": (head_dim if "self_attn" in name else D,) for name in more}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    return shapes if tied else shapes | {"lm_head.weight": (V, D)}


def neox_shapes():
    layer = {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D)}
    layer |= {"mlp.dense_h_to_4h": (F, D), "mlp.dense_4h_to_h": (D, F)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    parts = {f"layers.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
    parts |= {"final_layer_norm": (D,)}
    shapes = {f"gpt_neox.{name}.weight": shape for name, shape in parts.items()}
    shapes |= {f"gpt_neox.{name}.bias": shape[:1] for name, shape in parts.items()}
    return shapes | {"gpt_neox.embed_in.weight": (V, D), "embed_out.weight": (V, D)}


def gpt2_shapes():
    layer = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    layer |= {"ln_1": (D,), "ln_2": (D,)}
    parts = {f"h.{i}.{name}": shape for i in range(L) for name, shape in layer.items()} | {"ln_f": (D,)}
    shapes = {f"transformer.{name}.weight": shape for name, shape in parts.items()}
    shapes |= {f"transformer.{name}.bias": shape[-1:] for name, shape in parts.items()}
    return shapes | {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (32, D)}


class Case(NamedTuple):
    """One family: its class, config.json in the new and in the old style, its tensors, its logits."""

    architecture: str
    new: dict
    old: dict
    shapes: dict
    logits: object = None  # (tensors, tokens) -> [T V]


def rope(theta, kind="default", **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


QK = ("self_attn.q_norm", "self_attn.k_norm")
BOTH_SIDES = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
PLAIN = decoder.frequencies(H, 500.0)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = SIZE | {"head_dim": H, "rms_norm_eps": 1e-6}
SCALED = {"query_pre_attn_scalar": 10, "sliding_window": 4}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def llama_like(turns=PLAIN, windows=(None,) * L, head_dim=H, **more):
    turns = [turns] * L if isinstance(turns, np.ndarray) else turns
    return functools.partial(decoder.llama_logits, head_dim=head_dim, turns=turns, windows=windows, **more)


CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": N, "n_positions": 32, "n_inner": F},
        {},
        gpt2_shapes(),
    ),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        SIZE | rope(500.0, partial_rotary_factor=0.5),
        {"rotary_emb_base": 500, "rotary_pct": 0.5},
        neox_shapes(),
        functools.partial(
            decoder.neox_logits, heads=N, turns=[decoder.frequencies(D // N // 2, 500.0)] * L, parallel=True
        ),
    ),
    "llama": Case(
        "LlamaForCausalLM",
        SIZE | {"head_dim": H} | rope(500.0, "llama3", **LLAMA3),
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        llama_shapes(),
        llama_like(decoder.llama3_frequencies(PLAIN, 8.0, 1.0, 4.0, 16)),
    ),
    "mistral": Case(
        "MistralForCausalLM",
        SIZE | {"head_dim": H, "sliding_window": 4} | rope(500.0, "linear", factor=4.0),
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        llama_shapes(),
        llama_like(PLAIN / 4.0, (4,) * L),
    ),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        SIZE
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True}
        | rope(500.0),
        {"rope_theta": 500.0},
        llama_shapes(D // N, biases="qkv", tied=True),
        llama_like(decoder.frequencies(D // N, 500.0), (None, None, 4), D // N),
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        SIZE | {"head_dim": H, "attention_bias": True} | rope(500.0),
        {"rope_theta": 500.0},
        llama_shapes(biases="qkvo", more=QK),
        llama_like(),
    ),
    "gemma": Case(
        "GemmaForCausalLM",
        GEMMA | {"hidden_act": "gelu"} | rope(500.0),
        {"rope_theta": 500.0},
        llama_shapes(tied=True),
        llama_like(gemma=True, act=decoder.gelu_tanh),
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        GEMMA | SCALED | CAPS | {"layer_types": SLIDING} | rope(500.0),
        {"rope_theta": 500.0, "layer_types": None},
        llama_shapes(tied=True, more=BOTH_SIDES),
        llama_like(windows=(4, None, 4), gemma=True, act=decoder.gelu_tanh, scale=10**-0.5, cap=2.0, final_cap=3.0),
    ),
    "gemma3_text": Case(
        "Gemma3ForCausalLM",
        GEMMA | SCALED | {"layer_types": SLIDING, "rope_parameters": GEMMA3_ROPES},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "layer_types": None,
            "sliding_window_pattern": 2,
        },
        llama_shapes(tied=True, more=(*BOTH_SIDES, *QK)),
        llama_like(
            [decoder.frequencies(H, 1e4), decoder.frequencies(H, 1e6) / 8.0, decoder.frequencies(H, 1e4)],
            (4, None, 4),
            gemma=True,
            act=decoder.gelu_tanh,
            scale=10**-0.5,
        ),
    ),
}
ROTARY = [name for name in CASES if name != "gpt2"]
CACHED = ("gpt_neox", "mistral", "gemma2", "gemma3_text")


def config_of(name, style="new", **changes):
    """config.json; None leaves a key out."""
    case = CASES[name]
    config = case.new | {"model_type": name, "architectures": [case.architecture], "dtype": "float32"}
    if style == "old":
        config = {key: value for key, value in config.items() if key != "rope_parameters"} | case.old
    return {key: value for key, value in (config | changes).items() if value is not None}


def tensors_of(name, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {n: (0.4 * rng.standard_normal(shape)).astype(dtype) for n, shape in CASES[name].shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, tokens, mask=None):
    return model.apply({"params": params}, tokens, mask)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- values


@pytest.mark.parametrize("name", ROTARY)
def test_logits_are_those_of_a_float64_decoder_whatever_the_padding(tmp_path, name):
    tensors = tensors_of(name)
    loaded = hf.load(write(tmp_path / "model", config_of(name), tensors))
    expected = CASES[name].logits(tensors, TOKENS)
    rows = np.stack([np.pad(TOKENS, (0, 3)), np.pad(TOKENS, (3, 0))])
    mask = np.stack([np.arange(T + 3) < T, np.arange(T + 3) >= 3])
    logits = np.asarray(outputs(loaded.model, loaded.params, rows, mask))
    close(logits[mask].reshape(2, T, V), np.stack([expected, expected]))


@pytest.mark.parametrize("name", CACHED)
def test_cached_decoding_beyond_the_window_is_the_float64_decoder(tmp_path, name):
    tensors = tensors_of(name)
    model, params, *_ = hf.load(write(tmp_path / "model", config_of(name), tensors))
    row = np.pad(TOKENS, (2, 0))[None]

    @jax.jit
    def run(params):
        decode = model.decoder(params)
        hidden, cache = decode.prefill(row[:, :7], jnp.arange(7)[None] >= 2, T + 2)
        step = lambda cache, token: decode.decode(token[None, None], cache)[::-1]  # noqa: E731
        _, later = jax.lax.scan(step, cache, jnp.asarray(row[0, 7:]))
        return decode.logits(jnp.concatenate([hidden[0], later[:, 0, 0]]))

    close(np.asarray(run(params))[2:], CASES[name].logits(tensors, TOKENS))


def test_layers_of_two_kinds_scanned_and_rematerialised_are_those_in_line(tmp_path):
    loaded = hf.load(write(tmp_path / "model", config_of("gemma3_text"), tensors_of("gemma3_text")))

    def gradients(**changes):
        model = Transformer(dataclasses.replace(loaded.model.config, **changes))
        loss = lambda params: jnp.square(model.apply({"params": params}, TOKENS[None])).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(loaded.params)

    (loss, grads), (scanned, others) = gradients(), gradients(unroll=1, remat="full")
    close(scanned, loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), others, grads)


@pytest.mark.parametrize("name", CASES)
def test_an_exported_family_is_opened_by_transformers_to_the_same_logits(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch and transformers are absent: the peer did not run")
    transformers = pytest.importorskip("transformers", reason="transformers is absent: the peer did not run")
    for style in ("new", "old"):
        loaded = hf.load(write(tmp_path / style, config_of(name, style), tensors_of(name)))
        hf.save(tmp_path / "kept", loaded)
        hf.save(tmp_path / "written", hf.loaded_from(loaded.model, loaded.params))
        ours = outputs(loaded.model, loaded.params, TOKENS[None])
        for folder in ("kept", "written"):
            peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
            with torch.no_grad():
                expected = peer.eval()(torch.tensor(TOKENS[None])).logits.numpy()
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4, err_msg=f"{style} {folder}")


# --- round trips


@pytest.mark.parametrize("name", CASES)
def test_both_styles_are_one_model_and_round_trips_are_bit_equal(tmp_path, name):
    folder = write(tmp_path / "new", config_of(name), tensors_of(name))
    loaded = hf.load(folder)
    hf.save(tmp_path / "copy", loaded)
    assert stored(tmp_path / "copy") == stored(folder)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config_of(name)
    write(folder, config_of(name, "old"), tensors_of(name))
    assert hf.load(folder).model.config == loaded.model.config
    anew = hf.loaded_from(loaded.model, loaded.params, config={"model_type": name})
    assert anew.config["model_type"] == name and anew.config["architectures"] == [CASES[name].architecture]
    hf.save(tmp_path / "anew", anew)
    assert stored(tmp_path / "anew") == stored(folder)
    assert hf.load(tmp_path / "anew").model.config == loaded.model.config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text"])
def test_half_precision_files_in_two_parts_come_back_bit_equal(tmp_path, name, dtype):
    tensors = tensors_of(name, jnp.dtype(dtype))
    folder = write(tmp_path / "whole", config_of(name, dtype=dtype), tensors)
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    split = write(tmp_path / "split", config_of(name, dtype=dtype), tensors)
    (split / "model.safetensors").unlink()
    for file, names in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in names}, split / file)
    index = {"weight_map": {n: file for file, names in parts.items() for n in names}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    hf.save(tmp_path / "back", hf.load(split))
    assert stored(tmp_path / "back") == stored(folder)
    assert {entry["dtype"] for entry in stored(folder).values()} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}


@pytest.mark.parametrize("name", CASES)
def test_a_classification_head_on_any_family_round_trips(tmp_path, name):
    stem = CASES[name].architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    stem = "Gemma3Text" if name == "gemma3_text" else stem
    tensors = tensors_of(name) | {"score.weight": np.ones((3, D), np.float32)}
    tensors = {n: x for n, x in tensors.items() if n not in ("lm_head.weight", "embed_out.weight")}
    labels = {"id2label": {str(i): f"L{i}" for i in range(3)}}
    config = config_of(name, architectures=[f"{stem}ForSequenceClassification"], **labels)
    folder = write(tmp_path / "model", config, tensors)
    loaded = hf.load(folder)
    assert loaded.model.config.num_labels == 3 and loaded.params["head"]["kernel"].shape == (D, 3)
    anew = hf.loaded_from(loaded.model, loaded.params, config={"model_type": name})
    assert anew.config["architectures"] == config["architectures"]
    hf.save(tmp_path / "anew", anew)
    assert stored(tmp_path / "anew") == stored(folder)


def test_norms_of_heads_and_after_branches_are_replicated_on_a_mesh(tmp_path):
    folder = write(tmp_path / "model", config_of("gemma3_text"), tensors_of("gemma3_text"))
    layers = hf.load(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2)).params["layers"]
    norms = [layers["attention"]["q_norm"], layers["attention"]["k_norm"], layers["post_norm1"], layers["post_norm2"]]
    assert all(x.is_fully_replicated for x in jax.tree.leaves(norms))
    assert layers["attention"]["q"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)


# --- what absence and null mean


@pytest.mark.parametrize(
    "name, changes, field, value",
    [
        ("mistral", {"num_key_value_heads": None, "num_attention_heads": 8}, "kv_heads", 8),
        ("mistral", {"sliding_window": None}, "window", 4096),
        ("qwen2", {"use_sliding_window": False}, "windowed", ()),
        ("qwen2", {"max_window_layers": 0}, "windowed", ()),
        ("gpt_neox", {"rotary_pct": None, "rope_parameters": None}, "rope_share", 0.25),
        ("gpt_neox", {"use_parallel_residual": False}, "parallel", False),
        ("gemma2", {"attn_logit_softcapping": None}, "attention_softcap", 50.0),
        ("gemma2", {"layer_types": ["full_attention"] * L}, "window", 0),
        ("gemma3_text", {"layer_types": None}, "windowed", ()),  # the sixth layer is the first without a window
        ("gemma3_text", {"rope_parameters": None}, "rope_theta", 1e6),
    ],
)
def test_an_absent_key_means_what_the_family_means_by_it(name, changes, field, value):
    from lfjax.interop.families import read_config

    assert getattr(read_config(config_of(name, **changes), "config.json"), field) == value


def test_null_is_not_absence_where_a_family_tells_them_apart():
    from lfjax.interop.families import read_config

    assert read_config(config_of("mistral") | {"num_key_value_heads": None}, "c").kv_heads == N
    assert read_config(config_of("mistral") | {"sliding_window": None}, "c").window == 0
    assert read_config(config_of("qwen2") | {"head_dim": 12}, "c").head_dim == 12
    assert read_config(config_of("gemma2") | {"attn_logit_softcapping": None}, "c").attention_softcap == 0.0


# --- damaged folders


@pytest.mark.parametrize("name", CASES)
def test_damage_is_one_line_naming_file_and_tensor(tmp_path, name):
    config, tensors = config_of(name), tensors_of(name)
    last = max(n for n in tensors if ".2." in n)
    for changed, message in (
        ({n: x for n, x in tensors.items() if n != last}, f"tensor '{last}' is missing"),
        (tensors | {"model.extra.weight": np.ones(2, np.float32)}, "tensor 'model.extra.weight' has no place"),
        (tensors | {last: np.ones((3, 3), np.float32)}, rf"tensor '{last}': found shape \[3, 3\]"),
    ):
        folder = write(tmp_path / "model", config, changed)
        with pytest.raises(InputError, match=rf"model\.safetensors: {message}") as caught:
            hf.load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


WRONG = {
    "unknown family": ("llama", {"model_type": "mamba"}, "'model_type': found 'mamba'"),
    "mixed windows": ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types': found"),
    "window": ("mistral", {"sliding_window": -1}, "'sliding_window': found -1"),
    "switch": ("qwen2", {"use_sliding_window": "yes"}, "'use_sliding_window': found 'yes'"),
    "pattern": ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "'sliding_window_pattern': found 0"),
    "flat ropes": ("gemma3_text", rope(1e4), "'rope_parameters': found"),
    "share": ("gpt_neox", rope(1e4, partial_rotary_factor=2.0), "'partial_rotary_factor': found 2.0"),
    "cap": ("gemma2", {"attn_logit_softcapping": -2.0}, "'attn_logit_softcapping': found -2.0"),
    "llama3 without factor": ("llama", rope(1e4, "llama3"), r"'rope_parameters\.factor': found None"),
    "both ways": ("llama", {"is_causal": False}, "'is_causal': found False"),
    "quantised": ("qwen3", {"quantization_config": {"load_in_4bit": True}}, "'quantization_config': found"),
    "layers of their own": ("mistral", {"per_layer_config": {"0": {}}}, "'per_layer_config': found"),
    "ropes of two kinds": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
        r"'rope_parameters\.full_attention': found",
    ),
    "bidirectional": ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention': found True"),
} | {
    f"rope of {name}": (name, rope(1e4, "yarn"), r"'rope_parameters\.rope_type': found 'yarn'")
    for name in ROTARY
    if name != "gemma3_text"
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_key_is_one_line_naming_file_and_field(tmp_path, kind):
    name, changes, message = WRONG[kind]
    folder = write(tmp_path / "model", config_of(name, **changes), tensors_of(name))
    with pytest.raises(InputError, match=rf"config\.json: field {message}") as caught:
        hf.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
