"""What is built from the project stands alone: a wheel in an environment outside the clone, and the source archive."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import vader_package
from packaging.version import Version

import lfjax

FOUND = next((found.version for found in importlib.metadata.distributions(name="setuptools")), "0")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("package"),
    pytest.mark.skipif(Version(FOUND) < Version("77"), reason="no setuptools>=77: nothing was built"),
]
ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("benchmarks", "configs", "docs", "launch", "lfjax", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py")
SHORTER = (
    *(f"--config.{stage}.steps=3" for stage in ("pretrain", "reward", "ppo")),
    "--config.ppo.norm_samples=16",
    "--config.evaluate.prompts=16",
)


def run(*command, folder, **environment) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment = {**inherited, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(map(str, command), cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """The unpacked source archive, built from a copy of the project without what is made in it."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "copy" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*FILES, *(path.name for path in ROOT.glob("*.lock"))):
        shutil.copy(ROOT / file, folder / "copy" / file)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, folder=folder / "copy")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"lfjax-{lfjax.__version__}"


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", folder, folder=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> pathlib.Path:
    """The bin folder of an environment with the wheel alone, which finds the packages it needs in this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    pathlib.Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def files(folder: pathlib.Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_the_source_archive_holds_what_its_tests_need_and_they_pass_there(source):
    for part in PARTS:
        assert files(source / part) == files(ROOT / part)
    assert {*FILES, "requirements.lock", "requirements-test.lock"} <= files(source)
    tests = ("tests/test_config.py", "tests/test_layers.py")
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, folder=source, PYTHONPATH=str(source))


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {f"lfjax/{name}" for name in files(ROOT / "lfjax")}
    assert held == package | {f"lfjax/configs/{name}" for name in files(ROOT / "configs")}


def test_outside_the_clone_the_command_knows_its_version_and_its_configs(environment, tmp_path):
    where = run(environment / "python", "-c", "import lfjax; print(lfjax.__file__)", folder=tmp_path)
    assert where.startswith(str(environment.parent))
    assert run(environment / "lfjax", "--version", folder=tmp_path) == f"lfjax {lfjax.__version__}\n"
    assert run(environment / "python", "-m", "lfjax", "--version", folder=tmp_path) == f"lfjax {lfjax.__version__}\n"
    listed = run(environment / "lfjax", "configs", folder=tmp_path).splitlines()
    assert [line.split()[0] for line in listed[:-1]] == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert listed[-1].endswith("lfjax/configs")


def test_outside_the_clone_a_run_of_a_named_config_ends_in_a_report(environment, tmp_path):
    cache = vader_package.fill_cache(tmp_path / "cache")
    command = (environment / "lfjax", "train", "--config=tiny", "--workdir=tiny", *SHORTER)
    assert "report: tiny/report.html" in run(*command, folder=tmp_path, LFJAX_CACHE=str(cache))
    assert "report: tiny/report.html" in run(*command, folder=tmp_path, LFJAX_CACHE=str(cache))
    assert (tmp_path / "tiny" / "report.html").is_file()
