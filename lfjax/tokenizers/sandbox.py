"""Chat templates in a sandbox: no files, no imports, no private attributes, and a bound on time and memory.

Every turn of a loop, call, filter, test, operator, comparison and output pays for the values that it takes and makes,
before it makes them where they can be far larger than what it takes. A template that has spent all fails.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, cast

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

WORK = 3_000_000  # what one rendering may spend: values and 64 characters cost 1; it is gone within seconds
_STEP = 10  # what a turn, a call or a filter costs beside its values
_BITS = 10_000  # of an integer
_WIDTHS = {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes", "zfill"}
_PRODUCTS = {"indent", "join", "replace", "sum", "translate"}  # may make as much as one argument times another
_UNBOUNDED = ("pprint", "urlize", "wordwrap")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates; `begin` comes before each rendering."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, marks: tuple[str, str]):
        """`marks` are put around what a template marks with {% generation %}."""
        self.left, self.marks = WORK, marks
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=self.weigh,
        )
        for name in _UNBOUNDED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = self._to_json
        self.globals["raise_exception"] = _fail
        for table in (self.filters, self.tests):
            table.update({name: self.bounded(name, function) for name, function in table.items()})

    def begin(self) -> None:
        """Gives a rendering all that it may spend."""
        self.left = WORK

    def step(self, cost: int) -> None:
        """Pays `cost`; raises TemplateRuntimeError where no more is left."""
        self.left -= cost
        if self.left < 0:
            raise jinja2.exceptions.TemplateRuntimeError("it asks for too much time or memory; simplify it")

    def weigh(self, value: Any, cost: int = 0) -> Any:
        """The value, paid for; an iterator pays as it goes."""
        self.step(cost + self._size(value))
        return self._counted(value) if isinstance(value, Iterator) else value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.step(_STEP)
            yield value

    def _size(self, value: Any) -> int:
        """Values in a value, and its characters / 64; counts no further than what is left."""
        found, rest = 1, [value]
        while rest and found <= self.left:
            one = rest.pop()
            if isinstance(one, jinja2.utils.Namespace):
                one = object.__getattribute__(one, "_Namespace__attrs")
            if isinstance(one, str | bytes):
                found += len(one) >> 6
            elif isinstance(one, int):
                if one.bit_length() > _BITS:
                    raise jinja2.exceptions.TemplateRuntimeError("a number of too many digits; simplify it")
            elif isinstance(one, range):
                found += len(one)
            elif isinstance(one, dict | list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                found += len(one)
                if found <= self.left:
                    rest.extend(one)
                    rest.extend(one.values() if isinstance(one, dict) else ())
        return found

    def _pay(self, name: str, args: list[Any]) -> None:
        """Pays for what a function takes, and for what it can make of that."""
        self.step(_STEP + sum(map(self._size, args)))
        if name in _WIDTHS:
            width = sum(abs(arg) for arg in args if isinstance(arg, int))
            self.step(width * (1 + max((len(arg) for arg in args if isinstance(arg, str)), default=0)) >> 6)
        if name in _PRODUCTS:
            *_, least, most = sorted([0, 0, *(len(arg) if isinstance(arg, str) else self._size(arg) for arg in args)])
            self.step(least * most >> 6)
        if name == "format":
            text = next(str(arg) for arg in args if isinstance(arg, str | bytes))
            if "*" in text or re.search(r"\{[^{}]+\{", text):
                raise jinja2.exceptions.TemplateRuntimeError("a format whose width is an argument; write the width")
            self.step(sum(int(digits) for digits in re.findall(r"\d+", text)) >> 6)
            self.step((text.count("%") + text.count("{")) * sum(map(self._size, args)))

    def bounded(self, name: str, function: Callable) -> Callable:
        """The function, which pays first, and for its result."""

        @functools.wraps(function)  # keeps what it wants passed
        def bounded(*args, **options):
            if name in _PRODUCTS:
                args = [list(self._counted(arg)) if isinstance(arg, Iterator) else arg for arg in args]
            self._pay(name, [*args, *options.values()])
            return self.weigh(function(*args, **options))

        return bounded

    def _to_json(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=self._indent(indent), separators=separators, sort_keys=sort_keys
        )
        found = []
        for part in encoder.iterencode(value):
            self.step(1 + (len(part) >> 6))
            found.append(part)
        return "".join(found)

    def _indent(self, indent: int | str | None) -> int | str | None:
        self.step(indent if isinstance(indent, int) else len(indent or ""))
        return indent

    def call(__self, __context, __obj, *args, **options):
        """Calls what a template calls."""
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # `step` and `weigh`
            return __obj(*args)
        call = functools.partial(super().call, __context, __obj)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | int | list | tuple | dict):
            return __self.bounded(name, lambda _, *args, **options: call(*args, **options))(owner, *args, **options)
        return __self.bounded("" if name in _PRODUCTS | _WIDTHS | {"format"} else name, call)(*args, **options)

    def call_binop(self, context, operator, left, right):
        """An operator of a template."""
        kind = "format" if operator == "%" and isinstance(left, str | bytes) else operator
        self._pay(kind, [left, right])
        numbers = [abs(x) for x in (left, right) if isinstance(x, int)]
        if operator == "*" and len(numbers) == 1:
            self.step(numbers[0] * self._size(right if isinstance(left, int) else left))
        if operator == "**" and len(numbers) == 2 and numbers[0].bit_length() * numbers[1] > _BITS:
            raise jinja2.exceptions.TemplateRuntimeError("a number of too many digits; simplify it")
        return self.weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value):
        """`str.format` of a template."""
        made = super().wrap_str_format(value)
        if made is None:
            return None
        return lambda *args, **options: self.bounded("format", lambda _, *a, **o: made(*a, **o))(
            value.__self__, *args, **options
        )

    def _parse(self, source, name, filename):
        return _Payments(self).visit(super()._parse(source, name, filename))


class _Payments(jinja2.visitor.NodeTransformer):
    """Puts calls of `step` and `weigh` where no method of the sandbox is asked."""

    def __init__(self, sandbox: Sandbox):
        self.sandbox = sandbox

    def _call(self, name: str, at, *args):
        call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), list(args), [], None, None)
        return call.set_lineno(at.lineno).set_environment(self.sandbox)

    def _cost(self, node):
        texts = sum(len(text.data) for text in node.find_all(jinja2.nodes.TemplateData))
        inner = sum(1 for _ in node.find_all(jinja2.nodes.Node))
        return jinja2.nodes.Const(_STEP + (inner >> 3) + (texts >> 6))

    def visit_body(self, node):
        """What may run often: it pays for each time."""
        cost = self._cost(node)
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(self._call("step", node, cost)).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_body

    def visit_For(self, node):
        """A loop pays for its turns, and for those that its condition leaves out."""
        cost = self._cost(node)
        self.visit_body(node)
        if node.test is not None:
            node.test = self._call("weigh", node, node.test, cost)
        return node

    def visit_Compare(self, node):
        """Values that are compared."""
        self.generic_visit(node)
        node.expr = self._call("weigh", node, node.expr)
        for operand in node.ops:
            operand.expr = self._call("weigh", node, operand.expr)
        return node

    def visit_Concat(self, node):
        """Values that `~` puts together."""
        self.generic_visit(node)
        node.nodes = [self._call("weigh", node, value) for value in node.nodes]
        return node

    def visit_Getitem(self, node):
        """What a slice is taken of."""
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice):
            node.node = self._call("weigh", node, node.node)
        return node


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: what the assistant says, kept between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return caller().join(cast(Sandbox, self.environment).marks)


def _fail(message):
    raise jinja2.exceptions.TemplateError(message)
