"""The main job over several seeds: mean and range of every figure that matters.

    python benchmarks/seeds.py [--config=configs/quickstart.py] [--seeds=3] [--folder=runs/seeds] [--json=FILE]

A seed whose run directory is finished is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from machine import machine

FIGURES = (
    "pretrain/perplexity",
    "pretrain/unigram_perplexity",
    "pretrain/bits_per_byte",
    "reward/pair_accuracy",
    "reward/pair_accuracy_lexicon",
    "reward/pair_accuracy_ridge",
    "judge/positive_before",
    "judge/positive_after",
    "judge/positive_human",
    "ppo/score_before",
    "ppo/score_after",
    "ppo/kl",
    "diversity/distinct2_before",
    "diversity/distinct2_after",
    "ppo/length_before",
    "ppo/length_after",
    "ppo/eos_share_before",
    "ppo/eos_share_after",
    "compile/count",
    "time/total_s",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default="runs/seeds")
    parser.add_argument("--json")
    arguments, overrides = parser.parse_known_args()
    runs = []
    for seed in range(arguments.seeds):
        workdir = Path(arguments.folder) / str(seed)
        command = [sys.executable, "-m", "lfjax.cli", "train", f"--config={arguments.config}", f"--workdir={workdir}"]
        subprocess.run([*command, f"--config.seed={seed}", *overrides], check=True, stdout=subprocess.DEVNULL)
        runs.append(json.loads((workdir / "summary.json").read_text()))
    print(f"{arguments.config}, seeds 0..{arguments.seeds - 1}, {machine()}")
    print(f"{'figure':32s} {'mean':>9s} {'lowest':>9s} {'highest':>9s}")
    table = {}
    for name in FIGURES:
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            table[name] = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
            print(f"{name:32s} {table[name]['mean']:9.4g} {min(values):9.4g} {max(values):9.4g}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
