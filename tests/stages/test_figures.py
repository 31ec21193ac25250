"""Plots are a function of what they show."""

from matplotlib.figure import Figure

from stages.figures import svg


def drawn(value: float) -> str:
    figure = Figure()
    figure.subplots().plot([0, value], marker="o", label="a")
    return svg(figure)


def test_the_same_values_give_the_same_file_and_others_another() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert "<dc:date>" not in drawn(1)
