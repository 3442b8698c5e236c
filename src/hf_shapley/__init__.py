"""Image classifiers that explain themselves: logits and every patch's Shapley value from one forward pass."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .attribution_head import AttributionHead, ShapleyImageClassifierOutput, upsample_attributions
from .coalitions import (
    coalitions_to_ids,
    enumerate_coalitions,
    ids_to_coalitions,
    ranked_coalitions,
    sample_coalitions,
    shapley_kernel_size_probabilities,
)
from .configuration_shapley import ShapleyConvNextConfig, ShapleyViTConfig
from .losses import coalition_label_loss, coalition_loss, paired_shapley_loss, shapley_loss
from .modeling_shapley_convnext import ShapleyConvNextForImageClassification
from .modeling_shapley_vit import ShapleyViTForImageClassification
from .pipeline_shapley import TASK, ShapleyImageClassificationPipeline
from .trainer import ShapleyTrainer, ShapleyTrainingArguments
from .version import __version__


def _register() -> None:
    """Make the Auto classes and pipelines of transformers know our models."""
    families = [
        (ShapleyViTConfig, ShapleyViTForImageClassification, ViTImageProcessorPil),
        (ShapleyConvNextConfig, ShapleyConvNextForImageClassification, ConvNextImageProcessorPil),
    ]
    for config, model, processor in families:
        processors = {"pil": processor}
        if is_torchvision_available():
            import transformers

            processors["torchvision"] = getattr(transformers, processor.__name__.removesuffix("Pil"))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ShapleyImageClassificationPipeline, pt_model=AutoModelForImageClassification, type="image"
    )


_register()
