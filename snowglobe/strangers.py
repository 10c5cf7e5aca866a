"""What nobody in the snowglobe has seen: new kinds, and single things that look like no other of
their kind. They are in no world; taught.py draws them, to teach them from a few pictures.

Each has two halves: recipes were tuned on TUNING, and REPORTED is measured.
"""

from contextlib import contextmanager

from snowglobe.kinds import (
    COLOURS,
    GLASS,
    GOLD,
    INK,
    KINDS,
    WHITE,
    WOOD,
    Kind,
    draw_cake,
    draw_car,
    draw_cat,
    draw_dog,
    draw_elephant,
    draw_guitar,
    draw_horse,
    draw_house,
    draw_rabbit,
    draw_robot,
    draw_truck,
    draw_turtle,
    shade,
)

RED, BLUE, GREEN, PINK = (COLOURS[name] for name in ("red", "blue", "green", "pink"))
STRANGERS: dict[str, Kind] = {}
CLASSES = {}  # {name: the known word for it, with its article}


def stranger(name, known, sky=False, big=False):
    """Registers a drawing function, which gets a Pen alone. known: the class word, "a bird"."""
    def register(draw):
        kind = Kind(lambda pen, colour: draw(pen), ((name, name),), "", False, sky, 0.0, big)
        STRANGERS[name], CLASSES[name] = kind, known
        return draw
    return register


# ---------------------------------------------------------------------------------------- new kinds

@stranger("octopus", "a fish")
def draw_octopus(pen):
    for i in range(6):
        x, out = 0.2 + 0.12 * i, 0.02 * (i - 2.5)
        pen.line((150, 70, 150), 0.07, x, 0.5, x + 3 * out, 0.78, x + out, 0.97)
    pen.oval((172, 86, 170), 0.2, 0.06, 0.8, 0.64)
    for x in (0.4, 0.6):
        pen.oval(WHITE, x - 0.07, 0.3, x + 0.07, 0.44)
        pen.dot(x, 0.38, 0.03)


@stranger("crab", "a turtle")
def draw_crab(pen):
    for side in (-1, 1):
        for i in range(3):
            pen.line((190, 60, 40), 0.04, 0.5 + side * 0.25, 0.66 + i * 0.06, 0.5 + side * 0.46,
                     0.72 + i * 0.1)
        pen.line((190, 60, 40), 0.06, 0.5 + side * 0.24, 0.6, 0.5 + side * 0.38, 0.4)
        pen.oval((226, 84, 60), 0.5 + side * 0.38 - 0.12, 0.2, 0.5 + side * 0.38 + 0.12, 0.44)
        pen.line(INK, 0.03, 0.5 + side * 0.1, 0.52, 0.5 + side * 0.1, 0.4)
        pen.dot(0.5 + side * 0.1, 0.38, 0.045, INK)
    pen.oval((226, 84, 60), 0.2, 0.48, 0.8, 0.9)


@stranger("snail", "a turtle")
def draw_snail(pen):
    pen.box((206, 186, 130), 0.06, 0.8, 0.96, 0.97, 0.08)
    pen.line((206, 186, 130), 0.09, 0.86, 0.86, 0.88, 0.5)
    for x in (0.82, 0.96):
        pen.line((170, 150, 100), 0.03, 0.88, 0.52, x, 0.34)
        pen.dot(x, 0.33, 0.035)
    pen.oval((160, 96, 60), 0.12, 0.3, 0.72, 0.86)
    pen.oval((206, 146, 96), 0.22, 0.4, 0.62, 0.76)
    pen.oval((160, 96, 60), 0.32, 0.5, 0.52, 0.67)


@stranger("lamp", "an umbrella")
def draw_lamp(pen):
    pen.box(INK, 0.3, 0.92, 0.7, 0.99)
    pen.box((90, 90, 96), 0.47, 0.4, 0.53, 0.94)
    pen.poly((255, 236, 150), 0.36, 0.06, 0.64, 0.06, 0.84, 0.44, 0.16, 0.44)
    pen.line((200, 150, 60), 0.03, 0.22, 0.34, 0.78, 0.34)


@stranger("drum", "a cake")
def draw_drum(pen):
    pen.box((30, 110, 130), 0.1, 0.36, 0.9, 0.92, 0.06)
    for i in range(4):
        x = 0.14 + i * 0.19
        pen.line(GOLD, 0.025, x, 0.4, x + 0.09, 0.9, x + 0.18, 0.4)
    pen.oval((244, 236, 214), 0.08, 0.26, 0.92, 0.5)
    pen.line(WOOD, 0.045, 0.2, 0.02, 0.55, 0.34)
    pen.line(WOOD, 0.045, 0.84, 0.02, 0.5, 0.36)


