"""Every command of README.md and docs/ as it stands, block by block from top to bottom, in a copy of the project."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("pages")
ROOT = pathlib.Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+) -->\n)?^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.M)
REASONS = {"needs a cloud", "needs a GPU", "more than two minutes"}
SECONDS = 900  # a block's; on a machine that does other things beside


def blocks(page: pathlib.Path) -> list[re.Match]:
    """Of a page, fenced text of every language."""
    return list(BLOCK.finditer(page.read_text()))


def test_commands_are_marked_as_such_and_those_that_are_not_run_say_why():
    for page in PAGES:
        found = blocks(page)
        assert len(found) * 2 == page.read_text().count("\n```"), page
        for block in found:
            assert block["language"] in ("sh", "json", "python", "yaml", "text"), f"{page}: {block['text'][:60]}"
            assert block["why"] is None or (block["language"] == "sh" and block["why"] in REASONS), page


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b["language"] == "sh" for b in blocks(page))],
                         ids=lambda page: page.name)  # fmt: skip
def test_the_commands_of_a_page_do_what_it_says(page, tmp_path):
    folder = tmp_path / "lfjax"
    for name in ("lfjax", "configs", "tests", "benchmarks", "launch", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copy(ROOT / name, folder)
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "XLA_FLAGS": "",  # one device
        "GIT_CEILING_DIRECTORIES": str(tmp_path),  # `git apply` takes this folder for the top
    }
    for block in blocks(page):
        if block["language"] == "sh" and block["why"]:
            print(f"{page.name}: not run, {block['why']}: {block['text'].splitlines()[0]}")
        elif block["language"] == "sh":
            options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": SECONDS}
            done = subprocess.run(["bash", "-ec", block["text"]], **options)
            assert done.returncode == 0, f"{block['text']}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
