"""`lfjax doctor`: each thing that can be wrong with a machine gives a line that says what mends it."""

import collections
import os
import shutil
import sys

import jax
import pytest

from lfjax import cli, doctor


def problems(found):
    return [problem for _, problem in found if problem]


def test_this_machine_has_what_lfjax_needs(tmp_path):
    lines, found = doctor.examine(tmp_path)
    assert found == []
    text = "\n".join(lines)
    for part in ("python ", f"jax {jax.__version__}", "device ", "backend cpu", "memory ", f"cache {tmp_path}"):
        assert part in text


@pytest.mark.parametrize(
    "requirement, problem",
    [
        ("no-such-package>=1.0", "no-such-package is not installed; install lfjax with its dependencies"),
        ("numpy>=99", f"numpy {doctor.importlib.metadata.version('numpy')} is installed, lfjax needs >=99;"),
        ("numpy==1.0", "lfjax needs ==1.0; pip install 'numpy==1.0'"),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_named(requirement, problem):
    (found,) = problems(doctor.packages([requirement]))
    assert problem in found


def test_a_system_that_bounds_no_memory_is_named(monkeypatch):
    assert [*doctor.bounds()] == [("chat templates and vocabularies: bounded in time and memory", "")]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "bounded in time alone: this system" in next(doctor.bounds())[0]


@pytest.mark.parametrize("requirement", ["numpy>=1.9", 'no-such-package; extra == "test"', "numpy"])
def test_what_is_there_or_belongs_to_an_extra_is_no_problem(requirement):
    assert problems(doctor.packages([requirement])) == []


@pytest.mark.parametrize("file, extra", [("nvidia0", "cuda"), ("accel0", "tpu"), ("vfio/0", "tpu")])
def test_an_accelerator_that_jax_does_not_use_is_named(tmp_path, monkeypatch, file, extra):
    device = tmp_path / "dev" / file
    device.parent.mkdir(parents=True)
    assert problems(doctor.devices(tmp_path)) == []
    device.touch()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    (found,) = problems(doctor.devices(tmp_path))
    assert found.endswith(f"pip install 'lfjax[{extra}]'")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = problems(doctor.devices(tmp_path))
    assert found.endswith("JAX_PLATFORMS is 'cpu': unset it")


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'rocm'"), AssertionError()])
def test_a_platform_that_is_not_there_is_named_with_the_variable_that_asks_for_it(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    (found,) = problems(doctor.devices())
    assert (str(error) or "it has no such platform") in found and "JAX_PLATFORMS is 'rocm': unset it" in found


def test_a_small_memory_is_a_problem(monkeypatch):
    assert problems(doctor.memory()) == []
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18, "SC_AVPHYS_PAGES": 2**17}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    ((line, problem),) = doctor.memory()
    assert line.startswith("memory 1.0 GiB, 0.5 unused") and "2 GiB" in problem


def test_a_cache_that_cannot_be_used_is_a_problem(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    (found,) = problems(doctor.cache(file))
    assert "cannot be written; set LFJAX_CACHE" in found
    assert problems(doctor.cache(tmp_path / "new" / "folder")) == []
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 1000, 1000))
    (found,) = problems(doctor.cache(tmp_path))
    assert found.startswith(f"less than 1 GiB is free on the disk of {tmp_path}; free some")


class Started(Exception):
    """In place of the new process."""


@pytest.mark.parametrize(
    "setting, before, after",
    [
        ("always [madvise] never", "", "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", "", None),
        ("always madvise [never]", "", None),
        (None, "", None),
    ],
)
def test_the_command_asks_for_huge_pages_once(tmp_path, monkeypatch, setting, before, after):
    def start(program, argv):
        assert program == sys.executable and argv == [sys.executable, "lfjax", "doctor"]
        raise Started

    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    monkeypatch.setattr(os, "execv", start)
    monkeypatch.setattr(sys, "orig_argv", ["python", "lfjax", "doctor"])
    monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("glibc", "2.36"))
    if after is None:
        cli.huge_pages(file)
        assert os.environ["GLIBC_TUNABLES"] == before
    else:
        with pytest.raises(Started):
            cli.huge_pages(file)
        assert os.environ["GLIBC_TUNABLES"] == after
        cli.huge_pages(file)  # the new process goes on
