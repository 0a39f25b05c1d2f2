"""The one way to write a file and to read a small one."""

import ast
import gzip
import json
import os
import pathlib
import stat
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lfjax
from lfjax import files
from lfjax.config import InputError

ROOT = pathlib.Path(lfjax.__file__).parent
JSON = b'{"a": [1, 2.5, "\xc3\xbc"]}'


# Writing


@pytest.fixture
def victim(tmp_path) -> pathlib.Path:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "precious"
    file.write_text("precious")
    return file


def test_a_file_gets_the_umasks_mode_and_replaces_what_is_there(tmp_path):
    before = os.umask(0o027)
    try:
        for content in (b"old and long", b"new"):
            files.write_bytes(tmp_path / "x", content)
            assert (tmp_path / "x").read_bytes() == content
            assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_in_the_targets_place_is_replaced(tmp_path, victim):
    (tmp_path / "x").symlink_to(victim)
    files.write_text(tmp_path / "x", "new")
    assert victim.read_text() == "precious" and (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()


def test_a_planted_temporary_name_is_refused_not_written_through(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".lfjax-{'0' * 16}").symlink_to(victim)
    with pytest.raises(InputError, match=r"x: cannot write: File exists"):
        files.write_text(tmp_path / "x", "new")
    assert victim.read_text() == "precious" and not (tmp_path / "x").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("mine")])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, error):
    files.write_text(tmp_path / "x", "old")
    with (
        pytest.raises(InputError if isinstance(error, OSError) else type(error)),
        files.writing(tmp_path / "x") as file,
    ):
        file.write(b"half")
        raise error
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_another_files_error_is_not_said_to_be_the_targets(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), files.writing(tmp_path / "x"):
        (tmp_path / "absent").read_bytes()


