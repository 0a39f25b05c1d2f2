import ast
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from lfjax import bounded, bounded_child

TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def child():
    made = bounded.Child()
    yield made
    made.close()


def rendering(template: str) -> dict:
    return {"template": template, "messages": TALK, "values": {}, "wanted": [[1, False, None, False]]}


def test_the_child_imports_three_libraries_and_the_standard_one_alone():
    nodes = list(ast.walk(ast.parse(bounded.PROGRAM.read_text())))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"jinja2", "tokenizers", "sentencepiece", *sys.stdlib_module_names}


def test_it_runs_no_module_of_the_folder_that_it_stands_in_and_ends_with_its_input(tmp_path):
    program = tmp_path / "bounded_child.py"
    program.write_bytes(bounded.PROGRAM.read_bytes())
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    command = [sys.executable, "-P", str(program), str(bounded.MEMORY)]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_each_request_has_its_own_time(child):
    busy = rendering("{% for i in range(40) %}{% for j in range(90000) %}{% endfor %}{% endfor %}")
    for _ in range(2):
        assert child.ask(busy) == {"texts": [{"text": ""}]}
    with pytest.raises(bounded.Breach, match=r"takes more than 0\.05 s"):
        child.ask(busy, seconds=0.05)
    assert child.ask(rendering("{{ messages[0].content }}")) == {"texts": [{"text": "hi"}]}  # a new child


def test_signals_for_the_parent_do_not_end_it_and_one_that_was_killed_is_started_again(child):
    assert child.ask(rendering("a")) == {"texts": [{"text": "a"}]}
    process = child._process
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, name)
    assert child.ask(rendering("b")) == {"texts": [{"text": "b"}]} and child._process is process
    process.kill()
    process.wait()
    assert child.ask(rendering("c")) == {"texts": [{"text": "c"}]} and child._process is not process


def test_it_may_write_no_file_and_has_no_chance_of_its_own(child):
    ask = rendering("{{ range(1000) | random }} {{ strftime_now('%Y') }}")
    assert child.ask(ask) == child.ask(ask)
    limits = pathlib.Path(f"/proc/{child._process.pid}/limits")
    if not limits.exists():
        pytest.skip("no /proc: a process's limits cannot be read here")
    found = {line[:26].strip(): line[26:].split()[0] for line in limits.read_text().splitlines()}
    assert found["Max file size"] == "0" and found["Max address space"] == str(bounded.MEMORY)


def test_what_is_longer_than_a_rendering_or_an_answer_may_be_is_refused(child):
    most, longest = bounded_child.MOST_TEXT, rendering(f"{{{{ 'a' * {bounded_child.MOST_TEXT} }}}}")
    assert bounded_child.MOST_ANSWER == 16 * most == 1 << 26
    assert len(child.ask(longest)["texts"][0]["text"]) == most
    for many in (longest | {"wanted": longest["wanted"] * 17}, rendering(f"{{{{ 'a' * {most + 1} }}}}")):
        with pytest.raises(bounded.Breach, match="fails: it makes more than 4194304 characters"):
            child.ask(many)


def test_the_first_of_the_regexes_that_matches_a_name_is_told(child):
    asked = {"patterns": ["(.*\\.)?(q)$", r".*\.(?P<idx>\d+)\."], "names": ["a.3.q", "a.3.k", "k"]}
    assert child.ask(asked) == {"found": [[0, None], [1, "3"], None]}
    assert child.ask({"patterns": ["a", "("], "names": []})["wrong"][0] == 1
