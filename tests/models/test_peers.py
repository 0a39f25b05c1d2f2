"""What the model computes of real weights, against transformers, TRL and an independent NumPy decoder."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lfjax.interop import hf
from lfjax.losses import lm
from lfjax.optim import make_optimizer
from lfjax.sampling.generate import generate
from lfjax.state import LMState
from lfjax.steps.sft import sft_step
from lfjax.types import SftBatch

ATOL = 2e-4
IGNORED = -100  # transformers' label of positions that carry no loss


@pytest.fixture(params=["gpt2", "llama_gqa_untied", "qwen2_tied"])
def peer(request, shared):
    folder = shared / "reference" / "models" / request.param
    return hf.load(folder), np.load(folder / "io.npz"), json.loads((folder / "sft.json").read_text())


def test_chunked_log_probabilities_and_entropies_are_trls(peer):
    loaded, io, _ = peer
    ids = io["input_ids"].astype(np.int32)

    def stats(params):
        hidden = loaded.model.apply({"params": params}, ids[:, :-1], method="hidden")
        return lm.chunked_token_stats(hidden, loaded.model.unembed(params), ids[:, 1:], chunk_size=7)

    got = jax.jit(stats)(loaded.params)
    np.testing.assert_allclose(got.logprobs, io["trl_token_logps_nopad"], atol=ATOL)
    np.testing.assert_allclose(got.entropy, io["trl_entropy_nopad"], atol=ATOL)


def test_logits_are_those_of_transformers_in_float64(peer):
    loaded, io, _ = peer
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, io["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits[0], io["logits_nopad_f64_row0"], atol=ATOL)


def test_loss_and_the_gradient_norm_of_every_tensor_are_transformers(peer, tmp_path):
    loaded, io, expected = peer
    ids, mask, labels = (io[name].astype(np.int32) for name in ("right_ids", "right_mask", "sft_labels"))

    def loss(params):
        hidden = loaded.model.apply({"params": params}, ids, mask, method="hidden")[:, :-1]
        stats = lm.chunked_token_stats(hidden, loaded.model.unembed(params), labels[:, 1:], chunk_size=8)
        counts = labels[:, 1:] != IGNORED
        return -jnp.sum(jnp.where(counts, stats.logprobs, 0.0)) / counts.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(loaded.params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-4)
    hf.save(tmp_path / "gradients", loaded._replace(params=grads))  # in the peer's names and layout
    tensors = safetensors.numpy.load_file(tmp_path / "gradients" / "model.safetensors")
    norms = {name: float(np.linalg.norm(tensor.astype(np.float64))) for name, tensor in tensors.items()}
    assert norms.keys() == expected["grad_norm_per_param"].keys()
    for name, norm in expected["grad_norm_per_param"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3), name
    assert np.linalg.norm(list(norms.values())) == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa_untied"])
def test_eight_steps_of_adamw_are_torchs(shared, name):
    folder = shared / "reference" / "models" / name
    loaded, io = hf.load(folder), np.load(folder / "io.npz")
    expected = json.loads((folder / "adamw_trajectory.json").read_text())["loss_and_preclip_gradnorm"]
    tx = make_optimizer(1e-3, weight_decay=0.01, clip_norm=1.0, groups=())  # decay of every parameter, as there
    ids, mask, labels = (io[key].astype(np.int32) for key in ("right_ids", "right_mask", "sft_labels"))
    batch = SftBatch(tokens=ids, loss_mask=labels[:, 1:] != IGNORED, segment_ids=mask[:, :-1])
    step = jax.jit(functools.partial(sft_step, model=loaded.model, tx=tx))
    state, found = LMState.create(loaded.params, tx), []
    for _ in expected:
        state, metrics = step(state, batch, jax.random.key(0))
        found.append([float(metrics[key].value) for key in ("sft/loss", "optim/grad_norm")])
    assert len(found) == 8
    np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in expected], rtol=1e-4)
    np.testing.assert_allclose([norm for _, norm in found], [norm for _, norm in expected], rtol=1e-3)


def test_a_trained_llama_writes_its_documented_texts_in_one_left_padded_batch(shared):
    loaded = hf.load(shared / "data" / "stories260K_hf")
    cases = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())["greedy"]
    longest = max(len(case["prompt_ids"]) for case in cases)
    prompts, mask = np.zeros((len(cases), longest), np.int32), np.zeros((len(cases), longest), bool)
    for row, case in enumerate(cases):
        start = longest - len(case["prompt_ids"])
        prompts[row, start:], mask[row, start:] = case["prompt_ids"], True
    count = max(len(case["new_ids"]) for case in cases)
    sample = jax.jit(functools.partial(generate, loaded.model, max_new_tokens=count, temperature=0))
    tokens = sample(loaded.params, prompts, mask, jax.random.key(0)).tokens
    for row, case in enumerate(cases):
        np.testing.assert_array_equal(tokens[row, : len(case["new_ids"])], case["new_ids"])
