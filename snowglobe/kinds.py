"""The kinds of objects in the snowglobe: their drawings, their nouns, what captions say of them."""

import math
from collections.abc import Callable
from typing import NamedTuple

COLOURS = {
    "red": (214, 48, 49),
    "orange": (243, 134, 36),
    "yellow": (249, 214, 60),
    "green": (58, 158, 80),
    "blue": (52, 102, 210),
    "purple": (134, 72, 176),
    "pink": (247, 140, 182),
    "brown": (132, 84, 48),
    "black": (48, 48, 54),
    "white": (246, 246, 244),
}


class Kind(NamedTuple):
    draw: Callable  # draw(pen, main colour)
    nouns: tuple  # ((singular, plural), ...), the most common first
    doing: str  # a participle that is true of the drawing, or ""
    coloured: bool  # whether it is drawn in all colours, so that captions can name its colour
    sky: bool  # whether it is in the air, not on the ground
    top: float  # height in its box (0 top, 1 bottom) where another object can stand, or 0
    big: bool  # whether another object can be in front of it


KINDS: dict[str, Kind] = {}


def kind(*nouns, doing="", coloured=True, sky=False, top=0.0, big=False):
    """Registers a drawing function as a kind. nouns: "singular/plural" each; the first singular is
    the kind's name. Other arguments: see Kind."""
    pairs = tuple(tuple(noun.split("/")) for noun in nouns)

    def register(draw):
        KINDS[pairs[0][0]] = Kind(draw, pairs, doing, coloured, sky, top, big)
        return draw
    return register


def shade(colour, factor):
    """A colour made darker (factor < 1) or lighter (factor > 1)."""
    if factor <= 1:
        return tuple(int(v * factor) for v in colour)
    return tuple(int(255 - (255 - v) / factor) for v in colour)


class Pen:
    """Draws into a square box of an image. Coordinates are shares of the box from its top left."""

    def __init__(self, draw, left, top, side, flip=False):
        self.draw, self.left, self.top, self.side, self.flip = draw, left, top, side, flip

    def points(self, values):
        xs = [1 - x if self.flip else x for x in values[::2]]
        return [(self.left + x * self.side, self.top + y * self.side)
                for x, y in zip(xs, values[1::2])]

    def corners(self, x0, y0, x1, y1):
        (a, b), (c, d) = self.points((x0, y0, x1, y1))
        return [min(a, c), min(b, d), max(a, c), max(b, d)]

    def _edge(self, fill):
        return shade(fill, 0.55), max(1, round(0.018 * self.side))

    def oval(self, fill, x0, y0, x1, y1):
        edge, width = self._edge(fill)
        self.draw.ellipse(self.corners(x0, y0, x1, y1), fill, edge, width)

    def box(self, fill, x0, y0, x1, y1, round_=0.0):
        edge, width = self._edge(fill)
        self.draw.rounded_rectangle(self.corners(x0, y0, x1, y1), round_ * self.side, fill, edge,
                                    width)

    def poly(self, fill, *values):
        edge, width = self._edge(fill)
        points = self.points(values)
        self.draw.polygon(points, fill)
        self.draw.line(points + points[:1], edge, width, joint="curve")

    def line(self, fill, width, *values):
        self.draw.line(self.points(values), fill, max(1, round(width * self.side)), joint="curve")

    def arc(self, fill, width, x0, y0, x1, y1, start=180, end=360):
        self.draw.arc(self.corners(x0, y0, x1, y1), start, end, fill,
                      max(1, round(width * self.side)))

    def dot(self, x, y, r=0.025, fill=(20, 20, 20)):
        self.draw.ellipse(self.corners(x - r, y - r, x + r, y + r), fill)


WHITE, INK, WOOD = (250, 250, 250), (40, 40, 46), (150, 100, 60)
GLASS, GOLD = (176, 222, 244), (250, 196, 40)


def legs(pen, colour, xs, y0=0.68, y1=0.98, w=0.09):
    for x in xs:
        pen.box(shade(colour, 0.85), x - w / 2, y0, x + w / 2, y1)


@kind("dog/dogs", "puppy/puppies", doing="standing")
def draw_dog(pen, c):
    pen.line(shade(c, 0.8), 0.06, 0.14, 0.52, 0.03, 0.30)
    legs(pen, c, (0.2, 0.32, 0.56, 0.68))
    pen.oval(c, 0.1, 0.45, 0.76, 0.78)
    pen.oval(c, 0.58, 0.18, 0.94, 0.56)
    pen.oval(shade(c, 0.6), 0.54, 0.2, 0.69, 0.56)
    pen.oval(shade(c, 1.6), 0.8, 0.36, 0.99, 0.54)
    pen.dot(0.97, 0.41, 0.035)
    pen.dot(0.8, 0.32)


@kind("cat/cats", "kitten/kittens", doing="sitting")
def draw_cat(pen, c):
    pen.arc(shade(c, 0.7), 0.07, 0.55, 0.55, 0.98, 0.95, 270, 90)
    pen.oval(c, 0.22, 0.45, 0.74, 0.99)
    pen.poly(c, 0.22, 0.3, 0.24, 0.02, 0.46, 0.18)
    pen.poly(c, 0.74, 0.3, 0.72, 0.02, 0.5, 0.18)
    pen.oval(c, 0.2, 0.12, 0.76, 0.56)
    for x in (0.36, 0.6):
        pen.oval((150, 220, 90), x - 0.06, 0.25, x + 0.06, 0.37)
        pen.dot(x, 0.31, 0.025)
    pen.poly((240, 120, 140), 0.44, 0.4, 0.52, 0.4, 0.48, 0.45)
    for dy in (-0.03, 0.04):
        pen.line(INK, 0.012, 0.36, 0.44, 0.06, 0.44 + dy)
        pen.line(INK, 0.012, 0.6, 0.44, 0.9, 0.44 + dy)
    pen.oval(shade(c, 1.4), 0.3, 0.88, 0.46, 1.0)
    pen.oval(shade(c, 1.4), 0.5, 0.88, 0.66, 1.0)


