"""OCR: words and random strings in several fonts, sizes, places and colours."""

import random

from PIL import Image

from mm_jax.data.quickstart.glyphs import draw_text, extent, fit, random_font
from mm_jax.data.quickstart.paint import ink_and_paper
from mm_jax.data.quickstart.sample import Mark, Picture, Sample, Turn, pick, split_of

WORDS = tuple(
    """
    able air all and animal ant apple arm art ask aunt away baby back bad bag ball band bank base bath
    beach bean bear bed bee bell best big bike bird black block blue boat body bone book both bottle
    bowl box boy branch brave bread brick bridge bring broad brown brush bus busy butter button cake
    call calm camp can cap car card carry cat cave chair chalk cheese chest chin city clay clean clear
    climb clock cloth cloud coal coat coin cold cook cool copy corn cost cough count cow crowd crown cry
    cup curve cut dance dark day deep deer desk dish dog door down dream dress drink drive drop dry duck
    dust eagle ear early earth east easy eat edge egg eight elbow empty end enjoy even eye face fact
    fall family farm fast father feet fence field finger fire fish five flag flat floor flour flower fly
    fog foot forest fork four fox fresh friend frog fruit full game garden gate giant gift girl glad
    glass glove go goat gold good grape grass green ground group grow guess hair half hall hammer hand
    happy hard hat head hear heart heavy help hen hill hold home honey hope horse hot hotel house hungry
    ice idea ink iron island jacket jam job join juice jump just keep kettle key kick kind king kitchen
    kite knee knife lake lamp land large laugh leaf learn left leg lemon letter light line lion lip list
    long look loud love low lunch make man many map mark market match meal meat metal milk mind mirror
    money monkey month moon mother mouse mouth move music nail name near neck nest never new night nine
    noise north nose number ocean off oil old one onion open orange oven over owl page paint pair pan
    paper park path pen pencil pepper piano pig pilot pink place plane plant plate play pocket point
    pond poor potato pull purple push queen quick quiet quilt rabbit rain read red rest rice rich ride
    right ring river road rock roof room root rope rose round run sad safe sail salt sand school sea
    seat seed seven shadow sharp sheep ship shirt shoe shop short show sign silver sing sister six skin
    sky sleep slow small smile snow soap sock soft song soup south spoon spring square stamp star stone
    street sugar summer sun sweet swim table tail tall tea ten tent thin three ticket tiger time tiny
    tool tooth top town toy train travel tree truck turn two uncle up van very view village voice walk
    wall warm wash watch water wave wax way week west wet wheel white wide wind window wing winter wolf
    wood wool word work world yard year yellow yes you young zebra zero zoo
    """.split()
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
READ = (
    "what is written here?",
    "read the text.",
    "which word is this?",
    "what does it say?",
    "what word do you see?",
)
TOP = ("what is the top word?", "read the upper word.")
BOTTOM = ("what is the bottom word?", "read the lower word.")


def in_split(text: str, split: str) -> bool:
    """Words of validation and test are never seen in the pictures of training."""
    return split_of(f"word {text}") == split


def draw_word(rng: random.Random, split: str) -> str:
    """A word of the list, or as often random letters, which can be read but not guessed."""
    real = rng.random() < 0.5
    while True:
        if real:
            text = rng.choice(WORDS)
        else:
            text = "".join(rng.choices(LETTERS, k=rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7))))
        if (real or text not in WORDS) and in_split(text, split):
            return text


def word_picture(rng: random.Random, lines: list[str]) -> Picture:
    """The words one below the other; the longest takes 60..95 % of the picture's width."""
    width = rng.randint(64, 128)
    height = rng.randint(max(48, width // 2), width)
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (width, height), paper)
    band, marks = height / len(lines), []
    name = random_font(rng)
    room = (width * rng.uniform(0.6, 0.95), min(band * 0.85, 44))
    size = min(fit(name, text, *room) for text in lines)
    for k, text in enumerate(lines):
        left, top, right, bottom = extent(name, size, text)
        free_x, free_y = width - (right - left), band - (bottom - top)
        x, y = free_x * rng.uniform(0.03, 0.97), band * k + free_y * rng.uniform(0.1, 0.9)
        marks += [
            Mark(f"{mark.label} _place_{i} _line_{k}", mark.box)
            for i, mark in enumerate(draw_text(image, text, x, y, name, size, ink))
        ]
    return Picture(image, tuple(marks))


def ocr(rng: random.Random, split: str, index: int) -> Sample:
    """One word; every fourth record of training has two."""
    if split == "train" and index % 4 == 3:
        lines = [draw_word(rng, split), draw_word(rng, split)]
        turns = [Turn("ocr", pick(rng, TOP), lines[0]), Turn("ocr", pick(rng, BOTTOM), lines[1])]
        rng.shuffle(turns)
    else:
        lines = [draw_word(rng, split)]
        turns = [Turn("ocr", pick(rng, READ), lines[0])]
    return Sample(tuple(turns), (word_picture(rng, lines),))
