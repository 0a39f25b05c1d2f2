"""Models in and out of the Hugging Face layout: the peers' values, bit-equal round trips, damaged folders."""

import functools
import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lfjax import cli
from lfjax.config import InputError
from lfjax.interop import hf
from lfjax.interop.tensors import Tensor
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.sampling.generate import generate
from lfjax.sharding import make_mesh

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tokenizers"))
import vocabularies

TOLERANCE = 2e-4
LANGUAGE_MODELS = ("gpt2", "llama_gqa_untied", "qwen2_tied")
GPT2 = presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, context=32)
LLAMA = presets.llama(vocab_size=61, width=16, layers=2, heads=4, mlp_width=24, context=32, kv_heads=2)
FORMS = {
    "gpt2": GPT2,
    "gpt2 untied": presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, context=32, tied=False),
    "gpt2 narrow mlp": presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, context=32, mlp_width=20),
    "gpt2 score": presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, context=32, num_labels=1),
    "gpt2 value": presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, context=32, num_labels=3, head_bias=True),
    "llama": LLAMA,
    "llama tied": presets.llama_tiny(vocab_size=61, width=16, heads=2, mlp_width=24, head_dim=12, rope_theta=500.0),
    "llama biases": presets.llama(
        vocab_size=61, width=16, layers=2, heads=2, mlp_width=24, attention_bias=True, mlp_bias=True
    ),
    "llama score": presets.llama_tiny(vocab_size=61, width=16, heads=2, mlp_width=24, num_labels=1),
    "llama value": presets.llama_tiny(vocab_size=61, width=16, heads=2, mlp_width=24, num_labels=1, head_bias=True),
}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 61


def random_model(config, seed=0):
    """A model all of whose parameters are random: norms and biases too, so that none can be forgotten unseen."""
    model, rng = Transformer(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), shapes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def outputs(model, params, tokens, mask=None, method=None, types=None):
    return model.apply({"params": params}, tokens, mask, token_type_ids=types, method=method)


