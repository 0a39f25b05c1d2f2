"""Stages that learn from text: the tokenizer, pretraining and supervised fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lfjax.config import optim_section
from lfjax.data.batching import PackedRows
from lfjax.data.examples import pretraining_documents, sft_documents
from lfjax.loops.run import Run
from lfjax.loops.training import train
from lfjax.metrics import Window, perplexity
from lfjax.models import lora, presets
from lfjax.models.flops import forward_flops
from lfjax.optim import make_optimizer, schedule
from lfjax.sharding import abstract, global_batch, jit_step, replicated, shardings_for
from lfjax.state import LMState
from lfjax.tokenizers import sentencepiece


def tokenizer_stage(run: Run) -> dict[str, float]:
    """Learns a vocabulary from the training texts, unless the config names one."""
    options = run.config.tokenizer
    if run.config.model.init_from or options.path:
        tokenizer = run.tokenizer
    else:
        tokenizer = sentencepiece.train(
            texts_of(run.records.train),
            run.models("tokenizer") if jax.process_index() == 0 else None,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
        )
        run.check_texts(tokenizer)
    run.sync("saved tokenizer")
    lengths = [len(tokenizer.encode(text)) for text in texts_of(run.records.validation)]
    return {
        "tokenizer/vocab_size": float(tokenizer.vocab_size),
        "tokenizer/tokens_per_text": float(np.mean(lengths)) if lengths else 0.0,
    }


def new_or_loaded(run: Run, stage: str):
    """(model config, parameters on the mesh) that a language-model stage starts from."""
    key, name = run.start_of(stage)
    if name:
        loaded = run.load_model(key, name, language=True)
        return compute_settings(run, loaded.model.config), loaded.params
    config = presets.described(run.config.model, vocab_size=run.tokenizer.vocab_size, vocab_multiple=run.vocab_multiple)

    def init(key):
        return run.network(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    shapes = jax.eval_shape(init, run.key("init"))
    params = jax.jit(init, out_shardings=shardings_for(shapes, run.mesh, run.rules))(run.key("init"))
    return config, params


def compute_settings(run: Run, config, **changes):
    """A loaded model's config with this run's ways of computing it."""
    c = run.config.model
    ways = {name: c[name] for name in ("dtype", "remat", "unroll") if hasattr(config, name)}
    return dataclasses.replace(config, **ways, **changes)


def training_parts(run: Run, stage: str, total: int, model, name: str = "optim"):
    """(optimizer, learning-rate schedule) of a stage, for parameters of the model."""
    options = optim_section(run.config, stage, name)
    rate = schedule(
        options.pop("schedule"),
        learning_rate=options.pop("learning_rate"),
        total_steps=total,
        warmup_steps=options.pop("warmup_steps"),
        end_factor=options.pop("end_factor"),
    )
    return make_optimizer(rate, **options, vocab_size=model.config.vocab_size), rate


def total_steps(section, steps_per_epoch: int) -> int:
    """`steps` where given, else as many as the epochs have."""
    return section.steps or max(1, round(section.epochs * steps_per_epoch))


def create_state(run: Run, kind, params, tx):
    """A fresh sharded state of class `kind`, and its shardings."""
    shardings = shardings_for(jax.eval_shape(lambda p: kind.create(p, tx), params), run.mesh, run.rules)
    return jax.jit(lambda p: kind.create(p, tx), out_shardings=shardings)(params), shardings


def compiled_step(run: Run, name: str, function, model, base, state, shardings, batches):
    """The step as (state, index, host batch) -> (state, metrics): compiled for every bucket before its first use.

    Args:
      function: a step without its model. base: what of the model stays frozen; None: nothing.
    """
    key, how = run.key(name), run.lora_of(name)

    def with_key(state, batch, key, base):
        return function(state, batch, jax.random.fold_in(key, state.step), model=lora.bind(model, base, how))

    step = jit_step(with_key, name=name, donate=(0,), out_shardings=(shardings, replicated(run.mesh)))
    for batch in batches:
        step.compile(state, abstract(global_batch(batch, run.mesh)), key, base)
    return lambda state, batch: step(state, global_batch(batch, run.mesh), key, base)


def lm_stage(run: Run, stage: str) -> dict[str, float]:
    """Pretraining ("pretrain": whole texts) or fine-tuning ("sft": responses and edits, loss on the response)."""
    section = run.config[stage]
    convert = pretraining_documents if stage == "pretrain" else sft_documents
    documents = {split: convert(getattr(run.records, split), run.tokenizer) for split in ("train", "validation")}
    rows = {"seq_len": section.seq_len, "batch_size": section.batch_size, "pad_id": run.tokenizer.pad_id}
    packed, validation = (PackedRows(documents[s], seed=run.config.seed, **rows) for s in ("train", "validation"))
    total = total_steps(section, packed.steps_per_epoch)

    config, params = new_or_loaded(run, stage)
    model = run.network(dataclasses.replace(config, dropout=section.dropout))
    tx, rate = training_parts(run, stage, total, model)
    trained, base = run.trained_part(stage, params, config, f"{stage}-lora")
    state, shardings = create_state(run, LMState, trained, tx)
    function = functools.partial(run.steps["sft"], tx=tx, **section.step.to_dict())
    step = compiled_step(run, stage, function, model, base, state, shardings, [packed.batch_at(0)])
    evaluate = held_out(run, stage, model, base, validation)
    before = {}
    if stage == "sft":
        before["sft/perplexity_before"] = perplexity(evaluate(trained)[0])
        before["sft/cut_share"] = run.cut_share(stage, packed.cut, len(documents["train"]))
    del params, trained  # the state has its own
    text_bytes = sum(len(text.encode()) for text in texts_of(run.records.validation))

    def figures(state) -> dict[str, float]:
        nll, tokens = evaluate(state.params)
        out = {f"{stage}/validation_loss": nll, f"{stage}/perplexity": perplexity(nll)}
        if stage == "pretrain":
            out["pretrain/bits_per_byte"] = nll * tokens / math.log(2) / text_bytes
            out["pretrain/unigram_perplexity"] = math.exp(
                unigram_nll(documents["train"], documents["validation"], run.tokenizer.vocab_size)
            )
        return out

    def one(state, index):
        state, metrics = step(state, packed.batch_at(index))
        return state, {name.replace("sft/", f"{stage}/"): value for name, value in metrics.items()}

    tokens = section.batch_size * section.seq_len
    state, out = train(
        run, stage, state, one, total=total, tokens_per_step=tokens,
        flops_per_step=tokens * passes(run, stage) * forward_flops(config, section.seq_len), evaluate=figures,
        learning_rate=rate,
    )  # fmt: skip
    run.save_model(stage, model, state.params, base)
    return {**out, **before}


def texts_of(records) -> list[str]:
    """Prompt and response as one text, for every response that is not empty."""
    return [record.prompt_text + text for record in records for text in record.responses if text]


def passes(run: Run, stage: str) -> int:
    """What training costs in forward passes: the backward pass two, but one where no matrix has a gradient."""
    return 3 if run.lora_of(stage) is None else 2


def held_out(run: Run, stage: str, model, base, rows: PackedRows):
    """params -> (mean nats per target token, number of target tokens) over every row once."""
    how = run.lora_of(stage)

    def function(params, batch, base):
        return run.steps["evaluate"](params, batch, model=lora.bind(model, base, how))

    step = run.program(
        ("evaluate", dataclasses.replace(model.config, dropout=0.0), how),
        lambda: jit_step(
            function, name="evaluate", out_shardings=replicated(run.mesh), shapes=2
        ),  # pretrain's and sft's
    )

    def evaluate(params) -> tuple[float, float]:
        window = Window()
        for whole in rows.evaluation():
            window.add(step(params, global_batch(whole, run.mesh), base))
        total, weight = window.pending()["evaluate/nll"]
        return total / weight, weight

    return evaluate


def unigram_nll(train, validation, vocab_size: int) -> float:
    """Mean nats per target token of the best constant guess: training frequencies, add-one smoothed."""
    counts = 1.0 + np.bincount([t for tokens in train for t in tokens[1:]], minlength=vocab_size)
    logprobs = np.log(counts / counts.sum())
    return -float(np.mean(logprobs[[t for tokens in validation for t in tokens[1:]]]))
