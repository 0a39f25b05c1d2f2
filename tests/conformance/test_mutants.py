"""The conformance tests bite: each known mistake fails its tests, and passes another, so that it is no mere wreck."""

import functools
import gc

import mutants
import pytest
import setting
import test_experience
import test_rollout
import test_training
import test_update
from subjects import LIBRARY, STEPS

from lfjax.modules import resolve

TESTS = {
    name.removeprefix("test_"): test
    for module in (test_rollout, test_experience, test_update, test_training)
    for name, test in vars(module).items()
    if name.startswith("test_")
}


@functools.cache
def own() -> dict:
    return {name: resolve(name, dotted) for name, dotted in (STEPS | LIBRARY).items()}


def test_every_edit_still_finds_its_place_and_is_python():
    own()
    for mutant in mutants.MUTANTS.values():
        mutants.fork(mutant)


@pytest.mark.slow
@pytest.mark.xdist_group("mutants")  # one process: its programs are shared
@pytest.mark.parametrize("mutant", mutants.MUTANTS.values(), ids=mutants.MUTANTS)
def test_a_known_mistake_fails_its_tests_and_passes_another(mutant):
    table = own() | {mutant.subject: mutants.fork(mutant)}
    for name in mutant.fails:
        with pytest.raises(AssertionError):
            TESTS[name](table)
    if mutant.passes:
        TESTS[mutant.passes](table)
    setting.forget(table[mutant.subject])
    gc.collect()


@pytest.mark.parametrize("name", TESTS)
def test_every_test_can_fail(name):
    assert [mutant for mutant in mutants.MUTANTS.values() if name in mutant.fails]
