"""The engine against one plain backward pass per row, on nine architectures, and the promise that the model comes back as it was."""
import logging
import warnings
from functools import lru_cache

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from gradiend.core import InputError
from gradiend.data.examples import make_examples
from gradiend.gradients.engine import KINDS, _directions, accumulate, encode, mix, pair_gradients, pair_weights, weighted_sums
from gradiend.gradients.ghost import NotRowAligned
from gradiend.gradients.objectives import MaskedLM, objective_for
from gradiend.gradients.rows import row_gradients, squared_row_lengths
from gradiend.gradients.space import ParameterSpace

from .tiny import ARCHITECTURES, FLOAT32_INSIDE, tiny_model, tokenizer

ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "We know [MASK] was tired.", "Anna said that [MASK] was late.",
               "The dogs barked because [MASK] were cold.", "The pilot said that [MASK] was late."],
    "factual": ["they", "she", "she", "they", "he"],
    "alternative": ["he", "they", "unhappiness", "it", "they"],  # "unhappiness" falls into more pieces than "she": two inputs for one row
})
architectures = pytest.mark.parametrize("kind", ARCHITECTURES)
tiny = lru_cache(tiny_model)  # no test changes a model


def make(kind):
    words, model = tiny(kind)
    return model, objective_for(words, model), ParameterSpace.from_model(model)


@lru_cache
def plain_row_gradients(kind):
    "Factual and alternative gradient `(N, n)` of every row: autograd on one row at a time, nothing shared."
    model, objective, space = make(kind)
    named = dict(model.named_parameters())
    parameters, found = [named[name] for name in space.names], {"factual": [], "alternative": []}
    for i in range(len(ROWS)):
        for which, loss in zip(found, objective.losses(model, objective.prepare(ROWS.iloc[[i]])), strict=True):
            gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            found[which].append(torch.cat([g.flatten() for g in gradients]))
    return {which: torch.stack(rows) for which, rows in found.items()}


def reference(kind, gradient):
    return mix(tuple(plain_row_gradients(kind).values()), gradient)


def thin(space, step=7):
    return space.keep(torch.arange(0, space.full_n, step))


def check_close(kind, actual, expected):
    "Float64 all the way through, or float32 inside: then 1e-5 of the largest value."
    tol = 2e-5 if kind in FLOAT32_INSIDE else 1e-9
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol * float(expected.abs().max()))


def without_tables(space):
    "A space without the tables of relative positions, which T5 adds to all rows alike."
    starts = torch.tensor([0, *[torch.Size(s).numel() for s in space.shapes]]).cumsum(0).tolist()
    kept = [torch.arange(a, b) for name, a, b in zip(space.names, starts[:-1], starts[1:], strict=True) if "relative_attention_bias" not in name]
    return space.keep(torch.cat(kept))


def snapshot(model):
    "Everything about a model that the engine might touch."
    return ([(p.requires_grad, p.grad, p.dtype, p.detach().clone()) for p in model.parameters()], [m.training for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()], getattr(getattr(model, "config", None), "_attn_implementation", None))


def same(a, b):
    parameters = all(x[0] == y[0] and x[1] is y[1] and x[2] == y[2] and torch.equal(x[3], y[3]) for x, y in zip(a[0], b[0], strict=True))
    return parameters and a[1:] == b[1:]


