"""Classes of published datasets in the order of their labels, and the selection by `data.classes`."""

import difflib
import re
from collections.abc import Sequence

from torchvision import datasets

from .guard import DataError

UNNAMED = re.compile(r"(class )?\d+|#[0-9a-f]{6}|background|object")  # names that readers give to unnamed classes

# Zhou et al., "Scene Parsing through ADE20K Dataset": objectInfo150.txt of the set, the first name of each
_ADE20K = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck,
tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock,
flag
"""
ADE20K = tuple(name.strip() for name in _ADE20K.split(","))

# Cordts et al., arXiv 1604.01685: the 19 classes that are evaluated, each with its number in *_labelIds.png
CITYSCAPES_IDS = {each.name: each.id for each in datasets.Cityscapes.classes if 0 <= each.train_id < 255}
CITYSCAPES = tuple(CITYSCAPES_IDS)

# Everingham et al., The Pascal Visual Object Classes
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

FASHION_MNIST = tuple(datasets.FashionMNIST.classes)
DIGITS = tuple("0123456789")


def choose_names(wanted: Sequence[str], names: dict[int, str], strict: bool = True) -> dict[int, str]:
    """Selects and orders the classes ``wanted`` (`data.classes`): key in ``names`` -> name. Renames all classes if the
    data have as many unnamed ones.

    Raises:
        DataError: a class is not in the data; if not ``strict``, it gets a negative key instead.
    """
    known = {name: key for key, name in names.items()}
    if len(wanted) == len(names) and all(UNNAMED.fullmatch(name) for name in known) and not set(wanted) <= set(known):
        return dict(zip(sorted(names), wanted, strict=True))
    for name in wanted:
        if name not in known and strict:
            near = difflib.get_close_matches(name, list(known), n=3) or list(known)[:10]
            raise DataError(f"data.classes: no {name!r} in the data; nearest: {', '.join(near)}")
    return {known.get(name, -1 - label): name for label, name in enumerate(wanted)}
