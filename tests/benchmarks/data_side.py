"""One side of the comparison of data creation: runs under any Python that has a package called gradiend.

Usage: python data_side.py SENTENCES RESULT.csv --task lexical|spacy [--spacy-model FOLDER]
The constructor and the method have the same names in the reference package, so the same lines time both.
"""
import argparse
import inspect
import json
import time

import torch

from gradiend import TextFilterConfig, TextPredictionDataCreator

TASKS = {
    "lexical": [TextFilterConfig(["I"], id="1SG"), TextFilterConfig(["we"], id="1PL"), TextFilterConfig(["you"], id="2"),
                TextFilterConfig(["he", "she", "it"], id="3SG"), TextFilterConfig(["they"], id="3PL")],
    "spacy": [TextFilterConfig(["her"], spacy_tags={"Poss": "Yes"}, id="possessive"),
              TextFilterConfig(["her"], spacy_tags={"Case": "Acc"}, id="object")],
}


def accepted(function, **options) -> dict:
    "The options that a function of this package knows."
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences")
    parser.add_argument("result")
    parser.add_argument("--task", choices=TASKS, default="lexical")
    parser.add_argument("--spacy-model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open(args.sentences, encoding="utf-8") as file:
        sentences = file.read().splitlines()
    # every match of a class in a sentence is masked together and nothing is dropped, in both packages
    ours = accepted(TextPredictionDataCreator, mask_all=True, min_words=1, max_words=10**6, deduplicate="no")
    start = time.perf_counter()
    creator = TextPredictionDataCreator(base_data=sentences, feature_targets=TASKS[args.task], min_left_context_words=0,
                                        spacy_model=args.spacy_model, **ours)
    options = accepted(creator.generate_training_data, balance=False)
    table = creator.generate_training_data(format="minimal", **options)
    seconds = time.perf_counter() - start
    table.to_csv(args.result, index=False)
    print(json.dumps({"sentences": len(sentences), "rows": len(table), "seconds": seconds, "rate": len(sentences) / seconds}))


if __name__ == "__main__":
    main()
