"""Training samples for the demo model: plain stories and chats about stories, as lists of turns.

``make_sample`` is the one to read first: it decides what share of the text is of which shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo_lexicon import FEMALE_NAMES, LANDS, MALE_NAMES, PLAIN_THINGS, THINGS
from demo_plots import PLOTS
from demo_stories import Story, made_up_word, make_cast, make_kind, make_story

Turn = tuple[str, str]
"""Role ("system", "user" or "assistant") and content."""


@dataclass(frozen=True)
class Sample:
    """One training sample: either plain text, or the turns of a chat."""

    text: str = ""
    turns: tuple[Turn, ...] = ()


SYSTEM_PROMPTS = (
    "You are a storyteller.",
    "You are a helpful assistant.",
    "You tell little stories.",
    "You are a friendly storyteller for children.",
    "Answer the user.",
    "You are a helpful assistant who tells short stories.",
)
REQUESTS = (
    "Tell me a story about {topic}.",
    "Tell me a story about {topic}.",
    "Tell me a story about {topic}",
    "tell me a story about {topic}",
    "Please tell me a story about {topic}.",
    "Can you tell me a story about {topic}?",
    "Could you tell a story about {topic}?",
    "Write a story about {topic}.",
    "Write me a story about {topic}, please.",
    "I would like to hear a story about {topic}.",
    "I want a story about {topic}!",
    "Do you know a story about {topic}?",
    "A story about {topic}, please.",
    "Story about {topic}",
    "Tell me about {topic}.",
    "Tell us a bedtime story about {topic}.",
    "Make up a story about {topic}.",
)
SHORT_REQUESTS = (
    "Tell me a short story about {topic}.",
    "Tell me a very short story about {topic}.",
    "Write a short story about {topic}.",
    "A short story about {topic}, please.",
    "Tell me a story about {topic} in a few sentences.",
    "Make it short: a story about {topic}.",
)
OPEN_REQUESTS = (
    "Tell me a story.",
    "Tell me a story",
    "tell me a story",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Please write a story.",
    "A story, please!",
    "Tell me something.",
    "Tell me a bedtime story.",
)
MORE_REQUESTS = ("Another one, please.", "Tell me another story.", "One more!", "And another one?", "More, please.")
MORE_ABOUT_REQUESTS = (
    "Now one about {topic}.",
    "And now a story about {topic}, please.",
    "Another one, but about {topic}.",
    "Tell me one about {topic} too.",
)
# Small talk: what was said, and what may be answered.
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good evening."),
        (
            "Hello! I tell little stories. What should the next one be about?",
            "Hello! Would you like to hear a story? Tell me who should be in it.",
        ),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Are you a person?", "Who made you?"),
        (
            "I am a very small language model, and all I know is little stories.",
            "I am a small model that tells stories. I was made to show that everything works.",
        ),
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What do you know?", "What is this?"),
        (
            "I can tell you a story. Try: tell me a story about a fox and a kite.",
            "I tell little stories about animals, people and things. Just say who should be in it.",
        ),
    ),
    (
        ("Thank you", "Thank you!", "Thanks!", "Thanks", "That was nice.", "What a nice story!", "I liked that."),
        (
            "You are welcome! Come back when you want another one.",
            "I am glad that you liked it. Shall I tell you another one?",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?"),
        ("I am well, thank you. I have just thought of a new story.", "Very well! It is a good day for a story."),
    ),
    (
        (
            "What is the capital of France?",
            "What is two plus two?",
            "Write a program in Python.",
            "Explain how a computer works.",
            "What is the weather today?",
            "Why is the sky blue?",
            "Translate this into German.",
            "Who won the match?",
            "How do I cook rice?",
            "What is the meaning of life?",
        ),
        (
            "I am sorry, I do not know that. I only know little stories. Shall I tell you one?",
            "That is too hard for me. I am a small model, and I can only tell stories.",
        ),
    ),
    (
        ("Goodbye", "Goodbye!", "Bye!", "Good night!", "See you tomorrow."),
        ("Goodbye! Sleep well, and dream of good stories.", "Goodbye! The stories will wait for you."),
    ),
)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith(("uni", "use")) else f"a {noun}"


def _thing_noun(rng: random.Random) -> str:
    return rng.choice([thing.noun for thing in THINGS] * 2 + PLAIN_THINGS)


def _told(rng: random.Random, short: bool, **fixed: str) -> Story:
    return make_story(rng, make_cast(rng, **fixed), short=short)


def topic_and_story(rng: random.Random, *, short: bool = False) -> tuple[str, Story]:
    """A topic as a request words it ("a fox and a kite"), and a story that is really about it."""

    def kind() -> str:
        return made_up_word(rng) if rng.random() < 0.12 else make_kind(rng)

    def thing() -> str:
        return made_up_word(rng) if rng.random() < 0.12 else _thing_noun(rng)

    shape = rng.choices(
        ("hero", "hero+thing", "hero+other", "named", "thing", "place", "plot", "person"), (26, 26, 14, 8, 8, 6, 7, 5)
    )[0]
    hero = kind()
    if shape == "hero":
        return article(hero), _told(rng, short, hero=hero)
    if shape == "hero+thing":
        noun = thing()
        return f"{article(hero)} and {article(noun)}", _told(rng, short, hero=hero, thing=noun)
    if shape == "hero+other":
        other = kind()
        return f"{article(hero)} and {article(other)}", _told(rng, short, hero=hero, other=other)
    if shape == "named":
        cast = make_cast(rng, hero=hero)
        name = rng.choice(MALE_NAMES if cast.hero.pronouns.subject == "he" else FEMALE_NAMES)
        name = made_up_word(rng).capitalize() if rng.random() < 0.3 else name
        return f"{article(hero)} named {name}", _told(rng, short, hero=hero, hero_name=name)
    if shape == "person":
        boy = rng.random() < 0.5
        name = rng.choice(MALE_NAMES if boy else FEMALE_NAMES)
        return name, _told(rng, short, hero="boy" if boy else "girl", hero_name=name)
    if shape == "thing":
        noun = thing()
        return article(noun), _told(rng, short, thing=noun)
    if shape == "place":
        land = rng.choice(LANDS).topic
        return land, _told(rng, short, land=land)
    plot = rng.choice(PLOTS).topic
    return plot, _told(rng, False, plot=plot)


def _question(rng: random.Random, story: Story) -> tuple[Turn, Turn] | None:
    """A question about the story that its cast can answer."""
    hero, thing = story.cast.hero, story.cast.thing
    choices: list[tuple[str, str]] = []
    if hero.name and hero.name in story.text:
        choices.append((f"What was the name of the {hero.kind}?", f"The {hero.kind} was called {hero.name}."))
        choices.append((f"Who was {hero.name}?", f"{hero.name} was {article(f'{hero.adjective} {hero.kind}')}."))
    if thing.noun in story.text:
        choices.append(("What thing was in the story?", f"There was {article(thing.noun)} in the story."))
    choices.append(
        (
            "Who was the story about?",
            f"It was about {hero.introduction().replace('a ' + hero.adjective, article(hero.adjective), 1)}.",
        )
    )
    question, answer = rng.choice(choices)
    return ("user", question), ("assistant", answer)


def _story_turns(rng: random.Random, more: bool) -> tuple[list[Turn], Story]:
    if rng.random() < 0.18:
        request = rng.choice(MORE_REQUESTS if more else OPEN_REQUESTS)
        story = _told(rng, short=False)
    else:
        short = rng.random() < 0.15
        topic, story = topic_and_story(rng, short=short)
        forms = SHORT_REQUESTS if short else MORE_ABOUT_REQUESTS if more and rng.random() < 0.6 else REQUESTS
        request = rng.choice(forms).format(topic=topic)
    return [("user", request), ("assistant", story.text)], story


def make_chat(rng: random.Random, *, stories: int = 1) -> Sample:
    """A chat with this many stories in it, small talk around them and questions after them."""
    turns: list[Turn] = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.25 else []
    if stories == 0 or rng.random() < 0.04:
        said, answers = rng.choice(SMALL_TALK)
        turns += [("user", rng.choice(said)), ("assistant", rng.choice(answers))]
    for index in range(stories):
        new, story = _story_turns(rng, more=index > 0)
        turns += new
        if rng.random() < 0.15:
            turns += _question(rng, story) or ()
    return Sample(turns=tuple(turns))


def make_plain(rng: random.Random) -> Sample:
    """A story as plain text, the way a completion prompt goes on."""
    return Sample(text=_told(rng, short=rng.random() < 0.05).text)


_SHAPES: tuple[tuple[float, Callable[[random.Random], Sample]], ...] = (
    (0.42, make_plain),
    (0.46, lambda rng: make_chat(rng)),
    (0.05, lambda rng: make_chat(rng, stories=0)),
    (0.07, lambda rng: make_chat(rng, stories=rng.randint(2, 4))),
)


def make_sample(rng: random.Random) -> Sample:
    """One sample in the mix that the demo model is trained on."""
    return rng.choices([make for _, make in _SHAPES], weights=[share for share, _ in _SHAPES])[0](rng)
