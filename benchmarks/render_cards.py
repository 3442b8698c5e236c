"""Render the cards of the checkpoints that our scripts train, from their result files.

hf-shapley demo --seeds 3 -o outputs/vit && cp outputs/vit/results.json benchmarks/results/demo_vit.json
python benchmarks/render_cards.py
"""

import json
from pathlib import Path

from common import RESULTS

from hf_shapley import render_model_card, write_model_card
from hf_shapley.jobs.demo_report import card_results

CARDS = Path(__file__).parent.parent / "model_cards"


def main() -> None:
    """Write `model_cards/digits-BACKBONE.md` for each result file of the demo."""
    CARDS.mkdir(exist_ok=True)
    for backbone in ("convnext", "vit"):
        path, name = RESULTS / f"demo_{backbone}.json", f"digits-{backbone}"
        source = f"benchmarks/results/{path.name}"
        results = card_results(json.loads(path.read_text()))
        results["limits"].append("Measured with the attribution head as first built, with weights for each label.")
        card = render_model_card(results, model_id=name, source=source)
        write_model_card(CARDS / f"{name}.md", card)
        print(f"wrote {name}.md")


if __name__ == "__main__":
    main()