@stranger("helicopter", "an airplane", sky=True)
def draw_helicopter(pen):
    pen.poly((70, 96, 76), 0.0, 0.36, 0.5, 0.46, 0.5, 0.6, 0.04, 0.44)
    pen.box((60, 60, 66), 0.0, 0.24, 0.05, 0.5)
    pen.oval((84, 120, 88), 0.36, 0.34, 0.94, 0.8)
    pen.oval(GLASS, 0.64, 0.4, 0.9, 0.64)
    pen.line(INK, 0.04, 0.62, 0.36, 0.62, 0.2)
    pen.line(INK, 0.035, 0.24, 0.19, 1.0, 0.19)
    pen.line(INK, 0.035, 0.4, 0.92, 0.9, 0.92)
    for x in (0.5, 0.78):
        pen.line(INK, 0.03, x, 0.76, x, 0.92)


@stranger("owl", "a bird")
def draw_owl(pen):
    pen.poly((120, 86, 56), 0.2, 0.3, 0.2, 0.02, 0.42, 0.16)
    pen.poly((120, 86, 56), 0.8, 0.3, 0.8, 0.02, 0.58, 0.16)
    pen.oval((132, 96, 64), 0.16, 0.1, 0.84, 0.96)
    pen.oval((214, 184, 140), 0.3, 0.5, 0.7, 0.92)
    for y in (0.62, 0.74, 0.86):
        pen.line((120, 86, 56), 0.02, 0.38, y, 0.5, y - 0.05, 0.62, y)
    for x in (0.36, 0.64):
        pen.oval((255, 214, 90), x - 0.14, 0.2, x + 0.14, 0.48)
        pen.dot(x, 0.34, 0.07)
    pen.poly((240, 150, 40), 0.45, 0.42, 0.55, 0.42, 0.5, 0.54)


@stranger("frog", "a turtle")
def draw_frog(pen):
    for x in (0.12, 0.62):
        pen.oval((70, 150, 60), x, 0.62, x + 0.28, 0.98)
    pen.oval((104, 190, 76), 0.16, 0.32, 0.84, 0.94)
    pen.oval((214, 236, 160), 0.3, 0.6, 0.7, 0.92)
    for x in (0.3, 0.7):
        pen.oval((104, 190, 76), x - 0.13, 0.14, x + 0.13, 0.42)
        pen.oval(WHITE, x - 0.08, 0.18, x + 0.08, 0.36)
        pen.dot(x, 0.27, 0.045)
    pen.line((180, 50, 60), 0.03, 0.3, 0.5, 0.5, 0.57, 0.7, 0.5)


@stranger("teapot", "an apple")
def draw_teapot(pen):
    pen.line((70, 96, 160), 0.09, 0.78, 0.72, 0.92, 0.5, 1.0, 0.36)
    pen.arc((70, 96, 160), 0.06, 0.02, 0.42, 0.36, 0.84, 80, 290)
    pen.oval((236, 240, 246), 0.16, 0.36, 0.84, 0.96)
    pen.line((70, 96, 160), 0.05, 0.18, 0.66, 0.82, 0.66)
    pen.oval((70, 96, 160), 0.32, 0.28, 0.68, 0.44)
    pen.dot(0.5, 0.25, 0.06, (70, 96, 160))


@stranger("hot air balloon", "a kite", sky=True)
def draw_balloon(pen):
    pen.line(INK, 0.02, 0.3, 0.6, 0.42, 0.84)
    pen.line(INK, 0.02, 0.7, 0.6, 0.58, 0.84)
    pen.oval((220, 70, 70), 0.12, 0.0, 0.88, 0.7)
    pen.oval((250, 220, 110), 0.3, 0.0, 0.7, 0.7)
    pen.oval((220, 70, 70), 0.43, 0.0, 0.57, 0.7)
    pen.box(WOOD, 0.4, 0.84, 0.6, 0.99)


@stranger("spider", "a turtle")
def draw_spider(pen):
    for side in (-1, 1):
        for i in range(4):
            y = 0.5 + i * 0.07
            pen.line(INK, 0.03, 0.5, y, 0.5 + side * 0.3, y - 0.2 + i * 0.08, 0.5 + side * 0.47,
                     0.6 + i * 0.12)
    pen.oval((60, 52, 60), 0.3, 0.44, 0.7, 0.9)
    pen.oval((60, 52, 60), 0.36, 0.24, 0.64, 0.52)
    for x in (0.43, 0.57):
        pen.dot(x, 0.36, 0.04, (230, 50, 50))
    pen.poly((230, 50, 50), 0.44, 0.6, 0.56, 0.6, 0.5, 0.68, 0.56, 0.76, 0.44, 0.76, 0.5, 0.68)