@architectures
@pytest.mark.parametrize("engine", ["ghost", "jvp"])
def test_encode_equals_one_backward_per_row(kind, engine):
    model, objective, full = make(kind)
    full = without_tables(full) if kind == "t5" and engine == "ghost" else full
    sparse = full.keep(full.global_index[::7])
    few, many = [(sparse, "alternative", 1, 4), (full, "factual", 3, 3)], [(full, "diff", 6, 5)]  # many directions take another way through linear layers
    for space, gradient, k, size in few + (many if engine == "ghost" else []):
        directions = torch.randn(k, space.n, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        found = encode(model, objective, ROWS, directions, space=space, kind=gradient, engine=engine, batch_size=size)
        check_close(kind, found, reference(kind, gradient)[:, space.global_index] @ directions.T)


@architectures
@pytest.mark.parametrize("engine", ["ghost", "jvp", "loop"])
def test_several_kinds_in_one_pass_are_those_of_one_pass_each(kind, engine):
    model, objective, full = make(kind)
    space = without_tables(full) if kind == "t5" and engine == "ghost" else full
    kinds = ("diff", "factual", "diff", "alternative")
    directions = torch.randn(4, space.n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = encode(model, objective, ROWS, directions, space=space, kind=kinds, engine=engine, batch_size=3)
    check_close(kind, found, torch.stack([reference(kind, each)[:, space.global_index] @ v for each, v in zip(kinds, directions, strict=True)], 1))


@architectures
def test_several_sums_in_one_pass_are_those_of_one_pass_each(kind):
    model, objective, space = make(kind)
    weights = torch.randn(3, 2, len(ROWS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[1, 0] = weights[:, :, 2] = 0  # a sum of one kind only, and a row that nobody reads
    factual, alternative = plain_row_gradients(kind).values()
    check_close(kind, accumulate(model, objective, ROWS, weights[:, 0], weights[:, 1], space=space, batch_size=3), weights[:, 0] @ factual + weights[:, 1] @ alternative)


@architectures
def test_auto_always_has_the_answer(kind, caplog):
    model, objective, space = make(kind)
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger="gradiend.gradients.engine"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = encode(model, objective, ROWS, direction, space=space, kind="diff")
    check_close(kind, found, reference(kind, "diff") @ direction[:, None])
    assert f"engine {'jvp' if kind == 't5' else 'ghost'}, 5 rows" in caplog.text
    if kind == "t5": assert "relative_attention_bias" in caplog.text


@architectures
def test_sums_equal_the_sums_of_row_gradients(kind):
    model, objective, full = make(kind)
    factual, alternative = plain_row_gradients(kind).values()
    weights = torch.randn(2, 2, len(ROWS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for space in (full, thin(full)):
        g = space.global_index
        check_close(kind, weighted_sums(model, objective, objective.prepare(ROWS), weights, space=space), (weights[:, 0] @ factual + weights[:, 1] @ alternative)[:, g])
        check_close(kind, accumulate(model, objective, ROWS, weights[0, 0], weights[0, 1], space=space, batch_size=2), (weights[0, 0] @ factual + weights[0, 1] @ alternative)[g])
        source, target = pair_gradients(model, objective, objective.prepare(ROWS), source="alternative", target="diff", space=space)
        check_close(kind, source, alternative.mean(0)[g])
        check_close(kind, target, (factual - alternative).mean(0)[g])


@architectures
@pytest.mark.parametrize("engine", ["ghost", "loop"])
def test_row_gradients_equal_a_plain_backward(kind, engine):
    model, objective, full = make(kind)
    full = without_tables(full) if kind == "t5" else full
    for space, gradient in ((full, "diff"), (full.keep(full.global_index[::5]), "alternative")):
        check_close(kind, row_gradients(model, objective, ROWS, space=space, kind=gradient, engine=engine, batch_size=3), reference(kind, gradient)[:, space.global_index])


def test_lengths_in_float16_do_not_overflow_in_an_embedding_that_scales():
    words, model = tiny_model("gemma", dtype=torch.float32)
    for p in model.parameters():
        with torch.no_grad(): p.copy_(p.half())  # the same weights for both
    objective, space = objective_for(words, model), ParameterSpace.from_model(model)
    expected = squared_row_lengths(model, objective, ROWS, space=space, kind="diff")
    model.half()
    for found in (squared_row_lengths(model, objective, ROWS, space=space, kind="diff"), row_gradients(model, objective, ROWS, space=space, kind="diff").double().square().sum(1)):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.0)


@architectures
def test_lengths_equal_those_of_a_plain_backward(kind):
    model, objective, full = make(kind)  # T5's table of positions is shared by all rows: there the gradients are written down
    tol = 1e-4 if kind in FLOAT32_INSIDE else 1e-9
    for space, gradient in ((full, "diff"), (thin(full), "alternative"), (full.keep(full.global_index[:1]), "factual")):
        expected = reference(kind, gradient)[:, space.global_index].square().sum(1)
        found = squared_row_lengths(model, objective, ROWS, space=space, kind=gradient, batch_size=3)
        torch.testing.assert_close(found, expected, rtol=tol, atol=tol * float(reference(kind, gradient).square().sum(1).max()) * 1e-3)
    assert squared_row_lengths(model, objective, ROWS.head(0), space=full).shape == (0,)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_encode_equals_finite_differences(kind):
    model, objective, space = make(kind)
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / space.n**0.5
    dense, named = space.dense(direction), dict(model.named_parameters())

    def losses(t: float):
        moved = {name: named[name].detach() + t * d for name, d in dense.items()}
        with torch.no_grad(): return torch.func.functional_call(_Wrapped(model, objective), {f"model.{n}": p for n, p in moved.items()}, (objective.prepare(ROWS),))

    step = 1e-3 if kind in FLOAT32_INSIDE else 1e-5
    expected = (losses(step) - losses(-step)) / (2 * step)
    torch.testing.assert_close(encode(model, objective, ROWS, direction, space=space)[:, 0], expected, rtol=1e-3 if kind in FLOAT32_INSIDE else 1e-6, atol=1e-3 if kind in FLOAT32_INSIDE else 1e-7)


class _Wrapped(nn.Module):
    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch): return self.objective.losses(self.model, batch)[0]


class Broken(MaskedLM):
    "Its losses fail after the forward pass."
    def losses(self, model, batch):
        super().losses(model, batch)
        raise RuntimeError("no losses today")


CALLS = {
    "ghost": lambda m, o, s: encode(m, o, ROWS, torch.ones(s.n), space=s, engine="ghost"),
    "jvp": lambda m, o, s: encode(m, o, ROWS, torch.ones(s.n), space=s, engine="jvp"),
    "loop": lambda m, o, s: encode(m, o, ROWS, torch.ones(s.n), space=s, engine="loop"),
    "rows": lambda m, o, s: row_gradients(m, o, ROWS, space=s),
    "sums": lambda m, o, s: accumulate(m, o, ROWS, torch.ones(5), torch.ones(5), space=s),
    "pair": lambda m, o, s: pair_gradients(m, o, o.prepare(ROWS), source="factual", target="factual", space=s),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_model_is_as_before_also_after_an_exception(kind, call):
    words, model = tiny_model(kind, dtype=torch.float32)
    for i, p in enumerate(model.parameters()):  # in the middle of somebody's training
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.ones_like(p) if i % 2 else None
    model.train()
    next(iter(model.base_model.children())).eval()
    before, space = snapshot(model), thin(ParameterSpace.from_model(model))
    CALLS[call](model, MaskedLM(words), space)
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="no losses today"): CALLS[call](model, Broken(words), space)
    assert same(before, snapshot(model))
    with torch.no_grad(): assert torch.isfinite(torch.as_tensor(CALLS[call](model, MaskedLM(words), space)[0])).all()  # and where gradients are off


def test_callers_in_inference_mode_are_served():
    model, objective, space = make("bert")
    w, ones = torch.ones(space.n, dtype=torch.float64), torch.ones(5)
    calls = [*[lambda e=e: encode(model, objective, ROWS, w, space=space, engine=e) for e in ("ghost", "jvp", "loop")],
             lambda: accumulate(model, objective, ROWS, ones, ones, space=space), lambda: row_gradients(model, objective, ROWS, space=space)]
    for call in calls:
        with torch.inference_mode(): found = call()
        torch.testing.assert_close(found, call(), rtol=0, atol=0)


def test_gradients_are_freed_one_by_one():
    words, model = tiny_model("bert")
    space, alive = thin(ParameterSpace.from_model(model)), []
    handles = [p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))) for p in model.parameters()]
    pair_gradients(model, MaskedLM(words), MaskedLM(words).prepare(ROWS), source="alternative", target="diff", space=space)
    for handle in handles: handle.remove()
    assert len(alive) > 40 and set(alive) == {1}


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_half_precision_models_give_float32(dtype, tol):
    words, model = tiny_model("bert", dtype=torch.float32)
    for p in model.parameters():
        with torch.no_grad(): p.copy_(p.to(dtype))  # the same weights for both
    objective, space = MaskedLM(words), ParameterSpace.from_model(model)
    direction = torch.randn(2, space.n, generator=torch.Generator().manual_seed(0)) / space.n**0.5
    half = tiny_model("bert", dtype=torch.float32)[1]
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    batch = objective.prepare(ROWS)

    def close(actual, expected):
        assert actual.dtype == torch.float32
        assert float((actual - expected).norm() / expected.norm()) < tol

    expected = encode(model, objective, ROWS, direction, space=space, kind="diff", engine="loop")
    for engine in ("ghost", "jvp", "loop"): close(encode(half, objective, ROWS, direction, space=space, kind="diff", engine=engine), expected)
    close(row_gradients(half, objective, ROWS, space=space, kind="diff"), row_gradients(model, objective, ROWS, space=space, kind="diff"))
    for a, b in zip(pair_gradients(half, objective, batch, source="factual", target="diff", space=space), pair_gradients(model, objective, batch, source="factual", target="diff", space=space), strict=True):
        close(a, b)
    small = pair_weights(("diff",), 5) * 1e-6  # most products would be zero in float16
    close(weighted_sums(half, objective, batch, small, space=space), weighted_sums(model, objective, batch, small, space=space))


def test_gradient_checkpointing_is_used_and_changes_nothing():
    words = tokenizer()
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64)).eval()
    assert model.config.hidden_dropout_prob > 0
    objective, space, calls = MaskedLM(words), ParameterSpace.from_model(model), []
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    plain = pair_gradients(model, objective, objective.prepare(ROWS), source="alternative", target="diff", space=space)
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    before = snapshot(model)
    saved = pair_gradients(model, objective, objective.prepare(ROWS), source="alternative", target="diff", space=space)
    assert len(calls) >= 3  # the forward pass, and again for each backward pass
    assert same(before, snapshot(model))
    for a, b in zip(plain, saved, strict=True): torch.testing.assert_close(a, b)
    encoded = encode(model, objective, ROWS, plain[0], space=space)
    torch.testing.assert_close(encoded, encode(model, objective, ROWS, plain[0], space=space, engine="loop"), rtol=1e-4, atol=1e-6)


