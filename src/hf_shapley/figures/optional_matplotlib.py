"""matplotlib, which is an extra: imported when a figure is drawn, or refused with what to install."""

from typing import Any


def matplotlib_parts() -> Any:
    """The optional matplotlib, without pyplot: that would keep every figure alive."""
    try:
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.font_manager
        import matplotlib.textpath
    except ImportError as error:
        raise ImportError("Figures need matplotlib: install it with `pip install hf_shapley[plot]`.") from error
    return matplotlib
