"""What `lfjax doctor` says of a machine: versions, devices, memory, caches, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lfjax.cache import ELSEWHERE, exposure

GIB = 2**30
# Signs of an accelerator whose jax is another extra, by what its driver makes.
ACCELERATORS = {
    "cuda": ("an NVIDIA GPU", ("/dev/nvidia0",)),
    "tpu": ("a TPU", ("/dev/accel0", "/dev/vfio/0")),
}


def packages(requirements: list[str]) -> Iterator[tuple[str, str]]:
    """(line to print, problem or "") for each package that lfjax needs here."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, asked = requirement.name, str(requirement.specifier)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: missing", f"{name} is not installed; install lfjax with its dependencies"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        problem = "" if fits else f"{name} {version} is installed, lfjax needs {asked}; pip install '{requirement}'"
        yield f"{name} {version}" + (f" (needs {asked})" if asked else ""), problem


def devices(root: Path = Path("/")) -> Iterator[tuple[str, str]]:
    """The devices that jax finds, and what keeps it from others."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        import jax

        found, backend = jax.devices(), jax.default_backend()
    except (ImportError, RuntimeError, AssertionError) as error:  # jax asserts that a named platform is there
        fix = f"; JAX_PLATFORMS is {platforms!r}: unset it" if platforms else "; reinstall jax and jaxlib together"
        cause = " ".join(str(error).split())[:200] or "it has no such platform"
        yield "devices: none", f"jax finds no device: {cause}{fix}"
        return
    for device in found:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        yield f"device {device}: {device.device_kind}" + (f", {limit / GIB:.1f} GiB" if limit else ""), ""
    yield f"backend {backend}, {jax.process_count()} process(es)", ""
    for extra, (what, files) in ACCELERATORS.items():
        if backend == "cpu" and any((root / file.lstrip("/")).exists() for file in files):
            asked = f"JAX_PLATFORMS is {platforms!r}: unset it" if platforms else f"pip install 'lfjax[{extra}]'"
            yield f"{files[0]}: there", f"this machine has {what}, but jax computes on the CPU; {asked}"


def memory() -> Iterator[tuple[str, str]]:
    """The host's memory and cores."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    problem = "less than 2 GiB of memory: the quickstart needs more" if total < 2 * GIB else ""
    yield f"memory {total / GIB:.1f} GiB, {free / GIB:.1f} unused; {os.cpu_count()} cores", problem


def bounds() -> Iterator[tuple[str, str]]:
    """What bounds chat templates and vocabularies (`lfjax.bounded`)."""
    memory = "and memory" if sys.platform == "linux" else "alone: this system bounds no process's memory"
    yield f"chat templates and vocabularies: bounded in time {memory}", ""


def trackers() -> Iterator[tuple[str, str]]:
    """What `config.run.trackers` can name here."""
    try:
        wandb = f"wandb {importlib.metadata.version('wandb')}"
    except importlib.metadata.PackageNotFoundError:
        wandb = "wandb after pip install wandb"
    yield f"trackers: tensorboard, {wandb}, a class of your own", ""


def cache(folder: Path) -> Iterator[tuple[str, str]]:
    """Where compiled programs and fetched data are kept, and whether they can be."""
    try:
        held = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        exposed = dict.fromkeys(filter(None, (exposure(folder, part) for part in ("xla", "tfds"))))
    except OSError as error:
        yield f"cache {folder}", f"the cache {folder} cannot be read: {error.strerror}; {ELSEWHERE}"
        return
    yield f"cache {folder}: {held / GIB:.2f} GiB held, {free / GIB:.1f} GiB free on its disk", ""
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield "", f"the cache {folder} cannot be written; {ELSEWHERE}"
    for problem in exposed:
        yield "", f"the cache {folder} is not used: {problem}"
    if free < GIB:
        yield "", f"less than 1 GiB is free on the disk of {folder}; free some, or set LFJAX_CACHE to another disk"


def examine(folder: Path) -> tuple[list[str], list[str]]:
    """(lines to print, problems with what mends each) of this machine; `folder` is the cache."""
    try:
        requirements = importlib.metadata.requires("lfjax") or []
    except importlib.metadata.PackageNotFoundError:
        found = [("lfjax: not installed", "lfjax runs from its folder alone; pip install -e . there")]
    else:
        found = list(packages(requirements))
    found = [*found, *devices(), *memory(), *bounds(), *trackers(), *cache(folder)]
    lines = [f"python {sys.version.split()[0]} ({sys.executable})", *(line for line, _ in found if line)]
    return lines, [problem for _, problem in found if problem]
