"""Gradio demo: ask a Shapley image classifier why, remove patches, and see whether its explanation holds.

    pip install hf_shapley[demo]
    python examples/gradio_demo/app.py --model outputs/food101 --examples pictures

Without `--model` (or the environment variable HF_SHAPLEY_MODEL) a small model first learns scikit-learn's digits,
within seconds on the CPU, and its test digits are the examples. The page opens with the first example explained.
Every answer is computed from its own picture; nothing is shared between visitors.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from math import ceil
from pathlib import Path

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The demo needs gradio: install it with `pip install hf_shapley[demo]`.") from error
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import pipeline

from hf_shapley import (
    TASK,
    ShapleyImageClassificationPipeline,
    digits_dataset,
    load_image,
    overlay,
    place_map,
    processor_geometry,
    symmetric_scale,
    train_digits_model,
    verdict,
)
from hf_shapley.models.coalitions import with_complements
from hf_shapley.models.overlay import BLUE_WHITE_RED, Box
from hf_shapley.models.posterior import GOOD_ERROR, ROUGH_ERROR, coalitions_to_ask, shapley_posterior

MAX_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
SHOWN_EDGES = (400, 720)  # shortest edge at least, longest at most, of the pictures that are shown
TOP_LABELS = 5
CHECK = 16  # evaluations of the game to judge a map by
REFINE = 256  # and to refine maps with
EXAMPLE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MOST_EXAMPLES = 20

INTRODUCTION = """
# A classifier that explains itself
A map shows how much each patch of the picture adds to a label's logit, <b class="for">red for it</b> and
<b class="against">blue against it</b>: an estimate of its Shapley value from the same forward pass as the prediction,
adding up exactly. Whose game it is: {game}.
"""
MEANINGS = {
    "good": "The patches that stand out are those that matter.",
    "rough": "Where the weight lies holds, the order of single patches may not.",
    "do not trust": "Little better than giving every patch the same.",
}
ADVICE = {
    "good": "",
    "rough": "Refine it before you rely on single patches.",
    "do not trust": "Refine it, or do not use it.",
}
ADVICE_ONCE_REFINED = {"good": "", "rough": "Take it for regions.", "do not trust": "Do not use it."}
AGREEMENTS = {
    "good": "Attributed and measured agree",
    "rough": "Attributed and measured agree roughly",
    "do not trust": "Attributed and measured are far apart",
}
FORGOTTEN = "<b>This picture is no longer kept.</b> Reload the page, or choose a picture again."
CSS = """
.scale {display: flex; align-items: center; gap: 10px; justify-content: center; font-variant-numeric: tabular-nums}
.scale .bar {flex: 0 1 260px; height: 14px; border: 1px solid #8888; border-radius: 3px}
.scale .end {white-space: nowrap}
.readout {display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center}
.readout h4 {grid-column: 1 / -1; margin: 10px 0 2px; font-weight: 600}
.readout .track {position: relative; height: 16px; background: #8882; border-radius: 3px}
.readout .fill {position: absolute; top: 0; height: 100%; border-radius: 3px}
.readout .zero {position: absolute; top: -2px; bottom: -2px; width: 1px; background: #888}
.readout .number {text-align: right; font-variant-numeric: tabular-nums}
.title {text-align: center}
.note {opacity: .8; font-size: .92em; margin-top: 8px}
.for {color: #b2182b !important}
.against {color: #2166ac !important}
.dark .for {color: #f4a582 !important}
.dark .against {color: #92c5de !important}
.message {padding: 12px 16px; border-radius: 6px; border: 1px solid #8888; background: #8882}
#message:not(:has(.message)) {display: none}
.message.refusal {border-color: #b91c1c; border-left-width: 6px}
.verdict {display: inline-block; padding: 0 8px; border-radius: 4px; font-weight: 600}
.verdict {color: white; background: #4b5563}
.verdict.good {background: #15803d}
.verdict.rough {background: #b45309}
.verdict.distrust {background: #b91c1c}
@media (max-width: 640px) {#examples .gallery-item, #examples .gallery-item img {width: 44px; height: 44px}}
.readout .holds {grid-column: 1 / -1}
"""
BAR_COLOURS = {"all patches": "#9ca3af", "the rest, attributed": "#8b5cf6", "the rest, measured": "#0d9488"}
# Few sessions are remembered: each holds one picture with its maps.
LAUNCH = {"max_file_size": MAX_BYTES, "state_session_capacity": 200, "css": CSS}


@dataclass
class Findings:
    """What the game said of one picture's maps, beyond the one pass.

    Checks and refinements take a while: they are put down here, at the picture that they belong to, whatever its
    visitor has done since.

    Args:
        maps: (K, h, w), attributions in logits; those of one pass until they are refined.
        errors: label -> error ratio of its map.
        differences: two labels, the smaller id first -> error ratio of one's map less the other's.
        refined: labels whose maps are.
        seconds: what a check took.
    """

    maps: Tensor
    errors: dict[int, float] = field(default_factory=dict)
    differences: dict[tuple[int, int], float] = field(default_factory=dict)
    refined: set[int] = field(default_factory=set)
    seconds: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """One visitor's picture and everything that was said about it: N = h x w patches, K labels.

    Args:
        picture: as shown, upright RGB.
        box: what the model sees of it, in pixels of `picture`.
        pixel_values: (1, C, H, W).
        found: its maps, and how far they are to be trusted.
        base_values: (K,), in logits.
        logits: (K,), with all patches.
        scores: the likeliest labels' names and scores.
        present: (h, w) bool, False = removed.
        values: (K,), the model's logits with the patches present.
    """

    picture: Image.Image
    box: Box
    pixel_values: Tensor
    found: Findings
    base_values: Tensor
    logits: Tensor
    scores: dict[str, float]
    present: Tensor
    values: Tensor

    @property
    def maps(self) -> Tensor:
        """(K, h, w): attributions in logits, the best that are known."""
        return self.found.maps

    @property
    def attributed(self) -> Tensor:
        """(K,): what the attributions say of the patches present, base value + their sum."""
        return self.base_values + self.maps[:, self.present].sum(-1)

    @property
    def likeliest(self) -> list[int]:
        """All labels, the highest logit first."""
        return self.logits.argsort(descending=True, stable=True).tolist()


def explain(classifier: ShapleyImageClassificationPipeline, data: bytes) -> Explanation:
    """Classify an encoded picture and attribute all of its labels.

    Raises:
        OSError: not a picture.
        ValueError: too many bytes or pixels.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"Pictures may have at most {MAX_BYTES / 1e6:.0f} MB, got {len(data) / 1e6:.1f} MB.")
    original = load_image(data, max_pixels=MAX_PIXELS)
    inputs = classifier.preprocess(original)
    everything = range(classifier.model.config.num_labels)
    outputs = classifier.forward(inputs, label_ids=everything)  # one forward pass gives all that is shown
    maps, logits = outputs["maps"][0], outputs["logits"][0]
    picture, factor = _shown(original)
    return Explanation(
        picture=picture,
        box=tuple(factor * edge for edge in processor_geometry(classifier.image_processor, original.size)),
        pixel_values=inputs["pixel_values"],
        found=Findings(maps),
        base_values=outputs["base_values"][0],
        logits=logits,
        scores={entry["label"]: entry["score"] for entry in classifier.postprocess(outputs, top_k=TOP_LABELS)},
        present=torch.ones(maps.shape[1:], dtype=torch.bool),
        values=logits,
    )


def check(classifier: ShapleyImageClassificationPipeline, explanation: Explanation, a: int, b: int | None) -> None:
    """Judge the maps that are shown, each once: all labels of a picture together, then what A has more than B.

    The same picture is always judged by the same draws.
    """
    found, model = explanation.found, classifier.model
    pixel_values = explanation.pixel_values.to(classifier.device)
    if not found.errors:
        start = time.monotonic()
        labels = list(range(len(explanation.logits)))
        draws = torch.Generator().manual_seed(0)
        errors = model.check_explanation(pixel_values, labels, evaluations=CHECK, generator=draws)[0]
        found.errors = dict(enumerate(errors.tolist()))
        found.seconds = time.monotonic() - start
    if b is not None and _pair(a, b) not in found.differences:
        draws = torch.Generator().manual_seed(1 + REFINE)  # none that refined either map
        found.differences[_pair(a, b)] = difference_error(classifier, explanation, a, b, draws)


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def difference_error(
    classifier: ShapleyImageClassificationPipeline,
    explanation: Explanation,
    a: int,
    b: int,
    generator: torch.Generator,
) -> float:
    """As `check_explanation`, of the map of A less that of B: it can be worse than both, so it has its own check.

    Shapley values are linear: it is an estimate of those of the game v_A - v_B.
    """
    game = classifier.model.game(explanation.pixel_values[0].to(classifier.device), [a, b])
    drawn = coalitions_to_ask(CHECK, num_players=explanation.present.numel(), generator=generator, device="cpu")
    coalitions = torch.cat([torch.ones_like(drawn[:1]), drawn])
    values = game(with_complements(coalitions).to(classifier.device)).double().cpu()
    values = values[:, :1] - values[:, 1:]  # (2 M, 1)
    difference = (explanation.maps[a] - explanation.maps[b]).flatten().unsqueeze(-1).double().cpu()
    return shapley_posterior(difference, coalitions, (values[0::2] - values[1::2]) / 2).error_ratios.item()


def refine(classifier: ShapleyImageClassificationPipeline, explanation: Explanation, labels: Sequence[int]) -> None:
    """Bring maps nearer to the exact Shapley values, then judge them by other draws than those that refined them."""
    found, model = explanation.found, classifier.model
    labels = [label for label in labels if label not in found.refined]
    if not labels:
        return
    pixel_values, draws = explanation.pixel_values.to(classifier.device), torch.Generator().manual_seed(1)
    refined = model.explain(pixel_values, labels, evaluations=REFINE, generator=draws)
    errors = model.check_explanation(pixel_values, labels, maps=refined, evaluations=CHECK, generator=draws)[0]
    maps = found.maps.clone()
    maps[labels] = refined[0].to(maps)
    found.maps, found.refined = maps, found.refined | set(labels)
    found.errors = found.errors | dict(zip(labels, errors.tolist(), strict=True))
    found.differences = {pair: error for pair, error in found.differences.items() if not set(labels) & set(pair)}


def _shown(original: Image.Image) -> tuple[Image.Image, float]:
    """The picture at the size in which it is shown, and its enlargement."""
    shortest, longest = SHOWN_EDGES
    factor = min(max(1, shortest / min(original.size)), longest / max(original.size))
    size = tuple(max(1, round(factor * edge)) for edge in original.size)
    return original.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS), factor


def with_present(
    classifier: ShapleyImageClassificationPipeline, explanation: Explanation, present: Tensor
) -> Explanation:
    """The same picture with these patches (h, w) only; the model is really run without the others."""
    pixel_values = explanation.pixel_values.to(classifier.device)
    values = classifier.model.coalition_values(pixel_values, present.view(1, 1, -1))[0, 0].cpu()
    return replace(explanation, present=present, values=values)


def without_top(explanation: Explanation, label: int, count: int) -> Tensor:
    """Present patches (h, w) once the `count` of highest attribution for a label are removed."""
    attributions = explanation.maps[label]
    present = torch.ones(attributions.numel(), dtype=torch.bool)
    present[attributions.flatten().argsort(descending=True, stable=True)[:count]] = False
    return present.view(attributions.shape)


def toggled(explanation: Explanation, x: float, y: float) -> Tensor:
    """Present patches (h, w) once the one at a point of the shown picture goes, or comes back."""
    present = explanation.present.clone()
    left, top, right, bottom = explanation.box
    row, column = int((y - top) / (bottom - top) * len(present)), int((x - left) / (right - left) * present.shape[1])
    if left <= x < right and top <= y < bottom:
        present[row, column] = ~present[row, column]
    return present


def pale(picture: Image.Image) -> Image.Image:
    """Light grey shades, so that colours over them are the legend's."""
    return Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.5)


def removal_picture(explanation: Explanation) -> Image.Image:
    """The picture with its grid of patches; removed ones are crossed out, as the model does not see them."""
    picture = explanation.picture.copy()
    removed = place_map((~explanation.present).double(), picture.size, box=explanation.box) == 1  # NaN outside of box
    picture.paste((225, 225, 228), mask=Image.fromarray(removed.numpy()))
    draw = ImageDraw.Draw(picture)
    (left, top, right, bottom), (rows, columns) = explanation.box, explanation.present.shape
    width, height = (right - left) / columns, (bottom - top) / rows
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * width, top + row * height
            draw.rectangle((x, y, x + width, y + height), outline=(128, 128, 128))
            if not explanation.present[row, column]:
                draw.line((x + 3, y + 3, x + width - 3, y + height - 3), fill=(160, 160, 165))
                draw.line((x + 3, y + height - 3, x + width - 3, y + 3), fill=(160, 160, 165))
    return picture


def map_titles(explanation: Explanation, names: Sequence[str], a: int, b: int | None) -> list[str]:
    """What each of the maps shows and sums to, as HTML."""
    sums = explanation.maps.sum((1, 2))
    first = f"“{escape(names[a])}”"
    shown = [(f"For {first}", sums[a])]
    if b is not None:
        second = f"“{escape(names[b])}”"
        shown += [(f"For {second}", sums[b]), (f"For {first} and against {second}", sums[a] - sums[b])]
    return [f'<div class="title"><b>{title}</b> &nbsp; sum {total:+.2f} logits</div>' for title, total in shown]


def map_checks(explanation: Explanation, a: int, b: int | None) -> list[str]:
    """How far each of the maps is to be trusted and what to do about it, as HTML."""
    found = explanation.found
    checks = [check_in_words(found.errors.get(a), a in found.refined)]
    if b is not None:
        both = found.differences.get(_pair(a, b))
        checks += [check_in_words(found.errors.get(b), b in found.refined)]
        checks += [check_in_words(both, {a, b} <= found.refined)]
    return checks


def check_in_words(error: float | None, is_refined: bool) -> str:
    """A map's verdict, its number and what to do, as HTML; None is not checked yet."""
    if error is None:
        return f'<div class="title"><span class="verdict">being checked</span> by {CHECK} evaluations</div>'
    word = verdict(error)
    said = f"{MEANINGS[word]} {(ADVICE_ONCE_REFINED if is_refined else ADVICE)[word]}"
    number = "refined, error" if is_refined else "error"
    return f'<div class="title">{badge(word, word)} {number} {error:.2f}. {said}</div>'


def message_box(message: str, kind: str = "") -> str:
    """What the page says of itself, as HTML."""
    return f'<div class="message {kind}" role="status">{message}</div>'


def badge(word: str, text: str) -> str:
    """A verdict's colour behind a text, as HTML."""
    return f'<span class="verdict {"distrust" if word == "do not trust" else word}">{text}</span>'


def refine_button(explanation: Explanation, labels: Sequence[int]) -> gr.Button:
    """What refining the labels shown would cost, or that it is done."""
    found = explanation.found
    left = [label for label in labels if label not in found.refined]
    if not left:
        return gr.Button(f"Refined by {REFINE} evaluations", interactive=False)
    which = "both maps" if len(left) == 2 else f"map {'AB'[labels.index(left[0])]}"
    evaluations = REFINE + CHECK * len(labels)  # with the checks that follow
    cost = f"{evaluations} evaluations of the model"
    if not found.errors:
        return gr.Button(f"Refine {which}: {cost}", interactive=False)
    seconds = ceil(found.seconds * evaluations / CHECK)
    waiting = f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return gr.Button(f"Refine {which}: {cost}, about {waiting} at most", interactive=True)


def legend(scale: float) -> str:
    """What the colours mean, as HTML."""
    colours = ", ".join(f"rgb{colour}" for colour in BLUE_WHITE_RED)
    return (
        f'<div class="scale"><span class="end">against {-scale:.2f}</span>'
        f'<span class="bar" style="background: linear-gradient(to right, {colours})"></span>'
        f'<span class="end">{scale:+.2f} for</span></div>'
        '<div class="scale note">attribution in logits per patch, one scale for all maps</div>'
        f'<p class="note title">Every map is checked by {CHECK} evaluations of the model with patches missing. Error '
        f"0 is exact, 1 no better than an even map; good up to {GOOD_ERROR}, rough up to {ROUGH_ERROR}. So few "
        "evaluations can miss a wrong map.</p>"
    )


def readout(explanation: Explanation, names: Sequence[str], labels: Sequence[int]) -> str:
    """Logits with all patches, as attributed to those left, and as the model gives them, as HTML."""
    stages = dict(zip(BAR_COLOURS, (explanation.logits, explanation.attributed, explanation.values), strict=True))
    shown = torch.stack([values[list(labels)] for values in stages.values()])
    low, high = min(0.0, shown.min().item()), max(0.0, shown.max().item(), 1e-6)

    def percent(value: float) -> float:
        return 100 * (value - low) / (high - low)

    total, removed = explanation.present.numel(), int((~explanation.present).sum())
    rows = []
    for label in labels:
        rows.append(f"<h4>Label “{escape(names[label])}”: logit</h4>")
        for stage, values in stages.items():
            value = values[label].item()
            start, stop = sorted((percent(0), percent(value)))
            fill = f"left: {start:.1f}%; width: {stop - start:.1f}%; background: {BAR_COLOURS[stage]}"
            zero = f'<div class="zero" style="left: {percent(0):.1f}%"></div>'
            rows.append(f'<span>{stage}</span><div class="track"><div class="fill" style="{fill}"></div>{zero}</div>')
            rows.append(f'<span class="number">{value:.2f}</span>')
        if removed:
            rows.append(f'<div class="holds">{removal_in_words(explanation, label)}</div>')
    hint = "" if removed else ": remove some to see whether the maps tell what this does to the logits"
    likeliest = names[int(explanation.values.argmax())]
    return (
        f'<div class="readout">{"".join(rows)}</div><p class="note">{removed} of {total} patches removed{hint}. '
        f"The likeliest label is now <b>“{escape(likeliest)}”</b>. Attributed: base value + sum over the patches "
        "left. Measured: the model runs on the patches left alone. The two differ where patches act together, and "
        "where attributions are not exact.</p>"
    )


def removal_in_words(explanation: Explanation, label: int) -> str:
    """How far the attributions told what a removal does to a label's logit, as HTML."""
    logit = explanation.logits[label].item()
    said, did = (logit - values[label].item() for values in (explanation.attributed, explanation.values))
    apart, larger = abs(said - did), max(abs(said), abs(did))
    word = verdict(apart / larger if larger > 0 else 0.0)  # 0: neither moves it
    return (
        f"{badge(word, AGREEMENTS[word])} {apart:.2f} logits apart. The map says that the removal changes the logit "
        f"by {-said:+.2f}; it changes it by {-did:+.2f}."
    )


def save_examples(folder: Path, count: int = 10) -> list[str]:
    """Write the first test digit of each class, enlarged, and return the paths."""
    rows = digits_dataset()["test"]
    labels = rows["label"][:]
    paths = []
    for label in range(count):
        path = folder / f"digit_{label}.png"
        rows["image"][labels.index(label)].resize((256, 256), Image.Resampling.NEAREST).save(path)
        paths.append(str(path))
    return paths


def pictures_in(folder: Path) -> list[str]:
    """Paths of a folder's pictures, by name.

    Raises:
        ValueError: no folder, or one without pictures.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in EXAMPLE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(
            f"`--examples` must be a folder with pictures ({', '.join(sorted(EXAMPLE_SUFFIXES))}), got {folder}."
        )
    return [str(path) for path in found[:MOST_EXAMPLES]]


class Answers:
    """What the page's events call. Holds the model only: what belongs to a visitor comes in and goes out."""

    def __init__(self, classifier: ShapleyImageClassificationPipeline, has_examples: bool = False):
        self.classifier = classifier
        config = classifier.model.config
        self.names = [config.id2label[index] for index in range(config.num_labels)]
        example = "choose an example, or " if has_examples else ""
        self.has_examples = has_examples
        self.empty = (
            f"<b>No picture yet.</b> To see one explained, {example}upload or paste a picture of your own, of at most "
            f"{MAX_BYTES // 10**6} MB and {MAX_PIXELS // 10**6} million pixels."
        )

    @property
    def opening(self) -> str | None:
        """What the page says at first, where it has no example to answer."""
        return None if self.has_examples else message_box(self.empty)

    def view(self, explanation: Explanation | None, a: int | None, b: int | None) -> list:
        """Message, what is visible, three titles, the legend, three maps, their checks, the board and the readout."""
        if explanation is None or a is None:
            return self.nothing(FORGOTTEN)
        shown = [explanation.maps[a]]
        if b is not None:
            shown += [explanation.maps[b], explanation.maps[a] - explanation.maps[b]]
        scale = symmetric_scale(shown)
        background = pale(explanation.picture)
        overlays = [overlay(background, x, scale=scale, alpha=0.7, box=explanation.box) for x in shown]
        absent = [None] * (3 - len(shown))
        titles = map_titles(explanation, self.names, a, b)
        result = readout(explanation, self.names, _labels(a, b))
        maps = [*titles, *absent, legend(scale), *overlays, *absent, *self.checks(explanation, a, b)]
        return ["", gr.Column(visible=True), gr.Column(visible=True), *maps, removal_picture(explanation), result]

    def nothing(self, message: str, kind: str = "") -> list:
        """The view without a picture: why there is none, and what to do."""
        hidden = gr.Column(visible=False)
        return [message_box(message, kind), hidden, hidden, *[None] * 10, gr.Button(), None, None]

    def checks(self, explanation: Explanation | None, a: int | None, b: int | None) -> list:
        """Three maps' verdicts, and the button that refines them."""
        if explanation is None or a is None:
            return [None, None, None, gr.Button()]
        checks = map_checks(explanation, a, b)
        return [*checks, *[None] * (3 - len(checks)), refine_button(explanation, _labels(a, b))]

    def on_picture(self, path: str | None) -> list:
        """State, scores, labels A and B, slider, view."""
        nothing = [None, None, None, None, gr.Slider(maximum=1, value=0)]
        if path is None:
            return [*nothing, *self.nothing(self.empty)]
        try:
            explanation = explain(self.classifier, Path(path).read_bytes())
        except FileNotFoundError:
            return [*nothing, *self.nothing(FORGOTTEN, "refusal")]
        except (OSError, ValueError) as error:
            reason = f"<b>This picture cannot be explained.</b> {escape(str(error), quote=False)} Choose another one."
            return [*nothing, *self.nothing(reason, "refusal")]
        a, b = [*explanation.likeliest, None][:2]
        slider = gr.Slider(maximum=explanation.present.numel(), value=0)
        return [explanation, explanation.scores, a, b, slider, *self.view(explanation, a, b)]

    def on_check(self, explanation: Explanation | None, a: int | None, b: int | None) -> None:
        """Put down what the maps shown are worth, where it is not known yet."""
        if explanation is not None and a is not None:
            check(self.classifier, explanation, a, b)

    def on_refine(self, explanation: Explanation | None, a: int | None, b: int | None) -> None:
        """Put down refined maps of the labels shown, and what these are worth."""
        if explanation is not None and a is not None:
            refine(self.classifier, explanation, _labels(a, b))
            check(self.classifier, explanation, a, b)

    def on_label(self, explanation: Explanation | None, chosen: int, other: int | None) -> int | None:
        """The other label once this one is chosen: never the same, which would be a map of zeros."""
        if chosen != other or explanation is None:
            return other
        return next((label for label in explanation.likeliest if label != chosen), None)

    def on_a(self, explanation: Explanation | None, a: int, b: int | None) -> list:
        """Label B and view once A is chosen."""
        b = self.on_label(explanation, a, b)
        return [b, *self.view(explanation, a, b)]

    def on_b(self, explanation: Explanation | None, a: int, b: int) -> list:
        """Label A and view once B is chosen."""
        a = self.on_label(explanation, b, a)
        return [a, *self.view(explanation, a, b)]

    def on_count(self, explanation: Explanation | None, a: int | None, b: int | None, count: int) -> list:
        """State and view without the `count` patches that speak most for A."""
        if explanation is not None and a is not None:
            explanation = with_present(self.classifier, explanation, without_top(explanation, a, int(count)))
        return [explanation, *self.view(explanation, a, b)]

    def on_click(self, explanation: Explanation | None, a: int | None, b: int | None, event: gr.SelectData) -> list:
        """State and view once the patch that was clicked goes, or comes back."""
        if explanation is not None:
            explanation = with_present(self.classifier, explanation, toggled(explanation, *event.index))
        return [explanation, *self.view(explanation, a, b)]

    def on_reset(self, explanation: Explanation | None, a: int | None, b: int | None) -> list:
        """Slider, state and view with all patches."""
        return [0, *self.on_count(explanation, a, b, 0)]


def _labels(a: int, b: int | None) -> list[int]:
    return [a] if b is None else [a, b]


def build_app(classifier: ShapleyImageClassificationPipeline, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page: picture and labels, three maps, and the board where patches are removed.

    Args:
        classifier: what answers.
        examples: files to choose from; the first is there from the start.
    """
    answers = Answers(classifier, bool(examples))
    with gr.Blocks(title="hf_shapley", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        state = gr.State(None, time_to_live=3600)
        path = gr.State(None, time_to_live=3600)
        gr.Markdown(INTRODUCTION.format(game=classifier.model.game_name), elem_id="introduction")
        with gr.Row():
            with gr.Column():
                source = _source(examples)
            with gr.Column():
                message = gr.HTML(answers.opening, elem_id="message", padding=False)
                with gr.Column(visible=False) as chosen:
                    scores = gr.Label(label="Likeliest labels", num_top_classes=TOP_LABELS, elem_id="scores")
                    first, second = _label_choices(answers.names)
        with gr.Column(visible=False) as answer:
            titles, maps, checks, key, refined = _maps(len(answers.names) > 1)
            board, count, reset, result = _removal()

        asked = [state, first, second]
        trust = [*checks, refined]
        view = [message, chosen, answer, *titles, key, *maps, *trust, board, result]
        everything = [state, scores, first, second, count, *view]
        # What a visitor does while an answer is on its way is answered next, not dropped.
        common = {"trigger_mode": "always_last"}
        quiet = common | {"show_progress": "hidden", "api_name": False}
        # A picture that takes another's place comes as two changes: the second answer would undo what the visitor has
        # done since the first.
        gr.on([app.load, source.change], lambda path: path, source, path, **quiet)
        explained = [path.change(answers.on_picture, source, everything, api_name="explain", **common)]
        explained.append(first.input(answers.on_a, asked, [second, *view], **quiet))
        explained.append(second.input(answers.on_b, asked, [first, *view], **quiet))
        hidden = {"show_progress": "hidden", "api_name": False}
        for event in explained:  # a check takes longer than an answer: it is awaited by none
            event.then(answers.on_check, asked, None, **hidden).then(answers.checks, asked, trust, **hidden)
        refining = refined.click(lambda: gr.Button("Refining ...", interactive=False), None, refined, **hidden)
        refining.then(answers.on_refine, asked, None, **hidden).then(answers.view, asked, view, **hidden)
        count.input(answers.on_count, [*asked, count], [state, *view], **quiet)
        board.select(answers.on_click, asked, [state, *view], **quiet)
        reset.click(answers.on_reset, asked, [count, state, *view], **quiet)
    return app


def _source(examples: Sequence[str]) -> gr.Image:
    """Where a picture comes in: as a file, which the library decodes after a look at its size."""
    source = gr.Image(
        examples[0] if examples else None,
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=300,
        elem_id="source",
    )
    # Gradio would open the file before the library does, and say nothing of why it cannot.
    source.preprocess = lambda payload: payload and payload.path
    if examples:
        gr.Examples([[path] for path in examples], source, label="Or choose one", elem_id="examples")
    return source


def _label_choices(names: Sequence[str]) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Labels A and B. Their values are ids, as two labels may share a name."""
    choices = list(zip(names, range(len(names)), strict=True))
    with gr.Row():
        first = gr.Dropdown(choices, label="A: explain this label", elem_id="label_a")
        second = gr.Dropdown(choices, label="B: against this one", elem_id="label_b", visible=len(names) > 1)
    return first, second


def _maps(has_b: bool) -> tuple[list[gr.HTML], list[gr.Image], list[gr.HTML], gr.HTML, gr.Button]:
    """Three maps side by side, titles above and checks below; the legend, and the button that refines."""
    gr.Markdown("### Which patches speak for it")
    titles, maps, checks = [], [], []
    with gr.Row():
        for name in ("a", "b", "difference"):
            with gr.Column(min_width=240, visible=has_b or name == "a"):
                titles.append(gr.HTML(padding=False))
                maps.append(_picture(f"map_{name}", "attribution map"))
                checks.append(gr.HTML(padding=False, elem_id=f"check_{name}"))
    refined = gr.Button(size="md", interactive=False, elem_id="refine")
    return titles, maps, checks, gr.HTML(elem_id="legend"), refined


def _removal() -> tuple[gr.Image, gr.Slider, gr.Button, gr.HTML]:
    """The board where patches are removed, what removes and puts back many, and the readout."""
    gr.Markdown("### Remove patches: does the explanation hold?")
    with gr.Row():
        with gr.Column():
            gr.HTML('<div class="title"><b>Click a patch</b> to remove it, or to put it back.</div>', padding=False)
            board = _picture("board", "picture with the removed patches crossed out")
        with gr.Column():
            label = "How many to remove of those that speak most for A"
            count = gr.Slider(0, 1, 0, step=1, label=label, elem_id="count")
            reset = gr.Button("Put all patches back", size="sm", elem_id="reset")
            result = gr.HTML(elem_id="readout")
    return board, count, reset, result


def _picture(name: str, description: str) -> gr.Image:
    return gr.Image(
        format="png", interactive=False, show_label=False, buttons=[], elem_id=name, alt_text=description, height=380
    )


def load_classifier(path: str | None, epochs: float = 16) -> ShapleyImageClassificationPipeline:
    """The checkpoint's pipeline, or that of a digits model trained on the spot."""
    if path:
        return pipeline(TASK, model=path)
    model, image_processor = train_digits_model(epochs=epochs)
    return pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("HF_SHAPLEY_MODEL"), help="folder or Hub id of a checkpoint")
    parser.add_argument(
        "--examples",
        default=os.environ.get("HF_SHAPLEY_EXAMPLES"),
        help="folder of pictures to choose from; the page opens with the first of them explained",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            examples = pictures_in(Path(options.examples)) if options.examples else []
        except ValueError as error:
            parser.error(str(error))
        if not (options.model or examples):
            examples = save_examples(Path(folder))
        app = build_app(load_classifier(options.model), examples)
        app.launch(server_port=options.port, allowed_paths=examples, **LAUNCH)


if __name__ == "__main__":
    main()
