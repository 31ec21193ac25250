"""Plots as SVG: a function of what they show, so that the same results give the same file."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(figure: "Figure") -> str:
    """The SVG file of a figure, without its time and with the same ids each time."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "imagen-precompute"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
