import time

import jinja2
import pytest
import vocabularies as files

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.data import examples
from lfjax.records import Edit, Preference, Record
from lfjax.tokenizers import chat, stop_ids

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
        (r"{{ '\ud800' }}", r"the chat template fails: .*surrogates not allowed"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_line_that_names_file_and_record(with_template, template, message):
    tokenizer = with_template(template)
    with pytest.raises(InputError, match=message) as error:
        examples.prompts_from_records([Record(TALK[:2], ["a"], where="f.jsonl:3")], tokenizer)
    assert str(error.value).startswith("f.jsonl:3: field 'prompt': ") and "\n" not in str(error.value)
    assert "root:" not in str(error.value)


BREACHES = {
    "one call that takes minutes": ("{{ ([[1]] * 250000) | sum(start=[]) | length }}", "takes more than 2 s"),
    "too much memory": ("{{ '{0[}]:{1}}'.format({'}': 'x'}, 3000000000) | length }}", "asks for more than 1024 MB"),
    "the end of its process": (
        "{% set n = namespace(t=()) %}{% for i in range(90000) %}{% set n.t = (n.t,) %}{% endfor %}"
        "{% for i in range(90000) %}{% set n.t = (n.t,) %}{% endfor %}{% set d = {n.t: 1} %}",
        "ends its process (SIGSEGV)",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_template_that_asks_for_too_much_is_one_line_and_the_next_one_is_rendered(with_template, name):
    template, found = BREACHES[name]
    tokenizer = with_template(template)
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        examples.prompts_from_records([Record(TALK[:2], ["a"], where="f.jsonl:3")], tokenizer)
    message = str(error.value)
    assert (
        message.startswith("f.jsonl:3: field 'prompt': ") and f"'chat_template': the chat template {found}" in message
    )
    assert "\n" not in message and time.monotonic() - began < 10
    assert chat.render(with_template("{{ messages[0].content }}"), TALK) == "be the cat"


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


def test_a_long_conversation_is_in_bounds(with_template):
    long = [{"role": "user", "content": "a word " * 2000}, {"role": "assistant", "content": "so it is " * 2000}] * 50
    assert len(chat.render(with_template(files.CHATML), long)) > 1_600_000


def test_a_message_that_holds_the_marks_of_a_rendering_is_refused(with_template):
    with pytest.raises(InputError, match=r"a message holds U\+FDD1, which is no character"):
        chat.render(with_template(files.CHATML), [{"role": "user", "content": "a\ufdd1b"}])


ASSISTANT = "{{ '<|im_start|>assistant\n' }}"
MARKS = {  # where {% generation %} stands beside content + end token
    "newline inside": ASSISTANT + "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
    "header inside": "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}",
    "half of the header inside": "{{ '<|im_start|>' }}{% generation %}{{ 'assistant\n' + m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}",
    "two stretches": ASSISTANT + "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}",
    "a stretch after the last turn": ASSISTANT + "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% if loop.last %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}",
    "no end inside": ASSISTANT + "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
}


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("marks", MARKS)
def test_an_answer_is_what_follows_the_generation_prompt_wherever_the_marks_stand(with_template, marks, eos):
    turn = f"{{% if m.role == 'assistant' %}}{MARKS[marks]}{{% else %}}{ASSISTANT.replace('assistant', 'user')}"
    turn += "{{ m.content }}<|im_end|>\n{% endif %}"
    go = f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
    tokenizer = with_template(f"{{% for m in messages %}}{turn}{{% endfor %}}{go}", eos_token=eos)
    record = Record([{"role": "user", "content": "who sat?"}], ["the cat."], [])
    ((ids, counts),) = examples.sft_documents([record], tokenizer)
    answer = [*tokenizer.encode("the cat."), tokenizer.specials["<|im_end|>"]]
    assert [i for i, learnt in zip(ids, counts, strict=True) if learnt] == answer
    rated = Record(record.prompt, ["the cat.", "a fox"], [Preference(0, 1)])
    assert examples.reward_examples([rated], tokenizer, max_length=99)[0].candidates[0] == ids  # scored at its end


def test_a_template_cannot_tell_what_day_it_is(with_template):
    assert chat.render(with_template("{{ strftime_now('%Y-%m-%d') }}"), TALK) == "2024-07-26"
