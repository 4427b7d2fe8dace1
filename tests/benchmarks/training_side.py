"""One side of the comparison of training: runs under any Python that has a package called gradiend.

    <python> training_side.py bare|train <folder with model/ and rows.csv> --steps 100 --seeds 1 --batch 8 --rate 1e-3 --topk 0.01

Prints one JSON line. The classes and arguments have the same names in the reference package, so the same lines run both.
`bare` only loads the model and makes one forward pass: what a process with this package needs before it trains anything.
"""
import argparse
import inspect
import json
import logging
import resource
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from gradiend import PostPruneConfig, PrePruneConfig, TextPredictionTrainer, TrainingArguments
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer


def accepted(function, **options) -> dict:
    "The options that a function of this package knows."
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def peak_mib() -> float:
    "The largest memory this process has held; by Linux's own count, since `ru_maxrss` of a child begins with that of its parent."
    status = Path("/proc/self/status")
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def forward_seconds(folder: Path, texts: list[str], runs: int = 5) -> float:
    "Processor time of one forward pass without gradients over a batch, padded to its longest text: the unit."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoModelForMaskedLM if tokenizer.mask_token else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    inputs = tokenizer([t.replace("[MASK]", tokenizer.mask_token or "it") for t in texts], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    times = []
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.process_time()
            model(**inputs)
            times.append(time.process_time() - start)
    return sorted(times[1:])[runs // 2]


def train(folder: Path, args: argparse.Namespace, output: str) -> dict:
    "Train, evaluate on the test split; the seconds that the training took, by the clock and of the processor."
    rows = pd.read_csv(folder / "rows.csv")
    arguments = TrainingArguments(**accepted(
        TrainingArguments, experiment_dir=output, source="alternative", target="diff", train_batch_size=args.batch, max_steps=args.steps,
        num_train_epochs=1000, eval_steps=args.steps, learning_rate=args.rate, seed=0, max_seeds=args.seeds,
        min_convergent_seeds=args.seeds, encoder_eval_train_max_size=50, eval_max_size=50, eval_batch_size=8,
        pre_prune_config=PrePruneConfig(**accepted(PrePruneConfig, n_samples=16, topk=args.topk, batch_size=args.batch)), post_prune_config=PostPruneConfig(topk=1.0)))
    trainer = TextPredictionTrainer(model=str(folder / "model"), data=rows, args=arguments, target_classes=list(rows["label_class"].unique()))
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = trainer.evaluate_encoder(split="test")
    return {"seconds": wall, "cpu_seconds": cpu, "correlation": float(found["correlation"]),
            "means": {str(k): float(v) for k, v in found["mean_by_feature_class"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("bare", "train"))
    parser.add_argument("folder", type=Path)
    for name, default in (("steps", 100), ("seeds", 1), ("batch", 8), ("threads", 1)): parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rate", 1e-3), ("topk", 0.01)): parser.add_argument(f"--{name}", type=float, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    result = {"what": args.what, "steps": args.steps, "seeds": args.seeds}
    if args.what == "bare":
        result["forward_seconds"] = forward_seconds(args.folder / "model", list(pd.read_csv(args.folder / "rows.csv")["masked"])[:args.batch])
    else:
        with tempfile.TemporaryDirectory() as output: result |= train(args.folder, args, output)
    print(json.dumps(result | {"peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
