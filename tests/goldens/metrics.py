"""Metric fixtures: predictions and references with the scores that they must get.

In: nothing but seeds and the words of Python's own documentation. Out, below
`metrics/`:

    cases.json   [{"prediction", "reference", "rouge1", "exact_match"}, …]
    stems.txt    a word and its stem per line

ROUGE-1 F1 is what `rouge_score` with `use_stemmer=True` says, stems are those of
NLTK's Porter stemmer in its default mode. Exact match is written here a second
time from the rules alone, in other terms than the program's.
"""

import random
import re
from fractions import Fraction
from pydoc_data import topics

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

from common import write_json

RANDOM_CASES = 260
SYNTHETIC_WORDS = 2500
DOCUMENTATION_WORDS = 3500

# One decimal number: sign, digits with at most one point, exponent. Digits are ASCII.
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

SENTENCES = [
    "Amanda baked cookies and will bring Jerry some tomorrow.",
    "Olivia and Olivier are voting for liberals in this election.",
    "Tim's running late; he'll be there in 15 minutes or so.",
    "The dogs were barking loudly, and nobody's sleeping.",
    "She's relationally conditional: happily, hopefully, theologically.",
    "Eric doesn't know if his parents let him go to Ann's party.",
    "Meeting at 10:30 — don't forget the re-opened café (on 5th Ave.)!",
    "Kim may try the pomodoro technique recommended by Tim to get more stuff done.",
    "Flies, dies, tries; flying, dying, trying; agreed, feed, bled.",
    "Petra is very sleepy at work today, Andy finds the day boring, and Ezgi is working.",
]

