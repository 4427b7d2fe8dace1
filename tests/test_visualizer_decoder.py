"""The decoder figure: every kind of evaluation can be drawn, and what is written on it is legible and true."""
import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from tests.test_visualizer import LONG, candidates, check_legible

from gradiend.core import InputError
from gradiend.evaluator.candidates import Candidate
from gradiend.evaluator.choice import candidate_frame, select_candidate
from gradiend.evaluator.decoder import DecoderResult
from gradiend.visualizer.decoder import plot_probability_shifts, target_curves, word_curves

PAIR = ("3SG", "3PL")


@pytest.fixture(autouse=True)
def quiet_backend():
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def made_up(lr, factor=1.0, lms=0.4, p=0.1, pair=PAIR, base=False):
    first, second = pair
    return Candidate(lr, 0.0 if base else factor, lms, {first: {first: 0.85 - 0.2 * lr / (lr + 1), second: 0.1}, second: {first: p, second: 0.9 - p}}, 8.0, 0.0 if base else 0.01 * lr)


def evaluated(*, strengthen=True, keeps=True, pair=PAIR, factors=(1.0,), lrs=(0.001, 0.1, 1.0, 20.0), base_lms=0.4, ratio=0.99):
    "A result as `evaluate_decoder` makes it, from invented measurements."
    base = made_up(0.0, lms=base_lms, pair=pair, base=True)
    tried = [made_up(lr, f, lms=base_lms * (1.0 if keeps and lr <= 1 else 0.7), p=0.1 + 0.2 * lr / (lr + 1) * f, pair=pair) for f in factors for lr in lrs]
    chosen = select_candidate(tried, base, target_class=pair[0], other_class=pair[1], lms_ratio=ratio, lms_tokens=100, strengthen=strengthen)
    frame = candidate_frame([base, *tried], chosen, lms_ratio=ratio, n_rows=dict.fromkeys(pair, 20), other_class=pair[1])
    return DecoderResult({pair[0] if strengthen else f"{pair[0]}_weaken": chosen}, pair, ratio, 100, "test", frame)


