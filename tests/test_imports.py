"""What imports what is what CONTRIBUTING.md says: no arrow more, none less."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "tokendyn").rglob("*.py"))
}
#: A framework -> the parts that may import it when they are loaded.
FRAMEWORKS = {
    "torch": {"backends.torch", "diagnose", "experiments"},
    "jax": {"backends.jax", "experiments"},
    "flax": {"backends.jax", "experiments"},
}


def part(module: str) -> str:
    """The part of the house that a module belongs to."""
    _, *parts = module.split(".")
    if not parts:
        return "tokendyn"
    return ".".join(parts[:2]) if parts[0] == "backends" else parts[0]


def imports(module: str, tree: ast.Module | None = None) -> Iterator[tuple[str, bool]]:
    """Modules that ``module`` imports, and whether it does when it is loaded; those for type checkers left out."""

    def walk(node: ast.AST, loading: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, loading) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in FILES else str(node.module)), loading
        for child in ast.iter_child_nodes(node):
            yield from walk(
                child, loading and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            )

    yield from walk(tree or ast.parse(FILES[module].read_text(encoding="utf-8")), True)


def found() -> dict[str, tuple[set[str], set[str]]]:
    """Of each part the parts that it imports when loaded, and those that it imports only when called."""
    loading: defaultdict[str, set[str]] = defaultdict(set)
    called: defaultdict[str, set[str]] = defaultdict(set)
    for module in FILES:
        for name, when_loaded in imports(module):
            if name.partition(".")[0] == "tokendyn" and part(name) != part(module):
                (loading if when_loaded else called)[part(module)].add(part(name))
    return {name: (loading[name], called[name] - loading[name]) for name in set(map(part, FILES))}


def written() -> dict[str, tuple[set[str], set[str]]]:
    """The same, as CONTRIBUTING.md has it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("<!-- arrows: begin -->")[2].partition("<!-- arrows: end -->")[0]
    rows = re.findall(r"^(\S+) +→(?: ([\w. ]+?))?(?: ?\(([\w. ]+)\))?$", block, re.MULTILINE)
    assert len(rows) == block.count("→")
    return {name: (set(loading.split()), set(called.split())) for name, loading, called in rows}


def test_the_arrows_are_those_of_contributing() -> None:
    says, has = written(), found()
    assert set(says) == set(has) - {"backends"}
    for name, (loading, called) in says.items():
        assert has[name][0] == loading, f"{name}, when loaded"
        assert has[name][1] == called, f"{name}, when called"


def test_arrows_point_one_way() -> None:
    """Loaded alone, no part is reached by its own imports: what is imported at the top has no circles."""
    says = written()
    assert says.pop("tokendyn")[0] == {"_dispatch"}  # the package's face, which all may import and which loads no more
    assert says["_order"][0] >= {"_operations"}
    reached: dict[str, set[str]] = {}

    def reach(name: str, above: tuple[str, ...] = ()) -> set[str]:
        assert name not in above, " → ".join((*above, name))
        if name not in reached:
            below = says[name][0] - {"tokendyn"}
            reached[name] = below.union(*(reach(other, (*above, name)) for other in below))
        return reached[name]

    for name in says:
        reach(name)
    outer = {"cli", "experiments", "diagnose", "torch", "jax"}
    for name in set(says) - outer:
        assert not reach(name) & outer, name
    for name in ("backends.torch", "backends.jax"):
        assert not reach(name) & {"core", "backends.numpy"}, name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_in_their_backends(framework: str) -> None:
    users = {
        part(module)
        for module in FILES
        for name, when_loaded in imports(module)
        if when_loaded and name.partition(".")[0] == framework
    }
    assert users == FRAMEWORKS[framework]


def test_a_planted_arrow_is_seen() -> None:
    source = (
        "from tokendyn import cli\nif TYPE_CHECKING:\n    import tokendyn.jax\ndef f():\n    import tokendyn.torch\n"
    )
    assert list(imports("planted", ast.parse(source))) == [("tokendyn.cli", True), ("tokendyn.torch", False)]
