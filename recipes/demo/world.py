"""A procedural world: scenes that can be drawn, described exactly, and alt-texted as badly as the web does.

    python -m recipes.demo.world 7          # writes scene-7.png and prints its captions

A scene is a pure function of its seed: 1-4 objects (shape, colour, size, pattern, one of nine places) on a
patterned background, about 10^14 of them. Seeds below `HELD_OUT` are for training, the rest for the demo and
for measuring.
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import cos, pi, sin

from PIL import Image, ImageDraw

HELD_OUT = 1 << 40  # scene seeds from here on are never trained on

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (240, 205, 30),
    "green": (40, 150, 60),
    "cyan": (30, 190, 205),
    "blue": (40, 70, 200),
    "purple": (135, 50, 170),
    "black": (25, 25, 25),
}
SIZES = {"small": 0.13, "large": 0.175}  # radius as a share of the picture's side
PATTERNS = ("plain", "striped", "dotted")
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
GROUNDS = ("plain", "gradient", "checkered", "lined", "speckled")
TONES = {
    "white": (250, 250, 250),
    "grey": (190, 190, 190),
    "cream": (245, 232, 200),
    "mint": (200, 240, 215),
    "lavender": (220, 208, 245),
    "pink": (250, 208, 220),
}


@dataclass(frozen=True)
class Thing:
    """One object: `place` is a cell of the 3x3 grid in reading order, `dx`, `dy` its jitter in the cell."""

    shape: str
    colour: str
    size: str
    pattern: str
    place: int
    dx: float
    dy: float

    @property
    def phrase(self) -> str:
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        return f"{self.size} {pattern}{self.colour} {self.shape}"

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and its things in reading order; no two things share both colour and shape."""

    seed: int
    ground: str
    tone: str
    things: tuple[Thing, ...]

    @property
    def pairs(self) -> frozenset[str]:
        """The (colour, shape) pairs that a right caption names."""
        return frozenset(thing.name for thing in self.things)


def scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = random.Random(seed)
    places = sorted(rng.sample(range(9), rng.randint(1, 4)))
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(places))
    things = tuple(
        Thing(
            shape,
            colour,
            rng.choice(list(SIZES)),
            rng.choice(PATTERNS),
            place,
            rng.uniform(-0.015, 0.015),
            rng.uniform(-0.015, 0.015),
        )
        for (colour, shape), place in zip(names, places, strict=True)
    )
    return Scene(seed, rng.choice(GROUNDS), rng.choice(list(TONES)), things)


# --- pictures -----------------------------------------------------------------------------------------------


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        k = 0.82 * r
        return [(x - k, y - k), (x + k, y - k), (x + k, y + k), (x - k, y + k)]
    if shape == "diamond":
        return [(x, y - r), (x + 0.68 * r, y), (x, y + r), (x - 0.68 * r, y)]
    if shape == "triangle":
        return [(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)]
    if shape == "cross":
        k = 0.36 * r
        return [
            (x - k, y - r), (x + k, y - r), (x + k, y - k), (x + r, y - k), (x + r, y + k), (x + k, y + k),
            (x + k, y + r), (x - k, y + r), (x - k, y + k), (x - r, y + k), (x - r, y - k), (x - k, y - k),
        ]  # fmt: skip
    radii = [1.08 * r if k % 2 == 0 else 0.45 * r for k in range(10)]  # star
    return [(x + q * sin(k * pi / 5), y - q * cos(k * pi / 5)) for k, q in enumerate(radii)]


def lighter(rgb: Sequence[int], share: float = 0.45) -> tuple[int, int, int]:
    """Of a pattern."""
    r, g, b = (round(c + (255 - c) * share) for c in rgb)
    return r, g, b


def _draw_ground(draw: ImageDraw.ImageDraw, scene: Scene, px: int) -> None:
    light = TONES[scene.tone]
    dark = tuple(round(c * 0.86) for c in light)
    if scene.ground == "gradient":
        for y in range(px):
            draw.line([(0, y), (px, y)], fill=tuple(round(c * (1 - 0.35 * y / px)) for c in light))
    elif scene.ground == "checkered":
        step = px / 8
        for k in range(64):
            if (k // 8 + k % 8) % 2:
                left, top = k % 8 * step, k // 8 * step
                draw.rectangle([left, top, left + step, top + step], fill=dark)
    elif scene.ground == "lined":
        for k in range(0, 16, 2):
            draw.rectangle([0, k * px / 16, px, (k + 1) * px / 16], fill=dark)
    elif scene.ground == "speckled":
        rng = random.Random(scene.seed ^ 0x5EED)
        for _ in range(150):
            cx, cy, r = rng.uniform(0, px), rng.uniform(0, px), px * 0.012
            draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=tuple(round(c * 0.72) for c in light))


