"Edge cases of the embedded corpora; what a reader learns from is tested in nbs/01_corpora.ipynb."
import hashlib
import os
import random
import re
import subprocess
import sys
from importlib import resources

import pytest

from gradiend.core import InputError
from gradiend.corpora import FORMS, families, load, parse_template, parse_words, realise

ENGLISH = resources.files("gradiend.embedded") / "corpora" / "en"
PRONOUNS = set("i we you he she it they me us him her them my mine our ours your yours his hers its their "
               "theirs myself ourselves yourself yourselves himself herself itself themselves".split())
AGREEMENT = [
    r"\b(they|we|you) (was|is|has|does|isn't|wasn't|hasn't|doesn't)\b",
    r"(?<!would )(?<!could )(?<!did )(?<!does )\b(he|she|it) (were|are|have|do|aren't|haven't|don't)\b",
    r"\b(he|she|it) (know|think|look|say|like|love|sell|play|speak|collect|sing|sleep|run|need|come)\b",
    r"\b(they|we|you) (knows|thinks|looks|says|likes|loves|sells|plays|speaks|sings|sleeps|runs|needs)\b",
    r"\bthey\b[^.]*\b(himself|herself|itself)\b",
]


def words_of(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+", sentence.lower())


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return load("pronoun", n=5000, seed=11)


def template_lines(family: str) -> list[str]:
    text = (ENGLISH / f"{family}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and line[0] not in "#["]


def test_twenty_thousand_distinct():
    sentences = load("pronoun", n=20_000, seed=1)
    assert len(sentences) == len(set(sentences)) == 20_000


def test_enough_templates():
    pronoun, neutral = template_lines("pronoun"), template_lines("neutral")
    assert len(set(pronoun)) == len(pronoun) >= 250
    assert len(set(neutral)) == len(neutral) >= 100
    counted = families().set_index(["language", "family"]).templates
    assert counted["en", "pronoun"] == len(pronoun) and counted["en", "neutral"] == len(neutral)


def test_same_list_in_every_process():
    code = ("import hashlib; from gradiend.corpora import load;"
            "print(hashlib.sha256('\\n'.join(load('pronoun', n=2000, seed=5)).encode()).hexdigest())")
    here = hashlib.sha256("\n".join(load("pronoun", n=2000, seed=5)).encode()).hexdigest()
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": other},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_seed_changes_the_list(corpus):
    assert len(set(corpus) & set(load("pronoun", n=5000, seed=12))) < 2500


def test_neutral_has_no_pronoun():
    for sentence in load("neutral", n=5000, seed=2):
        assert not PRONOUNS & set(words_of(sentence)), sentence


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_share_of_neutral(share):
    sentences = load("pronoun", n=400, seed=3, neutral=share)
    assert sum(not PRONOUNS & set(words_of(s)) for s in sentences) == 400 * share


@pytest.mark.parametrize("wrong", AGREEMENT)
def test_agreement(corpus, wrong):
    assert [s for s in corpus if re.search(wrong, s, re.I)] == []


def test_form_of_the_sentences(corpus):
    for sentence in corpus:
        assert not re.search(r"[{}|/@#]|  |\s[,.?!;]|[^\x20-\x7e]", sentence), sentence
        assert re.match(r"\"?[A-Z]", sentence) and re.search(r"[.?!]\"?$", sentence), sentence
        assert sentence.count('"') % 2 == 0
        assert 5 <= len(sentence.split()) <= 32, sentence


def test_articles(corpus):
    for article, word in re.findall(r"\b(an?) (\w+)", " ".join(corpus + load("neutral", n=5000)), re.I):
        vowel = word[0].lower() in "aeiou" and word != "university" or word in ("hour", "honest")
        assert (article.lower() == "an") == vowel, (article, word)


def test_every_pronoun_is_there(corpus):
    words = [w for s in corpus for w in words_of(s)]
    counts = {p: words.count(p) for p in ("i", "we", "you", "he", "she", "it", "they")}
    assert min(counts.values()) > 200, counts
    assert 0.8 < (counts["he"] + counts["she"] + counts["it"]) / counts["they"] < 1.25
    assert 0.8 < counts["he"] / counts["she"] < 1.25


def test_word_lists_are_rich():
    words = parse_words((ENGLISH / "words.txt").read_text(encoding="utf-8"))
    person = words["person"]
    assert len(set(person["he"]) | set(person["she"])) >= 150 and len(person["they"]) >= 80
    things = {e for pool in words.values() for e in pool.get("it", [])}
    assert len(things) >= 80
    for name in ("place", "food", "when"): assert len(words[name][""]) >= 60, name
    for name, pool in words.items():
        for entry in (e for es in pool.values() for e in es): assert entry == entry.strip() != "", name


@pytest.mark.parametrize("family", ["x", "words", "../en/pronoun", ""])
def test_unknown_family_lists_what_exists(family):
    with pytest.raises(InputError, match="'neutral', 'pronoun'"): load(family)


def test_unknown_language_lists_what_exists():
    with pytest.raises(InputError, match="language='xx'.*'en'"): load("pronoun", "xx")


def test_too_many_says_how_many():
    with pytest.raises(InputError, match=r"at most \d+ different"): load("pronoun", n=10**10)
    with pytest.raises(InputError, match="n=-3"): load("pronoun", n=-3)
    with pytest.raises(InputError, match="neutral=1.5"): load("pronoun", neutral=1.5)


def test_forms_follow_the_referent_everywhere():
    words = parse_words("[a = he]\nx\n[b = she]\nx\n[c = it]\nx\n[d = they]\nx")
    for name, pronoun in zip("abcd", FORMS, strict=True):
        template = parse_template(f"{{He}} {{him}} {{his}} {{himself}} {{one/many}} {{{name}}}", words)
        he, *others = FORMS[pronoun]
        expected = [he.capitalize(), *others, "many" if pronoun == "they" else "one", "x"]
        assert realise(template, words, random.Random(0)).split() == expected
