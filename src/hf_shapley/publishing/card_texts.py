"""Texts and numbers as cards show them: nothing in a text becomes HTML or markdown, and no number gains digits."""

import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote


def format_number(value: int | float) -> str:
    """Write a number as cards show it: integers in full, others with 4 significant digits (all of an integer part)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`value` must be an int or a float, got {value!r}: call `.item()` on tensors and arrays.")
    if not math.isfinite(value):
        raise ValueError(
            f"`value`: a card shows finite numbers only, got {value}: measure again or leave the entry out."
        )
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    return str(round(value)) if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def numbers_in_card(card: str) -> list[str]:
    """Every number that a card's prose and tables claim, as written and in order.

    Code, comments, addresses, arXiv identifiers and the metadata are left out (huggingface_hub parses the latter).
    Applied to a text of the result file, it gives the numbers that this text brings along ("CIFAR-10": 10).
    """
    for pattern in (r"\A---\n.*?\n---\n", r"(?ms)^(`{3,}).*?^\1`*$", r"<!--.*?-->", r"(`+).*?\1", r"\]\(.*?\)"):
        card = re.sub(pattern, " ", card, flags=re.DOTALL)
    card = re.sub(r"https?://\S+|arXiv:\d+\.\d+", " ", card)
    return re.findall(r"(?<![\w.])(?:(?<![^\s(\[|])[-+])?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\w|\.\d)", card)


def escape_markdown(text: Any) -> str:
    """Make a text show as itself on one line of markdown: no HTML, emphasis, link, table cell, heading or list."""
    text = plain_text(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]()#|~!$])", r"\\\1", text)
    # Bare addresses become links by themselves; the entities show as the same characters.
    text = text.replace("://", "&colon;//").replace("@", "&commat;")
    text = re.sub(r"(?i)\b(www)\.", r"\1&period;", text)
    text = re.sub(r"^([-+=])", r"\\\1", text)  # a list or an underline at the start
    return re.sub(r"^(\d+)\.(?!\d)", r"\1\\.", text)  # a numbered list


def plain_text(text: Any) -> str:
    """One line without control or invisible characters."""
    spaced = " ".join(str(text).split())
    return "".join(character for character in spaced if unicodedata.category(character)[0] != "C")


def comment(text: str) -> str:
    """An HTML comment that its text cannot end."""
    return f"<!-- Results: {plain_text(text).replace('--', '- -').replace('>', '&gt;')} -->"


def fenced(language: str, code: str) -> str:
    """A code block whose fence is longer than any run of backticks in the code."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def picture_address(picture: str) -> str:
    """Percent-encode what could end a markdown address."""
    if picture.startswith("https://"):
        return "https://" + quote(picture.removeprefix("https://"), safe="/:?&=%#@+,;~")
    path = Path(picture)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"`picture` must be a path relative to the card, or an https address, got {picture!r}.")
    return quote(path.as_posix())


def settings_text(settings: Mapping[str, Any]) -> str:
    """An object of settings as "name: value" pairs."""
    names = {key: escape_markdown(str(key).replace("_", " ")) for key in settings}
    return ", ".join(f"{names[key]}: {_show(value)}" for key, value in settings.items())


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, list | tuple):
        return " / ".join(_show(entry) for entry in value)
    if isinstance(value, Mapping):
        return f"({settings_text(value)})"
    return escape_markdown(value)
