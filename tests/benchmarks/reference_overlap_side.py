"""What the reference package (0.2.3) takes to compare saved models; run by its own Python, never imported by the tests.

    <its python> reference_overlap_side.py <folder with models.json and NAME.safetensors> <k> <threads> <runs> <0 or 1: with the cosine>

First the models are built from the shared tensors and saved in its own form, which does not count. Then it loads and compares them.
Prints one JSON line: seconds of processor time to load, for each run of the top-k overlap, for the cosine; the two matrices; and the version.
"""
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from gradiend.comparison.similarity import compute_similarity_matrix
from gradiend.model.param_mapped import ParamMappedGradiendModel
from safetensors.torch import load_file


class Holder:
    "What its comparison asks of a trained model, without the language model that such a model would load."

    def __init__(self, gradiend: ParamMappedGradiendModel) -> None:
        self.gradiend = gradiend

    def get_topk_weights(self, part: str = "decoder-weight", topk: int = 1000) -> list[int]:
        local = self.gradiend.get_topk_weights(part=part, topk=topk)
        return self.gradiend._get_base_global_index_map()[torch.as_tensor(local)].tolist()


def build(folder: Path, name: str, shapes: dict[str, list[int]]) -> None:
    "One model in its own form, saved."
    tensors = load_file(folder / f"{name}.safetensors")
    chosen, mapping, start = tensors["index"], {}, 0
    for parameter, shape in shapes.items():
        total = int(torch.Size(shape).numel())
        here = chosen[(chosen >= start) & (chosen < start + total)] - start
        mapping[parameter] = {"shape": tuple(shape), "repr": "indices", "indices": here}
        start += total
    model = ParamMappedGradiendModel(input_dim=len(chosen), latent_dim=1, param_map=mapping)
    with torch.no_grad():
        model.encoder[0].linear.weight.copy_(tensors["encoder"])
        model.decoder[0].linear.weight.copy_(tensors["decoder"])
    model.save_pretrained(str(folder / "theirs" / name))


def main(folder: Path, k: int, threads: int, runs: int, with_cosine: int) -> dict:
    torch.set_num_threads(threads)
    logging.disable(logging.CRITICAL)
    described = json.loads((folder / "models.json").read_text())
    for name in described["names"]: build(folder, name, described["shapes"])
    clock = [time.process_time()]
    models = {name: Holder(ParamMappedGradiendModel.from_pretrained(str(folder / "theirs" / name))) for name in described["names"]}
    clock.append(time.process_time())
    for _ in range(runs):
        overlap = compute_similarity_matrix(models, measure="topk_overlap", topk=k, part="decoder-weight")
        clock.append(time.process_time())
    cosine = compute_similarity_matrix(models, measure="cosine_signed", part="encoder-weight") if with_cosine else {"matrix": None}
    clock.append(time.process_time())
    load, *overlaps, last = (b - a for a, b in zip(clock[:-1], clock[1:], strict=True))
    return {"version": version("gradiend"), "threads": torch.get_num_threads(), "load": load, "overlap": overlaps, "cosine": last,
            "overlaps": overlap["matrix"], "cosines": cosine["matrix"]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))))
