"""Tiny stories from a grammar: the text that the demo model is trained on.

A story is an opening, a trait, a plot told beat by beat and an ending; names, pronouns, things and places stay the same
all through it. Everything is drawn from the ``random.Random`` that the caller passes, so a seed fixes the text.
Read ``make_story`` first; ``demo_plots`` holds the sentences and ``demo_lexicon`` the words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from demo_lexicon import (
    ANIMALS,
    CREATURES,
    FEMALE_NAMES,
    HE,
    IT,
    LANDS,
    MACHINE_NAMES,
    MACHINES,
    MALE_NAMES,
    MEN,
    OTHER_ADJECTIVES,
    PLAIN_THINGS,
    PLAIN_USES,
    SHE,
    SYLLABLES,
    THING_ADJECTIVES,
    THINGS,
    TRAITS,
    WOMEN,
    WORD_ENDINGS,
    Land,
    Pronouns,
    Thing,
)
from demo_plot import Plot
from demo_plots import DAYS, FEARS, NAMED_OPENINGS, OPENINGS, PLOTS, SHORT_PLOTS, SKILLS, UNNAMED_OPENINGS

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
# "a" before a vowel sound; the look-ahead leaves out the vowels that sound like consonants (a unicorn, a useful thing).
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|one\b|Uni|Use|One\b)")
NAMED_SHARE = 0.75


@dataclass(frozen=True)
class Character:
    """Someone in a story. ``name`` is empty for a character who has none."""

    kind: str
    adjective: str
    name: str
    pronouns: Pronouns

    def introduction(self) -> str:
        """The first mention, with an indefinite article: "a little fox named Tom"."""
        noun = f"a {self.adjective} {self.kind}".replace("  ", " ")
        return f"{noun} named {self.name}" if self.name else noun


@dataclass(frozen=True)
class Cast:
    """What a story is made of, fixed before its first word is written."""

    hero: Character
    other: Character
    thing: Thing
    thing_adjective: str
    land: Land
    plot: Plot


@dataclass(frozen=True)
class Story:
    """A finished story and what it is about, for the questions asked about it."""

    text: str
    cast: Cast


def made_up_word(rng: random.Random) -> str:
    """A word that does not exist, such as "blorrink"."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2)))) + rng.choice(WORD_ENDINGS)


def make_kind(rng: random.Random) -> str:
    """A kind of character; animals and people are more common than creatures and machines."""
    group = rng.choices((ANIMALS, MEN, WOMEN, CREATURES, MACHINES), weights=(54, 12, 12, 13, 9))[0]
    return rng.choice(group)


def make_character(
    rng: random.Random, kind: str, adjectives: Sequence[str], unlike: Character | None = None
) -> Character:
    """A character of this kind, told apart from ``unlike`` by name and, where the kind allows it, by pronoun."""
    if kind in MEN:
        pronouns = HE
    elif kind in WOMEN:
        pronouns = SHE
    elif kind in MACHINES:
        pronouns = IT
    elif unlike is not None and unlike.pronouns is not IT:
        pronouns = SHE if unlike.pronouns is HE else HE
    else:
        pronouns = rng.choice((HE, SHE))
    names = MALE_NAMES if pronouns is HE else FEMALE_NAMES if pronouns is SHE else MACHINE_NAMES
    taken = unlike.name if unlike else ""
    name = rng.choice([name for name in names if name != taken])
    same_kind = unlike is not None and unlike.kind == kind
    if rng.random() > NAMED_SHARE and not same_kind:
        name = ""
    return Character(kind, rng.choice(adjectives), name, pronouns)


def make_thing(rng: random.Random, noun: str = "") -> Thing:
    """The thing with this noun, or any; a noun that the lexicon lacks gets one of the uses that fit everything."""
    if not noun:
        noun = rng.choice([thing.noun for thing in THINGS] * 2 + PLAIN_THINGS)
    for thing in THINGS:
        if thing.noun == noun:
            return thing
    use, used = rng.choice(PLAIN_USES)
    return Thing(noun, use, used)


