"""Where an SFT step's time goes: its parts alone, beside torch's, at the shapes of `steps.py`'s 12 M-parameter form.

    python benchmarks/parts.py [--repeats=15] [--json=FILE]

A part is one compiled program (of torch: the same in eager mode), forward and backward, run alone and multiplied by how
often a step has it. The parts' sum is not the step: XLA fuses some parts with their neighbours, others wait for memory
that their neighbours have just used. "the whole step" is measured; "the rest" is what is left of it: residual sums,
biases, copies between layouts, less what fusing saves. Rates are of the products' two FLOPs a multiply-add (causal
attention counts half), or of the bytes that must be read and written at least once. Where torch is not installed, its
column is left out. The two libraries run in processes of their own, one after the other.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

ROWS, LENGTH, WIDTH, LAYERS, HEADS, VOCABULARY = 16, 256, 384, 6, 6, 4096
TOKENS, INNER, HEAD = ROWS * LENGTH, 4 * WIDTH, WIDTH // HEADS
SIZE = 4  # bytes of a float32
WEIGHTS = VOCABULARY * WIDTH + LAYERS * 12 * WIDTH**2

# part -> (how often, FLOPs of one, bytes of one), of forward and backward
PARTS = {
    "products of width 384 by 384": (4 * LAYERS, 6 * TOKENS * WIDTH**2, 0),
    "products of the feed-forward": (2 * LAYERS, 6 * TOKENS * WIDTH * INNER, 0),
    "attention over 256 keys": (LAYERS, 6 * ROWS * HEADS * LENGTH**2 * HEAD, 0),
    "heads apart and together": (4 * LAYERS, 0, 4 * TOKENS * WIDTH * SIZE),
    "LayerNorm": (2 * LAYERS + 1, 0, 5 * TOKENS * WIDTH * SIZE),
    "GELU": (LAYERS, 0, 5 * TOKENS * INNER * SIZE),
    "head and cross-entropy": (1, 6 * TOKENS * WIDTH * VOCABULARY, 0),
    "embedding": (1, 0, (2 * TOKENS + VOCABULARY) * WIDTH * SIZE),
    "clipping and AdamW": (1, 0, 8 * WEIGHTS * SIZE),
}
WHOLE = "the whole step"


def seconds(function, repeats: int, wait=lambda x: x) -> float:
    """The median of `repeats` runs, after three that are not counted."""
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        wait(function())
        times.append(time.perf_counter() - started)
    return sorted(times[3:])[repeats // 2]


def of_lfjax():
    """Yields (part, a function that runs it once)."""
    import jax
    import jax.numpy as jnp
    import steps

    from lfjax.cli import huge_pages
    from lfjax.losses import lm
    from lfjax.models import attention, blocks, presets
    from lfjax.models.transformer import Transformer
    from lfjax.optim import make_optimizer
    from lfjax.state import LMState

    huge_pages()  # as the lfjax command does
    normal = functools.partial(jax.random.normal, jax.random.key(0))

    def both(function, *arrays):
        """Forward and backward with a cotangent that is not constant."""
        out = jax.eval_shape(function, *arrays)
        cotangent = normal(out.shape)

        @jax.jit
        def run(cotangent, *arrays):
            value, back = jax.vjp(function, *arrays)
            return value, back(cotangent)

        return lambda: jax.block_until_ready(run(cotangent, *arrays))

    x, inner = normal((ROWS, LENGTH, WIDTH)), normal((ROWS, LENGTH, INNER))
    square, up, down = normal((WIDTH, WIDTH)), normal((WIDTH, INNER)), normal((INNER, WIDTH))
    heads = normal((ROWS, HEADS, LENGTH, HEAD))
    yield "products of width 384 by 384", both(blocks.matmul, x, square)
    ups, downs = both(blocks.matmul, x, up), both(blocks.matmul, inner, down)
    yield "products of the feed-forward", lambda: (ups(), downs()), 2
    yield "attention over 256 keys", both(attention.attend, heads, heads, heads)
    apart = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    yield "heads apart and together", both(apart, x.reshape(ROWS, LENGTH, HEADS, HEAD))
    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    yield "LayerNorm", both(lambda x, p: blocks.normalise(x, p, "layernorm", 1e-5), x, norm)
    yield "GELU", both(blocks.ACTIVATIONS["gelu_tanh"], inner)
    targets = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY)

    def loss(x, weight):
        return lm.chunked_token_stats(x, lm.Unembed(weight.T), targets, chunk_size=64).logprobs

    table = normal((VOCABULARY, WIDTH))
    yield "head and cross-entropy", both(loss, x, table)
    yield "embedding", both(lambda table: jnp.take(table, targets, axis=0, mode="clip"), table)
    model = Transformer(presets.gpt2_12m())
    params, tx = steps.parameters(model), make_optimizer(1e-4, clip_norm=1.0)
    update = jax.jit(lambda state, grads: state.apply_gradients(grads, tx, loss=jnp.float32(1.0)), donate_argnums=0)
    state, grads = LMState.create(jax.tree.map(jnp.copy, params), tx), jax.tree.map(jnp.ones_like, params)

    def learn():
        nonlocal state
        state = jax.block_until_ready(update(state, grads))

    yield "clipping and AdamW", learn
    whole = steps.sft_run(model, params)
    yield WHOLE, lambda: jax.block_until_ready(whole())


def of_torch():
    """As `of_lfjax`."""
    import peers
    import torch
    from torch.nn import functional

    def both(function, *arrays):
        arrays = [x.detach().requires_grad_() for x in arrays]
        cotangent = torch.randn_like(function(*arrays))

        def run():
            torch.autograd.grad(function(*arrays), arrays, cotangent)

        return run

    x, inner = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, INNER)
    square, up, down = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, INNER), torch.randn(INNER, WIDTH)
    heads = torch.randn(ROWS, HEADS, LENGTH, HEAD)
    yield "products of width 384 by 384", both(torch.matmul, x, square)
    ups, downs = both(torch.matmul, x, up), both(torch.matmul, inner, down)
    yield "products of the feed-forward", lambda: (ups(), downs()), 2
    attend = functools.partial(functional.scaled_dot_product_attention, is_causal=True)
    yield "attention over 256 keys", both(attend, heads, heads.clone(), heads.clone())

    def apart(x):
        return x.transpose(1, 2).contiguous()

    yield "heads apart and together", both(apart, x.reshape(ROWS, LENGTH, HEADS, HEAD))
    norm = torch.ones(WIDTH), torch.zeros(WIDTH)
    yield "LayerNorm", both(lambda x, *p: functional.layer_norm(x, (WIDTH,), *p), x, *norm)
    yield "GELU", both(functools.partial(functional.gelu, approximate="tanh"), inner)
    targets, table = torch.randint(VOCABULARY, (TOKENS,)), torch.randn(VOCABULARY, WIDTH)

    def loss(x, table):
        return functional.cross_entropy(x @ table.T, targets, reduction="none")

    yield "head and cross-entropy", both(loss, x, table)
    yield "embedding", both(lambda table: functional.embedding(targets, table), table)
    model = peers.gpt2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def learn():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    yield "clipping and AdamW", learn
    tokens = torch.randint(2, VOCABULARY, (ROWS, LENGTH))

    def whole():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        learn()

    yield WHOLE, whole


def measured(library: str, repeats: int) -> dict[str, float]:
    """Part -> milliseconds in a step, measured in a process of its own; {} where torch is not installed."""
    command = [sys.executable, __file__, f"--child={library}", f"--repeats={repeats}"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {}


def child(library: str, repeats: int) -> None:
    found = {}
    for part, run, *pieces in {"lfjax": of_lfjax, "torch": of_torch}[library]():
        times = PARTS.get(part, (1,))[0] / (pieces[0] if pieces else 1)
        found[part] = 1e3 * times * seconds(run, repeats)
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.repeats)
    from machine import machine

    print(machine(), flush=True)
    found = {library: measured(library, arguments.repeats) for library in ("lfjax", "torch")}
    ours, theirs = found["lfjax"], found["torch"]
    for times in filter(None, (ours, theirs)):
        times["the rest"] = times[WHOLE] - sum(times[part] for part in PARTS)
    print(f"{'part':32s} {'lfjax ms':>9s} {'share':>6s} {'rate':>12s} {'torch ms':>9s} {'rate':>12s}")
    for part in [*PARTS, "the rest", WHOLE]:
        times, flops, size = PARTS.get(part, (1, 0, 0))

        def shown(milliseconds, flops=times * flops, size=times * size):
            rate = (flops or size) / milliseconds / 1e6
            return (
                f"{milliseconds:9.1f}",
                f"{rate:7.0f} GFLOP/s" if flops else f"{rate:7.1f} GB/s   " if size else " " * 15,
            )

        milliseconds, rate = shown(ours[part])
        share = f"{ours[part] / ours[WHOLE]:6.0%}"
        print(f"{part:32s} {milliseconds} {share} {rate}", *(shown(theirs[part]) if theirs else ()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
