"""Model families of the Hugging Face layout: one table each, read in both directions.

A family says which keys of config.json are which fields of our config, and which tensor is which parameter.
Adding a family is adding a table to KNOWN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from lfjax.config import InputError
from lfjax.interop.tensors import Tensor
from lfjax.models.encoder import EncoderConfig
from lfjax.models.lstm import LSTMConfig
from lfjax.models.transformer import TransformerConfig

Form = TransformerConfig | EncoderConfig | LSTMConfig  # of any model here

REQUIRED = object()
AS_ABSENT = object()
LARGEST = {int: 2**31 - 1, float: 1e30}  # what 32 bits hold


class Field(NamedTuple):
    """One key of config.json: their name, our field, its type, what its absence and null mean, renamed values.

    `default` and `null` are a value or a function of the fields read so far; `default` may be REQUIRED, `null`
    AS_ABSENT. A value that null means is written as null. `values` maps theirs to ours; the first of several with one
    meaning is written.
    """

    theirs: str
    ours: str
    kind: type
    default: Any = REQUIRED
    values: dict[str, str] | None = None
    null: Any = AS_ABSENT


class Rope(NamedTuple):
    """Keys of config.json for rotary positions, where they stand outside `rope_parameters`.

    `share` is the key of the rotated share of a head (0.25 where absent; "": all is rotated), `local` that of the
    base in layers with a window ("": that of all layers); then `rope_parameters` holds one object a type of layer.
    """

    theta: str = "rope_theta"
    default: float = 10000.0
    share: str = ""
    local: str = ""


class Family(NamedTuple):
    """One architecture.

    Attributes:
      model_type: the key of config.json that names the family.
      base: prefix of the trunk's tensor names; files of the bare trunk leave it out.
      form: switches of our config that are always so in this family.
      fields: keys of config.json <-> fields of our config.
      only: keys that would change the maths -> the values that are computed here.
      constants: further keys written for a model trained from scratch.
      tensors: the trunk's tensors; a line acts where the model has its parameters.
      heads: task -> (architecture, the head's tensors). An encoder has no "lm" but "trunk": files without labels.
      window: which layers see a window of `sliding_window` keys: "" none, "all" (where it is not null), "switched"
        those of `layer_types`, or from `max_window_layers` on, where `use_sliding_window` is true; a number n: those
        of `layer_types`, or all but each n-th.
      rope: the keys of rotary positions.
      ignored: endings of tensor names that hold no parameter (buffers of old versions), or those of unused heads.
      kind: of our config.
      trunks: further architectures of which the trunk is read.
      renamed: endings of tensor names -> what old files call them.
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
    window: str | int = ""
    rope: Rope = Rope()
    kind: type[TransformerConfig] | type[EncoderConfig] | type[LSTMConfig] = TransformerConfig
    trunks: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}

# Heads that several families have under one name.
SCORE = (Tensor("score.weight", "head/kernel", "C D -> D C"),)
CLASSIFIER = (
    Tensor("classifier.weight", "head/kernel", "C D -> D C"),
    Tensor("classifier.bias", "head/bias", "C -> C"),
)

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
        "sequence": ("GPT2ForSequenceClassification", SCORE),
        "token": (
            "GPT2ForTokenClassification",
            CLASSIFIER,
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
        "sequence": ("LlamaForSequenceClassification", SCORE),
        "token": (
            "LlamaForTokenClassification",
            (*SCORE, Tensor("score.bias", "head/bias", "C -> C")),
        ),
    },
    ignored=(".rotary_emb.inv_freq",),
)


