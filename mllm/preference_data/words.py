"""The closed word classes of English that the offline masker knows. Whatever is in none of them counts as a thing.

Lower case; a phrase of several words is written with single blanks.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _phrases(text: str) -> frozenset[str]:
    return frozenset(" ".join(phrase.split()) for phrase in text.split(","))


COLOURS = _words("""
    red orange yellow green blue purple violet pink brown black white grey gray silver gold golden beige tan cream
    turquoise teal cyan magenta maroon navy olive lavender crimson scarlet indigo khaki ivory bronze copper reddish
    greenish bluish yellowish brownish blonde blond colourful colorful multicolored multicoloured colourless
""")

NUMBERS = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million
    first second third fourth fifth sixth seventh eighth ninth tenth dozen dozens single double triple pair couple
    several many few multiple numerous half
""")

ATTRIBUTES = _words("""
    big small large little tiny huge giant massive enormous tall short long wide narrow thick thin high low deep
    shallow old young new modern ancient vintage antique elderly fresh clean dirty dusty wet dry empty full open closed
    broken round square circular rectangular oval triangular curved straight flat sharp pointed curly wavy bald bearded
    fluffy furry hairy smooth rough soft hard shiny glossy matte transparent striped spotted dotted plaid checkered
    checked patterned plain bright dark light dim pale vivid vibrant colored coloured sunny cloudy rainy snowy foggy
    stormy clear wooden metal metallic plastic glass leather stone brick concrete ceramic paper cotton woolen denim
    steel rusty happy sad angry smiling calm relaxed excited surprised serious tired sleepy focused playful busy
    crowded quiet hot cold warm cool frozen ripe raw cooked sliced baked fried grilled delicious leafy bare grassy
    rocky sandy muddy paved indoor outdoor urban rural professional casual formal traditional wild domestic cute
    beautiful pretty lovely ugly elegant stylish cozy comfortable spacious tidy messy cluttered neat male female adult
    baby heavy solid hollow upright horizontal vertical diagonal parked topped filled dressed decorated painted covered
    tilted folded stacked scattered lit unlit
""")

RELATIONS = _phrases("""
    next to, close to, on top of, in front of, in back of, in the middle of, in the center of, in the centre of,
    at the top of, at the bottom of, at the back of, at the front of, on the side of, on the edge of, at the edge of,
    to the left of, to the right of, on the left of, on the right of, on the left side of, on the right side of,
    to the left, to the right, on the left, on the right, on the left side, on the right side, far from, away from,
    top left, top right, top centre, top center, bottom left, bottom right, bottom centre, bottom center, middle left,
    middle right, middle centre, middle center, upper left, upper right, lower left, lower right, left, right, top,
    bottom, middle, centre, center, upper, lower, behind, beside, besides, under, underneath, beneath, below, above,
    over, between, among, near, nearby, inside, outside, around, across, against, along, alongside, through, opposite,
    toward, towards, adjacent to, surrounded by, attached to, connected to, covered with, covered by, filled with,
    made of, in the background, in the foreground, in the distance, upside down, side by side, face to face, apart,
    together, larger than, smaller than, bigger than, taller than, shorter than, more than, less than, fewer than
""")

ACTIONS = _words("""
    standing sitting lying laying walking running jumping riding holding carrying wearing eating drinking playing
    looking watching reading writing talking speaking smiling laughing sleeping resting flying swimming skiing surfing
    snowboarding skateboarding skating cycling driving pulling pushing throwing catching hitting kicking swinging
    reaching touching leaning hanging climbing crossing passing waiting posing working cooking cutting pouring serving
    preparing cleaning washing brushing feeding petting grazing chasing following leading facing pointing bending
    kneeling crouching stretching dancing singing performing competing racing moving traveling travelling parking
    floating sailing landing growing blooming burning shining falling rising opening closing using taking making
    placing placed seated perched positioned mounted gathered enjoying stands sits lies walks runs jumps rides holds
    carries wears eats drinks plays looks watches reads writes sleeps rests flies swims drives pulls pushes throws
    catches hits kicks swings reaches touches leans hangs climbs crosses waits works cooks cuts pours grazes chases
    follows leads faces points floats stood sat lay walked ran jumped rode held carried wore ate played looked watched
    flew swam leaned hung climbed
""")

ANSWERS = _words("yes no yeah nope")
"""An answer that begins with one of these says whether something is seen."""

OPENERS = _words("""
    and or but with without while which who that is are was were has have as because
""")
"""Words behind which something new is said: between two attributes "and" may stand, but not behind a thing."""

ARTICLES = _words("a an")
"""Masked with the words that they stand before, whose first letter they would give away."""

KEPT = _words("""
    the a an this that these those some any no every each all both either neither another other others such same i you
    he she it we they me him her us them my your his its our their mine yours hers ours theirs myself himself herself
    itself themselves who whom whose which what where when why how someone somebody something anyone anything everyone
    everything nobody nothing one's there here then now be is are was were been being am isn't aren't wasn't weren't
    it's there's that's he's she's they're has have had having hasn't haven't do does did doing done don't doesn't
    didn't can cannot can't could may might must shall should will would won't seem seems seemed appear appears
    appeared appearing become becomes get gets getting give gives giving given make makes made let lets suggest
    suggests suggesting indicate indicates indicating imply implies show shows showing shown depict depicts depicting
    depicted feature features featuring featured display displays displaying displayed capture captures capturing
    captured contain contains containing include includes including included present presents describe describes
    described see sees seen seeing visible create creates creating add adds adding consist consists found find finds
    stand sit say says and or but nor so yet if because as while although though since unless until whether than
    however also too either of in on at by for from to with without within into onto out off up down about like per via
    during before after upon except despite not very quite rather more most less least much just only even still
    already again almost always often sometimes perhaps maybe possibly likely overall etc well image images picture
    pictures photo photos photograph photographs scene scenes view shot description depiction illustration part parts
    way kind kinds type types sort lot lots bit variety number numbers set addition
""")
"""Words that are never masked: they hold a sentence together, or speak of the picture as such."""

NO_ADVERBS = _words("""
    family butterfly fly jelly belly lily curly holly bully rally ally assembly supply reply trolley hilly wooly woolly
    italy monopoly anomaly dragonfly
""")
"""Words in -ly that name or describe a thing; the others say how something is done, and stay."""
