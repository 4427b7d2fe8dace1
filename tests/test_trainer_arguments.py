"TrainingArguments: nothing is swallowed, nothing is lost on the way to JSON, every bad value is named."
import dataclasses
import inspect
import json
import pickle

import pytest

from gradiend.core import InputError
from gradiend.pruning import PostPruneConfig, PrePruneConfig
from gradiend.trainer.arguments import TrainingArguments, differences

EVERYTHING = TrainingArguments(
    experiment_dir="runs/x", source="factual", target="alternative", train_batch_size=4, eval_batch_size=5, learning_rate=3e-4,
    num_train_epochs=2, max_steps=77, weight_decay=0.0, adam_epsilon=1e-12, eval_steps=9, eval_max_size=11, seed=5, max_seeds=4,
    min_convergent_seeds=2, convergent_score_threshold=0.6, convergent_mean_by_class_threshold=None, fail_on_non_convergence=True,
    params=["a.*", "b"], pre_prune_config=PrePruneConfig(n_samples=3, topk=17), post_prune_config=PostPruneConfig(topk=0.3),
    latent_dim=2, activation_encoder="identity", activation_decoder="tanh", bias_decoder=False, gradient_scale=2.5,
    decoder_eval_lrs=[0.1, 1.0], lms_ratio=0.95)


def test_every_field_differs_from_its_default_and_survives_json():
    assert len(differences(EVERYTHING)) == len(dataclasses.fields(TrainingArguments))
    back = TrainingArguments.from_dict(json.loads(json.dumps(EVERYTHING.to_dict())))
    assert back == EVERYTHING and hash(back) == hash(EVERYTHING)
    assert pickle.loads(pickle.dumps(EVERYTHING)) == EVERYTHING
    assert differences(back, EVERYTHING).empty


def test_defaults_are_those_of_the_paper():
    args = TrainingArguments()
    assert (args.source, args.target, args.learning_rate, args.weight_decay, args.adam_epsilon) == ("alternative", "diff", 1e-5, 1e-2, 1e-8)
    assert (args.eval_steps, args.max_seeds, args.min_convergent_seeds, args.latent_dim) == (250, 3, 1, 1)


@pytest.mark.parametrize("name, value", [
    ("train_batch_size", 0), ("eval_batch_size", -1), ("eval_steps", 0), ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", 0),
    ("learning_rate", 0.0), ("learning_rate", float("inf")), ("weight_decay", -1e-9), ("adam_epsilon", 0), ("seed", -1), ("max_seeds", 0),
    ("convergent_score_threshold", 2), ("source", "none"), ("target", "Diff"), ("activation_encoder", "swish9"), ("latent_dim", 0),
    ("gradient_scale", -1.0), ("gradient_scale", "Auto"), ("eval_max_size", 0), ("lms_ratio", -0.1), ("decoder_eval_lrs", [])])
def test_bad_values_are_named(name, value):
    with pytest.raises(InputError, match=name): TrainingArguments(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("train_batch_size", True), ("max_steps", 10.0), ("learning_rate", "1e-5"), ("bias_decoder", None), ("params", 7),
    ("pre_prune_config", {"topk": 0.1}), ("fail_on_non_convergence", 1)])
def test_wrong_types_are_named(name, value):
    with pytest.raises(TypeError, match=name): TrainingArguments(**{name: value})


def test_unknown_names_get_a_suggestion():
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"): TrainingArguments(learning_rat=1.0)
    with pytest.raises(TypeError, match="did you mean 'topk'"): TrainingArguments.from_dict({"pre_prune_config": {"topkk": 1}})
    with pytest.raises(TypeError, match="the arguments are experiment_dir"): TrainingArguments(zzz=1)


def test_more_seeds_wanted_than_trained():
    with pytest.raises(InputError, match="min_convergent_seeds=4"): TrainingArguments(min_convergent_seeds=4)


def test_max_steps_is_the_number_of_steps_also_beyond_the_epochs():
    assert TrainingArguments(max_steps=500, num_train_epochs=1).steps(6) == 500
    assert TrainingArguments(max_steps=2, num_train_epochs=5).steps(6) == 2
    assert TrainingArguments(num_train_epochs=5).steps(6) == 30


def test_signature_stays_readable():
    names = list(inspect.signature(TrainingArguments).parameters)
    assert names == [f.name for f in dataclasses.fields(TrainingArguments)]
