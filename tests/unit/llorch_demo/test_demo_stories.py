"""The grammar that writes the demo model's training text."""

import random
import re

import demo_chat
import demo_lexicon
import demo_plots
import demo_stories
import pytest


def stories(seed: int, count: int) -> list[demo_stories.Story]:
    rng = random.Random(seed)
    return [demo_stories.make_story(rng, demo_stories.make_cast(rng)) for _ in range(count)]


def test_a_seed_fixes_the_text() -> None:
    def texts(seed: int) -> list[demo_chat.Sample]:
        rng = random.Random(seed)
        return [demo_chat.make_sample(rng) for _ in range(50)]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_stories_are_distinct() -> None:
    assert len({story.text for story in stories(1, 2000)}) == 2000


def test_every_template_expands_to_clean_sentences() -> None:
    for story in stories(2, 3000):
        assert not re.search(r"[{}\[\]|]|  |\b[Aa] [aeio]|\b[Aa]n [^aeiouAEIOU]", story.text), story.text
        assert story.text[0].isupper()
        assert story.text[-1] in '."!?'
        assert not re.search(r"[.!?] [a-z]", story.text), story.text
        assert story.text.count('"') % 2 == 0
        assert 50 < len(story.text.split()) < 260


def test_the_cast_stays_the_same_through_a_story() -> None:
    names = {*demo_lexicon.MALE_NAMES, *demo_lexicon.FEMALE_NAMES, *demo_lexicon.MACHINE_NAMES}
    for story in stories(5, 500):
        cast = {story.cast.hero.name, story.cast.other.name}
        found = set(re.findall(r"\b[A-Z]\w+", story.text)) & names
        assert found <= cast, story.text


@pytest.mark.parametrize("short", [False, True])
def test_a_story_is_about_what_was_asked_for(short: bool) -> None:
    rng = random.Random(6)
    for _ in range(300):
        cast = demo_stories.make_cast(rng, hero="robot", thing="kite")
        text = demo_stories.make_story(rng, cast, short=short).text
        assert "robot" in text
        if not short:
            assert "kite" in text, text


def test_every_plot_has_all_three_parts() -> None:
    rng = random.Random(7)
    for plot in demo_plots.PLOTS:
        for _ in range(40):
            cast = demo_stories.make_cast(rng, hero="fox", other="giant", thing="lantern", plot=plot.topic)
            text = demo_stories.make_story(rng, cast).text
            assert "lantern" in text and ("giant" in text or cast.other.name in text), (plot.topic, text)


def test_chats_alternate_and_answer() -> None:
    rng = random.Random(8)
    for _ in range(500):
        turns = demo_chat.make_chat(rng, stories=rng.randint(0, 3)).turns
        roles = [role for role, _ in turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(content.strip() == content and content for _, content in turns)
