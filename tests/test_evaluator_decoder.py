"""Decoder evaluation: what is scored, what is compared with what, and that the base model comes back bit for bit."""
import copy
import itertools
import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tests.test_evaluator_encoder import PAIR, ROWS, table
from tests.tiny import ARCHITECTURES, SENTENCES, masked_model, tiny_model

from gradiend import corpora, zoo
from gradiend.core import InputError
from gradiend.data.creation import TextPredictionDataCreator
from gradiend.data.examples import Examples, make_examples
from gradiend.data.targets import TextFilterConfig
from gradiend.delta import DELTA_PARTS, Delta, applied
from gradiend.evaluator.candidates import CandidateFolder, row_batches
from gradiend.evaluator.decoder import Candidate, Goal, _choose, class_probabilities, evaluate_decoder, select_candidate, try_candidates, word_batches
from gradiend.evaluator.lms import language_modelling_score, lms_batches
from gradiend.gradients.engine import weighted_sums
from gradiend.gradients.objectives import masked_lm, objective_for
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GRADIENTS, GradiendConfig, GradiendModel


@pytest.fixture(scope="module")
def parts():
    words, model = masked_model("bert", dtype=torch.float32)
    space = ParameterSpace.from_model(model)
    gradiend = GradiendModel.create(space, GradiendConfig(source="alternative", target="diff", pair=PAIR), seed=2)
    return model, masked_lm(words), Examples(table(ROWS), pair=PAIR), gradiend


def quietly(*args, **kwargs):
    "A random model guesses little, so warnings about a coarse score are expected here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate_decoder(*args, lms_texts=kwargs.pop("lms_texts", SENTENCES), **kwargs)


def test_probabilities_do_not_depend_on_batches(parts):
    model, objective, examples, _ = parts
    words = [["he", "she", "it"], ["they"]]
    full = class_probabilities(model, objective, word_batches(objective, examples.frame, words, batch_size=2))
    single = torch.cat([objective.probabilities(model, objective.prepare_words(examples.frame.iloc[[i]], words)) for i in range(len(examples))])
    assert torch.allclose(full, single.double(), atol=1e-6)


def test_candidates_are_the_base_model_plus_learning_rate_times_decoder(parts):
    model, objective, examples, gradiend = parts
    lrs = [0.5, 2.0]
    result = quietly(gradiend, model, objective, examples, lrs=lrs)
    batches = lms_batches(objective.tokenizer, SENTENCES, ignore_words=["he", "she", "it", "they"], batch_size=64)
    words = [list(examples.words(c)) for c in PAIR]
    for target, factor in zip(PAIR, (1.0, -1.0), strict=True):  # source alternative: the first class has factor +1
        for lr in lrs:
            moved = copy.deepcopy(model)
            step = gradiend.space.dense(lr * gradiend.decode(factor).detach().reshape(-1))
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    if name in step: parameter += step[name]
            lines = result.frame[(result.frame["target_class"] == target) & (result.frame["learning_rate"] == lr)]
            assert lines["feature_factor"].unique().tolist() == [factor]
            assert lines["lms"].unique().tolist() == [language_modelling_score(moved, batches)]
            p = class_probabilities(moved, objective, word_batches(objective, examples.frame, words))
            for _, line in lines.iterrows():
                rows = [i for i, name in enumerate(examples.frame["factual_class"]) if name == line["data_class"]]
                assert line["probability"] == pytest.approx(p[rows, PAIR.index(line["word_class"])].mean().item(), rel=1e-4)


