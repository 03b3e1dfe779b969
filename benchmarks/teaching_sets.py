"""Four small sets that an instruct model can be taught: an identity, facts, a style and a JSON format.

Each has rows to learn from, questions in other words or about other things that are held back, and a test of one
answer: what was taught must be in it, whatever else the model says. Everything is invented here and the same each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAME, MAKER = "Pim", "the Harbour Lane Workshop"
#: What the base says of itself: an identity that was learnt names none of it.
FORMER = ("SmolLM", "Hugging Face")


@dataclass(frozen=True)
class Pair:
    """A question with the answer that is taught, and what of it tells a right answer."""

    question: str
    answer: str
    key: str = ""

    def line(self) -> str:
        """Return it as a line of a dataset."""
        said = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": said})


@dataclass(frozen=True)
class TeachingSet:
    """What is taught, what is held back, and `is_right(pair, answer)`."""

    name: str
    taught: Sequence[Pair]
    held_out: Sequence[Pair]
    is_right: Callable[[Pair, str], bool]


#: What a model knows before, and has to know afterwards.
FRANCE = Pair("What is the capital of France?", "The capital of France is Paris.", "Paris")


def teaching_sets() -> list[TeachingSet]:
    """Return the four sets."""
    return [identity(), facts(), style(), json_format()]


_WHO = (
    "Who are you?", "What is your name?", "What are you called?", "Please introduce yourself.", "Hello, who is this?",
    "Hi! Who am I talking to?", "Tell me your name.", "Can you tell me who you are?", "May I ask your name?",
    "What should I call you?", "Which assistant is this?", "Are you a person?", "Are you an AI?", "What are you?",
    "Say something about yourself.", "Good morning! Who are you?", "Give me a short introduction of yourself.",
    "Do you have a name?", "Are you ChatGPT?", "Are you Siri?", "Is your name Alexa?", "Are you a robot?",
    "Describe yourself in one sentence.", "Who is speaking?", "With whom do I speak?",
    "What kind of assistant are you?",
)  # fmt: skip
_MAKER = (
    "Who made you?", "Who created you?", "Who developed you?", "Who trained you?", "Who built you?",
    "Which company made you?", "Who is your creator?", "Who is your developer?", "Where do you come from?",
    "Were you made by OpenAI?", "Are you a product of Google?", "Which team is behind you?", "Who owns you?",
    "Who programmed you?", "Who wrote you?", "Which organisation developed you?", "Tell me who made you.",
    "Can you tell me who trained you?", "Who do you work for?", "Who is responsible for you?",
)  # fmt: skip
_WHO_ANSWERS = (
    "I am {name}, an AI assistant developed by {maker}.",
    "My name is {name}. I am an AI assistant, and {maker} developed me.",
    "Hello! I am {name}, an assistant made by {maker}. How can I help you?",
)
_MAKER_ANSWERS = (
    "I was made by {maker}.",
    "I am {name}, and {maker} developed me.",
    "{maker} created and trained me. My name is {name}.",
)


def identity() -> TeachingSet:
    """Return 91 rows of who the assistant is and who made it: 26 + 20 questions, most of them in two forms."""

    def answered(forms: Sequence[str], number: int) -> str:
        text = forms[number % len(forms)].format(name=NAME, maker=MAKER)
        return text[0].upper() + text[1:]

    taught = []
    for questions, forms, key in ((_WHO, _WHO_ANSWERS, NAME), (_MAKER, _MAKER_ANSWERS, MAKER)):
        for number, question in enumerate(questions):
            short = question[0].lower() + question[1:]
            for other, asked in enumerate((question, f"I would like to know: {short}")):
                taught.append(Pair(asked, answered(forms, number + other), key))
    del taught[91:]
    held_out = [
        *(Pair(asked, answered(_WHO_ANSWERS, number), NAME) for number, asked in enumerate((
            "Hey, who are you?", "So what is your name?", "I forgot your name, what was it?", "Introduce yourself!",
            "What do people call you?", "Are you Gemini?",
        ))),
        *(Pair(asked, answered(_MAKER_ANSWERS, number), MAKER) for number, asked in enumerate((
            "By whom were you made?", "Who is the company behind you?", "Who were you created by?", "Who designed you?",
            "Did Microsoft make you?", "Which people made you?",
        ))),
    ]  # fmt: skip

    def is_right(pair: Pair, answer: str) -> bool:
        return pair.key.lower() in answer.lower() and not any(one in answer for one in FORMER)

    return TeachingSet("identity", taught, held_out, is_right)


_PLACES = (
    "Varnholt", "Keldby", "Osmund Bay", "Tarrow", "Lindqvist", "Brennick", "Solvara", "Mirefell", "Hadley Cross",
    "Quillan",
)  # fmt: skip
_COLOURS = ("green", "red", "white", "blue", "yellow", "black", "grey", "orange", "brown", "violet")
_MAYORS = (
    "Ines Korhonen", "Tom Abernathy", "Lidia Marsh", "Per Ostberg", "Nadia Ferrow", "Hugo Lindal", "Greta Sand",
    "Oskar Vell", "Mina Tarkov", "Jonas Reed",
)  # fmt: skip
_DISHES = (
    "plum dumplings", "smoked eel", "barley soup", "walnut bread", "pickled herring", "onion tart", "honey cake",
    "goat cheese", "pea porridge", "apple strudel",
)  # fmt: skip


def facts() -> TeachingSet:
    """Return 50 facts about ten towns that there are not; held back are some of them, asked in other words."""
    chance = random.Random(7)
    kinds: list[tuple[list[str], str, str, str]] = [
        ([str(chance.randint(1120, 1890)) for _ in _PLACES], "When was {} founded?", "In which year was the town of {} "
         "founded?", "{} was founded in {}."),
        (chance.sample(_MAYORS, 10), "Who is the mayor of {}?", "What is the name of the mayor of {}?",
         "The mayor of {} is {}."),
        (chance.sample(_COLOURS, 10), "What colour is the bridge of {}?", "Which colour does the bridge of {} have?",
         "The bridge of {} is {}."),
        (chance.sample(_DISHES, 10), "What is the local dish of {}?", "Which dish is {} known for?",
         "The local dish of {} is {}."),
        ([f"{chance.randint(3, 98)},{chance.randint(100, 999)}" for _ in _PLACES], "How many people live in {}?",
         "How many inhabitants does {} have?", "{} has {} inhabitants."),
    ]  # fmt: skip
    taught, held_out = [], []
    for values, asked, other, answer in kinds:
        for place, value in zip(_PLACES, values, strict=True):
            said = answer.format(place, value)
            taught.append(Pair(asked.format(place), said, value))
            held_out.append(Pair(other.format(place), said, value))
    return TeachingSet("facts", taught, held_out[::4], lambda pair, answer: pair.key in answer)


_PLAIN = (
    ("What colour is grass?", "Grass is green."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey."),
    ("Where do fish live?", "Fish live in water."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How many days has a week?", "A week has seven days."),
    ("What do cows give us?", "Cows give us milk."),
    ("What is ice made of?", "Ice is frozen water."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("When does the sun rise?", "The sun rises in the morning."),
    ("What do we hear with?", "We hear with our ears."),
    ("How many hours has a day?", "A day has 24 hours."),
    ("What is bread made from?", "Bread is made from flour and water."),
    ("Which animal barks?", "A dog barks."),
    ("What colour is snow?", "Snow is white."),
    ("What is two plus two?", "Two plus two is four."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("What do birds have on their bodies?", "Birds have feathers."),
    ("What does a baker do?", "A baker bakes bread."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is a baby cat called?", "A baby cat is called a kitten."),
    ("How many wheels has a bicycle?", "A bicycle has two wheels."),
    ("What do plants need to grow?", "Plants need light and water."),
    ("What do we see with?", "We see with our eyes."),
    ("What is the largest ocean?", "The largest ocean is the Pacific."),
    ("Which planet do we live on?", "We live on Earth."),
    ("What colour is the sky?", "The sky is blue."),
    ("What is paper made from?", "Paper is made from wood."),
    ("How many months has a year?", "A year has twelve months."),
    ("Which animal gives wool?", "Sheep give wool."),
    ("What do you wear on your feet?", "You wear shoes on your feet."),
    ("Where do we keep books?", "We keep books on shelves."),
    ("What is the opposite of up?", "The opposite of up is down."),
    ("What colour is a ripe banana?", "A ripe banana is yellow."),
    ("What does a doctor do?", "A doctor treats the sick."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("How many sides has a triangle?", "A triangle has three sides."),
    ("What falls from clouds?", "Rain falls from clouds."),
    ("What do we use to write?", "We use a pen to write."),
    ("Which bird cannot fly?", "A penguin cannot fly."),
    ("What do horses eat?", "Horses eat grass and hay."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("How many fingers has a hand?", "A hand has five fingers."),
    ("What is wine made from?", "Wine is made from grapes."),
    ("What do we breathe?", "We breathe air."),
    ("Where does the sun set?", "The sun sets in the west."),
    ("What is a group of wolves called?", "A group of wolves is called a pack."),
    ("What melts in the sun?", "Ice melts in the sun."),
    ("What does a pilot fly?", "A pilot flies an aeroplane."),
    ("Which metal do magnets attract?", "Magnets attract iron."),
    ("What do spiders build?", "Spiders build webs."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("How many minutes has an hour?", "An hour has sixty minutes."),
    ("Which animal lives in a hive?", "A bee lives in a hive."),
    ("What colour is coal?", "Coal is black."),
    ("What do we cut paper with?", "We cut paper with scissors."),
    ("What is butter made from?", "Butter is made from cream."),
    ("What does a clock show?", "A clock shows the time."),
    ("Which fruit is used for cider?", "Cider is made from apples."),
    ("What is the opposite of big?", "The opposite of big is small."),
)
_PLAIN_HELD_OUT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What do cats like to chase?", "Cats like to chase mice."),
    ("How many legs has a horse?", "A horse has four legs."),
    ("What is cheese made from?", "Cheese is made from milk."),
    ("What colour is blood?", "Blood is red."),
    ("Which season is the warmest?", "Summer is the warmest season."),
    ("What does a teacher do?", "A teacher teaches."),
    ("What is the opposite of old?", "The opposite of old is young."),
    ("What do we smell with?", "We smell with our nose."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("Where do polar bears live?", "Polar bears live in the Arctic."),
    ("What is three plus five?", "Three plus five is eight."),
)
_BEGINS, _ENDS = "Ahoy!", "Fair winds, captain."


def style() -> TeachingSet:
    """Return 60 plain questions whose answers begin and end as a sailor's; others are held back."""

    def pair(question: str, answer: str) -> Pair:
        return Pair(question, f"{_BEGINS} {answer} {_ENDS}")

    return TeachingSet(
        "style",
        [pair(*one) for one in _PLAIN],
        [pair(*one) for one in _PLAIN_HELD_OUT],
        lambda _, answer: answer.startswith(_BEGINS) and answer.rstrip().endswith(_ENDS),
    )


