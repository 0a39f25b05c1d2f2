"""`pytest tests/conformance --step ppo_update=my_module:my_step` puts a fork under the conformance tests."""

import pytest
from subjects import LIBRARY, STEPS

from lfjax.config import InputError
from lfjax.modules import resolve


def pytest_addoption(parser):
    parser.addoption(
        "--step",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help=f"a fork to test in place of lfjax's own step; NAME is one of {', '.join(STEPS)}; repeatable",
    )


@pytest.fixture(scope="session")
def steps(request):
    """Name -> function: lfjax's own, or the fork given with --step."""
    table = STEPS | LIBRARY
    for given in request.config.getoption("--step", default=None) or []:
        name, _, dotted = given.partition("=")
        if name not in STEPS or not dotted:
            raise pytest.UsageError(f"--step {given}: write NAME=module:function; NAME is one of {', '.join(STEPS)}")
        table[name] = dotted
    try:
        return {name: resolve(f"--step {name}", dotted) for name, dotted in table.items()}
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
