"""Parameters: the lines of a notebook's parameters cell and, behind `more`, the fields of settings classes.

The same names, types and choices hold in a form, for `brainage-nb run -p` and in `brainage-nb list`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class ParameterError(ValueError):
    """A parameter that no notebook knows, or a value that it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """Something a user can set.

    Attributes
    ----------
    name : str
    default : str, bool, int, float or tuple
        Its type is that of every value.
    comment : str
        Meaning and unit in words.
    choices : tuple of str
        What it may be; empty for anything of the type.
    free : bool
        Whether another text than the choices is taken too, such as a path.
    """

    name: str
    default: Any
    comment: str
    choices: tuple[str, ...] = ()
    free: bool = False

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (" or a path" if self.free else "")
        if isinstance(self.default, tuple):
            return f"{KINDS[type(self.default[0])]}, or several with commas"
        return KINDS[type(self.default)]

    def parse(self, value: Any) -> Any:
        """Turn a text, or a value of a like type, into one of the default's type; `ParameterError` if not."""
        try:
            parsed = _converted(value, self.default)
        except (KeyError, ValueError, TypeError):
            parsed = None
        if parsed is None or (self.choices and not self.free and parsed not in self.choices):
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ParameterError(
                f"{self.name} = {value!r}: expected {self.expected} ({self.comment}); "
                f"the default is {self.default!r}.{hint}"
            )
        return parsed


def _converted(value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_converted(item, default[0]) for item in items)
    if isinstance(default, str):
        return value if isinstance(value, str) else os.fspath(value)
    if isinstance(default, bool):
        return BOOLEANS[value.strip().lower()] if isinstance(value, str) else BOOLEANS[str(value).lower()]
    kind = type(default)
    if not isinstance(value, str) and not isinstance(value, Integral if kind is int else Real):
        raise TypeError
    if isinstance(value, bool) or not math.isfinite(kind(value)):
        raise ValueError
    return kind(value)


def parse_parameters(source: str) -> dict[str, Parameter]:
    """Read a parameters cell: flat literals, one a line, each under a comment line."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            raise ParameterError(
                f"A parameters cell holds only `name = literal` lines, not: {ast.unparse(node)}"
            )
        above = lines[node.lineno - 2].strip() if node.lineno > 1 else ""
        name, form = node.targets[0].id, re.search(r"# @param (\[.*?\])(.*)", lines[node.lineno - 1])
        choices = tuple(ast.literal_eval(form[1])) if form else ()
        comment = above.removeprefix("#").strip()
        free = bool(form and "allow-input" in form[2])
        found[name] = Parameter(name, ast.literal_eval(node.value), comment, choices, free)
    return found


@lru_cache
def fields_of(settings: type) -> dict[str, Parameter]:
    """The fields of a settings class that a text can set; meaning, unit and choices are its docstring's.
    Those marked `by_code` are for the package alone.

    An entry reads `name : type` or `name : {"choice", "choice"}`, with its meaning indented below.
    """
    entries = r"^(\w+(?:, \w+)*) : (.+)((?:\n(?:    .*)?)*)"
    told = {
        name: (kind, " ".join(text.split()))
        for names, kind, text in re.findall(entries, inspect.getdoc(settings) or "", flags=re.M)
        for name in names.split(", ")
    }
    found = {}
    for item in dataclasses.fields(settings):
        if isinstance(item.default, str | bool | int | float | tuple) and not item.metadata.get("by_code"):
            kind, text = told.get(item.name, ("", ""))
            choices = tuple(re.findall(r'"(.*?)"', kind)) if kind.startswith("{") else ()
            found[item.name] = Parameter(item.name, item.default, text or kind, choices)
    return found


def check_fields(settings: Any) -> None:
    """Bring every field of a frozen settings object to its type; `ParameterError` where it cannot be."""
    for name, field in fields_of(type(settings)).items():
        object.__setattr__(settings, name, field.parse(getattr(settings, name)))


def find_parameter(name: str, known: Mapping[str, Parameter]) -> Parameter:
    """The parameter of that name; `ParameterError` with the nearest names where there is none."""
    if name not in known:
        near = [longer for longer in known if longer.startswith(f"{name}_")]
        near = list(dict.fromkeys(near + difflib.get_close_matches(name, known, n=3)))[:3]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known))}."
        place = "`brainage-nb list` shows those of every notebook."
        raise ParameterError(f"{name}: there is no parameter of this name here. {hint} {place}")
    return known[name]


def split_items(items: Iterable[str]) -> dict[str, str]:
    """Texts by name from `name=value` items, those of `more=...` included; the same name twice is refused."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ParameterError(f"{item}: expected name=value, without blanks around the =.")
        for known, value in (split_more(text) if name == "more" else {name: text}).items():
            if found.setdefault(known, value) != value:
                raise ParameterError(f"{known} is given twice, as {found[known]!r} and as {value!r}.")
    return found


def split_more(text: str) -> dict[str, str]:
    """Texts by name from `weight_decay=1e-3 blur_mm=2`; quotes hold a value with blanks together."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return split_items(lexer)
    except ValueError as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(f"more = {text!r}: a quote is opened and not closed.") from None


def join_more(values: Mapping[str, Any]) -> str:
    """The text that `split_more` reads back, names in alphabetical order."""
    return " ".join(f"{name}={shlex.quote(format_value(value))}" for name, value in sorted(values.items()))


def format_value(value: Any) -> str:
    """A value as `-p` and `more` take it: several with commas."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def read_parameters(names: Mapping[str, Any], *settings: type) -> dict[str, Any]:
    """Everything that was set in a notebook: call it with `globals()` right after the parameters cell.

    Parameters
    ----------
    names : mapping
        The notebook's namespace; its flat values are taken.
    *settings : dataclasses
        Whose fields `more` may set.

    Returns
    -------
    dict
        The values of the cell, and those of `more` in their types. A field that was not set is not in it.
    """
    flat = str | bool | int | float
    parameters = {
        name: value for name, value in names.items() if not name.startswith("_") and isinstance(value, flat)
    }
    known = {name: field for group in settings for name, field in fields_of(group).items()}
    for name, text in split_more(parameters.get("more", "")).items():
        if name in parameters:
            raise ParameterError(f"more = ...{name}={text}: {name} has a line of its own; set it there.")
        parameters[name] = find_parameter(name, known).parse(text)
    return parameters


def pick_fields(parameters: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """Those of the parameters that are fields of a settings class, in its types."""
    known = fields_of(settings)
    return {name: field.parse(parameters[name]) for name, field in known.items() if name in parameters}
