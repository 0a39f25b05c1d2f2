"""Models that write: prompts of records, sampled responses, and both as text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from lfjax.config import Config, InputError
from lfjax.data.batching import PromptBatches
from lfjax.data.examples import prompts_from_records
from lfjax.data.sources import Splits
from lfjax.models import lora
from lfjax.models.lora import LoRA
from lfjax.records import Record
from lfjax.run.devices import Devices
from lfjax.run.parts import compute_settings, trained_part
from lfjax.sharding import jit_step
from lfjax.tokenizers import Tokenizer, response_text, stop_ids
from lfjax.types import Generation, Rollout

# What of `config.sampling` a rollout takes as keywords.
KEYWORDS = ("max_new_tokens", "temperature", "min_new_tokens", "top_k", "top_p", "min_p")


class Policy:
    """A language model that writes: its parameters on the mesh and one rollout program a prompt length.

    With `adapters`, `params` are these and `base` the model; else `params` are the model and `base` is None.

    Args:
      loaded: as `lfjax.interop.hf.load` gives it, on the mesh.
      function: the rollout step; `options` are its keywords.
      name: of the program. settings: `config.model`.
      shapes: how many shapes prompts come in.
      purpose: of the key of fresh adapters.
    """

    def __init__(
        self, devices: Devices, loaded, function: Callable, *, name: str, settings: Config, shapes: int,
        adapters: LoRA | None = None, purpose: str = "", **options,
    ):  # fmt: skip
        self.model = devices.network(compute_settings(settings, loaded.model.config, dropout=0.0))
        self.params, self.base = trained_part(devices, adapters, loaded.params, self.model.config, purpose)

        def rollout(params, prompts, key, index, base):
            write = functools.partial(function, model=lora.bind(self.model, base, adapters), **options)
            return write(params, prompts, jax.random.fold_in(key, index))

        self._step = devices.program(
            (name, self.model.config, *sorted(options.items()), adapters),
            lambda: jit_step(rollout, name=name, shapes=shapes),
        )

    def rollout(self, params, prompts, key, index) -> Generation:
        """Responses to a batch of prompts; `index` is folded into the key."""
        return self._step(params, prompts, key, index, self.base)


def keywords(sampling: Config, function: Callable, own: Mapping[str, object]) -> dict[str, object]:
    """The values of `KEYWORDS` that the rollout step takes, but for those that are in its own section.

    Raises:
      InputError: one is on that the step does not know.
    """
    known, off = inspect.signature(function).parameters, {"min_new_tokens": 0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    everything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    found = {}
    for name in (name for name in KEYWORDS if name not in own):
        if name in known or everything:
            found[name] = sampling[name]
        elif sampling[name] != off.get(name, sampling[name]):
            raise InputError(f"config.sampling.{name}: {sampling[name]}; the rollout step takes no such keyword")
    return found


def longest(section: Config) -> tuple[str, int]:
    """(its keys, tokens) of the longest prompt with the longest response; `section` as of `prompts`."""
    tokens = max(section.prompt_buckets) + section.max_new_tokens
    return "sampling.prompt_buckets with sampling.max_new_tokens", tokens


def check_texts(section: Config, records: Splits, split: str, tokenizer: Tokenizer, too_long: str) -> None:
    """Prompts of a split fit the buckets, or one does, and what stops a response is a token each.

    How many do not is counted among the records' counts, which the table of the data shows.

    Raises:
      InputError: they do not, or it is not.
    """
    _, longer = fitting(section, records[split], tokenizer, too_long)
    if longer:
        records.counts[f"{split}/too_long"] = longer
    stop_ids(tokenizer, section.stop, "config.sampling.stop")


def fitting(
    section: Config, records: Sequence[Record], tokenizer: Tokenizer, too_long: str
) -> tuple[list[Record], int]:
    """(the records to write to, how many of the given ones have prompts that are longer than the largest bucket).

    Args:
      section: as of `prompts`.
      too_long: `config.data.too_long`: longer ones are left out ("skip"), stay ("cut"), or are an "error".
    Raises:
      InputError: a prompt is too long and that is an error, or all of them are and left out.
    """
    found = prompts_from_records(records, tokenizer, min_tokens=section.prompt_min, max_tokens=section.prompt_max)
    longer = [len(prompt) > max(section.prompt_buckets) for prompt in found]
    if any(longer) and (too_long == "error" or (too_long == "skip" and all(longer))):
        prompts(section, records, tokenizer)
    kept = records if too_long == "cut" else [r for r, is_longer in zip(records, longer, strict=True) if not is_longer]
    return list(kept), sum(longer)


def prompts(section: Config, records: Iterable[Record], tokenizer: Tokenizer, *, cut: bool = False) -> list[list[int]]:
    """One prompt a record.

    Args:
      section: prompt_min, prompt_max, prompt_buckets.
      cut: longer ones than the largest bucket lose their start, but for BOS.
    Raises:
      InputError: one is longer and is not cut.
    """
    return prompts_from_records(
        records,
        tokenizer,
        min_tokens=section.prompt_min,
        max_tokens=section.prompt_max,
        max_length=max(section.prompt_buckets),
        truncate=cut,
        remedy="raise config.sampling.prompt_buckets (with config.model.context), or see config.data.too_long",
    )


def prompt_batches(
    section: Config, records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, seed: int, cut: bool = False
) -> PromptBatches:
    """One prompt a record; a batch's rows are `indices_at(step)` into the records. Arguments as of `prompts`."""
    options = {"buckets": section.prompt_buckets, "seed": seed, "pad_id": tokenizer.pad_id}
    return PromptBatches(prompts(section, records, tokenizer, cut=cut), batch_size=batch_size, **options)


def texts(tokenizer: Tokenizer, generation: Generation | Rollout) -> tuple[list[str], list[str]]:
    """Prompts and responses of host arrays as text."""
    tokens = generation.tokens if isinstance(generation, Generation) else generation.responses
    found, responses = [], []
    rows = zip(generation.prompts, generation.prompt_mask, tokens, generation.mask, strict=True)
    for prompt, prompt_mask, response, mask in rows:
        prompt, response = prompt[prompt_mask].tolist(), response[mask].tolist()
        found.append(tokenizer.decode(prompt))
        responses.append(response_text(tokenizer, prompt, response))
    return found, responses
