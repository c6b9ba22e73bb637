"""Plots of trials: courage, a mystery, a present, a quarrel, a race. Read `demo_plots` first: it says how they are written."""

from __future__ import annotations

from demo_plot import FRIENDS_ENDING, Plot

TRIALS = (
    Plot(
        "courage",
        (
            (
                "There was only one thing that {hero} did not like: {he} was afraid of {fear}.",
                "But {hero} had a secret. {He} was terribly afraid of {fear}.",
            ),
            (
                "Whenever {he} thought of {fear}, {he} hid under the blanket and held {his} {obj} tightly.",
                "Nobody knew about it but {his} {obj}, and a {obj} cannot tell.",
            ),
            (
                "One {day}, {his} friend, {a_other}, did not come home.",
                "One {day}, a cry came from far away. It was {his} neighbour, {a_other}.",
            ),
            (
                '"Somebody must go," said the neighbours, but nobody moved. {Hero} could hear {his} own heart.',
                '"What can I do?" thought {hero}. "I am the most frightened of all."',
            ),
            (
                '{He} took {his} {obj} and went out all the same. With every step {he} said to {himself}, "One more. Just one more."',
                "{His} knees shook. But {he} took a deep breath, picked up the {obj} and went.",
            ),
            (
                '{Spot1} {he} found {other}, cold and tired. "You came!" said {other}. "I knew you would."',
                'And there, {spot2}, was {other}. "I called and called," {ohe} said. "Only you came."',
            ),
            (
                "{Hero} led the way home. Only when they were inside did {he} notice that {he} had forgotten to be afraid.",
                '"Are you not afraid of {fear}?" asked {other}. "I am," said {hero}. "But I was more afraid of losing you."',
            ),
        ),
        (
            "Being brave, {hero} found, does not mean that you are never afraid.",
            "That night they {used}, and {fear} did not seem so terrible any more.",
            "Ever since, the neighbours have called {him} the bravest {hero_kind} of them all.",
        ),
    ),
    Plot(
        "a mystery",
        (
            (
                "One night, {hero} was woken by a strange sound. Tap, tap, tap.",
                "One {day}, {hero} found small, round footprints {spot1}. Nobody knew who had made them.",
                "Every night, a soft humming came from somewhere {spot1}.",
            ),
            (
                '"It is a ghost," said the neighbours, and they locked their doors. But {hero} wanted to know the truth.',
                '"I will find out what it is," said {hero}.',
            ),
            (
                "{He} waited until midnight. Then {he} crept outside on quiet feet.",
                "{He} put on {his} coat and followed the trail past {spot2x}.",
            ),
            (
                "And what did {he} see {spot3}? It was {a_other}, busy with {a_obj}.",
                "There, {spot3}, in the moonlight, sat {a_other}. {Ohe} was trying to mend {a_obj}.",
            ),
            (
                '"Please do not be angry," said {other}. "I only come at night because I have no friends here."',
                '"Oh!" said {other}. "I did not want to wake anyone. I am making a surprise for the whole village."',
                '{Other} jumped. "I thought that everyone was asleep," {ohe} said. "I am too shy to come by day."',
            ),
            (
                '{Hero} laughed. "Is that the whole mystery?" {he} said. "Come, I will help you."',
                '"Then let us do it together," said {hero}, and {he} sat down too.',
            ),
            (
                "By morning the {obj} was ready. They {used}, and all the neighbours came to see.",
                "The next day {hero} told everyone, and they all came to say hello and to see the {obj}.",
            ),
        ),
        (
            "After that, nobody was afraid of the night any more.",
            "And so the mystery ended, and a friendship began.",
            *FRIENDS_ENDING[:3],
        ),
    ),
    Plot(
        "a birthday present",
        (
            (
                "It was almost the birthday of {hero_s} best friend, {a_other}.",
                "{His} best friend was {a_other}, and tomorrow was {ohis} birthday.",
            ),
            (
                "{Hero} wanted to give {ohim} something special, but {he} had only one small coin.",
                '"What shall I give?" thought {hero}. {He} looked in {his} pockets. They were empty.',
            ),
            (
                "{He} went to the shop and saw {a_obj} in the window. It was far too expensive.",
                "In the shop there was {a_obj}, but it cost [ten|twenty|a hundred] coins.",
            ),
            (
                "So {he} made up {his} mind. {He} would make one {himself}.",
                '"Then I will make it with my own hands," said {hero}.',
            ),
            (
                "{He} gathered wood {spot1}, string {spot2} and paint from the shed. All night long {he} worked.",
                "{He} worked [the whole day|until midnight|until the candle burned low]. {He} sawed, glued, sewed and painted.",
            ),
            (
                "In the morning the {obj} was finished. It was a little crooked, and one side was bigger than the other.",
                "When it was done, {hero} was worried. The {obj} did not look like the one in the shop at all.",
            ),
            (
                '{Other} unwrapped it slowly. Then {ohis} eyes grew wide. "You made this for me?" {ohe} said. "It is the best {obj} in the world."',
                'But {other} held it up and beamed. "Nobody else has a {obj} like this," {ohe} said. Then they {used} until it was dark.',
            ),
        ),
        (
            "{Hero} knew then that the best presents are made with love.",
            "And the {obj} in the shop? They never thought of it again.",
            "They ate cake until they could not move, and it was the happiest birthday of all.",
        ),
    ),
    Plot(
        "a quarrel",
        (
            (
                "One {day}, {hero} and {his} friend, {a_other}, found {a_obj} {spot1}.",
                "One {day}, {hero} was walking with {a_other} when they both saw {a_obj} lying {spot1}.",
            ),
            (
                '"I saw it first!" said {hero}. "No, I saw it first!" said {other}.',
                '"It is mine," said {hero}. "It is not," said {other}. "It is mine."',
            ),
            (
                "They pulled and they pulled, until there was a loud crack. The {obj} broke in two.",
                "Each held one end and would not let go. Then both slipped, and the {obj} fell into the mud.",
            ),
            (
                "They both went home angry. For three days they did not speak a word.",
                '"Now look what you have done!" they both shouted, and each went a different way.',
            ),
            (
                "But {hero} could not sleep. The house was too quiet without {other}.",
                "{Hero} tried to play alone, but it was no fun at all.",
            ),
            (
                'In the morning {he} knocked on the door of {other}. "I am sorry," {he} said. "A friend is worth more than a {obj}." "I am sorry too," said {other}.',
                '{He} went {spot2}, and there sat {other}, looking just as sad. "I am sorry," they both said at the same time, and then they had to laugh.',
            ),
            (
                "Together they mended it with glue and string. Then they {used}, first one and then the other.",
                "They cleaned the {obj} and made a rule: one day for {hero}, one day for {other}.",
            ),
        ),
        (
            "The {obj} was never quite as good as new, but the friendship was better than before.",
            "And if they ever quarrel again, they look at the {obj} and remember.",
            *FRIENDS_ENDING[3:],
        ),
    ),
    Plot(
        "a race",
        (
            (
                "Every [spring|summer|autumn] there was a great race from the hill to the river. The prize was {a_obj}.",
                'One {day}, a sign was put up: "Great race tomorrow! The winner gets {a_obj}!"',
            ),
            (
                "{Hero} wanted to win. {He} ran up and down every day until {his} legs hurt.",
                '"I am sure to win," said {hero}, and {he} told everyone so.',
            ),
            (
                "The fastest of all was {a_other}. Nobody had ever beaten {ohim}.",
                "Beside {him} at the starting line stood {a_other}. {Ohe} gave {him} a friendly nod.",
            ),
            (
                "Ready, steady, go! They ran past {spot1x} and past {spot2x}, side by side.",
                "A whistle blew, and off they went. Soon {hero} and {other} had left all the others behind.",
            ),
            (
                "Near the end, {other} tripped over a root and fell. {Hero} could already see the finish line.",
                "Then {hero} heard a cry behind {him}. {Other} had hurt {ohis} foot and could not go on.",
            ),
            (
                '{He} stopped. Then {he} turned around and helped {other} up. "Lean on me," {he} said.',
                "{Hero} thought of the {obj}. But {he} could not run on, so {he} went back.",
            ),
            (
                "They came in last of all, arm in arm, and the crowd cheered louder than ever. Both of them got the prize.",
                "A snail won the race. But {other} made {him} {a_obj} with {ohis} own hands, and that was better than any prize.",
                "They crossed the line together. The judge smiled and gave the {obj} to both of them.",
            ),
        ),
        (
            "To this day nobody remembers who won, but everyone remembers {hero}.",
            "They took turns with it, and they still {use}.",
            "{Hero} had lost a race and won a friend.",
        ),
    ),
)
