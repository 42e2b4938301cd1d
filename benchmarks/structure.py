"""How large and how tangled is the package: files, lines, circles, verbs, and what each notebook pulls in.

Lines of code leave out docstrings, comments and blank lines. A circle is a group of modules that import each
other, imports under TYPE_CHECKING and inside functions included.

    python benchmarks/structure.py [--root CHECKOUT]
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
BAR_FILES, BAR_LINES = 65, 8500


def code_lines(text: str) -> int:
    """Lines that are no docstring, no comment and not blank."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            documented |= set(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for k, line in lines if line.strip()[:1] not in ("", "#") and k not in documented)


def imported(tree: ast.Module, modules: set[str], module: str = "") -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source = ".".join(filter(None, [*above, node.module]))
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected, more than one)."""
    reach = {module: closure({module}, graph) for module in graph}
    groups = {tuple(m for m in graph if m == one or (m in reach[one] and one in reach[m])) for one in graph}
    return sorted({tuple(sorted(group)) for group in groups if len(group) > 1})


def closure(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    """Everything that a set of modules imports, directly or through others; not the start itself."""
    found: set[str] = set()
    todo = [target for module in start for target in graph.get(module, ())]
    while todo:
        if (module := todo.pop()) not in found:
            found.add(module)
            todo += graph[module]
    return found


def first_words(tree: ast.Module) -> list[str]:
    """The first word of the name of every function and method, without properties and special methods."""
    return [
        node.name.strip("_").split("_")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")
        if not any("property" in ast.unparse(mark) for mark in node.decorator_list)
    ]


def main() -> None:
    """Print the counts of a checkout, the package's largest files, and what each notebook needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="a checkout (default: this one)")
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    root = parser.parse_args().root
    sources = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in sorted((root / "brainage_nb").rglob("*.py"))
    }
    trees = {module: ast.parse(text) for module, text in sources.items()}
    graph = {module: imported(tree, set(sources), module) - {module} for module, tree in trees.items()}
    sizes = {module: code_lines(text) for module, text in sources.items()}
    places = defaultdict(lambda: [0, 0])
    for module, size in sizes.items():
        place = module.split(".")[1] if module.count(".") > 1 else "(root)"
        places[place][0] += size > 0
        places[place][1] += size
    print(f"{'place':<14}{'files':>6}{'lines':>8}")
    for place, (files, lines) in sorted(places.items()):
        print(f"{place:<14}{files:>6}{lines:>8}")
    words = [word for tree in trees.values() for word in first_words(tree)]
    verbs = sum(is_verb(word) for word in words)
    tied = circles(graph)
    print(f"functions {len(words)}, of which {verbs / len(words):.0%} start with a verb; circles {len(tied)}")
    for group in tied:
        print("  circle:", ", ".join(group))
    for path in sorted((root / "notebooks" / "src").glob("*.py")):
        direct = imported(ast.parse(path.read_text()), set(sources))
        print(
            f"{path.stem:<28} imports {len(direct):>2} files, needs {len(direct | closure(direct, graph)):>3}"
        )
    files, lines = sum(size > 0 for size in sizes.values()), sum(sizes.values())
    value = {"files": files, "lines": lines, "functions": len(words), "verbs": round(verbs / len(words), 2)}
    value["circles"] = len(tied)
    holds = files <= BAR_FILES and lines <= BAR_LINES and not tied
    bar = {"files": BAR_FILES, "lines": BAR_LINES, "circles": 0}
    print(json.dumps({"name": "structure", "value": value, "bar": bar, "holds": holds}))


WORDS = """
    add adjust advise age align allocate allow answer append apply arrange ask assert attach augment
    average begin bend bind blur bootstrap bound bring build calibrate call carry catch center change
    check choose clean clear clip close collect combine come commit compare complete compute convert
    copy correct count cover create crop cut deal decide decode delete derive describe detect discard
    divide do download draw drop empty end ensure enter erase estimate evaluate examine exclude exhaust
    exit expand explain extract fetch fill filter find finish fit flag flip fold follow forecast format
    freeze fuse gather get give go group guard guess halve hand handle hash hide hold identify ignore
    import index infer insert inspect install intersect invert join judge keep label launch lay learn
    leave limit link list load locate lock log look lose lower make map mark mask match measure merge
    mirror mix model mount move name normalise normalize number observe offer open order pack pad paint
    parse pass patch pause pick place plan plot point predict prepare preprocess print process project
    propose prove prune pull put quote raise rank read rebuild recolour record recover reduce refit
    refuse register release remove rename render repeat replace report require resample reserve reset
    reshape resize resolve restore resume retry return reweigh rotate round run sample save say scale
    scan score search see seed segment select send separate set share shift show shrink shut sign
    simulate skip slice smooth solve sort split spread stack standardise start state step stop store
    strip sum summarise suppress swap take tell test tie time track train transform translate trim
    truncate try turn understand unpack update upload use validate vary verify wait walk warm warn watch
    weigh weight widen wrap write zip
    """
NOUNS = {
    "age",
    "mean",
    "number",
    "state",
    "index",
    "label",
    "name",
    "place",
    "mask",
    "map",
    "group",
    "order",
    "time",
}
VERBS = set(WORDS.split()) - NOUNS
"""Base forms that open a function's name in the field; words that are nouns more often are left out."""


def is_verb(word: str) -> bool:
    """Whether a function's name opens with a verb, or with is, has and their like."""
    return word in VERBS or word in {
        "is",
        "are",
        "has",
        "was",
        "can",
        "may",
        "needs",
        "fits",
        "looks",
        "knows",
    }


if __name__ == "__main__":
    main()
