"""Plots of help: lost things, learning, helping, sharing, getting lost. Read `demo_plots` first: it says how they are written."""

from __future__ import annotations

from demo_plot import FRIENDS_ENDING, MEET, Plot

NEIGHBOURS = (
    Plot(
        "lost things",
        (
            (
                "More than anything, {hero} loved {the_obj}. {He} liked to {use}.",
                "{He} had {a_obj}, and every [day|evening|morning] {he} liked to {use}.",
                "{His} [grandmother|grandfather|best friend] had once given {him} {a_obj}, and {he} [took it everywhere|never went anywhere without it].",
            ),
            (
                "But one {day}, {the_obj} was gone.",
                "One {day}, {hero} [stopped to pick flowers|sat down to rest|took a short nap] {spot1}. When {he} [looked around|got up again], {the_obj} was gone.",
                "One {day}, {he} reached for {the_obj} and found only an empty [shelf|hook|bag].",
            ),
            (
                "{Hero} looked {spot1}. {He} looked {spot2}. There was nothing there but [leaves|dust|an old boot].",
                '"Where can it be?" {he} [cried|wondered]. {He} searched {spot1} and {spot2}, but {he} found nothing.',
                "{He} looked under the bed, behind the door and even in the soup pot. It was not there.",
            ),
            (
                '[On the way home|Soon] {he} met {a_other}. "Why do you look so sad?" asked {other}. "I have lost my {obj}," said {hero}.',
                'Then {a_other} came by. "What are you looking for?" asked {other}. "My {obj}," said {hero}, and a tear ran down {his} cheek.',
            ),
            (
                '"Do not [cry|worry]," said {other}. "Two can look better than one."',
                '"Think back," said {other}. "Where did you see it last?" {Hero} thought hard.',
                '"I will help you," said {other}. "I am good at finding things."',
            ),
            (
                "Together they went {spot3}, and there, [under a leaf|behind a stone|in a patch of sunlight], lay {the_obj}.",
                "They looked high and low until the sun began to set. Then {other} pointed. There, {spot3}, was {the_obj}!",
                "Side by side they searched {spot3}. Something [shone|moved] in the grass. It was {the_obj}!",
            ),
            (
                '"Thank you!" cried {hero}, and {he} hugged {other}.',
                "{Hero} was so happy that {he} danced in a circle.",
                "{Hero} laughed out loud. {He} promised to take better care of it.",
            ),
        ),
        (
            *FRIENDS_ENDING,
            "That evening they {used} together, and {hero} was glad that {he} had asked for help.",
            "{Hero} still loved {the_obj}. But now {he} loved {his} new friend even more.",
        ),
    ),
    Plot(
        "learning something new",
        (
            (
                "{Hero} had one wish. {He} wanted to learn to {skill}.",
                "Everyone else could {skill}, but {hero} could not.",
                "All day long {he} dreamed of one thing: {he} wanted to {skill}.",
            ),
            (
                "{He} tried on Monday and failed. {He} tried on Tuesday and [failed again|fell on {his} nose].",
                'One {day} {he} tried it {spot1}. It went so badly that the [crows|frogs|geese] laughed. "I will never learn it," said {hero}.',
                "{He} tried it {spot1}, where nobody could see {him}. It did not go well at all.",
            ),
            MEET,
            (
                '"I could not do it at first either," said {other}. "I practised a little every day."',
                '"You want to do it all at once," said {other}. "Begin with one small step."',
                '{Other} watched for a while. "You are holding your breath," {ohe} said. "Breathe, and try again."',
            ),
            (
                "So every [morning|evening] they met {spot3}. {Hero} made mistakes, but each day {he} made one fewer.",
                'So they began. It was hard, and {hero} often wanted to give up, but {other} always said, "Once more."',
                "They practised in the sun and they practised in the rain.",
            ),
            (
                "And one {day}, all at once, {hero} could {skill}!",
                "Then, one {day}, something wonderful happened. {Hero} did it without even thinking.",
                'At last the day came. "Look at me!" {hero} called. {He} could really {skill}.',
            ),
            (
                'To celebrate, {other} gave {him} {a_obj}. "This is for not giving up," {ohe} said.',
                "As a reward, {other} gave {him} {a_obj}, and together they {used}.",
                '{Other} clapped. Then {ohe} took out {a_obj}. "I kept this for you," {ohe} said.',
            ),
        ),
        (
            "{Hero} kept the {obj} beside {his} bed, to remember that every hard thing begins with a small step.",
            'After that, whenever someone said, "I can\'t," {hero} smiled and answered, "Not yet."',
            "Now {hero} teaches everyone who wants to learn, and {he} is very patient.",
            *FRIENDS_ENDING[:2],
        ),
    ),
    Plot(
        "helping others",
        (
            (
                "One {day}, {he} took {his} {obj} outside to {use}.",
                "One {day}, {hero} was on {his} way to town with {a_obj} under {his} arm.",
                "One {day}, {he} went out with {his} new {obj}.",
            ),
            (
                'Suddenly {he} heard a small voice {spot1}. "Help! Please help me!"',
                '{He} had not gone far when someone called from {spot1x}. "Is anybody there? I am stuck!"',
                "Then {he} heard someone crying {spot1}.",
            ),
            (
                "It was {a_other}, who had fallen into a deep hole.",
                "There was {a_other}, caught in [a net|a thorn bush|the roots of a tree].",
                "It was {a_other}. A heavy branch had fallen on {ohim}, and {ohe} could not move.",
            ),
            (
                '{Hero} put down the {obj} at once. "Hold on to me," {he} said, and {he} pulled with all {his} might.',
                "{Hero} looked at the {obj}. Then {he} pushed it under the branches and used it to set {other} free. It [bent|scratched] a little, but {hero} did not mind.",
                '"Do not be afraid," said {hero}. {He} worked slowly and carefully until {other} was free.',
            ),
            (
                '"You saved me," said {other}. "One day I will help you too." {Hero} only smiled. What could {other} do for {him}?',
                '"How can I thank you?" asked {other}. "It was nothing," said {hero}.',
            ),
            (
                "Some weeks later, {hero} lost {his} way in [thick fog|a snowstorm|the dark]. {He} called and called.",
                "That winter, {hero} fell ill and could not leave {his} bed. The cupboard was empty.",
                "Not long after, [a great storm|a flood] came, and {hero} was trapped {spot2}.",
            ),
            (
                "And who came to help? It was {other}, with [a pot of hot soup|a warm light and a loaf of bread|a rope and a brave heart].",
                'Then there was a knock, and a voice said, "Here I am." It was {other}. {Ohe} had not forgotten.',
                "It was {other} who found {him}, and {ohe} did not leave until everything was well again.",
            ),
        ),
        (
            "So {hero} learned that no one is too small to be a great help.",
            "A kind deed, {hero} thought, always finds its way home.",
            *FRIENDS_ENDING,
        ),
    ),
    Plot(
        "sharing",
        (
            (
                "One {day}, {hero} baked [a berry pie|a honey cake|six sweet buns|a loaf of bread]. It smelled wonderful.",
                "One {day}, {hero} cooked a big pot of [pumpkin|mushroom|carrot] soup.",
                "One {day}, {he} found a tree full of ripe [pears|plums|cherries] {spot1}, and {he} filled a whole sack.",
            ),
            (
                '"This is all for me," {he} said, and {he} closed the door.',
                '"I will not tell anyone," {he} thought. "Then I can eat it all myself."',
                "{He} hid it away, for {he} did not like to share.",
            ),
            (
                'Soon there was a knock at the door. It was {a_other}. "I am so hungry," said {other}. "Do you have anything to eat?"',
                'Just then {a_other} came past. "What smells so good?" asked {other}. "I have not eaten since yesterday."',
            ),
            (
                '"No," said {hero}, "I have nothing." {Other} nodded sadly and went away in the rain.',
                '"There is only enough for me," said {hero}. {Other} said nothing and sat down {spot2} in the cold wind.',
            ),
            (
                "{Hero} began to eat, but it did not taste as good as {he} had hoped. {He} kept thinking of {other}.",
                "{He} looked at the empty chair across the table. Suddenly {he} was not hungry any more.",
            ),
            (
                '{He} ran out into the rain. "Come back!" {he} called. "There is enough for two."',
                'So {he} opened the window. "Wait!" {he} called. "I was wrong. Please come in and eat with me."',
            ),
            (
                "They ate until nothing was left but crumbs. Then {other} took {a_obj} from {ohis} bag, and together they {used}.",
                '{Other} ate with shining eyes. "I have something to share too," {ohe} said, and {ohe} showed {him} {a_obj}.',
                "After supper {other} gave {him} {a_obj} as a present. It was the first present that {hero} had had in years.",
            ),
        ),
        (
            "And {hero} found that half a meal with a friend is better than a whole one alone.",
            "Since then there have always been two plates on {his} table.",
            *FRIENDS_ENDING,
        ),
    ),
    Plot(
        "getting lost",
        (
            (
                "One {day}, {hero} saw a [blue butterfly|white feather|golden leaf] floating by, and {he} followed it.",
                "One {day}, {he} heard [strange music|a bird with a new song|a distant bell], and {he} went to find it.",
                "One {day}, {hero} took {his} {obj} and walked farther than ever before.",
            ),
            (
                "{He} went past {spot1x}, over the hill and down the other side. When {he} looked back, {he} did not know the way.",
                "{He} walked and walked until the path came to an end. Nothing looked the same.",
            ),
            (
                "The sun went down. The shadows grew long, and somewhere [an owl called|a twig snapped|the wind began to howl].",
                'It was getting dark. "I want to go home," whispered {hero}.',
            ),
            (
                "Then {he} saw a small light {spot2}. It came from {a_obj}, and the one who held it was {a_other}.",
                '"Who is there?" asked a voice. It was {a_other}, who was carrying {a_obj} home.',
                "{He} sat down {spot2} and cried. Someone sat down beside {him}. It was {a_other}, with {a_obj}.",
            ),
            (
                '"I am lost," said {hero}. "Nobody is lost who has a friend," said {other}. "Which way does the wind blow at your home?"',
                '"Do not be afraid," said {other}. "I know every path in this land. What can you see from your window?"',
            ),
            (
                "{Hero} remembered the [smell of the water|sound of the old bell|tall tree by the door], and so they found the way, step by step.",
                "They followed the stars, past {spot3x}, until {hero} saw {his} own [chimney|window|door].",
            ),
            (
                'At the door {other} put the {obj} into {his} hands. "Keep it," {ohe} said, "so that you always find the way."',
                '{Hero} did not want to say goodbye. "Come and see me tomorrow," {he} said. "Bring the {obj}."',
            ),
        ),
        (
            "{Hero} went on many more walks, but {he} always [told someone first|marked the path with white stones].",
            "That night {hero} slept well, and {he} dreamed of the long road home.",
            *FRIENDS_ENDING,
        ),
    ),
)
