"""The page on forking in the project's README, command by command, in a copy of the project."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import setting
import smallest
from tiny import close_trees

from lfjax.steps.ppo_update import ppo_update

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOR_SPEED = {
    "lfjax train": " --config.data.source=jsonl --config.data.path=rated.jsonl --config.tokenizer.vocab_size=310"
    " --config.pretrain.steps=4 --config.reward.steps=4 --config.ppo.steps=2 --config.evaluate.prompts=16"
    " --config.run.compile_cache=False --config.run.trackers=",
    "python -m pytest": " -q -p no:cacheprovider -k test_update",
}


def commands() -> str:
    """The blocks of the section as one script; long commands get what makes them short."""
    section = re.search(r"^## Forking a step$(.*?)(?:^## |\Z)", (ROOT / "docs" / "forking.md").read_text(), re.S | re.M)
    assert section
    blocks = re.findall(r"^```sh\n(.*?)^```$", section.group(1), re.S | re.M)
    lines = "".join(blocks).splitlines()
    for start, more in FOR_SPEED.items():
        (found,) = (number for number, line in enumerate(lines) if line.startswith(start))
        lines[found] += more
    return "\n".join(["set -e", *lines])


def project(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the project in `folder`, in which the page's commands have run."""
    for name in ("lfjax", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    smallest.write_records(folder / "rated.jsonl")
    tools = pathlib.Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "XLA_FLAGS": "",  # one device
        "GIT_CEILING_DIRECTORIES": str(folder.parent),  # `git apply` takes this folder for the top
    }
    done = subprocess.run(["bash", "-c", commands()], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout[-3000:]
    return folder


def test_the_pages_edit_fits_the_step(tmp_path):
    (edit,) = re.findall(r"^git apply <<'EDIT'\n.*?^EDIT$", commands(), re.S | re.M)
    shutil.copy(ROOT / "lfjax" / "steps" / "ppo_update.py", tmp_path / "my_update.py")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["bash", "-c", edit], cwd=tmp_path, env=environment, check=True)
    source = (tmp_path / "my_update.py").read_text()
    compile(source, "my_update.py", "exec")
    assert source.count("dual_clip") == 2


@pytest.mark.slow
@pytest.mark.xdist_group("mutants")
def test_the_pages_commands_run_and_do_what_it_says(tmp_path):
    copy = project(tmp_path)
    kept = (copy / "runs" / "fork" / "steps" / "ppo_update.py").read_text()
    assert kept == (copy / "my_update.py").read_text() and "dual_clip" in kept
    config = json.loads((copy / "runs" / "fork" / "config.json").read_text())
    assert config["ppo"]["update_step"]["dual_clip"] == 3.0
    assert config["steps"]["ppo_update"] == "my_update:ppo_update"
    check_the_bound(copy / "my_update.py")


def check_the_bound(path: pathlib.Path):
    """Tokens of negative advantage whose ratio is beyond dual_clip pull no more; nothing else has changed."""
    spec = importlib.util.spec_from_file_location("my_update", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mask = setting.saved_rollout().mask
    rollout = setting.saved_rollout(log_ratio=np.where(np.arange(mask.size).reshape(mask.shape) % 2 == 0, 1.5, 0.1))
    far = (rollout.advantages < 0) & (rollout.old_logprobs < setting.logprobs(setting.params(), rollout) - 1.0) & mask
    assert far.any()
    own, fork = (setting.update({"ppo_update": step}, rollout) for step in (ppo_update, module.ppo_update))
    quiet = rollout._replace(advantages=np.where(far, 0.0, rollout.advantages))
    expected, _ = setting.update({"ppo_update": ppo_update}, quiet)
    close_trees(fork[0], expected, rtol=1e-4)
    close_trees(fork[1], own[1])
    with pytest.raises(AssertionError):
        close_trees(fork[0], own[0], rtol=1e-2)
