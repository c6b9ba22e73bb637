"""The words the demo stories are made of: characters, names, places, things.

Only data and the small types that carry it; how a story is put together is in ``demo_stories``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pronouns:
    """One set of English pronouns, kept the same for a character through a whole story."""

    subject: str
    object: str
    possessive: str
    reflexive: str


HE = Pronouns("he", "him", "his", "himself")
SHE = Pronouns("she", "her", "her", "herself")
IT = Pronouns("it", "it", "its", "itself")


@dataclass(frozen=True)
class Thing:
    """An object: its noun, what one does with it (after "to") and the same in the past tense."""

    noun: str
    use: str
    used: str


@dataclass(frozen=True)
class Land:
    """A kind of landscape: where one lives in it and the spots that a search leads to."""

    topic: str
    homes: tuple[str, ...]
    spots: tuple[str, ...]


ANIMALS = (
    "fox rabbit bear mouse owl hedgehog squirrel duck frog turtle cat dog lion elephant goat sheep penguin otter badger "
    "beaver crow pony donkey goose swan wolf deer mole snail sparrow robin hen rooster cow pig kitten puppy monkey tiger "
    "giraffe panda koala seal bat lamb parrot raccoon camel zebra hippo bee ladybug butterfly cricket spider"
).split()
MEN = (
    "boy farmer baker sailor king prince knight wizard fisherman shepherd tailor miller grandfather blacksmith".split()
)
WOMEN = "girl queen princess witch gardener grandmother painter dancer inventor singer doctor captain teacher".split()
CREATURES = "dragon giant fairy unicorn ghost troll elf snowman dwarf monster".split()
MACHINES = "robot train tractor cloud star scarecrow".split()

MALE_NAMES = (
    "Tom Ben Max Leo Finn Oscar Milo Hugo Otto Sam Jack Theo Felix Bruno Toby Arlo Ned Ravi Kofi Emil Pip Gus Hal Ivan "
    "Karl Levi Nico Olaf Percy Rufus Simon Walt Jonah Amir Diego"
).split()
FEMALE_NAMES = (
    "Mia Lily Nora Ella Ruby Clara Daisy Hazel Ivy Kira Luna Maya Nell Olive Penny Rosa Stella Tilda Una Vera Willa Zoe "
    "Anna Bella Cora Dora Emma Fern Greta Amina Yuki Sofia Matilda"
).split()
MACHINE_NAMES = "Bolt Pixel Beep Dot Ziggy Tink Sprocket Gizmo Nimbus Twinkle Cog Clank Whirr".split()

# What a character is like, and a sentence or two that shows it.
TRAITS: dict[str, tuple[str, ...]] = {
    "little": (
        "{Hero} was so small that {he} could hide behind a flowerpot.",
        "{He} was small, but {he} had big ideas.",
    ),
    "young": ("{He} still had a great deal to learn.", "{Hero} asked a hundred questions a day."),
    "old": ("{His} steps were slow, but {his} eyes were bright.", "{He} knew every path and every stone."),
    "curious": (
        "{Hero} wanted to know [how everything worked|what was behind every hill|why the sky was blue].",
        "{He} looked into every hole and behind every door.",
    ),
    "clever": ("{Hero} could solve any riddle.", "{He} always had a plan, and sometimes two."),
    "shy": (
        "{He} spoke so softly that hardly anyone could hear {him}.",
        "When visitors came, {hero} hid behind the curtain.",
    ),
    "kind": (
        "{Hero} never passed anyone without a friendly word.",
        "{He} always kept a place at the table for a guest.",
    ),
    "cheerful": ("{Hero} sang from morning till night.", "{He} laughed so loudly that the windows shook."),
    "quiet": ("{He} liked to sit and listen to the rain.", "{Hero} could sit still for hours and watch the clouds."),
    "sleepy": ("{He} could fall asleep anywhere, even in a bucket.", "{Hero} yawned more often than {he} spoke."),
    "grumpy": (
        "{He} grumbled about the rain, and {he} grumbled about the sun.",
        "Nobody could remember when {hero} had last smiled.",
    ),
    "hungry": ("{Hero} thought about breakfast even at supper.", "{He} could eat ten pancakes and ask for more."),
    "lonely": ("{He} often wished for someone to talk to.", "In the evenings {hero} talked to the moon."),
    "gentle": ("Even the birds were not afraid of {him}.", "{Hero} never stepped on a flower."),
    "proud": ("{He} liked to be first in everything.", "{Hero} told everyone how wonderful {he} was."),
    "patient": ("{Hero} never hurried and never gave up.", "{He} could wait a whole day for a fish."),
    "careless": ("{He} lost something nearly every day.", "{Hero} never looked where {he} was going."),
    "brave": (
        "{Hero} was always the first to cross a new bridge.",
        "{He} had once chased away a thunderstorm, or so {he} said.",
    ),
}
OTHER_ADJECTIVES = "old wise kind friendly tall tiny busy cheerful gentle merry quiet clever young round polite".split()

THINGS = (
    Thing("kite", "fly it above the hills", "flew it above the hills"),
    Thing("drum", "play it in the yard", "played it in the yard"),
    Thing("flute", "play soft tunes on it", "played soft tunes on it"),
    Thing("lantern", "light it after dark", "lit it after dark"),
    Thing("map", "study it by the fire", "studied it by the fire"),
    Thing("book", "read it under a tree", "read it under a tree"),
    Thing("scarf", "wear it on cold days", "wore it on cold days"),
    Thing("hat", "wear it on Sundays", "wore it on Sundays"),
    Thing("bell", "ring it at noon", "rang it at noon"),
    Thing("boat", "sail it on the pond", "sailed it on the pond"),
    Thing("umbrella", "spin it in the rain", "spun it in the rain"),
    Thing("teapot", "make tea in it", "made tea in it"),
    Thing("mirror", "catch the sunlight with it", "caught the sunlight with it"),
    Thing("shell", "listen to the sea in it", "listened to the sea in it"),
    Thing("clock", "wind it every night", "wound it every night"),
    Thing("whistle", "blow it three times", "blew it three times"),
    Thing("blanket", "curl up under it", "curled up under it"),
    Thing("wagon", "roll down the hill in it", "rolled down the hill in it"),
    Thing("telescope", "look at the stars through it", "looked at the stars through it"),
    Thing("ball", "throw it high into the air", "threw it high into the air"),
    Thing("violin", "play it at sunset", "played it at sunset"),
    Thing("bicycle", "ride it along the lane", "rode it along the lane"),
    Thing("balloon", "watch it dance in the wind", "watched it dance in the wind"),
    Thing("basket", "fill it with berries", "filled it with berries"),
    Thing("candle", "watch its small flame", "watched its small flame"),
    Thing("puppet", "make it dance and bow", "made it dance and bow"),
    Thing("swing", "swing on it until supper", "swung on it until supper"),
    Thing("trumpet", "blow it at sunrise", "blew it at sunrise"),
    Thing("sled", "race down the slope on it", "raced down the slope on it"),
    Thing("paintbrush", "paint birds with it", "painted birds with it"),
    Thing("compass", "follow its needle", "followed its needle"),
    Thing("feather", "tickle the cat with it", "tickled the cat with it"),
)
# Things with no use of their own; the generic uses below fit anything one can hold.
PLAIN_THINGS = (
    "key coin button ring stone spoon ribbon bucket chair hammer crown marble bottle box pencil doll rope cup sword "
    "jewel leaf cake pumpkin flower acorn egg apple"
).split()
PLAIN_USES = (
    ("show it to everyone", "showed it to everyone"),
    ("look at it before bed", "looked at it before bed"),
    ("polish it until it shone", "polished it until it shone"),
    ("hold it up to the light", "held it up to the light"),
)
THING_ADJECTIVES = (
    "red blue green yellow golden silver wooden old new little shiny purple striped round tiny painted".split()
)

LANDS = (
    Land(
        "the forest",
        (
            "at the edge of a deep forest",
            "in a forest of tall pines",
            "in a hollow tree in the forest",
            "in the middle of a green forest",
        ),
        (
            "behind the big oak",
            "under the ferns",
            "by the mossy log",
            "in the blackberry bushes",
            "at the old stone well",
            "near the mushroom ring",
            "in the clearing",
        ),
    ),
    Land(
        "the sea",
        (
            "in a small village by the sea",
            "on an island in the sea",
            "in a white house near the harbour",
            "beside an old lighthouse",
        ),
        (
            "among the rocks",
            "on the long beach",
            "under the pier",
            "in the rowing boat",
            "behind the dunes",
            "beside the fishing nets",
            "at the lighthouse",
        ),
    ),
    Land(
        "the mountains",
        ("high up in the mountains", "in a hut on a steep mountain", "in a valley between two mountains"),
        (
            "beside the waterfall",
            "in a dark cave",
            "on the narrow path",
            "behind a grey boulder",
            "in the high meadow",
            "under the rope bridge",
        ),
    ),
    Land(
        "the town",
        (
            "in a busy town with crooked streets",
            "in a tall house in the middle of town",
            "above a bakery in a little town",
        ),
        (
            "in the market square",
            "behind the bakery",
            "under the stone bridge",
            "on the clock tower",
            "beside the fountain",
            "in the narrow alley",
            "on the school steps",
        ),
    ),
    Land(
        "the farm",
        ("on a farm with a red barn", "in a cottage among fields of wheat", "on a small farm at the end of the road"),
        (
            "in the hayloft",
            "behind the barn",
            "under the apple tree",
            "beside the duck pond",
            "in the vegetable patch",
            "by the wooden gate",
            "among the sunflowers",
        ),
    ),
    Land(
        "the snow",
        ("in the far north, where the snow never melts", "in a house of ice and snow", "in a snowy village"),
        (
            "on the frozen lake",
            "behind a snowdrift",
            "under the white fir tree",
            "in the woodshed",
            "on the icy hill",
            "beside the frozen stream",
        ),
    ),
    Land(
        "the river",
        ("on the bank of a wide river", "in an old mill by the river", "where the river meets the lake"),
        (
            "among the reeds",
            "under the willow",
            "beside the water wheel",
            "on the sandy bank",
            "on the wooden bridge",
            "behind the boathouse",
        ),
    ),
    Land(
        "the desert",
        ("at the edge of a wide desert", "in a tent in the desert", "beside a cool spring in the desert"),
        (
            "behind the tall dune",
            "under the palm tree",
            "beside the well",
            "among the warm stones",
            "in the shade of a cactus",
            "near the camel track",
        ),
    ),
    Land(
        "the garden",
        ("in a garden full of roses", "under a hedge at the end of a garden", "in a garden shed with a round window"),
        (
            "behind the rose bush",
            "under the bench",
            "beside the birdbath",
            "in the tall grass",
            "among the cabbages",
            "by the garden wall",
            "inside the watering can",
        ),
    ),
)

# Made-up words for topics nobody has heard of: the model learns to copy a topic instead of only recognising it.
SYLLABLES = (
    "ba be bo bi da do du fa fi fo ga go gu ka ki ko la le lo lu ma mi mo mu na ne no pa pi po ra ri ro sa se so ta ti "
    "to tu va vo wa wi za zo zu blo gri sno tra plo"
).split()
WORD_ENDINGS = (
    "",
    "",
    "b",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "t",
    "x",
    "nk",
    "rf",
    "st",
    "ble",
    "ton",
    "kin",
    "let",
    "phant",
    "saur",
)
