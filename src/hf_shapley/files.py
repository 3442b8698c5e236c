"""Files that are whole or not there: neither a crash nor a full disk leaves half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How the names of folders with drafts begin, which a killed process leaves behind.
DRAFT = ".draft-"


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to; what lies there replaces `path` once the block has ended well.

    A link stays, and the file it points to is replaced. What is no regular file, such as a device or a pipe, stays
    too: it is written to.

    Args:
        path: the file wanted, with any suffix; missing folders are made.

    Yields:
        A path of the same name in a hidden folder beside; whatever else is written there comes along. The folder is
        gone afterwards, whatever happens, and an older `path` is left as it was if the block fails.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    path, target = Path(path), Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a folder. Give the name of a file.")
    into = path.exists() and not path.is_file()
    if not into:
        target.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because a longer name than the file's own may be too long.
    folder = Path(tempfile.mkdtemp(prefix=DRAFT, dir=None if into else target.parent))
    draft = folder / path.name
    try:
        yield draft
        if into:
            with open(draft, "rb") as source, open(path, "wb") as destination:
                shutil.copyfileobj(source, destination)
            return
        # The draft last: it may name the others.
        for written in sorted(folder.iterdir(), key=lambda file: file == draft):
            os.replace(written, target if written == draft else target.parent / written.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
