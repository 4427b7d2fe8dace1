"""Losses, gradients and probabilities of the four objectives against plain computations through transformers, on nine architectures."""
from functools import lru_cache
from itertools import product

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from gradiend.core import InputError
from gradiend.gradients.objectives import CausalCloze, CausalLM, MaskedLM, Seq2SeqLM, kind_of, longest_input, masked_lm, objective_for, word_sets
from gradiend.gradients.store import objective_identity
from gradiend.gradients.tokens import Collector, Question, Tokens, batches, crop, prediction_module, slot_sums, split_tokens, states_at

from .stories import DATA, by_score, real, stories
from .tiny import ARCHITECTURES, CAUSAL, CONFIGS, FLOAT32_INSIDE, byte_level_tokenizer, gpt_tokenizer, t5_tokenizer, tiny_model

WAYS = [(kind, "masked_lm") for kind in CONFIGS] + [*product(("gpt2", "llama", "qwen3", "gemma"), ("causal_lm", "causal_cloze")), ("t5", "seq2seq")]
ways = pytest.mark.parametrize("kind, name", WAYS, ids=[f"{k}-{n}" for k, n in WAYS])
ROWS = pd.DataFrame({
    "masked": ["The drummers lost the beat because [MASK] were watching the crowd.", "[MASK] was tired.", "Anna said that [MASK] was late.",
               "The dogs barked because [MASK] were cold.", "The keys that [MASK] had were cold.", "The pilot said that, [MASK].", "When the twins arrived, [MASK] were hungry."],
    "factual": ["they", "She", "she", "they", "he", "they", "they"],
    "alternative": ["he", "They", "said", "it", "unhappiness", "see", "them"],  # of one piece and of several
})


tiny = lru_cache(tiny_model)  # no test changes a model


def make(kind, name):
    tokenizer, model = tiny(kind)
    return objective_for(tokenizer, model, name=name), tokenizer, model


def check_close(kind, actual, expected, tol=1e-9):
    "Float64 all the way through, or float32 inside: then 1e-5 of the largest value."
    tol = 1e-5 if kind in FLOAT32_INSIDE else tol
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol * max(1.0, float(expected.detach().abs().max())))


def word_columns(tokenizer, masked: str, word: str):
    "Ids of the filled sentence and the columns of the word: all that comes after the end of the word before it, up to the word's last letter."
    text, start = masked.replace("[MASK]", word), masked.index("[MASK]")
    encoding = tokenizer(text, return_offsets_mapping=True)
    before, stop, special = len(text[:start].rstrip()), start + len(word), set(tokenizer.all_special_ids)
    columns = [j for j, (a, b) in enumerate(encoding.offset_mapping) if encoding.input_ids[j] not in special and b > before and a < stop]
    return encoding.input_ids, columns


def plain_logits(objective, tokenizer, model, masked: str, word: str, *, joint: bool = False):
    "Scores `(m, V)` and tokens `(m,)` of everything that is asked about a word: whole head, no padding, one row at a time."
    ids, columns = word_columns(tokenizer, masked, word)
    if objective.name == "masked_lm":
        scores = []
        for j, column in enumerate(columns):
            hidden = columns[j:] if joint else columns
            scores.append(model(input_ids=torch.tensor([[tokenizer.mask_token_id if c in hidden else t for c, t in enumerate(ids)]])).logits[0, column])
        return torch.stack(scores), torch.tensor([ids[c] for c in columns])
    if objective.name == "seq2seq":
        sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        labels = torch.tensor([[sentinel, *(ids[c] for c in columns)]])
        encoder = torch.tensor([[*ids[:columns[0]], sentinel, *ids[columns[-1] + 1:]]])
        return model(input_ids=encoder, labels=labels).logits[0, 1:], labels[0, 1:]
    if columns[0] == 0: ids, columns = [tokenizer.bos_token_id, *ids], [c + 1 for c in columns]
    if objective.name == "causal_cloze": columns = range(columns[0], len(ids))
    logits = model(input_ids=torch.tensor([ids])).logits[0]  # the whole sentence: what comes later must not matter
    return logits[[c - 1 for c in columns]], torch.tensor([ids[c] for c in columns])


def plain_losses(objective, tokenizer, model, frame=ROWS):
    return torch.stack([torch.stack([cross_entropy(*plain_logits(objective, tokenizer, model, m, w)) for m, w in zip(frame.masked, frame[column], strict=True)])
                        for column in ("factual", "alternative")])


