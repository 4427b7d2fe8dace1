"""What the reference package (0.2.3) takes for the same rows; run by its own Python, never imported by the tests.

    <its python> reference_side.py <folder with model/ and rows.csv> <encoded rows> <threads> <runs>
    <its python> reference_side.py <folder> gradients <threads>

The first prints one JSON line: seconds, and multiples of one forward pass measured in the same process (`unit.py`).
The second writes the two gradients of one training batch and its rows to <folder>/gradients.pt.
"""
import json
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from gradiend import TextPredictionTrainer, TrainingArguments
from unit import forward_pass, median_seconds

BATCH = 32


def training_batch(trainer: TextPredictionTrainer, model) -> tuple:
    "Its training set, the first batch of it, and that batch's masked texts."
    batches = trainer.create_gradient_training_dataset(trainer.create_training_data(model, split="train", batch_size=BATCH), model)
    entry = batches[0]
    return batches, entry, list(entry["template"])


def options(output: str) -> TrainingArguments:
    return TrainingArguments(experiment_dir=output, source="alternative", target="diff", train_batch_size=BATCH, seed=0)


def gradients(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    rows = pd.read_csv(folder / "rows.csv")
    with tempfile.TemporaryDirectory() as output:
        trainer = TextPredictionTrainer(model=str(folder / "model"), data=rows, args=options(output), target_classes=list(rows["label_class"].unique()))
        _, entry, texts = training_batch(trainer, trainer.get_model())
        torch.save({"source": entry["source"], "target": entry["target"], "masked": texts, "factual": list(entry["factual_token"]), "alternative": list(entry["alternative_token"])}, folder / "gradients.pt")


def main(folder: Path, encoded: int, threads: int, runs: int) -> dict[str, float | str]:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    rows = pd.read_csv(folder / "rows.csv")
    few = rows.groupby("label_class", sort=False).head(encoded // 2)  # both classes, equally many
    with tempfile.TemporaryDirectory() as output:
        arguments = options(output)

        def trainer(frame: pd.DataFrame) -> TextPredictionTrainer:
            return TextPredictionTrainer(model=str(folder / "model"), data=frame, args=arguments, target_classes=list(rows["label_class"].unique()))

        every = trainer(rows)
        model = every.get_model()
        base, tokenizer = model.base_model, model.tokenizer

        # (a) the rows one by one, as its evaluation does; split "train" adds no neutral rows of its own
        small = trainer(few)
        evaluate = lambda: small.evaluate_encoder(model_with_gradiend=model, split="train", use_cache=False)  # noqa: E731
        n = int(evaluate()["n_samples"])
        assert n == len(few), f"{n} rows encoded instead of {len(few)}"
        encoding = median_seconds(evaluate, runs, warm_up=False)
        encode_unit = median_seconds(forward_pass(tokenizer, base, list(few["masked"])), 5)

        # (b) source and target gradient of one training batch
        batches, entry, texts = training_batch(every, model)
        training = median_seconds(lambda: batches[0], runs, warm_up=False)
        train_unit = median_seconds(forward_pass(tokenizer, base, texts), 5)
        assert len(texts) == BATCH and entry["source"].shape == entry["target"].shape
    return {"version": version("gradiend"), "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in base.parameters()), "entries": entry["source"].numel(),
            "encoded": n, "encode_seconds": encoding, "encode_unit_seconds": encode_unit, "encode": encoding / encode_unit,
            "train_seconds": training, "train_unit_seconds": train_unit, "train": training / train_unit}


if __name__ == "__main__":
    if sys.argv[2] == "gradients":
        gradients(Path(sys.argv[1]), int(sys.argv[3]))
    else:
        print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
