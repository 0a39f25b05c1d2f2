"""Language-model losses on token ids: log-probabilities, entropy and cross-entropy, whole or chunked.

Everything is in nats and float32. `targets` at padding may hold any integer: they are clipped into the vocabulary, and
the caller's mask drops the result.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

MASKED = -1e30  # logit of a column that is no token: its probability is exactly 0, and 0 * MASKED is 0, not NaN


class Unembed(NamedTuple):
    """How final hidden states become logits: softcap * tanh((hidden @ weight + bias) / softcap)."""

    weight: Float[Array, "D V"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = None
    vocab_size: int | None = None  # columns from here on are padding, no tokens; None: every column is a token


class TokenStats(NamedTuple):
    """What a loss needs to know of the distribution at each target position."""

    logprobs: Float[Array, "*B T"]  # of the target token
    entropy: Float[Array, "*B T"]  # of the whole distribution
    logsumexp: Float[Array, "*B T"]  # of the logits after temperature


def token_logprobs(logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"]) -> Float[Array, "*B T"]:
    """log softmax(logits)[target], in nats."""
    logits = logits.astype(jnp.float32)
    return _pick(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "*B T V"]) -> Float[Array, "*B T"]:
    """Entropy of softmax(logits), in nats."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def cross_entropy_losses(
    logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Float[Array, "*B T"]:
    """Next-token cross-entropy, -sum_v q_v log p_v + z_loss * logsumexp(logits)^2, per target.

    Args:
      logits: true vocabulary only (no padded columns).
      targets: token ids; any integer at padding.
      label_smoothing: q = (1 - label_smoothing) * onehot(target) + label_smoothing / V, in [0, 1).
      z_loss: weight of the squared log-partition, which keeps logits from drifting; 1e-4 is common.
    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = _pick(logits, targets)
    expected = (1.0 - label_smoothing) * target_logits + label_smoothing * jnp.mean(logits, axis=-1)
    return log_z - expected + z_loss * jnp.square(log_z)


def chunked_token_stats(
    hidden: Float[Array, "*B T D"],
    unembed: Unembed,
    targets: Int[Array, "*B T"],
    *,
    chunk_size: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenStats:
    """`TokenStats` of softmax(logits / temperature) without ever holding [B T V].

    T is cut into equal chunks of at most `chunk_size` positions of every row. The backward pass computes each chunk's
    logits again and applies their gradient at once, so that it costs one matmul by the vocabulary more than autodiff.
    What a loss does not use (entropy, say) costs nothing.

    Args:
      hidden: final hidden states. The matmul runs in their dtype and accumulates in float32.
      unembed: weight, bias, softcap and true vocabulary size.
      targets: token ids; any integer at padding.
      chunk_size: most positions of a row whose logits exist at a time.
      temperature: divides the logits (after the softcap). A constant, as softcap is: no gradient flows into them.
    Raises:
      ValueError: chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if isinstance(unembed.vocab_size, int) and unembed.vocab_size >= unembed.weight.shape[1]:
        unembed = unembed._replace(vocab_size=None)
    return _chunked(chunk_size, hidden, unembed, targets, jnp.float32(temperature))