@kind("horse/horses", "pony/ponies", doing="standing", top=0.44)
def draw_horse(pen, c):
    pen.line(shade(c, 0.45), 0.09, 0.1, 0.5, 0.02, 0.78)
    legs(pen, c, (0.17, 0.28, 0.56, 0.67), 0.6, 0.99, 0.07)
    pen.oval(c, 0.08, 0.42, 0.72, 0.7)
    pen.poly(c, 0.55, 0.58, 0.66, 0.12, 0.8, 0.14, 0.74, 0.6)
    pen.poly(c, 0.66, 0.12, 0.78, 0.1, 0.98, 0.33, 0.9, 0.42, 0.72, 0.32)
    pen.poly(c, 0.68, 0.13, 0.7, 0.0, 0.76, 0.11)
    pen.line(shade(c, 0.45), 0.08, 0.66, 0.1, 0.58, 0.3, 0.52, 0.48)
    pen.dot(0.78, 0.2)


@kind("cow/cows", doing="standing", top=0.4)
def draw_cow(pen, c):
    spot = shade(c, 0.35) if sum(c) > 330 else WHITE
    pen.line(shade(c, 0.7), 0.03, 0.08, 0.45, 0.02, 0.75)
    legs(pen, c, (0.15, 0.27, 0.53, 0.65), 0.62, 0.98)
    pen.box(c, 0.06, 0.36, 0.72, 0.74, 0.1)
    for x0, y0, x1, y1 in ((0.14, 0.4, 0.3, 0.56), (0.4, 0.5, 0.58, 0.7), (0.46, 0.37, 0.56, 0.44)):
        pen.draw.ellipse(pen.corners(x0, y0, x1, y1), spot)
    pen.oval((245, 170, 180), 0.36, 0.68, 0.52, 0.8)
    pen.line((235, 225, 190), 0.05, 0.66, 0.22, 0.6, 0.06)
    pen.line((235, 225, 190), 0.05, 0.84, 0.22, 0.9, 0.06)
    pen.box(c, 0.62, 0.18, 0.88, 0.52, 0.08)
    pen.oval((245, 180, 180), 0.62, 0.4, 0.9, 0.58)
    pen.dot(0.7, 0.49, 0.02)
    pen.dot(0.82, 0.49, 0.02)
    pen.dot(0.69, 0.3)
    pen.dot(0.81, 0.3)


@kind("pig/pigs", doing="standing")
def draw_pig(pen, c):
    pen.arc(shade(c, 0.7), 0.03, 0.0, 0.4, 0.12, 0.54, 0, 300)
    legs(pen, c, (0.24, 0.38, 0.56, 0.68), 0.75, 0.97, 0.11)
    pen.oval(c, 0.08, 0.32, 0.8, 0.88)
    pen.oval(c, 0.5, 0.24, 0.94, 0.7)
    pen.poly(shade(c, 0.8), 0.54, 0.34, 0.52, 0.14, 0.68, 0.26)
    pen.poly(shade(c, 0.8), 0.76, 0.26, 0.92, 0.14, 0.9, 0.36)
    pen.oval((250, 170, 190), 0.66, 0.44, 0.94, 0.64)
    pen.dot(0.75, 0.54, 0.03)
    pen.dot(0.86, 0.54, 0.03)
    pen.dot(0.66, 0.38)
    pen.dot(0.84, 0.38)


@kind("sheep/sheep", "lamb/lambs", doing="standing")
def draw_sheep(pen, c):
    legs(pen, INK, (0.28, 0.4, 0.56, 0.68), 0.7, 0.97, 0.06)
    for i in range(9):
        a = i * 2 * math.pi / 9
        x, y = 0.46 + 0.27 * math.cos(a), 0.52 + 0.17 * math.sin(a)
        pen.oval(c, x - 0.14, y - 0.14, x + 0.14, y + 0.14)
    pen.draw.ellipse(pen.corners(0.22, 0.38, 0.7, 0.68), c)
    pen.oval((70, 62, 62), 0.68, 0.3, 0.96, 0.62)
    pen.oval((70, 62, 62), 0.6, 0.36, 0.74, 0.46)
    pen.dot(0.83, 0.42, 0.03, WHITE)


@kind("elephant/elephants", doing="standing", top=0.26, big=True)
def draw_elephant(pen, c):
    legs(pen, c, (0.18, 0.34, 0.52, 0.66), 0.6, 0.98, 0.14)
    pen.oval(c, 0.04, 0.24, 0.72, 0.78)
    pen.line(shade(c, 0.9), 0.11, 0.84, 0.38, 0.93, 0.62, 0.9, 0.88)
    pen.oval(c, 0.56, 0.12, 0.94, 0.54)
    pen.oval(shade(c, 0.75), 0.46, 0.12, 0.72, 0.56)
    pen.line(WHITE, 0.05, 0.8, 0.5, 0.76, 0.66)
    pen.dot(0.82, 0.28)


