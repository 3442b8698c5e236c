"""Classify one picture and draw, per label, which patches speak for it (red) and against it (blue).

With no argument, a small model first learns scikit-learn's digits (seconds on the CPU) and explains one of them:

    python examples/explain_image.py

The real thing: a file or an address, and a Shapley checkpoint, which is a folder or a Hub id:

    python examples/explain_image.py https://example.org/cat.jpg --model outputs/food101 --top_k 3 -o cat.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

from hf_shapley import TASK, ShapleyImageClassificationPipeline, digits_dataset, train_digits_model

SMALLEST_EDGE = 224  # tiny pictures are enlarged to at least so many pixels, patch by patch


def load_classifier(path: str | None, epochs: float) -> ShapleyImageClassificationPipeline:
    """The checkpoint's pipeline, or that of a digits model trained on the spot."""
    if path is not None:
        return pipeline(TASK, model=path)
    print("No --model: training a small one on digits.")
    model, image_processor = train_digits_model(epochs=epochs)
    return pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


def panel(picture: Image.Image, title: str) -> Image.Image:
    """A picture, enlarged if it is tiny, under its title."""
    factor = max(1, -(-SMALLEST_EDGE // min(picture.size)))
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    height = max(18, picture.width // 14)
    titled = Image.new("RGB", (picture.width, picture.height + 2 * height), "white")
    titled.paste(picture, (0, 2 * height))
    ImageDraw.Draw(titled).text((4, height // 2), title, "black", ImageFont.load_default(size=0.8 * height))
    return titled


def side_by_side(panels: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Panels of one height in a row."""
    width = sum(panel.width + gap for panel in panels) - gap
    row, left = Image.new("RGB", (width, panels[0].height), "white"), 0
    for titled in panels:
        row.paste(titled, (left, 0))
        left += titled.width + gap
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print the top labels and write one picture with their overlays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="file or http(s) address; default: a test digit")
    parser.add_argument("--model", help="folder or Hub id of a Shapley checkpoint; default: digits, trained now")
    parser.add_argument("--top_k", type=int, default=3, help="how many of the likeliest labels to explain")
    parser.add_argument("--labels", nargs="+", help="names or ids of labels to explain instead of the likeliest")
    parser.add_argument("--epochs", type=float, default=16, help="of the digits model")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/explanation.png"), help="picture to write")
    options = parser.parse_args(argv)

    image = options.image or digits_dataset()["test"]["image"][2]
    classifier = load_classifier(options.model, options.epochs)
    # Named labels are all shown, the likeliest ones up to top_k.
    names = classifier.model.config.label2id
    labels = [int(label) if label.isdecimal() and label not in names else label for label in options.labels or ()]
    chosen = {"labels": labels} if labels else {"top_k": options.top_k}
    entries = classifier(image, overlay=True, **chosen)

    print(f"{'label':<24}{'score':>8}{'base value':>12}{'+ patches':>11}{'= logit':>9}")
    for entry in entries:
        total = entry["attributions"].sum()
        print(
            f"{entry['label']:<24}{entry['score']:>8.1%}{entry['base_value']:>12.2f}{total:>+11.2f}{entry['logit']:>9.2f}"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    panels = [panel(entry["overlay"], f"{entry['label']}: {entry['score']:.1%}") for entry in entries]
    side_by_side(panels).save(options.output)
    scale = max(abs(entry["attributions"]).max() for entry in entries)
    print(f"Wrote {options.output}: red for the label, blue against it, full colour = {scale:.2f} logits per patch.")


if __name__ == "__main__":
    main()
