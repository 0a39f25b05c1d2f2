"""Run directories and record files that somebody else may have made, mutated one place at a time.

Whatever stands in them, a command ends within ten seconds with exit code 0 or 2, in one line a file at most, and says
of what is refused where it is. Prints a table: kind, files tried, shown, shown in part, refused, slowest.
"""

import collections
import contextlib
import copy
import gzip
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_records import EVERY_KIND
from test_report import CONFIG, SUMMARY, Page

from lfjax import cli, records
from lfjax.config import InputError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("strangers")]

SECONDS, MEMORY = 10, 2 * 2**30
DEEP = "[" * 1500 + "]" * 1500
VALUES = {  # as they stand in JSON
    "null": "null", "true": "true", "zero": "0", "negative": "-1", "fraction": "0.5", "largest": "1.7e308",
    "smallest": "5e-324", "overflowing": "1e999", "NaN": "NaN", "infinity": "-Infinity", "digits": "1" * 400,
    "many digits": "1" * 5000, "2^63": str(2**63), "no text": '""', "text": '"x"', "number in a text": '"1.5"',
    "long text": json.dumps("x" * 2_000_000), "surrogate": r'"\ud800"', "controls": r'"\u0000\u001b[2J\u009b\r\n"',
    "direction": r'"\u202e\u2067abc"', "markup": r'"</script><img src=x onerror=alert(1)>\"&"', "path": '"../../x/y"',
    "empty list": "[]", "empty object": "{}", "list": '[1, "a", null, {"b": [2]}]', "object": '{"a": {"b": [1]}}',
    "long list": json.dumps([0] * 100_000), "wide object": json.dumps({str(i): i for i in range(20_000)}),
    "deep": DEEP, "deeper": "[" * 200_000, "nested 90": "[" * 90 + "]" * 90, "broken": "{", "binary": "\udcff\udcfe",
}  # fmt: skip
MARK = "\ue000"  # where a value goes


@contextlib.contextmanager
def in_time():
    def stop(_signal, _frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Table:
    def __init__(self):
        self.rows = collections.defaultdict(lambda: [0, 0, 0, 0, 0.0])

    def add(self, kind, outcome, seconds):
        row = self.rows[kind]
        row[0] += 1
        row[1 + ("shown", "in part", "refused").index(outcome)] += 1
        row[4] = max(row[4], seconds)

    def show(self, capsys, title):
        with capsys.disabled():
            print(f"\n{title:28s} {'tried':>6s} {'whole':>6s} {'part':>6s} {'refused':>8s} {'slowest':>9s}")
            for kind, (tried, shown, part, refused, seconds) in sorted(self.rows.items()):
                print(f"{kind:28s} {tried:6d} {shown:6d} {part:6d} {refused:8d} {seconds:7.1f} s")
            total = [sum(row[i] for row in self.rows.values()) for i in range(4)]
            print(f"{'all':28s} {total[0]:6d} {total[1]:6d} {total[2]:6d} {total[3]:8d}")


def places(value, at=()):
    """The path of everything in a JSON value: keys and indices."""
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*at, key))


def with_value(value, at, text):
    """JSON of `value` with `text` in one place; once more with the text as that place's key, where it is a string."""
    changed = copy.deepcopy(value)
    if not at:
        return text
    part = changed
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = MARK
    return json.dumps(changed).replace(json.dumps(MARK), text)


def bytes_of(text):
    return text.encode("utf-8", "surrogateescape")


FINISHED = {"figures": {"ppo/score": 1.0}, "seconds": 3.0, "parts": {"train": 2.0}, "programs": {"a": 1}, "config": "0"}
METRIC = {"stage": "ppo", "step": 1, "ppo/score": 0.5, "ppo/kl": 1.0, "ppo/skipped": 0.0}
TIMING = {"stage": "ppo", "step": 1, "seconds": 2.0, "tokens_per_s": 10.0, "mfu": 0.1, "rollout_s": 1.0}
SAMPLE = {"stage": "evaluate", "step": 0, "set": "before", "prompt": "a", "response": "good", "score": 1.0, "kl": 0.1}
PARTS = {
    "config.json": CONFIG, "summary.json": SUMMARY, "checkpoints/ppo/FINISHED": FINISHED, "metrics.jsonl": METRIC,
    "timing.jsonl": TIMING, "samples.jsonl": SAMPLE,
}  # fmt: skip


