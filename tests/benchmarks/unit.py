"""The unit of every cost here: one batched forward pass without gradients, with only torch and transformers.

Both sides of the comparison (our package, and the reference package in its own environment) import this file, so that
they divide their times by the same thing. Nothing from either package may be imported here.
"""
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch


def median_seconds(action: Callable[[], object], runs: int = 5, warm_up: bool = True) -> float:
    "The median duration of `action`, after one call that does not count."
    if warm_up:
        action()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


@contextmanager
def head_at(model, places):
    "While active, the prediction head sees the backbone's states at the True places `(B, T)` only."
    def select(module, args, output):
        output.last_hidden_state = output.last_hidden_state[places].unsqueeze(0)
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def forward_pass(tokenizer, model, masked: list[str], mask: str = "[MASK]") -> Callable[[], object]:
    "One forward pass over all rows at once, padded to the longest of them, the head at the masks only; tokenised beforehand."
    inputs = tokenizer([text.replace(mask, tokenizer.mask_token) for text in masked], padding=True, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    places = inputs["input_ids"] == tokenizer.mask_token_id
    assert int(places.sum()) == len(masked)

    def run() -> object:
        with torch.no_grad(), head_at(model, places):
            return model(**inputs).logits

    return run