@kind("giraffe/giraffes", doing="standing", big=True)
def draw_giraffe(pen, c):
    legs(pen, c, (0.2, 0.3, 0.5, 0.6), 0.62, 1.0, 0.06)
    pen.oval(c, 0.1, 0.5, 0.66, 0.74)
    pen.poly(c, 0.48, 0.62, 0.66, 0.08, 0.76, 0.1, 0.64, 0.66)
    pen.line(shade(c, 0.6), 0.025, 0.68, 0.08, 0.66, 0.0)
    pen.line(shade(c, 0.6), 0.025, 0.75, 0.08, 0.76, 0.0)
    pen.oval(c, 0.62, 0.04, 0.94, 0.2)
    for x, y in ((0.2, 0.58), (0.32, 0.66), (0.34, 0.55), (0.48, 0.64), (0.56, 0.48), (0.62, 0.34),
                 (0.67, 0.22)):
        pen.dot(x, y, 0.04, shade(c, 0.45))
    pen.dot(0.8, 0.1, 0.02)


@kind("rabbit/rabbits", "bunny/bunnies", doing="sitting")
def draw_rabbit(pen, c):
    for x in (0.36, 0.56):
        pen.oval(c, x - 0.07, 0.0, x + 0.09, 0.42)
        pen.oval((250, 180, 190), x - 0.02, 0.06, x + 0.04, 0.34)
    pen.oval(c, 0.18, 0.54, 0.8, 0.99)
    pen.oval(c, 0.24, 0.3, 0.74, 0.7)
    pen.dot(0.38, 0.46, 0.035)
    pen.dot(0.6, 0.46, 0.035)
    pen.poly((240, 120, 140), 0.45, 0.54, 0.53, 0.54, 0.49, 0.59)
    pen.box(WHITE, 0.45, 0.6, 0.53, 0.68)
    pen.oval(WHITE, 0.74, 0.78, 0.92, 0.95)


@kind("bird/birds", doing="flying", sky=True)
def draw_bird(pen, c):
    pen.poly(shade(c, 0.7), 0.24, 0.52, 0.0, 0.44, 0.02, 0.66)
    pen.oval(c, 0.14, 0.4, 0.72, 0.72)
    pen.poly(shade(c, 0.75), 0.3, 0.5, 0.2, 0.06, 0.56, 0.46)
    pen.oval(c, 0.58, 0.28, 0.88, 0.58)
    pen.poly(GOLD, 0.86, 0.38, 1.0, 0.45, 0.86, 0.5)
    pen.dot(0.76, 0.4)


@kind("duck/ducks", doing="sitting")
def draw_duck(pen, c):
    pen.poly(c, 0.14, 0.62, 0.0, 0.48, 0.06, 0.78)
    pen.oval(c, 0.04, 0.52, 0.78, 0.96)
    pen.poly(c, 0.52, 0.66, 0.56, 0.3, 0.76, 0.3, 0.74, 0.7)
    pen.oval(c, 0.48, 0.08, 0.84, 0.44)
    pen.poly((250, 150, 30), 0.78, 0.22, 1.0, 0.28, 1.0, 0.36, 0.78, 0.38)
    pen.oval(shade(c, 0.7), 0.18, 0.6, 0.54, 0.84)
    pen.dot(0.7, 0.22)


@kind("fish/fish", doing="")
def draw_fish(pen, c):
    pen.poly(shade(c, 0.75), 0.26, 0.5, 0.0, 0.24, 0.04, 0.5, 0.0, 0.78)
    pen.poly(shade(c, 0.75), 0.4, 0.34, 0.56, 0.12, 0.68, 0.32)
    pen.oval(c, 0.18, 0.28, 0.96, 0.74)
    for x in (0.42, 0.54):
        pen.arc(shade(c, 0.55), 0.025, x - 0.1, 0.36, x + 0.06, 0.66, 270, 90)
    pen.poly(shade(c, 0.75), 0.5, 0.56, 0.4, 0.8, 0.62, 0.66)
    pen.oval(WHITE, 0.72, 0.38, 0.86, 0.52)
    pen.dot(0.8, 0.45, 0.03)


@kind("butterfly/butterflies", doing="flying", sky=True)
def draw_butterfly(pen, c):
    for s in (1, -1):
        def x(v, s=s):
            return 0.5 + s * v

        pen.poly(c, x(0.02), 0.46, x(0.3), 0.1, x(0.48), 0.14, x(0.46), 0.42, x(0.24), 0.54)
        pen.poly(shade(c, 0.75), x(0.02), 0.52, x(0.34), 0.56, x(0.38), 0.82, x(0.2), 0.9)
        pen.dot(x(0.34), 0.27, 0.06, shade(c, 2.5))
        pen.dot(x(0.24), 0.72, 0.045, shade(c, 2.5))
        pen.line(INK, 0.02, 0.5, 0.3, x(0.14), 0.06)
    pen.oval((70, 50, 40), 0.45, 0.26, 0.55, 0.86)


@kind("turtle/turtles", "tortoise/tortoises", doing="walking")
def draw_turtle(pen, c):
    skin = (150, 190, 110) if c != COLOURS["green"] else (214, 190, 120)
    pen.oval(skin, 0.72, 0.4, 1.0, 0.66)
    legs(pen, skin, (0.22, 0.62), 0.72, 0.94, 0.15)
    pen.draw.pieslice(pen.corners(0.06, 0.24, 0.82, 1.16), 180, 360, c, shade(c, 0.5), 2)
    pen.box(shade(c, 0.7), 0.04, 0.68, 0.84, 0.77, 0.04)
    for x, y in ((0.26, 0.52), (0.44, 0.4), (0.6, 0.54)):
        pen.poly(shade(c, 0.6), x - 0.08, y, x - 0.03, y - 0.08, x + 0.06, y - 0.07, x + 0.09,
                 y + 0.02, x, y + 0.08)
    pen.dot(0.9, 0.5)


