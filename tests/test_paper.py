"""The snippets of the paper (sections 3.1 to 3.5) as printed; only the model's name and the base data are others."""
import matplotlib
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from gradiend import corpora

matplotlib.use("Agg")
base_model = "gradiend/mini-mlm"
SENTENCES = [1_000, pytest.param(12_000, marks=pytest.mark.slow)]  # the larger number fills all 2500 and 1000 rows asked for


@pytest.fixture(scope="module", params=SENTENCES)
def run(request, tmp_path_factory):
    "Everything that the snippets of sections 3.1 to 3.4 leave behind, run in a folder of its own."
    base_data = corpora.load("pronoun", n=request.param, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("paper"))
        # 3.1
        from gradiend import TextFilterConfig, TextPredictionDataCreator

        creator = TextPredictionDataCreator(
            base_data=base_data,
            feature_targets=[
                TextFilterConfig(["he", "she", "it"], id="3SG"),
                TextFilterConfig(["they"], id="3PL"),
            ],
        )

        training_data = creator.generate_training_data(
            max_size_per_class=2500)
        neutral_data = creator.generate_neutral_data(
            additional_excluded_words=["i", "we", "you"],
            max_size=1000,
        )

        # 3.2
        from gradiend import PostPruneConfig, PrePruneConfig, TextPredictionTrainer, TrainingArguments

        args = TrainingArguments(
            train_batch_size=8,
            max_steps=1000,
            eval_steps=250,
            learning_rate=1e-5,
            experiment_dir='runs/demonstration',
            pre_prune_config=PrePruneConfig(n_samples=16, topk=0.01),
            # keep top 1% dimensions
            post_prune_config=PostPruneConfig(topk=0.1),  # prune again
            # after training; keep 10% of remaining dimensions
        )

        trainer = TextPredictionTrainer(
            model=base_model,
            data=training_data,
            eval_neutral_data=neutral_data,
            args=args,
        )

        trainer.train()
        trainer.plot_training_convergence()  # Figure 2

        # 3.3
        enc = trainer.evaluate_encoder(plot=True)  # Figure 3
        print("Correlation:", enc["correlation"])
        print("Means:", enc["mean_by_feature_class"])

        dec = trainer.evaluate_decoder(plot=True, target_class="3SG")
        # Figure 4
        print(dec["3SG"]["learning_rate"])

        # 3.4
        changed_base_model = trainer.rewrite_base_model(
            decoder_results=dec, target_class="3SG")
        yield locals()


def test_data(run):
    assert set(run["training_data"]) == {"3SG", "3PL"}
    full = len(run["base_data"]) == 12_000
    assert {len(frame) for frame in run["training_data"].values()} == {2500 if full else 306}
    assert len(run["neutral_data"]) == (1000 if full else 208)


def test_encoder_separates_the_classes(run):
    means = run["enc"]["mean_by_feature_class"]
    assert run["enc"]["correlation"] > 0.9
    assert means["3SG"] > 0 > means["3PL"]  # the pair in the order given: the first class is positive


def test_rewrite_moves_the_probability_and_keeps_the_score(run):
    chosen = run["dec"]["3SG"]
    assert chosen["learning_rate"] > 0 and chosen["value"] > chosen["base_value"]
    assert chosen["lms"] >= 0.99 * chosen["base_lms"]
    before = run["trainer"].base_model.state_dict()
    after = run["changed_base_model"].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_figures_and_artifact_are_kept(run):
    folder = run["trainer"].folder.absolute()
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["convergence.png", "decoder.png", "encoder.png"]
    from gradiend import GradiendModel
    assert GradiendModel.from_pretrained(folder / "model").space.n == run["trainer"].get_model().space.n


def test_overlap_of_several_runs(run, tmp_path):
    from gradiend import PrePruneConfig, TextFilterConfig, TextPredictionDataCreator, TextPredictionTrainer, TrainingArguments, plot_topk_overlap

    trainers = [run["trainer"]]
    for first, second in ((("I", "1SG"), ("we", "1PL")), (("I", "1SG"), ("they", "3PL"))):
        creator = TextPredictionDataCreator(run["base_data"], [TextFilterConfig([word], id=name) for word, name in (first, second)])
        args = TrainingArguments(train_batch_size=8, max_steps=16, eval_steps=8, eval_max_size=20, learning_rate=1e-3, max_seeds=1,
                                 pre_prune_config=PrePruneConfig(n_samples=16, topk=0.01))
        trainers.append(TextPredictionTrainer(model=base_model, data=creator.generate_training_data(max_size_per_class=400), args=args))
        trainers[-1].train()

    # 3.5: assuming trainers is a list of Trainer instances over the
    # same base model
    models = [trainer.get_model() for trainer in trainers]
    ax = plot_topk_overlap(  # Figure 5
        models,
        topk=1000,
    )
    ax.figure.savefig(tmp_path / "venn.png")
    assert (tmp_path / "venn.png").stat().st_size > 5000


def test_the_rewritten_model_is_an_ordinary_checkpoint(run, tmp_path):
    run["trainer"].rewrite_base_model(decoder_results=run["dec"], target_class="3SG", output_dir=tmp_path / "changed")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path / "changed"), AutoTokenizer.from_pretrained(tmp_path / "changed")
    inputs = tokenizer("The drummers lost the beat because [MASK] were tired.", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, run["changed_base_model"](**inputs).logits, rtol=1e-5, atol=1e-5)
