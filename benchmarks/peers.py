"""lfjax beside torch, transformers and TRL on one machine: the 12 M-parameter GPT-2 form, float32, the same shapes.

    pip install 'lfjax[peers]'
    python benchmarks/peers.py [--rounds=5] [--json=FILE] [--peer-python=PYTHON] [sft generate ppo]

Every contender is a process of its own, which is built and warmed up and then waits. The rounds go A, B, C, A, B, C, so
that all meet the same machine. A turn is three steps in a row, as in training, of which the first is not timed: a
virtual machine's host takes memory that lay free during the wait, and gives it back slowly. Medians. Whose library is
not installed is left out, and a line says so. SFT step: B=16 T=256, AdamW, clipping. Generation: B=32, 64 + 64 tokens,
sampled, no early stop. PPO: 32 prompts, 64 + 64 tokens, 1 epoch of 4 minibatches, separate reward, value and reference
models. Memory: the peak of the process, libraries included, as the kernel counts it. lfjax has huge pages, as its
command asks for; "with huge pages" is torch eager with the same setting.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = {
    "sft": {
        "lfjax": "ours_sft",
        "torch eager": "torch_sft",
        "with huge pages": "torch_sft_huge",
        "TRL SFTTrainer": "trl_sft",
    },
    "generate": {"lfjax": "ours_generate", "transformers": "transformers_generate"},
    "ppo": {"lfjax": "ours_ppo", "TRL PPOTrainer": "trl_ppo"},
}
AMOUNTS = {"sft": (16 * 256, "tokens/s"), "generate": (32 * 64, "tokens/s"), "ppo": (32, "episodes/s")}
MATMULS = {"XLA": "ours_matmul", "torch": "torch_matmul"}
MATMUL, STEPS_A_TURN = 1536, 3
VOCABULARY, WIDTH, LAYERS, HEADS = 4096, 384, 6, 6


class Turns:
    """The contender's side: `next()` ends a step, and a turn's last waits for the next turn, in lines over a pipe."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to stderr
        self._times = [0.0] * STEPS_A_TURN  # when the turn's steps began and ended

    def next(self) -> None:
        self._times.append(time.perf_counter())
        if 1 < len(self._times) <= STEPS_A_TURN:
            return
        self._say(seconds=[b - a for a, b in itertools.pairwise(self._times[1:])])
        if sys.stdin.readline().strip() != "go":
            self._say(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            os._exit(0)
        self._times = [time.perf_counter()]

    def _say(self, **what) -> None:
        print(json.dumps(what), file=self._out, flush=True)

    def forever(self, step) -> None:
        for _ in range(2):
            step()
        while True:
            self.next()
            step()


def ours(turns: Turns, name: str) -> None:
    import jax
    import steps  # the parent has started this process with huge pages, as the lfjax command does for itself

    from lfjax.models import presets
    from lfjax.models.transformer import Transformer

    model = Transformer(presets.gpt2_12m())
    params = steps.parameters(model)
    make = {"sft": steps.sft_run, "generate": steps.generate_run, "ppo": steps.ppo_run}[name]
    run = make(model, params)
    turns.forever(lambda: jax.block_until_ready(run()))


def ours_matmul(turns: Turns) -> None:
    import jax

    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
    product = jax.jit(lambda x: x @ x)
    turns.forever(lambda: jax.block_until_ready(product(x)))


def torch_matmul(turns: Turns) -> None:
    import torch

    x = torch.randn(MATMUL, MATMUL)
    turns.forever(lambda: x @ x)


def gpt2(kind: str = "GPT2LMHeadModel", **settings):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 1024}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = transformers.GPT2Config(**sizes, **off, **ids, attn_implementation="sdpa", **settings)
    return getattr(transformers, kind)(config)


def word_tokenizer():
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w0", bos_token="w0", pad_token="w1", unk_token="w2"
    )


def torch_sft(turns: Turns) -> None:
    import torch

    model = gpt2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    tokens = torch.randint(2, VOCABULARY, (16, 256))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    turns.forever(step)


def waiting(turns: Turns, warm: int = 2):
    """A trainer's callback that waits between its steps."""
    import transformers

    class Waiting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step >= warm:
                turns.next()

    return Waiting()


def plain(**settings) -> dict:
    """What a trainer's arguments have in common: float32 on the CPU, nothing recomputed, nothing logged or saved."""
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True}
    return {**quiet, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "output_dir": "/tmp", **settings}


def trl_sft(turns: Turns) -> None:
    import datasets
    import numpy as np
    import trl

    rows = np.random.default_rng(0).integers(2, VOCABULARY, (64, 256)).tolist()
    options = plain(per_device_train_batch_size=16, max_steps=10**6, max_length=256, learning_rate=1e-4, packing=False)
    trl.SFTTrainer(
        model=gpt2(),
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=word_tokenizer(),
        callbacks=[waiting(turns)],
    ).train()


def transformers_generate(turns: Turns) -> None:
    import torch

    model = gpt2().eval()
    tokens = torch.randint(2, VOCABULARY, (32, 64))
    mask = torch.ones_like(tokens)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 1}

    def step():
        with torch.no_grad():
            model.generate(input_ids=tokens, attention_mask=mask, **options)

    turns.forever(step)


