"""Imports go one way, nothing unsafe is called, and files stay small: read from the syntax trees of all packages.

Layers are those of the design. A module may import its own layer and those below it. Entry points may import anything
when a command runs, which is inside a function; torch is not imported at the top of what must start fast.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("megawrap", "data_tools", "conversion", "launch")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 600

GROUND = {"megawrap", "megawrap.errors", "megawrap.io", "megawrap.config", "megawrap.device", "megawrap.parallel"}
# These start commands by name, when they are chosen, and import nothing but ground before that: every command may use them.
STARTERS = {"megawrap.cli", "megawrap.ranks", "megawrap.arguments"}
GROUND |= STARTERS
# From the top; ground is below all.
LAYERS = ["launch", "conversion", "megawrap.training", "megawrap.evaluation", "megawrap.objectives", "megawrap.families", "megawrap.models",
          "megawrap.data"]  # fmt: skip
SAME_HEIGHT = {"megawrap.checkpoint": "megawrap.objectives"}
ENTRY_POINTS = {"megawrap.preprocess", "megawrap.finetune", "megawrap.data_plan", "megawrap.completion", "megawrap.data_inspect",
                "megawrap.data_verify", "megawrap.data_merge", "megawrap.data_cut"}  # fmt: skip
DATA_TOOLS_MAY = {"megawrap.data", *GROUND}
CONVERSION_MAY = {"megawrap.families", "megawrap.models", "megawrap.checkpoint", "megawrap.data", *GROUND}

HEAVY = ("torch", "megatron", "transformers", "safetensors.torch")
STARTS_FAST = ("megawrap.errors", "megawrap.config", "megawrap.io", "megawrap.cli", "megawrap.arguments", "megawrap.preprocess",
               "megawrap.data_plan", "megawrap.data_inspect", "megawrap.data_verify", "megawrap.data_merge",
               "megawrap.data_cut", "megawrap.ranks", "megawrap.data", "launch", "data_tools")  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(name: str, of: object) -> str | None:
    """The longest member of `of` that is `name` or a package above it."""
    found = [one for one in of if name == one or name.startswith(one + ".")]  # type: ignore[attr-defined]
    return max(found, key=len, default=None)


def imports(tree: ast.AST, *, top_level: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of imports; with top_level only those that run when the module is imported."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def layer(name: str) -> str | None:
    found = part_of(name, [*LAYERS, *SAME_HEIGHT, "data_tools", *ENTRY_POINTS])
    return SAME_HEIGHT.get(found or "", found)


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """Imports of this module that point upwards."""
    own = layer(name)
    found = []
    for target, line in imports(tree, top_level=name in ENTRY_POINTS | STARTERS):
        if target.split(".")[0] not in PACKAGES or target in PACKAGES:
            continue
        theirs = layer(target)
        if own == "launch" or (own in ENTRY_POINTS and theirs in ENTRY_POINTS):
            allowed = True
        elif own == "data_tools":
            allowed = theirs == "data_tools" or part_of(target, DATA_TOOLS_MAY - {"megawrap"}) is not None
        elif own == "conversion":
            allowed = theirs == "conversion" or part_of(target, CONVERSION_MAY - {"megawrap"}) is not None
        elif own is None:  # ground
            allowed = part_of(target, GROUND - {"megawrap"}) is not None
        elif own in ENTRY_POINTS:
            allowed = theirs not in ("launch", "conversion", "megawrap.training")
        else:
            below = theirs in LAYERS and LAYERS.index(theirs) >= LAYERS.index(own)
            allowed = below or (theirs is None and part_of(target, GROUND - {"megawrap"}) is not None)
        if not allowed:
            found.append(f"{name}:{line} imports {target}")
    return found


def unsafe_calls(name: str, tree: ast.AST) -> list[str]:
    """Calls that run code from a file, or a string as code or command."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = (
                called in {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
                           "marshal.loads", "shelve.open", "joblib.load", "cloudpickle.load", "cloudpickle.loads"}
                or ((called.endswith("np.load") or called == "numpy.load") and keywords.get("allow_pickle") == "True")
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or keywords.get("shell") == "True"
                or keywords.get("trust_remote_code") == "True"
            )  # fmt: skip
            if unsafe:
                found.append(f"{name}:{node.lineno} calls {called}")
    return found


def heavy_imports(name: str, tree: ast.AST) -> list[str]:
    """Heavy imports at the top of a module that must start fast."""
    if part_of(name, STARTS_FAST) is None:
        return []
    return [f"{name}:{line} imports {target}" for target, line in imports(tree, top_level=True) if part_of(target, HEAVY) is not None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_module(path: Path) -> None:
    text = path.read_text()
    tree, name = ast.parse(text), module_name(path)
    assert text.count("\n") <= MAX_LINES, f"{path} has {text.count(chr(10))} lines; {MAX_LINES} is the limit"
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    assert not wrong_imports(name, tree)
    assert not unsafe_calls(name, tree)
    assert not heavy_imports(name, tree)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("megawrap.data.rows", "from megawrap.training import loop"),
        ("megawrap.models.gpt", "def f():\n    import megawrap.checkpoint.store"),
        ("megawrap.objectives.sft", "from megawrap.evaluation import generation"),
        ("megawrap.io", "from megawrap.data import format"),
        ("megawrap.training.loop", "import conversion.convert"),
        ("megawrap.training.loop", "from megawrap import finetune"),
        ("conversion.convert", "from megawrap.training import loop"),
        ("conversion.convert", "import launch"),
        ("data_tools.stdlib", "from megawrap.models import gpt"),
        ("megawrap.finetune", "from conversion import convert"),
    ],
)
def test_an_import_that_points_upwards_is_seen(name: str, code: str) -> None:
    assert wrong_imports(name, ast.parse(code)) or "import launch" in code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("megawrap.training.loop", "from megawrap.checkpoint.store import Store"),
        ("megawrap.checkpoint.state", "from megawrap.models.architecture import Architecture"),
        ("megawrap.finetune", "def f():\n    from conversion import convert"),
        ("megawrap.cli", "def f():\n    import conversion.convert"),
        ("data_tools.stdlib", "from megawrap.io import atomic_write"),
        ("launch.finetune", "from megawrap import finetune"),
    ],
)
def test_an_import_that_points_downwards_is_fine(name: str, code: str) -> None:
    assert not wrong_imports(name, ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)", "os.system(x)", "pickle.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "torch.load(f, weights_only=False)",
        "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "yaml.load(x)",
    ],
)  # fmt: skip
def test_an_unsafe_call_is_seen(code: str) -> None:
    assert unsafe_calls("m", ast.parse(code))


def test_a_heavy_import_is_seen() -> None:
    assert heavy_imports("megawrap.data.loader", ast.parse("import torch.nn"))
    assert heavy_imports("launch.finetune", ast.parse("from transformers import AutoModel"))
    assert not heavy_imports("megawrap.data.loader", ast.parse("def f():\n    import torch"))
    assert not heavy_imports("megawrap.training.loop", ast.parse("import torch"))
