import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lfjax.checkpoint import Checkpoints
from lfjax.config import InputError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_state(seed, shape=(8, 16), mesh=None):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16),
        "ids": jnp.asarray(rng.integers(0, 9, 4), jnp.int32),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(seed), params, tx.init({"w": params["w"]}))
    return state if mesh is None else jax.device_put(state, on_mesh(state, mesh))


def on_mesh(state, mesh):
    def shard(leaf):
        return NamedSharding(mesh, PartitionSpec("data", "tensor") if leaf.shape == (8, 16) else PartitionSpec())

    return jax.tree.map(shard, state)


def mesh_of(data, tensor):
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints" / "ppo")
    yield opened
    opened.close()


def test_a_state_comes_back_with_every_bit(checkpoints):
    state, extra = make_state(3), {"pending": {"ppo/kl": [1 / 3, 7.0]}, "name": "ü", "none": None}
    checkpoints.save(3, state, extra)
    checkpoints.wait()
    restored, back = checkpoints.restore(make_state(0))
    assert_same(restored, state)
    assert back == extra
    assert checkpoints.latest_step() == 3


def test_an_empty_folder_has_no_step_and_says_so(checkpoints):
    assert checkpoints.latest_step() is None
    with pytest.raises(InputError, match="checkpoints/ppo: no checkpoint can be read: there is none"):
        checkpoints.restore(make_state(0))


def test_only_the_newest_are_kept(checkpoints):
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == [3, 4]
    assert checkpoints.restore(make_state(0), step=3)[1] == {"step": 3}


def test_saving_a_step_again_leaves_it_as_it_is(checkpoints):
    checkpoints.save(1, make_state(1), {"first": True})
    checkpoints.save(1, make_state(2), {"first": False})
    assert checkpoints.restore(make_state(0))[1] == {"first": True}


def test_restores_on_another_mesh(checkpoints):
    state = make_state(5, mesh=mesh_of(4, 2))
    checkpoints.save(5, state, {})
    checkpoints.wait()
    for mesh in (mesh_of(2, 4), mesh_of(1, 1), mesh_of(8, 1)):
        template = make_state(0, mesh=mesh)
        restored, _ = checkpoints.restore(template)
        assert_same(restored, state)
        assert restored.params["w"].sharding.is_equivalent_to(template.params["w"].sharding, 2)


def test_the_template_may_be_abstract(checkpoints):
    state = make_state(5)
    checkpoints.save(5, state, {})
    checkpoints.wait()
    sharding = on_mesh(state, mesh_of(2, 2))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding)
    assert_same(checkpoints.restore(abstract)[0], state)