def test_frame_is_tidy(parts):
    model, objective, examples, gradiend = parts
    result = quietly(gradiend, model, objective, examples, lrs=[1e-9, 0.1], lms_ratio=0.0)
    assert len(result.frame) == 2 * 3 * 2 * 2
    assert not result.frame.duplicated(["target_class", "learning_rate", "data_class", "word_class"]).any()
    assert result.frame.groupby("data_class")["n_rows"].unique().map(list).to_dict() == {"3PL": [3], "3SG": [2]}
    for target in PAIR:
        selected = result.frame[(result.frame["target_class"] == target) & result.frame["selected"]]
        assert selected["learning_rate"].unique().tolist() == [result[target]["learning_rate"]]
    assert result.frame["lms_tokens"].unique().tolist() == [result.lms_tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_model_comes_back_bit_for_bit(dtype):
    words, model = masked_model("bert", dtype=dtype)
    space = ParameterSpace.from_model(model)
    gradiend = GradiendModel.create(space, GradiendConfig(source="alternative", target="diff", pair=PAIR), seed=2)
    examples = Examples(table(ROWS), pair=PAIR)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.cls.eval()
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    quietly(gradiend, model, masked_lm(words), examples, lrs=[1e-3, 1.0, 1e4])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def test_base_model_comes_back_after_an_error(parts):
    model, objective, examples, gradiend = parts
    before = {k: v.clone() for k, v in model.state_dict().items()}

    class Breaks:
        tokenizer, name, calls = objective.tokenizer, "breaks", 0

        def prepare_words(self, frame, words):
            return objective.prepare_words(frame, words)

        def probabilities(self, model, batch):
            self.calls += 1
            if self.calls == 3: raise RuntimeError("in the middle of a candidate")
            return objective.probabilities(model, batch)

    with pytest.raises(RuntimeError, match="middle"):
        quietly(gradiend, model, Breaks(), examples, lrs=[1.0, 2.0, 3.0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_placeholder_gives_the_same_numbers(parts):
    model, objective, examples, gradiend = parts
    frame = examples.frame.assign(masked=examples.frame["masked"].str.replace("[MASK]", "<hole>"))
    other = quietly(gradiend, model, masked_lm(objective.tokenizer, mask="<hole>"), Examples(frame, pair=PAIR, mask="<hole>"), lrs=[0.1])
    pd.testing.assert_frame_equal(other.frame, quietly(gradiend, model, objective, examples, lrs=[0.1]).frame)


def candidate(lr, lms, p):
    return Candidate(lr, 1.0, lms, {"3PL": {"3SG": p, "3PL": 0.5}, "3SG": {"3SG": 0.9, "3PL": 0.0}})


def test_rule_agrees_with_exhaustive_search():
    rng = np.random.default_rng(0)
    for _ in range(200):
        base = candidate(0.0, 0.5, 0.3)
        tried = [candidate(float(lr), float(rng.choice([0.3, 0.49, 0.495, 0.5])), float(rng.choice([0.1, 0.3, 0.6]))) for lr in rng.permutation(4) + 1]
        best = 0.0
        for c in tried:
            if c.lms >= 0.99 * 0.5 and c.probabilities["3PL"]["3SG"] > 0.3 and c.learning_rate > best: best = c.learning_rate
        chosen = select_candidate(tried, base, target_class="3SG", other_class="3PL")
        assert chosen["learning_rate"] == best and chosen.passes == (best > 0)
        assert chosen.value >= chosen.base_value and chosen.lms >= 0.99 * chosen.base_lms


def test_base_stays_with_a_reason_and_a_warning(parts):
    model, objective, examples, gradiend = parts
    with pytest.warns(UserWarning, match="the base model stays"):
        result = evaluate_decoder(gradiend, model, objective, examples, lms_texts=SENTENCES, lrs=[1e-12], lms_ratio=0.0, target_class="3SG")
    chosen = result["3SG"]
    assert (chosen.learning_rate, chosen.passes) == (0.0, False) and chosen.value == chosen.base_value


def test_coarse_score_is_said(parts):
    model, objective, examples, gradiend = parts
    with pytest.warns(UserWarning, match="does not allow it to lose even one"):
        evaluate_decoder(gradiend, model, objective, examples, lms_texts=SENTENCES[:1], lrs=[0.1], target_class="3SG")


@pytest.mark.parametrize("wrong, message", [
    ({"target_class": "3sg"}, "target_class='3sg'"), ({"lrs": []}, "lrs="), ({"lrs": [-1.0]}, "lrs="), ({"lrs": [float("nan")]}, "lrs="),
    ({"lms_ratio": 99}, "lms_ratio=99"), ({"split": "dev"}, "dev"), ({"lms_texts": []}, "texts="), ({"lms_texts": "one text"}, "texts="),
    ({"lms_texts": ["they"]}, "ordinary token"), ({"examples": Examples(table(ROWS[1:3]), pair=PAIR)}, "'3PL'"),
])
def test_wrong_input_is_named(parts, wrong, message):
    model, objective, examples, gradiend = parts
    with pytest.raises(InputError, match=message):
        quietly(gradiend, model, objective, **{"examples": examples, **wrong})


# --- every architecture ------------------------------------------------------------------------------------------------

def he_they(n=5):
    "Rows about two words only, so that a direction and what is measured speak about the same thing."
    words = {"3SG": "he", "3PL": "they"}
    return Examples(table([(m, words[c], words[{"3SG": "3PL", "3PL": "3SG"}[c]], c) for m, _, _, c in ROWS[:n]]), pair=PAIR)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probabilities_of_a_row_do_not_depend_on_its_neighbours(name):
    "Alone, in pairs, all together in another order: nine architectures, word sets and rows' own words, one and several tokens."
    words, model = tiny_model(name)
    objective, frame = objective_for(words, model), Examples(table(ROWS), pair=PAIR).frame
    sets = [["he", "she", "watching the crowd"], ["they"]]
    asks = [lambda f, n: word_batches(objective, f, sets, batch_size=n), lambda f, n: row_batches(objective, f, batch_size=n)]
    for ask in asks:
        together = class_probabilities(model, objective, ask(frame, 5))
        alone = torch.cat([class_probabilities(model, objective, ask(frame.iloc[[i]], 1)) for i in range(len(frame))])
        backwards = class_probabilities(model, objective, ask(frame.iloc[::-1].reset_index(drop=True), 2)).flip(0)
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-12) and torch.allclose(together, backwards, rtol=1e-5, atol=1e-12)
        assert (together > 0).all() and (together < 1).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_evaluation_on_every_architecture(name):
    words, model = tiny_model(name, dtype=torch.float32)
    gradiend = GradiendModel.create(ParameterSpace.from_model(model), GradiendConfig(pair=PAIR), seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = quietly(gradiend, model, objective_for(words, model), Examples(table(ROWS), pair=PAIR), lrs=[0.01, 1.0], lms_ratio=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kind = "masked_lm" if words.mask_token_id is not None else "seq2seq" if model.config.is_encoder_decoder else "causal_lm"
    assert result.lms_kind == kind and len(result.frame) == 2 * 3 * 2 * 2
    assert (result.frame["perplexity"] > 1).all() and (result.frame["kl"] >= 0).all()
    assert (result.frame.query("learning_rate == 0")["kl"] == 0).all() and (result.frame.query("learning_rate == 1")["kl"] > 0).all()


def mean_direction(model, objective, examples, source, target, rows=slice(None)):
    "A GRADIEND whose decoder is the label-weighted mean of the target gradients: what training with this pair of gradients aims at."
    space, frame = ParameterSpace.from_model(model), examples.frame.iloc[rows]
    labels = torch.tensor(examples.labels(source)[rows], dtype=next(model.parameters()).dtype) / len(frame)
    factual, alternative = {"factual": (1, 0), "alternative": (0, 1), "diff": (1, -1)}[target]
    direction = weighted_sums(model, objective, objective.prepare(frame), torch.stack([factual * labels, alternative * labels])[None], space=space)
    gradiend = GradiendModel.create(space, GradiendConfig(source=source, target=target, pair=PAIR, bias_decoder=False, objective=objective.name))
    with torch.no_grad(): gradiend.decoder_weight.copy_(direction.T / direction.norm())
    return gradiend


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_factor_raises_its_class_for_all_nine_pairs_of_gradients(name):
    # A one-sided target moves one word; what that does where the other word stands depends on how alike the two contexts are, which random weights leave to chance
    words, model = tiny_model(name, seed=2 if name == "qwen3" else 0)
    objective, examples = objective_for(words, model), he_they()
    for source, target in itertools.product(GRADIENTS, repeat=2):
        gradiend = mean_direction(model, objective, examples, source, target)
        for increase, suffix in ((True, ""), (False, "_weaken")):
            result = quietly(gradiend, model, objective, examples, lrs=[0.01], lms_ratio=0.0, targets="rows", increase_target_probabilities=increase)
            for cls in PAIR:
                chosen = result[cls + suffix]
                assert chosen.passes and chosen.value > chosen.base_value, (source, target, cls, increase)


def test_the_factor_raises_its_class_on_unseen_sentences():
    "The embedded model, all nine pairs of gradients: directions from training rows, probabilities on test rows."
    words, model = zoo.load("gradiend/mini-mlm")
    filters = [TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")]
    tables = TextPredictionDataCreator(corpora.load("pronoun", n=200, seed=3), filters, seed=0, split_ratios=(0.5, 0.1, 0.4)).generate_training_data(max_size_per_class=20)
    objective, examples = masked_lm(words), make_examples(tables, pair=PAIR)
    train, test = examples.select("train"), examples.select("test")
    asked = word_batches(objective, test.frame, [examples.words(c) for c in PAIR])
    stood = {c: torch.tensor((test.frame["factual_class"] == c).to_list()) for c in PAIR}
    base = class_probabilities(model, objective, asked)
    for source, target in itertools.product(GRADIENTS, repeat=2):
        gradiend = mean_direction(model, objective, train, source, target)
        for i, cls in enumerate(PAIR):
            with applied(model, Delta.from_gradiend(gradiend, gradiend.feature_factor_towards(cls), 0.05)):
                moved = class_probabilities(model, objective, asked)
            assert moved[stood[PAIR[1 - i]], i].mean() > base[stood[PAIR[1 - i]], i].mean(), (source, target, cls)


# --- options ---------------------------------------------------------------------------------------------------------------

def test_weakening_uses_the_factor_of_the_other_class_and_its_own_rows(parts):
    model, objective, examples, gradiend = parts
    weak = quietly(gradiend, model, objective, examples, lrs=[0.5], target_class="3SG", increase_target_probabilities=False, lms_ratio=0.0)
    strong = quietly(gradiend, model, objective, examples, lrs=[0.5], target_class="3PL", lms_ratio=0.0)
    assert list(weak.selections) == ["3SG_weaken"] and not weak.frame["strengthen"].any()
    (key, moved), = [(k, c) for k, c in weak.grid.items() if k != "base"]
    assert moved == strong.grid[key]
    lines = weak.frame.query("data_class == '3SG' and word_class == '3SG'")
    assert lines["metric"].tolist() == pytest.approx((1 - lines["probability"]).tolist())
    chosen = weak["3SG_weaken"]
    assert chosen["base_value"] == pytest.approx(1 - weak.grid["base"].probabilities["3SG"]["3SG"]) and not chosen.strengthen
    assert chosen.passes == (moved.probabilities["3SG"]["3SG"] < weak.grid["base"].probabilities["3SG"]["3SG"])


@pytest.mark.parametrize("part", DELTA_PARTS)
def test_the_part_is_what_is_applied(parts, part):
    model, objective, examples, gradiend = parts
    result = quietly(gradiend, model, objective, examples, lrs=[0.5], target_class="3PL", part=part, lms_ratio=0.0)
    moved = copy.deepcopy(model)
    Delta.from_gradiend(gradiend, -1.0, 0.5, part=part).apply_(moved)
    words = [list(examples.words(c)) for c in PAIR]
    p = class_probabilities(moved, objective, word_batches(objective, examples.frame, words))
    rows = (examples.frame["factual_class"] == "3SG").to_numpy()
    assert result.grid[-1.0, 0.5].probabilities["3SG"]["3PL"] == pytest.approx(p[torch.tensor(rows), 1].mean().item(), rel=1e-5)
    assert result.part == result["3PL"].part == part and set(result.frame["part"]) == {part}


def test_targets_of_rows_are_their_own_words(parts):
    model, objective, examples, gradiend = parts
    result = quietly(gradiend, model, objective, examples, lrs=[0.5], targets="rows")
    p = model(**objective.tokenizer([m.replace("[MASK]", objective.tokenizer.mask_token) for m in examples.frame["masked"]], return_tensors="pt", padding=True)).logits.softmax(-1)
    ids = objective.tokenizer([m.replace("[MASK]", objective.tokenizer.mask_token) for m in examples.frame["masked"]], padding=True, return_tensors="pt")["input_ids"]
    found = {}
    for i, row in examples.frame.iterrows():
        place = (ids[i] == objective.tokenizer.mask_token_id).nonzero().item()
        for kind in ("factual", "alternative"):
            token, = objective.tokenizer(row[kind], add_special_tokens=False)["input_ids"]
            found.setdefault((row["factual_class"], row[f"{kind}_class"]), []).append(p[i, place, token].item())
    for (data, word), values in found.items():
        assert result.grid["base"].probabilities[data][word] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_classes_that_share_a_word_need_row_wise_targets(parts):
    model, objective, _, gradiend = parts
    frame = table([*ROWS, ("Anna said that [MASK] was cold.", "they", "he", "3SG")])
    both = Examples(frame, pair=PAIR)
    with pytest.raises(InputError, match="targets='rows'"): quietly(gradiend, model, objective, both, lrs=[1.0])
    assert len(quietly(gradiend, model, objective, both, lrs=[1.0], targets="rows").frame) == 2 * 2 * 2 * 2


def test_words_and_rows_of_a_third_class(parts):
    model, objective, examples, gradiend = parts
    frame = pd.concat([examples.frame, table([("The kettle whistled until [MASK] was empty.", "Anna", "they", "3SG")]).assign(factual_class="name", alternative_class="3PL")])
    three = Examples(frame, pair=PAIR)
    result = quietly(gradiend, model, objective, three, lrs=[0.5], target_class="3SG", targets={"3SG": ["he", "she"], "3PL": ["they"], "name": ["Anna"]})
    assert set(result.frame["word_class"]) == set(result.frame["data_class"]) == {*PAIR, "name"}
    assert result["3SG"]["base_value"] == result.grid["base"].probabilities["3PL"]["3SG"]
    pair_only = quietly(gradiend, model, objective, three, lrs=[0.5], target_class="3SG")
    assert set(pair_only.frame["data_class"]) == set(PAIR)


def test_ignored_words_and_targets_are_not_asked_about(parts):
    model, objective, examples, gradiend = parts
    texts, targets, words = SENTENCES * 4, ["he", "she", "it", "they"], objective.tokenizer
    for ignored in ([], ["the", "was", "were"]):
        result = quietly(gradiend, model, objective, examples, lms_texts=texts, lrs=[1.0], target_class="3SG", eval_ignore=ignored, batch_size=64)
        batches = lms_batches(words, texts, ignore_words=targets + ignored, batch_size=64)
        assert result.lms_tokens == sum(map(len, batches))
        assert result.grid["base"].lms == language_modelling_score(model, batches)
        asked = {words.convert_ids_to_tokens(t) for b in batches for t in b.tokens.tolist()}
        assert not asked & {*targets, *ignored} and (ignored or asked & {"the", "was", "were"})
    with pytest.raises(InputError, match="ordinary token"): quietly(gradiend, model, objective, examples, lms_texts=["the bus", "he"], lrs=[1.0], eval_ignore=["the", "bus"])


def test_without_neutral_texts_the_rows_are_used(parts):
    model, objective, examples, gradiend = parts
    with pytest.warns(UserWarning, match="lms_texts: none were given"):
        result = evaluate_decoder(gradiend, model, objective, examples, lrs=[0.1], target_class="3SG")
    named = quietly(gradiend, model, objective, examples, lrs=[0.1], target_class="3SG", lms_texts=list(examples.frame["text"]))
    assert (result.lms_source, named.lms_source) == ("rows", "lms_texts")
    pd.testing.assert_frame_equal(result.frame, named.frame)


def test_a_base_model_without_a_single_right_guess(parts):
    model, objective, examples, gradiend = parts
    blind = copy.deepcopy(model)
    with torch.no_grad(): blind.get_output_embeddings().bias[objective.tokenizer.convert_tokens_to_ids("[PAD]")] = 1e6
    for search in ("grid", "bisect"):
        result = quietly(gradiend, blind, objective, examples, lrs=[0.1, 1.0], search=search)
        assert all((s.outcome, s.learning_rate, s.base_lms) == ("no_score", 0.0, 0.0) for s in result.selections.values())
    assert quietly(gradiend, blind, objective, examples, lrs=[0.1], lms_ratio=0.0)["3SG"].outcome in ("selected", "none_improves")


@pytest.mark.parametrize("selector", ["paper", "best_metric", "metric_x_lms"])
def test_selectors_agree_with_exhaustive_search(selector):
    rng = np.random.default_rng(1)
    for _ in range(200):
        base = candidate(0.0, 0.5, 0.3)
        tried = [candidate(float(lr), float(rng.choice([0.2, 0.45, 0.495, 0.5, 0.6])), float(rng.choice([0.1, 0.3, 0.6, 0.7]))) for lr in rng.permutation(5) + 1]
        p = {c.learning_rate: c.probabilities["3PL"]["3SG"] for c in tried}
        keeps, better = {c.learning_rate for c in tried if c.lms >= 0.99 * 0.5}, {lr for lr in p if p[lr] > 0.3}
        good, product = keeps & better, {c.learning_rate: p[c.learning_rate] * c.lms for c in tried}
        chosen = select_candidate(tried, base, target_class="3SG", other_class="3PL", selector=selector)
        if selector == "paper": assert chosen.learning_rate == max(good, default=0.0)
        elif selector == "best_metric": assert p.get(chosen.learning_rate, 0.3) == max((p[lr] for lr in good), default=0.3)
        elif chosen.passes: assert product[chosen.learning_rate] == max(product.values()) > 0.3 * 0.5
        assert chosen.passes == (chosen.learning_rate > 0) == (chosen.outcome == "selected")
        if not chosen.passes and selector != "metric_x_lms": assert chosen.outcome == ("none_improves" if keeps else "none_keeps_lms")


@pytest.fixture(scope="module")
def writing():
    "A causal model, whose score is a smooth function of the strength."
    words, model = tiny_model("gpt2", dtype=torch.float32)
    objective, examples = objective_for(words, model), he_they()
    return model, objective, examples, mean_direction(model, objective, examples, "factual", "diff")


def test_halving_finds_the_border_of_a_fine_grid(writing):
    model, objective, examples, gradiend = writing
    result = quietly(gradiend, model, objective, examples, search="bisect", lms_ratio=0.97, target_class="3SG", targets="rows", precision=0.02)
    b, = result.brackets["3SG"]
    assert 9 <= len(b.tried) <= 12 and result.measured == len(b.tried) + 1 and b.precision <= 0.02
    lrs = [b.keeps * 1.01 ** i for i in range(-30, 1)] + [b.fails * 1.01 ** i for i in range(30)]
    fine = quietly(gradiend, model, objective, examples, lrs=lrs, lms_ratio=0.97, target_class="3SG", targets="rows").frame.groupby("learning_rate")["keeps_lms"].first()
    assert fine[[lr for lr in lrs if lr <= b.keeps]].all() and not fine[[lr for lr in lrs if lr >= b.fails]].any()
    chosen = result["3SG"]
    assert chosen.learning_rate == b.keeps and "by halving in" in chosen.reason and chosen.lms >= 0.97 * chosen.base_lms
    assert set(result.grid) == {"base", *((chosen.feature_factor, lr) for lr, _ in b.tried)}


def test_halving_outside_the_border(writing):
    model, objective, examples, gradiend = writing
    harmless = quietly(gradiend, model, objective, examples, search="bisect", lms_ratio=0.5, target_class="3SG", targets="rows", lrs=[1e-4, 1e-3])
    assert len(harmless.brackets["3SG"][0].tried) == 1 and "even the largest, 0.001, keeps it" in harmless["3SG"].reason
    harmful = quietly(gradiend, model, objective, examples, search="bisect", lms_ratio=1.0, target_class="3SG", targets="rows", lrs=[50.0, 100.0])
    assert harmful["3SG"].outcome == "none_keeps_lms" and harmful.brackets["3SG"][0].keeps == 0.0


class Curves:
    "Stands for a bench whose candidates follow two functions of the learning rate."
    part = "decoder"

    def __init__(self, lms, p): self.lms, self.p = lms, p
    def candidate(self, factor, lr): return Candidate(lr, factor, self.lms(lr), {"3PL": {"3SG": self.p(lr), "3PL": 0.5}, "3SG": {"3SG": 0.9, "3PL": 0.0}})


def halved(lms, p, precision=0.05):
    bench, goal = Curves(lms, p), Goal("3SG", "3PL", candidate(0.0, 0.5, 0.3))
    tried, brackets = try_candidates(bench, goal, [1.0], (0.001, 100.0), search="bisect", precision=precision)
    assert len(tried) <= 12
    return _choose(bench, goal, tried, brackets, selector="paper", tokens=100, precision=precision)


@pytest.mark.parametrize("first, last", [(0.0, 2.0), (0.0, 0.05), (0.4, 3.0), (5.0, 30.0)])
@pytest.mark.parametrize("border", [1000.0, 60.0])
def test_halving_goes_on_where_a_harmless_rate_does_no_good(first, last, border):
    "The score is kept up to a border, but the probability is raised in a part of that range only."
    found = halved(lambda lr: 0.5 if lr <= border else 0.1, lambda lr: 0.6 if first <= lr <= last else 0.2)
    assert found.outcome == "selected" and last / 1.05 <= found.learning_rate <= last
    assert "keeps it but does no good" in found.reason


def test_halving_says_what_it_tried_if_nothing_passes():
    found = halved(lambda lr: 0.5, lambda lr: 0.3)
    assert found.outcome == "none_improves" and "by halving in 12 measurements: tried 0.001, " in found.reason and "100 is the largest that keeps the LMS" in found.reason
    lost = halved(lambda lr: 0.1, lambda lr: 0.6)
    assert lost.outcome == "none_keeps_lms" and "even the smallest, 0.001, does not keep the LMS" in lost.reason


def test_halving_doubts_a_score_that_goes_up_and_down():
    found = halved(lambda lr: 0.1 if 0.2 < lr < 1 else 0.5, lambda lr: 0.6 if lr < 10 else 0.2)
    assert found.passes and "but the LMS goes up and down here: 0.2017 does not keep it, the larger 100 does" in found.reason
    assert "up and down" not in halved(lambda lr: 0.5 if lr < 1 else 0.1, lambda lr: 0.6).reason


def test_halving_says_that_the_precision_was_not_reached():
    assert "precision=1e-05 was not reached" in halved(lambda lr: 0.5 if lr < 1.7 else 0.1, lambda lr: 0.6, precision=1e-5).reason
    assert "not reached" not in halved(lambda lr: 0.5 if lr < 1.7 else 0.1, lambda lr: 0.6).reason


def test_a_string_is_one_word_and_a_number_one_rate(parts):
    model, objective, examples, gradiend = parts
    run = lambda **options: quietly(gradiend, model, objective, examples, **{"lrs": [0.5], "target_class": "3SG", "lms_ratio": 0.0, **options})  # noqa: E731
    assert run(eval_ignore="the").lms_tokens == run(eval_ignore=["the"]).lms_tokens < run().lms_tokens
    assert "2" in set(run(targets={"3SG": ["he", "she"], "3PL": "they", "2": "was"}).frame["word_class"])
    assert run(lrs=0.5, feature_factors=1.0).grid.keys() == run().grid.keys()
    for wrong in ({"lrs": "0.5"}, {"feature_factors": "1"}, {"targets": {"3SG": ["he"], "3PL": ["they"], "2": []}}, {"targets": ["he"]}):
        with pytest.raises(InputError, match=next(iter(wrong))): run(**wrong)


def test_more_rows_and_texts_than_there_are(parts):
    model, objective, examples, gradiend = parts
    found = quietly(gradiend, model, objective, examples, lrs=[0.5], max_size=99, lms_max_size=99)
    assert [note.split(":")[0] for note in found.notes] == ["max_size=99", "lms_max_size=99"] and "max_size=99" in repr(found)
    assert not quietly(gradiend, model, objective, examples, lrs=[0.5], max_size=2, lms_max_size=2).notes


def test_two_factors_have_two_borders(writing):
    model, objective, examples, gradiend = writing
    towards = gradiend.feature_factor_towards("3SG")
    result = quietly(gradiend, model, objective, examples, search="bisect", lms_ratio=0.97, target_class="3SG", targets="rows", feature_factors=[towards, 2 * towards], precision=0.02)
    one, two = result.brackets["3SG"]
    assert one.keeps / two.keeps == pytest.approx(2, rel=0.05)  # twice the factor, half the rate: there is no bias
    assert result["3SG"].learning_rate == one.keeps and result["3SG"].feature_factor == towards


# --- the cache ----------------------------------------------------------------------------------------------------------------

def test_candidates_are_reused_only_if_everything_agrees(parts):
    model, objective, examples, gradiend = parts
    cache, options = {}, {"lrs": [0.1, 1.0], "target_class": "3SG"}
    first = quietly(gradiend, model, objective, examples, cache=cache, **options)
    assert first.measured == len(cache) == 3
    second = quietly(gradiend, model, objective, examples, cache=cache, selector="best_metric", lms_ratio=0.5, **options)  # a question about the same numbers
    assert second.measured == 0 and second.grid == first.grid
    changed = copy.deepcopy(model)
    with torch.no_grad(): next(changed.parameters())[0, 0] += 1e-3
    other = GradiendModel.create(gradiend.space, gradiend.config, seed=3)
    fewer = Examples(examples.frame.iloc[1:], pair=PAIR)
    for arguments, more in (((gradiend, changed, objective, examples), {}), ((other, model, objective, examples), {}), ((gradiend, model, objective, fewer), {}),
                            ((gradiend, model, objective, examples), {"lms_texts": SENTENCES[1:]}), ((gradiend, model, objective, examples), {"seed": 1}),
                            ((gradiend, model, objective, examples), {"targets": {"3SG": ["he"], "3PL": ["they"]}}), ((gradiend, model, objective, examples), {"targets": "rows"}),
                            ((gradiend, model, objective, examples), {"part": "decoder-weight"}), ((gradiend, model, objective, examples), {"eval_ignore": ["the"]})):
        result = quietly(*arguments, cache=cache, **options, **more)
        assert result.measured >= 2, more
        pd.testing.assert_frame_equal(result.frame, quietly(*arguments, **options, **more).frame)


def test_a_folder_of_candidates(parts, tmp_path):
    model, objective, examples, gradiend = parts
    first = quietly(gradiend, model, objective, examples, lrs=[0.1], cache=tmp_path / "candidates")
    again = quietly(gradiend, model, objective, examples, lrs=[0.1], cache=str(tmp_path / "candidates"))
    assert (first.measured, again.measured) == (3, 0) and again.grid == first.grid
    pd.testing.assert_frame_equal(first.frame, again.frame)
    for damage in (lambda text: text[: len(text) // 2], lambda text: text.replace('"lms": ', '"lms": 0.5, "old": '), lambda text: "[]"):
        for file in (tmp_path / "candidates").iterdir(): file.write_text(damage(file.read_text()))
        with pytest.warns(UserWarning, match="measured again"):
            repaired = evaluate_decoder(gradiend, model, objective, examples, lms_texts=SENTENCES, lrs=[0.1], cache=tmp_path / "candidates")
        assert repaired.measured == 3 and repaired.grid == first.grid
    assert len(CandidateFolder(tmp_path / "candidates")) == 3
    for file in (tmp_path / "candidates").iterdir(): json.loads(file.read_text())


def test_no_copy_is_made_and_each_candidate_is_swept_once(parts, monkeypatch):
    model, objective, examples, gradiend = parts
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    def no_copy(*args, **kwargs): raise AssertionError("the model was copied")
    monkeypatch.setattr(copy, "deepcopy", no_copy)
    try: quietly(gradiend, model, objective, examples, lrs=[0.1, 0.2, 0.5], target_class="3SG", batch_size=64)
    finally: handle.remove()
    assert len(calls) == 4 * 2  # the base model and three candidates, one batch of texts and one of rows each


def test_a_choice_is_never_silent(writing):
    "Whatever happens, passes, outcome and learning rate tell the same story."
    model, objective, examples, gradiend = writing
    seen = set()
    for ratio, lrs in itertools.product((0.0, 0.5, 1.0), ([1e-12], [1e4], [0.1, 1.0])):
        for s in quietly(gradiend, model, objective, examples, lms_ratio=ratio, lrs=lrs, targets="rows").selections.values():
            seen.add(s.outcome)
            assert s.passes == (s.outcome == "selected") == (s.learning_rate > 0) == (s.id != "base") and s.reason
            if s.passes: assert s.value > s.base_value and s.lms >= ratio * s.base_lms
            else: assert "stays" in s.reason and s.value == s.base_value
    assert seen == {"selected", "none_keeps_lms", "none_improves"}


@pytest.mark.parametrize("wrong, message", [
    ({"search": "halving"}, "search="), ({"selector": "best"}, "best_metric"), ({"search": "bisect", "selector": "best_metric"}, "search='grid'"),
    ({"search": "bisect", "precision": 0.0}, "precision"), ({"part": "encoder"}, "part="), ({"feature_factors": [1.0]}, "sign of -1"), ({"targets": "row"}, "targets="),
    ({"targets": {"3SG": ["he"]}}, "'3PL'"), ({"targets": {"3SG": ["he"], "3PL": []}}, "'3PL'"), ({"lms_max_size": 0}, "lms_max_size"), ({"target_class": []}, "target_class"),
])
def test_more_wrong_input_is_named(parts, wrong, message):
    model, objective, examples, gradiend = parts
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        quietly(gradiend, model, objective, examples, **{"lrs": [0.1], **wrong})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
