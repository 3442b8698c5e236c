"""Render the cards of the checkpoints that our scripts train, from their result files.

hf-shapley demo --seeds 3 -o outputs/vit && cp outputs/vit/results.json benchmarks/results/demo_vit.json
python benchmarks/render_cards.py
"""

import json
from pathlib import Path

from common import RESULTS

from hf_shapley import render_model_card, write_model_card
from hf_shapley.demo import card_results

CARDS = Path(__file__).parent.parent / "model_cards"


def main() -> None:
    """Write `model_cards/digits-BACKBONE.md` for each result file of the demo."""
    CARDS.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("demo_*.json")):
        name = f"digits-{path.stem.removeprefix('demo_')}"
        source = f"benchmarks/results/{path.name}"
        card = render_model_card(card_results(json.loads(path.read_text())), model_id=name, source=source)
        write_model_card(CARDS / f"{name}.md", card)
        print(f"wrote {name}.md")


if __name__ == "__main__":
    main()
