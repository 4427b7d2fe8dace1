"Figures: what every plot function promises, legibility measured on the rendered text, odd data."
import random
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradiend.core import InputError, MissingExtraError
from gradiend.gradients.space import ParameterSpace
from gradiend.overlap import overlap_of
from gradiend.visualizer.convergence import best_steps, plot_training_convergence
from gradiend.visualizer.decoder import plot_probability_shifts, target_curves
from gradiend.visualizer.encoder import plot_encoder_distributions
from gradiend.visualizer.style import spread
from gradiend.visualizer.topk import plot_topk_overlap, region_counts


def runs(seeds=2, names=("3SG", "3PL")):
    return pd.DataFrame([{"seed": seed, "step": step, "correlation": min(step, 300) / 310 - seed / 50, "class": name,
                          "mean": sign * min(step, 300) / 350, "std": 0.1}
                         for seed in range(seeds) for step in range(0, 500, 100) for sign, name in zip((1, -1), names, strict=True)])


def encodings(names=("3SG", "3PL"), n=40):
    rng = np.random.default_rng(0)
    return pd.concat([pd.DataFrame({"source_class": name, "label": label, "encoded": np.tanh(label + rng.normal(0, 0.3, n))})
                      for name, label in ((names[0], 1.0), (names[1], -1.0), ("neutral", 0.0))])


def candidates(names=("3SG", "3PL")):
    rows = []
    for target in names:
        for lr in (0.0, 0.01, 0.1, 1.0, 10.0):
            for data in names:
                for word in names:
                    p = (0.9 if word == data else 0.1) + (0.05 if word == target else -0.05) * np.log1p(lr)
                    rows.append({"target_class": target, "learning_rate": lr, "lms": 0.4 - 0.01 * lr, "data_class": data,
                                 "word_class": word, "probability": p, "selected": lr == 0.1})
    return pd.DataFrame(rows)


def of_sets(sets, n):
    full = ParameterSpace.from_global(["w"], [[n]], None)
    return overlap_of({name: full.keep(sorted(members)) for name, members in sets.items()})


def overlap(count, n=100_000, name="feature {}"):
    rng = np.random.default_rng(count)
    common = rng.choice(n, 100, replace=False)
    sets = {name.format(i): frozenset({*common.tolist(), *rng.choice(n, 400, replace=False).tolist()}) for i in range(count)}
    return of_sets(sets, n)


LONG = ("third person singular pronouns", "third person plural pronouns")
FIGURES = {
    "convergence": lambda **k: plot_training_convergence(runs(), **k),
    "convergence, many seeds": lambda **k: plot_training_convergence(runs(9, LONG), **k),
    "encoder": lambda **k: plot_encoder_distributions(encodings(), **k),
    "encoder, long names": lambda **k: plot_encoder_distributions(encodings(LONG), **k),
    "decoder": lambda **k: plot_probability_shifts(candidates(), "3SG", **k),
    "decoder, two targets": lambda **k: plot_probability_shifts(candidates(), **k),
    **{f"overlap of {m}": (lambda m=m, **k: plot_topk_overlap(overlap(m), **k)) for m in (2, 3, 4, 6, 7)},
    "overlap of 2, long names": lambda **k: plot_topk_overlap(overlap(2, name="third person pronouns, take {}"), **k),
    "overlap of 3, long names": lambda **k: plot_topk_overlap(overlap(3, name="third person pronouns, take {}"), **k),
}
EVERY = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())