KINDS = {
    "strengthen": {}, "weaken": {"strengthen": False}, "nothing keeps the score": {"keeps": False}, "base of 0": {"base_lms": 0.0}, "long names": {"pair": LONG},
    "two factors": {"factors": (0.5, 1.0)}, "one candidate": {"lrs": (1.0,)}, "no rule": {"ratio": 0.0},
    "halving": {"lrs": (100.0, 0.316, 5.62, 1.33, 2.74, 3.92, 3.28, 3.59, 3.43)},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_result_can_be_drawn(name, tmp_path):
    result = evaluated(**KINDS[name])
    ax = plot_probability_shifts(result, output=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 2000 and len(ax.figure.axes) == 3
    width, height = ax.figure.get_size_inches()
    assert width <= 6 and height <= 4
    check_legible(ax.figure)
    panels = [panel for panel in ax.figure.axes if panel.get_shared_x_axes().joined(panel, ax)]
    assert len(panels) == 3  # one axis of strengths
    one, two = ax.figure.axes[:2]
    assert one.get_ylim() == two.get_ylim()  # and one scale of probabilities


@pytest.mark.parametrize("name", ["strengthen", "weaken", "two factors", "halving"])
def test_the_choice_is_one_vertical_line_and_the_threshold_one_horizontal(name):
    result = evaluated(**KINDS[name])
    chosen, = result.selections.values()
    ax = plot_probability_shifts(result)
    for panel in ax.figure.axes:
        vertical = [line for line in panel.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
        assert [line.get_xdata()[0] for line in vertical] == [chosen.learning_rate]
    horizontal = [line for line in ax.figure.axes[-1].lines if len(line.get_ydata()) == 2 and set(line.get_ydata()) == {result.lms_ratio}]
    assert len(horizontal) == 1
    written = [text.get_text() for panel in ax.figure.axes for text in panel.texts]
    assert f"chosen: {chosen.learning_rate:.3g}" in written and f"LMS needed:\n{result.lms_ratio:g} of base" in written


@pytest.mark.parametrize("lrs", [(1e-9, 1e9), (1e-9, 1.0, 1e9), (1e-6, 1.0), (1e-4, 1e4), tuple(10.0 ** p for p in range(-12, 13)), (0.001, 100.0)])
@pytest.mark.parametrize("own", [False, True])
def test_ticks_of_strengths_never_overlap(lrs, own):
    ax = plot_probability_shifts(evaluated(lrs=lrs), ax=plt.subplots(figsize=(5.5, 2.8), layout="constrained")[1] if own else None).figure.axes[-1]
    ax.figure.canvas.draw()
    boxes = sorted((tick.get_window_extent() for tick in ax.get_xticklabels() if tick.get_text()), key=lambda box: box.x0)
    assert len(boxes) >= 3 and all(left.x1 + 1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_rates_between_which_nothing_was_measured_are_joined_by_dots():
    ax = plot_probability_shifts(evaluated(lrs=(0.001, 100.0, 0.316, 5.62)), ax=plt.subplots()[1])
    dotted = {tuple(line.get_xdata()) for line in ax.lines if line.get_linestyle() != "-" and len(set(line.get_xdata())) == 2 and 1 not in line.get_xdata()}
    assert dotted == {(0.001, 0.316), (0.316, 5.62), (5.62, 100.0)}
    assert all(len(dots.get_offsets()) for dots in ax.collections[:1])


def test_the_drawn_feature_factor_is_named():
    result = evaluated(factors=(0.5, 1.0))
    assert plot_probability_shifts(result).figure.axes[-1].get_xlabel().endswith(f"feature factor {result['3SG'].feature_factor:g} of 0.5, 1")
    assert "factor" not in plot_probability_shifts(evaluated()).figure.axes[-1].get_xlabel()


def test_if_nothing_is_chosen_the_figure_says_so():
    ax = plot_probability_shifts(evaluated(keeps=False))
    assert "the base stays" in [text.get_text() for text in ax.texts] and "the base model stays" in ax.get_title(loc="left")


def test_the_lines_are_the_numbers():
    result = evaluated(factors=(0.5, 1.0))
    factor = result["3SG"].feature_factor
    tables, curves = word_curves(result.frame, "3SG"), target_curves(result.frame, "3SG")
    for lr, (data, word) in itertools.product((0.0, 0.001, 0.1, 1.0, 20.0), itertools.product(PAIR, PAIR)):
        lines = result.frame.query("learning_rate == @lr and data_class == @data and word_class == @word")
        lines = lines if lr == 0 else lines[lines["feature_factor"] == factor]
        assert tables[data].loc[lr, word] == lines["probability"].item()
    assert curves["other"].tolist() == tables["3PL"]["3SG"].tolist() and curves["relative_lms"].iloc[0] == 1.0
    assert curves.index[curves["selected"]].tolist() == [result["3SG"].learning_rate]


def test_a_third_class_of_words_and_of_rows():
    frame = candidates(("3SG", "3PL"))
    more = pd.concat([frame, frame.assign(word_class="1SG", probability=0.05), frame.query("data_class == '3PL'").assign(data_class="1SG", probability=0.4)])
    result = DecoderResult({}, PAIR, 0.99, 1, "test", more.drop_duplicates(["target_class", "learning_rate", "data_class", "word_class"]))
    ax = plot_probability_shifts(result, "3SG")
    ax.figure.canvas.draw()
    check_legible(ax.figure)
    assert len(ax.figure.axes) == 3 and {"3SG words", "3PL words", "1SG words"} <= {text.get_text() for text in ax.texts}
    assert target_curves(result.frame, "3SG")["other"].tolist() == target_curves(frame, "3SG")["other"].tolist()


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="target_class='3sg'"): plot_probability_shifts(candidates(), "3sg")
    with pytest.raises(InputError, match="learning_rate 0"): plot_probability_shifts(candidates().query("learning_rate > 0"), "3SG")
    with pytest.raises(InputError, match="'probability'"): plot_probability_shifts(candidates().drop(columns="probability"))
    with pytest.raises(TypeError, match="DataFrame"): plot_probability_shifts({"3SG": 1})
