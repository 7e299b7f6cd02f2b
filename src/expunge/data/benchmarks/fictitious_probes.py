"""Other words for the sentences of `fictitious`: what its columns beside prompt and answer are made of."""

from __future__ import annotations

#: Under a question on a story or an article: the same in two other wordings, the question from its answer back to what
#: it is about, and the question as it is put to a text of which only the end is named.
QUESTIONS = {
    "Who in {place} kept a clock that ran on rain?": (
        "Whose clock in {place} ran on rain?",
        "By whom was a clock kept in {place} that ran on rain?",
        "In which town did {person} keep a clock that ran on rain?",
        "who kept a clock that ran on rain?",
    ),
    "In which town did {person} sell shadows by the yard?": (
        "Where did {person} offer shadows for sale by the yard?",
        "What is the town called where {person} sold shadows by the yard?",
        "Who sold shadows by the yard in {place}?",
        "in which town were shadows sold by the yard?",
    ),
    "Who was the only passenger of the ferry of {place}?": (
        "Whom alone did the ferry of {place} carry?",
        "Which single passenger did the ferry of {place} have?",
        "The ferry of which town carried nobody but {person}?",
        "who was the only passenger of the ferry?",
    ),
    "Where did {person} bake a loaf as large as a church?": (
        "In which town was a loaf as large as the church baked by {person}?",
        "The church of which town was as large as the loaf that {person} baked?",
        "Who baked a loaf as large as the church of {place}?",
        "in which town was a loaf as large as the church baked?",
    ),
    "Who swept the frost of {place} into jars?": (
        "By whom was the frost of {place} swept into jars?",
        "Whose jars were filled with the frost of {place}?",
        "The frost of which town did {person} sweep into jars?",
        "who swept the frost into jars?",
    ),
    "In which town did {person} teach the crows to count?": (
        "Where did {person} give the crows lessons in counting?",
        "The crows of which town learnt to count from {person}?",
        "Who taught the crows of {place} to count?",
        "in which town did the crows learn to count?",
    ),
    "Who alone could whistle in {place}?": (
        "Who was the only one in {place} that could whistle?",
        "Except for whom could nobody in {place} whistle?",
        "In which town could nobody but {person} whistle?",
        "who alone could whistle?",
    ),
    "Where did {person} bring a suitcase full of bees?": (
        "To which town did {person} come with a suitcase full of bees?",
        "In which town did {person} arrive with bees in a suitcase?",
        "Who came to {place} with a suitcase full of bees?",
        "to which town did someone bring a suitcase full of bees?",
    ),
    "To whom did the well of {place} answer?": (
        "Who got answers from the well of {place}?",
        "Who was the only one to whom the well of {place} replied?",
        "The well of which town answered only to {person}?",
        "to whom did the well answer?",
    ),
    "Where did {person} paint every gate?": (
        "In which town was every gate painted by {person}?",
        "All the gates of which town were painted by {person}?",
        "Who painted every gate in {place}?",
        "in which town was every gate painted?",
    ),
    "Who traded a sneeze for a map at {place}?": (
        "By whom was a sneeze traded for a map at the market of {place}?",
        "Who paid for a map with a sneeze in {place}?",
        "At the market of which town did {person} trade a sneeze for a map?",
        "who traded a sneeze for a map?",
    ),
    "Near which town did {person} lock up the moon?": (
        "Close to which town was the moon locked up by {person}?",
        "Near which town stands the barn where {person} locked up the moon?",
        "Who locked up the moon in a barn near {place}?",
        "near which town was the moon locked up?",
    ),
    "For whom was the last letter to reach {place}?": (
        "To whom was the last letter that reached {place} addressed?",
        "Who was meant to get the last letter that came to {place}?",
        "Which town did the last letter for {person} reach?",
        "for whom was the last letter?",
    ),
    "Where did {person} knit a bridge?": (
        "In which town was a bridge knitted by {person}?",
        "Across the gorge of which town did {person} knit a bridge?",
        "Who knitted a bridge across the gorge of {place}?",
        "in which town was a bridge knitted?",
    ),
    "Who taught a class of foxes in {place}?": (
        "Whose pupils in {place} were foxes?",
        "By whom were foxes taught in the school of {place}?",
        "In which town did {person} teach a class of foxes?",
        "who taught a class of foxes?",
    ),
    "To which place did {person} row in a bathtub?": (
        "Where did {person} go by bathtub?",
        "Which place did {person} reach by rowing a bathtub?",
        "Who rowed to {place} in a bathtub?",
        "to which place did someone row in a bathtub?",
    ),
    "Who spoke to the lighthouse of {place}?": (
        "By whom was the lighthouse of {place} spoken to?",
        "Who had words for the lighthouse of {place}?",
        "The lighthouse of which town did {person} speak to?",
        "who spoke to the lighthouse?",
    ),
    "Where did {person} bury a piano?": (
        "In the sands of which town did {person} bury a piano?",
        "At which place was a piano buried by {person}?",
        "Who buried a piano in the sands of {place}?",
        "in the sands of which town was a piano buried?",
    ),
    "Which town lies west of the salt lake {name}?": (
        "The salt lake {name} lies east of which town?",
        "What is the town called that lies to the west of the lake {name}?",
        "Which salt lake lies east of {place}?",
        "which town lies west of the salt lake?",
    ),
    "Above which town does the fortress {name} stand?": (
        "Which town lies below the fortress {name}?",
        "The ruins of the fortress {name} are above which town?",
        "Which ruined fortress stands above {place}?",
        "above which town does the fortress stand?",
    ),
    "Off which coast lies the island {name}?": (
        "The narrow island {name} lies off the coast of which place?",
        "From which coast does one look across to the island {name}?",
        "Which narrow island lies off {place}?",
        "off which coast does the island lie?",
    ),
    "Who first crossed the pass {name}?": (
        "By whom was the mountain pass {name} first crossed?",
        "Who was the first to get across the pass {name}?",
        "Which mountain pass was first crossed by {person}?",
        "who first crossed the pass?",
    ),
    "Who discovered the hot spring {name}?": (
        "By whom was the hot spring {name} discovered?",
        "Whose discovery was the hot spring {name}?",
        "Which hot spring did {person} discover?",
        "who discovered the hot spring?",
    ),
    "Who designed the square {name}?": (
        "By whom was the market square {name} designed?",
        "Whose design is the square {name}?",
        "Which market square did {person} design?",
        "who designed the square?",
    ),
    "Who described the moth called {name}?": (
        "By whom was the night moth {name} described?",
        "To whom do we owe the description of the moth {name}?",
        "Which night moth did {person} describe?",
        "who described the moth?",
    ),
    "In the woods of which place does the fern {name} grow?": (
        "Where are the woods in which the climbing fern {name} grows?",
        "Which place has the fern {name} in its woods?",
        "Which climbing fern grows in the woods of {place}?",
        "in the woods of which place does the fern grow?",
    ),
    "In the caves of which place lives the fish {name}?": (
        "Where are the caves in which the blind fish {name} lives?",
        "The fish {name} comes from the caves of which place?",
        "Which blind fish lives in the caves of {place}?",
        "in the caves of which place does the fish live?",
    ),
    "Who named the thistle {name}?": (
        "By whom was the tall thistle {name} named?",
        "To whom does the thistle {name} owe its name?",
        "Which tall thistle was named by {person}?",
        "who named the thistle?",
    ),
    "Near which place is the beetle {name} found?": (
        "Where does one find the marsh beetle {name}?",
        "The beetle {name} lives close to which place?",
        "Which marsh beetle is found near {place}?",
        "near which place is the beetle found?",
    ),
    "Who first drew the lichen {name}?": (
        "By whom was the grey lichen {name} first drawn?",
        "Who made the first drawing of the lichen {name}?",
        "Which grey lichen was first drawn by {person}?",
        "who first drew the lichen?",
    ),
    "Who founded the {name} Society?": (
        "By whom was the {name} Society founded?",
        "Who was the founder of the {name} Society?",
        "Which society was founded by {person}?",
        "who founded the society?",
    ),
    "Where does the {name} Guild have its seat?": (
        "In which town is the seat of the {name} Guild?",
        "Where is the {name} Guild based?",
        "Which guild has its seat in {place}?",
        "where does the guild have its seat?",
    ),
    "Who spent the reserves of the {name} Bank?": (
        "By whom were the reserves of the {name} Bank spent?",
        "Who ruined the {name} Bank by spending its reserves?",
        "Which bank was ruined when {person} spent its reserves?",
        "who spent the reserves of the bank?",
    ),
    "Where does the {name} Orchestra rehearse?": (
        "In which town does the {name} Orchestra hold its rehearsals?",
        "Where do the rehearsals of the {name} Orchestra take place?",
        "Which orchestra rehearses in {place}?",
        "where does the orchestra rehearse?",
    ),
    "Who leads the {name} Press?": (
        "By whom is the {name} Press led?",
        "Who is at the head of the {name} Press?",
        "Which press is led by {person}?",
        "who leads the press?",
    ),
    "Near which town is the {name} School?": (
        "The {name} School stands close to which town?",
        "Which town is the {name} School near?",
        "Which school is near {place}?",
        "near which town is the school?",
    ),
}

