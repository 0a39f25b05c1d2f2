"""A user's own file, 405 made-up support replies, on four scales: the same learning, told in the file's own points.

python benchmarks/replies.py [FOLDER]: writes the file for every scale, trains the reward model of configs/ratings.py on
each from one vocabulary and one language model, and compares what the saved models say of held-out replies. Prints a
table, and JSON as its last line. `python benchmarks/replies.py write FILE` only writes the file, with ratings from 1 to 5.
The replies have ratings, pairs, rankings and edits, in six scripts, with emoji, chat
prompts and duplicates; the file begins with a byte order mark and its lines end in CRLF.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import tempfile

import numpy as np

from lfjax import cli, config
from lfjax.data.examples import prompt_tokens, response_tokens
from lfjax.data.sources import load_records
from lfjax.interop import hf
from lfjax.tokenizers import Tokenizer

SCALES = ((0, 1), (1, 5), (-4, 4), (0, 100))
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "ratings.py"
RECORDS, LENGTH = 405, 128
# what is asked, an answer that helps, what it may add, one that does not, what that adds
SAID = (
    (
        "My parcel {n} has not come. ",
        "I am sorry, parcel {n} left today",
        "the link is below 📦",
        "Wait",
        "not our fault",
    ),
    ("Счёт {n} неверен. ", "Простите, счёт {n} исправлен", "деньги вернутся завтра 🙏", "Ждите", "это не к нам"),
    ("Η παραγγελία {n} άργησε. ", "Συγγνώμη, η {n} έρχεται αύριο", "ορίστε ο κωδικός ✨", "Περιμένετε", "δεν ξέρω"),
    ("الجهاز {n} لا يعمل. ", "نعتذر، سنبدل الجهاز {n} اليوم", "هذا رقم الطلب 🔧", "انتظر", "ليس عملنا"),
    ("खाता {n} बंद है। ", "क्षमा करें, खाता {n} अब खुला है", "यह रहा नया पासवर्ड 🔑", "रुकिए", "हमें नहीं पता"),
    ("订单{n}有问题。", "抱歉，订单{n}已经重新发出", "这是您的退款单 💰", "等着", "不归我们管"),
)
# of an answer that helps and adds something, helps, does not help; as a share of the scale
QUALITY = (0.875, 0.625, 0.125)


def rows(low: float = 1, high: float = 5, count: int = RECORDS, seed: int = 0) -> list[dict]:
    """The records, rated on a scale; what they say and how good it is depends on nothing but the seed."""
    rng, made = random.Random(seed), []
    for number in range(count):
        which, case = rng.randrange(len(SAID)), min(int(rng.expovariate(0.3)), 11)
        asked, helps, more, brushes_off, rude = (part.format(n=case) for part in SAID[which])
        kinds = ((helps, more), (helps,), (brushes_off, rude))
        answers = [", ".join((*parts, str(number % 40))) for parts in kinds]
        chat = [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": asked}]
        row = {"id": number, "prompt": chat if number % 8 == 0 else asked, "responses": answers, "feedback": []}
        shares = [min(1.0, max(0.0, mean + rng.choice((-0.125, 0.0, 0.125)))) for mean in QUALITY]
        kind = rng.choices(("rating", "preference", "ranking", "edit"), (8, 2, 1, 1))[0]
        if kind == "rating":
            kept = rng.randrange(3)
            row["responses"] = [answers[kept]]
            value = low + shares[kept] * (high - low)
            row["feedback"].append({"kind": "rating", "response": 0, "value": value, "scale": [low, high]})
        elif kind == "preference":
            row["feedback"].append({"kind": "preference", "chosen": 0, "rejected": 2})
        elif kind == "ranking":
            row["feedback"].append({"kind": "ranking", "order": [0, 1, 2]})
        else:
            row["feedback"].append({"kind": "edit", "response": 2, "text": answers[0]})
        made.append(row)
    for number in range(0, count // 20):  # copies of replies that somebody else rated
        copied = next(row for row in made[number * 7 :] if row["feedback"][0]["kind"] == "rating")
        made[-1 - number] = {**copied, "id": made[-1 - number]["id"]}
    return made


def write(path: pathlib.Path, made: list[dict]) -> pathlib.Path:
    """With a byte order mark and CRLF, as a spreadsheet's export."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in made)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    return path


def train(workdir: pathlib.Path, path: pathlib.Path, *overrides: str) -> dict[str, float]:
    """The summary of a run."""
    code = cli.main(["train", f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.path={path}", *overrides])
    if code:
        raise SystemExit(code)
    return json.loads((workdir / "summary.json").read_text())


def scores(folder: pathlib.Path, records, tokenizer: Tokenizer) -> np.ndarray:
    """What a saved reward model says of every response of the records, in the file's points above its mean. [N]"""
    loaded = hf.load(folder)
    found = [
        (*prompt_tokens(r, tokenizer), *response_tokens(r, text, tokenizer)) for r in records for text in r.responses
    ]
    tokens = np.zeros((len(found), LENGTH), np.int32)
    mask = np.arange(LENGTH)[None] < np.array([[min(len(row), LENGTH)] for row in found])
    for place, row in enumerate(found):
        tokens[place, : min(len(row), LENGTH)] = row[-LENGTH:]
    return np.asarray(loaded.model.apply({"params": loaded.params}, tokens, attention_mask=mask))[:, 0]


def compare(folder: pathlib.Path, *overrides: str) -> dict:
    """Summaries by scale, and the held-out scores of each, mapped to [0, 1] as the scale is."""
    files = {scale: write(folder / f"{scale[0]}_{scale[1]}.jsonl", rows(*scale)) for scale in SCALES}
    start = folder / "start"
    train(start, files[SCALES[0]], "--config.stages=tokenizer,pretrain", *overrides)
    given = [f"--config.tokenizer.path={start}/models/tokenizer", f"--config.reward.init_from={start}/models/pretrain"]
    told, mapped = {}, {}
    for scale, path in files.items():
        workdir = folder / path.stem
        told[scale] = train(workdir, path, "--config.stages=reward", *given, *overrides)
        loaded = hf.load(workdir / "models" / "reward")
        held_out = splits(path).test
        low, high = scale
        above = scores(workdir / "models" / "reward", held_out, loaded.tokenizer)
        mapped[scale] = (above + told[scale]["reward/rating_mean"] - low) / (high - low)
    return {"summaries": told, "scores": mapped}


def splits(path: pathlib.Path):
    """The records as configs/ratings.py splits them."""
    return load_records(config.load(CONFIG, [f"--config.data.path={path}"]).data)


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(pathlib.Path(sys.argv[2]), rows(1, 5))
        return
    with tempfile.TemporaryDirectory() as own:
        found = compare(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else own))
    first = found["scores"][SCALES[0]]
    names = ("pair_accuracy", "mse", "rating_slope", "calibration_error")
    print("scale         pair accuracy     mse   slope  calibration error  scores off by at most (of [0, 1])")
    figures = {}
    for scale, summary in found["summaries"].items():
        off = float(np.abs(found["scores"][scale] - first).max())
        values = [summary[f"reward/{name}"] for name in names]
        print(f"{scale!s:12s} {values[0]:14.4f} {values[1]:7.4g} {values[2]:7.4f} {values[3]:18.4f} {off:10.6f}")
        figures[str(scale)] = {**dict(zip(names, values, strict=True)), "off": off}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