def edit_config(folder: pathlib.Path, **changes) -> None:
    """Sets keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: pathlib.Path, change) -> None:
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def stored(folder: pathlib.Path) -> dict:
    """Name -> dtype, shape and raw bytes of every tensor in the file."""
    return dict(safetensors.deserialize((folder / "model.safetensors").read_bytes()))


@pytest.fixture
def saved(tmp_path):
    """A saved Llama-form language model: folder."""
    model, params = random_model(LLAMA)
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    return tmp_path / "model"


# --- the peers' values


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "llama_seqcls"])
def test_logits_equal_transformers_with_any_padding(shared, name):
    folder = shared / "reference" / "models" / name
    loaded, io = hf.load(folder), np.load(folder / "io.npz")
    for ids, mask, expected in (
        ("input_ids", None, "logits_nopad"),
        ("right_ids", "right_mask", "logits_right"),
        ("left_ids", "left_mask", "logits_left"),
    ):
        real = np.ones(io[ids].shape, bool) if mask is None else io[mask].astype(bool)
        logits = np.asarray(outputs(loaded.model, loaded.params, io[ids], None if mask is None else real))
        rows = real if logits.ndim == 3 else slice(None)
        np.testing.assert_allclose(logits[rows], io[expected][rows], atol=TOLERANCE, rtol=0, err_msg=expected)


def test_scores_of_every_position_equal_transformers(shared):
    folder = shared / "reference" / "models" / "llama_seqcls"
    loaded, io = hf.load(folder), np.load(folder / "io.npz")
    real = io["right_mask"].astype(bool)
    scores = outputs(loaded.model, loaded.params, io["right_ids"], real, "values")
    np.testing.assert_allclose(np.asarray(scores)[real], io["score_all_positions_right"][real], atol=TOLERANCE, rtol=0)


def test_scores_of_an_encoder_equal_transformers(shared):
    folder = shared / "reference" / "models" / "bert_cls"
    loaded, io = hf.load(folder), np.load(folder / "io.npz")
    score = functools.partial(outputs, loaded.model, loaded.params, types=io["token_type_ids"])
    np.testing.assert_allclose(score(io["input_ids"]), io["logits_nopad"], atol=TOLERANCE, rtol=0)
    padded = score(io["right_ids"], io["right_mask"].astype(bool))
    np.testing.assert_allclose(padded, io["logits_right"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_greedy_tokens_equal_transformers(shared, name):
    folder = shared / "reference" / "models" / name
    loaded, io = hf.load(folder), np.load(folder / "io.npz")
    sample = jax.jit(functools.partial(generate, loaded.model, max_new_tokens=12, temperature=0.0))
    tokens = sample(loaded.params, io["left_ids"], io["left_mask"].astype(bool), jax.random.key(0)).tokens
    np.testing.assert_array_equal(tokens, io["greedy_left"][:, io["left_ids"].shape[1] :])


def test_a_trained_llama_tells_its_documented_story(shared):
    golden = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())
    loaded = hf.load(shared / "data" / "stories260K_hf")
    logits = outputs(loaded.model, loaded.params, np.array([[1, 403, 407, 261, 378]], np.int32))
    expected = golden["logits_last_for_ids_1_403_407_261_378"]
    np.testing.assert_allclose(logits[0, -1], expected, atol=TOLERANCE, rtol=0)
    prompt = np.array([golden["greedy"][0]["prompt_ids"]], np.int32)
    sample = jax.jit(functools.partial(generate, loaded.model, max_new_tokens=256, temperature=0.0))
    tokens = sample(loaded.params, prompt, np.ones_like(prompt, bool), jax.random.key(0)).tokens
    assert tokens[0].tolist() == golden["greedy"][0]["new_ids"]
    assert loaded.tokenizer.decode(tokens[0].tolist()).strip() == golden["greedy"][0]["text"].strip()


@pytest.mark.parametrize(
    "form", ["gpt2", "gpt2 score", "gpt2 value", "llama", "llama biases", "llama tied", "llama score"]
)
def test_an_exported_model_gives_the_same_logits_in_transformers(tmp_path, form):
    torch = pytest.importorskip(
        "torch", reason="torch and transformers are absent: exports were not opened by the peer"
    )
    transformers = pytest.importorskip("transformers", reason="transformers is absent: exports were not opened by it")
    model, params = random_model(FORMS[form])
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    architecture = json.loads((tmp_path / "model" / "config.json").read_text())["architectures"][0]
    peer, report = getattr(transformers, architecture).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():  # one row: without a pad id the peer pools no batch
        expected = peer.eval()(torch.tensor(TOKENS[:1], dtype=torch.int64)).logits.numpy()
    ours = outputs(model, params, TOKENS[:1], None, "values" if model.config.head_bias else None)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


# --- round trips


@pytest.mark.parametrize(
    "name",
    ["reference/models/gpt2", "reference/models/llama_gqa_untied"]
    + ["reference/models/llama_seqcls", "data/stories260K_hf"],
)
def test_import_then_export_gives_the_same_tensors_and_config(shared, tmp_path, name):
    hf.save(tmp_path / "model", hf.load(shared / name, vocab_multiple=128))
    assert stored(tmp_path / "model") == stored(shared / name)
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", shared / name))
    assert written == read
    assert (tmp_path / "model" / "tokenizer.model").exists() == (shared / name / "tokenizer.model").exists()


@pytest.mark.parametrize("form", FORMS)
def test_export_then_import_gives_the_same_model(tmp_path, form):
    model, params = random_model(FORMS[form])
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    back = hf.load(tmp_path / "model")
    assert back.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_padded_vocabulary_rows_never_leave_and_come_back_as_zeros(tmp_path, saved):
    plain, padded = hf.load(saved), hf.load(saved, vocab_multiple=16)
    assert padded.params["embed"]["tokens"].shape == (64, 16)
    assert not np.any(padded.params["embed"]["tokens"][61:])
    assert not np.any(padded.params["unembed"]["kernel"][:, 61:])
    marked = jax.tree.map(np.array, padded.params)
    marked["embed"]["tokens"][61:] = 1e9  # whatever training put there
    hf.save(tmp_path / "padded", padded._replace(params=marked))
    assert stored(tmp_path / "padded") == stored(saved)
    logits = outputs(padded.model, padded.params, TOKENS)
    np.testing.assert_array_equal(logits, outputs(plain.model, plain.params, TOKENS))


def test_half_precision_files_round_trip_until_training_needs_more(tmp_path, saved):
    edit_tensors(saved, lambda tensors: tensors.update({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}))
    edit_config(saved, dtype="bfloat16", torch_dtype="bfloat16")
    loaded = hf.load(saved)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    hf.save(tmp_path / "same", loaded)
    assert stored(tmp_path / "same") == stored(saved)
    assert {entry["dtype"] for entry in stored(saved).values()} == {"BF16"}
    trained = loaded._replace(params=jax.tree.map(lambda x: np.asarray(x) + np.float32(1e-6), loaded.params))
    hf.save(tmp_path / "trained", trained)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "trained").params, trained.params)
    assert hf.load(tmp_path / "trained").config["dtype"] == "float32"


def test_unknown_keys_of_the_config_are_kept(tmp_path, saved):
    edit_config(saved, quirk={"deep": [1, 2]}, eos_token_id=[2, 7])
    loaded = hf.load(saved)
    hf.save(tmp_path / "copy", loaded)
    assert hf.load(tmp_path / "copy").config == loaded.config
    heir = hf.loaded_from(*random_model(FORMS["llama value"]), config=loaded.config)
    assert (heir.config["quirk"], heir.config["eos_token_id"]) == ({"deep": [1, 2]}, [2, 7])
    assert heir.config["architectures"] == ["LlamaForTokenClassification"]


def test_special_ids_come_from_the_tokenizer(shared):
    tokenizer = hf.load(shared / "data" / "stories260K_hf").tokenizer
    model, params = random_model(presets.llama_tiny(vocab_size=512, width=16, heads=2, mlp_width=24))
    config = hf.loaded_from(model, params, tokenizer).config
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, tokenizer.pad_id]
    with pytest.raises(InputError, match=r"512 pieces.*vocab_size is 61"):
        hf.loaded_from(*random_model(LLAMA), tokenizer)


# --- forms of the layout


def test_both_rope_styles_give_the_same_model(saved):
    edit_config(saved, rope_parameters={"rope_type": "default", "rope_theta": 321.0}, rope_theta=None)
    new = hf.load(saved).model.config
    edit_config(saved, rope_parameters=None, rope_theta=321.0)
    assert hf.load(saved).model.config == new
    assert new.rope_theta == 321.0


def test_files_without_the_trunk_prefix_are_read(tmp_path):
    model, params = random_model(GPT2)
    hf.save(tmp_path / "model", hf.loaded_from(model, params))

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)  # a buffer of old versions

    edit_tensors(tmp_path / "model", strip)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "model").params, params)


def test_a_second_copy_of_a_tied_embedding_is_accepted_only_if_equal(tmp_path):
    model, params = random_model(FORMS["llama tied"])
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    copy = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})  # noqa: E731
    edit_tensors(tmp_path / "model", copy)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "model").params, params)
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(InputError, match=r"lm_head\.weight.*tie_word_embeddings"):
        hf.load(tmp_path / "model")


def test_several_files_with_an_index_are_one_model(saved):
    whole = hf.load(saved).params
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, saved / file)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    jax.tree.map(np.testing.assert_array_equal, hf.load(saved).params, whole)
    for name in ("../a.safetensors", "a\ud800.safetensors", "a\0.safetensors"):
        index.write_text(json.dumps({"weight_map": {names[0]: name}}))
        with pytest.raises(InputError, match=r"index\.json: field 'weight_map'"):
            hf.load(saved)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(InputError, match=r"a\.safetensors: tensor 'x' is missing"):
        hf.load(saved)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"}}))
    wrong = rf"index\.json: tensor '{names[0]}': said to be in b\.safetensors, found in a\.safetensors; fetch or"
    with pytest.raises(InputError, match=wrong):
        hf.load(saved)


def test_task_says_which_head_when_the_config_does_not(saved):
    edit_config(saved, architectures=None)
    assert hf.load(saved, task="lm").model.config.num_labels == 0
    with pytest.raises(InputError, match=r"architectures.*task="):
        hf.load(saved)
    with pytest.raises(InputError, match=r"tensor 'score\.weight' is missing"):
        hf.load(saved, task="sequence")
    with pytest.raises(InputError, match="task='chat'"):
        hf.load(saved, task="chat")


def test_dtype_is_that_of_the_computation(saved):
    loaded = hf.load(saved, dtype="bfloat16")
    assert loaded.model.config.dtype == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}


def test_a_mesh_places_every_parameter_by_the_rules(tmp_path, saved):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread, whole = hf.load(saved, mesh=mesh), hf.load(saved, vocab_multiple=128)
    jax.tree.map(np.testing.assert_array_equal, spread.params, whole.params)
    q = spread.params["layers"]["attention"]["q"]
    assert q.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    assert spread.params["embed"]["tokens"].sharding.shard_shape((128, 16)) == (64, 8)
    replicated = hf.load(saved, mesh=mesh, rules=((r"", ()),)).params
    assert all(x.is_fully_replicated for x in jax.tree.leaves(replicated))
    hf.save(tmp_path / "spread", spread)
    assert stored(tmp_path / "spread") == stored(saved)


# --- damaged folders


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_entry(name, value):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors[name].__setitem__((0, 0), value))


def set_tensor(name, value):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__setitem__(name, value))


def set_key(**changes):
    return lambda folder: edit_config(folder, **changes)


Q = "model.layers.1.self_attn.q_proj.weight"


def fifo_shard(folder):
    """An index that names a FIFO, which nobody writes to."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    os.mkfifo(folder / "model-00002-of-00002.safetensors")
    names = dict.fromkeys(
        safetensors.numpy.load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"
    )
    index = {"weight_map": names | {"x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header(text: bytes, length: int | None = None):
    content = (len(text) if length is None else length).to_bytes(8, "little") + text
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def empty_tensors(count: int) -> bytes:
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % i for i in range(count)) + b"}"


DAMAGED = {
    "a FIFO for a file": (fifo_shard, r"model-00002-of-00002\.safetensors: not a regular file"),
    "many tensors": (header(empty_tensors(200_001)), r"model\.safetensors: its header has more than 100 MB or 200000"),
    "a long header": (header(b"{}", 10**12), "its header has more than 100 MB"),
    "a long config": (set_key(x=list(range(10**6))), r"config\.json: larger than 4 MB"),
    "a deep header": (header(b"[" * 100_000), r"not a whole safetensors file \(nested deeper than 100\)"),
    "a header that is a list": (header(b"[]"), "not a whole safetensors file"),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "no tensor": (lambda f: edit_tensors(f, dict.clear), "holds no tensor"),
    "no tensors file": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickle": (pickle_only, "pickled pytorch_model.bin is never read"),
    "wrong shape": (set_tensor(Q, np.zeros((8, 16), np.float32)), rf"{Q}'.*found shape \[8, 16\].*\[16, 16\]"),
    "transposed": (
        set_tensor("model.layers.0.mlp.up_proj.weight", np.zeros((16, 24), np.float32)),
        r"up_proj.*\[16, 24\].*\[24, 16\]",
    ),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(Q)), rf"safetensors: tensor '{Q}' is missing"),
    "extra tensor": (set_tensor("model.extra", np.zeros(2, np.float32)), r"tensor 'model\.extra' has no place"),
    "a layer too many": (set_key(num_hidden_layers=1), r"model\.layers\.1\.\S+ \(and 8 more\) has no place"),
    "NaN": (set_entry(Q, np.nan), rf"{Q}'.*NaN or infinity"),
    "infinity": (set_entry("lm_head.weight", np.inf), r"lm_head\.weight'.*NaN or infinity"),
    "integers": (set_tensor(Q, np.zeros((16, 16), np.int8)), rf"{Q}'.*stored as I8"),
    "wrong vocabulary": (set_key(vocab_size=60), r"embed_tokens.*found shape \[61, 16\].*\[60, 16\]"),
    "unknown model_type": (
        set_key(model_type="mamba"),
        r"config\.json: field 'model_type': found 'mamba'.*gpt2, llama",
    ),
    "unknown architecture": (set_key(architectures=["LlamaModel"]), "field 'architectures': found 'LlamaModel'"),
    "architectures no list": (set_key(architectures="LlamaForCausalLM"), "field 'architectures'"),
    "missing key": (set_key(hidden_size=None), "field 'hidden_size': missing"),
    "wrong type": (set_key(hidden_size="16"), "field 'hidden_size': found '16'; must be a positive integer"),
    "bool for int": (set_key(num_hidden_layers=True), "field 'num_hidden_layers': found True"),
    "no layer": (set_key(num_hidden_layers=0), "field 'num_hidden_layers': found 0"),
    "string for bool": (set_key(tie_word_embeddings="no"), "tie_word_embeddings.*true or false"),
    "activation": (set_key(hidden_act="relu2"), "field 'hidden_act': found 'relu2'"),
    "kv heads": (set_key(num_key_value_heads=3), "field 'num_key_value_heads': found 3; must divide"),
    "odd head dim": (set_key(head_dim=5), r"config\.json: .*head_dim: found 5"),
    "rope scaling": (
        set_key(rope_parameters={"rope_type": "yarn"}),
        r"field 'rope_parameters\.rope_type': found 'yarn'",
    ),
    "old rope scaling": (
        set_key(rope_parameters=None, rope_scaling={"type": "linear"}),
        r"field 'rope_scaling\.factor': found None",
    ),
    "rope theta": (set_key(rope_parameters={"rope_theta": -1}), "field 'rope_theta': found -1"),
    "rope no object": (set_key(rope_parameters=3), "field 'rope_parameters': found 3"),
    "partial rope": (set_key(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: not found"),
    "config cut": (lambda f: (f / "config.json").write_text('{\n"a": 1,'), r"config\.json:2: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON list, not an object"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\n\xff\xfe"), r"config\.json:2: not UTF-8"),
    "config with a number of 5000 digits": (
        lambda f: (f / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}"),
        r"config\.json: not JSON",
    ),
    "config nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        r"config\.json: not JSON",
    ),
    "model_type a list": (set_key(model_type=["llama"]), r"field 'model_type': found \['llama'\]; known are"),
    "architecture a list": (set_key(architectures=[["a"]]), r"field 'architectures': found \['a'\]; known are"),
    "eps not a number": (set_key(rms_norm_eps=float("nan")), r"config\.json: not JSON \(NaN is not JSON\)"),
    "eps too large": (set_key(rms_norm_eps=10**400), "field 'rms_norm_eps': found 1000"),
    "rope theta too large": (set_key(rope_theta=10**400, rope_parameters=None), "field 'rope_theta': found 1000"),
    "a context too large": (set_key(max_position_embeddings=2**31), "'max_position_embeddings'.*below 2\\^31"),
    "a vocabulary that no memory holds": (set_key(vocab_size=2**31 - 1), r"found shape \[61, 16\]; config.json asks"),
    "layers that no memory holds": (set_key(num_hidden_layers=2**31 - 1), r"model\.layers\.2147483646\.\S+ is missing"),
    "a label count of true": (
        set_key(architectures=["LlamaForSequenceClassification"], num_labels=True),
        "'num_labels': found True",
    ),
    "no folder": (shutil.rmtree, "no such folder"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.model").write_bytes(b"x"), r"tokenizer\.model: not a Sentence"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_one_line_naming_file_and_place(saved, kind):
    damage, message = DAMAGED[kind]
    damage(saved)
    with pytest.raises(InputError, match=message) as caught:
        hf.load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(shared, saved):
    shutil.copy(shared / "data" / "stories260K_hf" / "tokenizer.model", saved)
    with pytest.raises(InputError, match=r"the tokenizer has 512 tokens.*61"):
        hf.load(saved)


def test_gpt2_settings_that_change_the_maths_are_refused(tmp_path):
    hf.save(tmp_path / "model", hf.loaded_from(*random_model(GPT2)))
    edit_config(tmp_path / "model", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        hf.load(tmp_path / "model")


# --- writing


def test_a_form_no_family_has_is_refused_saying_why():
    model, params = random_model(presets.gpt2(vocab_size=61, width=16, layers=2, heads=2, kv_heads=1))
    with pytest.raises(InputError, match=r"gpt2 cannot have kv_heads=1; llama cannot have.*position='learned'"):
        hf.loaded_from(model, params)


def test_a_config_of_another_model_is_not_written(tmp_path, saved):
    model, params = random_model(FORMS["llama tied"])
    with pytest.raises(InputError, match="loaded_from"):
        hf.save(tmp_path / "other", hf.load(saved)._replace(model=model, params=params))
    with pytest.raises(InputError, match="parameter 'embed/tokens': missing"):
        hf.save(tmp_path / "other", hf.load(saved)._replace(params={"embed": {}}))
    assert not (tmp_path / "other").exists()


def test_a_failed_write_leaves_the_old_model_and_no_litter(tmp_path, saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    loaded = hf.load(saved)
    changed = jax.tree.map(lambda x: np.asarray(x) + 1, loaded.params)

    class FullDisk:
        def save(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        hf.save(saved, loaded._replace(params=changed, tokenizer=FullDisk()))
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_saving_again_replaces_the_model_and_leaves_no_litter(tmp_path, saved):
    loaded = hf.load(saved)
    changed = loaded._replace(params=jax.tree.map(lambda x: np.asarray(x) + 1, loaded.params))
    hf.save(saved, changed)
    jax.tree.map(np.testing.assert_array_equal, hf.load(saved).params, changed.params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", [False, True])
def test_what_a_killed_save_left_is_removed_by_the_next(missing, tmp_path, saved, monkeypatch):
    loaded = hf.load(saved)
    rename = pathlib.Path.rename

    def killed(self, target):
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "rename", killed)
    monkeypatch.setattr(hf.shutil, "rmtree", lambda *_, **__: None)  # kill -9: nothing is cleared up
    with pytest.raises(KeyboardInterrupt):
        hf.save(saved, loaded)
    monkeypatch.undo()
    assert not saved.exists() and len(list(tmp_path.iterdir())) == 2
    for entry in list(tmp_path.iterdir()):  # of a process of another number, or of a save that got further
        entry.rename(tmp_path / f"{entry.name.rpartition('-')[0]}-4194305")
    if not missing:
        shutil.copytree(tmp_path / ".model.old-4194305", saved)
    others = [tmp_path / name for name in (".model.old-mine", ".models.old-7", ".model.newer-7", "xmodel.new-7")]
    for other in others:
        other.mkdir()
    hf.save(saved, loaded)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", *(other.name for other in others)}
    jax.tree.map(np.testing.assert_array_equal, hf.load(saved).params, loaded.params)


def test_the_older_model_outlives_a_save_that_fails(tmp_path, saved, monkeypatch):
    """It may be the only one: the save before was killed between its two renames."""
    loaded = hf.load(saved)
    saved.rename(tmp_path / ".model.old-4194305")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        hf.save(saved, loaded)
    assert [entry.name for entry in tmp_path.iterdir()] == [".model.old-4194305"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path, saved):
    loaded = hf.load(saved)
    (saved / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"other files \(thesis\.txt\)"):
        hf.save(saved, loaded)
    assert (saved / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        hf.save(tmp_path / "file", loaded)
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", loaded)
    assert stored(tmp_path / "empty") == stored(saved)


@pytest.mark.parametrize(
    "place", ["adapter/notes/n.txt", "adapter/n.txt", "generation_config.json/n.txt", "additional_chat_templates/n.txt"]
)
def test_folders_of_others_under_our_names_are_never_replaced(saved, place):
    loaded, file = hf.load(saved), saved / place
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(InputError, match=rf"holds other files \({place.rsplit('/', 1)[0]}"):
        hf.save(saved, loaded)
    assert file.read_text() == "years of work"


def test_a_prompt_that_a_vocabulary_fails_on_is_told_with_its_file(tmp_path, capsys):
    model, params = random_model(presets.llama_tiny(vocab_size=300, width=16, heads=2, mlp_width=24))
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    spec = json.loads(vocabularies.byte_level().to_str())
    slow = {"type": "Split", "pattern": {"Regex": r"(?<=q@)(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": slow}))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert cli.main(["sample", str(tmp_path / "model"), "--prompt=q@" + "a" * 60 + "!"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path / 'model' / 'tokenizer.json'}: this vocabulary cannot encode")
    assert cli.main(["sample", str(tmp_path / "model"), "--stop=the cat"]) == 2
    assert capsys.readouterr().err.startswith("error: --stop: 'the cat' is ")


# --- the tables' axis notation


@pytest.mark.parametrize(
    "axes", ["(N H) D -> D N H", "D (N H) -> N H D", "V D -> V D", "V D -> D V", "D (J N H) -> J D N H"]
)
def test_axis_notation_moves_each_element_to_where_the_names_say(axes):
    paths = "q k v" if "J" in axes else "x"
    sizes = {"N": 2, "H": 3, "D": 5, "V": 7, "J": 3}
    tensor = Tensor("t", paths, axes)
    theirs = np.arange(np.prod(tensor.their_shape(sizes))).reshape(tensor.their_shape(sizes))
    ours = np.stack(tensor.to_ours(theirs, sizes)) if "J" in axes else tensor.to_ours(theirs, sizes)[0]
    merged, target = axes.replace("(", "").replace(")", "").split(" -> ")
    names = target.split()
    for index in np.ndindex(*ours.shape):
        at = dict(zip(names, index, strict=True))
        flat = 0
        for axis in merged.split():  # row-major over their axes
            flat = flat * sizes[axis] + at[axis]
        assert ours[index] == flat
    np.testing.assert_array_equal(tensor.to_theirs(list(ours) if "J" in axes else [ours], sizes), theirs)