GPT_NEOX = Family(
    model_type="gpt_neox",
    base="gpt_neox.",
    form=dict(position="rope", norm="layernorm", gated=False, mlp_bias=True),
    fields=(
        Field("vocab_size", "vocab_size", int),
        Field("hidden_size", "width", int),
        Field("intermediate_size", "mlp_width", int),
        Field("num_hidden_layers", "layers", int),
        Field("num_attention_heads", "heads", int),
        Field("max_position_embeddings", "context", int, 2048),
        Field("layer_norm_eps", "norm_eps", float, 1e-5),
        Field("hidden_act", "activation", str, "gelu", ACTIVATIONS),
        Field("attention_bias", "attention_bias", bool, True),
        Field("use_parallel_residual", "parallel", bool, True),
        Field("tie_word_embeddings", "tied", bool, False),
        Field("initializer_range", "init_std", float, 0.02),
    ),
    only={},
    constants={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    tensors=(
        Tensor("gpt_neox.embed_in.weight", "embed/tokens", "V D -> V D"),
        Tensor("gpt_neox.layers.{i}.input_layernorm.weight", "layers/norm1/scale", "D -> D"),
        Tensor("gpt_neox.layers.{i}.input_layernorm.bias", "layers/norm1/bias", "D -> D"),
        Tensor(
            "gpt_neox.layers.{i}.attention.query_key_value.weight",
            "layers/attention/q layers/attention/k layers/attention/v",
            "(N J H) D -> J D N H",
        ),
        Tensor(
            "gpt_neox.layers.{i}.attention.query_key_value.bias",
            "layers/attention/q_bias layers/attention/k_bias layers/attention/v_bias",
            "(N J H) -> J N H",
        ),
        Tensor("gpt_neox.layers.{i}.attention.dense.weight", "layers/attention/o", "D (N H) -> N H D"),
        Tensor("gpt_neox.layers.{i}.attention.dense.bias", "layers/attention/o_bias", "D -> D"),
        Tensor("gpt_neox.layers.{i}.post_attention_layernorm.weight", "layers/norm2/scale", "D -> D"),
        Tensor("gpt_neox.layers.{i}.post_attention_layernorm.bias", "layers/norm2/bias", "D -> D"),
        Tensor("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", "layers/mlp/up", "F D -> D F"),
        Tensor("gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias", "layers/mlp/up_bias", "F -> F"),
        Tensor("gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", "layers/mlp/down", "D F -> F D"),
        Tensor("gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias", "layers/mlp/down_bias", "D -> D"),
        Tensor("gpt_neox.final_layer_norm.weight", "final_norm/scale", "D -> D"),
        Tensor("gpt_neox.final_layer_norm.bias", "final_norm/bias", "D -> D"),
    ),
    heads={
        "lm": ("GPTNeoXForCausalLM", (Tensor("embed_out.weight", "unembed/kernel", "V D -> D V"),)),
        "sequence": ("GPTNeoXForSequenceClassification", SCORE),
        "token": (
            "GPTNeoXForTokenClassification",
            CLASSIFIER,
        ),
    },
    ignored=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    rope=Rope(theta="rotary_emb_base", share="rotary_pct"),
)


def _like(base: Family, model_type: str, prefix: str, *fields: Field, without=(), form=None, **changes) -> Family:
    """`base` with these fields, those `without`, and other changes; its classes are called `prefix`..."""
    old = base.heads["lm"][0].removesuffix("ForCausalLM")
    heads = {task: (prefix + name.removeprefix(old), tensors) for task, (name, tensors) in base.heads.items()}
    table = {field.ours: field for field in base.fields if field.ours not in without}
    table |= {field.ours: field for field in fields}
    changes = {"heads": heads} | changes
    return base._replace(model_type=model_type, fields=tuple(table.values()), form=base.form | (form or {}), **changes)


def _kv_heads(absent: int, null: Any = lambda known: known["heads"]) -> Field:
    return Field("num_key_value_heads", "kv_heads", int, absent, null=null)


def _context(absent: int) -> Field:
    return Field("max_position_embeddings", "context", int, absent)


QK_NORMS = (
    Tensor("model.layers.{i}.self_attn.q_norm.weight", "layers/attention/q_norm/scale", "H -> H"),
    Tensor("model.layers.{i}.self_attn.k_norm.weight", "layers/attention/k_norm/scale", "H -> H"),
)
MISTRAL = _like(
    LLAMA,
    "mistral",
    "Mistral",
    _kv_heads(8),
    _context(131072),
    without=("attention_bias", "mlp_bias"),
    form=dict(attention_bias=False, mlp_bias=False),
    window="all",
)
QWEN2 = _like(
    LLAMA,
    "qwen2",
    "Qwen2",
    _kv_heads(32),
    _context(32768),
    without=("attention_bias", "mlp_bias"),
    form=dict(attention_bias=True, output_bias=False, mlp_bias=False),
    window="switched",
)
QWEN3 = _like(
    LLAMA,
    "qwen3",
    "Qwen3",
    _kv_heads(32),
    _context(32768),
    Field("head_dim", "head_dim", int, 128),
    without=("mlp_bias",),
    form=dict(qk_norm=True, mlp_bias=False),
    tensors=LLAMA.tensors + QK_NORMS,
    window="switched",
)
GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"} | ACTIVATIONS  # the one to write comes first
GEMMA = _like(
    LLAMA,
    "gemma",
    "Gemma",
    _kv_heads(16, AS_ABSENT),
    _context(8192),
    Field("head_dim", "head_dim", int, 256),
    # the first files say "gelu" and mean its tanh form
    Field("hidden_act", "activation", str, "gelu_pytorch_tanh", GEMMA_ACTIVATIONS | {"gelu": "gelu_tanh"}),
    Field("tie_word_embeddings", "tied", bool, True),
    without=("mlp_bias",),
    form=dict(norm="rmsnorm_plus_one", mlp_bias=False, scale_embedding=True),
    only={"use_bidirectional_attention": (False, None)},
)
GEMMA2 = _like(
    GEMMA,
    "gemma2",
    "Gemma2",
    _kv_heads(4, AS_ABSENT),
    Field("hidden_activation", "activation", str, "gelu_pytorch_tanh", GEMMA_ACTIVATIONS),
    Field("query_pre_attn_scalar", "query_scalar", int, 256),
    Field("attn_logit_softcapping", "attention_softcap", float, 50.0, null=0.0),
    Field("final_logit_softcapping", "logit_softcap", float, 30.0, null=0.0),
    form=dict(post_norm=True),
    tensors=(
        *(tensor for tensor in LLAMA.tensors if tensor.paths != "layers/norm2/scale"),
        Tensor("model.layers.{i}.post_attention_layernorm.weight", "layers/post_norm1/scale", "D -> D"),
        Tensor("model.layers.{i}.pre_feedforward_layernorm.weight", "layers/norm2/scale", "D -> D"),
        Tensor("model.layers.{i}.post_feedforward_layernorm.weight", "layers/post_norm2/scale", "D -> D"),
    ),
    window=2,
)
GEMMA3 = _like(
    GEMMA2,
    "gemma3_text",
    "Gemma3",
    _context(131072),
    Field("final_logit_softcapping", "logit_softcap", float, 0.0, null=0.0),
    without=("attention_softcap",),
    form=dict(qk_norm=True),
    only=GEMMA.only | {"attn_logit_softcapping": (None,)},
    tensors=GEMMA2.tensors + QK_NORMS,
    heads={
        "lm": ("Gemma3ForCausalLM", LLAMA.heads["lm"][1]),
        "sequence": ("Gemma3TextForSequenceClassification", LLAMA.heads["sequence"][1]),
        "token": ("Gemma3TextForTokenClassification", LLAMA.heads["token"][1]),  # transformers has no such class
    },
    window=6,
    rope=Rope(default=1e6, local="rope_local_base_freq"),
)


def _linear(name: str, path: str, weight: str, bias: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", path, weight), Tensor(f"{name}.bias", f"{path}_bias", bias)


def _dense(name: str, group: str, weight: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{name}.weight", f"{group}/kernel", weight),
        Tensor(f"{name}.bias", f"{group}/bias", f"{weight[0]} -> {weight[0]}"),
    )


def _norm(name: str, group: str) -> tuple[Tensor, ...]:
    return Tensor(f"{name}.weight", f"{group}/scale", "D -> D"), Tensor(f"{name}.bias", f"{group}/bias", "D -> D")


def _encoder(model_type: str, base: str, **more) -> Family:
    """BERT's trunk; `more` is what differs: heads and positions."""
    layer = f"{base}encoder.layer.{{i}}."
    heads = ("(N H) D -> D N H", "(N H) -> N H")
    return Family(
        model_type=model_type,
        base=base,
        fields=(
            Field("vocab_size", "vocab_size", int),
            Field("hidden_size", "width", int),
            Field("num_hidden_layers", "layers", int),
            Field("num_attention_heads", "heads", int),
            Field("intermediate_size", "mlp_width", int, 3072),
            Field("max_position_embeddings", "position_rows", int, 512),
            Field("type_vocab_size", "token_types", int, 2),
            Field("layer_norm_eps", "norm_eps", float, 1e-12),
            Field("hidden_act", "activation", str, "gelu", ACTIVATIONS),
            Field("initializer_range", "init_std", float, 0.02),
        ),
        only={"position_embedding_type": ("absolute", None), "is_decoder": (False,), "add_cross_attention": (False,)},
        constants={"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        tensors=(
            Tensor(f"{base}embeddings.word_embeddings.weight", "embed/tokens", "V D -> V D"),
            Tensor(f"{base}embeddings.position_embeddings.weight", "embed/positions", "S D -> S D"),
            Tensor(f"{base}embeddings.token_type_embeddings.weight", "embed/token_types", "S D -> S D"),
            *_norm(f"{base}embeddings.LayerNorm", "norm"),
            *_linear(f"{layer}attention.self.query", "layers/attention/q", *heads),
            *_linear(f"{layer}attention.self.key", "layers/attention/k", *heads),
            *_linear(f"{layer}attention.self.value", "layers/attention/v", *heads),
            *_linear(f"{layer}attention.output.dense", "layers/attention/o", "D (N H) -> N H D", "D -> D"),
            *_norm(f"{layer}attention.output.LayerNorm", "layers/norm1"),
            *_linear(f"{layer}intermediate.dense", "layers/mlp/up", "F D -> D F", "F -> F"),
            *_linear(f"{layer}output.dense", "layers/mlp/down", "D F -> F D", "D -> D"),
            *_norm(f"{layer}output.LayerNorm", "layers/norm2"),
        ),
        kind=EncoderConfig,
        renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        **more,
    )


UNUSED = (".position_ids", "pooler.dense.weight", "pooler.dense.bias")  # the pooler, beside a head without
BERT = _encoder(
    "bert",
    "bert.",
    form=dict(first_position=0),
    heads={
        "trunk": ("BertModel", _dense("bert.pooler.dense", "pooler", "E D -> D E")),
        "sequence": (
            "BertForSequenceClassification",
            (*_dense("bert.pooler.dense", "pooler", "E D -> D E"), *_dense("classifier", "head", "C D -> D C")),
        ),
        "token": ("BertForTokenClassification", _dense("classifier", "head", "C D -> D C")),
    },
    ignored=(
        *UNUSED,
        *(f"cls.predictions.{name}" for name in ("bias", "decoder.weight", "decoder.bias")),
        *(f"cls.predictions.transform.dense.{name}" for name in ("weight", "bias")),
        *(f"cls.predictions.transform.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")),
        *(f"cls.seq_relationship.{name}" for name in ("weight", "bias")),
    ),
    trunks=("BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"),
)
ROBERTA = _encoder(
    "roberta",
    "roberta.",
    form={},  # the first position's row comes after that of padding: read_config
    heads={
        "trunk": ("RobertaModel", _dense("roberta.pooler.dense", "pooler", "E D -> D E")),
        "sequence": (
            "RobertaForSequenceClassification",
            (*_dense("classifier.dense", "pooler", "E D -> D E"), *_dense("classifier.out_proj", "head", "C D -> D C")),
        ),
        "token": ("RobertaForTokenClassification", _dense("classifier", "head", "C D -> D C")),
    },
    ignored=(
        *UNUSED,
        *(f"lm_head.{name}" for name in ("bias", "decoder.weight", "decoder.bias", "dense.weight", "dense.bias")),
        *(f"lm_head.layer_norm.{name}" for name in ("weight", "bias")),
    ),
    trunks=("RobertaForMaskedLM",),
)

# lfjax's own: no other tool knows it. Tensors are torch.nn.LSTM's, with one bias; the forget gate adds 1 to its own.
LSTM = Family(
    model_type="lfjax_lstm",
    base="",
    form={},
    fields=(
        Field("vocab_size", "vocab_size", int),
        Field("hidden_size", "width", int),
        Field("num_hidden_layers", "layers", int),
        Field("tie_word_embeddings", "tied", bool, True),
    ),
    only={},
    constants={},
    tensors=(
        Tensor("embed_tokens.weight", "embed/tokens", "V D -> V D"),
        Tensor("lstm.weight_ih_l{i}", "layers/lstm/input", "F D -> D F"),
        Tensor("lstm.weight_hh_l{i}", "layers/lstm/recurrent", "F D -> D F"),
        Tensor("lstm.bias_ih_l{i}", "layers/lstm/bias", "F -> F"),
    ),
    heads={
        task: (f"LSTMFor{name}", LLAMA.heads[task][1])
        for task, name in (
            ("lm", "CausalLM"),
            ("sequence", "SequenceClassification"),
            ("token", "TokenClassification"),
        )
    },
    kind=LSTMConfig,
)

KNOWN = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, GEMMA, GEMMA2, GEMMA3, BERT, ROBERTA, LSTM)
FAMILIES = {family.model_type: family for family in KNOWN}

ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
MOST_LAYERS = 10_000

