"""README.md's table names every item from 1 to 35, and every test once."""

import pathlib
import re

import test_experience
import test_rollout
import test_training
import test_update

FOLDER = pathlib.Path(__file__).parent


def test_the_table_is_complete():
    table = re.findall(r"^\| (\d+) \|.*$", (FOLDER / "README.md").read_text(), re.M)
    assert table == [str(number) for number in range(1, 36)]


def test_the_table_names_each_test_at_its_number():
    listed = {}
    for number, tests in re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|", (FOLDER / "README.md").read_text(), re.M):
        for name in re.findall(r"`(\w+)`", tests):
            assert name not in listed
            listed[name] = number
    found = {}
    for module in (test_experience, test_rollout, test_training, test_update):
        source = pathlib.Path(module.__file__).read_text()
        found |= {name: number for number, name in re.findall(r"^# (\d+)\ndef (test_\w+)", source, re.M)}
        assert {name for name in vars(module) if name.startswith("test_")} <= found.keys()
        assert all(vars(module)[name].__doc__ for name in vars(module) if name.startswith("test_"))
    assert found == listed
