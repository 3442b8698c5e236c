"""Metadata of a model card, which the Hub and huggingface_hub read back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_results import check_results
from .card_texts import plain_text

TASK = "image-classification"
TAGS = ("hf_shapley", "shapley", "explainability", "attribution", "vision")


class ShapleyModelCardData(ModelCardData):
    """Metadata of a self-explaining classifier's card: that of `ModelCardData`, with fitting defaults."""

    def __init__(
        self,
        *,
        library_name: str | None = "transformers",
        pipeline_tag: str | None = TASK,
        tags: list[str] | None = None,
        **metadata: Any,
    ) -> None:
        tags = list(TAGS) if tags is None else tags
        super().__init__(library_name=library_name, pipeline_tag=pipeline_tag, tags=tags, **metadata)

    @classmethod
    def from_results(cls, results: Mapping[str, Any], **metadata: Any) -> "ShapleyModelCardData":
        """Metadata with one `EvalResult` per metric, which the Hub and huggingface_hub read back.

        Args:
            results: content of a result file (see `hf_shapley.publishing.card_results`).
            **metadata: further entries (`license`, `language`, ...); they win over those of `results`.
        """
        check_results(results)
        dataset = results.get("dataset", {})
        found = {
            "model_name": plain_text(results["model_name"]),
            "license": results.get("license"),
            "base_model": results.get("base_model"),
            "datasets": [dataset["id"]] if "id" in dataset else None,
            "metrics": list(dict.fromkeys(metric["type"] for metric in results.get("metrics", []))) or None,
            "eval_results": [_eval_result(metric, dataset) for metric in results.get("metrics", [])] or None,
        }
        return cls(**{**found, **metadata})


class ShapleyModelCard(ModelCard):
    """Card of a self-explaining classifier. `ShapleyModelCard.load(path)` reads one back."""

    card_data_class = ShapleyModelCardData
    default_template_path = Path(__file__).parent / "templates" / "model_card.md"

    def __init__(self, content: str, ignore_metadata_errors: bool = False) -> None:
        with reading_metadata():
            super().__init__(content, ignore_metadata_errors)


@contextmanager
def reading_metadata() -> Iterator[None]:
    """Say that a card's metadata cannot be read, where huggingface_hub lets errors of its YAML parser through."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            "The metadata of the card, between its two lines of `---`, must be plain YAML, got "
            f"{' '.join(str(error).split())}: mend or delete them."
        ) from error


def _eval_result(metric: Mapping[str, Any], dataset: Mapping[str, Any]) -> EvalResult:
    """A metric as the Hub's model-index knows it; interval and settings go along as arguments."""
    dataset = metric.get("dataset", dataset)
    interval = {key: metric[key] for key in ("interval", "confidence") if key in metric}
    arguments = interval | dict(metric.get("settings", {}))
    name = plain_text(dataset.get("name", dataset.get("id", "not stated")))
    return EvalResult(
        task_type=TASK,
        task_name="Image Classification",
        dataset_type=plain_text(dataset.get("id", name)),
        dataset_name=name,
        dataset_config=dataset.get("config"),
        dataset_split=dataset.get("split"),
        dataset_revision=dataset.get("revision"),
        metric_type=metric["type"],
        metric_name=plain_text(metric.get("name", metric["type"])),
        metric_value=metric["value"],
        metric_args=arguments or None,
    )
