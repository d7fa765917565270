"""A labelled corpus made from scratch: six topics, graded difficulty, the same rows for the same seed.

It exists to show early exit without downloading anything, so its rows differ in what it takes to answer them:

    plain       one topic, several words that give it away
    mixed       one topic tells the story, a second one is mentioned in passing
    contrast    two topics carry equal weight; only the grammar says which one counts ("about X rather than Y")
    reference   two topics, and one must be followed to a later word ("the first of the two", "neither ... nor")
    coin_toss   two topics with nothing to choose between them; the label is random, so no model gets all of these

The label of a row is the topic that counts. Bags of words settle the first grade, most of the second, and no other.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.data.files import write_text

DIFFICULTIES = ("plain", "mixed", "contrast", "reference", "coin_toss")
SHARES = {"plain": 0.46, "mixed": 0.24, "contrast": 0.17, "reference": 0.10, "coin_toss": 0.03}
SPLIT_ROWS = {"train": 8000, "dev": 400, "test": 1200}


@dataclass(frozen=True)
class Example:
    """One row of the corpus."""

    text: str
    label: str
    difficulty: str


@dataclass(frozen=True)
class Topic:
    """The words of one class: who acts, what they do to which thing, where, and what the subject is called."""

    people: tuple[str, ...]
    actions: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]
    subjects: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "cooking": Topic(
        people=("the pastry chef", "a line cook", "the baker", "our grandmother", "the canteen cook", "a kitchen hand"),
        actions=("tasted", "salted", "warmed up", "dished out", "burned the bottom of", "wrote down a recipe for"),
        things=(
            "the onion soup", "the rye dough", "a lamb stew", "the lemon custard", "the fish broth", "a tray of scones",
            "the mushroom risotto", "the pickled cabbage", "the caramel sauce", "a pot of lentils",
        ),
        places=("at the stove", "in the crowded kitchen", "next to the oven", "between two courses", "before supper"),
        subjects=("braising meat", "baking bread", "peeling potatoes", "making jam", "seasoning soups", "frying fish"),
    ),
    "gardening": Topic(
        people=("the head gardener", "a nursery owner", "the allotment tenant", "our groundskeeper", "the rose grower",
                "a tree surgeon"),
        actions=("pruned", "watered", "transplanted", "mulched around", "tied up", "found greenfly on"),
        things=(
            "the climbing roses", "the tomato seedlings", "a young pear tree", "the lavender hedge", "the dahlias",
            "a bed of tulips", "the runner beans", "the overgrown ivy", "the raspberry canes", "two rows of leeks",
        ),
        places=("behind the greenhouse", "along the gravel path", "beside the compost heap", "before the first frost",
                "in the flower beds"),
        subjects=("pruning shrubs", "sowing lettuce", "weeding borders", "composting leaves", "growing tulips",
                  "grafting apple trees"),
    ),
    "astronomy": Topic(
        people=("the observatory director", "a comet hunter", "the planetary scientist", "our telescope operator",
                "an amateur stargazer", "the astrophysicist"),
        actions=("photographed", "measured the brightness of", "tracked", "took a spectrum of", "lost sight of",
                 "worked out the orbit of"),
        things=(
            "a distant galaxy", "the ringed planet", "the faint comet", "a pair of binary stars", "the lunar craters",
            "a dying supernova", "the new asteroid", "the moons of Jupiter", "a spiral nebula", "the eclipsed sun",
        ),
        places=("under a moonless sky", "from the mountain dome", "through the large telescope", "shortly before dawn",
                "during the meteor shower"),
        subjects=("mapping galaxies", "grinding telescope mirrors", "timing pulsars", "watching eclipses",
                  "charting the moon", "counting meteors"),
    ),
    "sailing": Topic(
        people=("the skipper", "a deckhand", "the harbour pilot", "our helmsman", "the lone yachtswoman",
                "a boatbuilder"),
        actions=("steered", "moored", "scraped the hull of", "raised the sails of", "ran aground with", "bailed out"),
        things=(
            "the old ketch", "a racing dinghy", "the wooden cutter", "the catamaran", "a leaking sloop",
            "the pilot boat", "the two-masted schooner", "the hired yacht", "a flat-bottomed barge",
            "the training ship",
        ),
        places=("off the headland", "against the tide", "in a rising gale", "beyond the harbour wall",
                "close to the lighthouse"),
        subjects=("tying knots on deck", "reading tide tables", "mending sails", "anchoring in shallow bays",
                  "racing yachts", "crossing the ocean under sail"),
    ),
    "medicine": Topic(
        people=("the ward sister", "a young surgeon", "the family doctor", "our night nurse", "the physiotherapist",
                "an eye specialist"),
        actions=("examined", "bandaged", "prescribed tablets for", "ordered an X-ray of", "numbed", "operated on"),
        things=(
            "the swollen ankle", "a broken wrist", "the feverish child", "the infected wound", "a slipped disc",
            "the inflamed tonsils", "the patient with pneumonia", "a cracked rib", "the blocked artery",
            "the torn ligament",
        ),
        places=("in the emergency room", "on the third ward", "during the morning clinic", "after the blood test",
                "in the operating theatre"),
        subjects=("setting broken bones", "treating fevers", "vaccinating children", "taking blood samples",
                  "nursing the sick", "healing burns"),
    ),
    "music": Topic(
        people=("the first violinist", "a choir leader", "the jazz drummer", "our piano teacher", "the young soprano",
                "a church organist"),
        actions=("rehearsed", "sang along to", "transposed", "recorded", "hummed", "lost the rhythm of"),
        things=(
            "the slow sonata", "a string quartet", "the closing chorus", "the saxophone solo", "an old lullaby",
            "the wedding march", "the opening aria", "a cello suite", "the brass fanfare", "the second symphony",
        ),
        places=("in the concert hall", "without a conductor", "in the wrong key", "at half the tempo",
                "on the rehearsal stage"),
        subjects=("tuning violins", "reading sheet music", "singing in harmony", "composing operas",
                  "practising scales", "conducting orchestras"),
    ),
}  # fmt: skip

LABELS = tuple(TOPICS)

_TIMES = ("On Monday", "Last winter", "One afternoon", "Early in the week", "After the holidays", "As usual",
          "To everyone's surprise", "For the third time", "That evening", "Once again")  # fmt: skip
_REMARKS = ("and nobody complained", "which took longer than planned", "and wrote a short note afterwards",
            "while two visitors looked on", "with more patience than luck", "and was quite pleased with it",
            "though the result was hard to judge", "and promised to do it again")  # fmt: skip
_MEDIA = ("talk", "leaflet", "evening class", "podcast", "chapter", "exhibition", "workshop", "long letter", "column",
          "radio programme", "handbook", "weekend course")  # fmt: skip
_SPEAKERS = ("Marta", "Mr Okafor", "the librarian", "Ines", "my neighbour", "the editor", "Yusuf", "the new intern",
             "Professor Lindqvist", "the twins")  # fmt: skip

_CONTRASTS = (
    "{time}, {speaker} gave a {medium} on {yes} rather than on {no}.",
    "{time}, {speaker} gave a {medium} not on {no} but on {yes}.",
    "{time}, {speaker} gave a {medium} on {yes}, not on {no}.",
    "Instead of {no}, the {medium} by {speaker} deals with {yes}.",
    "The {medium} was announced as one on {no}, but {speaker} made it one on {yes}.",
    "The {medium} turned out to be on {yes}, although {speaker} had announced {no}.",
    "{time}, {speaker} threw away the {medium} on {no} and kept the one on {yes}.",
    "{time}, {speaker} kept the {medium} on {yes} and threw away the one on {no}.",
    "Nothing in the {medium} concerns {no}; according to {speaker}, every part of it concerns {yes}.",
    "According to {speaker}, every part of the {medium} concerns {yes}; nothing in it concerns {no}.",
    "{time}, {speaker} lost all interest in {no} and took up {yes}.",
    "{time}, {speaker} took up {yes}, having lost all interest in {no}.",
)

_REFERENCES_FIRST = (
    "There was one {medium} on {first} and another on {second}; {speaker} chose the former.",
    "{time}, {speaker} was offered {first} and {second}, in this order, and picked the first.",
    "Two parcels came, one with a book on {first} and then one with a book on {second}; {speaker} opened only "
    "the earlier one.",
    "In dry weather the {medium} was to be on {first}, in wet weather on {second}; it stayed dry for {speaker}.",
    "{speaker} had never said that the {medium} was not on {first}; that there was none on {second} was plain.",
)
_REFERENCES_SECOND = (
    "There was one {medium} on {first} and another on {second}; {speaker} chose the latter.",
    "{time}, {speaker} was offered {first} and {second}, in this order, and picked the second.",
    "Two parcels came, one with a book on {first} and then one with a book on {second}; {speaker} opened only "
    "the later one.",
    "In dry weather the {medium} was to be on {first}, in wet weather on {second}; it poured for {speaker}.",
    "{speaker} had never said that the {medium} was on {first}; that there was one on {second} was plain.",
)

_TIES = (
    "{time}, {speaker} gave a {medium} on {first} and on {second}.",
    "The {medium} by {speaker} is half on {first} and half on {second}.",
    "{time}, {speaker} read as much about {first} as about {second}.",
)


def generate(rows: int, seed: int = 7, exclude: set[str] | None = None) -> list[Example]:
    """`rows` distinct examples, shuffled, every topic and every difficulty in its share.

    Args:
        rows: how many.
        seed: the same seed gives the same rows on every machine.
        exclude: texts that must not occur; the texts made here are added to it.

    Raises:
        ValueError: `rows` is not positive, or so large that the grammar runs out of sentences.
    """
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    # a string seed is hashed the same way by every Python version
    rng = random.Random(f"fastkd-corpus-{seed}")
    seen = set() if exclude is None else exclude
    examples = []
    for number, difficulty in enumerate(_difficulties(rows)):
        examples.append(_distinct(rng, LABELS[number % len(LABELS)], difficulty, seen))
    rng.shuffle(examples)
    return examples


def write_corpus(
    folder: str | os.PathLike[str], *, seed: int = 7, rows: dict[str, int] | None = None
) -> dict[str, Path]:
    """Write `train.tsv`, `dev.tsv`, `test.tsv` (label, text_a) and `difficulty.tsv` (split, row, difficulty).

    No text occurs in two splits. Rows are numbered from 0 in `difficulty.tsv`, which is written last.

    Args:
        folder: made if missing.
        seed: of `generate`.
        rows: rows of each split, `SPLIT_ROWS` by default.

    Returns:
        The path of each split and of "difficulty".
    """
    target = Path(folder)
    seen: set[str] = set()
    paths: dict[str, Path] = {}
    grades = ["split\trow\tdifficulty"]
    for number, (split, count) in enumerate((rows or SPLIT_ROWS).items()):
        examples = generate(count, seed=seed * 1000 + number, exclude=seen)
        paths[split] = target / f"{split}.tsv"
        write_text(paths[split], "label\ttext_a\n" + "".join(f"{row.label}\t{row.text}\n" for row in examples))
        grades += [f"{split}\t{row}\t{example.difficulty}" for row, example in enumerate(examples)]
    paths["difficulty"] = target / "difficulty.tsv"
    write_text(paths["difficulty"], "\n".join(grades) + "\n")
    return paths


def read_difficulty(folder: str | os.PathLike[str], split: str = "test") -> list[str] | None:
    """The difficulty of each row of one split, in order; None where the folder has no `difficulty.tsv`."""
    path = Path(folder) / "difficulty.tsv"
    if not path.exists():
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [difficulty for name, _, difficulty in rows if name == split]


def _difficulties(rows: int) -> list[str]:
    """Each grade in its share of `rows`, largest remainders first, so that the counts add up."""
    counts = Counter({name: int(share * rows) for name, share in SHARES.items()})
    by_remainder = sorted(SHARES, key=lambda name: counts[name] - SHARES[name] * rows)
    for name in by_remainder[: rows - counts.total()]:
        counts[name] += 1
    return [name for name in DIFFICULTIES for _ in range(counts[name])]


def _distinct(rng: random.Random, label: str, difficulty: str, seen: set[str]) -> Example:
    for _ in range(1000):
        text = _WRITERS[difficulty](rng, label)
        if text not in seen:
            seen.add(text)
            return Example(text, label, difficulty)
    raise ValueError(f"rows: the corpus has no more distinct {difficulty!r} sentences on {label!r}; ask for fewer rows")


def _statement(rng: random.Random, topic: Topic) -> str:
    return f"{rng.choice(topic.people)} {rng.choice(topic.actions)} {rng.choice(topic.things)}"


def _other(rng: random.Random, label: str) -> Topic:
    return TOPICS[rng.choice([name for name in LABELS if name != label])]


def _plain(rng: random.Random, label: str) -> str:
    topic = TOPICS[label]
    ending = rng.choice([f" {rng.choice(topic.places)}", "", f" {rng.choice(topic.places)}, {rng.choice(_REMARKS)}"])
    return f"{rng.choice(_TIMES)}, {_statement(rng, topic)}{ending}."


def _mixed(rng: random.Random, label: str) -> str:
    topic, other = TOPICS[label], _other(rng, label)
    aside = rng.choice(
        [
            f"While someone talked of {rng.choice(other.subjects)}, {_statement(rng, topic)}.",
            f"{_capital(_statement(rng, topic))}, and only later mentioned {rng.choice(other.things)}.",
            f"{_capital(rng.choice(other.people))} watched as {_statement(rng, topic)} {rng.choice(topic.places)}.",
            f"{_capital(_statement(rng, topic))} for {rng.choice(other.people)}, {rng.choice(_REMARKS)}.",
            f"Though better known for {rng.choice(other.subjects)}, {rng.choice(_SPEAKERS)} had to help when "
            f"{_statement(rng, topic)}.",
        ]
    )
    return aside


def _contrast(rng: random.Random, label: str) -> str:
    return _fill(rng, rng.choice(_CONTRASTS), yes=_about(rng, TOPICS[label]), no=_about(rng, _other(rng, label)))


def _reference(rng: random.Random, label: str) -> str:
    right, wrong = _about(rng, TOPICS[label]), _about(rng, _other(rng, label))
    if rng.random() < 0.5:
        return _fill(rng, rng.choice(_REFERENCES_FIRST), first=right, second=wrong)
    return _fill(rng, rng.choice(_REFERENCES_SECOND), first=wrong, second=right)


def _coin_toss(rng: random.Random, label: str) -> str:
    pair = [_about(rng, TOPICS[label]), _about(rng, _other(rng, label))]
    rng.shuffle(pair)
    return _fill(rng, rng.choice(_TIES), first=pair[0], second=pair[1])


def _about(rng: random.Random, topic: Topic) -> str:
    return rng.choice(topic.subjects + topic.things)


def _fill(rng: random.Random, template: str, **topics: str) -> str:
    words = {"time": _TIMES, "medium": _MEDIA, "speaker": _SPEAKERS}
    return _capital(template.format(**{name: rng.choice(choices) for name, choices in words.items()}, **topics))


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


_WRITERS: dict[str, Callable[[random.Random, str], str]] = {
    "plain": _plain,
    "mixed": _mixed,
    "contrast": _contrast,
    "reference": _reference,
    "coin_toss": _coin_toss,
}


def summary(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """How many rows each label and each difficulty has."""
    return {
        "labels": dict(Counter(example.label for example in examples)),
        "difficulties": dict(Counter(example.difficulty for example in examples)),
    }
