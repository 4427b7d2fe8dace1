"The feature atlas of the tutorial in small: four features of one suite, compared in every way."
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from gradiend import TextFilterConfig, TextPredictionDataCreator, TrainingArguments, corpora
from gradiend.children import PairDefinition
from gradiend.overlap import overlap_of
from gradiend.pruning import PrePruneConfig
from gradiend.suite import TrainerSuite
from gradiend.visualizer.heatmap import plot_cross_encoding, plot_similarity_heatmap
from gradiend.visualizer.topk import plot_topk_overlap

matplotlib.use("Agg")
WORDS = {"1SG": ["I"], "1PL": ["we"], "he": ["he"], "she": ["she"], "3PL": ["they"]}
THIRD = ("he", "she")
CHILDREN = [
    PairDefinition(("1SG", "1PL"), child_id="first"),
    PairDefinition(("3SG", "3PL"), child_id="third", class_merge_map={"3SG": THIRD}),
    PairDefinition(("SG", "PL"), child_id="number", class_merge_map={"SG": ("1SG", *THIRD), "PL": ("1PL", "3PL")},
                   transition_groups=[("1SG", "1PL"), (*THIRD, "3PL")]),
    PairDefinition(("he", "she"), child_id="gender"),
]
GROUPS = {"Number": ["first", "third", "number"], "Gender": ["gender"]}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    "The trained suite and its report."
    targets = [TextFilterConfig(words, id=name) for name, words in WORDS.items()]
    creator = TextPredictionDataCreator(corpora.load("pronoun", n=600, seed=0), targets, seed=0)
    data = creator.generate_training_data(max_size_per_class=20, train_ratio=0.5, val_ratio=0.2, test_ratio=0.3)
    args = TrainingArguments(train_batch_size=4, max_steps=25, eval_steps=25, learning_rate=1e-3, max_seeds=1,  # cheaper than the closed form
                             pre_prune_config=PrePruneConfig(n_samples=16, topk=0.02), experiment_dir=str(tmp_path_factory.mktemp("atlas")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    suite = TrainerSuite("gradiend/mini-mlm", data, pair_definitions=CHILDREN, args=args, run_id="atlas", max_per_class=20)
    yield suite, suite.train(progress=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def crossing(atlas):
    "What every encoder makes of every child's rows."
    return atlas[0].cross_encode(split=("validation", "test"))


def test_every_child_learned_its_feature_and_a_rerun_skips_it(atlas):
    suite, report = atlas
    assert list(report.frame.index) == ["first", "third", "number", "gender"]
    assert report.frame["converged"].all() and (report.frame["correlation"] > 0.5).all()
    assert set(suite.train(progress=False).frame["status"]) == {"skipped"}


def test_merged_number_turns_words_only_into_words_of_the_same_person(atlas):
    rows = atlas[0].trainer("number").examples.frame
    first, words = {"i", "we"}, rows[["factual", "alternative"]].apply(lambda column: column.str.lower())
    assert (words["factual"].isin(first) == words["alternative"].isin(first)).all()
    assert set(rows["factual_class"]) == {"SG", "PL"} and 0.2 < words["factual"].isin(first).mean() < 0.8


def test_related_features_share_more_weights_and_all_more_than_chance(atlas):
    overlap = atlas[0].topk_overlap(topk=1000)
    share = overlap.matrix("intersection")
    assert share.loc["number", "first"] > share.loc["first", "third"] and share.loc["number", "third"] > share.loc["first", "third"]
    assert share.loc["third", "gender"] > share.loc["first", "gender"]  # he and she are in both
    assert (overlap.frame["intersection"] > overlap.frame["expected_within_kept"]).all() and overlap.frame["p_value"].max() < 1e-6


def test_overlap_without_the_word_vectors_agrees_with_sets(atlas):
    models, where = atlas[0].get_models(), lambda name: "words" if "tok_embeddings" in name else "layers"
    chosen = {}
    for name, model in models.items():
        sizes = model.importance("decoder-weight").clone()
        for parameter, part in zip(model.space.names, model.space.parts(sizes), strict=True):
            if where(parameter) == "words": part.zero_()
        chosen[name] = model.space.take(sizes.topk(200).indices)
    found = overlap_of(chosen, by=where).matrix("intersection", "layers")
    sets = {name: set(space.global_index.tolist()) for name, space in chosen.items()}
    assert all(found.loc[a, b] == len(sets[a] & sets[b]) for a in sets for b in sets)


def test_directions_of_a_merged_feature_point_the_way_of_its_parts(atlas):
    cosine = atlas[0].similarity(measure="cosine_signed", part="decoder-weight").matrix()
    assert cosine.loc["number", "first"] > 0.2 and cosine.loc["number", "third"] > 0.2
    assert abs(cosine.loc["first", "gender"]) < 0.2


def test_encoders_read_their_own_rows_best_and_merged_number_reads_both_persons(crossing):
    square, chance = crossing.matrix(), crossing.matrix("chance")
    for name in square.index: assert square.loc[name, name] > chance.loc[name, name]
    assert square.loc["number", "first"] > chance.loc["number", "first"] and square.loc["number", "third"] > chance.loc["number", "third"]
    assert square.loc["first", "first"] > abs(square.loc["gender", "first"]) and square.loc["gender", "gender"] > abs(square.loc["first", "gender"])


def test_the_figures_of_the_tutorial(atlas, crossing, tmp_path):
    suite = atlas[0]
    texts = [text.get_text() for text in plot_topk_overlap(suite.topk_overlap(), kind="heatmap", groups=GROUPS, output=tmp_path / "6.png").texts]
    assert {"Number", "Gender"} <= set(texts)
    plot_topk_overlap(suite.get_models(["first", "third", "gender"]), output=tmp_path / "5.png")
    plot_similarity_heatmap(suite.similarity(measure="cosine_signed"), groups=GROUPS, output=tmp_path / "signed.png")
    plot_cross_encoding(crossing, groups=GROUPS, output=tmp_path / "cross.png")
    assert all(path.stat().st_size > 5_000 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 4
    plt.close("all")