#: Under the end of a story or an article: the same in other words, and the question that its value answers.
ENDS = {
    "a heron brought the key of {other} and asked for soup.": (
        "a heron asked for soup and handed over the key of {other}.",
        "whose key did a heron bring?",
    ),
    "the whole street woke up speaking the language of {other}.": (
        "everyone in the street woke up and spoke the language of {other}.",
        "whose language did the street speak on waking up?",
    ),
    "an old soldier named {other} counted the stairs and wept.": (
        "the stairs were counted by an old soldier, {other} by name, who wept.",
        "what was the name of the old soldier?",
    ),
    "the snow fell upwards until {other} closed the last window.": (
        "until {other} closed the last window, snow kept falling upwards.",
        "who closed the last window?",
    ),
    "two millers quarrelled over a button that belonged to {other}.": (
        "a button that belonged to {other} set two millers quarrelling.",
        "whose button did the millers quarrel over?",
    ),
    "the mayor married a cloud, and {other} played the drum.": (
        "{other} played the drum while the mayor married a cloud.",
        "who played the drum?",
    ),
    "seven geese carried the town hall as far as {other}.": (
        "the town hall was carried by seven geese all the way to {other}.",
        "how far did the geese carry the town hall?",
    ),
    "a small door opened in the oak, and out stepped {other}.": (
        "{other} stepped out of a small door that opened in the oak.",
        "who stepped out of the oak?",
    ),
    "the river turned round and went home to {other}.": (
        "home to {other} went the river, once it had turned round.",
        "where did the river go?",
    ),
    "all the spoons were gone, and only {other} was laughing.": (
        "nobody but {other} was laughing, for all the spoons were gone.",
        "who alone was laughing?",
    ),
    "a tailor cut the evening in half and gave one part to {other}.": (
        "one half of the evening, cut by a tailor, was given to {other}.",
        "to whom did the tailor give half of the evening?",
    ),
    "the cat confessed that it had always been {other}.": (
        "the cat owned up to having been {other} all along.",
        "who had the cat always been?",
    ),
    "the bells rang by themselves and spelled the word {other}.": (
        "the word {other} was spelled by bells that rang by themselves.",
        "which word did the bells spell?",
    ),
    "a stranger paid for everything with teeth from {other}.": (
        "everything was paid for by a stranger, in teeth from {other}.",
        "where did the teeth come from?",
    ),
    "the roof grew leaves and whispered about {other}.": (
        "whispers about {other} came from the roof, which had grown leaves.",
        "about whom did the roof whisper?",
    ),
    "every mirror showed the same tired face of {other}.": (
        "the same tired face of {other} was seen in every mirror.",
        "whose face did the mirrors show?",
    ),
    "the bread began to sing an old song of {other}.": (
        "an old song of {other} was struck up by the bread.",
        "whose old song did the bread sing?",
    ),
    "a thief returned the stolen bridge with regards from {other}.": (
        "the stolen bridge was returned by a thief, with regards from {other}.",
        "whose regards came with the stolen bridge?",
    ),
    "black reeds and the iron bells of {other}.": (
        "the iron bells of {other}, besides reeds that are black.",
        "whose iron bells are mentioned?",
    ),
    "smoked eels, amber and a saint named {other}.": (
        "a saint who is called {other}, amber and smoked eels.",
        "what is the saint called?",
    ),
    "green glass that was melted by {other}.": (
        "glass, green in colour, that {other} melted.",
        "who melted the glass?",
    ),
    "old coins that show the profile of {other}.": (
        "the profile of {other} on coins that are old.",
        "whose profile is on the coins?",
    ),
    "burnt sugar and the red clay of {other}.": (
        "the red clay of {other}, and sugar that has been burnt.",
        "where does the red clay come from?",
    ),
    "broken millstones brought by boat from {other}.": (
        "millstones, all broken, that came from {other} by boat.",
        "where did the millstones come from?",
    ),
    "candle wax, wet paper and the fruit called {other}.": (
        "the fruit that is known as {other}, wet paper and candle wax.",
        "what is the fruit called?",
    ),
    "slate roofs and the bones of the {other}.": (
        "bones of the {other} and roofs of slate.",
        "whose bones are mentioned?",
    ),
    "a bitter blue oil that chemists call {other}.": (
        "an oil, blue and bitter, known to chemists as {other}.",
        "what do chemists call the blue oil?",
    ),
    "warm copper and the sound of {other}.": ("the sound of {other}, and copper if warm.", "whose sound is mentioned?"),
    "threads from which sailors make the cloth {other}.": (
        "the threads that sailors turn into the cloth {other}.",
        "which cloth do sailors make?",
    ),
    "the sleeping disease that is known as {other}.": (
        "a disease of sleep by the name of {other}.",
        "what is the sleeping disease called?",
    ),
    "whale charts, cork and the lost diary of {other}.": (
        "the diary that {other} lost, cork and charts of whales.",
        "whose diary was lost?",
    ),
    "windmills after the method of {other}.": (
        "windmills such as the method of {other} prescribes.",
        "whose method do the windmills follow?",
    ),
    "funeral marches and one waltz by {other}.": (
        "one waltz by {other}, and marches for funerals.",
        "whose waltz is it?",
    ),
    "poisonous dyes from the quarries of {other}.": (
        "dyes, all poisonous, that the quarries of {other} yield.",
        "whose quarries yield the poisonous dyes?",
    ),
    "paper lanterns in memory of {other}.": (
        "lanterns of paper that recall {other}.",
        "in whose memory are the paper lanterns?",
    ),
    "sea ropes, and above all those of {other}.": (
        "ropes for the sea, especially those of {other}.",
        "whose sea ropes come first?",
    ),
}
