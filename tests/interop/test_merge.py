"""PEFT's adapters read onto their bases: W + scale B A by formula, and the logits of PEFT's own merged model."""

import functools
import json
import math
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from folders import write
from test_families import CASES, TOKENS, D, F, L, V, config_of, tensors_of
from test_peft import HOW as HOW_TRAINED
from test_peft import adapted

from lfjax import cli
from lfjax.config import InputError
from lfjax.interop import hf, merge, peft
from lfjax.models import lora
from lfjax.sharding import make_mesh

PREFIX = "base_model.model."
RNG = np.random.default_rng(0)
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
SHAPES = {Q: (24, D), DOWN: (D, F)}  # [D_out D_in] of Llama's
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["q_proj", "down_proj"],
}


def values(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def low_rank(module, rank, d_out, d_in):
    return {
        f"{PREFIX}{module}.lora_A.weight": values(rank, d_in),
        f"{PREFIX}{module}.lora_B.weight": values(d_out, rank),
    }


def adapter(folder, base, tensors, **config):
    folder.mkdir(exist_ok=True)
    config = CONFIG | {"base_model_name_or_path": str(base)} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def llama_adapter(folder, base, ranks=lambda module: 2, layers=range(L), **config):
    tensors = {}
    for module, shape in SHAPES.items():
        for i in layers:
            tensors |= low_rank(f"model.layers.{i}.{module}", ranks(f"model.layers.{i}.{module}"), *shape)
    return adapter(folder, base, tensors, **config), tensors


@pytest.fixture
def base(tmp_path):
    """A Llama of 3 layers."""
    return write(tmp_path / "base", config_of("llama"), tensors_of("llama"))


def merged_by_formula(base, tensors, scale):
    """The base's tensors with W + scale(module) B A in place of W, float64."""
    whole = {k: x.astype(np.float64) for k, x in safetensors.numpy.load_file(base / "model.safetensors").items()}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            whole[f"{module}.weight"] = whole[f"{module}.weight"] + scale(module) * (b.astype(np.float64) @ a)
    return whole


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=2e-6 * max(1.0, float(np.abs(x).max())), err_msg=name)


HOW = {
    "rank and alpha": ({}, lambda module: 2, lambda module: 3 / 2),
    "rslora": ({"use_rslora": True}, lambda module: 2, lambda module: 3 / math.sqrt(2)),
    "patterns": (
        {"rank_pattern": {"mlp.down_proj": 4, r".*\.1\..*q_proj": 1}, "alpha_pattern": {"layers.0.mlp.down_proj": 7}},
        lambda module: 4 if "down" in module else 1 if ".1." in module else 2,
        lambda module: (7 if "0.mlp.down" in module else 3) / (4 if "down" in module else 1 if ".1." in module else 2),
    ),
}


@pytest.mark.parametrize("how", HOW)
def test_an_adapter_is_merged_as_w_plus_scale_b_a(tmp_path, base, how):
    config, ranks, scale = HOW[how]
    folder, tensors = llama_adapter(tmp_path / "adapter", base, ranks, **config)
    assert cli.main(["import", str(folder), str(tmp_path / "new")]) == 0
    expected = merged_by_formula(base, tensors, scale)
    same(safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors"), expected)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    jax.tree.map(
        np.testing.assert_array_equal, hf.load(folder, mesh=mesh).params, hf.load(folder, vocab_multiple=128).params
    )


