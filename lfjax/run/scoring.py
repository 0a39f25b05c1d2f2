"""`lfjax eval`: how likely a language model finds a text, beside an n-gram, and given completions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lfjax import files
from lfjax.config import InputError
from lfjax.data.examples import prompt_tokens, response_tokens
from lfjax.data.windows import windows
from lfjax.interop.hf import Loaded
from lfjax.losses import lm
from lfjax.metrics import perplexity
from lfjax.records import Record
from lfjax.rewards.ngram import NGram
from lfjax.terminal import LONGEST_LINE, cell

SHORTEST = 32  # rows are padded to a power of two of at least so many targets, so that few widths are compiled
LONGEST = 2048  # tokens of a window, where the caller names none
FEW = 100  # tokens of a text below which its figures come with a word of caution
MOST_TEXT = 2**30  # bytes of a text to score
CHUNK = 64  # positions of a row whose logits exist at a time


def row_logprobs(loaded: Loaded, rows: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[np.ndarray]:
    """log p(token | those before it in its row), nats, of every token but a row's first: [len(row) - 1] float64 each.

    Args:
      rows: token lists of at most context + 1 tokens.
      batch_size: rows computed at a time, the longest first.
    """
    model: Any = loaded.model

    @jax.jit
    def logprobs(params, tokens):
        hidden = model.apply({"params": params}, tokens[:, :-1], method="hidden")  # padding is on the right: unseen
        return lm.chunked_token_stats(hidden, model.unembed(params), tokens[:, 1:], chunk_size=CHUNK).logprobs

    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        longest = len(rows[batch[0]]) - 1
        width = min(max(SHORTEST, 1 << (longest - 1).bit_length()), max(model.config.context, longest))
        tokens = np.zeros((batch_size, width + 1), np.int32)
        for place, index in enumerate(batch):
            tokens[place, : len(rows[index])] = rows[index]
        values = np.asarray(logprobs(loaded.params, tokens), np.float64)
        for place, index in enumerate(batch):
            found[index] = values[place, : len(rows[index]) - 1]
    return found


def score_text(
    loaded: Loaded,
    text: str,
    *,
    name: str,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    order: int = 3,
    train_text: str | None = None,
) -> dict[str, Any]:
    """Figures of a text as one document, under the model and under an n-gram over the same tokens.

    The text begins as the tokenizer begins a sequence, with BOS where it has one; BOS is no target, and no EOS is
    added. A text longer than the context is cut into windows that overlap (`lfjax.data.windows`), each begun the same
    way. Without BOS the first token is no target, and its bytes do not count.

    Args:
      name: of the text, for errors.
      context: most tokens that the model sees before a target; None is the model's own, or 2048 where that is more.
      stride: targets a window; None is half the context.
      order: of the n-gram.
      train_text: what the n-gram learns from; None: it learns each token of `text` right after predicting it.

    Returns:
      tokens and bytes (of the targets), nll (nats per token), perplexity, bits_per_byte, the same as ngram_*,
      context, stride and least_context (tokens of text before a target, where the text has as many).
    """
    start, body = _start_and_text(loaded, text)
    allowed = loaded.model.config.context
    width = min(allowed, LONGEST) if context is None else context
    if not 2 <= width <= allowed:
        raise InputError(f"--context: {width}; allowed: 2 to {allowed}, the model's context")
    step = max(1, width // 2) if stride is None else stride
    most = width - max(len(start) - 1, 0)
    if not 1 <= step <= most:
        raise InputError(f"--stride: {step}; allowed: 1 to {most} in windows of {width} tokens")
    cut = list(windows(start, body, context=width, stride=step))
    if not cut:
        raise InputError(f"{name}: {len(body)} token(s); nothing to score: give a longer text")
    found = row_logprobs(loaded, [window.tokens for window in cut], batch_size=batch_size)
    nats = -sum(float(values[-window.targets :].sum()) for values, window in zip(found, cut, strict=True))
    ngram = NGram(loaded.model.config.vocab_size, order=order)
    if train_text is not None:
        first, rest = _start_and_text(loaded, train_text)
        ngram.learn([*first, *rest], len(first) or 1)
    guesses = ngram.logprobs([*start, *body], len(start) or 1, learn=train_text is None)
    size = len(text.encode()) - (0 if start else len(loaded.tokenizer.decode(body[:1]).encode()))
    return {
        "tokens": len(guesses),
        "bytes": size,
        **_figures(nats, len(guesses), size),
        **{f"ngram_{key}": value for key, value in _figures(-float(guesses.sum()), len(guesses), size).items()},
        "ngram_order": order,
        "context": width,
        "stride": step,
        "least_context": width + 1 - len(start) - step,
    }


def text_table(figures: dict[str, Any]) -> str:
    """The figures of `score_text` with the names of model and files, as text to read."""
    f = figures
    text, model, learned_from = (cell(f[key] or "", LONGEST_LINE) for key in ("text", "model", "ngram_text"))
    learned = f"trained on {learned_from}" if f["ngram_text"] else "learning from this text as it reads it"
    rows = (("model", ""), (f"{f['ngram_order']}-gram", "ngram_"))
    columns = ("nll", "perplexity", "bits_per_byte")
    lines = [
        f"{text}: {f['tokens']} tokens, {f['bytes']} bytes, one document under {model}",
        f"windows of {f['context']} tokens; a target has {f['least_context']} before it, or all there are",
        f"n-gram: interpolated Kneser-Ney over the model's tokens, {learned}",
        f"{'':10s} {'nats/token':>12s} {'perplexity':>12s} {'bits/byte':>12s}",
        *(f"{name:10s} " + " ".join(f"{f[prefix + column]:12.4f}" for column in columns) for name, prefix in rows),
    ]
    return "\n".join(lines) + "\n"


def completions_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `score_completions` as text to read."""
    head = "log-probabilities in nats: of a response's text, and with the token that ends it"
    columns = ("tokens", "logprob", "logprob_mean", "tokens_with_eos", "logprob_with_eos", "logprob_mean_with_eos")
    names = ("tokens", "sum", "per token", "tokens+eos", "sum+eos", "per token")
    lines = [head, f"{'record':>12s} {'response':>8s} " + " ".join(f"{name:>11s}" for name in names)]
    for row in rows:
        cells = ("-" if row[c] is None else f"{row[c]:.4f}" if "logprob" in c else str(row[c]) for c in columns)
        lines.append(
            f"{cell(str(row.get('id', row['record']))):>12s} {row['response']:8d} "
            + " ".join(f"{c:>11s}" for c in cells)
        )
    return "\n".join(lines) + "\n"


