"""The house rules that a machine can check, over the syntax trees: who imports whom, what is never used, how
big things get."""

import ast
import dataclasses
import pathlib
from typing import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "research", "configs", "experiments", "tools", "tests")
CONFIG_CLASSES = (
    "research.schema",
    "research.config",
    "research.errors",
    "research.models",
)  # what a preset may import
GROUND = (
    "research.errors",
    "research.config",
    "research.schema",
    "research.params",
    "research.sharding",
    "research.hardware",
)
LINES, FUNCTION, KERNEL_FUNCTION, FIELDS = 400, 80, 150, 15

# Floor or room -> the modules of ours that it may import, by prefix.
ALLOWED = {
    "kernels": ("kernels",),
    "research": ("kernels", "research"),
    "research.models": ("kernels", "research.models", *GROUND),
    "research.data": ("research.data", *GROUND),
    "configs": ("configs", *CONFIG_CLASSES),
    "experiments": ("kernels", "research", "configs", "experiments"),
    "tools": ("kernels", "research", "configs", "experiments", "tools"),
    "tests": FLOORS,
} | {module: ("kernels", *GROUND) for module in GROUND}

FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")


@dataclasses.dataclass(frozen=True)
class Module:
    name: str  # research.models.lm
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


def all_modules() -> list[Module]:
    found = []
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path.read_text(encoding="utf-8")))
    return found


MODULES = all_modules()
NAMES = {module.name for module in MODULES}
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def imports(module: Module, names: set[str]) -> Iterator[str]:
    """Every module that this one imports, anywhere in it; `from a import b` is a.b where that is a module."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names or node.module == "absl" else node.module


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layering_problems(module: Module, names: set[str]) -> list[str]:
    room = max((room for room in ALLOWED if within(module.name, room)), key=len)
    problems = []
    for target in imports(module, names):
        ours = any(within(target, floor) for floor in FLOORS)
        if ours and not any(within(target, prefix) for prefix in ALLOWED[room]):
            problems.append(f"{module.name} imports {target}")
        if within(module.name, "research") and within(target, "absl.flags"):
            problems.append(f"{module.name} imports {target}")
    return problems


def forbidden(module: Module) -> list[str]:
    """Uses of what the house doesn't use."""
    found = [target for target in imports(module, set()) if target.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ):
            found.append(f"{node.func.id}() in line {node.lineno}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if len(node.args) + len(node.keywords) > 1 and not within(module.name, "tests"):
                found.append(f".get(key, default) in line {node.lineno}")
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [None if kind is None else getattr(kind, "id", "") for kind in caught]
            if None in names or {"Exception", "BaseException"} & set(names):
                found.append(f"catches everything in line {node.lineno}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sow":
            found.append(f"sow in line {node.lineno}")
    if module.name.split(".")[-1] in ("utils", "util", "helpers", "common_utils"):
        found.append("a file of leftovers")
    return found


def oversized(module: Module) -> list[str]:
    lines = module.source.splitlines()
    found = [f"{len(lines)} lines"] if len(lines) > LINES else []
    most = KERNEL_FUNCTION if within(module.name, "kernels") else FUNCTION
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            if node.end_lineno - start + 1 > most:  # a long docstring is no long function
                found.append(f"{node.name} has {node.end_lineno - start + 1} lines")
    return found


def fields_of(module: Module) -> dict[str, int]:
    """Config nodes by name, with their number of fields."""
    counts = {}
    for node in ast.walk(module.tree):
        bases = {getattr(base, "id", "") for base in node.bases} if isinstance(node, ast.ClassDef) else set()
        if bases & {"Node", "MixerConfig"}:
            counts[node.name] = sum(isinstance(item, ast.AnnAssign) for item in node.body)
    return counts


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if target in graph and (found := visit(target, [*path, name])):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@every_module
def test_arrows_point_down(module: Module):
    assert layering_problems(module, NAMES) == []


@every_module
def test_nothing_forbidden(module: Module):
    assert forbidden(module) == []


@every_module
def test_small(module: Module):
    assert oversized(module) == []
    assert {name: count for name, count in fields_of(module).items() if count > FIELDS} == {}


def test_no_cycles():
    """Imports inside functions count: they are how cycles hide."""
    for floors in (("research",), ("kernels",), ("configs",), ("experiments",), ("tools",)):
        inside = [m for m in MODULES if within(m.name, floors[0])]
        graph = {m.name: set(imports(m, NAMES)) - {m.name} for m in inside}
        assert cycle(graph) == []


def test_the_checks_see_the_house():
    assert {"kernels.attention", "research.models.lm", "configs", "tests.layering_test"} <= NAMES
    lm = next(m for m in MODULES if m.name == "research.models.lm")
    assert {"research.models.mixers", "research.params", "jax"} <= set(imports(lm, NAMES))
    schema = next(m for m in MODULES if m.name == "research.schema")
    assert fields_of(schema)["ModelConfig"] > 5


BROKEN_RULES = [
    ("kernels.x", "import research.params", "kernels.x imports research.params"),
    ("research.x", "from configs import preset", "research.x imports configs"),
    ("research.x", "def f():\n    from tools.a import b", "research.x imports tools.a"),
    ("research.training.x", "from absl import flags", "research.training.x imports absl.flags"),
    ("research.training.x", "import absl.flags as f", "research.training.x imports absl.flags"),
    ("research.x", "import tests.spikes", "research.x imports tests.spikes"),
    (
        "research.models.x",
        "from research.training import loop",
        "research.models.x imports research.training.loop",
    ),
    ("research.data.x", "from research.models import lm", "research.data.x imports research.models.lm"),
    ("research.params", "from research.models import lm", "research.params imports research.models.lm"),
    ("configs.x", "from research.training.loop import run", "configs.x imports research.training.loop"),
    ("experiments.x", "from tools import plan", "experiments.x imports tools.plan"),
]


@pytest.mark.parametrize("name, source, problem", BROKEN_RULES)
def test_layering_problems_are_found(name, source, problem):
    assert layering_problems(Module(name, source), NAMES) == [problem]


FORBIDDEN_USES = [
    "import pickle",
    "from pickle import load",
    "eval('1')",
    "exec('x')",
    "d.get('a', 1)",
    "d.get('a', default=1)",
    "try:\n    f()\nexcept Exception:\n    pass",
    "try:\n    f()\nexcept:\n    pass",
    "self.sow('a', 'b', 1)",
    "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    raise",
]


@pytest.mark.parametrize("source", FORBIDDEN_USES)
def test_forbidden_uses_are_found(source):
    assert len(forbidden(Module("research.x", source))) == 1
    assert (
        forbidden(
            Module("research.x", "d.get('a'); queue.get()\ntry:\n    f()\nexcept ValueError:\n    pass")
        )
        == []
    )
    assert forbidden(Module("research.utils", "")) == ["a file of leftovers"]


def test_oversized_things_are_found():
    long = "def f():\n" + "    x = 1\n" * FUNCTION
    assert oversized(Module("research.x", long)) == [f"f has {FUNCTION + 1} lines"]
    assert oversized(Module("kernels.x", long)) == []
    assert oversized(Module("research.x", "x = 1\n" * (LINES + 1))) == [f"{LINES + 1} lines"]
    assert fields_of(Module("x", "class A(Node):\n" + "    a: int\n" * 16)) == {"A": 16}
    assert cycle({"a": {"b"}, "b": {"c", "json"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