def test_forward_mode_swaps_special_attention_and_puts_it_back():
    words, model = tiny_model("bert", dtype=torch.float32)
    space = thin(ParameterSpace.from_model(model))
    expected = encode(model, MaskedLM(words), ROWS, torch.ones(space.n), space=space, engine="jvp")
    model.set_attn_implementation("flex_attention")
    used = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: used.append(model.config._attn_implementation))
    found = encode(model, MaskedLM(words), ROWS, torch.ones(space.n), space=space, engine="jvp")
    assert set(used) == {"eager"} and model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Odd(torch.autograd.Function):
    "Doubles, and knows no forward mode."
    @staticmethod
    def forward(ctx, x): return 2 * x
    @staticmethod
    def backward(ctx, g): return 2 * g


class Neither(nn.Module):
    "No ghosts (its weight is used without its layer), no forward mode."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x): return Odd.apply(x @ self.layer.weight.T)


class Scores:
    name = "scores"
    def prepare(self, frame): return torch.tensor(frame["x"].tolist())
    def losses(self, model, batch):
        log_p = model(batch).log_softmax(-1)
        return -log_p[:, 0], -log_p[:, 1]


POINTS = pd.DataFrame({"masked": ["a", "b", "c"], "x": [[1.0, 0.0], [0.5, 2.0], [1.0, 3.0]]})


