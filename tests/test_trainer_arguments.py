"TrainingArguments: nothing is swallowed, nothing is lost on the way to JSON, every bad value is named."
import copy
import dataclasses
import inspect
import json
import pickle
import re
import sys

import pytest
import torch
from transformers import get_scheduler

from gradiend.core import InputError
from gradiend.pruning import PostPruneConfig, PrePruneConfig
from gradiend.trainer.arguments import RETIRED, SYNONYMS, TrainingArguments, differences
from gradiend.trainer.optimisation import LRSearchConfig, SCHEDULERS

EVERYTHING = TrainingArguments(
    experiment_dir="runs/x", base_dtype=torch.bfloat16, device_map={"": "cpu"}, trust_remote_code=True, prediction_objective="causal_cloze", max_length=48, cloze_window=3,
    source="factual", target="alternative", params=["a.*", re.compile(r"layer\.\d", re.IGNORECASE)], pre_prune_config=PrePruneConfig(n_samples=3, topk=17),
    post_prune_config=PostPruneConfig(topk=0.3), latent_dim=2, activation_encoder="identity", activation_decoder="tanh", bias_decoder=False, gradient_scale=2.5,
    shuffle_labels=True, criterion="torch.nn.functional:huber_loss", train_batch_size=4, gradiend_batch_size=2, train_max_size=9, num_train_epochs=2, max_steps=77,
    learning_rate="tune", lr_search_config=LRSearchConfig(bounds=(1e-6, 1e-2), probe_steps=60, seeds=2), optim="sgd", weight_decay=0.0, adam_beta1=0.8, adam_beta2=0.99,
    adam_epsilon=1e-12, lr_scheduler_type="cosine", warmup_steps=5, warmup_ratio=0.1, max_grad_norm=1.0, cache_gradients=False, cache_gradients_gb=0.5,
    use_cache=True, eval_strategy="epoch", eval_steps=9, eval_batch_size=5, eval_max_size=11, save_strategy="no", save_steps=7, logging_steps=3,
    report_to=["tensorboard", "wandb"], early_stopping_threshold=0.01, seed=5, max_seeds=4, min_convergent_seeds=2, convergent_score_threshold=0.6,
    convergent_mean_by_class_threshold=None, fail_on_non_convergence=True, seed_stability_topk=None, seed_stability_part="encoder-weight", encoder_eval_max_size=50,
    decoder_eval_max_size=60, decoder_eval_lrs=[0.1, 1.0], decoder_eval_feature_factors=[-1.0, 1.0], lms_ratio=0.95)
ALONE = {"do_eval": False, "solver": "spectral", "supervised_encoder": True, "supervised_decoder": True, "early_stopping_patience": 3} # Each excludes some of the above


def test_every_field_differs_from_its_default_and_survives_json():
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(differences(EVERYTHING)["argument"]) | set(ALONE) == names
    for args in (EVERYTHING, *(TrainingArguments(**{name: value}) for name, value in ALONE.items())):
        back = TrainingArguments.from_dict(json.loads(json.dumps(args.to_dict())))
        assert back == args and hash(back) == hash(args) and differences(back, args).empty
        assert set(args.to_dict()) == names and pickle.loads(pickle.dumps(args)) == args and copy.deepcopy(args) == args
        assert json.dumps(back.to_dict()) == json.dumps(args.to_dict())


def test_arguments_of_older_folders_are_read():
    old = {"experiment_dir": None, "source": "alternative", "target": "diff", "train_batch_size": 8, "learning_rate": 0.001, "params": ["*.weight"],
           "pre_prune_config": {"n_samples": 4, "topk": 0.1}, "decoder_eval_lrs": None, "lms_ratio": 0.99}
    assert TrainingArguments.from_dict(old).params == ("*.weight",) and TrainingArguments.from_dict({}) == TrainingArguments()


def test_precision_has_one_spelling():
    spellings = [torch.bfloat16, "torch.bfloat16", "bfloat16"]
    assert {TrainingArguments(base_dtype=d) for d in spellings} | {TrainingArguments(torch_dtype=d) for d in spellings} == {TrainingArguments(base_dtype="bfloat16")}
    assert TrainingArguments.from_dict(TrainingArguments(base_dtype=torch.bfloat16).to_dict()).dtype is torch.bfloat16


def test_what_is_given_cannot_be_changed_from_outside():
    place, patterns = {"": "cpu"}, ["a"]
    args = TrainingArguments(device_map=place, params=patterns)
    place[""], patterns[0] = "cuda", "b"
    assert args.device_map == {"": "cpu"} and args.params == ("a",)