def wheel(pen, x, y=0.84, r=0.12):
    pen.oval(INK, x - r, y - r, x + r, y + r)
    pen.dot(x, y, r * 0.45, (190, 190, 196))


@kind("car/cars", doing="parked", top=0.34)
def draw_car(pen, c):
    pen.poly(c, 0.18, 0.58, 0.32, 0.34, 0.68, 0.34, 0.84, 0.58)
    pen.poly(GLASS, 0.27, 0.56, 0.36, 0.4, 0.49, 0.4, 0.49, 0.56)
    pen.poly(GLASS, 0.53, 0.56, 0.53, 0.4, 0.65, 0.4, 0.74, 0.56)
    pen.box(c, 0.02, 0.56, 0.98, 0.82, 0.08)
    pen.oval(GOLD, 0.88, 0.6, 0.98, 0.7)
    wheel(pen, 0.25)
    wheel(pen, 0.75)


@kind("bus/buses", doing="parked", top=0.2, big=True)
def draw_bus(pen, c):
    pen.box(c, 0.01, 0.2, 0.99, 0.86, 0.06)
    for i in range(4):
        pen.box(GLASS, 0.07 + i * 0.18, 0.3, 0.2 + i * 0.18, 0.5)
    pen.box(GLASS, 0.8, 0.3, 0.94, 0.8)
    pen.box(shade(c, 2), 0.02, 0.6, 0.78, 0.66)
    wheel(pen, 0.22, 0.86, 0.11)
    wheel(pen, 0.66, 0.86, 0.11)


@kind("truck/trucks", "lorry/lorries", doing="parked", top=0.24, big=True)
def draw_truck(pen, c):
    pen.box((206, 208, 212), 0.01, 0.24, 0.62, 0.8)
    pen.line((150, 152, 158), 0.025, 0.2, 0.25, 0.2, 0.79)
    pen.line((150, 152, 158), 0.025, 0.41, 0.25, 0.41, 0.79)
    pen.box(c, 0.64, 0.36, 0.97, 0.82, 0.06)
    pen.box(GLASS, 0.76, 0.42, 0.93, 0.58)
    for x in (0.16, 0.4, 0.8):
        wheel(pen, x, 0.86, 0.11)


@kind("bicycle/bicycles", "bike/bikes", doing="parked")
def draw_bicycle(pen, c):
    for x in (0.22, 0.78):
        pen.arc(INK, 0.05, x - 0.21, 0.54, x + 0.21, 0.96, 0, 360)
        pen.line((150, 150, 150), 0.015, x - 0.19, 0.75, x + 0.19, 0.75)
        pen.line((150, 150, 150), 0.015, x, 0.56, x, 0.94)
    pen.line(c, 0.06, 0.22, 0.75, 0.36, 0.42, 0.68, 0.42, 0.48, 0.75, 0.22, 0.75)
    pen.line(c, 0.06, 0.36, 0.42, 0.48, 0.75)
    pen.line(c, 0.06, 0.78, 0.75, 0.66, 0.28)
    pen.line(INK, 0.06, 0.58, 0.27, 0.76, 0.25)
    pen.line(INK, 0.08, 0.26, 0.36, 0.44, 0.36)


@kind("boat/boats", "sailboat/sailboats", doing="", big=True)
def draw_boat(pen, c):
    pen.line(WOOD, 0.04, 0.48, 0.02, 0.48, 0.74)
    pen.poly(WHITE, 0.52, 0.06, 0.52, 0.64, 0.92, 0.64)
    pen.poly((236, 232, 214), 0.44, 0.16, 0.44, 0.64, 0.12, 0.64)
    pen.poly(c, 0.02, 0.7, 0.98, 0.7, 0.8, 0.96, 0.18, 0.96)


@kind("airplane/airplanes", "plane/planes", doing="flying", sky=True)
def draw_airplane(pen, c):
    pen.poly(shade(c, 0.8), 0.1, 0.46, 0.0, 0.16, 0.13, 0.16, 0.28, 0.46)
    pen.poly(shade(c, 0.65), 0.42, 0.46, 0.32, 0.2, 0.44, 0.2, 0.62, 0.46)
    pen.oval(c, 0.02, 0.38, 0.99, 0.64)
    pen.poly(shade(c, 0.65), 0.4, 0.56, 0.22, 0.88, 0.36, 0.88, 0.62, 0.56)
    for i in range(5):
        pen.dot(0.34 + i * 0.1, 0.47, 0.025, WHITE)
    pen.poly(GLASS, 0.84, 0.42, 0.94, 0.47, 0.84, 0.49)


@kind("rocket/rockets", doing="flying", sky=True)
def draw_rocket(pen, c):
    pen.poly((250, 140, 30), 0.4, 0.8, 0.5, 1.0, 0.6, 0.8)
    pen.poly(shade(c, 0.6), 0.36, 0.54, 0.16, 0.84, 0.38, 0.78)
    pen.poly(shade(c, 0.6), 0.64, 0.54, 0.84, 0.84, 0.62, 0.78)
    pen.poly(c, 0.5, 0.0, 0.36, 0.22, 0.34, 0.8, 0.66, 0.8, 0.64, 0.22)
    pen.oval(GLASS, 0.41, 0.28, 0.59, 0.46)
    pen.line(shade(c, 0.6), 0.04, 0.36, 0.62, 0.64, 0.62)


