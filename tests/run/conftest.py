"""One finished run of the smallest config, on one device, shared by the tests of the loops."""

import functools
import pathlib

import jax
import pytest
import smallest

from lfjax import cli, sharding
from lfjax.run import run


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> pathlib.Path:
    return smallest.write_records(tmp_path_factory.mktemp("data") / "rated.jsonl")


@pytest.fixture(scope="session")
def train(records):
    """train(workdir, *overrides, devices=1) -> exit code of the command, on the first so many of the 8 devices."""

    def command(workdir, *overrides: str, devices: int = 1, config: pathlib.Path = smallest.PATH) -> int:
        with pytest.MonkeyPatch.context() as patch:
            on_some = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
            patch.setattr(run, "make_mesh", on_some)
            given = (f"--config={config}", f"--workdir={workdir}", f"--config.data.path={records}")
            return cli.main(["train", *given, *overrides])

    return command


@pytest.fixture(scope="session")
def straight(tmp_path_factory, train) -> pathlib.Path:
    """The run directory of a run that nobody disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    assert train(workdir) == 0
    return workdir