@stranger("piano", "a table", big=True)
def draw_piano(pen):
    pen.box((56, 40, 40), 0.06, 0.1, 0.94, 0.56, 0.03)
    for x in (0.1, 0.8):
        pen.box((56, 40, 40), x, 0.66, x + 0.1, 0.98)
    pen.box((56, 40, 40), 0.02, 0.5, 0.98, 0.74)
    pen.box(WHITE, 0.08, 0.54, 0.92, 0.66)
    for i in range(9):
        pen.box(INK, 0.13 + i * 0.085, 0.54, 0.165 + i * 0.085, 0.61)
    pen.box((240, 234, 220), 0.36, 0.18, 0.64, 0.42)


# --------------------------------------------------------------------------- things with a name

def stripes(pen, colour, x0, x1, *ys):
    for y in ys:
        pen.line(colour, 0.05, x0, y, x1, y)


@stranger("Tom", "a cat")
def draw_tom(pen):
    draw_cat(pen, COLOURS["orange"])
    stripes(pen, WHITE, 0.3, 0.66, 0.68, 0.78)
    stripes(pen, BLUE, 0.24, 0.72, 0.55)
    pen.dot(0.48, 0.61, 0.05, GOLD)


@stranger("Rex", "a dog")
def draw_rex(pen):
    draw_dog(pen, WHITE)
    for x, y, r in ((0.25, 0.58, 0.08), (0.45, 0.68, 0.06), (0.6, 0.55, 0.06), (0.72, 0.24, 0.05)):
        pen.dot(x, y, r, INK)
    stripes(pen, RED, 0.6, 0.78, 0.56)


@stranger("Bella", "a horse")
def draw_bella(pen):
    draw_horse(pen, (220, 190, 150))
    pen.box(PINK, 0.28, 0.38, 0.54, 0.62, 0.03)
    pen.line(PINK, 0.06, 0.56, 0.3, 0.72, 0.36)


@stranger("Bolt", "a robot")
def draw_bolt(pen):
    draw_robot(pen, COLOURS["yellow"])
    pen.poly(INK, 0.54, 0.46, 0.4, 0.64, 0.5, 0.64, 0.45, 0.78, 0.62, 0.58, 0.51, 0.58)
    pen.oval(GREEN, 0.2, 0.02, 0.8, 0.14)


@stranger("Rosie", "a car")
def draw_rosie(pen):
    draw_car(pen, COLOURS["purple"])
    stripes(pen, GOLD, 0.06, 0.94, 0.62, 0.7)
    pen.dot(0.5, 0.6, 0.1, WHITE)


@stranger("Hollow", "a house")
def draw_hollow(pen):
    draw_house(pen, COLOURS["pink"])
    pen.poly(BLUE, 0.02, 0.46, 0.5, 0.02, 0.98, 0.46)
    for x in (0.3, 0.5, 0.7):
        pen.dot(x, 0.36, 0.05, WHITE)


@stranger("Flora", "a rabbit")
def draw_flora(pen):
    draw_rabbit(pen, (190, 190, 196))
    pen.poly(RED, 0.3, 0.5, 0.7, 0.5, 0.5, 0.72)
    pen.dot(0.5, 0.8, 0.06, GOLD)


@stranger("Atlas", "a turtle")
def draw_atlas(pen):
    draw_turtle(pen, COLOURS["green"])
    for x, colour in ((0.3, RED), (0.45, GOLD), (0.6, BLUE)):
        pen.dot(x, 0.48, 0.07, colour)


@stranger("Nelly", "an elephant")
def draw_nelly(pen):
    draw_elephant(pen, COLOURS["blue"])
    pen.box(RED, 0.2, 0.3, 0.5, 0.6, 0.03)
    stripes(pen, GOLD, 0.2, 0.5, 0.56)


@stranger("Diesel", "a truck")
def draw_diesel(pen):
    draw_truck(pen, COLOURS["black"])
    for i in range(4):
        x = 0.06 + i * 0.13
        pen.poly((250, 140, 30), x, 0.66, x + 0.06, 0.36, x + 0.11, 0.66)


@stranger("Lucille", "a guitar")
def draw_lucille(pen):
    draw_guitar(pen, INK)
    for x, y in ((0.36, 0.7), (0.56, 0.6), (0.5, 0.84)):
        pen.dot(x, y, 0.07, PINK)


@stranger("Sacher", "a cake")
def draw_sacher(pen):
    draw_cake(pen, WHITE)
    for x in (0.26, 0.5, 0.74):
        pen.dot(x, 0.66, 0.07, BLUE)
    stripes(pen, shade(BLUE, 0.7), 0.14, 0.86, 0.84)


NAMES = list(STRANGERS)
TUNING = NAMES[:6], NAMES[12:18]  # kinds, things with a name
REPORTED = NAMES[6:12], NAMES[18:]


@contextmanager
def moved_in():
    """Lets scenes.draw_scene draw them in the body of a with, or in a function that this wraps."""
    KINDS.update(STRANGERS)
    try:
        yield
    finally:
        for name in STRANGERS:
            KINDS.pop(name, None)
