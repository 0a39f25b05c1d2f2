"""`lfjax methods`: what every stage is, as its declaration says it; docs/methods.md is made by it."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping

from lfjax import config as configs
from lfjax.config import InputError
from lfjax.modules import resolve
from lfjax.run import sections
from lfjax.run.stage import Stage

HEAD = """# Methods

Every stage that a config can name in `config.stages`; `lfjax methods NAME` prints its keys with their defaults. Made by
`lfjax methods --markdown > docs/methods.md`.

"""


def overview(stages: Mapping[str, Stage]) -> str:
    """A paragraph a stage."""
    return "\n".join(_paragraph(stage) for stage in stages.values())


def _paragraph(stage: Stage) -> str:
    rows = "".join(f"  {name:<12} {text}\n" for name, text in facts(stage).items() if text)
    return f"{stage.name}: {stage.summary}\n{rows}"


def markdown(stages: Mapping[str, Stage]) -> str:
    """docs/methods.md: the same as a section a stage, with its keys."""
    parts = []
    for stage in stages.values():
        rows = "".join(f"| {name} | {text} |\n" for name, text in facts(stage).items() if text)
        listed = "".join(f"{line}\n" for line in keys(stage))
        parts.append(f"## {stage.name}\n\n{stage.summary}.\n\n| | |\n|---|---|\n{rows}\n```text\n{listed}```\n")
    return HEAD + "\n".join(parts)


def facts(stage: Stage) -> dict[str, str]:
    """What it learns from, its files, the losses in them, where it was published, and a config that runs it."""
    files = [step.path.partition(":")[0].replace(".", "/") + ".py" for step in stage.steps.values()]
    return {
        "learns from": stage.learns_from,
        "makes": stage.makes,
        "steps": ", ".join(files),
        "losses": ", ".join(losses(stage)),
        "source": stage.source,
        "config": _config_with(stage.name),
    }


def losses(stage: Stage) -> list[str]:
    """The functions of lfjax.losses that its steps call, as "module.function"."""
    found = []
    for step in stage.steps.values():
        function = resolve(f"config.steps.{stage.name}", step.path)
        found += _losses_in(ast.parse(inspect.getsource(inspect.getmodule(function) or function)))
    return list(dict.fromkeys(found))


def _losses_in(tree: ast.AST) -> Iterator[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules = {alias.name for node in imports if node.module == "lfjax.losses" for alias in node.names}
    for node in imports:
        if str(node.module).startswith("lfjax.losses."):
            names = (alias.name for alias in node.names if alias.name[0].islower())
            yield from (f"{str(node.module).removeprefix('lfjax.losses.')}.{name}" for name in names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = getattr(node.func.value, "id", None)
            if module in modules and re.search("loss|penalty|stats", node.func.attr):
                yield f"{module}.{node.func.attr}"


def _config_with(stage: str) -> str:
    """The first config that comes with lfjax and runs the stage; "" where none does."""
    for name, path in configs.shipped().items():
        if stage in configs.load(path).stages:
            return f"configs/{name}.py"
    return ""


def of(stages: Mapping[str, Stage], name: str) -> str:
    """One stage: its paragraph, and each of its keys with default and comment.

    Raises:
      InputError: there is no such stage; with the nearest name.
    """
    if name not in stages:
        near = difflib.get_close_matches(name, stages, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(stages)}"
        raise InputError(f"lfjax methods: no stage {name!r}; {hint}")
    return _paragraph(stages[name]) + "\n" + "".join(f"{line}\n" for line in keys(stages[name]))


def keys(stage: Stage) -> list[str]:
    """ "config.section.key = default  # comment" of every key."""
    said = (comments(sections.training) if "optim" in stage.section() else {}) | comments(
        getattr(stage.section, "func", stage.section)
    )
    shared = comments(configs.shared_sections)
    lines = []
    for key, value in configs.flatten(configs.to_plain(stage.section()), f"config.{stage.name}").items():
        parts = key.split(".")[2:]
        if value is None and (parts[0].endswith("optim") or parts[0] == "sampling"):
            continue  # as the section of that name has it
        comment = said.get(".".join(parts)) or shared.get(key.removeprefix("config."))
        lines.append(f"{key} = {value!r}" + (f"  # {comment}" if comment else ""))
    return lines


def comments(function: Callable) -> dict[str, str]:
    """Key -> the comment behind it, of the keys that a function which makes a section writes down."""
    source = textwrap.dedent(inspect.getsource(function))
    try:
        tree = ast.parse(source if source.startswith(("def", "@")) else f"f({source}\n)")  # else a lambda's line
    except SyntaxError:
        return {}
    behind = {
        token.start[0]: token.string.removeprefix("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = _name(child)
            if name and child.lineno in behind:  # type: ignore[attr-defined]
                found[prefix + name] = behind[child.lineno]  # type: ignore[attr-defined]
            visit(child, f"{prefix}{name}." if name else prefix)
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.lineno in behind:
                    found[prefix + str(key.value)] = behind[key.lineno]

    visit(tree, "")
    return found


def _name(node: ast.AST) -> str:
    """Of a keyword, or of what is set, as `step = section(...)`."""
    if isinstance(node, ast.keyword):
        return "" if node.arg in (None, "section") else str(node.arg)
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return str(getattr(target, "id", getattr(target, "attr", "")))
