"""Compares what the charts draw with the data."""

import numpy as np
import pytest

from gemma_fast.walkthrough import charts, maps, own
from gemma_fast.walkthrough.cost import GROUPS
from gemma_fast.walkthrough.theme import THEMES, canvas, log_axis

LIGHT, NAN = THEMES["light"], np.nan


def lines(picture) -> list[tuple[list, list]]:
    """Returns x and y of each line of the first axes."""
    return [(list(x.get_xdata()), list(x.get_ydata())) for x in picture.figure.axes[0].lines]


def test_bars_of_the_costs_sum_to_100_percent():
    time, prompt, long = (
        {group: scale * (i + 1) for i, group in enumerate(GROUPS)} for scale in (0.5, 7, 1e9)
    )
    data = {"cost": {"time": time, "bytes": {"prompt": prompt, "long": long}}}
    found = charts.cost(data, LIGHT).figure.axes[0].containers
    assert len(found) == 3
    for bars in found:
        widths = [bar.get_width() for bar in bars]
        total = len(GROUPS) * (len(GROUPS) + 1) / 2
        assert widths == pytest.approx([100 * (i + 1) / total for i in range(len(GROUPS))])


def test_update_scales_by_layer():
    data = {"updates": {"attention": [0.9, 0.1, 0.2], "mlp": [0.3, 0.5, 0.4]}}
    picture = charts.update_scale(data, LIGHT)
    assert lines(picture) == [([0, 1, 2], [0.9, 0.1, 0.2]), ([0, 1, 2], [0.3, 0.5, 0.4])]
    assert "attention: largest 0.90 in layer 0" in picture.alt
    assert "MLP: largest 0.50 in layer 1" in picture.alt


def test_update_scales_of_three_parts():
    data = {"updates": {"attention": [0.9, 0.1], "mlp": [0.3, 0.5], "per_layer": [0.2, 0.7]}}
    picture = charts.update_scale(data, LIGHT)
    assert lines(picture)[2] == ([0, 1], [0.2, 0.7])
    assert "per-layer embeddings: largest 0.70 in layer 1" in picture.alt


def test_scale_of_the_stream_has_two_points_a_layer():
    data = {"hiddens": {"with_norms": [1, 2, 3, 4, 5], "without_norms": [1, 10, 1e9, None, None]}}
    picture = charts.hidden_scale(data, LIGHT)
    (x, y), (x_bare, y_bare) = lines(picture)
    assert x == x_bare == [0, 0.5, 1, 1.5, 2]
    assert y == [1, 2, 3, 4, 5]
    np.testing.assert_equal(y_bare, [1, 10, 1e9, np.nan, np.nan])
    assert "overflows in layer 1" in picture.alt


@pytest.mark.parametrize("values", [[1.02, 1.85], [0.04, 4.7], [2, 3e20], [0, 0.0]])
def test_log_axis_has_labels(values):
    figure, axes = canvas(2)
    axes.plot(values)
    log_axis(axes, "y", values)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 2


