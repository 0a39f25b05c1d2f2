"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, beside the model they were
merged into.

Module names and the orientation of their weights come from the tables of `lfjax.interop.families`. Where theirs is one
matrix for several of ours (GPT-2's c_attn is q, k and v), the adapters stand side by side in one of that many times
the rank, whose scale `rank_pattern` and `alpha_pattern` keep.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from lfjax.interop.families import family_of, input_output_axes, task_of
from lfjax.interop.tensors import Tensor
from lfjax.models.lora import LoRA
from lfjax.models.transformer import TransformerConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
PREFIX = "base_model.model."


class Adapter(NamedTuple):
    """What an adapter folder holds."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]  # float32


def export(config: TransformerConfig, described: dict, trained, lora: LoRA, base: str) -> Adapter:
    """What was trained of a model, in PEFT's format.

    Args:
      config: of the model. described: its config.json.
      trained: host arrays, {"lora": adapters} and a model of scores' "head".
      base: name or folder of the model that it was trained from.
    """
    family, task = family_of(described, "config.json"), task_of(config)
    flat: dict[str, Any] = dict(flatten_dict(trained["lora"], sep="/"))
    table: dict[str, Any] = dict(flatten_dict(config.parameters(), sep="/"))
    tensors, ranks, transposed, modules = {}, {}, False, []
    for tensor in family.tensors:
        pairs = [(flat[f"{path}/a"], flat[f"{path}/b"]) if f"{path}/a" in flat else None for path in tensor.ours]
        count = sum(pair is not None for pair in pairs)
        if count == 0:
            continue
        shape, _ = table[tensor.ours[0]]
        sizes = tensor.sizes(shape[1:], config.vocab_size)
        module = tensor.name.removesuffix(".weight")
        short = ".".join(module.split(".")[-2:])  # "c_proj" alone would be two matrices of a GPT-2 layer
        modules.append(short)
        if count > 1:
            ranks[short] = count * lora.rank
        for i in range(config.layers):
            of_layer = [pair and (pair[0][i], pair[1][i]) for pair in pairs]
            a, b, transposed = _side_by_side(tensor, sizes, of_layer)
            tensors[f"{PREFIX}{module.format(i=i)}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module.format(i=i)}.lora_B.weight"] = b
    saved = []
    for tensor in family.heads[task][1] if "head" in trained else ():
        (path,) = tensor.ours
        head = np.asarray(trained["head"][path.split("/")[1]], np.float32)
        tensors[PREFIX + tensor.name] = tensor.to_theirs([head], tensor.sizes(head.shape, config.vocab_size))
        saved.append(tensor.name.split(".")[0])
    power = 0.5 if lora.rslora else 1.0  # the scale is alpha / rank ** power
    alphas = {name: _number(lora.alpha * (rank / lora.rank) ** power) for name, rank in ranks.items()}
    return Adapter(
        {
            "peft_type": "LORA",
            "task_type": TASKS[task],
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": _number(lora.alpha),
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "target_modules": sorted(modules),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "fan_in_fan_out": transposed,
            "modules_to_save": sorted(set(saved)) or None,
            "bias": "none",
            "inference_mode": True,
        },
        tensors,
    )


def _side_by_side(tensor: Tensor, sizes: dict[str, int], pairs) -> tuple[np.ndarray, np.ndarray, bool]:
    """One layer's lora_A [R D_in] and lora_B [D_out R] of their matrix, and whether that is stored [D_in D_out].

    Args:
      sizes: of the axes of the matrix.
      pairs: for each of our matrices (a [D_in r], b [r D_out]), or None.
    """
    ins, outs, transposed = input_output_axes(tensor)
    axes = ins + outs
    given = [a for a, _ in filter(None, pairs)]
    rank = sum(a.shape[1] for a in given)

    def at_rank(replaced: list[str], **others: int) -> dict[str, int]:
        """The sizes of a matrix that has the rank in place of its input or its output axes."""
        return sizes | dict.fromkeys(replaced, 1) | {replaced[0]: rank} | others

    a_sizes, b_sizes = at_rank(outs, J=1), at_rank(ins)
    a = tensor.to_theirs([np.concatenate(given, 1).reshape([a_sizes[x] for x in axes])], a_sizes)
    blocks, row = [], 0
    for pair in pairs:
        block = np.zeros((rank, math.prod(sizes[x] for x in outs)), np.float32)
        if pair is not None:
            block[row : row + len(pair[1])] = pair[1]
            row += len(pair[1])
        blocks.append(block.reshape([b_sizes[x] for x in axes]))
    b = tensor.to_theirs(blocks, b_sizes)
    return (a.T.copy(), b.T.copy(), True) if transposed else (a, b, False)


def _number(x: float) -> int | float:
    """A whole number as an int: some readers take no other."""
    return int(x) if float(x).is_integer() else x