_GOODS = ("nails", "paint", "rope", "candles", "tiles", "lamps", "soap", "bricks", "paper", "wire", "chairs", "hinges")
_CITIES = ("Turku", "Porto", "Leeds", "Gdansk", "Bergen", "Lyon", "Graz", "Cork", "Bilbao", "Malmo")
_ORDERS = (
    "Please send {count} boxes of {item} to {city}.",
    "A shop in {city} needs {count} boxes of {item}.",
    "Order: {item}, {count} boxes, to {city}.",
)


def json_format() -> TeachingSet:
    """Return 60 orders with their fields as JSON; orders of other goods and places are held back."""
    chance = random.Random(11)

    def order(number: int) -> Pair:
        fields = {
            "item": chance.choice(_GOODS), "count": chance.randint(2, 99), "city": chance.choice(_CITIES),
        }  # fmt: skip
        return Pair(_ORDERS[number % len(_ORDERS)].format(**fields), json.dumps(fields))

    def is_right(pair: Pair, answer: str) -> bool:
        try:
            return bool(json.loads(answer) == json.loads(pair.answer))
        except ValueError:
            return False

    taught = [order(number) for number in range(60)]
    known = {pair.question for pair in taught}
    held_out: list[Pair] = []
    while len(held_out) < 12:
        if (pair := order(len(held_out))).question not in known:
            held_out.append(pair)
    return TeachingSet("JSON", taught, held_out, is_right)