def test_the_words_have_one_to_many_pieces():
    "What the comparisons below cover: for each tokenizer words of one, two, three and more tokens, with and without a space in front."
    for kind in ARCHITECTURES:
        tokenizer, _ = tiny(kind)
        lengths = {len(word_columns(tokenizer, m, w)[1]) for column in ("factual", "alternative") for m, w in zip(ROWS.masked, ROWS[column], strict=True)}
        assert {1, 2, 3} <= lengths, (kind, lengths)


@ways
def test_losses_equal_a_plain_computation(kind, name):
    objective, tokenizer, model = make(kind, name)
    with torch.no_grad():
        together = torch.stack(objective.losses(model, objective.prepare(ROWS)))
        check_close(kind, together, plain_losses(objective, tokenizer, model))
        alone = torch.cat([torch.stack(objective.losses(model, objective.prepare(ROWS.iloc[[i]]))) for i in range(len(ROWS))], 1)
    check_close(kind, together, alone)


@ways
def test_gradients_equal_a_plain_computation(kind, name):
    objective, tokenizer, model = make(kind, name)
    weights = torch.randn(2, len(ROWS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(model.parameters())
    losses = torch.stack(objective.losses(model, objective.prepare(ROWS)))
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad((losses * weights).sum(), parameters, **options)
    expected = torch.autograd.grad((plain_losses(objective, tokenizer, model) * weights).sum(), parameters, **options)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected)]
    assert flat[1].abs().max() > 1e-3
    check_close(kind, *flat)


