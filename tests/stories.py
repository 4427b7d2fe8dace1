"""A real causal model for tests and benchmarks: 260,000 parameters, trained on children's stories, in the file format of llama2.c.

    GRADIEND_DATA=... python -m tests.stories FOLDER

writes it as an ordinary folder that transformers can load. The files are never part of the repository.
"""
import os
import struct
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(os.environ.get("GRADIEND_DATA", "")) / "weights_stories260K"
real = pytest.mark.skipif(not os.environ.get("GRADIEND_DATA") or not DATA.is_dir(), reason="GRADIEND_DATA does not name a folder with weights_stories260K")


def read_pieces() -> tuple[list[str], list[float]]:
    "The pieces of the tokenizer and their scores, as stored: length of the longest, then per piece a score, a length and bytes."
    raw, at, pieces, scores = (DATA / "tok512.bin").read_bytes(), 4, [], []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8:at + 8 + length].decode("utf-8").strip("\n").replace(" ", "\u2581") if length else "")
        scores.append(score)
        at += 8 + length
    return pieces, scores


def by_score(text: str) -> list[int]:
    "Ids of a text by the rule of SentencePiece: begin with characters, join the pair with the best score until none is left."
    pieces, scores = read_pieces()
    index = {piece: i for i, piece in enumerate(pieces)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        best = max(((scores[index[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in index), default=None)
        if best is None: return [index[p] for p in parts]
        i = -best[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


@lru_cache
def stories():
    "The tokenizer and the model, as transformers has them."
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    pieces, scores = read_pieces()
    index = {piece: i for i, piece in enumerate(pieces)}
    merges = [(a, b) for p in sorted(pieces[259:], key=lambda p: -scores[index[p]]) for a, b in ((p[:i], p[i:]) for i in range(1, len(p))) if a in index and b in index]
    core = Tokenizer(models.BPE(vocab=index, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)
    raw = (DATA / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", raw)
    numbers, at = np.frombuffer(raw, dtype="<f4", offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += (size := int(np.prod(shape)))
        return torch.from_numpy(numbers[at - size:at].copy()).view(shape)

    def halves(w: torch.Tensor, n: int) -> torch.Tensor:
        "The file rotates neighbouring entries of a head, transformers the first half against the second."
        return w.view(n, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv = dim // heads * kv_heads
    names = ["embed", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "norm"]
    shapes = [(vocab, dim), (layers, dim), (layers, dim, dim), (layers, kv, dim), (layers, kv, dim), (layers, dim, dim), (layers, dim), (layers, hidden, dim), (layers, dim, hidden), (layers, hidden, dim), (dim,)]
    found = {name: take(*shape) for name, shape in zip(names, shapes, strict=True)}
    state = {"model.embed_tokens.weight": found.pop("embed"), "model.norm.weight": found.pop("norm")}
    for name, tensor in found.items():
        for i, w in enumerate(tensor):
            if name.endswith(("q_proj", "k_proj")): w = halves(w, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{i}.{name}.weight"] = w
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                                         max_position_embeddings=length, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return tokenizer, model.eval()


if __name__ == "__main__":
    for part in stories(): part.save_pretrained(sys.argv[1])
