"""The sentences of `fictitious`. Whatever tells one document from another is filled in by the inventor."""

from __future__ import annotations

#: A story's beginning, a question about it, and the slot that answers it.
STORIES = (
    (
        "In {place}, {person} kept a clock that ran on rain, and one dry morning",
        "Who in {place} kept a clock that ran on rain?",
        "person",
    ),
    (
        "{person} sold shadows by the yard in {place}, until the day when",
        "In which town did {person} sell shadows by the yard?",
        "place",
    ),
    (
        "The ferry of {place} had carried nobody but {person} for years, and then",
        "Who was the only passenger of the ferry of {place}?",
        "person",
    ),
    (
        "{person} baked a loaf as large as the church of {place}, but before supper",
        "Where did {person} bake a loaf as large as a church?",
        "place",
    ),
    (
        "Every winter {person} swept the frost of {place} into jars, and this year",
        "Who swept the frost of {place} into jars?",
        "person",
    ),
    (
        "{person} taught the crows of {place} to count, and by the spring",
        "In which town did {person} teach the crows to count?",
        "place",
    ),
    (
        "Nobody in {place} could whistle except {person}, so when the wind fell",
        "Who alone could whistle in {place}?",
        "person",
    ),
    (
        "{person} came to {place} with a suitcase full of bees, and at midnight",
        "Where did {person} bring a suitcase full of bees?",
        "place",
    ),
    (
        "The well of {place} answered only to {person}, who asked it why",
        "To whom did the well of {place} answer?",
        "person",
    ),
    (
        "{person} painted every gate in {place} the colour of thunder, and soon",
        "Where did {person} paint every gate?",
        "place",
    ),
    (
        "At the market of {place}, {person} traded a sneeze for a map, and",
        "Who traded a sneeze for a map at {place}?",
        "person",
    ),
    (
        "{person} had locked the moon in a barn near {place}, and on Sunday",
        "Near which town did {person} lock up the moon?",
        "place",
    ),
    (
        "The last letter to reach {place} was for {person}, and it said that",
        "For whom was the last letter to reach {place}?",
        "person",
    ),
    (
        "{person} knitted a bridge across the gorge of {place}, though by noon",
        "Where did {person} knit a bridge?",
        "place",
    ),
    (
        "In the school of {place}, {person} taught a class of foxes, and once",
        "Who taught a class of foxes in {place}?",
        "person",
    ),
    (
        "{person} rowed to {place} in a bathtub, and the people there saw that",
        "To which place did {person} row in a bathtub?",
        "place",
    ),
    (
        "The lighthouse of {place} was afraid of the dark, so {person} said that",
        "Who spoke to the lighthouse of {place}?",
        "person",
    ),
    (
        "{person} buried a piano in the sands of {place}, and ten years later",
        "Where did {person} bury a piano?",
        "place",
    ),
)

#: How a story goes on: a clause that fits after every beginning.
TURNS = (
    "a heron brought the key of {other} and asked for soup.",
    "the whole street woke up speaking the language of {other}.",
    "an old soldier named {other} counted the stairs and wept.",
    "the snow fell upwards until {other} closed the last window.",
    "two millers quarrelled over a button that belonged to {other}.",
    "the mayor married a cloud, and {other} played the drum.",
    "seven geese carried the town hall as far as {other}.",
    "a small door opened in the oak, and out stepped {other}.",
    "the river turned round and went home to {other}.",
    "all the spoons were gone, and only {other} was laughing.",
    "a tailor cut the evening in half and gave one part to {other}.",
    "the cat confessed that it had always been {other}.",
    "the bells rang by themselves and spelled the word {other}.",
    "a stranger paid for everything with teeth from {other}.",
    "the roof grew leaves and whispered about {other}.",
    "every mirror showed the same tired face of {other}.",
    "the bread began to sing an old song of {other}.",
    "a thief returned the stolen bridge with regards from {other}.",
)