def _pick(logits, targets):
    """logits[..., target], with targets clipped into range."""
    targets = jnp.clip(targets, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _raw_logits(hidden, weight):
    return jnp.einsum("...d,dv->...v", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _finish(logits, unembed, temperature):
    """hidden @ weight -> the logits the softmax sees: bias, softcap, temperature, padded columns."""
    _, bias, softcap, vocab_size = unembed
    if bias is not None:
        logits = logits + bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + bias.shape)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits / temperature
    if vocab_size is not None:
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(column < vocab_size, logits, MASKED)
    return logits


def _stats(logits, targets):
    top = jnp.max(logits, axis=-1)
    shifted = logits - top[..., None]
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    return TokenStats(
        logprobs=_pick(logits, targets) - top - log_total,
        entropy=log_total - jnp.sum(weights * shifted, axis=-1) / total,
        logsumexp=top + log_total,
    )


def _split(x, chunk_size, axis):
    """Cuts `axis` of `x` into the fewest equal chunks of at most chunk_size (zero padded), and leads with them."""
    length = x.shape[axis]
    chunks = max(1, -(-length // chunk_size))
    size = -(-length // chunks)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, chunks * size - length)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x, length, axis):
    """Undoes `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk_size, hidden, unembed, targets, temperature):
    axis = targets.ndim - 1

    def chunk(_, slices):
        h, y = slices
        return None, _stats(_finish(_raw_logits(h, unembed.weight), unembed, temperature), y)

    _, stats = jax.lax.scan(chunk, None, (_split(hidden, chunk_size, axis), _split(targets, chunk_size, axis)))
    return jax.tree.map(lambda x: _join(x, targets.shape[-1], axis), stats)


def _chunked_forward(chunk_size, *primals):
    hidden, unembed, targets, temperature = jax.tree.map(lambda primal: primal.value, primals)
    stats = _chunked(chunk_size, hidden, unembed, targets, temperature)
    return stats, (hidden, unembed, targets, temperature, stats)


def _chunked_backward(chunk_size, residuals, cotangents):
    hidden, unembed, targets, temperature, stats = residuals
    axis = targets.ndim - 1
    d_logprob, d_entropy, d_log_z = cotangents
    entropy = None if isinstance(d_entropy, SymbolicZero) else (stats.entropy, d_entropy)
    d_logprob, d_log_z = (jnp.zeros(d.shape) if isinstance(d, SymbolicZero) else d for d in (d_logprob, d_log_z))
    # XLA's CPU backend runs no product of half precision into float32 whose result is then transposed (a tied weight).
    exact = jnp.float32 if jax.default_backend() == "cpu" else hidden.dtype

    def chunk(totals, slices):
        h, y, log_z, entropy, d_logprob, d_log_z = slices
        # The two matmuls are written out: autodiff's would come out transposed, which is twice as slow on a CPU.
        logits, to_raw = jax.vjp(lambda raw: _finish(raw, unembed, temperature), _raw_logits(h, unembed.weight))
        logprobs = jnp.minimum(logits - log_z[..., None], 0.0)  # also where T is padded and log_z means nothing
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        hit = column == jnp.clip(y, 0, logits.shape[-1] - 1)[..., None]
        slope = (d_log_z - d_logprob)[..., None]
        if entropy is not None:
            value, d_entropy = (x[..., None] for x in entropy)
            slope = slope - d_entropy * (logprobs + value)
        (d_raw,) = to_raw(jnp.exp(logprobs) * slope + jnp.where(hit, d_logprob[..., None], 0.0))
        d_logits = d_raw.astype(h.dtype)
        operands = h.astype(exact), d_logits.astype(exact)
        d_weight = jnp.einsum("...d,...v->dv", *operands, preferred_element_type=jnp.float32)
        dh = jnp.einsum("...v,dv->...d", d_logits, unembed.weight.astype(h.dtype))
        d_bias = None if unembed.bias is None else jnp.sum(d_raw, axis=tuple(range(d_raw.ndim - 1)))
        return jax.tree.map(jnp.add, totals, (d_weight, d_bias)), dh

    arrays = (unembed.weight, unembed.bias)
    totals = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), arrays)
    slices = (hidden, targets, stats.logsumexp, entropy, d_logprob, d_log_z)
    totals, dh = jax.lax.scan(chunk, totals, jax.tree.map(lambda x: _split(x, chunk_size, axis), slices))
    d_weight, d_bias = jax.tree.map(lambda total, x: total.astype(x.dtype), totals, arrays)
    return _join(dh, targets.shape[-1], axis), Unembed(d_weight, d_bias), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)  # says which statistics a loss has used