def test_a_model_that_supports_neither_engine_is_served_by_the_loop_with_one_warning():
    torch.manual_seed(0)
    model = Neither()
    space = ParameterSpace.from_model(model, "layer.weight")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = encode(model, Scores(), POINTS, torch.ones(2, 6), space=space, batch_size=1)
    assert len([w for w in caught if "one backward pass per row" in str(w.message)]) == 1
    torch.testing.assert_close(found, encode(model, Scores(), POINTS, torch.ones(2, 6), space=space, engine="loop"))
    assert found.abs().sum() > 0
    with pytest.raises(NotRowAligned, match="layer.weight"): encode(model, Scores(), POINTS, torch.ones(6), space=space, engine="ghost")
    with pytest.raises(InputError, match="no forward mode.*use engine"): encode(model, Scores(), POINTS, torch.ones(6), space=space, engine="jvp")
    with pytest.warns(UserWarning, match="one backward pass per row"): rows = row_gradients(model, Scores(), POINTS, space=space)
    torch.testing.assert_close(rows.sum(1), found[:, 0])


def test_a_real_error_of_the_model_is_not_taken_for_a_missing_engine():
    class Failing(Neither):
        def forward(self, x): raise RuntimeError("forward fails for another reason")
    model = Failing()
    with pytest.raises(RuntimeError, match="another reason"): encode(model, Scores(), POINTS, torch.ones(6), space=ParameterSpace.from_model(model, "layer.weight"))


def test_any_objective_and_module_can_be_encoded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    space = ParameterSpace.from_model(model)
    w = torch.randn(7, space.n)
    for engine in ("ghost", "jvp", "auto"):
        torch.testing.assert_close(encode(model, Scores(), POINTS, w, space=space, engine=engine), encode(model, Scores(), POINTS, w, space=space, engine="loop"), rtol=1e-4, atol=1e-5)


