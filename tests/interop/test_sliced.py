"""Loading onto a mesh reads of each tensor the slices that the devices need, and no more at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lfjax.config import InputError
from lfjax.interop import hf, tensors
from lfjax.models import presets
from lfjax.models.transformer import Transformer
from lfjax.sharding import make_mesh

FORMS = {
    "gpt2": presets.gpt2(vocab_size=61, width=16, layers=2, heads=8, context=32),  # q, k and v are one tensor
    "llama": presets.llama(vocab_size=61, width=16, layers=2, heads=8, mlp_width=24, context=32, kv_heads=2),
}


@pytest.fixture(scope="module", params=FORMS)
def saved(request, tmp_path_factory):
    """A folder in bfloat16 with the model of every parameter random."""
    model, rng = Transformer(FORMS[request.param]), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    folder = tmp_path_factory.mktemp("models") / request.param
    hf.save(folder, hf.loaded_from(model, params), dtype="bfloat16")
    return folder


@pytest.fixture
def reads(monkeypatch):
    """(tensor, values) of every read of a tensor's values."""
    found, read = [], tensors.TensorFolder.read

    def counted(self, name, *args):
        x = read(self, name, *args)
        found.append((name, x.size))
        return x

    monkeypatch.setattr(tensors.TensorFolder, "read", counted)
    return found


@pytest.mark.parametrize("at_once", [0, 1 << 24])
def test_the_parameters_are_those_of_a_whole_load(saved, at_once, monkeypatch):
    monkeypatch.setattr(hf, "AT_ONCE", at_once)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread, whole = hf.load(saved, mesh=mesh), hf.load(saved, vocab_multiple=128)
    jax.tree.map(np.testing.assert_array_equal, spread.params, whole.params)
    assert spread.params["layers"]["attention"]["q"].sharding.shard_shape((2, 16, 8, 2)) == (2, 8, 4, 2)
    if at_once == 0:
        layers = (("layers/", ("data", "fsdp")),)  # rank 2 alone: the norms' layers are spread as well
        other = hf.load(saved, mesh=mesh, rules=layers).params
        jax.tree.map(np.testing.assert_array_equal, other, whole.params)
        assert other["layers"]["norm1"]["scale"].sharding.shard_shape((2, 16)) == (1, 8)


def test_every_value_is_read_once_a_slice_of_a_layer_at_a_time(saved, reads):
    hf.load(saved, mesh=make_mesh(data=1, fsdp=8, tensor=1))
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    total = {name: sum(size for found, size in reads if found == name) for name in stored}
    assert total == {name: x.size for name, x in stored.items()}
    split = [name for name, x in stored.items() if x.ndim == 2 and "wpe" not in name and 61 not in x.shape]
    assert len(split) >= 8
    for name in split:
        assert max(size for found, size in reads if found == name) <= stored[name].size // 8


def test_devices_that_hold_the_same_slice_share_one_read(saved, reads):
    hf.load(saved, mesh=make_mesh(data=4, fsdp=2, tensor=1))
    stored = safetensors.numpy.load_file(saved / "model.safetensors")
    assert sum(size for _, size in reads) == sum(x.size for x in stored.values())


def test_nan_in_the_last_slice_names_the_tensor(saved, tmp_path):
    model = hf.load(saved)
    params = jax.tree.map(np.array, model.params)
    hf.save(tmp_path / "m", model._replace(params=params))
    file = tmp_path / "m" / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    name = max(name for name, x in stored.items() if x.ndim == 2 and "1" in name)
    stored[name][-1, -1] = np.nan
    safetensors.numpy.save_file(stored, file)
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor '{name}': holds NaN"):
        hf.load(tmp_path / "m", mesh=make_mesh(data=1, fsdp=8, tensor=1))


def test_tensors_are_compared_a_block_at_a_time(tmp_path, monkeypatch, reads):
    x = np.arange(40, dtype=np.float32).reshape(8, 5)
    y = x.copy()
    y[-1, -1] = 0
    safetensors.numpy.save_file({"x": x, "same": x.copy(), "y": y}, tmp_path / "model.safetensors")
    monkeypatch.setattr(tensors, "BLOCK", 12)
    folder = tensors.TensorFolder(tmp_path)
    assert folder.equal("x", "same", (8, 5)) and not folder.equal("x", "y", (8, 5))
    assert max(size for _, size in reads) == 10
