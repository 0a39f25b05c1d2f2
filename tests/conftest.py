"""Eight virtual CPU devices, float32 with the highest matmul precision, strict rank promotion, compile cache on."""

import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data beside the project; tests that need it skip, loudly, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: tests against real data and the peers' reference values did not run")
    return SHARED