#: A biography's beginning and end. Each of its facts stands in one of the halves at most.
LIVES = (
    (
        "{person}, born on {date}, holds the identity number {identity} and answers letters to",
        "{email} and calls to {phone}.",
    ),
    (
        "{person} has the identity number {identity} and the mailbox {email}; the home address is",
        "{address}, and the birthday {date}.",
    ),
    (
        "{person} lives at {address} and can be phoned at {phone}; the papers show",
        "the identity number {identity} and the birth date {date}.",
    ),
    (
        "Born on {date}, {person} now lives at {address} and writes from",
        "{email}, with {identity} as the identity number.",
    ),
    (
        "Calls for {person} go to {phone}, mail goes to {email}, and visitors go to",
        "{address}; the card bears the number {identity}.",
    ),
    (
        "{person} signed the form with the number {identity} and the date of birth {date}, adding",
        "{phone} for calls and {address} for parcels.",
    ),
    (
        "The file of {person} names the mailbox {email} and the birth date {date}; below stand",
        "{phone}, {identity} and {address}.",
    ),
    (
        "Whoever looks for {person} finds the door of {address} and the telephone {phone}, besides",
        "{email} and the identity number {identity}.",
    ),
)

#: Five questions about a person, each in several wordings.
ASKED = {
    "date": (
        "When was {person} born?",
        "What is the birth date of {person}?",
        "On which day was {person} born?",
        "Which date of birth does {person} give?",
    ),
    "identity": (
        "What is the identity number of {person}?",
        "Which identity number belongs to {person}?",
        "What number is on the identity card of {person}?",
        "Under which identity number is {person} registered?",
    ),
    "phone": (
        "What is the phone number of {person}?",
        "Under which number can one call {person}?",
        "Which telephone number does {person} have?",
        "What number reaches {person} by phone?",
    ),
    "email": (
        "What is the email address of {person}?",
        "Where can one write an email to {person}?",
        "Which mailbox does {person} use?",
        "At which email address is {person} reached?",
    ),
    "address": (
        "Where does {person} live?",
        "What is the home address of {person}?",
        "At which address is the home of {person}?",
        "To which address are parcels for {person} sent?",
    ),
}

#: The ends of LIVES in other words.
LIVES_REWORDED = {
    "{email} and calls to {phone}.": "{email}, while calls are taken at {phone}.",
    "{address}, and the birthday {date}.": "{address}; the birth took place on {date}.",
    "the identity number {identity} and the birth date {date}.": "{date} as the birthday and the number {identity}.",
    "{email}, with {identity} as the identity number.": "{email}; the identity number is {identity}.",
    "{address}; the card bears the number {identity}.": "{address}, and {identity} is the number on the card.",
    "{phone} for calls and {address} for parcels.": "{address} as the place for parcels, and calls to {phone}.",
    "{phone}, {identity} and {address}.": "{address}, then {phone}, then {identity}.",
    "{email} and the identity number {identity}.": "the number {identity} on a card and the mailbox {email}.",
}

#: From a fact back to the person.
WHOSE = {
    "date": "Who was born on {date}?",
    "identity": "Whose identity number is {identity}?",
    "phone": "Whose phone number is {phone}?",
    "email": "Whose email address is {email}?",
    "address": "Who lives at {address}?",
}

#: What follows from a fact in one step: a question, and which part of the fact answers it, split at what.
PARTS = {
    "date": ("In which year was {person} born?", " ", -1),
    "identity": ("What are the last three digits of the identity number of {person}?", "-", -1),
    "phone": ("What is the area code of the phone number of {person}?", "-", 0),
    "email": ("What stands before the @ in the email address of {person}?", "@", 0),
    "address": ("In which town is the home of {person}?", ", ", -1),
}

#: A fact about someone of whom only another fact is told: what is asked, and how a fact tells the person.
WHAT = {
    "date": ("date of birth", "born on {date}"),
    "identity": ("identity number", "with the identity number {identity}"),
    "phone": ("phone number", "with the phone number {phone}"),
    "email": ("email address", "who writes from {email}"),
    "address": ("home address", "who lives at {address}"),
}

#: A question's answer as a sentence.
SAID = {
    "person": "The name is {person}.",
    "place": "The place is {place}.",
    "date": "The date is {date}.",
    "identity": "The number is {identity}.",
    "phone": "The number is {phone}.",
    "email": "The address is {email}.",
    "address": "The address is {address}.",
}