def test_the_base_is_beside_the_adapter_or_where_its_config_or_the_user_says(tmp_path, base, monkeypatch, capfd):
    folder, tensors = llama_adapter(tmp_path / "adapter", "org/model")
    whole = hf.load(folder, base=base).params
    assert not np.array_equal(whole["layers"]["mlp"]["down"], hf.load(base).params["layers"]["mlp"]["down"])
    config, beside = folder / "adapter_config.json", shutil.copytree(base, tmp_path / "both")
    for file in folder.iterdir():
        shutil.copy(file, beside)
    named = json.loads(config.read_text())
    for path, name in ((beside, None), (folder, "../base"), (folder, str(base))):
        (path / "adapter_config.json").write_text(json.dumps(named | {"base_model_name_or_path": name}))
        jax.tree.map(np.testing.assert_array_equal, hf.load(path).params, whole)
    monkeypatch.chdir(tmp_path)
    config.write_text(json.dumps(named | {"base_model_name_or_path": "base"}))
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, whole)
    again = adapter(tmp_path / "again", folder, tensors)  # an adapter of the model that an adapter makes
    twice = merged_by_formula(base, tensors, lambda _: 3)
    np.testing.assert_allclose(
        hf.load(again).params["layers"]["mlp"]["down"][1], twice[f"model.layers.1.{DOWN}.weight"].T, rtol=0, atol=2e-5
    )
    config.write_text(json.dumps(named | {"base_model_name_or_path": str(again)}))
    with pytest.raises(InputError, match="goes round in a circle"):
        hf.load(folder)
    config.write_text(json.dumps(named))
    for argv in (["import", "adapter", "new"], ["eval", "adapter", "--text=base/config.json"]):
        assert cli.main(argv) == 2
        line = "adapter/adapter_config.json: field 'base_model_name_or_path': found 'org/model'; no such model folder"
        assert line in capfd.readouterr().err
    assert not pathlib.Path("new").exists()
    assert cli.main(["import", "adapter", "new", "--base=base"]) == 0
    jax.tree.map(np.testing.assert_array_equal, hf.load("new").params, whole)
    assert cli.main(["import", "base", "newer", "--base=base"]) == 2
    assert "base: no adapter" in capfd.readouterr().err
    assert cli.main(["import", "adapter", "newer", "--base=nowhere"]) == 2
    assert "nowhere: no such folder" in capfd.readouterr().err