def make_cast(
    rng: random.Random,
    *,
    hero: str = "",
    hero_name: str = "",
    other: str = "",
    thing: str = "",
    land: str = "",
    plot: str = "",
) -> Cast:
    """Draw a cast; each argument that is given (a kind, a name, a noun or a topic) is kept, the rest is drawn.

    Raises ``StopIteration`` when no land or plot has the topic asked for.
    """
    lead = make_character(rng, hero or make_kind(rng), list(TRAITS))
    if hero_name:
        lead = Character(lead.kind, lead.adjective, hero_name, lead.pronouns)
    second_kind = other or rng.choice(
        [kind for kind in (make_kind(rng) for _ in range(4)) if kind != lead.kind] or ["fox"]
    )
    second = make_character(rng, second_kind, OTHER_ADJECTIVES, unlike=lead)
    the_plot = next(p for p in PLOTS if p.topic == plot) if plot else rng.choice(PLOTS)
    if the_plot.topic == "courage" and lead.adjective == "brave":
        lead = Character(lead.kind, "shy", lead.name, lead.pronouns)
    return Cast(
        hero=lead,
        other=second,
        thing=make_thing(rng, thing),
        thing_adjective=rng.choice(THING_ADJECTIVES),
        land=next(x for x in LANDS if x.topic == land) if land else rng.choice(LANDS),
        plot=the_plot,
    )


class _Writer:
    """Expands templates for one story: choices in brackets first, then slots, then "a" to "an"."""

    def __init__(self, rng: random.Random, cast: Cast) -> None:
        self._rng = rng
        self._cast = cast
        hero, other, thing = cast.hero, cast.other, cast.thing
        spots = rng.sample(cast.land.spots, 3)
        self._slots = {
            "he": hero.pronouns.subject,
            "him": hero.pronouns.object,
            "his": hero.pronouns.possessive,
            "himself": hero.pronouns.reflexive,
            "ohe": other.pronouns.subject,
            "ohim": other.pronouns.object,
            "ohis": other.pronouns.possessive,
            "a_hero": hero.introduction(),
            "a_hero_plain": f"a {hero.adjective} {hero.kind}",
            "hero_adj": hero.adjective,
            "hero_kind": hero.kind,
            "hero_s": f"{hero.name or 'the ' + hero.kind}'s",
            "name": hero.name,
            "a_other": other.introduction(),
            "obj": thing.noun,
            "the_obj": f"the {thing.noun}" if rng.random() < 0.6 else f"the {cast.thing_adjective} {thing.noun}",
            "a_obj": f"a {cast.thing_adjective} {thing.noun}",
            "use": thing.use,
            "used": thing.used,
            "home": rng.choice(cast.land.homes),
            "skill": rng.choice(SKILLS),
            "fear": rng.choice(FEARS),
            "day": rng.choice(DAYS),
        }
        for number, spot in enumerate(spots, start=1):
            self._slots[f"spot{number}"] = spot
            self._slots[f"spot{number}x"] = spot[spot.index("the ") if "the " in spot else spot.index(" ") + 1 :]

    def expand(self, template: str) -> str:
        text = _CHOICE.sub(lambda match: self._rng.choice(match[1].split("|")), template)
        text = _SLOT.sub(lambda match: self._slot(match[1]), text)
        return _ARTICLE.sub(r"\1n ", text)

    def pick(self, beat: Sequence[str]) -> str:
        return self.expand(self._rng.choice(beat))

    def _slot(self, slot: str) -> str:
        key = slot.removesuffix("_cap")
        capital = key[0].isupper()
        key = key[0].lower() + key[1:]
        value = self._mention(key) if key in ("hero", "other") else self._slots[key]
        return value[0].upper() + value[1:] if capital else value

    def _mention(self, role: str) -> str:
        character = self._cast.hero if role == "hero" else self._cast.other
        same_kind = self._cast.hero.kind == self._cast.other.kind
        if character.name and (same_kind or self._rng.random() < 0.8):
            return character.name
        return f"the {character.kind}"


def make_story(rng: random.Random, cast: Cast, *, short: bool = False) -> Story:
    """Write one story of 60 to 250 words (30 to 70 when ``short``) about this cast."""
    writer = _Writer(rng, cast)
    opening = rng.choices((OPENINGS, NAMED_OPENINGS if cast.hero.name else UNNAMED_OPENINGS), weights=(3, 1))[0]
    intro = [writer.pick(opening)]
    if not short and rng.random() < 0.8:
        intro.append(writer.pick(TRAITS[cast.hero.adjective]))
    plot = rng.choice(SHORT_PLOTS) if short else cast.plot
    body = [writer.pick(beat) for beat in plot.beats]
    ending = [writer.pick(plot.endings)]
    paragraphs = [intro, body[:4], body[4:] + ending]
    separator = "\n\n" if rng.random() < 0.6 and not short else " "
    return Story(separator.join(" ".join(part) for part in paragraphs if part), cast)