def content(name, text):
    """A run file's bytes; of a log the changed row stands between good ones."""
    if not name.endswith(".jsonl"):
        return bytes_of(text)
    good = json.dumps(PARTS[name])
    after = json.dumps({**PARTS[name], "step": 2, **({"set": "after"} if name == "samples.jsonl" else {})})
    return bytes_of("\n".join((good, text.replace("\n", " "), after)) + "\n")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "ppo").mkdir(parents=True)
    for name, part in PARTS.items():
        (folder / name).write_bytes(content(name, json.dumps(part)))
    return folder


def report(folder, capsys):
    """(whole, in part or refused; seconds) of `lfjax report`; the page holds no markup of the run's."""
    (folder / "report.html").unlink(missing_ok=True)
    capsys.readouterr()
    begun = time.monotonic()
    with in_time():
        code = cli.main(["report", str(folder)])
    seconds = time.monotonic() - begun
    out, err = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out + err)
    if code == 2:
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return "refused", seconds
    lines = err.splitlines()
    assert out == f"{folder}/report.html\n" and all(line.startswith("note: left out of") for line in lines)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000 and len(re.findall("<script", text)) == 1 and "<img" not in text
    assert text.count("Left out: ") == len(lines)
    Page(text)
    return "in part" if lines else "shown", seconds


@pytest.mark.parametrize("name", PARTS)
def test_a_value_in_any_place_of_a_run_file(name, run, capsys):
    table = Table()
    for kind, text in VALUES.items():
        for at in places(PARTS[name]):
            (run / name).write_bytes(content(name, with_value(PARTS[name], at, text)))
            table.add(kind, *report(run, capsys))
    for kind in ("controls", "direction", "markup", "surrogate", "no text", "long text"):  # as a name
        text = json.dumps({**PARTS[name], MARK: 1.5}).replace(json.dumps(MARK), VALUES[kind])
        (run / name).write_bytes(content(name, text))
        table.add(f"{kind} as a name", *report(run, capsys))
    table.show(capsys, name)


WHOLE = {
    "empty": b"", "line feeds": b"\n" * 1000, "zeros": bytes(1000), "UTF-16": json.dumps(METRIC).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}", "gzip": gzip.compress(b"{}"), "binary": bytes(range(256)) * 100,
    "half": b'{"stage": "pp', "CR": b'{"stage":"a","step":1}\r{"stage":"a","step":2}\r', "many": b"{}\n" * 10_000,
    "twice": b'{"stage":"a","stage":"b","step":1,"step":2}\n' * 3, "number": b"1" * 1000, "deep": b"[" * 5_000_000,
    "long": b"x" * 100_000_000, "rows": b'{"stage":"a","step":1,"b":2}\n' * 500_000,
    "stages": b"".join(b'{"stage":"%d","step":1,"b":2}\n' % i for i in range(20_000)),
    "metrics": json.dumps({"stage": "a", "step": 1, **{str(i): i for i in range(100_000)}}).encode() * 1 + b"\n",
    "prompts": json.dumps({**SAMPLE, "prompt": "x" * 100_000}).encode() + b"\n",
}  # fmt: skip
NODES = {
    "FIFO": os.mkfifo,
    "folder": pathlib.Path.mkdir,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "sparse": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
}


def test_a_file_of_a_run_that_is_something_else(run, capsys):
    table = Table()
    for kind in (*WHOLE, *NODES):
        for name in PARTS:
            path, kept = run / name, (run / name).read_bytes()
            path.unlink()
            if kind in WHOLE:
                path.write_bytes(WHOLE[kind])
            else:
                NODES[kind](path)
            table.add(kind, *report(run, capsys))
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(kept)
    for kind, make in NODES.items():
        for name in ("checkpoints", "checkpoints/ppo", "report.html"):
            path = run / name
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
            make(path)
            if name != "report.html" or kind != "folder":
                table.add(f"{kind} of a folder", *report(run, capsys))
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            (run / "checkpoints" / "ppo").mkdir(parents=True, exist_ok=True)
    table.show(capsys, "run files")