@kind("house/houses", "cottage/cottages", top=0.06, big=True)
def draw_house(pen, c):
    pen.box((130, 70, 60), 0.68, 0.08, 0.8, 0.36)
    pen.box(c, 0.12, 0.42, 0.88, 0.98)
    pen.poly((150, 70, 56), 0.02, 0.46, 0.5, 0.06, 0.98, 0.46)
    pen.box(WOOD, 0.42, 0.64, 0.6, 0.98)
    for x in (0.19, 0.67):
        pen.box(GLASS, x, 0.52, x + 0.15, 0.68)
        pen.line(WHITE, 0.02, x + 0.075, 0.53, x + 0.075, 0.67)


@kind("castle/castles", big=True)
def draw_castle(pen, c):
    pen.box(c, 0.18, 0.44, 0.82, 0.98)
    for x in (0.06, 0.72):
        pen.box(c, x, 0.28, x + 0.22, 0.98)
        pen.poly(shade(c, 0.6), x - 0.03, 0.3, x + 0.11, 0.02, x + 0.25, 0.3)
        pen.box(INK, x + 0.08, 0.42, x + 0.14, 0.54)
    for i in range(4):
        pen.box(c, 0.29 + i * 0.12, 0.36, 0.36 + i * 0.12, 0.46)
    pen.draw.pieslice(pen.corners(0.38, 0.62, 0.62, 1.34), 180, 360, (70, 50, 40))


@kind("tent/tents", big=True)
def draw_tent(pen, c):
    pen.poly(shade(c, 0.7), 0.5, 0.16, 0.7, 0.14, 1.0, 0.92, 0.86, 0.97)
    pen.poly(c, 0.5, 0.16, 0.04, 0.97, 0.86, 0.97)
    pen.poly(INK, 0.5, 0.4, 0.36, 0.97, 0.62, 0.97)
    pen.line(WOOD, 0.03, 0.5, 0.16, 0.46, 0.06)


@kind("windmill/windmills", big=True)
def draw_windmill(pen, c):
    pen.poly(c, 0.38, 0.34, 0.62, 0.34, 0.72, 0.98, 0.28, 0.98)
    pen.poly(shade(c, 0.6), 0.36, 0.36, 0.5, 0.18, 0.64, 0.36)
    pen.box(WOOD, 0.44, 0.78, 0.56, 0.98)
    for a in (0.6, 2.17, 3.74, 5.31):
        x, y, px, py = math.cos(a), math.sin(a), -math.sin(a) * 0.09, math.cos(a) * 0.09
        pen.poly(WHITE, 0.5 + 0.1 * x, 0.36 + 0.08 * y, 0.5 + 0.46 * x, 0.36 + 0.36 * y,
                 0.5 + 0.46 * x + px, 0.36 + 0.36 * y + py, 0.5 + 0.1 * x + px,
                 0.36 + 0.08 * y + py)
    pen.dot(0.5, 0.36, 0.05, WOOD)


@kind("pizza/pizzas", coloured=False)
def draw_pizza(pen, c):
    pen.poly((250, 214, 90), 0.06, 0.26, 0.94, 0.26, 0.5, 0.98)
    pen.box((196, 130, 60), 0.02, 0.14, 0.98, 0.3, 0.07)
    for x, y in ((0.32, 0.42), (0.62, 0.4), (0.48, 0.6), (0.5, 0.8)):
        pen.oval((206, 50, 40), x - 0.09, y - 0.08, x + 0.09, y + 0.08)
    pen.dot(0.44, 0.46, 0.03, (60, 130, 50))
    pen.dot(0.6, 0.56, 0.03, (60, 130, 50))


@kind("apple/apples")
def draw_apple(pen, c):
    pen.oval(c, 0.08, 0.28, 0.6, 0.94)
    pen.oval(c, 0.4, 0.28, 0.92, 0.94)
    pen.draw.ellipse(pen.corners(0.24, 0.32, 0.76, 0.9), c)
    pen.line((90, 60, 30), 0.06, 0.5, 0.36, 0.54, 0.12)
    pen.poly((80, 170, 60), 0.54, 0.2, 0.68, 0.06, 0.86, 0.12, 0.72, 0.24)
    pen.dot(0.26, 0.46, 0.06, shade(c, 2.2))


@kind("banana/bananas", coloured=False)
def draw_banana(pen, c):
    pen.poly((250, 220, 60), 0.1, 0.2, 0.22, 0.16, 0.3, 0.46, 0.52, 0.66, 0.9, 0.66, 0.95, 0.76,
             0.66, 0.92, 0.36, 0.84, 0.16, 0.58)
    pen.line((200, 160, 30), 0.03, 0.2, 0.3, 0.26, 0.56, 0.46, 0.76, 0.86, 0.74)
    pen.box((90, 70, 30), 0.1, 0.08, 0.2, 0.22)


@kind("cake/cakes")
def draw_cake(pen, c):
    pen.oval((220, 220, 226), 0.02, 0.84, 0.98, 0.99)
    pen.box(c, 0.1, 0.5, 0.9, 0.92, 0.04)
    pen.box(shade(c, 2.4), 0.1, 0.46, 0.9, 0.6, 0.06)
    for x in (0.16, 0.32, 0.48, 0.64):
        pen.oval(shade(c, 2.4), x, 0.52, x + 0.18, 0.7)
    for x in (0.3, 0.5, 0.7):
        pen.box((90, 150, 230), x - 0.03, 0.26, x + 0.03, 0.48)
        pen.oval((255, 180, 40), x - 0.04, 0.12, x + 0.04, 0.26)


