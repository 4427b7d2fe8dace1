"The comparison heatmap: what is drawn where, whatever the options; and what its callers add."
import math
from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradiend.core import InputError
from gradiend.crossing import CrossEncoding
from gradiend.data.examples import COLUMNS
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel
from gradiend.overlap import topk_overlap
from gradiend.similarities import similarity
from gradiend.visualizer.arrangement import arrange, cluster_order, colour_norm, trivial_diagonal
from gradiend.visualizer.heatmap import cell_size, plot_comparison_heatmap, plot_cross_encoding, plot_similarity_heatmap
from gradiend.visualizer.topk import plot_topk_overlap

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def square(m=5, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.random((m, m)) / 2
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    names = [f"f{i}" for i in range(m)]
    return pd.DataFrame(values, index=names, columns=names)


def models(m=3):
    space = ParameterSpace.from_model(nn.Linear(20, 20))
    return {f"m{i}": GradiendModel.create(space, GradiendConfig(pair=("a", "b")), seed=i) for i in range(m)}


def drawn(ax):
    return ax.images[0].get_array()


def texts(ax):
    return {text.get_text() for text in ax.texts}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_clusters_of_known_blocks_stay_together(blocks, seed):
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), rng.integers(1, 5, blocks))
    mixed = rng.permutation(block)
    order = cluster_order((mixed[:, None] == mixed) + 0.1 * rng.random((len(mixed),) * 2))
    assert sorted(order) == list(range(len(mixed)))
    runs = 1 + np.count_nonzero(np.diff(mixed[order]))
    assert runs == blocks


def slow_average_linkage(s):
    "Which groups are joined, by the definition: the mean over all pairs between two groups."
    groups, joined = [frozenset([i]) for i in range(len(s))], []
    while len(groups) > 1:
        a, b = max(combinations(groups, 2), key=lambda pair: np.mean([s[i, j] for i in pair[0] for j in pair[1]]))
        groups = [g for g in groups if g not in (a, b)] + [a | b]
        joined.append(a | b)
    return joined


def test_every_joined_group_is_a_piece_of_the_order():
    for seed in range(10):
        s = np.random.default_rng(seed).random((8, 8))
        s = (s + s.T) / 2
        order = cluster_order(s)
        for group in slow_average_linkage(s):
            places = sorted(order.index(i) for i in group)
            assert places == list(range(places[0], places[0] + len(group)))


def test_cells_follow_the_order():
    matrix = square(6)
    order = ["f3", "f1", "f5", "f0", "f2", "f4"]
    ax = plot_comparison_heatmap(matrix, order=order)
    assert [t.get_text() for t in ax.get_yticklabels()] == [t.get_text() for t in ax.get_xticklabels()] == order
    assert np.allclose(np.ma.filled(drawn(ax), 1.0), matrix.loc[order, order]) and drawn(ax).mask.diagonal().all()
    oblong = plot_comparison_heatmap(matrix.iloc[:, :2], order="name", row_labels={"f0": "first"}, column_labels={"f1": "second"})
    assert [t.get_text() for t in oblong.get_xticklabels()] == ["f0", "second"] and oblong.get_yticklabels()[0].get_text() == "first"


def test_groups_order_and_other():
    found = arrange(square(6), "name", {"B": ["f4", "f2"], "A": {"f5"}})
    assert found.spans == (("B", 0, 2), ("A", 2, 3), ("Other", 3, 6))
    assert list(found.matrix.index) == list(found.matrix.columns) == ["f2", "f4", "f5", "f0", "f1", "f3"]
    ax = plot_comparison_heatmap(square(6), groups={"B": ["f4", "f2"], "A": ["f5"]})
    labels = [t.get_text() for t in ax.texts if t.get_text() in ("A", "B", "Other")]
    assert sorted(labels) == ["A", "A", "B", "B", "Other", "Other"]  # at the right and above
    oblong = plot_comparison_heatmap(square(6).iloc[:, :2], groups={"B": ["f4"]}, annot=False)
    assert [t.get_text() for t in oblong.texts] == ["B", "Other"]  # rows only


