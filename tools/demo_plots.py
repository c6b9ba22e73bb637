"""The plots of the demo stories: for each beat of a plot, several ways to tell it.

Templates choose among ``[one|two]`` and fill ``{slots}``; ``demo_stories`` expands both. Every plot uses the same
three parts, so that a story about any two of them can be asked for: {hero}, {other} and {obj}.

Slots: {hero} {a_hero} and {he} {him} {his} {himself}; {other} {a_other} and {ohe} {ohim} {ohis}; {obj} {the_obj} {a_obj}
{use} {used}; {home} {spot1} {spot2} {spot3}; {day}. A capital first letter ({He}) gives a capital first letter.
"""

from __future__ import annotations

from demo_plot import Beat, Plot
from demo_plots_neighbours import NEIGHBOURS
from demo_plots_trials import TRIALS
from demo_plots_wonders import WONDERS

PLOTS = (*NEIGHBOURS, *TRIALS, *WONDERS)
"""Their order decides which stories a seed draws, and so the text that the demo model is trained on."""

# For stories of a few sentences.
SHORT_PLOTS = (
    Plot(
        "a find",
        (("One {day}, {he} found {a_obj} {spot1}.",), ('"Whose is this?" {he} asked. "It is mine," said {a_other}.',)),
        ("So {he} gave it back, and they {used} together.", "{Hero} gave it back and got a new friend instead."),
    ),
    Plot(
        "a visit",
        (("One {day}, there was a knock at the door. It was {a_other} with {a_obj}.",),),
        (
            "They {used} until the sun went down, and {hero} was happy.",
            '"For you," said {other}, and {hero} did not know what to say.',
        ),
    ),
    Plot(
        "a wish",
        (("{He} wished for {a_obj}, but {he} had no money.",), ("So {he} made one out of wood and string.",)),
        ("Now {he} can {use}, and it is the best {obj} in the land.", "{A_other} saw it and wanted one too."),
    ),
    Plot(
        "rain",
        (("One {day}, it began to rain, and {he} ran to hide {spot1}.",), ("{A_other} was already there.",)),
        ('"There is room for two," said {other}. They stayed until the rain stopped, and longer.',),
    ),
    Plot(
        "sleep",
        (
            ("One night, {he} could not sleep.",),
            ("So {he} went {spot1} and looked at the stars, and there was {a_other}.",),
        ),
        ("They counted the stars together, and at a hundred {hero} was fast asleep.",),
    ),
)

SKILLS = (
    "swim",
    "sing",
    "dance",
    "whistle",
    "climb trees",
    "skate",
    "read",
    "bake bread",
    "juggle",
    "paint",
    "ride a horse",
    "tell jokes",
    "tie knots",
    "write letters",
)
FEARS = ("the dark", "thunder", "deep water", "high places", "loud noises", "the old forest", "the wind")
DAYS = (
    "day",
    "morning",
    "evening",
    "afternoon",
    "spring day",
    "sunny day",
    "cold morning",
    "windy day",
    "rainy afternoon",
    "summer evening",
    "autumn morning",
    "winter day",
)

OPENINGS: Beat = (
    "Once upon a time, there was {a_hero} who lived {home}.",
    "Once upon a time, there was {a_hero} who lived {home}.",
    "Once upon a time, {home}, there lived {a_hero}.",
    "Once upon a time there lived {a_hero}. {He} had a [small|cosy|tidy|crooked] house {home}.",
    "Long ago, {home}, there lived {a_hero}.",
    "Long, long ago, there was {a_hero} who lived {home}.",
    "There was once {a_hero} who lived {home}.",
    "Far away, {home}, lived {a_hero}.",
    "{Home_cap}, there lived {a_hero}.",
    "This is the story of {a_hero} who lived {home}.",
    "Not so long ago, {a_hero} lived {home}.",
    "One day, {a_hero} moved into a small house {home}.",
)
# Openings whose subject is already "the fox": a prompt such as "The little fox" goes on with these.
NAMED_OPENINGS: Beat = (
    "{Name} was {a_hero_plain} who lived {home}.",
    "The {hero_adj} {hero_kind} lived {home}. {His} name was {name}.",
    "The {hero_adj} {hero_kind} was called {name}, and {he} lived {home}.",
    "{Name} the {hero_kind} lived {home}.",
)
UNNAMED_OPENINGS: Beat = (
    "The {hero_adj} {hero_kind} lived {home}.",
    "The {hero_adj} {hero_kind} had a small house {home}.",
    "A {hero_adj} {hero_kind} lived {home}.",
)