@kind("ice cream/ice creams", doing="")
def draw_ice_cream(pen, c):
    pen.poly((222, 168, 100), 0.28, 0.46, 0.72, 0.46, 0.5, 1.0)
    pen.line((170, 116, 60), 0.02, 0.36, 0.66, 0.66, 0.5)
    pen.line((170, 116, 60), 0.02, 0.34, 0.5, 0.62, 0.68)
    pen.oval(c, 0.2, 0.24, 0.54, 0.56)
    pen.oval(c, 0.46, 0.24, 0.8, 0.56)
    pen.oval(c, 0.32, 0.04, 0.68, 0.38)
    pen.dot(0.5, 0.04, 0.05, (214, 30, 40))


@kind("sun/suns", doing="shining", coloured=False, sky=True)
def draw_sun(pen, c):
    for i in range(12):
        a = i * math.pi / 6
        pen.line((250, 170, 30), 0.05, 0.5 + 0.3 * math.cos(a), 0.5 + 0.3 * math.sin(a),
                 0.5 + 0.48 * math.cos(a), 0.5 + 0.48 * math.sin(a))
    pen.oval((255, 214, 50), 0.22, 0.22, 0.78, 0.78)


@kind("cloud/clouds", doing="floating", coloured=False, sky=True)
def draw_cloud(pen, c):
    for x0, y0, x1, y1 in ((0.0, 0.44, 0.42, 0.84), (0.58, 0.44, 1.0, 0.84), (0.18, 0.2, 0.62, 0.7),
                           (0.44, 0.3, 0.8, 0.72)):
        pen.oval((236, 240, 246), x0, y0, x1, y1)
    pen.draw.rectangle(pen.corners(0.2, 0.5, 0.8, 0.82), (236, 240, 246))


@kind("rainbow/rainbows", coloured=False, sky=True)
def draw_rainbow(pen, c):
    for i, name in enumerate(("red", "orange", "yellow", "green", "blue", "purple")):
        d = i * 0.065
        pen.arc(COLOURS[name], 0.07, 0.01 + d, 0.2 + d, 0.99 - d, 1.4 - d)


@kind("tree/trees", big=True)
def draw_tree(pen, c):
    pen.box((120, 80, 46), 0.42, 0.56, 0.58, 0.99)
    for x0, y0, x1, y1 in ((0.06, 0.26, 0.54, 0.68), (0.46, 0.26, 0.94, 0.68),
                           (0.22, 0.02, 0.78, 0.5)):
        pen.oval(c, x0, y0, x1, y1)
    pen.draw.ellipse(pen.corners(0.26, 0.24, 0.74, 0.62), c)


@kind("flower/flowers", doing="growing")
def draw_flower(pen, c):
    pen.line((60, 140, 60), 0.06, 0.5, 0.4, 0.5, 1.0)
    pen.poly((60, 140, 60), 0.5, 0.84, 0.76, 0.64, 0.82, 0.76)
    pen.poly((60, 140, 60), 0.5, 0.9, 0.24, 0.7, 0.18, 0.82)
    for i in range(6):
        a = i * math.pi / 3
        x, y = 0.5 + 0.2 * math.cos(a), 0.32 + 0.2 * math.sin(a)
        pen.oval(c, x - 0.13, y - 0.13, x + 0.13, y + 0.13)
    pen.oval((250, 200, 40) if c != COLOURS["yellow"] else (140, 90, 40), 0.38, 0.2, 0.62, 0.44)


@kind("cactus/cactuses", coloured=False, doing="growing")
def draw_cactus(pen, c):
    green = (74, 150, 84)
    pen.box(green, 0.4, 0.04, 0.62, 0.99, 0.1)
    pen.box(green, 0.12, 0.3, 0.26, 0.62, 0.06)
    pen.box(green, 0.14, 0.5, 0.44, 0.64, 0.05)
    pen.box(green, 0.74, 0.22, 0.88, 0.54, 0.06)
    pen.box(green, 0.58, 0.42, 0.86, 0.56, 0.05)
    for y in (0.16, 0.32, 0.7, 0.86):
        pen.line(WHITE, 0.02, 0.47, y, 0.47, y + 0.06)
        pen.line(WHITE, 0.02, 0.55, y + 0.04, 0.55, y + 0.1)


@kind("chair/chairs", top=0.56)
def draw_chair(pen, c):
    legs(pen, shade(c, 0.8), (0.27, 0.73), 0.6, 0.99, 0.07)
    pen.box(c, 0.22, 0.04, 0.32, 0.62)
    pen.box(c, 0.22, 0.06, 0.34, 0.5)
    pen.box(shade(c, 1.2), 0.2, 0.54, 0.8, 0.66, 0.03)
    for y in (0.14, 0.28, 0.42):
        pen.line(shade(c, 0.5), 0.03, 0.22, y, 0.33, y)


@kind("table/tables", "desk/desks", top=0.4, big=True)
def draw_table(pen, c):
    legs(pen, shade(c, 0.75), (0.14, 0.86), 0.46, 0.99, 0.08)
    legs(pen, shade(c, 0.6), (0.3, 0.7), 0.46, 0.86, 0.06)
    pen.poly(c, 0.14, 0.38, 0.86, 0.38, 0.99, 0.52, 0.01, 0.52)


