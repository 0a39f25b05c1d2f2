"""What stages share that learn from given answers against a reference: its log-probabilities, kept or asked anew."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lfjax.config import Config, optim_section
from lfjax.data.duplicates import SPLITS
from lfjax.models.flops import step_work
from lfjax.run import training
from lfjax.run.answers import AnswerScorer, kept
from lfjax.run.parts import compiled_step, compute_settings, create_state, optimizer, passes, total_steps, trained_part
from lfjax.run.run import Run
from lfjax.state import LMState


def train_on_answers(
    run: Run,
    stage: str,
    sets: Mapping[str, Any],
    *,
    figures_of: Callable[[Any, np.ndarray, str], dict[str, float]],
    with_reference: Callable[[Any, Callable], Any],
    free: bool = False,
) -> dict[str, float]:
    """Trains a language model on batches of answers, saves it, and gives its figures on the test split.

    The step and the section are named as the stage. Figures of the batches, but for the loss, are <stage>/train_<leaf>.

    Args:
      sets: split -> `PairBatches` or `KtoBatches`.
      figures_of: (batches, sums of the log-probabilities of their answers, prefix) -> held-out figures.
      with_reference: (batch, what gives a reference's sums of its rows) -> the batch with them.
      free: the loss has no reference.
    """
    section, devices, adapters, batches = run.config[stage], run.devices, run.adapters(stage), sets["train"]
    total = total_steps(section, batches.steps_per_epoch)
    loaded = run.load_model(*run.start(stage), language=True)
    config = compute_settings(run.config.model, loaded.model.config, dropout=section.dropout)
    model = devices.network(config)
    ask = None if free else references(run, stage, loaded, sets)
    recipe = optimizer(optim_section(run.config, stage), total, model)
    trained, base = trained_part(devices, adapters, loaded.params, config, f"{stage}-lora")
    state, shardings = create_state(devices, LMState, trained, recipe)
    function = functools.partial(run.steps[stage], **section.step.to_dict())
    shapes = [batches.build([], length) for length in batches.buckets]
    learn = compiled_step(devices, stage, function, recipe, model, base, state, shardings, shapes, adapters=adapters)
    score = scorer(run, stage, config, adapters, batches.buckets)

    def figures(state, split: str = "validation", prefix: str = f"{stage}/validation_") -> dict[str, float]:
        return figures_of(sets[split], score(state.params, base, sets[split].answers), prefix)

    def one(state, index):
        batch = batches.batch_at(index)
        return learn(state, batch if ask is None else with_reference(batch, ask))

    rows = 2 * section.batch_size  # both answers of a pair, or an answer and the mismatched one
    state, out = training.train(
        run, stage, state, one, total=total, evaluate=figures, learning_rate=recipe.rate,
        work=lambda index: step_work(config, (rows, batches.length_at(index)), passes(adapters)),
    )  # fmt: skip
    run.save_model(stage, model, state.params, base)
    own = re.compile(rf"^{stage}/(?!loss$|validation_)")  # figures of the batches, whose names the test split's take
    told = {own.sub(f"{stage}/train_", name): value for name, value in out.items()}
    return told | figures(state, "test", f"{stage}/")


def scorer(run: Run, stage: str, config, adapters, buckets) -> AnswerScorer:
    """Sums of answers under a model of this form, in batches of a stage's size."""
    section = run.config[stage]
    model = run.devices.network(compute_settings(run.config.model, config, dropout=0.0))
    return AnswerScorer(
        run.devices,
        model,
        adapters=adapters,
        buckets=buckets,
        batch_size=2 * section.batch_size,
        chunk_size=section.step.get("chunk_size", 64),
        pad_id=run.tokenizer.pad_id,
        leave=functools.partial(run.leave_if_asked, stage),
    )


def references(run: Run, stage: str, start, sets: Mapping[str, Any]) -> Callable | None:
    """Gives the splits what the reference says of their answers.

    Args:
      start: the loaded model that the stage starts from, which is the reference where the section names none.
      sets: split -> batches, with `answers` and `ref`.
    Returns:
      None; or what says it of the rows of a training batch, where `keep_reference` is off: the model stays in memory.
    """
    section = run.config[stage]
    name = section.reference
    loaded = run.load_model(f"{stage}.reference", name, language=True) if name else start
    score = scorer(run, stage, loaded.model.config, None, sets["train"].buckets)
    for split in SPLITS if section.keep_reference else SPLITS[1:]:
        answers = sets[split].answers
        path = run.workdir / "references" / stage / f"{split}.npy"
        sets[split].ref = kept(path, len(answers), functools.partial(score, loaded.params, None, answers))
    return None if section.keep_reference else functools.partial(score.of_rows, loaded.params, None)


def sources(config: Config, stage: str) -> dict[str, str]:
    """The start, and the reference where one is named."""
    found = {f"{stage}.init_from": config[stage].init_from}
    return found | ({f"{stage}.reference": config[stage].reference} if config[stage].reference else {})


def reads_only(config: Config, stage: str) -> tuple[str, ...]:
    """The reference, where one is named, is not trained."""
    return (f"{stage}.reference",) if config[stage].reference else ()