# Prediction, reference.
CASES = [
    # Nothing, and nothing but punctuation.
    ("", ""),
    ("", "a"),
    ("word", ""),
    (" \n\t", ""),
    ("...", "!!!"),
    ("—", "-"),
    ("####", "####"),
    ("#### ", "#### 4"),
    ("####\n", ""),
    (".", ""),
    ("#### .", "####"),
    # The mark: none, several, overlapping, at the end, in both.
    ("so 2+2=4\n#### 4", "4"),
    ("4", "#### 4"),
    ("#### 3 #### 4", "#### 4"),
    ("#### 4 #### 3", "#### 4"),
    ("#### 4 ####", "#### 4"),
    ("##### 4", "#### 4"),
    ("######## 4", "4"),
    ("x #####4", "4"),
    ("### 4", "#### 4"),
    ("####4", "#### 4"),
    ("#### 4\nand then I go on", "#### 4"),
    ("# # # # 4", "4"),
    # Full stops.
    ("#### 4.", "#### 4"),
    ("#### 4..", "#### 4"),
    ("#### 4 .", "#### 4"),
    ("#### B.", "#### B"),
    ("#### B..", "#### B"),
    ("#### B .", "#### B"),
    ("#### .B", "#### B"),
    ("#### B.\n", "#### b"),
    ("#### B。", "#### B"),
    # Case and white space.
    ("#### b", "#### B"),
    ("####   Paris  \n", "#### paris"),
    ("#### New  York", "#### New York"),
    ("#### new york", "#### NEW YORK"),
    ("#### \u00a0B\u2003", "#### B"),
    ("#### \x1cB\x1f", "#### B"),
    ("#### B\u200b", "#### B"),
    ("#### ÄÖÜ é", "#### äöü É"),
    ("#### ΣΑΣ", "#### σας"),
    ("#### İ", "#### i"),
    ("#### İ", "#### i\u0307"),
    ("#### straße", "#### STRASSE"),
    ("#### 東京", "#### 東京"),
    ("#### e\u0301", "#### \u00e9"),
    ("#### (B)", "#### B"),
    ("#### B)", "#### B"),
    # Numbers.
    ("#### 18.0", "#### 18"),
    ("#### 1,234", "#### 1234"),
    ("#### 1,2,3,4", "#### 1234"),
    ("#### 1, 234", "#### 1234"),
    ("#### ,", "#### "),
    ("#### $5", "#### 5"),
    ("#### 5$", "#### 5"),
    ("#### $ 5", "#### 5"),
    ("#### -$5", "#### $-5"),
    ("#### - 5", "#### -5"),
    ("#### 50%", "#### 50"),
    ("#### 50 %", "#### 50"),
    ("#### 50%", "#### 0.5"),
    ("#### $1,234.50.", "#### 1234.5"),
    ("#### 5 dollars", "#### 5"),
    ("#### 5 dollars", "#### 5 DOLLARS"),
    ("#### €5", "#### 5"),
    ("#### five", "#### 5"),
    ("#### +5", "#### 5"),
    ("#### ++5", "#### 5"),
    ("#### -5", "#### 5"),
    ("#### −5", "#### -5"),
    ("#### .5", "#### 0.5"),
    ("#### 5.", "#### 5"),
    ("#### 5..", "#### 5."),
    ("#### 1e5", "#### 100000"),
    ("#### 1E+5", "#### 100,000"),
    ("#### 1e-2", "#### 0.01"),
    ("#### e5", "#### 5"),
    ("#### 1e", "#### 1"),
    ("#### 1_000", "#### 1000"),
    ("#### 1_000", "#### 1_000"),
    ("#### 0x10", "#### 16"),
    ("#### 1/2", "#### 0.5"),
    ("#### 3:30", "#### 3:30"),
    ("#### 1 000", "#### 1000"),
    ("#### 007", "#### 7"),
    ("#### -0", "#### 0"),
    ("#### 0.00001", "#### 0"),
    ("#### 0", "#### 0.00001"),
    ("#### ١٢", "#### 12"),
    ("#### ４２", "#### 42"),
    ("#### ²", "#### 2"),
    ("#### inf", "#### inf"),
    ("#### inf", "#### infinity"),
    ("#### inf", "#### -inf"),
    ("#### Infinity", "#### INFINITY"),
    ("#### nan", "#### nan"),
    ("#### nan", "#### NaN"),
    ("#### nan", "#### 1"),
    ("#### 1e999", "#### inf"),
    ("#### 1e999", "#### 1e998"),
    ("#### 1e999", "#### 1E999"),
    ("#### 1e-999", "#### 0"),
    ("#### " + "9" * 400, "#### " + "9" * 400),
    ("#### 0." + "3" * 300, "#### 0.33333333"),
    # Close and not close.
    ("#### 100.009", "#### 100"),
    ("#### 100.011", "#### 100"),
    ("#### 99.991", "#### 100"),
    ("#### 99.989", "#### 100"),
    ("#### 3.1416", "#### 3.14159265"),
    ("#### 3.14", "#### 3.14159265"),
    ("#### -33.3333", "#### -33.333"),
    # Summaries.
    ("the the the the", "the cat sat on the mat"),
    ("a " * 200, "a"),
    ("Don't stop!", "dont stop"),
    ("don't", "don t"),
    ("naïve café", "na ve caf"),
    ("re-opening re_opening", "re opening"),
    ("line\none\r\nline two", "line one line two"),
    ("İstanbul", "i stanbul"),
    ("\u212aelvin \u212bngstrom", "kelvin angstrom"),
    ("\ufb01ne", "fine"),
    ("emoji 😀 here", "emoji here"),
    ("日本語 only", "only"),
    ("generalizations oscillators", "generalization oscillator"),
    ("skies sky news innings", "sky new inning"),
    ("x y z", "X Y Z"),
    ("aaa aaaa", "aaaa aaa"),
    ("its it's its'", "it's"),
    (" ".join(SENTENCES), SENTENCES[3]),
    (" ".join(SENTENCES * 6), " ".join(reversed(SENTENCES * 4))),
]


def parsed(text):
    """The exact value of a decimal number; None for anything else, or what a double cannot hold."""
    text = re.sub("[,$%]", "", text).strip()
    if not NUMBER.fullmatch(text):
        return None
    value = float(text)
    return Fraction(value) if abs(value) != float("inf") else None