@kind("clock/clocks")
def draw_clock(pen, c):
    for x in (0.24, 0.76):
        pen.oval(shade(c, 0.8), x - 0.14, 0.06, x + 0.14, 0.32)
        pen.line(shade(c, 0.6), 0.07, x, 0.84, x + (x - 0.5) * 0.3, 0.98)
    pen.oval(c, 0.1, 0.14, 0.9, 0.94)
    pen.oval(WHITE, 0.21, 0.25, 0.79, 0.83)
    pen.line(INK, 0.05, 0.5, 0.54, 0.5, 0.33)
    pen.line(INK, 0.05, 0.5, 0.54, 0.66, 0.6)
    for x, y in ((0.5, 0.29), (0.5, 0.79), (0.26, 0.54), (0.74, 0.54)):
        pen.dot(x, y, 0.02)


@kind("ball/balls")
def draw_ball(pen, c):
    pen.oval(c, 0.1, 0.18, 0.9, 0.98)
    stripe = WHITE if c != COLOURS["white"] else (90, 150, 220)
    pen.draw.pieslice(pen.corners(0.12, 0.2, 0.88, 0.96), 250, 310, stripe)
    pen.draw.pieslice(pen.corners(0.12, 0.2, 0.88, 0.96), 10, 70, stripe)
    pen.draw.pieslice(pen.corners(0.12, 0.2, 0.88, 0.96), 130, 190, stripe)
    pen.dot(0.5, 0.58, 0.07, GOLD)


@kind("kite/kites", doing="flying", sky=True)
def draw_kite(pen, c):
    pen.poly(c, 0.62, 0.0, 0.92, 0.26, 0.5, 0.66, 0.3, 0.22)
    pen.line(shade(c, 0.5), 0.025, 0.62, 0.0, 0.5, 0.66)
    pen.line(shade(c, 0.5), 0.025, 0.3, 0.22, 0.92, 0.26)
    pen.line(INK, 0.02, 0.5, 0.66, 0.38, 0.76, 0.42, 0.86, 0.24, 0.98)
    for x, y in ((0.4, 0.76), (0.38, 0.89)):
        pen.poly(GOLD, x, y, x - 0.09, y - 0.05, x - 0.08, y + 0.05)
        pen.poly(GOLD, x, y, x + 0.09, y - 0.05, x + 0.08, y + 0.05)


@kind("umbrella/umbrellas")
def draw_umbrella(pen, c):
    pen.line((110, 80, 60), 0.05, 0.5, 0.1, 0.5, 0.86)
    pen.arc((110, 80, 60), 0.05, 0.5, 0.76, 0.68, 0.97, 0, 180)
    pen.draw.pieslice(pen.corners(0.03, 0.08, 0.97, 0.98), 180, 360, c, shade(c, 0.5), 2)
    pen.draw.pieslice(pen.corners(0.34, 0.08, 0.66, 0.98), 180, 360, shade(c, 1.5), shade(c, 0.5),
                      2)
    pen.line(INK, 0.04, 0.5, 0.02, 0.5, 0.1)


@kind("guitar/guitars")
def draw_guitar(pen, c):
    pen.line((100, 66, 40), 0.08, 0.5, 0.6, 0.5, 0.1)
    pen.box((70, 44, 30), 0.42, 0.01, 0.58, 0.14)
    pen.oval(c, 0.3, 0.4, 0.7, 0.7)
    pen.oval(c, 0.2, 0.58, 0.8, 1.0)
    pen.draw.ellipse(pen.corners(0.36, 0.56, 0.64, 0.72), c)
    pen.dot(0.5, 0.66, 0.09, INK)
    pen.line((235, 235, 220), 0.02, 0.5, 0.1, 0.5, 0.9)
    pen.box((70, 44, 30), 0.38, 0.84, 0.62, 0.89)


@kind("robot/robots", doing="standing")
def draw_robot(pen, c):
    legs(pen, (120, 124, 134), (0.38, 0.62), 0.74, 0.99, 0.13)
    for x0, x1 in ((0.08, 0.2), (0.8, 0.92)):
        pen.box((120, 124, 134), x0, 0.46, x1, 0.76, 0.05)
    pen.box(c, 0.22, 0.42, 0.78, 0.8, 0.05)
    pen.line(INK, 0.03, 0.5, 0.12, 0.5, 0.02)
    pen.dot(0.5, 0.03, 0.045, (230, 40, 40))
    pen.box(shade(c, 1.3), 0.26, 0.1, 0.74, 0.4, 0.06)
    for x in (0.38, 0.62):
        pen.oval((255, 240, 120), x - 0.07, 0.16, x + 0.07, 0.29)
        pen.dot(x, 0.225, 0.025)
    pen.box(INK, 0.38, 0.33, 0.62, 0.36)
    for i, f in enumerate(((230, 60, 60), (250, 210, 60), (70, 190, 90))):
        pen.dot(0.38 + i * 0.12, 0.58, 0.04, f)


