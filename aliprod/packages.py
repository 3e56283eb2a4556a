"""The packaged goods of the demo catalogue: how they look, and how they are photographed.

Each level of the product tree decides what a shopper expects of it: the department the pattern, the category
the package, the brand its word, emblem, palette, typeface and layout. Products of one brand differ only in
flavour (accent colour, icon, word) and a little in width, so siblings are hard to tell apart.

A photograph takes three steps: the flat print that wraps round a package (`_package`), the package seen from
one side (`_view`: its print bent round the body and shaded), packages before a camera (`photograph`).
Colours are BGR; lengths are shares of the package, label or scene they lie on unless pixels are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy import ndarray as Array
from numpy.random import Generator, default_rng

if TYPE_CHECKING:
    from aliprod.catalogue import Plan

WRAP = 2.5  # width of a print in widths of its package: all that a turned package can show
DEPTH = 0.45  # of a box, in widths of its front
FLOOR = 0.72  # height in a scene at which packages stand

Box = Sequence[float] | Array  # x and y of the middle, width, height
Formula = Callable[[Array, Array], Array]  # (x from the middle, y from the top) -> mask


class Kind(NamedTuple):
    """A kind of package: its outline runs from the top through points (y, half-width)."""

    bulge: float  # of its section: 0 a box, 1 a cylinder
    width: float  # of its height
    gloss: float
    cap: tuple[float, float]  # top and bottom
    label: tuple[float, float]  # top and bottom
    outline: tuple[tuple[float, float], ...]


# fmt: off
KINDS = {
    "bottle": Kind(1, 0.36, 0.45, (0, 0.1), (0.43, 0.88), (
        (0, 0.34), (0.1, 0.34), (0.11, 0.28), (0.17, 0.28), (0.33, 0.93), (0.4, 1), (0.95, 1), (1, 0.9))),
    "can": Kind(1, 0.54, 0.35, (0, 0.04), (0.05, 0.96), (
        (0, 0.86), (0.03, 0.88), (0.08, 1), (0.93, 1), (0.98, 0.88), (1, 0.85))),
    "carton": Kind(0, 0.66, 0.05, (0, 0), (0, 1), ((0, 1), (1, 1))),
    "jar": Kind(1, 0.7, 0.4, (0, 0.16), (0.32, 0.9), (
        (0, 0.86), (0.16, 0.86), (0.17, 0.8), (0.21, 0.92), (0.28, 1), (0.94, 1), (1, 0.9))),
    "pouch": Kind(0.6, 0.72, 0.2, (0, 0.05), (0, 1), (
        (0, 0.98), (0.05, 0.98), (0.2, 0.93), (0.5, 0.91), (0.8, 0.94), (0.95, 1), (1, 0.98))),
    "tube": Kind(1, 0.38, 0.3, (0.86, 1), (0.05, 0.8), (
        (0, 1), (0.05, 1), (0.5, 0.93), (0.82, 0.84), (0.87, 0.55), (1, 0.5))),
    "tub": Kind(1, 1.1, 0.2, (0, 0.14), (0.17, 0.97), ((0, 1), (0.14, 1), (0.15, 0.95), (1, 0.78))),
    "flacon": Kind(0.8, 0.48, 0.3, (0, 0.16), (0.36, 0.94), (
        (0, 0.3), (0.16, 0.34), (0.17, 0.26), (0.2, 0.26), (0.27, 0.8), (0.35, 1), (0.94, 0.96), (1, 0.88))),
}
DEPARTMENTS = {  # pattern (x, y in label widths from the top middle -> mask), kinds of package by category
    "Drinks": (lambda x, y: np.sin(34 * y + 1.6 * np.sin(14 * x)) > 0.3,
               {"Juice": "bottle", "Soda": "can", "Syrup": "flacon", "Tea": "carton"}),
    "Pantry": (lambda x, y: np.sin(22 * x) * np.sin(22 * y) > 0,
               {"Cereal": "carton", "Jam": "jar", "Coffee": "pouch", "Soup": "can"}),
    "Care": (lambda x, y: np.sin(15 * (x + y)) * np.sin(15 * (x - y)) > 0.45,
             {"Shampoo": "flacon", "Toothpaste": "tube", "Cream": "tub", "Soap": "carton"}),
    "Snacks": (lambda x, y: np.sin(30 * (x + y)) > 0.2,
               {"Crisps": "pouch", "Nuts": "can", "Biscuits": "carton", "Sorbet": "tub"}),
    "Baby": (lambda x, y: np.sin(30 * x) * np.sin(30 * y) > 0.55,
             {"Puree": "jar", "Formula": "tub", "Wipes": "pouch", "Lotion": "tube"}),
}
WORDS = [head + tail for tail in ("umo", "ora", "ella", "ix", "ando", "ia", "etto", "ola", "illo", "us")
         for head in ("Vel", "Bru", "Tin", "Osk", "Quil", "Mar", "Fol", "Zeph", "Nub", "Pim", "Dorn", "Hal")]
PALETTES = (  # ground, contrast, ink
    ("12408f", "f3f0e6", "ffffff"), ("f4ead2", "7a2e1d", "5b1f14"), ("b3202c", "f7d44c", "fff7e0"),
    ("1d6b3f", "e9f1d8", "f6f3d0"), ("f6f6f4", "5a7fb0", "1c2b4a"), ("f2b01e", "fff3cf", "3a2a18"),
    ("3c2358", "b98ac4", "f7e9ff"), ("0f7f86", "fdf3dc", "ffffff"), ("20242b", "8a6f35", "e2c26b"),
    ("f7c9cf", "ffffff", "8c1740"), ("e2662b", "7c2c0c", "fff6e8"), ("cfe3ee", "ffffff", "173f5f"),
)
FONTS = (cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_SIMPLEX,
         cv2.FONT_HERSHEY_COMPLEX | cv2.FONT_ITALIC, cv2.FONT_HERSHEY_SCRIPT_COMPLEX)
SHAPES = {  # lobes, n1, n2, n3 of https://en.wikipedia.org/wiki/Superformula
    "disc": (0, 1, 1, 1), "square": (4, 8, 8, 8), "diamond": (4, 1, 1, 1), "astroid": (4, 0.5, 0.5, 0.5),
    "triangle": (3, 4.5, 10, 10), "star": (5, 0.7, 0.8, 0.8), "flower": (6, 1, 4, 8), "bean": (2, 1, 4, 8),
    "leaf": (2, 0.6, 0.6, 0.6), "drop": (1, 0.6, 0.6, 0.6), "burst": (16, 3, 3, 3), "hexagon": (6, 12, 8, 8),
}
FLAVOURS = {  # colour, shape and number of pieces of the icon
    "Lemon": ("f2cf1d", "leaf", 2), "Cherry": ("b01030", "disc", 2), "Mint": ("4fb58a", "leaf", 5),
    "Vanilla": ("ecd9a0", "flower", 1), "Cocoa": ("5a3420", "bean", 3), "Berry": ("3b4aa0", "disc", 5),
    "Apple": ("7fb13a", "drop", 1), "Peach": ("f29a6b", "disc", 1), "Coconut": ("a58a6a", "hexagon", 1),
    "Rose": ("d8527c", "flower", 3), "Lavender": ("8a6fb8", "leaf", 3), "Honey": ("dd9a1e", "hexagon", 4),
    "Almond": ("b9814f", "drop", 4), "Lime": ("a5c828", "disc", 3), "Fig": ("6a2a5a", "drop", 2),
}
LAYOUTS = (  # accent field (x from the middle, y from the top -> mask); boxes of emblem, word, icon, flavour
    (lambda x, y: abs(y - 0.68) < 0.16,
     (0, 0.14, 0.3, 0.22), (0, 0.36, 0.86, 0.19), (-0.29, 0.68, 0.26, 0.26), (0.15, 0.68, 0.54, 0.13)),
    (lambda x, y: y > 0.52 + 0.05 * np.sin(7 * x),
     (-0.33, 0.14, 0.24, 0.2), (0.1, 0.32, 0.76, 0.22), (0, 0.64, 0.34, 0.3), (0, 0.9, 0.7, 0.11)),
    (lambda x, y: (x / 0.4) ** 2 + ((y - 0.68) / 0.26) ** 2 < 1,
     (0.33, 0.12, 0.22, 0.2), (-0.03, 0.28, 0.88, 0.2), (0, 0.59, 0.3, 0.24), (0, 0.8, 0.5, 0.1)),
    (lambda x, y: y > 0.75 - 0.5 * x,
     (-0.28, 0.78, 0.28, 0.28), (0, 0.18, 0.88, 0.22), (0.26, 0.78, 0.3, 0.3), (-0.1, 0.44, 0.7, 0.12)),
    (lambda x, y: abs(x) > 0.36,
     (0, 0.7, 0.34, 0.26), (0, 0.15, 0.64, 0.18), (0, 0.4, 0.28, 0.24), (0, 0.91, 0.56, 0.1)),
)
SURFACES = {  # cells of the grain down and across, its strength, colour
    "plaster": (4, 4, 9, (195, 200, 205)), "wood": (70, 3, 11, (65, 110, 165)),
    "stone": (60, 60, 8, (150, 155, 160)), "steel": (2, 30, 7, (190, 190, 188)),
    "gloom": (3, 3, 9, (75, 75, 80)),
}
SCENES = {  # share of the photographs, wall, ground, chance that one more package stands beside
    "shelf": (0.4, "gloom", "steel", 0.95), "table": (0.2, "plaster", "wood", 0.2),
    "studio": (0.12, "plaster", "plaster", 0.0), "tiles": (0.13, "plaster", "stone", 0.2),
    "clutter": (0.15, "plaster", "wood", 0.4),
}
FRAMES = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16))  # width : height of a photograph
# fmt: on


def path(plan: Plan, label: int) -> tuple[str, str, str, str]:
    """The names of a product from its department down to its flavour."""
    brand, product = divmod(label, plan.products)
    department, category = divmod(brand // plan.brands, plan.categories)
    word = default_rng([plan.seed, 0]).permutation(WORDS)[brand]
    flavour = default_rng([plan.seed, 1, brand]).permutation(list(FLAVOURS))[product]
    name, (_, categories) = tuple(DEPARTMENTS.items())[department]
    return name, tuple(categories)[category], str(word), str(flavour)


def _draw(art: Array, shape: str, box: Box, colour: Sequence[int], pieces: int = 1) -> None:
    """Fill a box (pixels) with one shape, or with a ring of them."""
    lobes, n1, n2, n3 = SHAPES[shape]
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    reach = (abs(np.cos(lobes * angle / 4)) ** n2 + abs(np.sin(lobes * angle / 4)) ** n3) ** (-1 / n1)
    outline = np.stack([np.sin(angle), -np.cos(angle)], axis=1) * (reach / reach.max())[:, None]
    radius = min(box[2:]) / (2 if pieces == 1 else 4)
    for turn in np.arange(pieces) * 2 * np.pi / pieces:
        middle = np.array(box[:2]) + radius * (pieces > 1) * np.array([np.sin(turn), -np.cos(turn)])
        cv2.fillPoly(art, [(middle + radius * outline).astype(np.int32)], colour, cv2.LINE_AA)


def _write(art: Array, text: str, box: Box, colour: Sequence[int], font: int = FONTS[0]) -> None:
    """Write text as large as a box (pixels) allows."""
    (width, height), _ = cv2.getTextSize(text, font, 1, 2)
    scale = min(box[2] / width, box[3] / height)
    start = int(box[0] - scale * width / 2), int(box[1] + scale * height / 2)
    cv2.putText(art, text, start, font, scale, colour, max(1, int(0.13 * scale * height)), cv2.LINE_AA)


@lru_cache(maxsize=64)
def _package(plan: Plan, label: int) -> tuple[Kind, float, Array]:
    """A product's kind of package, its width over its height, the flat print from mid-back to mid-back."""
    department, category, word, flavour = path(plan, label)
    pattern, kinds = DEPARTMENTS[department]
    kind, look = KINDS[kinds[category]], plan.seed + label // plan.products  # brands take turns in the tables
    tint, shape, pieces = FLAVOURS[flavour]
    colours = (*PALETTES[look % len(PALETTES)], tint)
    ground, contrast, ink, accent = (tuple(bytes.fromhex(colour)[::-1]) for colour in colours)
    font, (field, *boxes) = FONTS[look % len(FONTS)], LAYOUTS[look // 2 % len(LAYOUTS)]
    width = kind.width * (0.9, 1.0, 1.1)[label % 3]
    height, front = 2 * plan.size, int(2 * plan.size * width)  # drawn twice as large, for smooth edges
    art = np.full((height, int(WRAP * front), 3), accent if kind.bulge == 1 else ground, np.uint8)
    art[int(height * kind.cap[0]) : int(height * kind.cap[1])] = contrast
    paper = art[int(height * kind.label[0]) : int(height * kind.label[1])]
    deep, wide = paper.shape[:2]
    x, y = np.meshgrid((np.arange(wide) - wide / 2) / front, np.arange(deep) / deep)
    inside = field((x + 0.5) % 1 - 0.5, y)  # on the front, and again on the sides
    rim = cv2.dilate(inside.astype(np.uint8), np.ones((front // 40 + 1,) * 2)) > 0
    blurb = (abs(abs(x) - 0.9) < 0.15) & (abs(y - 0.5) < 0.27)
    paper[:] = ground
    paper[pattern(x, y * deep / front)] = np.average((ground, contrast), 0, (0.84, 0.16))
    paper[rim] = contrast
    paper[inside] = accent
    paper[blurb] = 245
    paper[blurb & (np.sin(75 * y) > 0.4)] = 70
    emblem, title, icon, name = np.array(boxes) * (front, deep, front, deep) + (wide / 2, 0, 0, 0)
    _draw(paper, tuple(SHAPES)[5 * look % len(SHAPES)], emblem, ink)
    _write(paper, word, title + (0, 0.08 * title[3], 0, 0), contrast, font)
    _write(paper, word, title, ink, font)
    _draw(paper, "disc", icon, (240, 248, 250))
    _draw(paper, shape, icon * (1, 1, 0.8, 0.8), accent, pieces)
    dark = paper[int(name[1]), int(name[0])].mean() < 130
    _write(paper, flavour, name, (255, 255, 255) if dark else (40, 30, 30))
    return kind, width, cv2.resize(art, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def _view(plan: Plan, label: int, height: int, lamp: float, rng: Generator) -> Array:
    """A package `height` pixels high, turned by chance, lit from `lamp` (radians): BGR x cover, cover."""
    kind, share, art = _package(plan, label)
    bulge, outline = kind.bulge, np.transpose(kind.outline)
    yaw, pitch = np.clip(rng.normal(0, 0.3), -0.7, 0.7), rng.uniform(0.01, 0.08) * share * bulge
    side = 0.0 if bulge else DEPTH * abs(np.sin(yaw))
    width = int(height * share * (1 + side))
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-pitch, 1 + pitch, height))
    # Seen at (x, y) is the print `down` the package and `along` it from the middle of its front.
    if bulge:
        down = y - pitch * np.sqrt(np.maximum(np.interp(y, *outline) ** 2 - x**2, 0))
        angle = np.arcsin(np.clip(x / np.interp(down, *outline), -1, 1) * bulge)
        along, light = (angle / bulge + yaw * bulge) / 2, 0.5 + 0.6 * np.cos(angle - lamp)
        lid = x**2 + (y / pitch) ** 2 < kind.outline[0][1] ** 2
        down[lid], light[lid] = 0, 1.1
    else:
        turned, edge = x * np.copysign(1, yaw), (1 - side) / (1 + side)  # where the front ends
        down = 0.5 + (y - 0.5) * (1 + 0.25 * side * abs(turned - edge))
        front, flank = (turned + 1) / (edge + 1) - 0.5, 0.5 + DEPTH * (turned - edge) / (1 - edge)
        along = np.where(turned < edge, front, flank) * np.copysign(1, yaw)
        light = np.where(turned < edge, 1.0, 0.7) * (1.05 - 0.12 * y)
    radius = np.interp(down, *outline)
    light += kind.gloss * np.exp(-(((x / radius - 0.6 * np.sign(lamp)) / 0.1) ** 2))
    cover = np.clip((radius - abs(x)) * width / 2, 0, 1)
    cover *= np.clip((0.5 - abs(down - 0.5)) * height + 0.5, 0, 1)
    across, down = (along / WRAP + 0.5) * art.shape[1], down * art.shape[0]
    colour = cv2.remap(art, across.astype(np.float32), down.astype(np.float32), cv2.INTER_LINEAR)
    colour = np.minimum(colour * light[..., None].astype(np.float32), 255)
    return (np.dstack([colour, np.full_like(cover, 255)]) * cover[..., None]).astype(np.uint8)


def _surface(name: str, height: int, width: int, rng: Generator) -> Array:
    *cells, strength, colour = SURFACES[name]
    paint = np.array(colour) * rng.uniform(0.6, 1.1) * rng.uniform(0.9, 1.1, 3)
    grain = (paint + rng.normal(0, strength, (*cells, 1))).clip(0, 255).astype(np.uint8)
    return cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)


def _scene(side: int, rng: Generator) -> tuple[Array, float]:
    """A square place with nothing in it, and how likely one more package stands beside another there."""
    name = rng.choice(list(SCENES), p=[share for share, *_ in SCENES.values()])
    _, wall, ground, crowd = SCENES[name]
    edge, floor = int(side * (FLOOR - rng.uniform(0.02, 0.1))), int(side * FLOOR)
    scene = np.vstack([_surface(wall, edge, side, rng), _surface(ground, side - edge, side, rng)])
    if name == "studio":
        scene = cv2.blur(scene, (1, side // 3))
    elif name == "tiles":
        step = side // int(rng.integers(7, 14))
        scene[:edge:step] = scene[:edge, ::step] = rng.integers(120, 230)
    elif name == "clutter":
        for shape in rng.choice(list(SHAPES), 30):
            box = *rng.uniform(0, (side, edge)), *rng.uniform(0.1, 0.3, 2) * side
            _draw(scene[:edge], shape, box, rng.integers(20, 230, 3).tolist())
        scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.01, 0.025) * side)
    elif name == "shelf":
        rail, top = side // 16, floor + side // 48
        scene[top : top + rail], scene[top + rail :] = rng.integers(40, 235, 3), 25
        for x in range(int(rng.integers(rail * 4)), side, rail * 5):
            scene[top + rail // 8 : top + rail * 7 // 8, x : x + 2 * rail] = 240
            price = f"{rng.uniform(1, 9):.2f}"
            _write(scene, price, (x + rail, top + rail / 2, 1.6 * rail, 0.5 * rail), (30, 30, 30))
    return scene, crowd


def _paste(scene: Array, view: Array, middle: float, base: float, lamp: float) -> None:
    """Stand a package on the line `base` (pixels) of a scene; its shadow lies on the ground."""
    height, width = view.shape[:2]
    left, top = int(middle - width / 2), int(base - height)
    x0, y0 = max(left - height // 3, 0), max(top, 0)
    patch = scene[y0 : top + height * 13 // 12, x0 : left + width + height // 3]
    size, lean, squash = patch.shape[1::-1], 0.6 * lamp, 0.16
    lie = ((1, lean, left - x0 - lean * height), (0, squash, base - squash * height - y0))
    shadow = cv2.blur(cv2.warpAffine(view[..., 3], np.array(lie), size), (height // 12 + 1, height // 16 + 1))
    stand = cv2.warpAffine(view, np.array(((1.0, 0, left - x0), (0, 1, top - y0))), size)
    kept = ((255 - stand[..., 3]) * (1 - shadow * np.float32(0.6 / 255))).astype(np.uint8)
    patch[:] = cv2.add(cv2.multiply(patch, cv2.merge([kept] * 3), scale=1 / 255), stand[..., :3])


def _arrange(plan: Plan, label: int, side: int, tall: int, rng: Generator) -> Array:
    """A square scene with the product, `tall` pixels high, in its middle."""
    scene, crowd = _scene(side, rng)
    middle, base, lamp = side / 2, side * FLOOR, rng.uniform(0.2, 0.8) * rng.choice((-1, 1))
    view = _view(plan, label, tall, lamp, rng)
    kin = plan.brands * plan.products  # classes of one category
    for direction in (-1, 1):
        reach = view.shape[1] / 2
        while reach < side / 2 and rng.random() < crowd:
            other = label if rng.random() < 0.3 else label // kin * kin + int(rng.integers(kin))
            near = _view(plan, other, int(tall * rng.uniform(0.9, 1.05)), lamp, rng)
            reach += near.shape[1] / 2 + tall * rng.uniform(0.01, 0.06)
            _paste(scene, near, middle + direction * reach, base, lamp)
            reach += near.shape[1] / 2
    _paste(scene, view, middle, base, lamp)
    if rng.random() < 0.15:
        x, y = rng.normal(middle, view.shape[1] / 3), base - tall * rng.uniform(0.1, 0.9)
        _draw(scene, "burst", (x, y, tall / 3, tall / 3), (40, 40, 225))
        _write(scene, f"-{rng.integers(1, 6)}0%", (x, y, tall / 5, tall / 10), (255, 255, 255))
    return scene


def photograph(plan: Plan, label: int, rng: Generator) -> Array:
    """One picture of a product: the camera is held askew, at some distance, in some light."""
    frame, longest = np.array(FRAMES[rng.integers(len(FRAMES))]), rng.uniform(0.625, 1.2) * plan.size
    width, height = (int(edge) for edge in longest * frame / frame.max())
    tall = int(rng.uniform(0.6, 1.05) * min(height, width / _package(plan, label)[1]))
    side = int(1.5 * longest)
    scene = _arrange(plan, label, side, tall, rng)
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
    roll = np.clip(rng.normal(0, 0.17), -0.44, 0.44)
    turned = corners @ ((np.cos(roll), np.sin(roll)), (-np.sin(roll), np.cos(roll)))
    aim = (side / 2, side * FLOOR - tall / 2) + rng.normal(0, 0.07, 2) * (width, height)
    seen = aim + turned * rng.uniform(0.86, 1.12, (4, 2))
    lens = cv2.getPerspectiveTransform(seen.astype(np.float32), (corners - corners[0]).astype(np.float32))
    picture = cv2.warpPerspective(scene, lens, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.08:
        picture = np.rot90(picture, rng.choice((1, 3)))
    picture = cv2.GaussianBlur(picture, (0, 0), 0.1 + rng.gamma(1.2, 0.5) * plan.size / 320)
    warmth = rng.normal(0, 0.09)
    lamps = rng.normal(rng.uniform(0.65, 1.35), 0.12, (2, 2, 1)) * (1 - warmth, 1, 1 + warmth)
    light = cv2.resize(lamps.astype(np.float32), picture.shape[1::-1])  # uneven across the picture
    noise = rng.uniform(0, 7) * rng.standard_normal((*picture.shape[:2], 1), np.float32)
    return np.clip(picture * light + noise, 0, 255).astype(np.uint8)