def test_a_folder_in_the_targets_place_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match=r"x: cannot write: Is a directory; remove what stands there"):
        files.write_text(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == ["x"]


def test_a_fifo_and_a_processes_own_outputs_are_written_directly(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "fifo", "through", pipe=True)
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    write = "files.write_text('/dev/stdout', '2\\n', pipe=True)"
    program = f"from lfjax import files; print('1', flush=True); {write}; print('3')"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "1\n2\n3\n"
    files.write_text(tmp_path / "fifo", "in its place")
    assert (tmp_path / "fifo").read_text() == "in its place"


def test_what_is_the_systems_is_never_replaced(tmp_path, victim, monkeypatch):
    """Where a process's own outputs could not be told from other links."""
    system, ours = tmp_path / "dev", tmp_path / "dev" / "shm"
    ours.mkdir(parents=True)
    monkeypatch.setattr(files, "_own_descriptor", lambda path: None)
    monkeypatch.setattr(files, "_SYSTEM", (str(system),))
    monkeypatch.setattr(files, "_OURS", (str(ours),))
    (system / "stdout").symlink_to(victim)
    (tmp_path / "way").symlink_to(system)
    for path in (system / "stdout", tmp_path / "way" / "stdout", system / "new"):
        for pipe in (True, False):
            with pytest.raises(InputError, match=f"^{path}: cannot write: .*; name another place$"):
                files.write_text(path, "new", pipe=pipe)
    assert (system / "stdout").is_symlink() and victim.read_text() == "precious"
    assert sorted(os.listdir(system)) == ["shm", "stdout"]
    files.write_text(ours / "x", "new")
    assert (ours / "x").read_text() == "new"


def test_a_reader_that_has_enough_is_told_from_a_failure(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BrokenPipeError), files.writing(tmp_path / "fifo", pipe=True) as file:
        os.close(reader)
        file.write(b"x" * 100_000)


def test_tensors_are_written_as_their_library_writes_them(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(np.float32).T,  # not contiguous
        "a": rng.normal(size=(2, 2, 2)).astype(jnp.bfloat16),
        "ü": np.arange(7, dtype=np.int8),
        "scalar": np.float16(2.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "bool": np.array([True, False, True]),
    }
    files.write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and np.array_equal(found[name], x), name
    with safetensors.safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    alike = {name: x for name, x in tensors.items() if x.dtype == np.float32}
    files.write_tensors(tmp_path / "x", alike, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == safetensors.numpy.save(
        {n: np.ascontiguousarray(x) for n, x in alike.items()}, {"format": "pt"}
    )


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
def test_a_log_that_is_no_regular_file_is_not_appended_to(tmp_path, victim, kind):
    log = tmp_path / "log"
    if kind == "link":
        log.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(log)
    else:
        log = pathlib.Path("/dev/null")
    with pytest.raises(InputError, match=r"cannot write: .*; remove what stands there"):
        files.append(log, b"row")
    assert victim.read_text() == "precious"


def test_a_lock_file_is_no_link(tmp_path, victim):
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError), files.locked(tmp_path / "lock"):
        pass
    assert victim.read_text() == "precious"


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path, victim):
    (tmp_path / ".lfjax-0123456789abcdef").write_text("half")
    (tmp_path / ".lfjax-fedcba9876543210").symlink_to(victim)
    (tmp_path / ".lfjax-mine").write_text("mine")
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lfjax-mine", "mine"] and victim.read_text() == "precious"


# Who else may make or change a file, and why. Orbax and TFDS write their own folders, by none of these calls.
EXCEPTIONS = {
    ("cli.py", "open"): "a stream for a stdout that was closed",
    ("cache.py", "TemporaryFile"): "has no name: whether compiled programs can be kept in a folder",
    ("tokenizers/panics.py", "TemporaryFile"): "has no name: what a library prints meanwhile, where there is no memfd",
    ("interop/hf.py", "rename"): "a model's folder takes the place of another, whole",
    ("run/directory.py", "flock"): "on the run directory itself",
}
WRITING = {
    *("open", "fdopen", "write_text", "write_bytes", "touch", "rename", "save_file", "symlink_to", "hardlink_to"),
    *("NamedTemporaryFile", "TemporaryFile", "mkstemp", "copyfile", "copytree", "copy2", "move", "tofile", "savez"),
    *("dump", "flock", "truncate", "ftruncate", "symlink", "link", "mknod", "mkfifo"),
}


def writes(tree: ast.Module):
    """The names of the calls that make or change a file by another way than lfjax.files."""
    ours = {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "lfjax.files"
            for alias in n.names}  # fmt: skip
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        owner, _, name = called.rpartition(".")
        given = [ast.unparse(value) for value in (*call.args, *(keyword.value for keyword in call.keywords))]
        if owner == "files" or (not owner and name in ours):
            continue
        if called == "os.replace" or (owner == "shutil" and name == "copy"):
            yield name
        elif called == "os.open":
            if any(flag in text for text in given for flag in ("O_CREAT", "O_TRUNC", "O_RDWR")):
                yield name
        elif name in WRITING - {"open"} or (
            name == "open" and any(len(text) < 6 and text[0] in "'\"" and set(text) & set("wxa+") for text in given)
        ):
            yield name


@pytest.mark.parametrize(
    "code, found",
    [("open(p, 'w')", ["open"]), ("p.open(mode='xb')", ["open"]), ("open(p)", []), ("p.open('rb')", []),
     ("os.replace(a, b)", ["replace"]), ("text.replace(a, b)", []), ("p.write_text(t)", ["write_text"]),
     ("os.open(p, os.O_CREAT)", ["open"]), ("files.write_text(p, t)", []), ("tempfile.mkstemp()", ["mkstemp"])],
)  # fmt: skip
def test_the_search_for_writers_knows_them(code, found):
    assert list(writes(ast.parse(code))) == found


def test_every_file_is_written_by_the_one_writer():
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        if path != ROOT / "files.py"
        for name in writes(ast.parse(path.read_text()))
    }
    assert found == set(EXCEPTIONS)


# Reading