def extracted(text):
    """What follows the last mark, trimmed, without one final full stop."""
    found = text.rpartition("####")[2].strip()
    return found[:-1] if found[-1:] == "." else found


def is_match(prediction, reference):
    """Exact match by the rules."""
    a, b = extracted(prediction), extracted(reference)
    x, y = parsed(a), parsed(b)
    if x is not None and y is not None:
        return abs(x - y) * 10000 <= max(abs(x), abs(y))
    return a.lower() == b.lower()


def random_pair(rng):
    """A reference, and a prediction that resembles it more or less."""
    pieces = ["####", "#### ", "$", "%", ",", ".", "\n", " ", "'", "é", "İ", "-", "1", "2.50", "1,000", "B", "b", "the"]
    kind = rng.randrange(4)
    if kind == 0:  # soup
        return tuple("".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(2))
    if kind == 1:  # numbers written differently
        value = rng.choice([rng.randrange(10**rng.randrange(1, 8)), round(rng.uniform(-500, 500), rng.randrange(4))])
        forms = [f"{value}", f"{value:,}", f"${value:,}", f"{value}%", f"{value:.1f}", f"{value}.", f" {value} ", f"{value:e}"]
        forms += [f"{value * 1.00009}", f"{value * 1.00011}"]
        words = " ".join(rng.choices("so we get the total of".split(), k=rng.randrange(6)))
        return f"{words}\n#### {rng.choice(forms)}", f"#### {rng.choice(forms)}"
    words = rng.choice(SENTENCES).split()
    if kind == 2:  # the same summary, shortened, repeated and shuffled
        other = rng.choices(words, k=rng.randrange(1, 25))
        return " ".join(other), " ".join(words)
    other = [w.upper() if rng.random() < 0.2 else w for w in words] + rng.choice(SENTENCES).split()
    return rng.choice([" ", "\n", "  ", ", "]).join(other), " ".join(words)


def documentation_words():
    """Distinct words of Python's documentation, a sample with a fixed seed."""
    words = set(re.findall("[a-z]+", " ".join(topics.topics.values()).lower()))
    return sorted(random.Random(20).sample(sorted(words), min(DOCUMENTATION_WORDS, len(words))))


def synthetic_words():
    """Pronounceable nonsense with every suffix that a rule looks at."""
    suffixes = """ s ss sses ies ied eed ed ing y ly ational tional enci anci izer bli abli alli entli eli ousli
    ization ation ator alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical
    ful ness al ance ence er ic able ible ant ement ment ent sion tion ion ou ism ate iti ous ive ize e ll le
    ally logy fully ability bly ently ously ationally ings eeds ers""".split()
    rng = random.Random(21)
    words = set()
    while len(words) < SYNTHETIC_WORDS:
        syllables = rng.choices(["", "b", "st", "y", "l", "sk", "w", "ay", "oe", "ll", "tz", "x", "1", "at", "bl", "iz", "u"], k=3)
        words.add("".join(syllables) + rng.choice(["", rng.choice("aeiouy")]) + rng.choice(suffixes))
    return sorted(words - {""})


def make_metrics(root):
    """Writes cases.json and stems.txt below `root`/metrics."""
    folder = root / "metrics"
    folder.mkdir(parents=True)
    rng = random.Random(22)
    pairs = CASES + [random_pair(rng) for _ in range(RANDOM_CASES)]
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    cases = [
        {
            "prediction": prediction,
            "reference": reference,
            "rouge1": float(scorer.score(reference, prediction)["rouge1"].fmeasure),
            "exact_match": is_match(prediction, reference),
        }
        for prediction, reference in pairs
    ]
    matches = sum(case["exact_match"] for case in cases)
    partial = sum(0 < case["rouge1"] < 1 for case in cases)
    assert min(matches, len(cases) - matches, partial) > 90, (len(cases), matches, partial)
    write_json(folder / "cases.json", cases)
    stemmer = PorterStemmer()
    words = sorted(set(documentation_words() + synthetic_words()))
    (folder / "stems.txt").write_text("".join(f"{word} {stemmer.stem(word)}\n" for word in words))
