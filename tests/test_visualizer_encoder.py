"Encoder figures: the promises of every plot function, nothing that overlaps, saturated classes that stay visible."
import random
from functools import lru_cache

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gradiend.core import InputError
from gradiend.evaluator.encoder import summarise_encodings
from gradiend.evaluator.metrics import predicted_labels
from gradiend.visualizer.encoder import encoder_groups, hill, plot_encoder_distributions, swarm
from gradiend.visualizer.scatter import plot_encoder_scatter, snippet, worst_rows
from gradiend.visualizer.targets import plot_encoder_by_target

LONG = ("third person singular pronouns", "third person plural pronouns")


def table(names=("3SG", "3PL"), n=40, sharp=1.2, words=3, splits=("test",)):
    "A table of encodings as `evaluate_encoder` makes it."
    rng, parts = np.random.default_rng(0), []
    for split in splits:
        for name, label, kind in ((names[0], 1.0, "training"), (names[1], -1.0, "training"), ("neutral words", 0.0, "neutral_training_masked"), ("neutral", 0.0, "neutral_dataset")):
            parts.append(pd.DataFrame({
                "kind": kind, "label": label, "group": name, "source_class": name if label else "neutral", "split": split,
                "source_word": [f"word{i % words}" for i in range(n)], "seen": [i % words != 1 for i in range(n)],
                "encoded": np.tanh(sharp * label + rng.normal(0, 0.4, n) * (sharp < 5))}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(predicted=predicted_labels(frame["encoded"].to_numpy()), text=[f"sentence {i}" for i in range(len(frame))], transition="a→b",
                        class_mean=1.2 * frame["encoded"], masked="A long sentence, with many words and $igns, in which [MASK] is hidden, and that goes on after it.", factual="he", alternative="they")


@lru_cache
def result(**options):
    return summarise_encodings(table(**options), pair=("3SG", "3PL"), source="alternative", split="test", bootstrap=20)


FIGURES = {
    "distributions": lambda **k: plot_encoder_distributions(result(), **k),
    "histogram": lambda **k: plot_encoder_distributions(table(), kind="histogram", **k),
    "saturated": lambda **k: plot_encoder_distributions(table(sharp=9), **k),
    "long names": lambda **k: plot_encoder_distributions(table(LONG), **k),
    "facets": lambda **k: plot_encoder_distributions(table(splits=("train", "test")), facet="split", **k),
    "three facets": lambda **k: plot_encoder_distributions(table(splits=("train", "validation", "test")), facet="split", neutral=False, **k),
    "words": lambda **k: plot_encoder_by_target(result(), **k),
    "many words": lambda **k: plot_encoder_by_target(table(n=90, words=30), **k),
    "words, long names": lambda **k: plot_encoder_by_target(table(LONG, n=60, words=12), **k),
    "scatter": lambda **k: plot_encoder_scatter(result(), worst=5, **k),
    "scatter, long names": lambda **k: plot_encoder_scatter(table(LONG), **k),
    "two encoders": lambda **k: plot_encoder_scatter(table(), y="class_mean", worst=0, **k),
}
EVERY = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())


@pytest.fixture(autouse=True)
def quiet_backend():
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def boxes_of(figure):
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
                 if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())]
        own = [text for text in (*axes.texts, *ticks, axes._left_title, axes.xaxis.label, axes.yaxis.label) if text.get_text() and text.get_visible()]
        yield [(text.get_text(), text.get_window_extent(renderer)) for text in own]


def check_labels(figure):
    "No label lies on another or off the page."
    figure.canvas.draw()  # the last drawing was a file of another resolution
    page = figure.bbox
    for boxes in boxes_of(figure):
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= page.x0 - 2 and box.x1 <= page.x1 + 2 and box.y0 >= page.y0 - 2 and box.y1 <= page.y1 + 2, text
            for other, other_box in boxes[:i]:
                x, y = min(box.x1, other_box.x1) - max(box.x0, other_box.x0), min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
                assert x <= 1 or y <= 4, f"{text!r} lies on {other!r}"


