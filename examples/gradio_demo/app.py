"""Gradio demo: ask a Shapley image classifier why, remove patches, and see whether its explanation holds.

    pip install hf_shapley[demo]
    python examples/gradio_demo/app.py --model outputs/food101

Without `--model` (or the environment variable HF_SHAPLEY_MODEL) a small model first learns scikit-learn's digits,
within seconds on the CPU. Every answer is computed from its own picture; nothing is shared between visitors.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
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
)
from hf_shapley.models.overlay import BLUE_WHITE_RED, Box

MAX_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
SHOWN_EDGES = (400, 720)  # shortest edge at least, longest at most, of the pictures that are shown
TOP_LABELS = 5

INTRODUCTION = """
# A classifier that explains itself
Each label's logit is, exactly, a base value plus what every patch of the picture adds to it: its **attribution**, from
the same forward pass as the prediction. Attributions are trained to be Shapley values, so they also say what happens
when patches are **removed**. Try it: remove some below, and compare.
"""
CSS = """
.scale {display: flex; align-items: center; gap: 10px; justify-content: center; font-variant-numeric: tabular-nums}
.scale .bar {width: 260px; height: 14px; border: 1px solid #8888; border-radius: 3px}
.readout {display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center}
.readout h4 {grid-column: 1 / -1; margin: 10px 0 2px; font-weight: 600}
.readout .track {position: relative; height: 16px; background: #8882; border-radius: 3px}
.readout .fill {position: absolute; top: 0; height: 100%; border-radius: 3px}
.readout .zero {position: absolute; top: -2px; bottom: -2px; width: 1px; background: #888}
.readout .number {text-align: right; font-variant-numeric: tabular-nums}
.title {text-align: center}
.note {opacity: .75; font-size: .92em; margin-top: 8px}
"""
BAR_COLOURS = {"all patches": "#9ca3af", "the rest, attributed": "#8b5cf6", "the rest, measured": "#0f766e"}
# Few sessions are remembered: each holds one picture with its maps.
LAUNCH = {"max_file_size": MAX_BYTES, "state_session_capacity": 200, "css": CSS}


@dataclass(frozen=True)
class Explanation:
    """One visitor's picture and everything that was said about it: N = h x w patches, K labels.

    Args:
        picture: as shown, upright RGB.
        box: what the model sees of it, in pixels of `picture`.
        pixel_values: (1, C, H, W).
        maps: (K, h, w), attributions in logits.
        base_values: (K,), in logits.
        logits: (K,), with all patches.
        scores: the likeliest labels' names and scores.
        present: (h, w) bool, False = removed.
        values: (K,), the model's logits with the patches present.
    """

    picture: Image.Image
    box: Box
    pixel_values: Tensor
    maps: Tensor
    base_values: Tensor
    logits: Tensor
    scores: dict[str, float]
    present: Tensor
    values: Tensor

    @property
    def attributed(self) -> Tensor:
        """(K,): what the attributions say of the patches present, base value + their sum."""
        return self.base_values + self.maps[:, self.present].sum(-1)


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
        maps=maps,
        base_values=outputs["base_values"][0],
        logits=logits,
        scores={entry["label"]: entry["score"] for entry in classifier.postprocess(outputs, top_k=TOP_LABELS)},
        present=torch.ones(maps.shape[1:], dtype=torch.bool),
        values=logits,
    )


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


def map_titles(explanation: Explanation, names: Sequence[str], a: int, b: int) -> list[str]:
    """What each of the three maps shows and sums to, as HTML."""
    first, second = f"“{escape(names[a])}”", f"“{escape(names[b])}”"
    sums = explanation.maps.sum((1, 2))
    shown = [(f"For {first}", sums[a]), (f"For {second}", sums[b])]
    shown.append((f"For {first} and against {second}", sums[a] - sums[b]))
    return [f'<div class="title"><b>{title}</b> &nbsp; sum {total:+.2f} logits</div>' for title, total in shown]


def legend(scale: float) -> str:
    """What the colours mean, as HTML."""
    colours = ", ".join(f"rgb{colour}" for colour in BLUE_WHITE_RED)
    return (
        f'<div class="scale"><span>speaks against &nbsp; {-scale:.2f}</span>'
        f'<span class="bar" style="background: linear-gradient(to right, {colours})"></span>'
        f"<span>{scale:+.2f} &nbsp; speaks for</span></div>"
        '<div class="scale note">attribution in logits per patch, one scale for all three maps</div>'
    )


def readout(explanation: Explanation, names: Sequence[str], labels: Sequence[int]) -> str:
    """Logits with all patches, as attributed to those left, and as the model gives them, as HTML."""
    stages = dict(zip(BAR_COLOURS, (explanation.logits, explanation.attributed, explanation.values), strict=True))
    shown = torch.stack([values[list(labels)] for values in stages.values()])
    low, high = min(0.0, shown.min().item()), max(0.0, shown.max().item(), 1e-6)

    def percent(value: float) -> float:
        return 100 * (value - low) / (high - low)

    rows = []
    for label in dict.fromkeys(labels):
        rows.append(f"<h4>Label “{escape(names[label])}”: logit</h4>")
        for stage, values in stages.items():
            value = values[label].item()
            start, stop = sorted((percent(0), percent(value)))
            fill = f"left: {start:.1f}%; width: {stop - start:.1f}%; background: {BAR_COLOURS[stage]}"
            zero = f'<div class="zero" style="left: {percent(0):.1f}%"></div>'
            rows.append(f'<span>{stage}</span><div class="track"><div class="fill" style="{fill}"></div>{zero}</div>')
            rows.append(f'<span class="number">{value:.2f}</span>')
    total, removed = explanation.present.numel(), int((~explanation.present).sum())
    likeliest = names[int(explanation.values.argmax())]
    return (
        f'<div class="readout">{"".join(rows)}</div><p class="note">{removed} of {total} patches removed. '
        f"The likeliest label is now <b>“{escape(likeliest)}”</b>. Attributed: base value + sum over the patches "
        "left. Measured: the model runs on the patches left alone. The two differ where patches act together, and "
        "where attributions are not exact.</p>"
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


class Answers:
    """What the page's events call. Holds the model only: what belongs to a visitor comes in and goes out."""

    def __init__(self, classifier: ShapleyImageClassificationPipeline):
        self.classifier = classifier
        config = classifier.model.config
        self.names = [config.id2label[index] for index in range(config.num_labels)]

    def view(self, explanation: Explanation | None, a: int | None, b: int | None) -> list:
        """Three titles, the legend, three maps, the board and the readout."""
        if explanation is None or a is None or b is None:
            return [None] * 9
        shown = [explanation.maps[a], explanation.maps[b], explanation.maps[a] - explanation.maps[b]]
        scale = symmetric_scale(shown)
        background = pale(explanation.picture)
        overlays = [overlay(background, x, scale=scale, alpha=0.7, box=explanation.box) for x in shown]
        texts = [*map_titles(explanation, self.names, a, b), legend(scale)]
        return [*texts, *overlays, removal_picture(explanation), readout(explanation, self.names, [a, b])]

    def on_picture(self, path: str | None) -> list:
        """State, scores, labels A and B, slider, view."""
        if path is None:
            return [None, None, None, None, gr.Slider(maximum=1, value=0), *self.view(None, None, None)]
        try:
            explanation = explain(self.classifier, Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise gr.Error(escape(str(error), quote=False), title="This picture cannot be explained") from error
        likeliest = explanation.logits.argsort(descending=True, stable=True).tolist()
        a, b = likeliest[0], likeliest[:2][-1]
        slider = gr.Slider(maximum=explanation.present.numel(), value=0)
        return [explanation, explanation.scores, a, b, slider, *self.view(explanation, a, b)]

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


def build_app(classifier: ShapleyImageClassificationPipeline, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page: picture and labels, three maps, and the board where patches are removed.

    Args:
        classifier: what answers.
        examples: files to choose from; the first is there from the start.
    """
    answers = Answers(classifier)
    with gr.Blocks(title="hf_shapley", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        state = gr.State(None, time_to_live=3600)
        path = gr.State(None, time_to_live=3600)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                source = _source(examples)
            with gr.Column():
                scores = gr.Label(label="Likeliest labels", num_top_classes=TOP_LABELS, elem_id="scores")
                first, second = _label_choices(answers.names)
        gr.Markdown("### Which patches speak for it")
        titles, maps = _maps()
        key = gr.HTML(elem_id="legend")
        gr.Markdown("### Remove patches: does the explanation hold?")
        with gr.Row():
            with gr.Column():
                gr.HTML(
                    '<div class="title"><b>Click a patch</b> to remove it, or to put it back.</div>', padding=False
                )
                board = _picture("board", "picture with the removed patches crossed out")
            with gr.Column():
                count = gr.Slider(
                    0, 1, 0, step=1, label="How many to remove of those that speak most for A", elem_id="count"
                )
                reset = gr.Button("Put all patches back", size="sm", elem_id="reset")
                result = gr.HTML(elem_id="readout")

        asked, view = [state, first, second], [*titles, key, *maps, board, result]
        everything = [state, scores, first, second, count, *view]
        # What a visitor does while an answer is on its way is answered next, not dropped.
        common = {"trigger_mode": "always_last"}
        quiet = common | {"show_progress": "hidden", "api_name": False}
        # A picture that takes another's place comes as two changes: the second answer would undo what the visitor has
        # done since the first.
        gr.on([app.load, source.change], lambda path: path, source, path, **quiet)
        path.change(answers.on_picture, source, everything, api_name="explain", **common)
        gr.on([first.input, second.input], answers.view, asked, view, **quiet)
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
        second = gr.Dropdown(choices, label="B: against this one", elem_id="label_b")
    return first, second


def _maps() -> tuple[list[gr.HTML], list[gr.Image]]:
    """Three maps side by side, and the titles above them."""
    titles, maps = [], []
    with gr.Row():
        for name in ("map_a", "map_b", "map_difference"):
            with gr.Column(min_width=240):
                titles.append(gr.HTML(padding=False))
                maps.append(_picture(name, "attribution map"))
    return titles, maps


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
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = parser.parse_args(argv)
    classifier = load_classifier(options.model)
    with tempfile.TemporaryDirectory() as folder:
        app = build_app(classifier, () if options.model else save_examples(Path(folder)))
        app.launch(server_port=options.port, **LAUNCH)


if __name__ == "__main__":
    main()