def test_a_state_may_be_donated_as_soon_as_save_returns(checkpoints):
    """The next step reuses the buffers while the save is still being written."""
    state = {"w": jnp.ones((1024, 2048)), "step": jnp.int32(0)}
    step = jax.jit(lambda s: {"w": s["w"] * -1.0 + 7.0, "step": s["step"] + 1}, donate_argnums=0)
    for number in range(3):
        expected = jax.tree.map(np.array, state)
        checkpoints.save(number, state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert_same(checkpoints.restore(state, step=number)[0], expected)


def damage(folder, how):
    """Spoils the checkpoint in `folder` the way `how` says."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    state = [path for path in files if "state" in path.relative_to(folder).parts and path.parent.name == "d"]
    if how == "truncated":
        for path in state:
            os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        for path in files:
            os.truncate(path, 0)
    elif how == "overwritten":
        for path in state:
            path.write_bytes(b"\x55" * path.stat().st_size)
    elif how == "missing":
        for path in state:
            path.unlink()
    elif how == "deep":
        for path in (folder / "state" / "_METADATA", folder / "beside" / "metadata"):
            path.write_text("[" * 1_000_000)
    elif how == "json":
        for path in (folder / "beside").iterdir():
            path.write_text("{")


@pytest.mark.parametrize("how", ["truncated", "emptied", "overwritten", "missing", "json", "deep"])
def test_a_spoilt_newest_checkpoint_is_reported_and_the_one_before_taken(tmp_path, capfd, how):
    with_bad = Checkpoints(tmp_path)
    for step in (1, 2):
        with_bad.save(step, make_state(step), {"step": step})
    with_bad.close()
    damage(tmp_path / "2", how)
    opened = Checkpoints(tmp_path)
    restored, extra = opened.restore(make_state(0))
    assert extra == {"step": 1}
    assert_same(restored, make_state(1))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}/2: cannot be read (") and said[0].endswith("going on from step 1")
    opened.save(2, make_state(2), {"again": True})  # the run gets there again
    opened.close()
    assert Checkpoints(tmp_path).restore(make_state(0))[1] == {"again": True}


def test_no_changed_byte_goes_unnoticed(tmp_path):
    """Compressed files carry no checksum: without one of our own, some of these come back as other numbers."""
    saved = Checkpoints(tmp_path / "whole")
    state = {"w": make_state(1, shape=(64, 64)).params["w"]}
    saved.save(1, state, {})
    saved.close()
    rng = np.random.default_rng(0)
    noticed = 0
    for number in range(8):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        (largest,) = sorted((tmp_path / str(number)).rglob("d/*"), key=lambda path: path.stat().st_size)[-1:]
        data = bytearray(largest.read_bytes())
        data[rng.integers(len(data))] ^= 0x10
        largest.write_bytes(bytes(data))
        opened = Checkpoints(tmp_path / str(number))
        try:
            assert_same(opened.restore(state)[0], state)  # a byte that does not matter
        except InputError:
            noticed += 1
        opened.close()
    assert noticed >= 3


def test_when_none_can_be_read_one_line_names_the_folder_and_the_fix(tmp_path, checkpoints):
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    for step in (1, 2):
        damage(checkpoints.folder / str(step), "truncated")
    with pytest.raises(InputError, match=r"no checkpoint can be read: .* delete this folder to train") as caught:
        checkpoints.restore(make_state(0))
    assert str(caught.value).startswith(str(checkpoints.folder))
    assert "\n" not in str(caught.value)
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == [1, 2]  # nothing was thrown away


def test_what_cannot_be_taken_of_a_checkpoints_metadata_is_one_line(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, make_state(1), {})
    saved.close()
    metadata = tmp_path / "1" / "_CHECKPOINT_METADATA"
    for content, found in (
        ("[" * 1_000_000, f"{metadata}: not JSON (nested deeper than 100); delete {tmp_path}/1: "),
        ("[]", f"{metadata}: not what Orbax leaves there; delete {tmp_path}/1: "),
        ('{"item_handlers": [1]}', f"{metadata}: not what Orbax leaves there; delete {tmp_path}/1: "),
        ('{"init_timestamp_nsecs": [], "commit_timestamp_nsecs": "x"}', f"{tmp_path}: not a folder of checkpoints ("),
    ):
        metadata.write_text(content)
        with pytest.raises(InputError) as caught:
            Checkpoints(tmp_path)
        assert str(caught.value).startswith(found) and "\n" not in str(caught.value)


def test_what_lies_beside_a_state_is_checked_and_may_hold_what_is_not_finite(tmp_path):
    def check(step, extra):
        if step == 2:
            raise ValueError("not mine")

    opened = Checkpoints(tmp_path, check=check)
    for step in (1, 2):
        opened.save(step, make_state(step), {"loss": float("nan"), "worst": float("inf")})
    restored, extra = opened.restore(make_state(0))
    assert_same(restored, make_state(1))
    assert np.isnan(extra["loss"]) and extra["worst"] == float("inf")
    with pytest.raises(InputError, match=r"checkpoint 2 can be read"):
        opened.restore(make_state(0), step=2)
    opened.close()


def test_another_models_checkpoint_is_refused_and_kept(checkpoints):
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    with pytest.raises(InputError, match="no checkpoint can be read"):
        checkpoints.restore(make_state(0, shape=(8, 17)))
    assert checkpoints.latest_step() == 1


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write a checkpoint: .*; free some space or choose another"):
        Checkpoints(tmp_path / "file" / "ppo")


def run_python(code, *args):
    path = pathlib.Path(__file__)
    source = f"import sys; sys.path.insert(0, {str(path.parents[1])!r})\n" + textwrap.dedent(code)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_full_disk_is_one_clear_line_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on the file size stands for the full disk: the write fails the same way, in Orbax's own thread."""
    process = run_python(
        """
        import resource
        import jax, numpy as np
        from lfjax.checkpoint import Checkpoints
        from lfjax.config import InputError
        checkpoints = Checkpoints(sys.argv[1])
        state = {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=(512, 512)))}
        checkpoints.save(1, state, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.save(2, state, {})
            checkpoints.wait()
        except InputError as error:
            print(error)
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=120)
    assert out.startswith(f"{tmp_path}: cannot write a checkpoint: "), (out, err[-2000:])
    assert "\n" not in out.rstrip("\n")
    opened = Checkpoints(tmp_path)
    assert opened.latest_step() == 1
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.06, 0.15])
def test_a_kill_during_a_save_costs_at_most_that_save(tmp_path, delay):
    process = run_python(
        """
        import jax, numpy as np
        from lfjax.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        for step in range(1, 1000):
            checkpoints.save(step, {"w": jax.numpy.full((2048, 2048), step, jax.numpy.float32)}, {"step": step})
            print(step, flush=True)
        """,
        tmp_path,
    )
    for line in process.stdout:
        if int(line) == 4:
            break
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    opened = Checkpoints(tmp_path)
    step = opened.latest_step()
    assert step is not None and step >= 3
    state, extra = opened.restore({"w": jnp.zeros((2048, 2048))})
    assert extra == {"step": step}
    assert (np.asarray(state["w"]) == step).all()
    opened.save(step + 1, {"w": jnp.zeros((2048, 2048))}, {})
    opened.close()
    assert all(path.name.isdigit() for path in tmp_path.iterdir())  # what the kill left half-written is gone