@pytest.fixture(autouse=True)
def quiet_backend(monkeypatch):
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@EVERY
def test_every_figure_keeps_the_promises(draw, monkeypatch, tmp_path):
    def show(*_, **__):
        raise AssertionError("a plot function must not show")
    monkeypatch.setattr(plt, "show", show)
    settings, state, numpy_state = dict(matplotlib.rcParams), random.getstate(), np.random.get_state()[1].copy()
    ax = draw(output=tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").stat().st_size > 2000
    width, height = ax.figure.get_size_inches()
    assert width <= 6 and height <= 4
    check_legible(ax.figure)
    assert dict(matplotlib.rcParams) == settings
    assert random.getstate() == state and (np.random.get_state()[1] == numpy_state).all()


@EVERY
def test_axes_in_is_axes_out(draw):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    assert draw(ax=right) is right
    assert not left.has_data() and right.figure is figure
    assert plt.get_fignums() == [figure.number]


def check_legible(figure):
    "Texts placed by us stay on the page, and (unless a Venn diagram is crowded) none lies on another."
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    for axes in figure.axes:
        texts = [text for text in (*axes.texts, axes.title, axes._left_title) if text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        for text, box in boxes:
            assert box.x0 >= page.x0 - 2 and box.x1 <= page.x1 + 2 and box.y0 >= page.y0 - 2 and box.y1 <= page.y1 + 2, text
        for i, (text, box) in enumerate(boxes if len(boxes) < 12 else []):
            for other, other_box in boxes[:i]:
                x = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
                y = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
                assert x <= 1 or y <= 2, f"{text!r} lies on {other!r}"


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_vector_files(ending, tmp_path):
    plot_encoder_distributions(encodings(), output=tmp_path / f"figure.{ending}")
    assert (tmp_path / f"figure.{ending}").read_bytes()[:5] in (b"%PDF-", b"<?xml")


def test_unknown_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match="ending"):
        plot_encoder_distributions(encodings(), output=tmp_path / "figure.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r"gradiend\[plot\]"):
        plot_training_convergence(runs())


def test_importing_the_figures_does_not_import_matplotlib():
    code = ("import sys, gradiend.visualizer.convergence, gradiend.visualizer.encoder, gradiend.visualizer.decoder\n"
            "assert not any(name.split('.')[0] == 'matplotlib' for name in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_spread_is_the_closest_arrangement():
    "Against a brute-force search on a grid: no other ordered arrangement with the gap is closer in squares."
    wanted, gap = [0.0, 0.1, 0.15, 0.9], 0.2
    got = spread(wanted, gap)
    grid = np.round(np.arange(-0.4, 1.3, 0.05), 2)
    best = min(((a, b, c, d) for a in grid for b in grid[grid >= a + gap - 1e-9] for c in grid[grid >= b + gap - 1e-9]
                for d in grid[grid >= c + gap - 1e-9]), key=lambda y: sum((np.array(y) - wanted) ** 2))
    assert sum((np.array(got) - wanted) ** 2) <= sum((np.array(best) - wanted) ** 2) + 1e-9


def test_best_step_ignores_sign_step_zero_and_missing_values():
    history = pd.DataFrame({"seed": 0, "step": [0, 10, 20, 30], "correlation": [1.0, 0.5, -0.9, np.nan]})
    assert best_steps(history).loc[0].tolist() == [20, -0.9]
    assert best_steps(history.assign(best=[False, True, False, False])).loc[0].tolist() == [10, 0.5]


def test_order_of_the_rows_does_not_change_a_figure():
    for frame in (candidates(), candidates().sample(frac=1, random_state=1)):
        curves = target_curves(frame, "3PL")
        assert curves.index.tolist() == [0, 0.01, 0.1, 1, 10]
        assert curves["other"].iloc[0] == pytest.approx(0.1) and curves["own"].iloc[0] == pytest.approx(0.9)
    assert plot_training_convergence(runs().sample(frac=1, random_state=0)).get_title(loc="left") == \
        plot_training_convergence(runs()).get_title(loc="left")


def test_region_counts_agree_with_set_algebra():
    rng = random.Random(1)
    sets = {name: frozenset(rng.sample(range(40), 15)) for name in "abcd"}
    counts = region_counts(sets)
    assert len(counts) == 15
    for code, count in counts.items():
        inside = [s for bit, s in zip(code, sets.values(), strict=True) if bit == "1"]
        outside = [s for bit, s in zip(code, sets.values(), strict=True) if bit == "0"]
        assert count == len(frozenset.intersection(*inside) - frozenset().union(*outside))


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_sets_without_anything_in_common_and_equal_sets(count):
    apart = {f"s{i}": frozenset(range(10 * i, 10 * i + 10)) for i in range(count)}
    equal = {f"s{i}": frozenset(range(10)) for i in range(count)}
    for sets in (apart, equal):
        result = of_sets(sets, 1000)
        drawn = plot_topk_overlap(result)
        drawn.figure.canvas.draw()
        assert any("By chance" in text for text in [drawn.get_xlabel(), *(t.get_text() for t in drawn.texts)])


def test_a_single_row_and_a_single_class():
    plot_encoder_distributions(encodings(n=1)).figure.canvas.draw()
    one = encodings().query("source_class == '3SG'")
    assert plot_encoder_distributions(one).get_title(loc="left").startswith("No correlation")
    plot_training_convergence(runs(1).query("step == 0")).figure.canvas.draw()
