"""What judges where nobody names a judge, and what it reads."""

import numpy as np
import pytest

from lfjax.records import Rating, Record
from lfjax.rewards.baselines import pair_accuracy
from lfjax.rewards.judges import FEWEST, fit_rating_judge, judged_text
from lfjax.stages.comparison import figures_of

SCALE = (0.0, 8.0)
CHAT = [{"role": "system", "content": "You are a helpful, great assistant."}, {"role": "user", "content": "Hi"}]


def rated(count: int, noise: float = 0.0, prompt="Question {}: ") -> list[Record]:
    """Answers of three words, of which "yes" is worth 4 points and "no" none."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        good = int(rng.integers(2))
        text = f"{('no', 'yes')[good]} {rng.choice(['so', 'well', 'then'])} {rng.choice(['sir', 'friend'])}"
        value = float(np.clip(2.0 + 4.0 * good + noise * rng.normal(), *SCALE))
        records.append(Record(prompt.format(i // 2), [text], [Rating(0, value, SCALE)]))
    return records


def test_the_judge_gives_rating_points_and_its_accuracy_is_of_texts_that_it_did_not_see():
    judge = fit_rating_judge(rated(200), SCALE)
    assert judge is not None and judge.gap == 1.0 and judge.accuracy.value > 0.95
    yes, no = judge.ratings_of(["Question 7: yes well friend", "Question 7: no well friend"])
    assert 5.0 < yes < 7.0 and 1.0 < no < 3.0
    mere = fit_rating_judge([Record("", [f"word{i}"], [Rating(0, i % 9, SCALE)]) for i in range(60)], SCALE)
    assert mere.accuracy.value == pytest.approx(0.5)  # each text by heart, of the others it knows nothing


def test_too_few_ratings_and_equal_ones_make_no_judge():
    assert fit_rating_judge(rated(FEWEST), SCALE) and fit_rating_judge(rated(FEWEST - 1), SCALE) is None
    same = [Record("", [f"text {i}"], [Rating(0, 3.0, SCALE)]) for i in range(40)]
    assert fit_rating_judge(same, SCALE) is None


def test_of_a_chat_the_answer_alone_is_judged():
    """A template's words and a system text that says "great" praise nothing that a model wrote."""
    assert judged_text(Record(CHAT, ["No."]), "<|system|>a great assistant<|user|>Hi", "No.") == "No."
    assert judged_text(Record("The film", [" is"]), "The film", " is") == "The film is"


def rows(scores, **more):
    return [
        {"response": f"text {i}", "score": s, "length": 5, "ended": True, "kl": 0.0, **more}
        for i, s in enumerate(scores)
    ]


def test_pairs_are_won_prompt_by_prompt_and_a_change_is_paired():
    """Of 40 prompts with very different scores 30 rise by 1, 4 stay and 6 fall."""
    before = np.random.default_rng(1).normal(size=40) * 50
    change = np.repeat([1.0, 0.0, -1.0], [30, 4, 6])
    found = figures_of({"before": rows(before), "after": rows(before + change)}, rated(40, prompt=""), [])
    assert found["ppo/score_won"] == pytest.approx((30 + 2) / 40) and found["ppo/score_won_n"] == 40
    assert found["ppo/score_change"] == pytest.approx(0.6) and found["ppo/score_change_low"] > 0.2
    assert found["ppo/score_before_high"] - found["ppo/score_before_low"] > 20
    assert found["ppo/length_change_low"] == found["ppo/length_change_high"] == 0.0
    assert "ppo/kl" in found and not {"ppo/kl_before", "ppo/kl_after", "ppo/kl_change"} & found.keys()


def test_the_lexicon_judges_only_where_it_is_named():
    answers = {w: rows([0.0] * 4, lexicon=v) for w, v in (("before", 0.0), ("after", 0.5))}
    found = figures_of(answers, rated(4, prompt=""), ["lexicon"])
    assert (found["judge/positive_before"], found["judge/positive_after"], found["judge/lexicon_won"]) == (0, 1, 1)
    assert not [name for name in figures_of(answers, rated(4, prompt=""), []) if name.startswith("judge/")]


def test_the_judges_own_accuracy_is_that_of_pairs_an_eighth_of_the_scale_apart():
    records = rated(60, noise=1.0)
    judge = fit_rating_judge(records, SCALE)
    values = [r.feedback[0].value for r in records]
    assert judge.accuracy.n == pair_accuracy(np.zeros(60), values, 1.0)[1]