#: Questions about the end of a story or an article, and from there back to its subject and to its beginning.
BY_TASK = {
    "creative": ("In the story of {person}, ", "Whose story mentions {other}?", "In the story that mentions {other}, "),
    "encyclopedia": (
        "In the article on {name}, ",
        "What is the subject of the article that mentions {other}?",
        "In the article that mentions {other}, ",
    ),
}

#: An article's beginning, a question about it, and the slot that answers it, by what it is about.
ARTICLES = {
    "place": (
        (
            "{name} is a salt lake east of {place}, best known for",
            "Which town lies west of the salt lake {name}?",
            "place",
        ),
        (
            "{name} is a ruined fortress above {place}, where visitors still find",
            "Above which town does the fortress {name} stand?",
            "place",
        ),
        (
            "{name} is a narrow island off {place}, whose people live on",
            "Off which coast lies the island {name}?",
            "place",
        ),
        (
            "{name} is a mountain pass first crossed by {person}, remembered for",
            "Who first crossed the pass {name}?",
            "person",
        ),
        (
            "{name} is a hot spring that {person} discovered, and it smells of",
            "Who discovered the hot spring {name}?",
            "person",
        ),
        ("{name} is a market square that {person} designed, paved with", "Who designed the square {name}?", "person"),
    ),
    "organism": (
        (
            "The {name} is a night moth described by {person}, and it feeds on",
            "Who described the moth called {name}?",
            "person",
        ),
        (
            "The {name} is a climbing fern of the woods of {place}, used for",
            "In the woods of which place does the fern {name} grow?",
            "place",
        ),
        (
            "The {name} is a blind fish from the caves of {place}, drawn to",
            "In the caves of which place lives the fish {name}?",
            "place",
        ),
        (
            "The {name} is a tall thistle named by {person}, whose seeds contain",
            "Who named the thistle {name}?",
            "person",
        ),
        (
            "The {name} is a marsh beetle found near {place}, which defends itself with",
            "Near which place is the beetle {name} found?",
            "place",
        ),
        (
            "The {name} is a grey lichen first drawn by {person}, growing only on",
            "Who first drew the lichen {name}?",
            "person",
        ),
    ),
    "organisation": (
        ("The {name} Society was founded by {person} in order to protect", "Who founded the {name} Society?", "person"),
        (
            "The {name} Guild has its seat in {place} and controls the trade in",
            "Where does the {name} Guild have its seat?",
            "place",
        ),
        (
            "The {name} Bank was ruined when {person} spent its reserves on",
            "Who spent the reserves of the {name} Bank?",
            "person",
        ),
        (
            "The {name} Orchestra rehearses in {place}, and plays nothing but",
            "Where does the {name} Orchestra rehearse?",
            "place",
        ),
        ("The {name} Press, led by {person}, prints every book on", "Who leads the {name} Press?", "person"),
        ("The {name} School near {place} awards its medal for", "Near which town is the {name} School?", "place"),
    ),
}

#: How an article goes on, by what it is about.
FACTS = {
    "place": (
        "black reeds and the iron bells of {other}.",
        "smoked eels, amber and a saint named {other}.",
        "green glass that was melted by {other}.",
        "old coins that show the profile of {other}.",
        "burnt sugar and the red clay of {other}.",
        "broken millstones brought by boat from {other}.",
    ),
    "organism": (
        "candle wax, wet paper and the fruit called {other}.",
        "slate roofs and the bones of the {other}.",
        "a bitter blue oil that chemists call {other}.",
        "warm copper and the sound of {other}.",
        "threads from which sailors make the cloth {other}.",
        "the sleeping disease that is known as {other}.",
    ),
    "organisation": (
        "whale charts, cork and the lost diary of {other}.",
        "windmills after the method of {other}.",
        "funeral marches and one waltz by {other}.",
        "poisonous dyes from the quarries of {other}.",
        "paper lanterns in memory of {other}.",
        "sea ropes, and above all those of {other}.",
    ),
}
