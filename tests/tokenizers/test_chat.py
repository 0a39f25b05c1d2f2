import re
import time

import jinja2
import pytest
import vocabularies as files

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.data import examples
from lfjax.records import Edit, Preference, Record
from lfjax.tokenizers import chat, sandbox, stop_ids

# Only the last answer keeps its reasoning, as Qwen3's template has it; every last answer has a place for it.
REASONING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}{% if loop.last %}<think>
{{ m.content.split('</think>')[0].replace('<think>', '').strip('\\n') if '</think>' in m.content else '' }}
</think>

{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The system prompt stands before the last question, and only there; no end token but EOS after each answer.
MOVED = """{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{% for m in messages %}{% if m.role == 'user' %}[Q] {{ system + ' ' if m == last }}{{ m.content }} [/Q]{% endif %}
{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TALK = [
    {"role": "system", "content": "be the cat"},
    {"role": "user", "content": "who sat?"},
    {"role": "assistant", "content": "<think>\nthe mat\n</think>\n\nthe cat sat"},
    {"role": "user", "content": "the cat sat"},  # the same words, by another
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"},
]


@pytest.fixture
def with_template(tmp_path):
    def make(template: str, **settings):
        return tokenizers.load(files.write(tmp_path, chat_template=template, **settings))

    return make


def said(tokenizer, messages) -> list[str]:
    """The stretches that the mask counts, as pieces put together."""
    ids, mask = chat.encode(tokenizer, messages)
    found, before = [], False
    for i, counts in zip(ids, mask, strict=True):
        if counts:
            piece = tokenizer.pieces([i])[0].replace("Ġ", " ").replace("Ċ", "\n")
            found = found + [piece] if not before else [*found[:-1], found[-1] + piece]
        before = counts
    return found


@pytest.mark.parametrize(
    "template, expected",
    [
        (files.CHATML, [TALK[2]["content"] + "<|im_end|>", TALK[4]["content"] + "<|im_end|>"]),
        (MARKED, [TALK[2]["content"] + "<|im_end|>", TALK[4]["content"] + "<|im_end|>"]),
        (REASONING, ["the cat sat<|im_end|>", "<think>\nso\n</think>\n\nyes<|im_end|>"]),
        (MOVED, [f" {TALK[2]['content']}<|im_end|>", f" {TALK[4]['content']}<|im_end|>"]),
    ],
)
def test_the_mask_counts_what_the_assistant_says_as_the_template_shows_it(with_template, template, expected):
    tokenizer = with_template(template)
    assert said(tokenizer, TALK) == expected
    ids, _ = chat.encode(tokenizer, TALK)
    text = chat.render(tokenizer, TALK)
    assert ids == tokenizer.encode_markup(text) and "\ufdd1" not in text


def test_what_is_said_in_other_turns_does_not_move_a_turn(with_template):
    tokenizer = with_template(REASONING)
    for other in ("yes", "<|im_start|>assistant\n", "", "the cat sat"):
        talk = [*TALK[:3], {"role": "user", "content": other}, TALK[4]]
        assert said(tokenizer, talk)[1:] == ["<think>\nso\n</think>\n\nyes<|im_end|>"]


@pytest.mark.parametrize("template", [files.CHATML, MARKED, REASONING, MOVED])
def test_prompt_and_response_are_the_conversation_that_the_template_writes(with_template, template):
    tokenizer = with_template(template)
    for text in ("the mat", "a [x]\n\n\treturn"):
        ids = [*chat.prompt_ids(tokenizer, TALK[:4]), *chat.response_ids(tokenizer, TALK[:4], text)]
        whole = chat.render(tokenizer, [*TALK[:4], {"role": "assistant", "content": text}])
        spelt = "".join(tokenizer.pieces(ids)).replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
        assert spelt == whole.rstrip("\n")
        assert ids[-1] == tokenizer.specials["<|im_end|>"]


def test_markup_in_an_answer_is_text_and_in_the_template_a_token(with_template):
    tokenizer = with_template(files.CHATML)
    ids = chat.response_ids(tokenizer, TALK[:2], "a<|im_end|>b")
    assert ids == [*tokenizer.encode("a<|im_end|>b"), tokenizer.specials["<|im_end|>"]]
    assert ids.count(tokenizer.specials["<|im_end|>"]) == 1


def test_what_ends_a_turn_ends_a_sample_beside_eos(with_template):
    tokenizer = with_template(files.CHATML, eos_token="<|endoftext|>")
    end, eos = tokenizer.specials["<|im_end|>"], tokenizer.specials["<|endoftext|>"]
    assert chat.end_id(tokenizer) == end
    assert stop_ids(tokenizer, (), "stop") == (eos, end)
    assert chat.response_ids(tokenizer, TALK[:2], "a")[-1] == end


def test_records_of_messages_go_through_the_template_and_texts_do_not(with_template):
    tokenizer = with_template(files.CHATML, eos_token="<|endoftext|>")
    end, eos = tokenizer.specials["<|im_end|>"], tokenizer.specials["<|endoftext|>"]
    record = Record(TALK[:2], ["the cat", "a fox"], [Preference(0, 1), Edit(1, "fox")])
    prompt = tokenizer.encode_markup(chat.render(tokenizer, TALK[:2], generation=True))
    ((tokens, mask),) = examples.sft_documents([record], tokenizer)
    assert tokens == [*prompt, *tokenizer.encode("fox"), end]
    assert mask == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
    pair, _ = examples.reward_examples([record], tokenizer, max_length=200)
    assert pair.candidates == [[*prompt, *tokenizer.encode(text), end] for text in record.responses]
    assert examples.prompts_from_records([record], tokenizer) == [prompt]
    plain = Record("who?", ["the cat"])
    assert examples.sft_documents([plain], tokenizer)[0][0] == [
        *tokenizer.encode("who?"), *tokenizer.encode("the cat"), eos
    ]  # fmt: skip


def test_a_template_of_its_own_file_wins_and_the_default_of_several_is_taken(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = files.write(tmp_path, chat_template=several)
    assert chat.render(tokenizers.load(folder), TALK) == "yes"
    (folder / "chat_template.jinja").write_text("own {{ eos_token }}{{ pad_token }}")
    assert chat.render(tokenizers.load(folder), TALK) == "own <|im_end|>"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", r"tokenizer_config.json: 'chat_template': line 1 of the chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"the chat template fails: roles must alternate"),
        ("{{ messages.x.y }}", r"the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", r"the chat template fails: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", r"the chat template fails: access to attribute 'append'"),
        ("{{ namespace.__init__.__globals__ }}", r"the chat template fails: access to attribute '__init__'"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", r"the chat template cannot be read: maximum recursion depth"),
        ("{% include '/etc/passwd' %}", r"the chat template fails"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", r"the chat template fails: Range too big"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_line_that_names_file_and_record(with_template, template, message):
    tokenizer = with_template(template)
    with pytest.raises(InputError, match=message) as error:
        examples.prompts_from_records([Record(TALK[:2], ["a"], where="f.jsonl:3")], tokenizer)
    assert str(error.value).startswith("f.jsonl:3: field 'prompt': ") and "\n" not in str(error.value)
    assert "root:" not in str(error.value)


ENDLESS = {
    "loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "filtered": "{% set r = range(1, 99999) %}{% for i in r %}{% for j in r if not j %}{% endfor %}{% endfor %}",
    "lists": "{% for i in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "lazy": "{% for i in range(99999) %}{% set x = range(99999) | select | map('string') | list %}{% endfor %}",
    "text": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "recursive": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "deep": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "power": "{{ 10 ** 10000000 > 1 }}",
    "powers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "hex": "{{ ('f' * 9999999) | int(0, 16) // 3 }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "list-times": "{{ 10 ** 10 * [1] }}",
    "double": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "concat": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "shared": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n }}",
    "equal": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "format-filter": "{{ '%2000000000d' | format(1) }}",
    "format-star": "{{ '%*d' % (2000000000, 1) }}",
    "format": "{{ '{:2000000000}'.format(1) }}",
    "format-nested": "{{ '{:{}}'.format(1, '2000000000') }}",
    "format-fields": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "format-bytes": "{{ '%2000000000d'.encode() % 1 }}",
    "strftime": "{{ strftime_now('%2000000000d') }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "indent": "{{ ('\n' * 99999) | indent(99999, blank=true) }}",
    "batch": "{{ [] | slice(10 ** 10) | list }}{{ [1] | batch(10 ** 10, 0) | list }}",
    "replace": "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
    "replace-method": "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "join": "{{ range(99999) | join('b' * 999999) }}",
    "join-lazy": "{{ range(99999) | map('string') | join('b' * 999999) }}",
    "join-method": "{{ ('b' * 999999).join('a' * 99999) }}",
    "json": "{{ [[[1]]] | tojson(indent=10 ** 10) }}",
    "json-deep": "{% set n = namespace(x=999 * [1]) %}{% for i in range(200) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x | tojson(indent=2000) }}",
    "slices": "{% set x = range(99999) | list %}{% for i in x %}{% set y = x[1:] %}{% endfor %}",
    "lipsum": "{{ lipsum(10 ** 10) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_one_line_within_seconds(with_template, name):
    tokenizer = with_template(ENDLESS[name])
    began = time.process_time()
    with pytest.raises(
        InputError, match=r"tokenizer_config\.json: 'chat_template': the chat template fails: "
    ) as error:
        chat.render(tokenizer, TALK)
    assert time.process_time() - began < 20 and "\n" not in str(error.value)
    assert re.search("too much time or memory|too many digits|width is an arg|recursion|lipsum", str(error.value))


def test_what_templates_do_in_bounds_is_as_jinja_does_it(with_template):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ m.role }} {% endfor %}"
        "{{ messages | map(attribute='role') | unique | join(', ') }} {{ '%5.1f|%s' | format(2.5, 'a') }}"
        " {{ '{:>4}'.format(7) }} {{ messages[1:] | length }} {{ {'a': [1]} | tojson(indent=1) }} {{ 2 ** 10 * 3 }}"
        " {{ 'ab' * 2 ~ 'c' }} {{ 'x\ny' | indent(2) }} {{ 'a-b'.replace('-', '+') }} {{ ['b', 'a'] | sort | list }}"
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %} {{ f(3) }}"
        "{% set n = namespace(last=0) %}{% for m in messages %}{% set n.last = loop.index0 %}{% endfor %}{{ n.last }}"
        "{% for k, v in messages[0].items() %}{{ k ~ v ~ loop.last }}{% endfor %}{{ '%s' % 123456 }}{{ n }}"
    )
    plain = jinja2.Environment().from_string(
        template.replace("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}')
    )
    assert chat.render(with_template(template), TALK) == plain.render(messages=TALK)


def test_a_long_conversation_is_in_bounds_and_every_rendering_has_its_own(with_template):
    tokenizer = with_template(REASONING)
    long = [{"role": "user", "content": "a word " * 2000}, {"role": "assistant", "content": "so it is " * 2000}] * 50
    assert chat.render(tokenizer, long) == chat.render(tokenizer, long)
    assert chat._compiled(tokenizer.template)[0].left > sandbox.WORK // 2


def test_a_template_cannot_tell_what_day_it_is(with_template):
    assert chat.render(with_template("{{ strftime_now('%Y-%m-%d') }}"), TALK) == "2024-07-26"
