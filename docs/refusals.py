"""Write docs/refused.md: every reason why a scan, row, age or run is refused, and what to do.

python docs/refusals.py

Codes, meanings and sentences are read from the package; what to do stands in docs/remedies.toml. A reason
without a remedy, or a remedy without a reason, is an error.
"""

from __future__ import annotations

import ast
import builtins
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from brainage_nb.cohort.cleaning import FLAGS, REASONS
from brainage_nb.cohort.rules import CohortRules
from brainage_nb.predict.cautions import CAUTIONS

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "brainage_nb"
PAGE = DOCS / "refused.md"
UNMATCHED, AGES = "cohort/", "tables/"  # folders whose modules give sentences as a reason
HEAD = """\
# When something is refused

<!-- Written by docs/refusals.py from the package and docs/remedies.toml. Change those, not this page. -->

Nothing is dropped silently. Each scan, row, age or run that is not used is listed with a reason, in the file
named in each section. This page says what each reason means and what you can do.
"""


@cache
def parse_package() -> dict[str, ast.Module]:
    """The syntax tree of each module, by its path in the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def collect_reasons() -> dict[str, dict[str, str]]:
    """Section -> code, or sentence with … for what is filled in -> its meaning, where the package has one."""
    trees = parse_package()

    def trees_in(folder: str) -> list[ast.Module]:
        return [tree for name, tree in trees.items() if name.startswith(folder)]

    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    calls = [
        node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ScanError"
    ]
    codes = {call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)}
    warned = {code: said["counted"] for code, said in CAUTIONS.items()}
    rules = [name for name in CohortRules.__dataclass_fields__ if name != "control_words"]
    return {
        "dropped": REASONS | dict.fromkeys(sorted(codes - REASONS.keys() - FLAGS.keys()), ""),
        "flagged": dict(FLAGS),
        "warned": warned,
        "rules": dict.fromkeys(rules, ""),
        "unmatched": dict.fromkeys(find_sentences(*trees_in(UNMATCHED)), ""),
        "ages": dict.fromkeys(find_sentences(*trees_in(AGES)), ""),
        "errors": find_exceptions(nodes),
    }


def find_sentences(*trees: ast.Module) -> Iterator[str]:
    """Sentences given as a reason: assigned to it, passed as it, returned beside None or by a `..why..`."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        for value in _reasons_at(node):
            yield from filter(None, map(str.strip, _texts_of(value)))


def _reasons_at(node: ast.AST) -> list[ast.expr]:
    """The expressions at a node that give a reason."""
    match node:
        case ast.keyword(arg="reason"):
            return [node.value]
        case ast.Assign() if any(map(_is_reason, node.targets)):
            return [node.value]
        case ast.AnnAssign() if node.value and _is_reason(node.target):
            return [node.value]
        case ast.Return(value=ast.Tuple(elts=[ast.Constant(value=None), *rest])):
            return rest
        case ast.FunctionDef() if "why" in node.name:
            return [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
    return []


def _is_reason(target: ast.expr) -> bool:
    """Whether something is called a reason: `reason`, `self.reasons[n]`, `_NO_AGE`."""
    target = target.value if isinstance(target, ast.Subscript) else target
    name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
    return name in {"reason", "reasons", "against", "why", "_NO_AGE", "_IN_WORKSPACE"}


def _texts_of(value: ast.expr) -> list[str]:
    """The sentences an expression can give, with … for what is filled in."""
    if isinstance(value, ast.Constant):
        return [value.value] if isinstance(value.value, str) else []
    if isinstance(value, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in value.values]
        text = "".join(parts)
        return [text] if " " in text.replace("…", "").strip() else []
    if isinstance(value, ast.IfExp):
        return [*_texts_of(value.body), *_texts_of(value.orelse)]
    if isinstance(value, ast.Dict):  # a rule or a condition beside each sentence
        both = [*filter(None, value.keys), *value.values]
        return [text for one in both for text in _texts_of(one) if text.count(" ") > 2 and "\\" not in text]
    return []


def find_exceptions(nodes: list[ast.AST]) -> dict[str, str]:
    """Each exception class of the package with the first sentence of its docstring."""
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def is_exception(name: str) -> bool:
        known = getattr(builtins, name, None)
        if isinstance(known, type):
            return issubclass(known, BaseException)
        return name in classes and any(is_exception(getattr(base, "id", "")) for base in classes[name].bases)

    found = sorted(name for name in classes if is_exception(name))
    return {name: (ast.get_docstring(classes[name]) or "").split("\n\n")[0].rstrip(".") for name in found}


# Section -> heading, where it is listed, heading of its first column.
SECTIONS = {
    "dropped": (
        "Scans that are dropped",
        "Notebook 02 lists them in `cleaning.csv` (column `reason`, the facts in `detail`), notebook 03 in "
        "`scans_without_volume.csv` (column `code`). `predict` and the app say the same sentences.",
        "code",
    ),
    "flagged": (
        "Scans that are kept, with a flag",
        "Column `flags` of `cleaning.csv`. The scan is used; look at it.",
        "flag",
    ),
    "warned": (
        "Warnings beside a predicted age",
        "Column `warnings` of `predict --out`, and in the app. Where the age is **not to be used**, "
        "`do_not_use_because` says why.",
        "warning",
    ),
    "rules": ("People left out by the cohort rules", "`cohort_dropped.csv`, column `rule`.", "rule"),
    "unmatched": (
        "Images that found no row",
        "`cohort_unmatched.csv`, column `reason`; … stands for names and numbers.",
        "reason",
    ),
    "ages": (
        "Ages that are not read",
        "`cohort_unmatched.csv` lists rows without a usable age; notebook 01 also counts them. "
        "An age is never guessed.",
        "reason",
    ),
    "errors": (
        "Errors that stop a run",
        "Each message says what came, what was expected and what to do. `brainage-nb` prints the message "
        "alone; in Python these are the classes to catch.",
        "error",
    ),
}


def write_page() -> str:
    """The page as Markdown; ValueError where reasons and remedies do not agree."""
    remedies = tomllib.loads((DOCS / "remedies.toml").read_text(encoding="utf-8"))
    parts = [HEAD]
    for section, reasons in collect_reasons().items():
        title, where, column = SECTIONS[section]
        rows = [_write_row(section, *item, remedies[section]) for item in reasons.items()]
        if stale := [key for key in remedies[section] if not any(key in reason for reason in reasons)]:
            raise ValueError(f"docs/remedies.toml [{section}]: the package gives no such reason: {stale}.")
        titles = [column, "what it means", "what to do"] if len(rows[0]) == 3 else [column, "what to do"]
        rows = [titles, ["---"] * len(titles), *rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts += [f"## {title}\n\n{where}\n", *lines, ""]
    return "\n".join(parts)


def _write_row(section: str, reason: str, meaning: str, remedies: dict[str, str | list[str]]) -> list[str]:
    fitting = [key for key in remedies if key == reason or (" " in reason and key in reason)]
    if not fitting:
        raise ValueError(f"docs/remedies.toml [{section}] does not say what to do about {reason!r}.")
    remedy = remedies[fitting[0]]
    if isinstance(remedy, list):
        meaning, remedy = remedy
    if CAUTIONS.get(reason, {}).get("forbids_use"):
        meaning = f"**{meaning.split(';')[0]}: not to be used**"
    return [reason if " " in reason else f"`{reason}`", *filter(None, [meaning]), remedy]


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