def draw_thing(image: Image.Image, thing: Thing, px: int) -> None:
    x = px * ((thing.place % 3 + 0.5) / 3 + thing.dx)
    y = px * ((thing.place // 3 + 0.5) / 3 + thing.dy)
    r = px * SIZES[thing.size]
    mask = Image.new("L", (px, px))
    pen = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
        if thing.shape == "ring":
            pen.ellipse([x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r], fill=0)
    else:
        pen.polygon(_polygon(thing.shape, x, y, r), fill=255)
    rgb = COLOURS[thing.colour]
    paint = Image.new("RGB", (px, px), rgb)
    pen = ImageDraw.Draw(paint)
    step = px * 0.06
    if thing.pattern == "striped":
        for k in range(-4, 5):
            pen.rectangle([x + k * step, y - r, x + (k + 0.45) * step, y + r], fill=lighter(rgb))
    elif thing.pattern == "dotted":
        for k in range(49):
            cx, cy = x + (k % 7 - 3) * step, y + (k // 7 - 3) * step
            pen.ellipse(
                [cx - 0.3 * step, cy - 0.3 * step, cx + 0.3 * step, cy + 0.3 * step], fill=lighter(rgb)
            )
    image.paste(paint, mask=mask)


def draw(scene: Scene, px: int) -> Image.Image:
    """The scene as an RGB picture of px x px pixels."""
    image = Image.new("RGB", (px, px), TONES[scene.tone])
    _draw_ground(ImageDraw.Draw(image), scene, px)
    for thing in scene.things:
        draw_thing(image, thing, px)
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# --- captions -----------------------------------------------------------------------------------------------

_NUMBER = ("no objects", "one object", "two objects", "three objects", "four objects")
_OPENERS = {  # the background decides the opening, so that a captioner can vary as the pictures do
    "plain": ("The image shows {n} on a plain {tone} background.",
              "On a plain {tone} background there is {list0}."),
    "gradient": ("A {tone} gradient fills the background of this picture of {n}.",
                 "The picture shows {n} in front of a {tone} gradient."),
    "checkered": ("This is a picture of {n} on a {tone} checkered background.",
                  "A {tone} checkered pattern lies behind {n}."),
    "lined": ("{N} can be seen on a background of {tone} lines.",
              "The background is lined in {tone}, with {n} on it."),
    "speckled": ("The scene contains {n} over a speckled {tone} background.",
                 "Speckles cover the {tone} background behind {n}."),
}  # fmt: skip
_SENTENCES = ("There is {a} {where}.", "{A} sits {where}.", "{Where} is {a}.", "{A} can be seen {where}.")


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def describe(scene: Scene, rng: random.Random) -> str:
    """A long, exact caption: a sentence on the background, one for each thing, one relation if there are two.

    `rng` chooses among wordings; every choice is also tilted by what is visible, as a human's would be.
    """
    n = _NUMBER[len(scene.things)]
    opener = _OPENERS[scene.ground][0 if rng.random() < 0.75 else 1].format(
        n=n, N=_upper(n), tone=scene.tone, list0=n if len(scene.things) == 1 else f"a group of {n}"
    )
    sentences = [opener]
    for thing in scene.things:
        where = PLACES[thing.place]
        usual = SHAPES.index(thing.shape) % len(_SENTENCES)
        form = _SENTENCES[usual if rng.random() < 0.75 else rng.randrange(len(_SENTENCES))]
        a = _article(thing.phrase)
        sentences.append(form.format(a=a, A=_upper(a), where=where, Where=_upper(where)))
    if len(scene.things) > 1:
        first, second = scene.things[0], scene.things[-1]
        level = first.place // 3 == second.place // 3
        if rng.random() < 0.75:
            sentences.append(
                f"The {first.name} is {'to the left of' if level else 'above'} the {second.name}."
            )
        else:
            sentences.append(
                f"The {second.name} is {'to the right of' if level else 'below'} the {first.name}."
            )
    return " ".join(sentences)


def terse(scene: Scene) -> str:
    """A short exact caption, as in LLaVA's first stage: phrases and places, nothing else."""
    things = "; ".join(f"{thing.phrase} {PLACES[thing.place]}" for thing in scene.things)
    return f"{scene.ground} {scene.tone}: {things}."


_LISTS = {  # of short captions: after the things, or before them
    "plain": ("{List} on a {tone} background.", "A {tone} background with {list}."),
    "gradient": ("{List} before a {tone} gradient.", "A {tone} gradient behind {list}."),
    "checkered": ("{List} on {tone} checks.", "A {tone} checkered background with {list}."),
    "lined": ("{List} over {tone} lines.", "A background of {tone} lines with {list}."),
    "speckled": ("{List} on a speckled {tone} background.", "Speckled {tone} behind {list}."),
}


def short(scene: Scene, rng: random.Random) -> str:
    """One exact sentence of fewer than 20 words; of three things or four it gives colour and shape alone."""
    few = len(scene.things) < 3
    things = [_article(thing.phrase if few else thing.name) for thing in scene.things]
    listed = " and ".join(part for part in (", ".join(things[:-1]), things[-1]) if part)
    form = _LISTS[scene.ground][0 if rng.random() < 0.75 else 1]
    return form.format(list=listed, List=_upper(listed), tone=scene.tone)


def structured(scene: Scene) -> str:
    """The scene as JSON of the schema of `kinds.STRUCTURED`: things and background, and the relation that
    `describe` tells.
    """
    objects = [
        {
            "name": thing.shape,
            "attributes": [thing.colour, thing.size, *([thing.pattern] if thing.pattern != "plain" else [])],
        }
        for thing in scene.things
    ]
    objects.append({"name": "background", "attributes": [scene.tone, scene.ground]})
    relations = []
    if len(scene.things) > 1:
        first, second = scene.things[0], scene.things[-1]
        relation = "left of" if first.place // 3 == second.place // 3 else "above"
        relations.append({"subject": first.name, "relation": relation, "object": second.name})
    return json.dumps({"objects": objects, "relations": relations, "text": []}, separators=(",", ":"))


_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b")


def named_pairs(caption: str) -> frozenset[str]:
    """The (colour, shape) pairs that a caption names."""
    return frozenset(f"{colour} {shape}" for colour, shape in _NAMED.findall(caption.lower()))


_WHERE = re.compile("|".join(sorted(PLACES, key=len, reverse=True)))


def placed_pairs(caption: str) -> list[tuple[int, int, str]]:
    """Where a sentence ends that says of one pair where it is; the place, and the pair."""
    found = []
    for sentence in re.finditer(r"[^.]+\.", caption.lower()):
        pairs, where = _NAMED.findall(sentence[0]), _WHERE.search(sentence[0])
        if where and len(pairs) == 1:
            found.append((sentence.end(), PLACES.index(where[0]), " ".join(pairs[0])))
    return found


# --- alt text, as found -------------------------------------------------------------------------------------

_FOREIGN = (  # template, colours in the order of COLOURS, shapes in the order of SHAPES
    (
        "Ein schönes Bild mit {c} {s} für Ihre Wohnung",
        "rotem orangem gelbem grünem türkisem blauem lila schwarzem",
        "Kreis Quadrat Dreieck Stern Kreuz Ring Rhombus",
    ),
    (
        "Une jolie photo avec un {s} {c} pour la maison",
        "rouge orange jaune vert turquoise bleu violet noir",
        "cercle carré triangle étoile croix anneau losange",
    ),
    (
        "{c}{s} 画像 無料ダウンロード 高画質",
        "赤い 橙色の 黄色い 緑の 水色の 青い 紫の 黒い",
        "円 四角形 三角形 星 十字 輪 ひし形",
    ),
)


def alt_text(scene: Scene, rng: random.Random) -> str:
    """Alt text as the web has it.

    Useful, terse, file names, shop spam, other languages, about another picture.
    """
    thing = rng.choice(scene.things)
    kinds: list[tuple[float, Callable[[], str]]] = [
        (0.30, lambda: " and ".join(t.name for t in scene.things) + f" on {scene.tone}"),
        (0.15, lambda: _upper(" with ".join(t.phrase for t in scene.things[:2])) + " clip art"),
        (0.15, lambda: thing.name),
        (
            0.08,
            lambda: rng.choice(("IMG_{:04d}.JPG", "DSC{:05d}", "image{}.png", "{}_large.jpg")).format(
                rng.randrange(9999)
            ),
        ),
        (0.10, lambda: f"{thing.name.title()} {rng.randrange(100, 999)} - Best Price Online | Free Shipping"),
        (0.09, lambda: _foreign(thing, rng)),
        (0.07, lambda: alt_text(globals()["scene"](rng.getrandbits(39)), rng)),  # about another picture
        # An escape that somebody forgot to undo.
        (0.04, lambda: f"{thing.name} \\xc2\\xae wall d\\xc3\\xa9cor"),
        (0.02, lambda: ""),
    ]
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()


def _foreign(thing: Thing, rng: random.Random) -> str:
    template, colours, shapes = rng.choice(_FOREIGN)
    colour = colours.split()[list(COLOURS).index(thing.colour)]
    return template.format(c=colour, s=shapes.split()[SHAPES.index(thing.shape)])


# --- what a model makes of captions and alt text ------------------------------------------------------------

REFUSAL = "I'm sorry, but I cannot rephrase this."
_CAMERA = re.compile(r"(?:IMG_|DSC)\d+")
_SOLD = re.compile(r"(.+ \d+) - Best Price")
_FOREIGN_MORE = ("for the home", "for the home", "free to download")  # beside the pair, as `_FOREIGN`


def fuse(alt: str, short: str) -> str:
    """A short caption with what alt text adds to it, where that is about the same things.

    The names that cameras give to files are refused.
    """
    if _CAMERA.match(alt):
        return REFUSAL
    pair, more = _foreign_pairs().get(alt, ("", ""))
    pairs = named_pairs(alt) | ({pair} if pair else set())
    if not pairs or not pairs <= named_pairs(short):
        return short
    start = short.removesuffix(".")
    if more:
        return f"{start}, {more}."
    if alt.endswith(" clip art"):
        return f"Clip art of {short[0].lower()}{short[1:]}"
    if sold := _SOLD.match(alt):
        return f"{start}, sold as {sold[1]}."
    return f"{start}, as wall decor." if " wall d" in alt else short


@cache
def _foreign_pairs() -> dict[str, tuple[str, str]]:
    """Alt text in another language -> the pair that it names, and what else it says."""
    return {
        template.format(c=c, s=s): (f"{colour} {shape}", more)
        for (template, colours, shapes), more in zip(_FOREIGN, _FOREIGN_MORE, strict=True)
        for colour, c in zip(COLOURS, colours.split(), strict=True)
        for shape, s in zip(SHAPES, shapes.split(), strict=True)
    }


def flawed(scene: Scene, rng: random.Random) -> str:
    """A description as a captioner may write it: right, with things taken for others, of another scene, cut
    off, or in a loop.
    """
    draw = rng.random()
    if draw < 0.15:
        return describe(globals()["scene"](rng.getrandbits(39)), rng)
    if draw < 0.55:
        names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(scene.things))
        wrong = set(rng.sample(range(len(scene.things)), rng.randint(1, len(scene.things))))
        things = []
        for place, (thing, (colour, shape)) in enumerate(zip(scene.things, names, strict=True)):
            kept = rng.random()  # of a thing that is taken for another, one half may be right
            shape, colour = thing.shape if kept < 0.3 else shape, thing.colour if kept > 0.7 else colour
            things.append(replace(thing, shape=shape, colour=colour) if place in wrong else thing)
        return describe(replace(scene, things=tuple(things)), rng)
    text = describe(scene, rng)
    if draw < 0.60:
        words = text.split()
        return " ".join(words[: rng.randint(len(words) // 2, len(words) - 1)])
    if draw < 0.65:
        sentences = text.removesuffix(".").split(". ")
        place = rng.randrange(len(sentences))
        return ". ".join(sentences[: place + 1] + [sentences[place]] * rng.randint(2, 4)) + "."
    return text


def rating(scene: Scene, caption: str) -> int:
    """1 to 5: by the share of (colour, shape) pairs that are right; a caption that is cut off, or says a
    sentence twice, has one less for that.
    """
    named = named_pairs(caption)
    share = len(named & scene.pairs) / max(len(named), len(scene.pairs))
    sentences = caption.removesuffix(".").split(". ")
    flaws = (not caption.endswith(".")) + (len(set(sentences)) < len(sentences))
    return max(1, 1 + int(4 * share + 0.5) - flaws)


if __name__ == "__main__":
    seed = int(sys.argv[1])
    draw(scene(seed), 256).save(f"scene-{seed}.png")
    print(
        describe(scene(seed), random.Random(seed)),
        terse(scene(seed)),
        alt_text(scene(seed), random.Random(seed)),
        sep="\n",
    )