def test_numbers_in_cells():
    matrix = square(4)
    ax = plot_comparison_heatmap(matrix, percentages=True, fmt=".1f")
    assert texts(ax) == {f"{100 * matrix.iloc[i, j]:.1f}" for i in range(4) for j in range(4) if i != j}
    assert not plot_comparison_heatmap(matrix, annot=False).texts
    assert not plot_comparison_heatmap(square(60)).texts and len(plot_comparison_heatmap(square(20), annot=True).texts) == 380
    tiny = plt.figure(figsize=(1, 1)).subplots()
    assert not plot_comparison_heatmap(square(12), ax=tiny).texts  # they would not fit
    assert texts(plot_comparison_heatmap(pd.DataFrame([[-0.001, 2.5]], index=["a"], columns=["x", "y"]))) == {"0.0", "2.5"}
    assert texts(plot_comparison_heatmap(pd.DataFrame([[1, 1200]], index=["a"], columns=["x", "y"]))) == {"1", "1,200"}


def test_diagonal_is_left_out_only_where_it_says_nothing():
    crossed = square(4).mul([1, 2, 3, 4], axis=0)
    assert not np.ma.is_masked(drawn(plot_comparison_heatmap(crossed)))
    assert not np.ma.is_masked(drawn(plot_comparison_heatmap(square(4), diagonal=True)))
    assert drawn(plot_comparison_heatmap(crossed, diagonal=False)).mask.sum() == 4
    low = square(4).to_numpy(copy=True)
    np.fill_diagonal(low, 0.1)
    assert trivial_diagonal(square(4).to_numpy()) and not trivial_diagonal(low) and not trivial_diagonal(np.ones((2, 3)))
    assert trivial_diagonal(np.where(np.eye(3), np.nan, 0.5)) and not trivial_diagonal(np.ones((1, 1)))


def test_colours():
    both = plot_comparison_heatmap(square(4) - 0.3, diagonal=True).images[0]
    assert both.norm.vmin == -both.norm.vmax and both.cmap.name == "RdBu_r"
    plain = plot_comparison_heatmap(square(4), vmax=0.9, cmap="magma").images[0]
    assert (plain.norm.vmin, plain.norm.vmax, plain.cmap.name) == (0, 0.9, "magma")
    values = np.array([0.0, 0.01, 0.04, 0.16, 1.0])
    for scale, expected in (("linear", values), ("sqrt", values ** 0.5), ("power", values ** 0.25)):
        assert np.allclose(colour_norm(values, scale, 0.25)[0](values), expected)
    assert np.allclose(colour_norm(values, "log")[0](values[1:]), np.log(values[1:] / 0.01) / np.log(100))


