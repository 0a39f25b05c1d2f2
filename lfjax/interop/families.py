"""Model families of the Hugging Face layout: one table each, read in both directions.

A family says which keys of config.json are which fields of TransformerConfig, and which tensor is which parameter.
Adding a family is adding a table to FAMILIES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from lfjax.config import InputError
from lfjax.interop.tensors import Tensor
from lfjax.models.transformer import TransformerConfig

REQUIRED = object()
LARGEST = {int: 2**31 - 1, float: 1e30}  # what 32 bits hold


class Field(NamedTuple):
    """One key of config.json: their name, our field, its type, what its absence (or null) means, renamed values.

    `default` is REQUIRED, a value, or a function of the fields read so far. `values` maps theirs to ours; the first
    of several with one meaning is written.
    """

    theirs: str
    ours: str
    kind: type
    default: Any = REQUIRED
    values: dict[str, str] | None = None


class Family(NamedTuple):
    """One architecture.

    Attributes:
      model_type: the key of config.json that names the family.
      base: prefix of the trunk's tensor names; files of the bare trunk leave it out.
      form: switches of TransformerConfig that are always so in this family.
      fields: keys of config.json <-> fields of TransformerConfig.
      only: keys that would change the maths -> the values that are computed here.
      constants: further keys written for a model trained from scratch.
      tensors: the trunk's tensors; a line acts where the model has its parameters.
      heads: task -> (architecture, the head's tensors).
      ignored: endings of tensor names that hold no parameter (buffers of old versions).
    """

    model_type: str
    base: str
    form: dict[str, Any]
    fields: tuple[Field, ...]
    only: dict[str, tuple]
    constants: dict[str, Any]
    tensors: tuple[Tensor, ...]
    heads: dict[str, tuple[str, tuple[Tensor, ...]]]
    ignored: tuple[str, ...] = ()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}

GPT2 = Family(
    model_type="gpt2",
    base="transformer.",
    form=dict(position="learned", norm="layernorm", gated=False, attention_bias=True, mlp_bias=True),
    fields=(
        Field("vocab_size", "vocab_size", int),
        Field("n_embd", "width", int),
        Field("n_layer", "layers", int),
        Field("n_head", "heads", int),
        Field("n_positions", "context", int),
        Field("n_inner", "mlp_width", int, lambda known: 4 * known["width"]),
        Field("layer_norm_epsilon", "norm_eps", float, 1e-5),
        Field("activation_function", "activation", str, "gelu_new", ACTIVATIONS),
        Field("tie_word_embeddings", "tied", bool, True),
        Field("initializer_range", "init_std", float, 0.02),
    ),
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    constants={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    tensors=(
        Tensor("transformer.wte.weight", "embed/tokens", "V D -> V D"),
        Tensor("transformer.wpe.weight", "embed/positions", "S D -> S D"),
        Tensor("transformer.h.{i}.ln_1.weight", "layers/norm1/scale", "D -> D"),
        Tensor("transformer.h.{i}.ln_1.bias", "layers/norm1/bias", "D -> D"),
        Tensor(
            "transformer.h.{i}.attn.c_attn.weight",
            "layers/attention/q layers/attention/k layers/attention/v",
            "D (J N H) -> J D N H",
        ),
        Tensor(
            "transformer.h.{i}.attn.c_attn.bias",
            "layers/attention/q_bias layers/attention/k_bias layers/attention/v_bias",
            "(J N H) -> J N H",
        ),
        Tensor("transformer.h.{i}.attn.c_proj.weight", "layers/attention/o", "(N H) D -> N H D"),
        Tensor("transformer.h.{i}.attn.c_proj.bias", "layers/attention/o_bias", "D -> D"),
        Tensor("transformer.h.{i}.ln_2.weight", "layers/norm2/scale", "D -> D"),
        Tensor("transformer.h.{i}.ln_2.bias", "layers/norm2/bias", "D -> D"),
        Tensor("transformer.h.{i}.mlp.c_fc.weight", "layers/mlp/up", "D F -> D F"),
        Tensor("transformer.h.{i}.mlp.c_fc.bias", "layers/mlp/up_bias", "F -> F"),
        Tensor("transformer.h.{i}.mlp.c_proj.weight", "layers/mlp/down", "F D -> F D"),
        Tensor("transformer.h.{i}.mlp.c_proj.bias", "layers/mlp/down_bias", "D -> D"),
        Tensor("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
        Tensor("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
    ),
    heads={
        "lm": ("GPT2LMHeadModel", (Tensor("lm_head.weight", "unembed/kernel", "V D -> D V"),)),
        "sequence": ("GPT2ForSequenceClassification", (Tensor("score.weight", "head/kernel", "C D -> D C"),)),
        "token": (
            "GPT2ForTokenClassification",
            (
                Tensor("classifier.weight", "head/kernel", "C D -> D C"),
                Tensor("classifier.bias", "head/bias", "C -> C"),
            ),
        ),
    },
    ignored=(".attn.bias", ".attn.masked_bias"),
)

LLAMA = Family(
    model_type="llama",
    base="model.",
    form=dict(position="rope", norm="rmsnorm", gated=True),
    fields=(
        Field("vocab_size", "vocab_size", int),
        Field("hidden_size", "width", int),
        Field("intermediate_size", "mlp_width", int),
        Field("num_hidden_layers", "layers", int),
        Field("num_attention_heads", "heads", int),
        Field("num_key_value_heads", "kv_heads", int, lambda known: known["heads"]),
        Field("head_dim", "head_dim", int, lambda known: known["width"] // known["heads"]),
        Field("max_position_embeddings", "context", int, 2048),
        Field("rms_norm_eps", "norm_eps", float, 1e-6),
        Field("hidden_act", "activation", str, "silu", ACTIVATIONS),
        Field("attention_bias", "attention_bias", bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
        Field("tie_word_embeddings", "tied", bool, False),
        Field("initializer_range", "init_std", float, 0.02),
    ),
    only={},
    constants={"attention_dropout": 0.0},
    tensors=(
        Tensor("model.embed_tokens.weight", "embed/tokens", "V D -> V D"),
        Tensor("model.layers.{i}.input_layernorm.weight", "layers/norm1/scale", "D -> D"),
        Tensor("model.layers.{i}.self_attn.q_proj.weight", "layers/attention/q", "(N H) D -> D N H"),
        Tensor("model.layers.{i}.self_attn.k_proj.weight", "layers/attention/k", "(K H) D -> D K H"),
        Tensor("model.layers.{i}.self_attn.v_proj.weight", "layers/attention/v", "(K H) D -> D K H"),
        Tensor("model.layers.{i}.self_attn.o_proj.weight", "layers/attention/o", "D (N H) -> N H D"),
        Tensor("model.layers.{i}.self_attn.q_proj.bias", "layers/attention/q_bias", "(N H) -> N H"),
        Tensor("model.layers.{i}.self_attn.k_proj.bias", "layers/attention/k_bias", "(K H) -> K H"),
        Tensor("model.layers.{i}.self_attn.v_proj.bias", "layers/attention/v_bias", "(K H) -> K H"),
        Tensor("model.layers.{i}.self_attn.o_proj.bias", "layers/attention/o_bias", "D -> D"),
        Tensor("model.layers.{i}.post_attention_layernorm.weight", "layers/norm2/scale", "D -> D"),
        Tensor("model.layers.{i}.mlp.up_proj.weight", "layers/mlp/up", "F D -> D F"),
        Tensor("model.layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate", "F D -> D F"),
        Tensor("model.layers.{i}.mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
        Tensor("model.layers.{i}.mlp.up_proj.bias", "layers/mlp/up_bias", "F -> F"),
        Tensor("model.layers.{i}.mlp.gate_proj.bias", "layers/mlp/gate_bias", "F -> F"),
        Tensor("model.layers.{i}.mlp.down_proj.bias", "layers/mlp/down_bias", "D -> D"),
        Tensor("model.norm.weight", "final_norm/scale", "D -> D"),
    ),
    heads={
        "lm": ("LlamaForCausalLM", (Tensor("lm_head.weight", "unembed/kernel", "V D -> D V"),)),
        "sequence": ("LlamaForSequenceClassification", (Tensor("score.weight", "head/kernel", "C D -> D C"),)),
        "token": (
            "LlamaForTokenClassification",
            (Tensor("score.weight", "head/kernel", "C D -> D C"), Tensor("score.bias", "head/bias", "C -> C")),
        ),
    },
    ignored=(".rotary_emb.inv_freq",),
)

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA)}

# What an execution chooses; the rest of TransformerConfig says what the model computes.
EXECUTION = ("dtype", "remat", "unroll", "dropout", "vocab_multiple")


def family_of(config: dict, where: str) -> Family:
    """The table for a config.json; `where` names the file in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{where}: field 'model_type': found {model_type!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def read_config(config: dict, where: str, task: str | None = None) -> TransformerConfig:
    """config.json -> the model's switches; raises InputError naming the key that is missing, wrong or not computed.

    Args:
      config: config.json of a known family.
      where: the file, for errors.
      task: "lm", "sequence" or "token"; None takes it from `architectures`.
    """
    family = family_of(config, where)
    for key, allowed in family.only.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{where}: field {key!r}: found {config[key]!r}; only {allowed[0]!r} is computed here")
    known: dict[str, Any] = {}
    for field in family.fields:
        known[field.ours] = _read_field(config, field, known, where)
    known.setdefault("kv_heads", known["heads"])
    known.setdefault("head_dim", known["width"] // known["heads"])
    _check_heads(config, family, known, where)
    if family.form["position"] == "rope":
        known["rope_theta"] = _read_rope(config, where)
    task = task or _task_of(config, family, where)
    if task != "lm":
        known |= {"num_labels": _num_labels(config, where), "head_bias": task == "token"}
    try:
        return TransformerConfig(**family.form, **known)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read_field(config: dict, field: Field, known: dict, where: str) -> Any:
    value = config.get(field.theirs)
    if value is None:
        if field.default is REQUIRED:
            raise InputError(f"{where}: field {field.theirs!r}: missing; {field.kind.__name__} is needed")
        value = field.default(known) if isinstance(field.default, Callable) else field.default
    number = (int, float) if field.kind is float else field.kind
    right = isinstance(value, number) and (field.kind is bool or not isinstance(value, bool))
    if not right or (field.kind in LARGEST and not 0 < value <= LARGEST[field.kind]):
        kind = {
            int: "a positive integer below 2^31",
            float: "a positive number",
            bool: "true or false",
            str: "a string",
        }
        raise InputError(f"{where}: field {field.theirs!r}: found {value!r}; must be {kind[field.kind]}")
    if field.values is not None and value not in field.values:
        raise InputError(f"{where}: field {field.theirs!r}: found {value!r}; known are {', '.join(field.values)}")
    return field.values[str(value)] if field.values is not None else field.kind(value)


def _check_heads(config: dict, family: Family, known: dict, where: str) -> None:
    theirs = {field.ours: field.theirs for field in family.fields}
    if known["heads"] % known["kv_heads"]:
        raise InputError(
            f"{where}: field {theirs['kv_heads']!r}: found {known['kv_heads']}; must divide"
            f" {theirs['heads']} {known['heads']}"
        )
    if config.get("head_dim") is None and known["width"] % known["heads"]:
        raise InputError(
            f"{where}: field {theirs['heads']!r}: found {known['heads']}; must divide"
            f" {theirs['width']} {known['width']}"
        )


def _read_rope(config: dict, where: str) -> float:
    """The base of the rotary angles, from `rope_parameters` or from `rope_theta` and `rope_scaling` (older files)."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: field {key!r}: found {rope!r}; must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{where}: field '{key}.rope_type': found {kind!r}; only 'default' is computed here")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{where}: field 'partial_rotary_factor': only 1.0 is computed here")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta <= LARGEST[float]:
        raise InputError(f"{where}: field 'rope_theta': found {theta!r}; must be a positive number")
    return float(theta)


def _task_of(config: dict, family: Family, where: str) -> str:
    architectures = config.get("architectures")
    tasks = {architecture: task for task, (architecture, _) in family.heads.items()}
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(found, str) or found not in tasks:
        raise InputError(
            f"{where}: field 'architectures': found {found!r}; known are {', '.join(tasks)} (or give task=)"
        )
    return tasks[found]


def _num_labels(config: dict, where: str) -> int:
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # 2 is the layout's default
    if type(count) is not int or not 0 < count <= LARGEST[int]:
        raise InputError(f"{where}: field 'num_labels': found {count!r}; must be a positive integer")
    return count


def task_of(config: TransformerConfig) -> str:
    """The kind of head: "lm", "sequence" (one answer a row, no bias) or "token" (one a position, with a bias)."""
    if config.num_labels == 0:
        return "lm"
    return "token" if config.head_bias else "sequence"


def same_function(a: TransformerConfig, b: TransformerConfig) -> bool:
    """Whether two configs describe the same parameters and the same function of them."""
    return _function(a) == _function(b)


def _function(config: TransformerConfig) -> TransformerConfig:
    """`config` with everything neutral that its function does not depend on."""
    neutral = {f.name: f.default for f in dataclasses.fields(config) if f.name in EXECUTION}
    neutral["init_std"] = 0.02
    if config.position != "rope":
        neutral["rope_theta"] = 10000.0
    if config.num_labels:
        neutral["tied"] = True
    else:
        neutral["head_bias"] = False
    return dataclasses.replace(config, **neutral)


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The model's switches -> config.json of the first family that can express them.

    Raises:
      InputError: no family can; names the switches of each that differ.
    """
    refused = []
    for family in FAMILIES.values():
        written = _write_family(config, family)
        try:
            back = read_config(written, "config.json")
        except InputError as error:
            refused.append(f"{family.model_type}: {error}")
            continue
        if same_function(back, config):
            return written
        ours, theirs = dataclasses.asdict(_function(config)), dataclasses.asdict(_function(back))
        differing = [f"{key}={ours[key]!r}" for key in ours if ours[key] != theirs[key]]
        refused.append(f"{family.model_type} cannot have {', '.join(differing)}")
    raise InputError(f"no family of the Hugging Face layout has this form: {'; '.join(refused)}")


def _write_family(config: TransformerConfig, family: Family) -> dict[str, Any]:
    task = task_of(config)
    written: dict[str, Any] = {"architectures": [family.heads[task][0]], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(config, field.ours)
        if field.values is not None:
            value = next((theirs for theirs, ours in field.values.items() if ours == value), value)
        written[field.theirs] = value
    if family.form["position"] == "rope":
        written["rope_theta"] = config.rope_theta
        written["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if task != "lm":
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return written | family.constants
