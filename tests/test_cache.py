"""The cache folder: made for its owner alone; where others may write, nothing in it is used, and one note says so."""

import os
import stat
import subprocess
import sys

import pytest
import smallest

from lfjax import cache, doctor


@pytest.fixture
def folder(tmp_path):
    """A cache folder with one compiled program in it, which others may read."""
    (tmp_path / "above" / "cache" / "xla").mkdir(parents=True)
    (tmp_path / "above" / "cache" / "xla" / "program").touch()
    for path in (tmp_path / "above", *(tmp_path / "above").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "above" / "cache"


def test_a_folder_is_made_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        cache.make(tmp_path / "new" / "cache")
    finally:
        os.umask(before)
    made = (tmp_path / "new", tmp_path / "new" / "cache")
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700, 0o700]


@pytest.mark.parametrize(
    "changed, mode, said",
    [
        ("", 0o775, "{} may be written by others (mode 0775); chmod 700 {folder} if nobody else has, or "),
        ("", 0o757, "{} may be written by others (mode 0757); chmod 700 {folder} if nobody else has, or "),
        ("", 0o1777, "{} may be written by others (mode 1777); "),
        ("xla", 0o777, "{} may be written by others (mode 0777); chmod 700 {folder} if nobody else has, or "),
        ("xla/program", 0o666, "{} may be written by others (mode 0666); chmod 700 {folder} if nobody else has, or "),
        ("..", 0o777, "{}, above it, may be written by others (mode 0777); chmod go-w {}, or "),
    ],
)
def test_where_others_may_write_is_named_with_the_fix(folder, changed, mode, said):
    path = (folder / changed).resolve()
    assert cache.exposure(folder, "xla") == ""
    path.chmod(mode)
    expected = said.format(path, path, folder=folder) + "set LFJAX_CACHE to another folder"
    assert cache.exposure(folder, "xla") == expected
    assert f"the cache {folder} is not used: {expected}" in [problem for _, problem in doctor.cache(folder)]


@pytest.mark.parametrize("changed, mode", [("..", 0o1777), ("..", 0o775), ("", 0o700)])
def test_what_keeps_others_out_or_from_what_is_not_theirs_is_no_exposure(folder, changed, mode):
    if changed == "":
        (folder / "xla").chmod(0o777)
    (folder / changed).chmod(mode)
    assert cache.exposure(folder, "xla") == ""


def test_a_part_that_lies_elsewhere_is_examined_there(folder, tmp_path):
    (folder / "tfds").symlink_to(tmp_path / "open")
    (tmp_path / "open").mkdir()
    folder.chmod(0o700)
    assert cache.exposure(folder, "tfds") == ""
    (tmp_path / "open").chmod(0o777)
    assert cache.exposure(folder, "tfds").startswith(f"{tmp_path / 'open'} may be written by others")


def test_a_folder_of_another_user_is_not_used(folder, monkeypatch):
    if os.geteuid() == 0:
        os.chown(folder, 54321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert cache.exposure(folder, "xla").startswith(f"{folder} belongs to user ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize(
    "owner, mode, said", [((54321, -1), 0o755, "belongs to"), ((-1, 54321), 0o775, "may be written")]
)
def test_who_may_write_above_could_put_another_folder_in_its_place(folder, owner, mode, said):
    os.chown(folder.parent, *owner)
    folder.parent.chmod(mode)
    assert cache.exposure(folder, "xla").startswith(f"{folder.parent}, above it, {said}")


def test_what_can_be_trusted_is_its_owners_alone_from_then_on(folder):
    assert cache.can_keep(folder, "xla")
    assert stat.S_IMODE((folder / "xla").stat().st_mode) == 0o700


def test_a_run_goes_on_without_the_cache_and_says_so_once(folder, tmp_path):
    """In a process of its own: jax keeps its cache's folder."""
    folder.chmod(0o777)
    data = smallest.write_records(tmp_path / "records.jsonl")
    command = [sys.executable, "-m", "lfjax", "train", f"--config={smallest.PATH}", f"--workdir={tmp_path / 'w'}"]
    command += [f"--config.data.path={data}", "--config.stages=tokenizer", "--config.run.compile_cache=True"]
    environment = os.environ | {"LFJAX_CACHE": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stderr.splitlines() if "cache" in line.lower()]
    assert note == f"note: the cache is not used: {cache.exposure(folder, 'xla')}"