def trl_ppo(turns: Turns) -> None:
    import datasets
    import numpy as np
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = np.random.default_rng(0).integers(2, VOCABULARY, (256, 64)).tolist()
    # 4 minibatches of 8, and an optimiser step after each: accumulation would make one of them
    batch = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "num_mini_batches": 4}
    form = {"num_ppo_epochs": 1, "response_length": 64, "local_rollout_forward_batch_size": 32, "temperature": 1.0}
    options = plain(**batch, **form, total_episodes=32 * 10**6, num_sample_generations=0, learning_rate=1e-5)
    scores = [gpt2("GPT2ForSequenceClassification", num_labels=1) for _ in range(2)]
    PPOTrainer(
        args=PPOConfig(**options),
        processing_class=word_tokenizer(),
        model=gpt2(),
        ref_model=gpt2(),
        reward_model=scores[0],
        value_model=scores[1],
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": rows[:32]}),
        callbacks=[waiting(turns)],
    ).train()


CONTENDERS = {
    "ours_sft": lambda turns: ours(turns, "sft"),
    "ours_generate": lambda turns: ours(turns, "generate"),
    "ours_ppo": lambda turns: ours(turns, "ppo"),
    "ours_matmul": ours_matmul,
    "torch_matmul": torch_matmul,
    "torch_sft": torch_sft,
    "torch_sft_huge": torch_sft,
    "trl_sft": trl_sft,
    "transformers_generate": transformers_generate,
    "trl_ppo": trl_ppo,
}


class Contender:
    """The parent's side of `Turns`."""

    def __init__(self, key: str, python: str):
        command = [python, __file__, "--contender", key]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        huge = "ours" in key or key.endswith("_huge")
        environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge else {})
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        self.ready = bool(self._process.stdout.readline())
        self._said.seek(0)
        self.why = "" if self.ready else (self._said.read().strip().splitlines() or ["it ended"])[-1]
        self.seconds: list[float] = []

    def turn(self) -> None:
        self._tell("go")
        self.seconds += json.loads(self._process.stdout.readline())["seconds"]

    def end(self) -> int:
        """Peak memory in bytes."""
        self._tell("end")
        peak = json.loads(self._process.stdout.readline())["peak"]
        self._process.wait()
        return peak

    def _tell(self, word: str) -> None:
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()


def compare(task: str, rounds: int, peer_python: str) -> dict[str, float]:
    keys = TASKS[task] | (MATMULS if task == "sft" else {})
    found = {name: Contender(key, sys.executable if "ours" in key else peer_python) for name, key in keys.items()}
    for name, contender in found.items():
        if not contender.ready:
            print(f"{task}: {name} is left out: {contender.why}", file=sys.stderr)
    found = {name: contender for name, contender in found.items() if contender.ready}
    for _ in range(rounds):
        for contender in found.values():
            time.sleep(0.5)  # the threads of the one before spin a while
            contender.turn()
    out = {}
    amount, _ = AMOUNTS[task]
    for name, contender in found.items():
        seconds = statistics.median(contender.seconds)
        peak = contender.end()
        if name in MATMULS:
            out[f"matmul/{name}/flop_per_s"] = 2 * MATMUL**3 / seconds
        else:
            out |= {f"{task}/{name}/per_s": amount / seconds, f"{task}/{name}/peak_bytes": peak}
    return out


def table(figures: dict[str, float]) -> list[str]:
    lines = [f"{'':10}{'':18}{'':>10}{'':12}{'lfjax x':>8}{'peak MB':>9}"]
    for task, keys in TASKS.items():
        for name in keys:
            if f"{task}/{name}/per_s" not in figures:
                continue
            rate, unit = figures[f"{task}/{name}/per_s"], AMOUNTS[task][1]
            ratio = figures.get(f"{task}/lfjax/per_s", float("nan")) / rate
            peak = figures[f"{task}/{name}/peak_bytes"] / 1e6
            lines.append(f"{task:10}{name:18}{rate:10.1f} {unit:11}{ratio:8.2f}{peak:9.0f}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch, transformers and TRL")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        CONTENDERS[arguments.contender](Turns())
        return
    from machine import machine
    from steps import Transformer, presets, sft_flops

    figures: dict[str, float] = {}
    for task in arguments.tasks:
        figures |= compare(task, arguments.rounds, arguments.peer_python)
    print(machine())
    print("\n".join(table(figures)))
    for name in MATMULS:
        if (rate := figures.get(f"matmul/{name}/flop_per_s")) is not None:
            print(f"float32 matmul of {name} in the same rounds: {rate / 1e9:.0f} GFLOP/s")
    if "sft/lfjax/per_s" in figures:
        step = figures["sft/lfjax/per_s"] / AMOUNTS["sft"][0] * sft_flops(Transformer(presets.gpt2_12m()))
        figures["sft/lfjax/flop_utilisation"] = step / figures["matmul/XLA/flop_per_s"]
        print(f"lfjax's SFT step: {figures['sft/lfjax/flop_utilisation']:.0%} of XLA's matmul")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
