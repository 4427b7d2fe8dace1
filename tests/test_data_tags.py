"Edge cases of gradiend.data.tags: a condition means what it says, and no pipeline is changed or downloaded."
import os
from itertools import product
from pathlib import Path

import pytest

spacy = pytest.importorskip("spacy")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from spacy.lookups import Lookups  # noqa: E402
from spacy.tokens import Doc  # noqa: E402

from gradiend.core import InputError  # noqa: E402
from gradiend.data import tags  # noqa: E402
from gradiend.data.tags import SpacyTagSpec, annotate, check_values, inflected_forms, load_spacy  # noqa: E402

VOCAB = spacy.blank("en").vocab
CASES, NUMBERS, POS = ("Nom", "Acc", "Dat"), ("Sing", "Plur"), ("DET", "NOUN")


def token(**features):
    pos = features.pop("pos", "X")
    return Doc(VOCAB, words=["w"], pos=[pos], morphs=["|".join(f"{k}={v}" for k, v in sorted(features.items()) if v)])[0]


TOKENS = [token(pos=p, Case=c, Number=n) for p, c, n in product(POS, (*CASES, None), (*NUMBERS, None))]
VALUES = {"Case": CASES, "Number": NUMBERS, "pos": POS}


@st.composite
def specs(draw):
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, unique=True))
    lines = {k: draw(st.lists(st.sampled_from(VALUES[k]), min_size=1, unique=True)) for k in keys}
    return {k: [f"!{v}" for v in vs] if draw(st.booleans()) else vs for k, vs in lines.items()}


def plainly(lines, t):
    "The meaning of a specification, spelled out."
    for key, values in lines.items():
        found = [t.pos_] if key == "pos" else t.morph.get(key)
        hit = any(v.lstrip("!") in found for v in values)
        if hit == values[0].startswith("!"): return False
    return True


@settings(max_examples=100, deadline=None)
@given(specs(), specs())
def test_matching_and_implication(a, b):
    first, second = SpacyTagSpec(a), SpacyTagSpec(b)
    fits_a, fits_b = [plainly(a, t) for t in TOKENS], [plainly(b, t) for t in TOKENS]
    assert [first.matches(t) for t in TOKENS] == fits_a
    if first.implies(second): assert all(y for x, y in zip(fits_a, fits_b, strict=True) if x)
    assert SpacyTagSpec(first.to_dict()) == first and hash(SpacyTagSpec(first.to_dict())) == hash(first)
    joined = first.overridden(second)
    assert [joined.matches(t) for t in TOKENS] == [plainly({**a, **b}, t) for t in TOKENS]


def test_several_tokens_need_one_with_all_and_none_with_the_forbidden():
    sg, pl = token(pos="NOUN", Number="Sing"), token(pos="DET", Number="Plur")
    assert SpacyTagSpec(pos="NOUN").fits([pl, sg]) and not SpacyTagSpec(pos="NOUN", Number="Plur").fits([pl, sg])
    assert not SpacyTagSpec(pos="NOUN", Number="!Plur").fits([pl, sg]) and SpacyTagSpec(Number="!Plur").fits([sg])
    assert not SpacyTagSpec(Number="!Plur").fits([])


@pytest.mark.parametrize("given, message", [
    ({"number": "Plur"}, "did you mean 'Number'"), ({"POS": "DET"}, "did you mean 'pos'"), ({"Caze": "Nom"}, "did you mean 'Case'"),
    ({"xyz": "1"}, "valid are pos, tag, dep, lemma, ent_type and the features Abbr"), ({"pos": "Noun"}, "not a part of speech"),
    ({"Case": ""}, "must be a value"), ({"Case": []}, "must be a value"), ({"Case": 1}, "must be a value"), ({}, "says nothing"),
    ({"Case": ["!Nom", "Acc"]}, "mixes allowed and forbidden"), (["Case"], "must be a dict"), ({1: "Nom"}, "is not a key"),
])
def test_bad_specifications(given, message):
    with pytest.raises(InputError, match=message): SpacyTagSpec(given)


def test_layered_and_own_features():
    assert SpacyTagSpec({"Gender[psor]": "Fem"}).annotations == {"morph"}
    assert SpacyTagSpec({"Own": "1"}, features=["Own"]).overridden(SpacyTagSpec(dep="obj")).annotations == {"morph", "dep"}


def german():
    nlp = spacy.blank("de")
    for name in ("tagger", "morphologizer", "parser", "ner"): nlp.add_pipe(name)
    return nlp


@pytest.mark.parametrize("needed, sentences, kept", [
    ([], False, []), (["tag"], False, ["tagger"]), (["pos"], False, ["morphologizer"]), (["morph", "ent_type"], False, ["morphologizer", "ner"]),
    (["dep"], False, ["parser"]), (["tag"], True, ["tagger", "parser"]), ([], True, ["parser"]),
])
def test_only_what_is_needed_runs(needed, sentences, kept):
    nlp = german()
    loaded = load_spacy(nlp, components_needed=needed, sentences=sentences)
    assert loaded.pipe_names == kept and nlp.pipe_names == ["tagger", "morphologizer", "parser", "ner"] and loaded.sentencizer is None
    assert load_spacy(loaded, components_needed=["tag"]).pipe_names == ["tagger"]