def test_a_table_of_positions_that_looks_like_a_batch_is_found_out():
    words, model = tiny("t5")
    objective, space = objective_for(words, model), ParameterSpace.from_model(model, "encoder.*")
    repeated = [pd.concat([ROWS.iloc[[i]]] * n, ignore_index=True) for i in range(5) for n in range(2, 20)]
    rows = next(r for r in repeated if len(set(objective.prepare(r).input_ids.shape)) == 1)  # as many inputs as tokens
    length = len(rows)
    with pytest.raises(NotRowAligned, match="relative_attention_bias.*shared between rows"):
        encode(model, objective, rows, torch.ones(space.n, dtype=torch.float64), space=space, engine="ghost", batch_size=length)


class SharedPlaces(nn.Module):
    "Two branches; the second adds a table of positions that all rows share, with as many rows as the batch."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.places = nn.Linear(3, 4), nn.Linear(3, 4), nn.Embedding(8, 4)

    def forward(self, x): return self.first(x).sum(1), torch.tanh(self.second(x) + self.places(torch.arange(x.shape[1]))[None]).sum(1)


class OneBranchEach:
    "The factual loss looks at the first branch, the alternative one at the second."
    name = "branches"
    def prepare(self, frame): return torch.tensor(frame["x"].tolist(), dtype=torch.float64)
    def losses(self, model, batch): return tuple(-scores.log_softmax(-1)[:, i] for i, scores in enumerate(model(batch)))


@pytest.mark.parametrize("kinds", [("diff", "alternative"), ("factual", "alternative"), ("alternative", "alternative"), ("diff", "factual")])
def test_what_rows_share_is_found_out_for_each_of_several_kinds(kinds):
    g = torch.Generator().manual_seed(0)
    model, points = SharedPlaces().double(), pd.DataFrame({"masked": ["a"] * 4, "x": torch.randn(4, 4, 3, generator=g, dtype=torch.float64).tolist()})
    space = ParameterSpace.from_model(model)
    v = torch.randn(2, space.n, generator=g, dtype=torch.float64)
    with pytest.raises(NotRowAligned, match="shared between rows"): encode(model, OneBranchEach(), points, v, space=space, kind=kinds, engine="ghost")
    torch.testing.assert_close(encode(model, OneBranchEach(), points, v, space=space, kind=kinds), encode(model, OneBranchEach(), points, v, space=space, kind=kinds, engine="loop"), rtol=1e-9, atol=1e-12)


def test_losses_that_are_not_finite_name_their_rows():
    words, model = tiny_model("bert")
    objective, space = MaskedLM(words), ParameterSpace.from_model(model)
    token = min(set(objective.prepare(ROWS.iloc[[4]]).input_ids.flatten().tolist()) - set(objective.prepare(ROWS.head(4)).input_ids.flatten().tolist()))  # only row 4 has it
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())  # not tied: the head stays sound
    with torch.no_grad(): model.bert.embeddings.word_embeddings.weight[token] = torch.nan
    space, w = ParameterSpace.from_model(model), torch.ones(space.n)
    for call in (*[lambda e=e: encode(model, objective, ROWS, w, space=space, engine=e, batch_size=2) for e in ("ghost", "jvp", "loop")],
                 lambda: accumulate(model, objective, ROWS, torch.ones(5), torch.zeros(5), space=space, batch_size=2),
                 lambda: row_gradients(model, objective, ROWS, space=space, batch_size=2), lambda: weighted_sums(model, objective, objective.prepare(ROWS), pair_weights(("diff",), 5), space=space)):
        with pytest.raises(InputError, match=r"rows \[4\]"): call()
    good = accumulate(model, objective, ROWS, torch.tensor([1.0, 1, 1, 1, 0]), torch.zeros(5), space=space)  # a row that is not asked for is not read
    assert good.isfinite().all()


