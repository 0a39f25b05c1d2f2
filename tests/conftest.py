"""Eight virtual CPU devices, float32 with the highest matmul precision, strict rank promotion, compile cache on."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# A test runs a program a few times, so that compiling is what it waits for: without LLVM's optimisation and MLIR's
# emitters that takes a fifth. Child processes inherit the flags, and with them the same bits.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one ends the process at this flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from lfjax.cli import spare_threads

spare_threads()

CACHE = pathlib.Path(os.environ.get("LFJAX_TEST_CACHE", pathlib.Path.home() / ".cache" / "lfjax" / "test-xla"))
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

FOLDER = pathlib.Path(__file__).resolve().parent
SHARED = FOLDER.parents[1] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data beside the project; tests that need it skip, loudly, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: tests against real data and the peers' reference values did not run")
    return SHARED


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """In xdist's workers: tests of one folder, or of one group, run in one process, so that they share what they make.

    xdist 3.8 keeps a test's group in an attribute that pytest 9.2 no longer reads: of itself it knows no groups at all.
    """
    if not hasattr(config, "workerinput"):
        return (yield)
    for item in items:
        if FOLDER in item.path.parents and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(FOLDER).parts[0]))
    result = yield
    for item in items:
        grouped = vars(item).get("_nodeid", item.nodeid)
        if grouped != item.nodeid:
            item._id = type(item._id).parse(grouped)
    return result
