"""Plots of wonders: mending, a magic seed, a storm, wishes, the moon. Read `demo_plots` first: it says how they are written."""

from __future__ import annotations

from demo_plot import FRIENDS_ENDING, Plot

WONDERS = (
    Plot(
        "fixing things",
        (
            (
                "{He} had {a_obj}, and {he} loved to {use}. But one {day}, it broke.",
                "One {day}, {hero} dropped {his} favourite {obj}, and it broke into three pieces.",
            ),
            (
                "{He} tried to fix it with glue. It fell apart. {He} tried to fix it with string. It fell apart again.",
                '"Stupid thing!" {he} shouted, and {he} kicked it under the table.',
            ),
            (
                "{His} neighbour told {him} about {a_other} who lived {spot1} and could mend anything.",
                'The noise brought {a_other} to the door. "May I see it?" asked {other}.',
            ),
            (
                '{Other} turned the {obj} over and over. "I could mend it for you," {ohe} said. "But it is better if I show you how."',
                '"First we look," said {other}. "Then we think. Then we use our hands."',
            ),
            (
                "It took a long time. Twice {hero} wanted to throw it away, and twice {other} told {him} to rest and drink some tea.",
                "{Hero} learned to measure, to cut and to wait for the glue to dry. Waiting was the hardest part.",
            ),
            (
                "When the last piece was in its place, they held their breath. It worked!",
                "At last {hero} put in the final screw. The {obj} was as good as new.",
            ),
            (
                "That evening they {used}, and it was more fun than ever before.",
                '"I mended it myself!" said {hero} proudly. "With a little help," {he} added.',
            ),
        ),
        (
            "Now, when something breaks, {hero} does not shout. {He} puts the kettle on and begins.",
            "Soon all the neighbours brought their broken things, and {hero} was never bored again.",
            *FRIENDS_ENDING[:2],
        ),
    ),
    Plot(
        "a magic seed",
        (
            (
                "One {day}, {hero} took {his} {obj} to the market. There {he} met {a_other} with a single seed.",
                'One {day}, {a_other} came to the door with a tiny seed. "I will give you this for your {obj}," said {other}.',
            ),
            (
                '"It is a magic seed," said {other}. {Hero} believed {ohim} and gave {ohim} the {obj}.',
                "{Hero} thought about it. {He} loved to {use}. But {he} loved secrets more, and so {he} took the seed.",
            ),
            (
                '"A {obj} for a seed!" said the neighbours, and they laughed.',
                "Everyone laughed at {him}. Who would give a good {obj} for a seed?",
            ),
            (
                "{Hero} planted it {spot1}. {He} watered it every morning and sang to it every night.",
                "{He} planted the seed {spot1} and waited. One week passed, and then another. Nothing happened.",
            ),
            (
                "Then, after a warm rain, a green leaf came up. The next day the plant was as high as the roof.",
                "One {day} there was a little green tip. By noon it had a stem, and by evening it was a tree.",
            ),
            (
                "It bore [silver|golden|blue] fruit that tasted of [honey and snow|summer|cinnamon], enough for the whole village.",
                "It had flowers in every colour, and out of each flower came a [soft song|small light|sweet smell].",
            ),
            (
                'Under the tree stood {other}, with the {obj}. "You waited," {ohe} said. "Most people do not. Take this back, it was only a test."',
                "The neighbours did not laugh any more. And {other} came to sit in the shade, and {ohe} brought back the {obj}.",
            ),
        ),
        (
            "The tree still stands there, and if you are quiet, you can hear it grow.",
            "Good things take time, {hero} says, and a little water.",
            "{Hero} gave a seed to everyone who asked, and soon the whole land was green.",
        ),
    ),
    Plot(
        "a storm",
        (
            (
                "One {day}, the sky turned black, and a great storm came.",
                "One night, the wind howled around the house, and the rain beat on the roof.",
            ),
            (
                "{Hero} shut the windows and made a fire. Then {he} heard a knock at the door.",
                '{He} was just about to go to bed when someone knocked. "Who goes out in such weather?" {he} wondered.',
            ),
            (
                "Outside stood {a_other}, wet to the skin. {Ohe} was holding {a_obj}.",
                "It was {a_other}. {Ohe} had nothing with {ohim} but {a_obj}.",
            ),
            (
                '"The storm has taken my house," said {other}. "May I stay here tonight?"',
                '"I cannot find my way in this rain," said {other}. "Could I sit by your fire for a while?"',
            ),
            (
                '{Hero} had only one bed and one bowl of soup. But {he} opened the door wide. "Come in," {he} said.',
                '"Of course," said {hero}, and {he} put on the kettle and brought a dry towel.',
            ),
            (
                "They shared the soup and told each other stories, and the thunder did not seem so loud any more.",
                "To pass the time, they {used}, as well as one can indoors, and soon they forgot the storm.",
            ),
            (
                "In the morning the sky was clear. Together they went {spot1} and began to build a new house.",
                'When the sun came up, there was a rainbow. {Other} put the {obj} on the table. "This is for you," {ohe} said, "for opening the door."',
            ),
        ),
        (
            "There are two houses now, side by side, with a bench between them.",
            "And whenever a storm comes, there are two chairs by the fire.",
            *FRIENDS_ENDING,
        ),
    ),
    Plot(
        "wishes",
        (
            (
                "One {day}, {hero} found {a_obj} {spot1}. {He} picked it up, and it began to speak.",
                "One {day}, {he} saw something lying {spot1}. It was {a_obj}, and it was glowing softly.",
            ),
            (
                '"I can give you three wishes," said the {obj}. "But think well before you speak."',
                '"You have found me," it said in a small voice. "So you have three wishes."',
            ),
            (
                '"I wish for a mountain of [cake|gold|toys]!" cried {hero}. At once there was so much of it that {he} could not open {his} own door.',
                '"I wish to be as big as a house!" said {hero}. And so {he} was, and {he} could not fit into {his} bed any more.',
                '"I wish that it would never be night!" said {hero}. The sun stayed in the sky, and nobody could sleep.',
            ),
            (
                'Along came {a_other}. {Ohe} looked at {him} and shook {ohis} head. "Are you happy now?" asked {other}.',
                'Then {a_other} came by. "What a mess," said {other}. "What do you really want?"',
            ),
            (
                '{Hero} thought about it. "I wish that everything was as it was before," {he} said. And it was.',
                '"Not this," said {hero} quietly, and with the second wish {he} took back the first.',
            ),
            (
                'One wish was left. {Hero} looked at {other}. "I wish for a friend," {he} said. "You do not need magic for that," said {other}, and {ohe} sat down beside {him}.',
                'Now there was only one wish. "You have it," said {hero} to {other}. {Other} smiled and wished for [a warm supper|a long walk|an evening by the fire] for two.',
            ),
            (
                "The {obj} never spoke again. They {used} all the same.",
                "They left the {obj} where it had been, for someone else to find.",
            ),
        ),
        (
            "It is good to have wishes, {hero} says, but it is better to have enough.",
            *FRIENDS_ENDING,
        ),
    ),
    Plot(
        "the moon",
        (
            (
                "Every night, {hero} looked up at the moon. {He} wanted to touch it, just once.",
                "One {day}, {hero} made a plan. {He} would catch the moon and take it home.",
            ),
            (
                "{He} climbed the highest hill and stretched out {his} arms. The moon was still too far away.",
                "{He} jumped as high as {he} could. {He} even stood on top of {his} {obj}. It was no use.",
            ),
            (
                '{A_other} had been watching {him}. "What are you doing?" asked {other}.',
                '"Be careful up there!" called {a_other}. "What are you looking for?"',
            ),
            (
                '"I want to touch the moon," said {hero}. {Other} did not laugh.',
                '"I want to bring the moon home," said {hero}, "because my house is so dark at night."',
            ),
            (
                '"Come with me," said {other}, and {ohe} led {him} to a still, dark pond {spot1}.',
                '"Then you must look down, not up," said {other}, and they walked to the water {spot2}.',
            ),
            (
                "There in the water lay the moon, round and bright. {Hero} put in {his} hand, and the moon broke into a thousand silver pieces and came together again.",
                "The moon was floating there like a silver plate. {Hero} touched it very gently. It was cold and wet, and it trembled.",
            ),
            (
                '"I touched it," {he} whispered. To say thank you, {he} gave {other} {his} {obj}.',
                "They sat by the pond until late. Then {other} took out {a_obj}, and they {used} in the moonlight.",
            ),
        ),
        (
            "Since then, {hero} says good night to two moons, one above and one below.",
            "And when the moon is full, you can see the two of them there, side by side.",
            *FRIENDS_ENDING[:2],
        ),
    ),
)