@kind("penguin/penguins", coloured=False, doing="standing")
def draw_penguin(pen, c):
    pen.oval((250, 160, 30), 0.26, 0.9, 0.48, 1.0)
    pen.oval((250, 160, 30), 0.52, 0.9, 0.74, 1.0)
    pen.poly((40, 46, 60), 0.24, 0.42, 0.06, 0.74, 0.26, 0.7)
    pen.poly((40, 46, 60), 0.76, 0.42, 0.94, 0.74, 0.74, 0.7)
    pen.oval((40, 46, 60), 0.2, 0.26, 0.8, 0.98)
    pen.oval((40, 46, 60), 0.28, 0.02, 0.72, 0.44)
    pen.oval(WHITE, 0.3, 0.4, 0.7, 0.94)
    pen.oval(WHITE, 0.32, 0.14, 0.51, 0.36)
    pen.oval(WHITE, 0.49, 0.14, 0.68, 0.36)
    pen.dot(0.43, 0.24, 0.03)
    pen.dot(0.57, 0.24, 0.03)
    pen.poly((250, 160, 30), 0.42, 0.31, 0.58, 0.31, 0.5, 0.42)


@kind("lighthouse/lighthouses", doing="standing", big=True)
def draw_lighthouse(pen, c):
    pen.poly((255, 240, 150), 0.5, 0.15, 0.0, 0.02, 0.0, 0.28)
    pen.poly((120, 116, 112), 0.14, 0.99, 0.26, 0.88, 0.76, 0.88, 0.88, 0.99)
    pen.poly(WHITE if c != COLOURS["white"] else (120, 130, 150), 0.38, 0.26, 0.62, 0.26, 0.72, 0.9,
             0.28, 0.9)
    pen.poly(c, 0.362, 0.38, 0.638, 0.38, 0.66, 0.53, 0.34, 0.53)
    pen.poly(c, 0.316, 0.68, 0.684, 0.68, 0.71, 0.84, 0.29, 0.84)
    pen.box((255, 226, 90), 0.41, 0.11, 0.59, 0.26)
    pen.box(INK, 0.33, 0.24, 0.67, 0.28)
    pen.poly(c, 0.36, 0.12, 0.5, 0.0, 0.64, 0.12)


@kind("snowman/snowmen", coloured=False, doing="standing")
def draw_snowman(pen, c):
    snow = (240, 246, 252)
    pen.line((110, 76, 50), 0.03, 0.32, 0.5, 0.04, 0.36)
    pen.line((110, 76, 50), 0.03, 0.68, 0.5, 0.96, 0.36)
    pen.oval(snow, 0.18, 0.58, 0.82, 1.0)
    pen.oval(snow, 0.27, 0.36, 0.73, 0.68)
    pen.oval(snow, 0.33, 0.14, 0.67, 0.42)
    pen.box((206, 40, 50), 0.31, 0.38, 0.69, 0.44, 0.02)
    pen.box(INK, 0.28, 0.14, 0.72, 0.18)
    pen.box(INK, 0.36, 0.0, 0.64, 0.17)
    pen.dot(0.44, 0.25, 0.022)
    pen.dot(0.57, 0.25, 0.022)
    pen.poly((250, 130, 30), 0.5, 0.28, 0.5, 0.33, 0.76, 0.32)
    for y in (0.5, 0.58, 0.72, 0.82):
        pen.dot(0.5, y, 0.025)


@kind("whale/whales", big=True)
def draw_whale(pen, c):
    pen.line((110, 190, 240), 0.04, 0.3, 0.36, 0.3, 0.14, 0.18, 0.04)
    pen.line((110, 190, 240), 0.04, 0.3, 0.2, 0.42, 0.04)
    pen.poly(c, 0.8, 0.58, 0.84, 0.3, 0.7, 0.18, 0.9, 0.24, 1.0, 0.12, 0.96, 0.36, 0.94, 0.7)
    pen.draw.pieslice(pen.corners(0.02, 0.32, 0.96, 1.24), 180, 360, c, shade(c, 0.5), 2)
    pen.draw.chord(pen.corners(0.02, 0.56, 0.96, 0.98), 0, 180, (232, 240, 246), shade(c, 0.5), 2)
    pen.poly(shade(c, 0.7), 0.44, 0.74, 0.62, 0.74, 0.58, 0.98)
    pen.dot(0.2, 0.62, 0.03)


@kind("mushroom/mushrooms")
def draw_mushroom(pen, c):
    pen.box((244, 234, 212), 0.36, 0.48, 0.64, 0.99, 0.08)
    pen.draw.pieslice(pen.corners(0.02, 0.06, 0.98, 1.08), 180, 360, c, shade(c, 0.5), 2)
    spot = WHITE if c != COLOURS["white"] else (222, 90, 80)
    for x, y, r in ((0.3, 0.36, 0.09), (0.56, 0.22, 0.08), (0.74, 0.42, 0.08), (0.5, 0.46, 0.05),
                    (0.14, 0.5, 0.05)):
        pen.dot(x, y, r, spot)


@kind("train/trains", big=True)
def draw_train(pen, c):
    for x, y, r in ((0.74, 0.06, 0.06), (0.6, 0.04, 0.05)):
        pen.oval((214, 216, 222), x - r, y - r, x + r, y + r)
    pen.box(shade(c, 0.7), 0.7, 0.16, 0.82, 0.42)
    pen.box(c, 0.34, 0.38, 0.94, 0.76, 0.1)
    pen.box(c, 0.04, 0.18, 0.42, 0.78)
    pen.box(shade(c, 0.6), 0.0, 0.12, 0.46, 0.22)
    pen.box(GLASS, 0.12, 0.3, 0.34, 0.48)
    pen.poly((90, 90, 96), 0.9, 0.78, 1.0, 0.94, 0.82, 0.94)
    pen.box(GOLD, 0.5, 0.38, 0.55, 0.76)
    for x, r in ((0.18, 0.12), (0.46, 0.09), (0.66, 0.09), (0.84, 0.07)):
        wheel(pen, x, 0.97 - r, r)