def _start_and_text(loaded: Loaded, text: str) -> tuple[list[int], list[int]]:
    """(what the tokenizer begins a sequence with, the ids of the text)."""
    body = loaded.tokenizer.encode(text, first=True)
    whole = loaded.tokenizer.encode_prompt(text)
    return whole[: len(whole) - len(body)], body


def _figures(nats: float, tokens: int, size: int) -> dict[str, float]:
    mean = nats / tokens
    return {
        "nll": mean,
        "perplexity": perplexity(mean),
        "bits_per_byte": nats / math.log(2) / size if size else math.nan,
    }


def score_completions(loaded: Loaded, records: Sequence[Record], *, batch_size: int = 8) -> list[dict[str, Any]]:
    """Log-probabilities of every response given its prompt, in the records' order.

    Returns:
      One dict a response: record (index) and id (where the record has one), response (index); tokens, logprob (their
      sum, nats) and logprob_mean (per token, None for no token) of the response's text alone, and the same as
      *_with_eos, which count the token that ends the response as well.
    Raises:
      InputError: prompt and response are longer than the model's context; names the record.
    """
    rows, places = [], []
    most = loaded.model.config.context + 1
    for index, record in enumerate(records):
        prompt = prompt_tokens(record, loaded.tokenizer)
        for number, text in enumerate(record.responses):
            response = response_tokens(record, text, loaded.tokenizer)
            if len(prompt) + len(response) > most:
                raise InputError(
                    f"{record.where}: field 'responses[{number}]': prompt and response have"
                    f" {len(prompt) + len(response)} tokens; allowed: at most {most}, the model's context and the end;"
                    " shorten one of them"
                )
            rows.append([*prompt, *response])
            places.append((index, record.id, number, len(response)))
    scored = []
    for values, (index, name, number, length) in zip(
        row_logprobs(loaded, rows, batch_size=batch_size), places, strict=True
    ):
        values = values[len(values) - length :]
        row: dict[str, Any] = {"record": index} | ({} if name is None else {"id": name}) | {"response": number}
        for suffix, part in (("", values[:-1]), ("_with_eos", values)):
            row |= {f"tokens{suffix}": len(part), f"logprob{suffix}": float(part.sum())}
            row[f"logprob_mean{suffix}"] = float(part.mean()) if len(part) else None
        scored.append(row)
    return scored


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file; raises InputError naming the file, and the line that is not UTF-8."""
    text = files.read_text(path, most=MOST_TEXT, fix="give a text file in UTF-8")
    if not text:
        raise InputError(f"{path}: is empty; give a text to score")
    return text