def test_rules_and_own_components_always_run():
    nlp = german()
    nlp.add_pipe("attribute_ruler", after="tagger")
    assert load_spacy(nlp, components_needed=["lemma"]).pipe_names == ["tagger", "attribute_ruler"]
    nlp = spacy.blank("en")
    nlp.add_pipe("lemmatizer", config={"mode": "rule"})
    nlp.add_pipe("morphologizer", first=True)
    assert load_spacy(nlp, components_needed=["lemma"]).pipe_names == ["morphologizer", "lemmatizer"]


def test_sentences_without_a_component_for_them():
    loaded = load_spacy(spacy.blank("en"), sentences=True)
    assert [len(list(d.sents)) for d in annotate(["Yes. No.", "Yes."], loaded)] == [2, 1] and loaded.nlp.pipe_names == []


def test_missing_pipelines_and_annotations(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="annotates dep, lemma; use a pipeline"): load_spacy(spacy.blank("de"), components_needed=["lemma", "dep"])
    with pytest.raises(InputError, match="nothing that annotates lemma"): load_spacy(german(), components_needed=["lemma"])
    with pytest.raises(InputError, match="python -m spacy download no_such_model"): load_spacy("no_such_model")
    with pytest.raises(InputError, match="must be the name or folder"): load_spacy(None)
    asked = []
    monkeypatch.setattr("spacy.cli.download", asked.append)
    with pytest.raises(OSError, match="E050"): load_spacy("no_such_model", download_if_missing=True)
    assert asked == ["no_such_model"]
    german().to_disk(tmp_path / "de")
    assert load_spacy(tmp_path / "de", components_needed=["tag"]).pipe_names == load_spacy(str(tmp_path / "de"), components_needed=["tag"]).pipe_names


def test_annotate_streams_in_order():
    seen = []
    def texts():
        for i in range(20):
            seen.append(i)
            yield f"text {i}"
    docs = annotate(texts(), spacy.blank("en"), batch_size=4)
    assert next(docs).text == "text 0" and len(seen) < 20
    assert [d.text for d in docs] == [f"text {i}" for i in range(1, 20)]


def test_values_are_checked_where_the_labels_are_the_whole_truth():
    nlp = spacy.blank("de")
    nlp.add_pipe("morphologizer").add_label("Case=Nom|POS=DET")
    check_values(SpacyTagSpec(Case="Nom", pos="DET", lemma="x", dep="y"), nlp)
    for wrong in (SpacyTagSpec(Case="Gen"), SpacyTagSpec(Case=["Nom", "Gen"]), SpacyTagSpec(Gender="!Fem"), SpacyTagSpec(pos="VERB")):
        with pytest.raises(InputError, match="is never written by the pipeline"): check_values(wrong, nlp)
    nlp.add_pipe("attribute_ruler")
    check_values(SpacyTagSpec(Case="Gen", pos="VERB"), nlp)


def lemmatizing(mode, **tables):
    nlp, made = spacy.blank("en"), Lookups()
    for name, table in tables.items(): made.add_table(name, table)
    nlp.add_pipe("lemmatizer", config={"mode": mode}).initialize(lookups=made)
    return nlp


def test_every_form_a_rule_lemmatizer_can_reduce_is_listed():
    verbs = ["go", "carry", "walk", "use"]
    nlp = lemmatizing("rule", lemma_rules={"verb": [["ies", "y"], ["es", ""], ["ed", "e"], ["ed", ""], ["s", ""]]},
                      lemma_exc={"verb": {"went": ["go"], "gone": ["go"]}}, lemma_index={"verb": verbs})
    forms = inflected_forms(nlp, verbs)
    words = ["went", "gone", "goes", "carries", "walked", "walks", "used", "uses", *verbs]
    doc = Doc(nlp.vocab, words=words, pos=["VERB"] * len(words))
    for t in nlp.get_pipe("lemmatizer")(doc): assert t.text == t.lemma_ or t.text in forms[t.lemma_]
    assert {t.lemma_ for t in doc} == set(verbs)


def test_tables_that_do_not_tell_everything():
    table = lemmatizing("lookup", lemma_lookup={"went": "go", "goes": "go", "ran": "run"})
    table.vocab.strings.add("went")
    assert inflected_forms(table, ["go"]) is None and inflected_forms(table, ["walk"]) == {"walk": frozenset()}
    table.vocab.strings.add("goes")
    assert inflected_forms(table, ["go"]) == {"go": {"went", "goes"}}
    assert inflected_forms(spacy.blank("en"), ["go"]) is None


def test_real_pipeline():
    folder = os.environ.get("GRADIEND_DATA")
    if not folder or not (Path(folder) / "spacy_en_ewt").is_dir():
        pytest.skip("needs spacy_en_ewt in the folder named by GRADIEND_DATA")
    nlp = load_spacy(Path(folder) / "spacy_en_ewt", components_needed=["pos", "morph"])
    assert nlp.pipe_names == ["tok2vec", "morphologizer"]
    plural = SpacyTagSpec(pos="PRON", Number="Plur", Person="3")
    assert [t.text for d in annotate(["She said that they know him."], nlp) for t in d if plural.matches(t)] == ["they"]
    with pytest.raises(InputError, match="Case='Dat' is never written"): check_values(SpacyTagSpec(Case="Dat"), nlp)
    with pytest.raises(InputError, match="nothing that annotates lemma"): load_spacy(nlp, components_needed=["lemma"])
    assert tags.inflected_forms(nlp, ["go"]) is None
