"""Logits and greedy text against the values computed by transformers and by an independent NumPy decoder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lfjax.losses import lm
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.sampling.generate import generate

ATOL = 2e-4


def stacked(weights, config, entries):
    """entries: our name -> (their name with {} for the layer, their array -> ours)."""
    return {
        name: np.stack([change(weights[theirs.format(i)]) for i in range(config.layers)])
        for name, (theirs, change) in entries.items()
    }


def load_llama(folder, num_labels=0):
    hf = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config = presets.llama(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim", 0),
        mlp_width=hf["intermediate_size"],
        context=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        tied=hf["tie_word_embeddings"],
        num_labels=num_labels,
    )
    heads = lambda w: w.reshape(-1, config.head_dim, config.width).transpose(2, 0, 1)  # noqa: E731
    back = lambda w: w.T.reshape(config.heads, config.head_dim, config.width)  # noqa: E731
    same, turn = (lambda w: w), (lambda w: w.T)
    at = "model.layers.{}."
    params = {
        "embed": {"tokens": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": {
            "norm1": stacked(weights, config, {"scale": (at + "input_layernorm.weight", same)}),
            "norm2": stacked(weights, config, {"scale": (at + "post_attention_layernorm.weight", same)}),
            "attention": stacked(
                weights,
                config,
                {n: (at + f"self_attn.{n}_proj.weight", back if n == "o" else heads) for n in "qkvo"},
            ),
            "mlp": stacked(weights, config, {n: (at + f"mlp.{n}_proj.weight", turn) for n in ("up", "gate", "down")}),
        },
    }
    if num_labels:
        params["head"] = {"kernel": weights["score.weight"].T}
    elif not config.tied:
        params["unembed"] = {"kernel": weights["lm_head.weight"].T}
    return Transformer(config), params


def load_gpt2(folder):
    hf = json.loads((folder / "config.json").read_text())
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    D, N = hf["n_embd"], hf["n_head"]
    H = D // N
    config = presets.gpt2(
        vocab_size=hf["vocab_size"],
        width=D,
        layers=hf["n_layer"],
        heads=N,
        context=hf["n_positions"],
        norm_eps=hf["layer_norm_epsilon"],
    )
    same = lambda w: w  # noqa: E731
    attention = {
        "o": ("h.{}.attn.c_proj.weight", lambda w: w.reshape(N, H, D)),
        "o_bias": ("h.{}.attn.c_proj.bias", same),
    }
    for i, n in enumerate("qkv"):
        attention[n] = ("h.{}.attn.c_attn.weight", lambda w, i=i: w[:, i * D : (i + 1) * D].reshape(D, N, H))
        attention[f"{n}_bias"] = ("h.{}.attn.c_attn.bias", lambda w, i=i: w[i * D : (i + 1) * D].reshape(N, H))
    mlp = {}
    for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
        mlp[ours] = ("h.{}.mlp." + theirs + ".weight", same)
        mlp[f"{ours}_bias"] = ("h.{}.mlp." + theirs + ".bias", same)
    norm = {
        n: {"scale": ("h.{}.ln_" + n[-1] + ".weight", same), "bias": ("h.{}.ln_" + n[-1] + ".bias", same)}
        for n in ("norm1", "norm2")
    }
    layers = {"attention": attention, "mlp": mlp, **norm}
    params = {
        "embed": {"tokens": weights["wte.weight"], "positions": weights["wpe.weight"]},
        "final_norm": {"scale": weights["ln_f.weight"], "bias": weights["ln_f.bias"]},
        "layers": {group: stacked(weights, config, entries) for group, entries in layers.items()},
    }
    return Transformer(config), params


PEERS = {"gpt2": load_gpt2, "llama_gqa_untied": load_llama}


@pytest.fixture(params=PEERS)
def peer(request, shared):
    folder = shared / "reference" / "models" / request.param
    model, params = PEERS[request.param](folder)
    return model, params, np.load(folder / "io.npz")


def apply(model, params, *args, **kwargs):
    return jax.jit(lambda p, a, k: model.apply({"params": p}, *a, **k))(params, args, kwargs)


def test_logits_without_padding_are_transformers(peer):
    model, params, io = peer
    logits = apply(model, params, io["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, io["logits_nopad"], atol=ATOL)
    np.testing.assert_allclose(logits[0], io["logits_nopad_f64_row0"], atol=ATOL)
    targets = jnp.asarray(io["input_ids"][:, 1:], jnp.int32)
    np.testing.assert_allclose(lm.token_logprobs(logits[:, :-1], targets), io["trl_token_logps_nopad"], atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding_are_transformers(peer, side):
    model, params, io = peer
    mask = io[f"{side}_mask"].astype(bool)
    logits = apply(model, params, io[f"{side}_ids"].astype(np.int32), mask)
    np.testing.assert_allclose(logits[mask], io[f"logits_{side}"][mask], atol=ATOL)


def test_greedy_continuations_of_left_padded_prompts_are_transformers(peer):
    model, params, io = peer
    prompts, mask = io["left_ids"].astype(np.int32), io["left_mask"].astype(bool)
    new = io["greedy_left"].shape[1] - prompts.shape[1]
    out = jax.jit(
        lambda p, x, m: generate(
            model, p, x, m, jax.random.key(0), max_new_tokens=new, temperature=0, eos_ids=(2,), pad_id=1
        )
    )(params, prompts, mask)
    np.testing.assert_array_equal(out.tokens, io["greedy_left"][:, prompts.shape[1] :])


def test_sequence_scores_are_transformers(shared):
    folder = shared / "reference" / "models" / "llama_seqcls"
    model, params = load_llama(folder, num_labels=1)
    io = np.load(folder / "io.npz")
    for ids, mask, expected in (
        ("input_ids", None, "logits_nopad"),
        ("right_ids", "right_mask", "logits_right"),
        ("left_ids", "left_mask", "logits_left"),
    ):
        scores = apply(model, params, io[ids].astype(np.int32), None if mask is None else io[mask].astype(bool))
        np.testing.assert_allclose(scores, io[expected], atol=ATOL)
    values = jax.jit(lambda p, t: model.apply({"params": p}, t, method="values"))(
        params, io["right_ids"].astype(np.int32)
    )
    real = io["right_mask"].astype(bool)
    np.testing.assert_allclose(values[real], io["score_all_positions_right"][real], atol=ATOL)


@pytest.fixture(scope="module")
def stories(shared):
    return *load_llama(shared / "data" / "stories260K_hf"), json.loads(
        (shared / "data/stories260K/golden.json").read_text()
    )


def test_stories260k_logits_equal_the_independent_decoders(stories):
    model, params, golden = stories
    logits = apply(model, params, np.array([[1, 403, 407, 261, 378]], np.int32))[0, -1]
    np.testing.assert_allclose(logits, golden["logits_last_for_ids_1_403_407_261_378"], atol=ATOL)


def test_stories260k_writes_its_documented_greedy_texts_in_one_left_padded_batch(stories):
    model, params, golden = stories
    cases = golden["greedy"]
    longest = max(len(c["prompt_ids"]) for c in cases)
    count = len(cases[0]["new_ids"])
    prompts = np.zeros((len(cases), longest), np.int32)
    mask = np.zeros((len(cases), longest), bool)
    for row, case in enumerate(cases):
        ids = case["prompt_ids"]
        prompts[row, longest - len(ids) :], mask[row, longest - len(ids) :] = ids, True
    out = jax.jit(lambda p, x, m: generate(model, p, x, m, jax.random.key(0), max_new_tokens=count, temperature=0))(
        params, prompts, mask
    )
    for row, case in enumerate(cases):
        np.testing.assert_array_equal(out.tokens[row, : len(case["new_ids"])], case["new_ids"])