def test_inputs_are_checked():
    model, objective, space = make("bert")
    for wrong in (torch.ones(space.n - 1), torch.ones(1, 1, space.n), torch.full((space.n,), torch.inf)):
        with pytest.raises(InputError, match="directions"): encode(model, objective, ROWS, wrong, space=space)
    with pytest.raises(InputError, match="did you mean 'ghost'"): encode(model, objective, ROWS, torch.ones(space.n), space=space, engine="gost")
    with pytest.raises(InputError, match="jvp"): row_gradients(model, objective, ROWS, space=space, engine="jvp")
    with pytest.raises(InputError, match="target='dif'"): pair_gradients(model, objective, None, source="factual", target="dif", space=space)
    with pytest.raises(InputError, match="is not a parameter"): encode(make("gpt2")[0], make("gpt2")[1], ROWS, torch.ones(space.n), space=space)
    for name in ("weights_factual", "weights_alternative"):
        weights = {"weights_factual": torch.ones(5), "weights_alternative": torch.ones(5), name: torch.ones(4)}
        with pytest.raises(InputError, match=name): accumulate(model, objective, ROWS, **weights, space=space)


def test_tables_frames_and_empty_inputs():
    model, objective, space = make("bert")
    rows = ROWS.assign(factual_class=["3PL", "3SG", "3SG", "3PL", "3SG"], alternative_class=["3SG", "3PL", "3PL", "3SG", "3PL"], split="train")
    examples = make_examples(rows.drop(index=2), pair=("3SG", "3PL"))
    w = torch.ones(space.n, dtype=torch.float64)
    assert torch.equal(encode(model, objective, examples, w, space=space), encode(model, objective, examples.frame, w, space=space))
    y = torch.from_numpy(examples.labels("alternative"))
    torch.testing.assert_close(accumulate(model, objective, examples, 0 * y, y, space=space), accumulate(model, objective, examples.frame, [0.0] * 4, y.numpy(), space=space))
    assert encode(model, objective, ROWS.head(0), w, space=space).shape == (0, 1)
    assert row_gradients(model, objective, ROWS.head(0), space=space).shape == (0, space.n)
    assert not accumulate(model, objective, ROWS, torch.zeros(5), torch.zeros(5), space=space).any()
    unused = space.keep(space.global_index[:1])  # the embedding of the padding token: no row ever reads it
    assert not encode(model, objective, ROWS, torch.ones(1, dtype=torch.float64), space=unused, engine="ghost").isnan().any()