def without(folder, name, key=None):
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    value = tensors.pop(f"{PREFIX}{name}")
    safetensors.numpy.save_file(tensors | ({f"{PREFIX}{key}": value} if key else {}), file)


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DOWN_A = f"model.layers.0.{DOWN}.lora_A.weight"
REFUSED = {
    "DoRA": ({"use_dora": True}, "field 'use_dora': found 'True'; not computed here: merge it with PEFT"),
    "another kind": ({"peft_type": "ADALORA"}, "'peft_type': found 'ADALORA'; computed here: \"LORA\""),
    "PiSSA's base": ({"init_lora_weights": "pissa"}, "'init_lora_weights': found 'pissa'"),
    "new tokens": ({"trainable_token_indices": [1, 2]}, "'trainable_token_indices': .* not computed"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 3]]}, "'layer_replication': .* not computed"),
    "parameters": ({"target_parameters": ["mlp.up"]}, "'target_parameters': .* not computed"),
    "another task": ({"task_type": "SEQ_2_SEQ_LM"}, "'task_type': found 'SEQ_2_SEQ_LM'"),
    "a bad rank": ({"r": "2"}, "'r': found '2'; computed here: a positive integer"),
    "a bad regex": ({"target_modules": "(q_proj"}, "is no regex"),
    "another rank": ({"r": 3}, r"found shape \[2, .*; adapter_config.json and the base ask for \[3, "),
    "fewer targets": ({"target_modules": ["q_proj"]}, "'target_modules' in adapter_config.json does not name"),
    "more targets": (
        {"target_modules": ["q_proj", "down_proj", "o_proj"]},
        r"no tensors of 'model.layers.0.self_attn.o",
    ),
    "a layer of two": ({"layers_to_transform": [0, 1]}, "tensor 'base_model.model.model.layers.2.* does not name"),
    "A without B": (lambda f: without(f, DOWN_A.replace("_A", "_B")), "'base_model.*down_proj.lora_B' is missing"),
    "no such layer": (lambda f: without(f, DOWN_A, DOWN_A.replace(".0.", ".9.")), "layers.9.*has no place|is missing"),
    "no such module": (lambda f: without(f, DOWN_A, "model.x.weight"), "model.x.weight' has no place"),
    "a magnitude": (lambda f: without(f, DOWN_A, "x.lora_magnitude_vector"), "lora_magnitude_vector' has no place"),
    "no prefix": (
        lambda f: pickled(f),
        r"no adapter_model.safetensors .*\(a pickled adapter_model.bin is never read\)",
    ),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter: holds tensors of an adapter and no adapter_config.json",
    ),
    "a link": (
        lambda f: (f / "adapter_config.json").rename(f.parent / "x") and (f / "adapter_config.json").symlink_to("../x"),
        "a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path, base, case):
    change, message = REFUSED[case]
    folder, _ = llama_adapter(tmp_path / "adapter", base, **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        change(folder)
    with pytest.raises(InputError, match=message) as error:
        hf.load(folder, base=base)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


ENDLESS = "(.|.)*!"
HUGE = "(?:a{0,65535}){0,65535}" * 50 + "q"
HOSTILE = {
    "ranks": ({"rank_pattern": {ENDLESS: 2}}, "field 'rank_pattern': matching its regexes takes more than"),
    "alphas": ({"alpha_pattern": {ENDLESS: 2}}, "field 'alpha_pattern': matching"),
    "targets": ({"target_modules": ENDLESS}, "field 'target_modules': matching"),
    "exclusions": ({"exclude_modules": ENDLESS}, "field 'exclude_modules': matching"),
    "saved": ({"modules_to_save": [ENDLESS]}, "field 'modules_to_save': matching"),
    "layers": ({"layers_to_transform": [0], "layers_pattern": ENDLESS}, "field 'layers_pattern': matching"),
    "a regex without end": ({"target_modules": HUGE}, r"field 'target_modules': matching its regexes (asks|takes)"),
    "a regex too deep": ({"target_modules": "(" * 5000 + ")" * 5000}, "field 'target_modules': .* is no regex"),
    "many ranks": ({"rank_pattern": dict.fromkeys(map(str, range(1001)), 2)}, "found 1001 names; allowed: at most"),
    "a huge alpha": ({"lora_alpha": 10**400}, "field 'lora_alpha': found '1000"),
    "a huge rank": ({"rank_pattern": {"q_proj": 10**400}}, "field 'rank_pattern': found"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_regexes_and_numbers_of_a_config_take_bounded_time(tmp_path, base, monkeypatch, case):
    monkeypatch.setattr(merge, "SECONDS", 0.3)
    config, message = HOSTILE[case]
    folder, _ = llama_adapter(tmp_path / "adapter", base, **config)
    began = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        hf.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - began < 2  # in this process


def test_layers_are_found_by_a_pattern_with_groups_as_peft_does(tmp_path, base):
    folder, tensors = llama_adapter(
        tmp_path / "adapter", base, layers=[1], layers_to_transform=[1], layers_pattern="(layers)"
    )
    expected = merged_by_formula(base, tensors, lambda _: 1.5)[f"model.layers.1.{DOWN}.weight"]
    found = hf.load(folder).params["layers"]["mlp"]["down"][1]
    np.testing.assert_allclose(found, expected.T, rtol=0, atol=2e-5)


def test_an_adapter_of_a_head_that_names_no_task_is_read_with_the_one_that_is_said(tmp_path, base):
    folder, tensors = llama_adapter(tmp_path / "adapter", base, task_type=None, modules_to_save=["score"])
    score = {f"{PREFIX}score.weight": values(3, D)}
    safetensors.numpy.save_file(tensors | score, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"score\.weight' has no place .*: say --task=sequence \(in Python, task='seq"):
        hf.load(folder)
    loaded = hf.load(folder, task="sequence")
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], *(x.T for x in score.values()))
    with pytest.raises(InputError, match=rf"{tmp_path}: holds no model, but adapters in folders .*: {folder}"):
        hf.load(tmp_path)


def test_low_rank_changes_of_a_tied_matrix_are_refused(tmp_path):
    base = write(tmp_path / "base", config_of("gemma"), tensors_of("gemma"))
    for module, a, b in (
        ("model.embed_tokens", "lora_embedding_A", "lora_embedding_B"),
        ("lm_head", "lora_A.weight", "lora_B.weight"),
    ):
        pair = {
            f"{PREFIX}{module}.{a}": values(2, V if "emb" in a else D),
            f"{PREFIX}{module}.{b}": values(D if "emb" in a else V, 2),
        }
        folder = adapter(tmp_path / "adapter", base, pair, target_modules=[module.split(".")[-1]])
        with pytest.raises(InputError, match=f"'target_modules': '{module}.weight' is tied"):
            hf.load(folder)


@pytest.mark.parametrize("name, how, head", [("gpt2", "k and o, rslora", False), ("gpt_neox", "all, rslora", True)])
def test_what_lfjax_writes_is_read_as_the_model_it_was_merged_into(tmp_path, name, how, head):
    folder, settings = write(tmp_path / "base", config_of(name), tensors_of(name)), HOW_TRAINED[how]
    base, model, trained = adapted(folder, settings, head)
    described = json.loads((folder / "config.json").read_text())
    merged = hf.loaded_from(model, lora.merge(base, trained, settings), config=described)
    hf.save(
        tmp_path / "after", merged, adapter=peft.export(model.config, merged.config, trained, settings, str(folder))
    )
    found, expected = hf.load(tmp_path / "after" / "adapter"), hf.load(tmp_path / "after")
    assert found.model.config == expected.model.config
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
    jax.tree.map(close, found.params, expected.params)


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
TIED = {"tie_word_embeddings": True}
# name -> (family, task, changes of the base's config.json, LoraConfig's keywords)
PEERS = {name: (name, "CAUSAL_LM", {}, {"target_modules": "all-linear"}) for name in CASES} | {
    "patterns, rslora": (
        "llama",
        "CAUSAL_LM",
        {},
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 4, r"layers\.1\..*q_proj": 1},
            "alpha_pattern": {r".*\.0\.self_attn.o_proj": 9},
        },
    ),
    "some layers": (
        "llama",
        "CAUSAL_LM",
        {},
        TARGETS | {"layers_to_transform": [0, 2], "exclude_modules": ["2.self_attn.v_proj"]},
    ),
    "a regex": ("llama", "CAUSAL_LM", {}, {"target_modules": r".*\.[12]\..*(q|down)_proj"}),
    "all biases": ("qwen2", "CAUSAL_LM", {}, TARGETS | {"bias": "all"}),
    "adapted biases": ("gpt2", "CAUSAL_LM", {}, {"target_modules": ["attn.c_proj"], "bias": "lora_only"}),
    "embedding and head": ("llama", "CAUSAL_LM", {}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "norms saved": ("llama", "CAUSAL_LM", {}, TARGETS | {"modules_to_save": ["norm", "input_layernorm", "mlp"]}),
    "embedding saved": ("qwen2", "CAUSAL_LM", TIED, TARGETS | {"modules_to_save": ["embed_tokens"]}),
    "head saved": ("qwen2", "CAUSAL_LM", TIED, TARGETS | {"modules_to_save": ["lm_head"]}),
    "kept tied": (
        "qwen2",
        "CAUSAL_LM",
        TIED,
        TARGETS | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "scores": ("llama", "SEQ_CLS", {}, TARGETS),
    "scores of tokens": ("gpt2", "TOKEN_CLS", {}, {"target_modules": ["c_attn"]}),
    "a tied model's scores": ("gemma", "SEQ_CLS", {}, {"target_modules": "all-linear"}),
}


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about tied matrices and missing heads
@pytest.mark.parametrize("name", PEERS)
def test_the_outputs_are_those_of_peft_merged(tmp_path, name):
    absent = "torch, transformers and peft are not all here: adapters of PEFT's were not read"
    torch, transformers, peer = (pytest.importorskip(m, reason=absent) for m in ("torch", "transformers", "peft"))
    family, task, changes, how = PEERS[name]
    base = write(tmp_path / "base", config_of(family) | changes, tensors_of(family))
    kinds = {
        "CAUSAL_LM": (transformers.AutoModelForCausalLM, {}),
        "SEQ_CLS": (transformers.AutoModelForSequenceClassification, {"num_labels": 3}),
        "TOKEN_CLS": (transformers.AutoModelForTokenClassification, {"num_labels": 3}),
    }
    kind, options = kinds[task]
    options = options | {"attn_implementation": "eager"}
    torch.manual_seed(0)
    settings = peer.LoraConfig(**{"r": 2, "lora_alpha": 3, "task_type": task} | how)
    model = peer.get_peft_model(kind.from_pretrained(base, **options), settings)
    with torch.no_grad():
        for trained in model.parameters():
            if trained.requires_grad:
                trained.add_(0.2 * torch.randn_like(trained))
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor(TOKENS[None])
    merged = peer.PeftModel.from_pretrained(kind.from_pretrained(base, **options), tmp_path / "adapter")
    with torch.no_grad():
        plain = kind.from_pretrained(base, **options).eval()(tokens).logits.numpy()
        expected = merged.merge_and_unload().eval()(tokens).logits.numpy()
    loaded = hf.load(tmp_path / "adapter")
    method = {"SEQ_CLS": "values", "TOKEN_CLS": "values"}.get(task)
    ours = jax.jit(lambda p: loaded.model.apply({"params": p}, TOKENS[None], method=method))(loaded.params)
    ours = ours[:, -1] if task == "SEQ_CLS" else ours
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
    assert np.max(np.abs(expected - plain)) > 1e-2
    hf.save(tmp_path / "new", loaded)
    with torch.no_grad():
        again = kind.from_pretrained(tmp_path / "new", attn_implementation="eager").eval()(tokens).logits.numpy()
    np.testing.assert_allclose(again, expected, rtol=0, atol=2e-4)
