"""Chat conversations a second through a chat template, rendered in its bounded child, and the vocabulary.

python benchmarks/chats.py [FOLDER]: of six turns with the tokenizer of a model folder, by default a small one with
ChatML. Prints a table, and JSON as its last line.
"""

import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "tokenizers"))
import vocabularies

from lfjax import tokenizers
from lfjax.tokenizers import chat

SECONDS = 5.0


def conversation(number: int) -> list[dict[str, str]]:
    said = "the cat sat on the mat. " * 8
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{number}.{i}: {said}"} for i in range(6)]


def rate(work) -> float:
    work(conversation(-1))  # what is set up at the first use
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        work(conversation(count))
        count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        own = pathlib.Path(folder)
        if len(sys.argv) < 2:
            vocabularies.write(own, chat_template=vocabularies.CHATML)
        tokenizer = tokenizers.load(sys.argv[1] if len(sys.argv) > 1 else own)

    def answer(messages):
        chat.prompt_ids(tokenizer, messages[:-1])
        chat.response_ids(tokenizer, messages[:-1], messages[-1]["content"])

    found = {
        "a whole conversation, with the mask of its answers": rate(lambda messages: chat.encode(tokenizer, messages)),
        "its prompt and the last answer": rate(answer),
    }
    for name, value in found.items():
        print(f"{name}: {value:,.0f} a second ({100_000 / value:,.0f} s for 100,000)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
