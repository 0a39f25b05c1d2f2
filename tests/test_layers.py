"""The import layers: a module of lfjax imports only from its own line and the lines above it."""

import ast
import pathlib

import lfjax

LAYERS = """
types  masking  files  config  modules  cache  doctor  signals  terminal  bounded  bounded_child
losses  rl  models  optim  records  sharding
state  sampling  tokenizers
data  feedback  interop
rewards
steps
checkpoint  metrics  trackers  report
run
stages
methods
cli
__main__
"""
LAYER = {name: height for height, line in enumerate(LAYERS.split("\n")) for name in line.split()}
EXCEPTION = ("config.py", "stages")  # one line in a function: a config is made of the sections of all stages
FORBIDDEN = {"steps": {"sharding", "data", "interop"}}
HEAVY = {"tensorflow_datasets", "sklearn", "grain", "tensorboardX", "wandb"}
ROOT = pathlib.Path(lfjax.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name != "__init__.py")


def imported(nodes):
    """Full names of the modules (or names in them) that import statements ask for."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_modules_import_only_from_their_own_layer_and_below():
    wrong = []
    for path in FILES:
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        used = {n.split(".")[1] for n in imported(ast.walk(ast.parse(path.read_text()))) if n.startswith("lfjax.")}
        allowed = {name for name, height in LAYER.items() if height <= LAYER[part]} - FORBIDDEN.get(part, set())
        wrong += [f"{path.relative_to(ROOT)} imports lfjax.{name}" for name in sorted(used - allowed - {part})]
    assert wrong == ["{} imports lfjax.{}".format(*EXCEPTION)], "\n".join(wrong)
    source = ast.parse((ROOT / "config.py").read_text())
    assert not [name for name in imported(source.body) if name.startswith("lfjax.stages")]
    assert [name for name in imported(ast.walk(source)) if name.startswith("lfjax.stages")] == ["lfjax.stages"]


def test_only_models_import_linen():
    wrong = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.relative_to(ROOT).parts[0] != "models"
        and any(n.startswith("flax.linen") for n in imported(ast.walk(ast.parse(path.read_text()))))
    ]
    assert not wrong, wrong


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in imported(ast.parse(path.read_text()).body)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, wrong
