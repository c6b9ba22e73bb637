"""What a plot of the demo stories is made of, and beats that many of them share."""

from __future__ import annotations

from dataclasses import dataclass

Beat = tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """A plot: what it is about, its beats in order, and how it may end (one ending is chosen)."""

    topic: str
    beats: tuple[Beat, ...]
    endings: Beat


MEET: Beat = (
    "[On the way|Just then|After a while|Soon], {he} met {a_other}.",
    "[On the way|Just then|Before long], {a_other} came along.",
    "{Spot2} sat {a_other}.",
    "That was when {he} saw {a_other}, sitting {spot2}.",
)
FRIENDS_ENDING: Beat = (
    "From that day on, {hero} and {other} were the best of friends.",
    "After that, {other} came to visit every [week|Sunday|evening], and {hero} always had [tea|soup|warm bread|pancakes] ready.",
    "And whenever [it rained|the wind blew|the stars came out], the two friends remembered that [day|adventure] and laughed.",
    "They walked home together under the [first stars|pink sky|round moon], and neither of them felt alone any more.",
)
