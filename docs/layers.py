"""Draw docs/pictures/layers.svg from the import contract in pyproject.toml: python docs/layers.py"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "layers.svg"
WIDTH, GAP, LEFT = 860, 10, 40
LOW, HIGH = 42, 56  # of a layer of one module, of several


def read_layers() -> list[list[str]]:
    """The layers of the contract, the topmost first; modules of one layer side by side."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.split(r"\s*[|:]\s*", layer) for layer in layers]


def describe_module(name: str) -> str:
    """What a module or folder is for: the first sentence of its docstring."""
    path = ROOT / "brainage_nb" / name
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(re.split(r"\.(?:\s|$)", text)[0].replace("`", "").split())


def draw_layers() -> str:
    """The picture as SVG text."""
    layers = read_layers()
    heights = [LOW if len(modules) == 1 else HIGH for modules in layers]
    height = sum(heights) + GAP * (len(layers) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>Layers of brainage_nb: imports go down only</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<path d="M18 {GAP} V{height - GAP} m-8 -12 l8 12 l8 -12" fill="none" stroke="#666" '
        'stroke-width="2"/>',
    ]
    y = GAP
    for modules, row in zip(layers, heights, strict=True):
        width = (WIDTH - LEFT - GAP * len(modules)) / len(modules)
        for column, name in enumerate(modules):
            parts += _draw_box(name, LEFT + column * (width + GAP), y, width, row)
        y += row + GAP
    return "\n".join([*parts, "</svg>", ""])


def _draw_box(name: str, x: float, y: float, width: float, height: float) -> list[str]:
    lines = textwrap.wrap(describe_module(name), int((width - 16) / 5.9), max_lines=2, placeholder=" …")
    return [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="6" fill="#eef3f8" '
        'stroke="#4b79a6"/>',
        f'<text x="{x + 10:.0f}" y="{y + 18}" font-size="14" font-weight="bold">{escape(name)}</text>',
        *(
            f'<text x="{x + 10:.0f}" y="{y + 34 + 14 * n}" font-size="11" fill="#333">{escape(line)}</text>'
            for n, line in enumerate(lines)
        ),
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw_layers(), encoding="utf-8")