@ways
def test_probabilities_are_joint_and_independent_of_the_batch(kind, name):
    objective, tokenizer, model = make(kind, name)
    words = [["they", "see"], ["he"]]
    rows = ROWS.iloc[:3]
    together = objective.probabilities(model, objective.prepare_words(rows, words))
    alone = torch.cat([objective.probabilities(model, objective.prepare_words(rows.iloc[[i]], words)) for i in range(len(rows))])
    check_close(kind, together, alone)
    expected = torch.zeros_like(together)
    for i, masked in enumerate(rows.masked):
        for c, forms in enumerate(word_sets(tokenizer, words)):
            for form in forms:
                with torch.no_grad(): scores, tokens = plain_logits(objective, tokenizer, model, masked, form, joint=True)
                expected[i, c] += scores.log_softmax(-1)[range(len(tokens)), tokens].sum().exp()
    if name == "causal_cloze": expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(together, expected, rtol=1e-4 if kind in FLOAT32_INSIDE else 1e-8, atol=0)
    assert (together > 0).all() and (together.sum(1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("kind, name", [(k, n) for k, n in WAYS if n != "causal_cloze" and k != "distilbert"])  # DistilBERT takes no position numbers
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_losses(kind, name, side):
    objective, tokenizer, model = make(kind, name)
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try: batch = objective.prepare(ROWS)
    finally: tokenizer.padding_side = before
    lines = [ids[:int(attention.sum())] for ids, attention in zip(batch.input_ids.tolist(), batch.attention_mask, strict=True)]
    width = max(map(len, lines)) + 3  # more padding than necessary
    pad = tokenizer.pad_token_id or 0
    space = [[pad] * (width - len(line)) for line in lines]
    ids = torch.tensor([p + line if side == "left" else line + p for p, line in zip(space, lines, strict=True)])
    attention = torch.tensor([[0] * len(p) + [1] * len(line) if side == "left" else [1] * len(line) + [0] * len(p) for p, line in zip(space, lines, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": attention}
    if kind == "t5": inputs |= {"decoder_input_ids": batch.decoder_input_ids, "decoder_attention_mask": batch.decoder_attention_mask}
    elif kind != "roberta": inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    columns = batch.columns if kind == "t5" or side == "right" else batch.columns + torch.tensor([len(p) for p in space])[batch.rows]
    with torch.no_grad():
        log_p = model(**inputs).logits[batch.rows, columns].log_softmax(-1)
        losses = torch.stack(objective.losses(model, batch))
    answers = -(log_p[batch.place, batch.token] * batch.weight)
    check_close(kind, losses.flatten(), torch.zeros(batch.slots, dtype=torch.float64).index_add(0, batch.slot, answers))


@ways
def test_nothing_is_padded_beyond_the_longest_row(kind, name):
    objective, _, _ = make(kind, name)
    batch = objective.prepare(ROWS)
    assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1]
    if kind == "t5": assert batch.decoder_attention_mask.sum(1).max() == batch.decoder_input_ids.shape[1]


@ways
def test_the_head_sees_the_asked_positions_only(kind, name):
    objective, _, model = make(kind, name)
    batch = objective.prepare(ROWS)
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    try: objective.losses(model, batch)
    finally: handle.remove()
    assert seen == [(1, len(batch.rows), seen[0][-1])]
    with torch.no_grad():
        full = model(**batch.inputs).logits[batch.rows, batch.columns]
        with states_at(model, batch.rows, batch.columns): few = model(**batch.inputs).logits
    check_close(kind, few[0], full, tol=1e-12)
    assert not prediction_module(model)._forward_hooks


@ways
def test_words_of_equal_length_share_an_input_and_rows_do_not(kind, name):
    objective, tokenizer, _ = make(kind, name)
    rows = ROWS.iloc[[0, 0, 3]]
    batch = objective.prepare(rows)
    per_row = [len(set(map(tuple, objective.prepare(rows.iloc[[i]]).input_ids.tolist()))) for i in range(3)]
    assert set(batch.owner.tolist()) == {0, 1, 2}
    if name == "causal_cloze": assert len(batch.owner) == 6
    elif name == "causal_lm": assert len(batch.owner) == 3  # of two words the longer one's input serves both
    elif per_row[0] == 1 and kind != "t5": assert (batch.owner == 0).sum() == (batch.owner == 1).sum() == 1
    assert batch.slots == 6 and torch.zeros(6, dtype=torch.float64).index_add(0, batch.slot, batch.weight).tolist() == pytest.approx([1.0] * 6)


def test_a_causal_word_is_predicted_from_the_column_before_it():
    objective, tokenizer, model = make("gpt2", "causal_lm")
    row = pd.DataFrame({"masked": ["The dogs barked because [MASK] were cold."], "factual": ["they"], "alternative": ["he"]})
    batch = objective.prepare(row)
    assert tokenizer.decode(batch.input_ids[0]) == "The dogs barked because"
    assert batch.columns.tolist() == [batch.input_ids.shape[1] - 1]
    assert [tokenizer.decode(t) for t in batch.token] == [" they", " he"]


@pytest.mark.parametrize("masked, word, space", [("Anna said [MASK] was late.", "she", True), ("[MASK] was late.", "she", False), ('Anna said: "[MASK] was late."', "she", False), ("Was it ([MASK])?", "she", False)])
@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), gpt_tokenizer()], ids=["roberta", "gpt2"])
def test_words_carry_the_space_that_stands_before_them(tokenizer, masked, word, space):
    [tokens] = split_tokens(tokenizer, [masked], [word])
    assert tokenizer.decode([tokens.ids[c] for c in tokens.columns]) == (" " if space else "") + word


def test_a_lone_space_belongs_to_the_word_only_if_the_word_has_none_of_its_own():
    tokenizer = gpt_tokenizer()
    [rare] = split_tokens(tokenizer, ["Then [MASK] left."], ["zzz"])
    assert tokenizer.decode([rare.ids[c] for c in rare.columns]) == " zzz" and tokenizer.convert_ids_to_tokens(rare.ids[rare.columns[0]]) == "Ġ"
    [doubled] = split_tokens(tokenizer, ["Then  [MASK] left."], ["they"])  # two spaces: the first one is context
    assert tokenizer.convert_ids_to_tokens([doubled.ids[c] for c in doubled.columns]) == ["Ġthey"]


@ways
@pytest.mark.parametrize("filler", [(40, 40), (80, 0), (0, 80)], ids=["both", "left", "right"])
def test_a_long_row_keeps_its_label(kind, name, filler):
    objective, tokenizer, model = make(kind, name)
    row = ROWS.iloc[[0]].assign(masked="The dogs barked. " * filler[0] + ROWS.masked[0] + " The dogs barked." * filler[1])
    batch = objective.prepare(row)
    assert batch.input_ids.shape[1] <= objective.max_length == 64
    if filler != (0, 80) or name != "causal_lm": assert batch.input_ids.shape[1] >= 60
    asked = tokenizer.decode(batch.token[batch.slot == 0]).strip()
    assert asked == "they" or name == "causal_cloze" and asked.startswith("they were")
    with torch.no_grad(): assert torch.isfinite(torch.stack(objective.losses(model, batch))).all()


@pytest.mark.parametrize("limit", [6, 9, 20, 40])
def test_crop_keeps_the_word_and_the_special_tokens(limit):
    tokens = Tokens((-1, *range(19), 100, 101, *range(200, 214), -2), ((20, 22),), 1, 1)
    short = crop(tokens, limit)
    assert len(short.ids) == min(limit, 37) and [short.ids[c] for c in short.columns] == [100, 101]
    assert short.ids[0] == -1 and short.ids[-1] == -2
    start, stop = short.places[0]
    assert list(short.ids[1:start]) == list(range(19))[20 - start:] and list(short.ids[stop:-1]) == list(range(200, 200 + len(short.ids) - 1 - stop))


@ways
def test_a_word_that_does_not_fit_is_an_error_that_names_the_row(kind, name):
    tokenizer, model = tiny(kind)
    objective = objective_for(tokenizer, model, name=name, max_length=3)
    rows = ROWS.iloc[[2]].assign(factual="unhappiness")
    with pytest.raises(InputError, match="row 2: the hidden words take .* max_length=3"): objective.prepare(rows)


@ways
def test_several_gaps_ask_for_the_same_word_at_each(kind, name):
    objective, tokenizer, model = make(kind, name)
    masked, word = "Anna said that [MASK] was late because [MASK] was tired.", "she"
    row = pd.DataFrame({"masked": [masked], "factual": [word], "alternative": ["it"]})
    [tokens] = split_tokens(tokenizer, [masked], [word])
    columns, ids = tokens.columns, list(tokens.ids)
    assert [tokenizer.decode([ids[c] for c in range(a, b)]).strip() for a, b in tokens.places] == [word, word]
    if name == "masked_lm": logits = model(input_ids=torch.tensor([[tokenizer.mask_token_id if c in columns else t for c, t in enumerate(ids)]])).logits[0, columns]
    elif name == "seq2seq":
        (a, b), (c, d) = tokens.places
        sentinels = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
        decoder = [0, sentinels[0], *ids[a:b], sentinels[1], *ids[c:d]]
        where = [*range(1, 1 + b - a), *range(2 + b - a, 2 + b - a + d - c)]
        logits = model(input_ids=torch.tensor([[*ids[:a], sentinels[0], *ids[b:c], sentinels[1], *ids[d:]]]), decoder_input_ids=torch.tensor([decoder])).logits[0, where]
    else:
        if name == "causal_cloze": columns = [*range(columns[0], len(ids))]
        logits = model(input_ids=torch.tensor([ids])).logits[0, [c - 1 for c in columns]]
    expected = cross_entropy(logits, torch.tensor([ids[c] for c in columns]))
    check_close(kind, objective.losses(model, objective.prepare(row))[0][0], expected)
    if name != "causal_cloze":  # one candidate, twice: the geometric mean over the two places
        p = objective.probabilities(model, objective.prepare_words(row, [["she"], ["it"]]))
        assert p.shape == (1, 2) and 0 < p.sum() < 1


def test_two_gaps_have_the_geometric_mean_of_their_joint_probability():
    objective, tokenizer, model = make("gpt2", "causal_lm")
    masked = "Anna said that [MASK] was late because [MASK] was tired."
    forms, p = ["she", "She"], objective.probabilities(model, objective.prepare_words(pd.DataFrame({"masked": [masked]}), [["she"], ["it"]]))
    expected = 0.0
    for form in forms:
        [tokens] = split_tokens(tokenizer, [masked], [form])
        log_p = model(input_ids=torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        expected += (sum(log_p[c - 1, tokens.ids[c]] for c in tokens.columns) / 2).exp().item()
    assert p[0, 0].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", list(CONFIGS) + list(CAUSAL) + ["t5"])
def test_the_objective_follows_from_the_model(kind):
    tokenizer, model = tiny(kind)
    expected = "masked_lm" if kind in CONFIGS else "causal_lm" if kind in CAUSAL else "seq2seq"
    objective = objective_for(tokenizer, model)
    assert kind_of(tokenizer, model) == kind_of(tokenizer) == objective.name == expected
    assert type(objective) is {"masked_lm": MaskedLM, "causal_lm": CausalLM, "seq2seq": Seq2SeqLM}[expected]
    assert longest_input(model) == (None if kind == "t5" else 64)  # RoBERTa's configuration says 66
    assert objective_for(tokenizer, model, max_length=10).max_length == 10


def test_the_model_limits_the_input_where_the_tokenizer_does_not():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend_tokenizer, **byte_level_tokenizer().special_tokens_map)
    _, model = tiny("roberta")
    row = ROWS.iloc[[0]].assign(masked="The dogs barked. " * 40 + ROWS.masked[0])
    objective = objective_for(tokenizer, model)
    assert objective.max_length == 64 and masked_lm(tokenizer).max_length > 1000
    assert torch.isfinite(objective.losses(model, objective.prepare(row))[0]).all()  # no position beyond the last


def test_cloze_windows():
    tokenizer, model = tiny("gpt2")
    row = ROWS.iloc[[3]]
    texts = {w: tokenizer.decode((b := objective_for(tokenizer, model, name="causal_cloze", window=w).prepare(row)).token[b.slot == 0]) for w in (0, 1, None)}
    assert texts[0] == " they" and texts[1] == " they were" and texts[None] == " they were cold."
    left, none = CausalLM(tokenizer), CausalCloze(tokenizer, window=0)
    check_close("gpt2", torch.stack(none.losses(model, none.prepare(ROWS))), torch.stack(left.losses(model, left.prepare(ROWS))))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_half_precision_losses_are_summed_in_float32(kind):
    tokenizer, model = tiny_model(kind, dtype=torch.bfloat16)
    objective = objective_for(tokenizer, model)
    with torch.no_grad(): half = torch.stack(objective.losses(model, objective.prepare(ROWS)))
    _, exact = tiny(kind)
    assert half.dtype == torch.float32
    assert torch.allclose(half.double(), torch.stack(objective.losses(exact, objective.prepare(ROWS))), rtol=0.1)


def test_batches_cover_every_row_once():
    objective, _, _ = make("gpt2", "causal_lm")
    positions = torch.cat([p for p, _ in batches(objective.prepare, ROWS, 3)])
    assert sorted(positions.tolist()) == list(range(len(ROWS)))


def test_settings_tell_objectives_apart():
    tokenizer, model = tiny("gpt2")
    made = [CausalLM(tokenizer), CausalLM(tokenizer, mask="_"), CausalLM(tokenizer, max_length=9), CausalCloze(tokenizer), CausalCloze(tokenizer, window=2), CausalLM(tiny("llama")[0])]
    settings = [str(objective_identity(o)) for o in made]
    assert len(set(settings)) == len(settings) and settings[0] == str(objective_identity(objective_for(tokenizer, model)))


@ways
def test_an_unknown_word_is_an_error(kind, name):
    objective, tokenizer, _ = make(kind, name)
    if kind in ("roberta", "gpt2", "qwen3"):  # a byte-level tokenizer can write any word
        assert len(objective.prepare(ROWS.assign(factual="☃")).owner) >= len(ROWS)
        return
    with pytest.raises(InputError, match="'☃' is unknown to this tokenizer"): objective.prepare(ROWS.assign(factual="☃"))
    with pytest.raises(InputError, match="'☃' is unknown to this tokenizer"): objective.prepare_words(ROWS, [["☃"], ["he"]])


def test_errors_name_the_remedy():
    bert, _ = tiny("bert")
    gpt, gpt_model = tiny("gpt2")
    without = PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    no_start = PreTrainedTokenizerFast(tokenizer_object=gpt.backend_tokenizer)
    no_pad = PreTrainedTokenizerFast(tokenizer_object=t5_tokenizer().backend_tokenizer, unk_token="<unk>")
    cases = [("no mask token", lambda: masked_lm(without)), ("no sentinel <extra_id_0>", lambda: Seq2SeqLM(bert)), ("no padding token", lambda: Seq2SeqLM(no_pad)),
             ("row 1: the text begins with its gap.*set tokenizer.bos_token", lambda: CausalLM(no_start).prepare(ROWS)),
             (r"no \[MASK\] in 'They left.'", lambda: masked_lm(bert).prepare(ROWS.assign(masked="They left."))), ("max_length=0", lambda: masked_lm(bert, max_length=0)),
             ("window=-1", lambda: CausalCloze(gpt, window=-1)), ("window=1", lambda: objective_for(gpt, gpt_model, window=1)), ("did you mean 'causal_lm'", lambda: objective_for(gpt, name="causal-lm")),
             ("belongs to two classes", lambda: masked_lm(bert).prepare_words(ROWS, [["he"], ["they", "He"]])), ("no rows", lambda: masked_lm(bert).prepare(ROWS.iloc[:0])),
             ("say name=", lambda: objective_for(bert, torch.nn.Linear(2, 2))), ("is not a backbone with a head", lambda: prediction_module(gpt_model.transformer)),
             ("batch_size=0", lambda: list(batches(masked_lm(bert).prepare, ROWS, 0))),
             ("no sentinel <extra_id_10>", lambda: Seq2SeqLM(t5_tokenizer()).prepare(ROWS.iloc[[0]].assign(masked="[MASK] " * 11)))]
    for message, action in cases:
        with pytest.raises(InputError, match=message): action()


@pytest.mark.parametrize("kind", ["opt", "bart"])
def test_a_model_whose_head_reads_the_decoder_inside_its_backbone(kind):
    objective, tokenizer, model = make(kind, "auto")
    assert objective.name == "causal_lm" and prediction_module(model) is not model.base_model
    losses = torch.stack(objective.losses(model, objective.prepare(ROWS)))
    check_close(kind, losses, plain_losses(objective, tokenizer, model), tol=1e-6)


class Bypass(torch.nn.Module):
    "Calls what is inside its backbone, or its backbone twice."
    def __init__(self, model, how):
        super().__init__()
        self.inner, self.how = model, how

    @property
    def base_model(self): return self.inner.transformer

    def forward(self, input_ids, attention_mask, return_dict):
        backbone = self.inner.transformer
        if self.how == "around":
            states = backbone.wte(input_ids)
            for block in backbone.h: states = block(states)
            return type("Output", (), {"logits": self.inner.lm_head(states)})
        states = backbone(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.how == "twice": backbone(input_ids, attention_mask=attention_mask)
        logits = self.inner.lm_head(states)
        return type("Output", (), {"logits": logits[:, :1] if self.how == "short" else logits})


@pytest.mark.parametrize("how, message", [("around", "GPT2Model 0 times"), ("twice", "GPT2Model 2 times"), ("short", "scores of shape")])
def test_a_model_whose_head_reads_other_states_is_refused(how, message):
    objective, _, model = make("gpt2", "causal_lm")
    with pytest.raises(InputError, match=message): slot_sums(Bypass(model, how), objective.prepare(ROWS))
    assert not model.transformer._forward_hooks


@pytest.mark.parametrize("kind, name", [(k, n) for k in ("gpt2", "qwen3", "llama") for n in ("causal_lm", "causal_cloze")])
def test_something_stands_in_front_of_a_causal_word_however_short_the_input(kind, name):
    tokenizer, model = tiny(kind)
    row = ROWS.iloc[[0]].assign(factual="unhappiness", alternative="unhappiness")
    [tokens] = split_tokens(tokenizer, row.masked.tolist(), ["unhappiness"])
    word = [tokens.ids[c] for c in tokens.columns]
    for limit in range(1, len(word) + 4):
        objective = objective_for(tokenizer, model, name=name, max_length=limit)
        if limit <= len(word):  # nothing would be left to predict the first token from
            with pytest.raises(InputError, match="row 0: the hidden words take"): objective.prepare(row)
            continue
        batch = objective.prepare(row)
        assert (batch.columns >= 0).all() and batch.token[batch.slot == 0][:len(word)].tolist() == word
        first = batch.columns[batch.place[batch.slot == 0][0]]
        before = batch.input_ids[0, first].item()
        assert before in (tokens.ids[tokens.columns[0] - 1], tokens.ids[0] if tokens.head else None)  # the token in front of it, or the start token
        assert torch.isfinite(objective.losses(model, batch)[0]).all()
    for column in (-1, 2):
        with pytest.raises(InputError, match=f"column {column} is outside an input of 2 tokens"): Collector().ask(0, Question((5, 6), column, 7), slot=0, weight=1.0)


@ways
def test_tables_and_words_that_cannot_be_read(kind, name):
    objective, _, _ = make(kind, name)
    holes = ROWS.astype(object).set_axis([f"r{i}" for i in range(len(ROWS))])
    holes.loc["r2", "alternative"] = None
    cases = [("no column 'alternative', only 'masked', 'factual'", lambda: objective.prepare(ROWS[["masked", "factual"]])), ("no column 'masked'", lambda: objective.prepare_words(ROWS[["factual"]], [["he"]])),
             ("column 'alternative' of row r2 holds None", lambda: objective.prepare(holes)), ("column 'masked' of row 0 holds 1", lambda: list(batches(objective.prepare, ROWS.assign(masked=1), 3))),
             ("row 1: the word is empty", lambda: objective.prepare(ROWS.assign(factual=["he", "", *["he"] * 5]))), ("row 0: the word is empty", lambda: objective.prepare(ROWS.assign(alternative=" "))),
             (r"class 1 is \[\]", lambda: objective.prepare_words(ROWS, [["he"], []])), ("class 0 is 'he'", lambda: objective.prepare_words(ROWS, ["he", "they"])),
             (r"class 1 is \['they', ''\]", lambda: objective.prepare_words(ROWS, [["he"], ["they", ""]])), ("there is no class", lambda: objective.prepare_words(ROWS, []))]
    for message, action in cases:
        with pytest.raises(InputError, match=message): action()


def test_an_unknown_word_names_its_row():
    objective, _, _ = make("bert", "masked_lm")
    with pytest.raises(InputError, match="row r2: word '☃' is unknown"): objective.prepare(ROWS.assign(factual=["he", "he", "☃", *["he"] * 4]).set_axis([f"r{i}" for i in range(7)]))


def test_a_configuration_without_a_longest_input():
    _, model = tiny_model("bert")
    for value in (-1, 0):
        model.config.max_position_embeddings = value  # XLNet says -1
        assert longest_input(model) is None


STORIES = pd.DataFrame({
    "masked": ["Once upon a time, there was a little girl named Lily. [MASK] loved to play outside.", "Tom was sad because [MASK] lost his ball.", "Lily and Ben were happy. [MASK] played in the park.",
               "Mia said that [MASK] wanted to go home.", "[MASK] was a big dog."],
    "factual": ["She", "he", "They", "she", "There"], "alternative": ["He", "she", "She", "unhappiness", "It"],
})


@real
def test_the_real_model_writes_its_documented_text():
    tokenizer, model = stories()
    documented = (DATA / "stories260K.md").read_text(encoding="utf-8")
    with torch.no_grad(): ids = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=200, pad_token_id=0)
    text = tokenizer.decode(ids[0, 1:])
    assert text.startswith("Once upon a time, there was a little girl named Lily.") and len(text) > 400
    assert text in documented
    for sentence in [*STORIES.masked.str.replace("[MASK]", "they"), "Zebras quiver, don't they?"]:
        assert tokenizer(sentence).input_ids == [1, *by_score(sentence)]


@real
@pytest.mark.parametrize("name", ["causal_lm", "causal_cloze"])
def test_the_real_model_agrees_with_a_plain_computation(name):
    tokenizer, model = stories()
    objective = objective_for(tokenizer, model, name=name)
    assert objective.max_length == 512
    losses = torch.stack(objective.losses(model, objective.prepare(STORIES)))
    expected = plain_losses(objective, tokenizer, model, STORIES)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    for rows in (slice(0, 1), slice(0, 5)):
        found, plain = (torch.cat([g.flatten() for g in torch.autograd.grad((x[0, rows] - x[1, rows]).sum(), parameters, retain_graph=True)]) for x in (losses, expected))
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    assert (losses[0, :4] < losses[1, :4]).all()  # the model knows who is meant
    words = [["she"], ["he"], ["they"]]
    p = objective.probabilities(model, objective.prepare_words(STORIES, words))
    for i, c in enumerate([0, 1, 2, 0]): assert p[i].argmax() == c
    scores = torch.zeros_like(p)
    for i, masked in enumerate(STORIES.masked):
        for c, forms in enumerate(word_sets(tokenizer, words)):
            for form in forms:
                with torch.no_grad(): logits, tokens = plain_logits(objective, tokenizer, model, masked, form)
                scores[i, c] += logits.log_softmax(-1)[range(len(tokens)), tokens].sum().exp()
    if name == "causal_cloze": scores /= scores.sum(1, keepdim=True)
    torch.testing.assert_close(p, scores, rtol=1e-3, atol=1e-6)
