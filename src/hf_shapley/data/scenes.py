"""Scenes of two coloured shapes and what is seen in them: pictures with words, nothing needs a download."""

import random
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 200, 30)}
SHAPES = ("circle", "square", "triangle", "cross")
# What a word says of the first object: the step to it from the second one, in columns and rows.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# The end must not be token 2, of which CLIP believes that it stands for the largest id.
SPECIAL = ("[PAD]", "[UNKNOWN]", "[BEGIN]", "[END]")
LONGEST = 11  # tokens: begin, a red circle left of a blue square, end; and one to spare


def scenes_dataset(count: int = 1000, *, size: int = 32, seed: int = 0) -> Dataset:
    """Draw scenes of two objects at random places, with captions such as "a red circle left of a blue square".

    Args:
        count: how many.
        size: of a picture, in pixels, at least 16.
        seed: the same seed draws the same scenes.

    Returns:
        Columns `image` (PIL, RGB), `text`, and `boxes`: (left, top, right, bottom) in pixels of the object that the
        text names first, and of the other.
    """
    draws = random.Random(seed)
    columns: dict[str, list[Any]] = {"image": [], "text": [], "boxes": []}
    for _ in range(count):
        image, text, boxes = _scene(draws, size)
        columns["image"].append(image)
        columns["text"].append(text)
        columns["boxes"].append(boxes)
    features = Features({"image": Image(), "text": Value("string"), "boxes": List(List(Value("int32")))})
    return Dataset.from_dict(columns, features=features)


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the captions' words, one token each, between a begin and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({"a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNKNOWN]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BEGIN] $A [END]", special_tokens=[(name, vocabulary[name]) for name in ("[BEGIN]", "[END]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        bos_token="[BEGIN]",
        eos_token="[END]",
        unk_token="[UNKNOWN]",
        model_max_length=LONGEST,
    )


def _scene(draws: random.Random, size: int) -> tuple[PILImage.Image, str, list[list[int]]]:
    """A picture, its caption and both objects' boxes."""
    relation = draws.choice(list(RELATIONS))
    column, row = RELATIONS[relation]
    extent, half = round(0.34 * size), size // 2
    places = []
    for sign in (1, -1):  # each in the half of the picture that the relation says, anywhere across it
        place = []
        for direction in (column, row):
            low = {-1: 0, 0: 0, 1: half}[sign * direction]
            high = {-1: half, 0: size, 1: size}[sign * direction]
            place.append(draws.randint(low, high - extent))
        places.append([place[0], place[1], place[0] + extent, place[1] + extent])
    names = [(draws.choice(list(COLOURS)), draws.choice(SHAPES)) for _ in places]
    image = PILImage.new("RGB", (size, size), (245, 245, 245))
    pencil = ImageDraw.Draw(image)
    for (colour, shape), box in zip(names, places, strict=True):
        _draw(pencil, shape, COLOURS[colour], box)
    first, second = (f"a {colour} {shape}" for colour, shape in names)
    return image, f"{first} {relation} {second}", places


def _draw(pencil: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], box: list[int]) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    third = (right - left) // 3
    if shape == "circle":
        pencil.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pencil.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        pencil.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=colour)
    else:
        pencil.rectangle((left + third, top, right - third, bottom), fill=colour)
        pencil.rectangle((left, top + third, right, bottom - third), fill=colour)