@EVERY
def test_promises(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a plot function must not show"))
    settings, state, numpy_state = dict(matplotlib.rcParams), random.getstate(), np.random.get_state()[1].copy()
    ax = draw(output=tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").stat().st_size > 2000
    width, height = ax.figure.get_size_inches()
    assert width <= 6 and height <= 4
    assert dict(matplotlib.rcParams) == settings
    assert random.getstate() == state and (np.random.get_state()[1] == numpy_state).all()
    check_labels(ax.figure)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    assert draw(ax=right) is right and not left.has_data()


def test_a_saturated_class_can_be_seen():
    "The hill of a class at exactly one has a width, and its dots are a column."
    for kind in ("violin", "histogram"):
        x, y = hill(np.ones(50), kind)
        assert np.ptp(x[y > 0.5]) >= 0.029
    assert len(set(swarm(np.ones(50)))) == 50
    figure = plot_encoder_distributions(table(sharp=9)).figure
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # where the colour is, be it mixed with white
        share = 1 - (pixels - 255) / (np.array(colour) - 255.001)
        inked = (np.abs(share - share.mean(axis=-1, keepdims=True)).max(axis=-1) < 0.06) & (share.mean(axis=-1) < 0.8)
        assert inked.sum() > 150


def test_facets_have_a_block_for_each_split():
    ax = plot_encoder_distributions(table(splits=("train", "test")), facet="split")
    assert len(ax.get_yticks()) == 8
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts if text.get_text().startswith("split")}
    assert heights["split: train"] > heights["split: test"]
    with pytest.raises(InputError, match="facet='splits'"):
        plot_encoder_distributions(table(), facet="splits")


def test_neutral_rows_can_be_left_out():
    assert [name for name, _, _ in encoder_groups(table())] == ["3SG", "3PL", "neutral words", "neutral"]
    assert len(plot_encoder_distributions(table(), neutral=False).get_yticks()) == 2


def test_the_title_has_interval_and_control():
    title = plot_encoder_distributions(result()).get_title(loc="left")
    assert title.startswith("Correlation 0.") and "[" in title and "shuffled labels" in title


def test_order_of_rows_changes_no_number():
    frame = table()
    a, b = (plot_encoder_distributions(f) for f in (frame, frame.sample(frac=1, random_state=1)))
    assert [t.get_text() for t in a.get_yticklabels()] == [t.get_text() for t in b.get_yticklabels()]
    assert [t.get_text() for t in a.texts] == [t.get_text() for t in b.texts]


def test_words_that_training_has_not_seen_are_open():
    ax = plot_encoder_by_target(table())
    faces = {tuple(dots.get_facecolor()[0].round(2)) for dots in ax.collections if len(dots.get_offsets()) == 1}
    assert (1, 1, 1, 1) in faces and len(faces) == 2
    assert [t.get_text() for t in ax.get_yticklabels()][:3] == ["word0 (3SG, n = 14)", "word1 (3SG, n = 13)", "word2 (3SG, n = 13)"]


def test_the_worst_rows_are_the_farthest_from_their_labels():
    frame = table(n=200)
    found = worst_rows(frame, 10)
    goal = np.where(frame["label"] == 0, frame["encoded"].abs(), (frame["label"] - frame["encoded"]).abs())
    assert found["error"].tolist() == pytest.approx(sorted(goal, reverse=True)[:len(found)])
    text = plot_encoder_scatter(frame, worst=2).get_xlabel()
    assert text.count("\n") == 2 and "[he/they]" in text
    assert plot_encoder_scatter(frame, worst=0).get_xlabel() == "encoded value h"


def test_names_of_a_scatter_lie_beside_the_panel():
    "No name covers a dot or the line at -1; a title says the correlation; a class alone keeps its colour."
    for y in (None, "class_mean"):
        ax = plot_encoder_scatter(table(n=60), y=y, worst=0)
        ax.figure.canvas.draw()
        panel = ax.get_window_extent()
        assert len(ax.texts) == 4 and all(text.get_window_extent().x0 >= panel.x1 for text in ax.texts)
        assert ax.get_title(loc="left").startswith("Correlation")
        alone = plot_encoder_scatter(table(n=60).query("label == -1"), y=y, worst=0)
        assert {t.get_text(): t.get_color() for t in alone.texts}["3PL"] == {t.get_text(): t.get_color() for t in ax.texts}["3PL"]


@pytest.mark.parametrize("masked", ["[MASK]", "[MASK] " + "a" * 200, "b" * 200 + " [MASK]", "x" * 90 + " [MASK] " + "y" * 90, "no placeholder"])
def test_snippets_fit_one_line(masked):
    line = snippet(pd.Series({"masked": masked, "factual": "he", "alternative": "they"}))
    assert len(line) <= 78 and "\n" not in line and "[he/they]" in line


def test_single_rows_and_constant_groups():
    for frame in (table(n=1), table().head(40)):
        plot_encoder_distributions(frame).figure.canvas.draw()
        plot_encoder_scatter(frame).figure.canvas.draw()
        plot_encoder_by_target(frame).figure.canvas.draw()
