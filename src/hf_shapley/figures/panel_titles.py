"""Titles above the panels of a figure: on lines no wider than a panel, in fonts that have their letters."""

from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import Any

from ..models.checks import printable
from .optional_matplotlib import matplotlib_parts

TITLE_WIDTH = 136.0
"""In points: what a panel of a figure leaves between its neighbours."""

LONGEST_LINE = 200
"""In letters: more are not measured."""


def set_title(panel: Any, text: str, last: str = "") -> None:
    """Put a text above a panel, on lines no wider than it and in fonts that have its letters; then `last`."""
    matplotlib = matplotlib_parts()
    lines = (" ".join(line.split()) for line in printable(text).split("\n"))
    text, families = _in_fonts("\n".join(lines))
    font = matplotlib.font_manager.FontProperties(family=families, size="small")
    measure = matplotlib.textpath.text_to_path.get_text_width_height_descent

    def fits(line: str) -> bool:
        return measure(line, font, False)[0] <= TITLE_WIDTH

    title = "\n".join(_wrapped(text, fits)) + last
    panel.set_title(title, fontfamily=families, fontsize="small", parse_math=False)


def _wrapped(text: str, fits: Callable[[str], bool], most: int = 3) -> list[str]:
    """Break a text into lines that fit; of one that needs more than `most`, the middle is left out."""
    lines: list[str] = []
    while text:
        if len(lines) == most - 1 and ("\n" in text or not fits(text)):
            return [*lines, _end(text.replace("\n", " "), fits)]
        line = _start(text, fits)
        lines.append(line.rstrip())
        text = text[len(line) :].lstrip()
    return lines


def _start(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text's first line as fits, at least a letter; whole words where there are any."""
    line = text.split("\n", 1)[0][:LONGEST_LINE]
    size = bisect_right(range(1, len(line) + 1), False, key=lambda size: not fits(line[:size]))
    if size == len(line):
        return line
    return line[: (size if line[size] == " " else line.rfind(" ", 0, size) + 1) or max(1, size)]


def _end(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text's end as fits after an ellipsis, at least a letter."""
    sizes = range(1, min(len(text), LONGEST_LINE) + 1)
    size = bisect_right(sizes, False, key=lambda size: not fits("\u2026" + text[-size:]))
    return "\u2026" + text[-max(1, size) :]


def _in_fonts(text: str) -> tuple[str, list[str]]:
    """The text, with letters that no installed font has as escapes, and the font families that have the others."""
    matplotlib = matplotlib_parts()
    families = list(matplotlib.rcParams["font.family"])
    missing = {ord(letter) for letter in text if letter != "\n"}.difference(*map(_letters, families))
    while missing:
        best = max(_installed_families(), key=lambda family: len(missing & _letters(family)))
        if not missing & _letters(best):
            break
        families.append(best)
        missing -= _letters(best)
    return text.translate({code: chr(code).encode("unicode_escape").decode() for code in missing}), families


def _installed_families() -> list[str]:
    """Font families with an upright font of ordinary weight; fonts of last resort, all boxes, are none."""
    fonts = matplotlib_parts().font_manager.fontManager.ttflist
    ordinary = (font.name for font in fonts if font.style == "normal" and font.weight in (400, "normal"))
    return sorted({name for name in ordinary if "Last" not in name})


@cache
def _letters(family: str) -> frozenset[int]:
    """Code points for which the font of a family that matplotlib takes has a glyph."""
    manager = matplotlib_parts().font_manager
    return frozenset(manager.get_font(manager.findfont(manager.FontProperties(family=[family]))).get_charmap())
