"""The machine and the versions that a benchmark's figures are of."""

import os
import sys
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Processor, cores and versions."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores, jax {version('jax')}, Python {sys.version.split()[0]}"