def test_results_do_not_depend_on_the_batch():
    model, objective, space = make("modernbert")
    w = torch.randn(2, space.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = encode(model, objective, ROWS, w, space=space, batch_size=1)
    for size in (2, 5, 64): torch.testing.assert_close(encode(model, objective, ROWS, w, space=space, batch_size=size), first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))
    assert set(KINDS) == {"factual", "alternative", "diff"}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_modules_whose_forward_is_wrapped(kind):
    "A device_map replaces the forward of every module by one that moves its inputs and outputs; that must not matter."
    words, model = tiny_model(kind)
    objective, space = objective_for(words, model), ParameterSpace.from_model(model)
    directions = torch.randn(2, space.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        def moved(*args, _forward=module.forward, **kwargs):
            return _forward(*args, **{k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
        module.forward = moved
    expected = reference(kind, "diff")
    for engine in ("ghost", "jvp", "loop"):
        check_close(kind, encode(model, objective, ROWS, directions, space=space, kind="diff", engine=engine), expected @ directions.T)
    check_close(kind, accumulate(model, objective, ROWS, torch.ones(len(ROWS)), -torch.ones(len(ROWS)), space=space), expected.sum(0))


CAPABLE = {"opt": "jvp", "bart": "ghost", "deberta": "jvp"}  # OPT's layers fold rows and tokens into one dimension


@pytest.mark.parametrize("kind", list(CAPABLE))
def test_models_with_habits_of_their_own(kind, caplog):
    model, objective, space = make(kind)
    directions = torch.randn(2, space.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference(kind, "diff") @ directions.T

    def close(found): torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))

    with caplog.at_level(logging.DEBUG, logger="gradiend.gradients.engine"): close(encode(model, objective, ROWS, directions, space=space, kind="diff"))
    assert f"engine {CAPABLE[kind]}, 5 rows" in caplog.text
    for engine in ("jvp", "loop"): close(encode(model, objective, ROWS, directions, space=space, kind="diff", engine=engine))
    if CAPABLE[kind] == "jvp":
        refusal = "is given to every row" if kind == "deberta" else "does not count the 5 inputs"
        with pytest.raises(NotRowAligned, match=refusal): encode(model, objective, ROWS, directions, space=space, engine="ghost")
        with pytest.warns(UserWarning, match="one backward pass per row"): rows = row_gradients(model, objective, ROWS, space=space, kind="diff")
    else: rows = row_gradients(model, objective, ROWS, space=space, kind="diff", engine="ghost")
    close(rows @ directions.T)


ENTRIES = {  # every way into the engine
    **{f"encode {e}": lambda m, o, s, e=e: encode(m, o, ROWS, torch.ones(s.n), space=s, engine=e) for e in ("auto", "ghost", "jvp", "loop")},
    **{f"rows {e}": lambda m, o, s, e=e: row_gradients(m, o, ROWS, space=s, engine=e) for e in ("auto", "ghost", "loop")},
    "accumulate": lambda m, o, s: accumulate(m, o, ROWS, torch.ones(5), torch.ones(5), space=s),
    "pair": lambda m, o, s: pair_gradients(m, o, o.prepare(ROWS), source="factual", target="diff", space=s),
    "sums": lambda m, o, s: weighted_sums(m, o, o.prepare(ROWS), torch.ones(1, 2, 5), space=s),
}


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_a_space_of_another_model_is_refused(entry):
    model, objective, full = make("bert")
    sizes = {"vocab_size": len(tokenizer()), "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    larger = BertForMaskedLM(BertConfig(hidden_size=32, intermediate_size=48, **sizes)).double().eval()  # equal names, other shapes
    for space in (full, thin(full)):
        with pytest.raises(InputError, match=r"embeddings.weight' has shape \(\d+, 16\) in the space and \(\d+, 32\) in this BertForMaskedLM"): ENTRIES[entry](larger, objective, space)
    with pytest.raises(InputError, match="is not a parameter of this Linear"): ENTRIES[entry](nn.Linear(2, 2), objective, full)
    with pytest.raises(InputError, match="no entries"): ENTRIES[entry](model, objective, full.keep([]))


def test_directions_of_any_kind():
    model, objective, full = make("bert")
    space = thin(full, 50)
    w = torch.randn(2, space.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = encode(model, objective, ROWS, w, space=space)
    for same_directions in (w.numpy(), w.tolist(), w.clone().requires_grad_()): torch.testing.assert_close(encode(model, objective, ROWS, same_directions, space=space), expected, rtol=0, atol=0)
    torch.testing.assert_close(encode(model, objective, ROWS, w[0].tolist(), space=space), expected[:, :1])
    for engine in ("auto", "ghost", "jvp", "loop"):
        found = encode(model, objective, ROWS, w[:0], space=space, engine=engine)
        assert found.shape == (5, 0) and found.dtype == torch.float64
    for wrong in (torch.tensor(1.0), w[None], w[:, 1:], ["a"] * space.n, [w[0], w[1]], None):
        with pytest.raises(InputError, match=rf"directions: .*\({space.n},\) or \(K, {space.n}\)"): encode(model, objective, ROWS, wrong, space=space)
    moved = _directions(w, space.n, torch.empty(1, device="meta"))  # no second device here, but one that can be asked for
    assert moved.device.type == "meta" and moved.dtype == torch.float32


def test_a_batch_size_below_one_and_a_table_that_is_none():
    model, objective, space = make("bert")
    calls = [lambda frame, size: encode(model, objective, frame, torch.ones(space.n), space=space, batch_size=size), lambda frame, size: row_gradients(model, objective, frame, space=space, batch_size=size),
             lambda frame, size: accumulate(model, objective, frame, torch.ones(5), torch.ones(5), space=space, batch_size=size)]
    for call in calls:
        for size in (0, -3):
            with pytest.raises(InputError, match=f"batch_size={size}"): call(ROWS, size)
        with pytest.raises(InputError, match="examples: dict is no table"): call(ROWS.to_dict(), 4)
        with pytest.raises(InputError, match="no column 'alternative'"): call(ROWS[["masked", "factual"]], 4)


class Changed(MaskedLM):
    "An objective whose losses are spoilt by a function."
    def __init__(self, words, spoil):
        super().__init__(words)
        self.spoil = spoil

    def losses(self, model, batch): return self.spoil(super().losses(model, batch))


SPOILT = {
    "one number": (lambda x: (x[0].mean(), x[1].mean()), r"Changed.losses returned a tensor \(\), a tensor \(\); it must return two tensors"),
    "one number, kept": (lambda x: (x[0].mean()[None], x[1].mean()[None]), r"must return two tensors"),
    "one tensor": (lambda x: x[0], "must return two tensors"), "no tensor": (lambda x: None, "returned NoneType"), "three": (lambda x: (*x, x[0]), "must return two tensors"),
    "uneven": (lambda x: (x[0], x[1][1:]), "must return two tensors"), "lists": (lambda x: (x[0].tolist(), x[1].tolist()), "returned list, list"),
    "detached": (lambda x: (x[0].detach(), x[1].detach()), "do not depend on the model's parameters"),
}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e not in ("pair", "sums")])
@pytest.mark.parametrize("fault", list(SPOILT))
def test_losses_that_are_none(fault, entry):
    words, model = tiny("bert")
    spoil, message = SPOILT[fault]
    if fault == "one number, kept" and "loop" in entry: return  # right for one row at a time
    with pytest.raises(InputError, match=message): ENTRIES[entry](model, Changed(words, spoil), thin(ParameterSpace.from_model(model), 50))


def test_a_space_that_the_losses_do_not_use_has_zero_gradients():
    class Idle(nn.Sequential):
        def forward(self, x): return self[0](x)
    model = Idle(nn.Linear(2, 3), nn.Linear(2, 3))
    space = ParameterSpace.from_model(model, "1.weight")
    for engine in ("ghost", "jvp", "loop"): assert encode(model, Scores(), POINTS, torch.ones(6), space=space, engine=engine).tolist() == [[0.0]] * 3
    assert not row_gradients(model, Scores(), POINTS, space=space).any() and not accumulate(model, Scores(), POINTS, [1.0] * 3, [1.0] * 3, space=space).any()


@pytest.mark.parametrize("kind", [NotImplementedError, RuntimeError])
@pytest.mark.parametrize("entry", list(ENTRIES))
def test_an_error_of_the_objective_is_shown_as_it_is(entry, kind):
    words, model = tiny("bert")

    def spoil(x): raise kind("no losses today")
    with pytest.raises(kind, match="no losses today"), warnings.catch_warnings():
        warnings.simplefilter("error")  # and no word about engines
        ENTRIES[entry](model, Changed(words, spoil), thin(ParameterSpace.from_model(model), 50))


@pytest.mark.parametrize("size", [1e8, 1e-8])
def test_the_size_of_the_weights_does_not_matter_in_float16(size):
    words, model = tiny_model("bert", dtype=torch.float16)
    objective, space, ones = MaskedLM(words), ParameterSpace.from_model(model), torch.ones(5, requires_grad=True)
    expected = accumulate(model, objective, ROWS, ones, -ones, space=space)
    found = accumulate(model, objective, ROWS, ones * size, -ones * size, space=space)
    assert not found.requires_grad
    torch.testing.assert_close(found / size, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_each_of_several_sums_has_its_own_size_in_float16():
    words, model = tiny_model("bert", dtype=torch.float16)
    objective, space, ones = MaskedLM(words), ParameterSpace.from_model(model), torch.ones(2, 5)
    sizes = torch.tensor([[1.0], [1e-12]])
    expected = accumulate(model, objective, ROWS, ones[0], -ones[0], space=space)
    for found, size in zip(accumulate(model, objective, ROWS, ones * sizes, -ones * sizes, space=space), (1.0, 1e-12), strict=True):
        torch.testing.assert_close(found / size, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_weights_of_any_shape_are_served_or_refused():
    model, objective, space = make("bert")
    for shape, wanted in (((0,), (space.n,)), ((2, 0), (2, space.n))):
        found = accumulate(model, objective, ROWS.head(0), torch.zeros(shape), torch.zeros(shape), space=space)
        assert found.shape == wanted and not found.any()
    assert accumulate(model, objective, ROWS, torch.zeros(0, 5), torch.zeros(0, 5), space=space).shape == (0, space.n)
    for factual, alternative, message in ((torch.ones(1, 5), torch.ones(5), r"weights_alternative: shape \(5,\) does not fit \(1, 5\)"), ([[1.0], [1.0, 2.0]], torch.ones(5), "weights_factual"),
                                          ("ones", torch.ones(5), "weights_factual"), (torch.ones(5), None, "weights_alternative")):
        with pytest.raises(InputError, match=message): accumulate(model, objective, ROWS, factual, alternative, space=space)
    for kind in (None, 7, "fact", ("diff", None), ("diff",)):
        with pytest.raises(InputError, match="kind"): encode(model, objective, ROWS, torch.ones(2, space.n), space=space, kind=kind)
