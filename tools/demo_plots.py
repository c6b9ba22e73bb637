"""The plots of the demo stories: for each beat of a plot, several ways to tell it.

Templates choose among ``[one|two]`` and fill ``{slots}``; ``demo_stories`` expands both. Every plot uses the same
three parts, so that a story about any two of them can be asked for: {hero}, {other} and {obj}.

Slots: {hero} {a_hero} and {he} {him} {his} {himself}; {other} {a_other} and {ohe} {ohim} {ohis}; {obj} {the_obj} {a_obj}
{use} {used}; {home} {spot1} {spot2} {spot3}; {day}. A capital first letter ({He}) gives a capital first letter.
"""

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

PLOTS = (
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