def test_json_is_read_with_or_without_a_mark_and_has_the_kind_that_is_asked_for(tmp_path):
    for content in (JSON, b"\xef\xbb\xbf" + JSON):
        (tmp_path / "x").write_bytes(content)
        assert files.read_json(tmp_path / "x", dict) == {"a": [1, 2.5, "ü"]}
    with pytest.raises(InputError, match="x: found a JSON dict, not an array; restore or delete the file"):
        files.read_json(tmp_path / "x", list)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", ":1: not JSON"),
        (b'{"a":\n1,}', ":2: not JSON"),
        (b'{"a": 1}{', "Extra data"),
        (b'\n\n"\xff"', ":3: not UTF-8 (byte 0xff)"),
        (b"NaN", "NaN is not JSON"),
        (b"[1, -Infinity]", "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b"1" * 5000, "a whole number of too many digits"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 100"),
        (b"[" * 1_000_000, "nested deeper than 100"),
        (b"[" + b"0," * 5_000_000 + b"0]", "more than 4000000 values"),
        (b"[" + b"[]," * 5_000_000 + b"0]", "more than 4000000 values"),
        (b"[" + b"{}" * 5_000_000 + b"0]", "more than 4000000 values"),
        (b'"[[' * 20_000_000, "more than 4000000 values"),
        (b"\x00" * 70 * 2**20, "larger than 64 MB"),
    ],
)
def test_hostile_json_is_one_line(tmp_path, content, found):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_json(tmp_path / "x.json")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/x.json") and found in line and line.endswith("; restore or delete the file")
    assert "\n" not in line and len(line) < len(str(tmp_path)) + 200


def test_depth_is_counted_outside_of_texts():
    deep = "[" * 100 + "]" * 100
    assert files.json_value(deep.encode()) is not None
    text = json.dumps(["{[" * 500 + '"\\' + "[" * 500, '\\"', "\\"])
    assert files.json_value(text.encode()) == json.loads(text)
    wide = json.dumps([{"a": []}] * 1000)
    assert files.json_value(wide.encode()) == json.loads(wide)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket", "dangling", "huge"])
def test_what_is_no_small_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        path.touch()
        os.truncate(path, 2**40)
    for read in (files.read_json, files.read_text, lambda p: list(files.lines(p))):
        with pytest.raises(InputError, match=r"/x(:1)?: "):
            read(path)


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path):
    content = b"\xef\xbb\xbfa\n\n \r\nb\r\n\t\n" + b"\n" * 3_000_000 + b"c\n" + b"d" * 3_000_000 + b"\n e"
    expected = [(i, line + b"\n") for i, line in enumerate(content[3:].split(b"\n"), 1) if line.strip()]
    expected[-1] = (expected[-1][0], b" e")
    for pack in (bytes, gzip.compress):
        (tmp_path / "x").write_bytes(pack(content))
        assert list(files.lines(tmp_path / "x")) == expected


LIMITS = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({3 * 2**29}, {3 * 2**29}));"
READ = """
import sys
from lfjax.records import read_records
try:
    list(read_records(sys.argv[1]))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["long", "packed", "packed blank lines"])
def test_a_line_is_bounded_by_its_own_length_in_time_and_memory(tmp_path, kind):
    """A GB each; the address space is 1.5 GB, the time 10 s."""
    path = tmp_path / "x"
    if kind == "long":
        path.touch()
        os.truncate(path, 2**30)
    else:
        path.write_bytes(gzip.compress((b"a" if kind == "packed" else b"\n") * 2**20) * 2**10)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LIMITS + READ, path], capture_output=True, text=True, timeout=60)
    said = {"packed blank lines": f"{path}: gzip data that unpacks to more than 200 times its size"}
    assert done.stdout.startswith(said.get(kind, f"{path}:1: a line of more than 64 MB; ")), done
    assert done.stdout.count("\n") == 1 and not done.stderr and time.monotonic() - begun < 10
