"""What the command line prints: names of labels and files come from strangers, and terminals do what they are told."""

import sys
from typing import Any, TextIO

from .models.checks import printable


def say(text: Any, *, file: TextIO | None = None) -> None:
    """Print a text without its control characters, and with escapes for letters that the terminal does not know.

    Args:
        text: one or more lines.
        file: where to; None = stdout.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    shown = printable(str(text).expandtabs())
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