def test_row_metric_and_highlight():
    matrix, metric = square(4), {"f3": 0.3, "f0": 0.9, "f1": 0.8, "f2": math.nan}
    ax = plot_comparison_heatmap(matrix, order=["f3", "f2", "f1", "f0"], row_metric=pd.Series(metric, name="correlation"), highlight=["f1"], annot=False)
    assert ax.images[1].get_array()[[0, 2, 3], 0].tolist() == [0.3, 0.8, 0.9] and texts(ax) == {"0.30", "0.80", "0.90", "correlation"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["f3", "f2", "f1 †", "f0"]
    mask = matrix > 0.3
    ax = plot_comparison_heatmap(matrix, order="name", highlight=mask.loc[::-1, ::-1])
    assert len(ax.collections[0].get_segments()) == mask.to_numpy().sum() - 4  # the diagonal is not shown


@pytest.mark.parametrize("m", [1, 2, 3, 15, 44, 100])
def test_every_size_can_be_drawn_and_read(m):
    matrix = square(m)
    ax = plot_comparison_heatmap(matrix, groups={"first half": matrix.index[:m // 2]} if m > 1 else None, percentages=True)
    ax.figure.draw_without_rendering()
    box, renderer = ax.get_window_extent(), ax.figure.canvas.get_renderer()
    points = 72 / ax.figure.dpi * box.height / m
    assert points > 0.75 * 72 * cell_size(m, m) and ax.get_yticklabels()[0].get_fontsize() >= 7  # the cells got the room they need
    whole = ax.figure.bbox
    for text in (*ax.texts, *ax.get_yticklabels(), *ax.get_xticklabels()):
        at = text.get_window_extent(renderer)
        assert whole.x0 - 1 <= at.x0 and at.x1 <= whole.x1 + 1 and whole.y0 - 1 <= at.y0 and at.y1 <= whole.y1 + 1, text.get_text()
    if m > 1: assert ax.get_yticklabels()[0].get_window_extent(renderer).height <= 1.6 * box.height / m


def overlaps(a, b):
    return a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1


@pytest.mark.parametrize("how", ["own", "axes"])
@pytest.mark.parametrize("strip", [False, True])
def test_bar_note_and_names_of_groups_keep_apart(how, strip):
    matrix, note = square(3), "By chance a pair would share 1.2 to 140.5 weights, of those that both models kept after they had been pruned"
    metric = pd.Series([0.9, 0.8, 0.3], index=matrix.index, name="correlation") if strip else None
    ax = plot_comparison_heatmap(matrix, groups={"Grammatical number": ["f0"], "Person": ["f1"]}, row_metric=metric, note=note, colorbar_label="shared",
                                 ax=plt.figure(figsize=(8, 5)).subplots() if how == "axes" else None)
    ax.figure.draw_without_rendering()
    bar, shown = ax.figure.axes[-1].get_window_extent(), ax.xaxis.label
    for text in ax.texts: assert not overlaps(text.get_window_extent(), bar), text.get_text()
    for text in (*ax.texts, *ax.get_xticklabels()): assert not overlaps(text.get_window_extent(), shown.get_window_extent()), text.get_text()
    assert shown.get_text().split() == note.split() and "\n" in shown.get_text()
    assert shown.get_window_extent().x1 <= ax.figure.bbox.x1
    if how == "own": assert shown.get_window_extent().y0 >= 0 and ax.get_aspect() == 1  # other people's axes leave the room that they leave


def test_file_axes_and_global_state(tmp_path):
    before, given_ax = dict(matplotlib.rcParams), plt.figure().subplots()
    assert plot_comparison_heatmap(square(3), ax=given_ax, output=tmp_path / "new/figure.png") is given_ax
    assert (tmp_path / "new/figure.png").stat().st_size > 2000 and dict(matplotlib.rcParams) == before
    result = topk_overlap(models(), topk=50)
    assert np.allclose(drawn(plot_comparison_heatmap(result, diagonal=True)), result.matrix())


@pytest.mark.parametrize("options, message", [
    ({"order": ["f0"]}, "order: it must hold every row once"), ({"order": "size"}, "order='size'"), ({"groups": {"A": ["f9"]}}, "'f9' is no row"),
    ({"groups": {"A": ["f1"], "B": ["f1"]}}, "'f1' is in two groups"), ({"row_labels": {"f9": "x"}}, "row_labels: 'f9'"),
    ({"column_labels": {"f9": "x"}}, "column_labels: 'f9'"), ({"annot": "yes"}, "annot='yes'"), ({"fmt": "x%"}, "fmt='x%'"),
    ({"scale": "root"}, "scale='root'"), ({"scale": "power", "scale_gamma": 0}, "scale_gamma=0"), ({"scale": "log", "vmin": 0.0}, "positive vmin"),
    ({"cmap": "blue"}, "cmap='blue'"), ({"vmin": 2.0, "vmax": 1.0}, "must be smaller"), ({"highlight": ["f9"]}, "highlight: 'f9'"),
    ({"highlight": pd.DataFrame([[True]])}, "the mask must have"), ({"row_metric": {"f0": 1.0}}, "no number for 'f1'"), ({"output": "figure.gif"}, "figure.gif")])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message): plot_comparison_heatmap(square(3), **options)


def test_matrices_that_cannot_be_drawn():
    with pytest.raises(TypeError, match="matrix is a list"): plot_comparison_heatmap([[1.0]])
    with pytest.raises(InputError, match="no cell"): plot_comparison_heatmap(pd.DataFrame())
    with pytest.raises(InputError, match="'a' names two"): plot_comparison_heatmap(pd.DataFrame([[1.0, 2.0]], index=["x"], columns=["a", "a"]))
    with pytest.raises(InputError, match="no number"): plot_comparison_heatmap(pd.DataFrame([["one"]], index=["x"], columns=["a"]))
    with pytest.raises(TypeError, match="colour"): plot_comparison_heatmap(square(3), colour="red")
    with pytest.raises(InputError, match="figsize"): plot_comparison_heatmap(square(3), figsize=(3, 3), ax=plt.figure().subplots())
    assert drawn(plot_comparison_heatmap(pd.DataFrame([[math.nan]], index=["x"], columns=["a"]))).mask.all()


# --- callers ------------------------------------------------------------------------------------------------------

def test_similarity():
    result = similarity(models(), by=None)
    ax = plot_similarity_heatmap(result, order="name")
    chance = result.frame["expected_by_chance"]
    assert f"{chance.min():.2f}" in ax.get_xlabel() and np.allclose(drawn(ax)[0, 1], result.matrix().iloc[0, 1])
    same = plot_similarity_heatmap(models(), "spearman_signed", part="decoder-weight", labels=["x", "y", "z"], note="")
    assert [t.get_text() for t in same.get_yticklabels()] == ["x", "y", "z"] and same.get_xlabel() == ""
    assert same.figure.axes[-1].get_ylabel() == "signed spearman of the decoder weight"
    grouped = similarity(models(), by="parameter")
    assert np.allclose(drawn(plot_similarity_heatmap(grouped, group="bias"))[0, 1], grouped.matrix("bias").iloc[0, 1])
    with pytest.raises(InputError, match="2 of them"): plot_similarity_heatmap(grouped)
    with pytest.raises(InputError, match="part: the models are compared already"): plot_similarity_heatmap(result, part="decoder-weight")
    with pytest.raises(TypeError, match="colour"): plot_similarity_heatmap(result, colour="red")


def crossed():
    rows = pd.DataFrame([("x [MASK]", "a", "b", "A", "B", "test", "A->B", "x a"), ("y [MASK]", "b", "a", "B", "A", "test", "B->A", "y b")] * 10, columns=list(COLUMNS))
    noise = np.random.default_rng(0).normal(size=20)
    encoded = np.stack([np.tile([-1.0, 1.0], 10) + 0.1 * noise, noise], axis=1)
    pairs = {"good": ("A", "B"), "bad": ("A", "C")}
    return CrossEncoding(rows={"good": rows}, encoded={"good": encoded}, pairs=pairs, data_pairs={"good": ("A", "B")}, sources=dict.fromkeys(pairs, "alternative"), split="test", seed=0)


def test_cross_encoding():
    ax = plot_cross_encoding(crossed())
    assert drawn(ax).shape == (2, 1) and (ax.get_ylabel(), ax.get_xlabel()) == ("encoder", "rows of")
    assert "struck through" in ax.texts[-1].get_text()
    assert len(ax.collections[0].get_segments()) == 1  # only the encoder of noise
    assert not plot_cross_encoding(crossed(), highlight=None).collections
    assert not plot_cross_encoding(crossed(), "positive_mean").collections
    with pytest.raises(InputError, match="no data set 'bad'"): plot_cross_encoding(crossed(), normalize=True)


def test_topk_passes_options_on_and_swallows_none(tmp_path):
    eight = models(8)
    ax = plot_topk_overlap(eight, topk=50, order="cluster", cmap="magma", column="jaccard", groups={"A": ["m0", "m1"]}, output=tmp_path / "f.svg")
    assert ax.images[0].cmap.name == "magma" and (tmp_path / "f.svg").exists() and ax.figure.axes[-1].get_ylabel() == "Jaccard index, %"
    assert "By chance a pair would share" in ax.get_xlabel() and ax.get_title(loc="left") == "The 50 most important weights"
    by = topk_overlap(models(3), topk=50, by="parameter")
    ax = plot_topk_overlap(by, group="weight", column="p_value")
    assert ax.get_title(loc="left").endswith("those in weight") and np.allclose(drawn(ax)[0, 1], by.matrix("p_value", "weight").iloc[0, 1])
    for wrong, message in (({"order": "name"}, "order: an option of the heatmap"), ({"colour": 1}, "option='colour'"), ({"kind": "pie"}, "kind='pie'")):
        with pytest.raises(InputError, match=message): plot_topk_overlap(models(3), topk=50, **wrong)
    with pytest.raises(InputError, match="too many regions"): plot_topk_overlap(eight, topk=50, kind="venn")
    with pytest.raises(InputError, match="part: the models are compared already"): plot_topk_overlap(by, part="encoder-weight")
    with pytest.raises(InputError, match="2 of them"): plot_topk_overlap(by)
    assert plot_topk_overlap(models(3), topk=50, kind="heatmap", annot=False).images


def test_chance_of_pruned_models_is_named():
    space = ParameterSpace.from_model(nn.Linear(20, 20))
    few = [GradiendModel.create(space.keep(torch.arange(40)), GradiendConfig(pair=("a", "b")), seed=s) for s in (0, 1)]
    ax = plot_topk_overlap(few, topk=20)
    assert "By chance a pair would share 10.0 weights" in {t.get_text() for t in ax.texts}  # 20 * 20 / 40 within what both kept
