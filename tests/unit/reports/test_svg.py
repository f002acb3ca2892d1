import math
import re
from xml.etree import ElementTree

from hypothesis import example, given
from hypothesis import strategies as st

from peftchat.reports.svg import Series, line_plot

values = st.floats(-1e12, 1e12) | st.floats(-1e-6, 1e-6) | st.sampled_from([math.nan, math.inf, -math.inf])


@example(ys=[5e-324])
@example(ys=[0.0, 1e-320])
@given(ys=st.lists(values, max_size=40))
def test_any_numbers_give_well_formed_svg_inside_its_frame(ys: list[float]) -> None:
    plot = line_plot([Series("a<b", list(enumerate(ys)))], label='"label" & more', x_name="step")
    if not any(math.isfinite(y) for y in ys):
        assert plot == ""
        return
    svg = ElementTree.fromstring(plot)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    (line,) = svg.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == sum(map(math.isfinite, ys))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


@given(ys=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30, unique=True))
def test_higher_values_are_never_drawn_lower(ys: list[float]) -> None:
    svg = ElementTree.fromstring(line_plot([Series("a", list(enumerate(ys)))], label="", x_name="step"))
    heights = [float(pair.split(",")[1]) for pair in next(svg.iter("polyline")).attrib["points"].split()]
    in_order = [height for _, height in sorted(zip(ys, heights, strict=True))]
    assert in_order == sorted(in_order, reverse=True)


@given(low=st.floats(-1e9, 1e9), spread=st.floats(1e-3, 1e9))
def test_tick_labels_differ_and_rise(low: float, spread: float) -> None:
    if spread < 1e-4 * abs(low):
        return
    plot = line_plot([Series("a", [(0, low), (1, low + spread)])], label="", x_name="step")
    labels = re.findall(r'text-anchor="end">([^<]*)<', plot)
    ticks = [float(label.replace(",", "")) for label in labels]
    assert ticks == sorted(set(ticks))
    assert len(ticks) >= 2


def test_a_long_run_stays_a_small_plot_that_ends_where_it_ended() -> None:
    points = [(float(step), 1.0 + step % 7) for step in range(100_000)]
    plot = line_plot([Series("loss", points)], label="", x_name="step")
    assert len(plot) < 100_000
    assert "loss: 5 at step 99,999" in plot