def test_heads_are_drawn_in_their_order():
    """Two layers of three heads with two tokens; the weight of the second query names the head."""
    maps_of = [[[[1, None], [h / 10, 1 - h / 10]] for h in range(3)] for _ in range(2)]
    data = {
        "attention": {
            "maps": maps_of, "order": [[2, 0, 1], [0, 1, 2]], "enlarged": {"layer": 1, "head": 2},
        },
    }  # fmt: skip
    axes = maps.attention_maps(data, LIGHT).figure.axes[0]
    image = np.asarray(axes.images[0].get_array().filled(np.nan))
    step = 3  # two tokens and a gap
    for row, heads in enumerate([(2, 0), (0, 1), (1, 2)]):
        for layer, head in enumerate(heads):
            cell = image[row * step : row * step + 2, layer * step : layer * step + 2]
            np.testing.assert_equal(cell, [[1, np.nan], [head / 10, 1 - head / 10]])
    frame = axes.patches[0]
    assert (frame.get_x() // step + 1, frame.get_y() // step + 1) == (1, 2)  # layer 1, third row


def test_pairs_that_are_not_rotated_have_no_wavelength():
    waves = {"sliding_attention": [6, 9], "full_attention": [6, 8, None, None]}
    data = {
        "rotary": {"wavelengths": waves}, "model": {"config": {"max_position_embeddings": 256}},
    }  # fmt: skip
    picture = maps.wavelengths(data, LIGHT)
    drawn = [y for _, y in lines(picture)][:2]
    np.testing.assert_equal(drawn, [[6, 9], [6, 8, NAN, NAN]])
    assert "Full layers: 6 to 8 positions; 2 pairs are not rotated." in picture.alt
    data["rotary"]["query_lengths"] = [
        {"layer": 2, "type": "full_attention", "lengths": [[1, 2, 3, 4]]}
    ]
    axes = maps.query_lengths(data, LIGHT).figure.axes[0]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["6", "6", "8", "∞", "∞"]


def test_layers_without_a_norm_are_gaps():
    found = {
        "q_before": [1, 2, 3], "q_after": [1, 1, 2], "k_before": [5, None, None],
        "k_after": [6, None, None],
    }  # fmt: skip
    picture = own.qk_norm({"own": {"qk_norm": found}}, LIGHT)
    assert [y for _, y in lines(picture)][:2] == [[1, 2, 3], [1, 1, 2]]
    np.testing.assert_equal(lines(picture)[3], ([0, 1, 2], [6, NAN, NAN]))
    assert "k before its norm: 5 to 5." in picture.alt and "v" not in picture.alt.split()


def test_layers_that_share_keys_and_values():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    data = {"own": {"kv_layers": [0, 1, 0, 1]}, "model": {"config": {"layer_types": kinds}}}
    picture = own.shared_kv(data, LIGHT)
    assert lines(picture) == [([0, 2], [0, 0]), ([1, 3], [1, 1])]
    assert "1 of the layers with a window read those of layer 0." in picture.alt
    assert (
        "1 of the full layers read those of layer 1. Layers 0 to 1 read their own." in picture.alt
    )


def test_per_layer_inputs_and_gates():
    found = {"inputs": [0.7, 0.8], "gated": [0.1, 2], "open_gates": [0.25, 0.5]}
    picture = own.per_layer({"own": {"per_layer": found}}, LIGHT)
    assert lines(picture) == [([0, 1], [0.7, 0.8]), ([0, 1], [0.1, 2])]
    assert list(picture.figure.axes[1].lines[0].get_ydata()) == [25, 50]
    assert "After the gate: 0.1 to 2. Gates above 0: 25 to 50 %." in picture.alt


def test_experts_of_the_last_token():
    found = {"chosen": [[2, 0], [1, 3]], "weights": [[0.75, 0.5], [0.9, 0.25]]}
    picture = own.experts(
        {"own": {"experts": found}, "model": {"config": {"num_experts": 4}}}, LIGHT
    )
    image = picture.figure.axes[0].images[0].get_array().filled(NAN)
    np.testing.assert_equal(image, [[0.5, NAN, 0.75, NAN], [NAN, 0.9, NAN, 0.25]])
    assert "2 of 4 in each of 2 layers" in picture.alt
    assert "The largest weight is 0.90, of expert 1 in layer 1." in picture.alt


def test_scalars_of_the_layers():
    picture = own.layer_scalar({"own": {"layer_scalars": [0.5, 0.25, 1.5]}}, LIGHT)
    assert lines(picture)[1] == ([0, 1, 2], [0.5, 0.25, 1.5])
    assert "smallest 0.25 in layer 1, largest 1.5 in layer 2" in picture.alt
    assert picture.figure.axes[0].get_ylim() == pytest.approx((0, 1.65))