@pytest.mark.parametrize("name", sorted(SYNONYMS))
def test_synonyms_mean_the_field_and_exclude_it(name):
    value = {"torch_dtype": "float16", "base_model_device_map": "cpu"}.get(name, 8)
    assert TrainingArguments(**{name: value}) == TrainingArguments(**{SYNONYMS[name]: value})
    with pytest.raises(TypeError, match=f"{name!r} is another name of {SYNONYMS[name]!r}"): TrainingArguments(**{name: value, SYNONYMS[name]: value})


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_names_of_other_trainers_get_a_remedy_that_exists(name):
    with pytest.raises(TypeError, match=re.escape(RETIRED[name])): TrainingArguments(**{name: 1})
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert name not in fields and all(word in fields for word in re.findall(r"set (\w+)", RETIRED[name]))


def test_contradictions_are_refused():
    for wrong, told in (({"supervised_encoder": True, "supervised_decoder": True}, "exclude each other"), ({"supervised_encoder": True, "latent_dim": 2}, "latent_dim=2"),
                        ({"solver": "spectral", "supervised_encoder": True}, "no training loop"), ({"solver": "mean_difference", "learning_rate": "tune"}, "no training loop"),
                        ({"lr_search_config": LRSearchConfig()}, "nothing to search"), ({"warmup_ratio": 0.1}, "constant_with_warmup"),
                        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "there are none"), ({"report_to": ["none", "wandb"]}, "report_to")):
        with pytest.raises(InputError, match=told): TrainingArguments(**wrong)


def test_reading_arguments_imports_nothing():
    before = set(sys.modules)
    args = TrainingArguments.from_dict({"criterion": "antigravity:loss"})
    assert "antigravity" not in set(sys.modules) - before
    with pytest.raises(InputError, match="cannot be imported"): TrainingArguments(criterion="no_such_package_here:loss").criterion_function()
    assert args.criterion == "antigravity:loss"


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "constant"])
def test_schedule_is_a_pure_function_of_the_step(name):
    args = TrainingArguments(lr_scheduler_type=name, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, seen = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=50), []
    for _ in range(50):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step(); scheduler.step()
    assert seen == [args.scheduler_factor(step, 50) for step in range(50)]
    assert args.scheduler_factor(30, 50) == seen[30] and args.scheduler_factor(3, 50) == seen[3]  # in any order
    assert TrainingArguments(lr_scheduler_type=name, warmup_steps=7, warmup_ratio=0.5).scheduler_factor(7, 50) == 1.0  # warmup_steps goes first


def test_defaults_are_those_of_the_paper():
    args = TrainingArguments()
    assert (args.source, args.target, args.learning_rate, args.weight_decay, args.adam_epsilon) == ("alternative", "diff", 1e-5, 1e-2, 1e-8)
    assert (args.eval_steps, args.max_seeds, args.min_convergent_seeds, args.latent_dim) == (250, 3, 1, 1)


@pytest.mark.parametrize("name, value", [
    ("train_batch_size", 0), ("eval_batch_size", -1), ("eval_steps", 0), ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", 0),
    ("learning_rate", 0.0), ("learning_rate", float("inf")), ("learning_rate", "1e-5"), ("weight_decay", -1e-9), ("adam_epsilon", 0), ("seed", -1), ("max_seeds", 0),
    ("convergent_score_threshold", 2), ("source", "none"), ("target", "Diff"), ("activation_encoder", "swish9"), ("latent_dim", 0),
    ("gradient_scale", -1.0), ("gradient_scale", "Auto"), ("eval_max_size", 0), ("lms_ratio", -0.1), ("decoder_eval_lrs", [])])
def test_bad_values_are_named(name, value):
    with pytest.raises(InputError, match=name): TrainingArguments(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("train_batch_size", True), ("max_steps", 10.0), ("learning_rate", None), ("bias_decoder", None), ("params", 7),
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


def test_choices_that_could_only_fail_at_the_end():
    with pytest.raises(InputError, match="fail_on_non_convergence=True needs evaluations"): TrainingArguments(do_eval=False, fail_on_non_convergence=True)
    with pytest.raises(InputError, match="supervised_encoder=True trains no decoder"): TrainingArguments(supervised_encoder=True, post_prune_config=PostPruneConfig(topk=0.5))
    assert TrainingArguments(supervised_encoder=True, post_prune_config=PostPruneConfig(topk=0.5, part="encoder-weight")).supervised_encoder
