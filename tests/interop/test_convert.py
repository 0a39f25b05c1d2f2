"""`lfjax import` and `lfjax export`: what goes in comes out, in the files and types asked for, or nothing does."""

import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lfjax import cli
from lfjax.interop import hf, peft
from lfjax.models import presets
from lfjax.models.transformer import Transformer

CONFIG = presets.llama(vocab_size=512, width=16, layers=2, heads=2, mlp_width=24, context=32)


def model_of(config=CONFIG, seed=0):
    model, rng = Transformer(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def stored(folder):
    """Name -> dtype, shape and raw bytes of every tensor in the folder's files."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.deserialize(file.read_bytes())}


@pytest.fixture
def run(tmp_path):
    """A run directory with the models of two stages."""
    for stage, labels in (("sft", 0), ("reward", 1)):
        config = presets.llama(vocab_size=512, width=16, layers=2, heads=2, mlp_width=24, context=32, num_labels=labels)
        hf.save(tmp_path / "run" / "models" / stage, hf.loaded_from(*model_of(config)))
    return tmp_path / "run"


def command(*argv):
    assert cli.main([str(part) for part in argv]) == 0


def test_import_gives_the_same_tensors_in_one_file_with_what_stood_beside_them(tmp_path, run, capfd):
    source = run / "models" / "sft"
    tensors = {k: v.astype(jnp.bfloat16) for k, v in safetensors.numpy.load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("a.safetensors", names[:7]), ("b.safetensors", names[7:])):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | {"quirk": 3}
    (source / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [2, 7], "pad_token_id": 3, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "README.md").write_text("not ours")
    command("import", source, tmp_path / "new")
    assert (
        capfd.readouterr().out
        == f"{tmp_path}/new: llama, {sum(x.size for x in tensors.values())} parameters, no tokenizer\n"
    )
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert stored(tmp_path / "new") == stored(source)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config | {
        "dtype": "bfloat16", "torch_dtype": "bfloat16"
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == generation


def test_import_with_a_task_names_the_architecture(tmp_path, run):
    config = run / "models" / "reward" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "architectures"}))
    command("import", config.parent, tmp_path / "new", "--task=sequence")
    assert hf.load(tmp_path / "new").config["architectures"] == ["LlamaForSequenceClassification"]


def test_export_of_a_run_takes_the_last_language_model_or_the_stage(tmp_path, run):
    command("export", run, tmp_path / "lm")
    assert stored(tmp_path / "lm") == stored(run / "models" / "sft")
    command("export", run, tmp_path / "scores", "--stage=reward")
    assert stored(tmp_path / "scores") == stored(run / "models" / "reward")
    command("export", run, tmp_path / "lm", "--stage=reward")  # a folder that export wrote is replaced
    assert stored(tmp_path / "lm") == stored(run / "models" / "reward")
    for file in ("model.safetensors", "config.json"):  # every byte is decided: files can be compared
        assert (tmp_path / "lm" / file).read_bytes() == (run / "models" / "reward" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_rounds_to_the_type_asked_for(tmp_path, run, dtype):
    command("export", run, tmp_path / "half", f"--dtype={dtype}")
    whole = safetensors.numpy.load_file(run / "models" / "sft" / "model.safetensors")
    half = safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    for name, x in whole.items():
        np.testing.assert_array_equal(half[name], x.astype(dtype))
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)


def test_a_value_beyond_the_type_is_refused_and_nothing_is_written(tmp_path, capfd):
    model, params = model_of()
    params["layers"]["mlp"]["up"][1, 0, 0] = 7e4  # above float16's largest, 65,504
    hf.save(tmp_path / "model", hf.loaded_from(model, params))
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "half")]
    assert cli.main([*argv, "--dtype=float16"]) == 2
    assert "tensor 'model.layers.1.mlp.up_proj.weight': holds values beyond" in capfd.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert cli.main([*argv, "--dtype=bfloat16"]) == 0


def test_files_are_no_larger_than_asked_and_one_model_again(tmp_path, run):
    command("export", run, tmp_path / "parts", "--max-shard-size=20KB")
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    largest = 512 * 16 * 4  # the embedding alone is more than 20 KB: it has a file of its own
    for file in files:
        sizes = [x.nbytes for x in safetensors.numpy.load_file(tmp_path / "parts" / file).values()]
        assert sum(sizes) <= 20_000 or sizes == [largest]
    assert stored(tmp_path / "parts") == stored(run / "models" / "sft")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.size for x in jax.tree.leaves(model_of()[1])) * 4
    command("export", tmp_path / "parts", tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "parts")
    command("export", run, tmp_path / "parts")  # of the older files none is left
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {"config.json", "model.safetensors"}


def test_what_makes_other_tools_run_code_is_left_out_and_told_once(tmp_path, shared, capfd):
    source = shutil.copytree(shared / "data" / "stories260K_hf", tmp_path / "source", copy_function=shutil.copyfile)
    code = {
        "config.json": {"auto_map": {"AutoModel": "o/m--x.Y"}, "custom_pipelines": {}, "_attn_implementation": "o/k"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "bos_token": "<s>"},
        "generation_config.json": {"custom_generate": "o/g", "eos_token_id": 2},
        "special_tokens_map.json": {"auto_map": {}, "bos_token": "<s>"},
    }
    for name, keys in code.items():
        own = json.loads((source / name).read_text()) if (source / name).exists() else {}
        own |= {"quirk": {"auto_map": {}, "kept": [1]}, "attn_implementation": "sdpa"} if name == "config.json" else {}
        (source / name).write_text(json.dumps(own | keys))
    command("import", source, tmp_path / "new")
    command("import", source, tmp_path / "newer")
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 1 and notes[0].startswith(
        f"note: {tmp_path}/new: left out what makes other tools fetch or run"
    )
    for name, keys in code.items():
        written = json.loads((tmp_path / "newer" / name).read_text())
        assert not written.keys() & (keys.keys() - {"eos_token_id", "bos_token"})
        assert all(f"{key} ({name})" in notes[0] for key in keys.keys() - {"eos_token_id", "bos_token"})
    written = json.loads((tmp_path / "newer" / "config.json").read_text())
    assert written["quirk"] == {"kept": [1]} and written["attn_implementation"] == "sdpa"


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path, run, umask):
    loaded = hf.load(run / "models" / "sft")
    adapter = peft.Adapter({}, {"x": np.zeros(2, np.float32)})
    before = os.umask(umask)
    try:
        hf.save(tmp_path / "new", loaded, shard_bytes=20_000, adapter=adapter)
        hf.save(tmp_path / "one", loaded)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.glob("[no]*/**/*") if file.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors"} <= {file.name for file in files}
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_the_generation_config_says_what_begins_ends_and_pads_a_text(shared, tmp_path):
    command("import", shared / "data" / "stories260K_hf", tmp_path / "new")
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    tokenizer = hf.load(tmp_path / "new").tokenizer
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_id}
    assert tokenizer.pad_id not in (1, 2)


def test_other_files_stay_where_they_are(tmp_path, run, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refusals = {
        "mine": "holds other files (thesis.txt)",
        "run/models/sft": "the folder to read as well",
    }
    for target, found in refusals.items():
        assert cli.main(["export", str(run), str(tmp_path / target)]) == 2
        assert found in capfd.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_transformers_opens_what_export_wrote_in_parts(tmp_path, run):
    torch = pytest.importorskip("torch", reason="torch and transformers are absent: exports were not opened by them")
    transformers = pytest.importorskip("transformers", reason="transformers is absent: exports were not opened by it")
    command("export", run, tmp_path / "parts", "--max-shard-size=20KB")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts").eval()
    tokens = np.arange(12)[None] * 7 % 512
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    loaded = hf.load(tmp_path / "parts")
    ours = loaded.model.apply({"params": loaded.params}, tokens.astype(np.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-4 * max(1.0, float(np.abs(expected).max())), rtol=0)


def test_a_runs_own_model_is_not_written_over(run, capsys):
    own = run / "models" / "other"
    (run / "checkpoints").mkdir(exist_ok=True)
    assert cli.main(["export", str(run), str(own)]) == 2
    assert f"{own}: is a run's own model; name a folder outside of" in capsys.readouterr().err
    assert not own.exists()