# What an execution chooses; the rest of TransformerConfig says what the model computes.
EXECUTION = ("dtype", "remat", "unroll", "dropout", "vocab_multiple")


def is_encoder(config: dict) -> bool:
    """Whether a config.json is of an encoder."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.kind is EncoderConfig


# Keys that transformers heeds in every family, as `Family.only`.
EVERYWHERE = {"quantization_config": (None,), "per_layer_config": (None,)}
CAUSAL = {"is_causal": (True,)}


def family_of(config: dict, where: str) -> Family:
    """The table for a config.json; `where` names the file in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{where}: field 'model_type': found {model_type!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def read_config(config: dict, where: str, task: str | None = None) -> Form:
    """config.json -> the model's form; raises InputError naming the key that is missing, wrong or not computed.

    Args:
      config: config.json of a known family.
      where: the file, for errors.
      task: "lm", "sequence" or "token", of an encoder also "trunk"; None takes it from `architectures`.
    """
    family = family_of(config, where)
    only = EVERYWHERE | (CAUSAL if family.kind is TransformerConfig else {}) | family.only
    for key, allowed in only.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{where}: field {key!r}: found {config[key]!r}; only {allowed[0]!r} is computed here")
    known: dict[str, Any] = {}
    for field in family.fields:
        known[field.ours] = _read_field(config, field, known, where)
    if family.kind is TransformerConfig:
        known |= _read_decoder(config, family, known, where)
    elif family.kind is EncoderConfig and "first_position" not in family.form:
        known["first_position"] = _padding(config, where) + 1
    task = task or _task_of(config, family, where)
    if task not in family.heads:
        raise InputError(f"{where}: field 'model_type': {family.model_type!r} is an encoder, not a language model")
    if task in ("sequence", "token"):
        known["num_labels"] = _num_labels(config, where)
    known |= {"pooler": task != "token"} if family.kind is EncoderConfig else {"head_bias": task == "token"}
    try:
        return family.kind(**family.form, **known)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read_decoder(config: dict, family: Family, known: dict[str, Any], where: str) -> dict[str, Any]:
    """What only a decoder has: heads of several kinds, rotary positions, windows."""
    known = {"kv_heads": known["heads"], "head_dim": known["width"] // known["heads"]} | known
    _check_heads(config, family, known, where)
    if family.form["position"] == "rope":
        known |= _read_rope(config, family.rope, known["context"], where)
    return known | _read_window(config, family, known["layers"], where)


def _padding(config: dict, where: str) -> int:
    """RoBERTa's padding id, after which its positions begin."""
    found = config.get("pad_token_id", 1)
    if type(found) is not int or not 0 <= found <= LARGEST[int]:
        raise InputError(f"{where}: field 'pad_token_id': found {found!r}; must be an id: positions begin after it")
    return found


def as_stored(config: dict, form: Form, names: set[str], family: Family) -> tuple[dict, Form]:
    """config.json and form of what is read of a file with these tensors.

    Of an encoder without labels that is the trunk, whatever was beside it, with a pooler if the file has one.
    """
    if not isinstance(form, EncoderConfig) or form.num_labels:
        return config, form
    architecture, pooler = family.heads["trunk"]
    found = {name.removeprefix(family.base) for name in names}
    has = all(tensor.name.removeprefix(family.base) in found for tensor in pooler)
    return config | {"architectures": [architecture]}, dataclasses.replace(form, pooler=has)


def _read_field(config: dict, field: Field, known: dict, where: str) -> Any:
    value = config.get(field.theirs)
    if value is None:
        value = field.default if field.theirs not in config or field.null is AS_ABSENT else field.null
        if value is REQUIRED:
            raise InputError(f"{where}: field {field.theirs!r}: missing; {field.kind.__name__} is needed")
        value = value(known) if isinstance(value, Callable) else value
        if value == field.null:
            return value
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
    derived = config.get("head_dim") is None and known["head_dim"] == known["width"] // known["heads"]
    if derived and known["width"] % known["heads"]:
        raise InputError(
            f"{where}: field {theirs['heads']!r}: found {known['heads']}; must divide"
            f" {theirs['width']} {known['width']}"
        )


def _read_rope(config: dict, keys: Rope, context: int, where: str) -> dict[str, Any]:
    """Rotary settings, from `rope_parameters` or from `rope_theta` and `rope_scaling` (older files; that one wins)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope, found = config.get(key) or {}, {}
    if keys.local:  # one object a type of layer; an older scaling is that of full attention
        types = _object(config.get("rope_parameters") or {}, "rope_parameters", where)
        near, full = (_object(types.get(kind) or {}, f"rope_parameters.{kind}", where) for kind in LAYER_TYPES[::-1])
        kind = near.get("rope_type", "default")
        if types.keys() - set(LAYER_TYPES) or kind != "default":
            wanted = f"one object for each of {', '.join(LAYER_TYPES)}, the last of rope_type default"
            raise InputError(f"{where}: field 'rope_parameters': found {types!r}; must be {wanted}")
        local = near.get("rope_theta", config.get(keys.local, 10000.0))
        found["window_theta"] = _positive(local, keys.local, where)
        rope = full | _object(config.get("rope_scaling") or {}, "rope_scaling", where)
    rope = _object(rope, key, where)
    for name, value in rope.items():
        if isinstance(value, dict):
            raise InputError(f"{where}: field '{key}.{name}': found {value!r}; one rope for all layers in this family")
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = ROPE_KEYS.get(kind) if isinstance(kind, str) else None
    if names is None:
        raise InputError(f"{where}: field '{key}.rope_type': found {kind!r}; known are {', '.join(ROPE_KEYS)}")
    outside = config.get(keys.share, 0.25) if keys.share else config.get("partial_rotary_factor", 1.0)
    share = _positive(rope.get("partial_rotary_factor", outside), "partial_rotary_factor", where)
    if share > 1.0 or (share < 1.0 and not keys.share):
        allowed = "a positive number up to 1.0" if keys.share else "1.0 in this family"
        raise InputError(f"{where}: field 'partial_rotary_factor': found {share}; must be {allowed}")
    theta = _positive(rope.get("rope_theta", config.get(keys.theta, keys.default)), keys.theta, where)
    given = {"original_max_position_embeddings": context} | rope
    scaling = tuple(_positive(given.get(name), f"{key}.{name}", where) for name in names)
    if kind == "llama3" and scaling[2] <= scaling[1]:
        raise InputError(f"{where}: field '{key}.high_freq_factor': found {scaling[2]}; must exceed low_freq_factor")
    return found | {"rope_theta": theta, "rope_scaling": (kind, *scaling) if names else (), "rope_share": share}


def _object(value: Any, name: str, where: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{where}: field {name!r}: found {value!r}; must be an object")
    return value


def _positive(value: Any, name: str, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LARGEST[float]:
        raise InputError(f"{where}: field {name!r}: found {value!r}; must be a positive number")
    return float(value)


def _read_window(config: dict, family: Family, layers: int, where: str) -> dict[str, Any]:
    """The window and which layers have it, as fields of TransformerConfig."""
    window = config.get("sliding_window", 4096)
    switched = family.window == "switched"
    on = not switched or _read_field(config, Field("use_sliding_window", "", bool, False), {}, where)
    if not family.window or window is None or not on:
        return {}
    if type(window) is not int or not 0 < window <= LARGEST[int]:
        raise InputError(f"{where}: field 'sliding_window': found {window!r}; must be a positive integer or null")
    if family.window == "all":
        return {"window": window}
    if layers > MOST_LAYERS:
        raise InputError(f"{where}: field 'num_hidden_layers': found {layers}; at most {MOST_LAYERS}")
    types = config.get("layer_types")
    if types is None:
        key, default = ("max_window_layers", 28) if switched else ("sliding_window_pattern", family.window)
        count = config.get(key, default)
        if type(count) is not int or count < (0 if switched else 1):
            raise InputError(f"{where}: field {key!r}: found {count!r}; must be a positive integer")
        types = [LAYER_TYPES[i >= count if switched else (i + 1) % count > 0] for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not all(kind in LAYER_TYPES for kind in types):
        known = " or ".join(LAYER_TYPES)
        raise InputError(f"{where}: field 'layer_types': found {types!r}; must be {known} for each of {layers} layers")
    windowed = tuple(kind == LAYER_TYPES[1] for kind in types)
    return {"window": window, "windowed": () if all(windowed) else windowed} if any(windowed) else {}


def _task_of(config: dict, family: Family, where: str) -> str:
    architectures = config.get("architectures")
    tasks = {architecture: task for task, (architecture, _) in family.heads.items()}
    tasks |= {architecture: "trunk" for architecture in family.trunks}
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


def task_of(config: Form) -> str:
    """The kind of head: "lm", "sequence" (one answer a row, no bias) or "token" (one a position, with a bias).

    Of an encoder "trunk" (none), "sequence" (one answer a row, by the pooler) or "token".
    """
    if isinstance(config, EncoderConfig):
        return "trunk" if config.num_labels == 0 else "sequence" if config.pooler else "token"
    if config.num_labels == 0:
        return "lm"
    return "token" if config.head_bias else "sequence"


def same_function(a: Form, b: Form) -> bool:
    """Whether two configs describe the same parameters and the same function of them."""
    return _function(a) == _function(b)


def _function(config: Form) -> Form:
    """`config` with everything neutral that its function does not depend on."""
    neutral = {f.name: f.default for f in dataclasses.fields(config) if f.name in EXECUTION}
    neutral["init_std"] = 0.02
    if isinstance(config, EncoderConfig):
        return dataclasses.replace(config, **neutral, **({} if config.num_labels else {"pooler": True}))
    if isinstance(config, LSTMConfig):
        del neutral["init_std"]
        return dataclasses.replace(config, **neutral, **({"tied": True} if config.num_labels else {"head_bias": False}))
    if config.position != "rope":
        neutral |= {"rope_theta": 10000.0, "rope_scaling": (), "rope_share": 1.0}
    if not config.attention_bias:
        neutral["output_bias"] = True
    if all(config.window_layers) or not any(config.window_layers):
        neutral |= {"windowed": (), "window": config.window if all(config.window_layers) else 0}
    if not any(config.window_layers) or (config.window_theta == config.rope_theta and not config.rope_scaling):
        neutral["window_theta"] = 0.0
    if config.query_scalar == config.head_dim:
        neutral["query_scalar"] = 0.0
    if config.num_labels:
        neutral |= {"tied": True, "logit_softcap": 0.0}
    else:
        neutral["head_bias"] = False
    return dataclasses.replace(config, **neutral)


def write_config(config: Form, first: str | None = None) -> dict[str, Any]:
    """The model's switches -> config.json of the family `first` if it can express them, else of the first that can.

    Raises:
      InputError: no family can; names the switches of each that differ.
    """
    refused = []
    able = [family for family in KNOWN if isinstance(config, family.kind)]
    for family in sorted(able, key=lambda family: family.model_type != first):
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


def _write_family(config: Form, family: Family) -> dict[str, Any]:
    if isinstance(config, TransformerConfig):
        config = dataclasses.replace(config, query_scalar=config.query_scalar or float(config.head_dim))
    task = task_of(config)
    written: dict[str, Any] = {"architectures": [family.heads[task][0]], "model_type": family.model_type}
    for field in family.fields:
        value = field.kind(getattr(config, field.ours))
        if field.values is not None:
            value = next((theirs for theirs, ours in field.values.items() if ours == value), value)
        written[field.theirs] = None if value == field.null else value
    if isinstance(config, TransformerConfig):
        written |= _write_decoder(config, family)
    elif isinstance(config, EncoderConfig) and "first_position" not in family.form:
        written["pad_token_id"] = config.first_position - 1
    if config.num_labels:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return written | family.constants


def _write_decoder(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """Rotary settings and windows."""
    written = _write_rope(config, family.rope) if family.form["position"] == "rope" else {}
    window = config.window if any(config.window_layers) else 0
    if family.window:
        written["sliding_window"] = window or (None if isinstance(family.window, str) else 4096)
    if family.window == "switched":
        written["use_sliding_window"] = window > 0
    if family.window not in ("", "all"):
        written["layer_types"] = [LAYER_TYPES[windowed] for windowed in config.window_layers]
    return written


def _write_rope(config: TransformerConfig, keys: Rope) -> dict[str, Any]:
    """Rotary settings in both styles: old versions of transformers read one, new ones the other."""
    kind, *values = config.rope_scaling or ("default",)
    scaling = {"rope_type": kind} | dict(zip(ROPE_KEYS[kind], values, strict=True))
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    rope = {"rope_theta": config.rope_theta} | scaling
    written = {keys.theta: config.rope_theta, "rope_scaling": scaling if config.rope_scaling else None}
    if keys.share:
        written[keys.share] = rope["partial_rotary_factor"] = config.rope_share
    if keys.local:
        written[keys.local] = config.window_theta or config.rope_theta
        rope = {LAYER_TYPES[0]: rope, LAYER_TYPES[1]: {"rope_type": "default", "rope_theta": written[keys.local]}}
    return written | {"rope_parameters": rope}


def flat_shapes(config: Form) -> dict[str, tuple[int, ...]]:
    """Our parameters: path -> shape."""
    flat: dict[str, tuple[int, ...]] = {}

    def visit(prefix: str, node: dict) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                visit(f"{prefix}{name}/", value)
            else:
                flat[prefix + name] = value[0]

    visit("", config.parameters())
    return flat


def active(family: Family, config: Form) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """The lines of the family's table whose parameters this model has, each with the sizes of its axes."""
    shapes = flat_shapes(config)
    for tensor in (*family.tensors, *family.heads[task_of(config)][1]):
        if all(path in shapes for path in tensor.ours):
            shape = shapes[tensor.ours[0]]
            yield tensor, tensor.sizes(shape[1:] if tensor.stacked else shape, config.vocab_size)


def stored_name(name: str, family: Family, names: Collection[str]) -> str | None:
    """What a file with these names calls a tensor: files of the bare trunk (GPT-2's own, for one) leave the family's
    prefix out, old files end some names in another way; None where it is not there.
    """
    old = [name.removesuffix(new) + old for new, old in family.renamed if name.endswith(new)]
    for candidate in (name, *old):
        for stored in (candidate, candidate.removeprefix(family.base)):
            if stored in names:
                return stored
    return None


def input_output_axes(tensor: Tensor) -> tuple[list[str], list[str], bool]:
    """(input axes, output axes) of a matrix as ours has them, and whether theirs is stored [D_in D_out]."""
    axes = [axis for axis in tensor.axes.split("->")[1].split() if axis != "J"]
    cut = 2 if tensor.ours[0].endswith("/o") else 1
    ones = dict.fromkeys([*axes, "J"], 1)
    return axes[:cut], axes[cut:], tensor.their_shape(ones | {axes[0]: 2})[0] == 2
