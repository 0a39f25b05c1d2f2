"""Templates of our own, each with a peculiarity of a published family, beside transformers' apply_chat_template."""

import pytest
import vocabularies as files

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.data import examples
from lfjax.records import Record

transformers = pytest.importorskip("transformers", reason="templates are not compared with transformers' renderings")

LOOP, END = "{% for m in messages %}", "{% endfor %}"
HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
OTHERS = HEADER + "{{ m.content }}<|im_end|>\n"
GO = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def turns(assistant: str, others: str = OTHERS, go: str = GO) -> str:
    """A template that writes the assistant's messages so, and the others so."""
    return f"{LOOP}{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{others}{{% endif %}}{END}{go}"


LAST_KEEPS = """{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>
{{ parts[0].replace('<think>', '').strip('\\n') if parts | length > 1 else '' }}
</think>

{{ parts[-1].lstrip('\\n') }}{% else %}{{ parts[-1].lstrip('\\n') }}{% endif %}<|im_end|>
"""
FAMILIES = {
    "ChatML: a newline behind the end token": turns(OTHERS),
    "Llama 3: BOS, trimmed content, no newline": "{{ bos_token }}"
    + turns(*["{{ '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}"] * 2).replace(GO, "")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}",
    "Gemma: trimmed content, another name, no system role": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + turns(
        "<|im_start|>model\n{{ m.content | trim }}<|im_end|>\n",
        go="{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    ),
    "Mistral: no generation prompt, a space, EOS": turns(
        " {{ m.content }}{{ eos_token }}", "{{ '[INST] ' + m.content + ' [/INST]' }}", ""
    ),
    "Vicuna: no end token but at EOS, plain headers": turns(
        "{{ ' ' + m.content }}{{ eos_token }}", "USER: {{ m.content }} ASSISTANT:", ""
    ),
    "GLM: nothing at all behind the answer": turns("<|im_start|>assistant\n{{ m.content }}"),
    "Qwen 3: the last turn alone keeps its thought": turns("<|im_start|>assistant\n" + LAST_KEEPS),
    "Qwen 3.5: an empty thought in the generation prompt": turns(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n",
        go="{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    ),
    "DeepSeek R1: an open thought in the generation prompt, answers without any": turns(
        "<|im_start|>assistant\n{{ m.content.split('</think>') | last }}<|im_end|>",
        go="{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ),
    "Nemotron 3: an open thought in the generation prompt, an empty one where none is given": turns(
        "<|im_start|>assistant\n{{ '' if '</think>' in m.content else '<think></think>' }}{{ m.content }}<|im_end|>\n",
        go="{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    ),
    "thoughts left out": turns("<|im_start|>assistant\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"),
    "gpt-oss: a channel before the answer, another end for the last turn, the header inside the mark": turns(
        "{% generation %}<|im_start|>assistant<|final|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endgeneration %}",
        go="{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    ),
    "Phi 3: EOS behind the whole conversation, in a mark of its own": turns(
        HEADER + "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}",
        go=GO.replace("{% endif %}", "{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"),
    ),
    "Hermes: results of tools in a turn of the user's, tools not given": "{% if tools is not none %}tools{% endif %}"
    + turns(
        HEADER + "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}<|im_end|>\n",
        "{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
        "{% else %}" + OTHERS + "{% endif %}",
    ),
    "an end token before the answer": turns("<|im_start|>assistant\n<|im_end|>{{ m.content }}<|im_end|>\n"),
}
ASK = {"role": "user", "content": "who sat?"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
TALKS = {
    "plain": [ASK],
    "system": [{"role": "system", "content": "be the cat"}, ASK],
    "turns": [ASK, {"role": "assistant", "content": "<think>\nthe mat\n</think>\n\nthe cat"}, ASK],
    "tool": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "a fox"}],
}
ANSWERS = {"plain": "the cat sat.", "spaced": "  the cat\n\n", "thought": "<think>\nso\n</think>\n\nthe cat"}
OPEN, LOST = "generation prompt ends in '<think>", "leaves out a part of the answer"
REFUSED = {  # by the start of the template's name, and the answer
    ("DeepSeek", "plain"): OPEN,
    ("DeepSeek", "spaced"): OPEN,
    ("DeepSeek", "thought"): OPEN,
    ("Nemotron", "plain"): "generation prompt ends in '\\n', where this answer begins with '</think>",
    ("Nemotron", "spaced"): "generation prompt ends in '\\n', where this answer begins with '</think>",
    ("thoughts left", "thought"): LOST,
    ("an end token", "plain"): "at which sampling ends, before the answer",
    ("an end token", "spaced"): "at which sampling ends, before the answer",
    ("an end token", "thought"): "at which sampling ends, before the answer",
}
SPECIAL = [*files.SPECIAL, "<|return|>", "<|final|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_what_transformers_writes_behind_the_generation_prompt_or_the_record_is_refused(family, tmp_path):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    folder = files.write(tmp_path, files.byte_level(special=SPECIAL), chat_template=FAMILIES[family], **settings)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    ends = ("<|return|>",) if family.startswith("gpt-oss") else ("<|im_end|>",)
    for talk in TALKS.values():
        for kind, answer in ANSWERS.items():
            record = Record(talk, [answer], [], where="f.jsonl:3")
            if talk[0]["role"] == "system" and family.startswith("Gemma"):
                with pytest.raises(InputError, match=r"f\.jsonl:3: field 'prompt': .* System role not supported"):
                    examples.sft_documents([record], ours)
                continue
            expected = next((REFUSED[key] for key in REFUSED if family.startswith(key[0]) and key[1] == kind), None)
            if expected is not None:
                with pytest.raises(InputError) as error:
                    examples.sft_documents([record], ours)
                assert str(error.value).startswith("f.jsonl:3: field 'responses': ") and expected in str(error.value)
                continue
            ((ids, counts),) = examples.sft_documents([record], ours)
            prompt = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            whole = theirs.apply_chat_template([*talk, {"role": "assistant", "content": answer}], tokenize=False)
            assert ids[: len(prompt)] == prompt and counts == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
            head = theirs.decode(prompt)
            assert whole.startswith(head)
            stop = min(
                (whole.find(end, len(head)) + len(end) for end in ends if end in whole[len(head) :]), default=None
            )
            learnt = whole[len(head) : stop] if stop else whole[len(head) :] + "<|im_end|>"
            assert theirs.decode(ids[len(prompt) :]) == learnt
