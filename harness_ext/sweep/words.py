"""The word lists that haystacks, keys and values are made of.

Two vocabularies that share no word: `NAMES_*` for what is asked (keys, word values, passages to copy), the rest for
running text. So nothing that is asked can turn up in the filler by chance.
"""

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""Filler of the passkey task, word for word: Mohtashami & Jaggi, Landmark Attention (arXiv 2305.16300), appendix."""

ADJECTIVES = tuple("old young tall quiet busy clever gentle brave careful famous honest lonely proud simple strange wise".split())
PEOPLE = tuple(
    "farmer teacher sailor baker doctor painter child soldier merchant singer writer gardener driver hunter poet judge".split()
)
VERBS = tuple(
    "carried found watched opened closed moved bought sold painted cleaned carved lifted borrowed hid mended counted".split()
)
THINGS = tuple("box letter basket lamp door chair book coat wheel table ladder rope bell drum mirror kettle".split())
PLACES = tuple(
    "market river bridge village harbour station church school forest castle field tower garden mill library road".split()
)
PREPOSITIONS = tuple("near behind beside beyond at by".split())
TIMES = tuple("morning evening winter summer spring autumn night afternoon".split())

NAMES_ADJECTIVES = tuple(
    (
        "amber brisk calm dusty eager faint grand happy icy jolly keen lucky mellow noble odd pale quick rusty shiny tiny "
        "urban vivid warm bold crisp dense early fresh giant humble lively silent"
    ).split()
)
NAMES_NOUNS = tuple(
    (
        "anchor apple badge banjo barrel beetle blanket bottle bucket butter button cactus camel candle canyon carpet cedar "
        "circle cloud comet copper coral cotton cradle crystal dagger dragon eagle engine feather fiddle flute fountain "
        "ginger glacier guitar hammer helmet honey island jacket jungle kernel lantern lemon lizard magnet marble meadow "
        "melon monkey needle ocean olive orbit otter panda parrot pepper pillow pirate planet rocket silver"
    ).split()
)
