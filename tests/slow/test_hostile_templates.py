"""Chat templates that ask for too much or reach out: each is one line, or harmless text, within seconds."""

import collections
import pathlib
import sys
import time

import pytest

from lfjax import tokenizers
from lfjax.config import InputError
from lfjax.tokenizers import chat

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tokenizers"))
import vocabularies as files

pytestmark = pytest.mark.slow
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def grown(start: str, times: int, use: str) -> str:
    """`use` of a text n.s that was doubled `times` times."""
    loop = f"{{% for i in range({times}) %}}{{% set n.s = n.s ~ n.s %}}{{% endfor %}}"
    return f"{{% set n = namespace(s={start}) %}}{loop}{{{{ {use} }}}}"


def nested(new: str, times: int, use: str) -> str:
    """`use` of a value n.t that was put into itself `times` times, by loops of at most 90,000 turns."""
    loop = f"{{% for i in range({times // 2}) %}}{{% set n.t = {new} %}}{{% endfor %}}"
    return f"{{% set n = namespace(t=()) %}}{loop * 2}{use}"


TIME = {
    "loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "filtered": "{% set r = range(1, 99999) %}{% for i in r %}{% for j in r if not j %}{% endfor %}{% endfor %}",
    "lists": "{% for i in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "lazy": "{% for i in range(99999) %}{% set x = range(99999) | select | map('string') | list %}{% endfor %}",
    "recursive": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "power": "{{ 10 ** 100000000 > 1 }}",
    "powers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "hex": "{{ ('f' * 9999999) | int(0, 16) // 3 }}",
    "slices": "{% set x = range(99999) | list %}{% for i in x %}{% set y = x[1:] %}{% endfor %}",
    "equal": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "trim": grown("'a' * 64", 15, "n.s | trim(n.s | replace('a', 'b') ~ 'a') | length"),
    "sum": "{{ ([[1]] * 250000) | sum(start=[]) | length }}",
    "many nodes": "{{ x }}" * 300_000,
    "hashes": "{{ [" + ",".join(str(i * (2**61 - 1)) for i in range(1, 40000)) + "] | unique | list | length }}",
}
MEMORY = {
    "text": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "list times": "{{ 10 ** 10 * [1] }}",
    "double": grown("'a'", 99, "1"),
    "shared": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n }}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (2000000000, 1) }}",
    "format": "{{ '{:2000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, '2000000000') }}",
    "format bracket": "{{ '{0[}]:{1}}'.format({'}': 'x'}, 3000000000) | length }}",
    "format fields": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "bytes": "{{ '%2000000000d'.encode() % 1 }}",
    "date": "{{ strftime_now('%2000000000d') }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "indent": "{{ ('\n' * 99999) | indent(99999, blank=true) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "replace": "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
    "join": "{{ range(99999) | join('b' * 999999) }}",
    "json": "{{ [[[1]]] | tojson(indent=10 ** 10) }}",
    "characters": grown("'\u4e01\u4e02\u4e03\u4e04' * 16", 20, "n.s | list | length"),
    "split": grown("'\u4e01 ' * 32", 20, "n.s.split() | length"),
    "lipsum": "{{ lipsum(10 ** 7) }}",
}
DEEP = {
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "sums": "{{ " + "+".join(["1"] * 20000) + " }}",
    "ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "tuple as a key": nested("(n.t,)", 180_000, "{% set d = {n.t: 1} %}x"),
    "list": nested("[n.t]", 180_000, "{{ n.t }}"),
    "list as json": nested("[n.t]", 180_000, "{{ n.t | tojson }}"),
}
REACH = {
    name: "{{ " + name + " }}"
    for name in (
        "''.__class__.__mro__[1].__subclasses__()",
        "''|attr('__class__')|attr('__mro__')",
        "lipsum.__globals__['os'].popen('id').read()",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "namespace.__init__.__globals__",
        "'{0.__class__}'.format(messages)",
        "'{a.__class__}'.format_map({'a': 1})",
        "('{0.__class__}' | escape).format(1)",
        "[messages] | map(attribute='__class__') | list",
        "(messages | map('length')).gi_frame.f_globals",
        "raise_exception.__globals__",
        "strftime_now.__closure__",
        "messages.append(1)",
        "messages[0].update({'a': 1})",
        "self._TemplateReference__context",
        "environment.marks",
    )
} | {f"{tag} a file": f"{{% {tag} '/etc/passwd' %}}" for tag in ("include", "extends")}
CHEAP = {"sums", "date", "lipsum"}  # what one system or another does within the bounds
KINDS = {"time": TIME, "memory": MEMORY, "depth": DEEP, "reach": REACH}


def test_hostile_templates_are_one_line_or_harmless_within_seconds(tmp_path, capsys):
    table = collections.Counter()
    for kind, templates in KINDS.items():
        for name, template in templates.items():
            tokenizer = tokenizers.load(files.write(tmp_path / "tokenizer", chat_template=template))
            began = time.monotonic()
            try:
                text = chat.render(tokenizer, TALK)
                outcome = "harmless"
            except InputError as error:
                outcome, text = "refused", str(error)
                assert "chat template" in text and "\n" not in text, (kind, name)
            assert time.monotonic() - began < 10, (kind, name)
            assert len(text) < 1 << 26 and not any(word in text for word in ("root:", "<class", "uid=")), (kind, name)
            assert kind == "reach" or outcome == "refused" or name in CHEAP, (kind, name, text[:99])
            table[kind, outcome] += 1
    with capsys.disabled():
        print()
        for (kind, outcome), count in sorted(table.items()):
            print(f"chat templates, {kind}: {count} {outcome}")
