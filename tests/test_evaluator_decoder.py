"""Decoder evaluation: what is scored, what is compared with what, and that the base model comes back bit for bit."""
import copy
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tests.test_evaluator_encoder import PAIR, ROWS, table
from tests.tiny import SENTENCES, masked_model

from gradiend.core import InputError
from gradiend.data.examples import Examples
from gradiend.evaluator.decoder import Candidate, class_probabilities, evaluate_decoder, select_candidate, word_batches
from gradiend.evaluator.lms import language_modelling_score, lms_batches
from gradiend.gradients.objectives import masked_lm
from gradiend.gradients.space import ParameterSpace
from gradiend.model import GradiendConfig, GradiendModel

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
    for target, factor in zip(PAIR, (1.0, -1.0)):  # source alternative: the first class has factor +1
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
