"""What the reference package (0.2.3) takes to evaluate decoder candidates; run by its own Python, never imported by the tests.

    <its python> reference_decoder_side.py <folder with model/, rows.csv and neutral.csv> <candidates> <threads>

Prints one JSON line: CPU seconds of one candidate (the difference between a longer and a shorter grid, so that whatever is done once does not
count), a forward pass of the same process (`unit.py`), what was evaluated, and how much the peak of the resident memory grew.
"""
import json
import logging
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from gradiend import TextPredictionTrainer, TrainingArguments
from unit import forward_pass


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu_seconds(action, runs: int = 5) -> float:
    "The CPU time of `action`, after one call that does not count."
    action()
    start = time.process_time()
    for _ in range(runs): action()
    return (time.process_time() - start) / runs


def main(folder: Path, candidates: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    rows, neutral = pd.read_csv(folder / "rows.csv"), pd.read_csv(folder / "neutral.csv")
    lrs = [10.0 ** (i / 4 - 3) for i in range(candidates)]
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(experiment_dir=output, source="alternative", target="diff", train_batch_size=32, seed=0)
        trainer = TextPredictionTrainer(model=str(folder / "model"), data=rows, args=arguments, target_classes=list(rows["label_class"].unique()), eval_neutral_data=neutral)
        model = trainer.get_model()

        def evaluate(some: list[float]) -> tuple[float, dict]:
            start = time.process_time()
            found = trainer.evaluate_decoder(lrs=some, feature_factors=[1.0], use_cache=False, split="test", target_class=str(rows["label_class"].iloc[0]), eval_batch_size=32, plot=False)
            return time.process_time() - start, found

        unit = cpu_seconds(forward_pass(model.tokenizer, model.base_model, list(rows["masked"])))
        before = peak_bytes()
        few, _ = evaluate(lrs[:1])
        many, found = evaluate(lrs)
        grew = peak_bytes() - before
    each = (many - few) / (candidates - 1)
    return {"version": version("gradiend"), "threads": torch.get_num_threads(), "candidate_seconds": each, "unit_seconds": unit, "grid": len(found["grid"]),
            "parameters": sum(p.numel() for p in model.base_model.parameters()), "grew": grew, "base_lms": found["grid"]["base"]["lms"]["lms"]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