def test_a_value_in_any_place_of_a_record(tmp_path, capsys):
    table, path = Table(), tmp_path / "records.jsonl"
    good = json.dumps({**EVERY_KIND, "id": "other"})
    for kind, text in VALUES.items():
        for at in places(EVERY_KIND):
            changed = with_value(EVERY_KIND, at, text).replace("\n", " ")
            path.write_bytes(bytes_of(f"{changed}\n{good}\n"))
            begun = time.monotonic()
            with in_time():
                try:
                    found = list(records.read_records(path))
                    outcome = "shown"
                    assert records.write_records(tmp_path / "again.jsonl", found) == 2
                    again = list(records.read_records(tmp_path / "again.jsonl"))
                    assert [r.responses for r in again] == [r.responses for r in found]
                except InputError as error:
                    line, outcome = str(error), "refused"
                    assert line.startswith(f"{path}:") and "\n" not in line and len(line) < len(str(path)) + 500
            table.add(kind, outcome, time.monotonic() - begun)
    table.show(capsys, "records")


def blank(file):
    file.write(b"\n" * 2**28)


def ids(file):
    """Numbers with one hash."""
    rows = (
        b'{"id": %d, "prompt": "", "responses": ["a"], "feedback": []}\n' % (i * (2**61 - 1)) for i in range(60_000)
    )
    file.writelines(rows)


LARGE = {  # name -> what writes it, unpacked
    "a line of 1 GB": lambda file: os.truncate(file.fileno(), 2**30),
    "blank lines": blank,
    "brackets": lambda file: file.write(b"[" * 63 * 2**20),
    "objects": lambda file: file.write(b"[" + b"{}," * (20 * 2**20) + b"{}]"),
    "quotes": lambda file: file.write(b"[[" * 60 + b'""' * (30 * 2**20)),
    "escapes": lambda file: file.write(b"[" * 101 + b'"' + b'\\"' * (30 * 2**20)),
    "a long text": lambda file: file.write('{"prompt": "é🙂"}'.encode().replace(b"\xc3", b"x" * 60 * 2**20 + b"\xc3")),
    "numbers of one hash": ids,
}


def children() -> float:
    """Seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


READ = "import sys; from lfjax.cli import main; sys.exit(main(['feedback', 'convert', 'gsm8k', *sys.argv[1:]]))"
RECORDS = """
import sys
from lfjax.records import read_records
try:
    print(sum(1 for _ in read_records(sys.argv[1])))
except ValueError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("packed", [False, True])
def test_large_files_take_little_time_and_memory(packed, tmp_path, capsys):
    table = Table()

    def bounded():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    for kind, write in LARGE.items():
        path = tmp_path / "large.jsonl"
        with open(path, "wb") as file:
            write(file)
        if packed:
            subprocess.run(["gzip", "-1", "-f", path], check=True)
            path = path.with_suffix(".jsonl.gz")
        for program, given in ((RECORDS, [path]), (READ, [path, tmp_path / "out.jsonl"])):
            begun = children()
            done = subprocess.run(
                [sys.executable, "-c", program, *given], capture_output=True, text=True, timeout=60, preexec_fn=bounded
            )
            seconds = children() - begun
            assert "Traceback" not in done.stderr and "MemoryError" not in done.stderr, (kind, done.stderr[-2000:])
            assert done.returncode == 0 or (done.stderr.count("\n") == 1 and str(path) in done.stderr), (kind, done)
            assert seconds < SECONDS, (kind, seconds)
            table.add(kind, "refused" if done.returncode else "shown", seconds)
        path.unlink()
    table.show(capsys, "packed files" if packed else "plain files")


def test_a_hundred_thousand_rows_and_logs_beyond_their_limit(tmp_path, capsys):
    table = Table()
    for kind, count in (("100,000 rows", 100_000), ("2,000,000 rows", 2_000_000)):
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = (b'{"stage":"ppo","step":%d,"ppo/score":%d,"ppo/kl":%d}\n' % (i, i % 7, i % 11) for i in range(count))
        (folder / "metrics.jsonl").write_bytes(b"".join(rows))
        table.add(kind, *report(folder, capsys))
        assert (folder / "report.html").stat().st_size < 500_000
    table.show(capsys, "rows")
