"""One self-contained HTML file per run, made from the run directory's files alone."""

from lfjax.report.html import build

__all__ = ["build"]
