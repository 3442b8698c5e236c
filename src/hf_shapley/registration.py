"""What transformers is told when this library is imported: its Auto classes and pipelines know our models."""

from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .backbones import FAMILIES
from .models.configuration_shapley_any import ShapleyAnyConfig
from .models.configuration_shapley_clip import ShapleyCLIPConfig, ShapleySiglipConfig
from .models.modeling_shapley_any import ShapleyForImageClassification
from .models.modeling_shapley_clip import ShapleyCLIPModel
from .models.modeling_shapley_siglip import ShapleySiglipModel
from .models.pipeline_shapley import TASK, ShapleyImageClassificationPipeline
from .publishing.hub import push_with_card


class ForeignCodeError(Exception):
    """A repository wants to run code of its own.

    No `ValueError`, for which transformers' pipelines would go on to the next way of loading.
    """


class ModelForPipeline(AutoModelForImageClassification):
    """What `pipeline("shapley-image-classification", model=name)` loads the model with, ahead of its image processor.

    Of a processor that it does not know transformers would ask, on the terminal, whether to run the repository's code.
    """

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, trust_remote_code: bool | None = None, **options: Any) -> Any:
        """As `AutoModelForImageClassification.from_pretrained`.

        Raises:
            ForeignCodeError: the image processor needs the repository's code, and `trust_remote_code` is not True.
        """
        if not trust_remote_code:
            place = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
            try:
                AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **place)
            except Exception as error:  # other faults are told by whoever needs the processor
                if "trust_remote_code" in str(error):
                    raise ForeignCodeError(
                        f"The image processor of {name!r} is code of that repository, which is not run: read it first "
                        "and give `trust_remote_code=True`, or load a processor of transformers and give both as "
                        "`model` and `image_processor`."
                    ) from error
        return AutoModelForImageClassification.from_pretrained(
            name, *args, trust_remote_code=bool(trust_remote_code), **options
        )


def register() -> None:
    """Make the Auto classes and pipelines of transformers know our models, and our models know our cards."""
    for family in FAMILIES.values():
        config, model, processor = family.config, family.model, family.processor
        processors: dict[str, Any] = {"pil": processor}
        if is_torchvision_available():
            processors["torchvision"] = getattr(transformers, processor.__name__.removesuffix("Pil"))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, model, exist_ok=True)
        AutoModel.register(config, model.features_class, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
    AutoConfig.register(ShapleyAnyConfig.model_type, ShapleyAnyConfig, exist_ok=True)
    AutoModelForImageClassification.register(ShapleyAnyConfig, ShapleyForImageClassification, exist_ok=True)
    for config, model in ((ShapleyCLIPConfig, ShapleyCLIPModel), (ShapleySiglipConfig, ShapleySiglipModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ShapleyImageClassificationPipeline, pt_model=ModelForPipeline, type="image"
    )
    # Not by the classes themselves: their files also run from the Hub, where the template of our cards is missing.
    models = (*(family.model for family in FAMILIES.values()), ShapleyForImageClassification)
    for published in (*models, ShapleyImageClassificationPipeline):
        published.push_to_hub = push_with_card  # type: ignore[attr-defined]
