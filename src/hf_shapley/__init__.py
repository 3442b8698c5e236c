"""Image classifiers that explain themselves: logits and estimates of every patch's Shapley value from one forward."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backbones import AutoShapleyForImageClassification
from .faithfulness.agreement import Agreement, attribution_correlation, error_ratio
from .faithfulness.axioms import efficiency_gap, leak
from .faithfulness.certificate import AttributionCertificate, attribution_error_certificate
from .faithfulness.correlations import (
    faithfulness_correlation,
    infidelity,
    interaction_share,
    sample_uniform_sizes,
    sensitivity_n,
)
from .faithfulness.curves import (
    Erasure,
    RankingCurves,
    aopc_bounds,
    comprehensiveness_sufficiency,
    insertion_deletion,
    normalised_aopc,
)
from .faithfulness.estimators import ShapleyEstimate, exact_shapley, kernel_shapley, permutation_shapley
from .faithfulness.games import BatchedGame, Game
from .faithfulness.grid_pointing import grid_pointing_game, make_mosaics
from .faithfulness.refinement import refine
from .figures.attribution_figures import attribution_figure, attribution_grid
from .models.coalitions import (
    coalitions_to_ids,
    enumerate_coalitions,
    ids_to_coalitions,
    importance_weights,
    ranked_coalitions,
    sample_coalitions,
    shapley_kernel_size_probabilities,
)
from .models.configuration_shapley import ShapleyConvNextConfig, ShapleyViTConfig
from .models.configuration_shapley_any import ShapleyAnyConfig
from .models.configuration_shapley_clip import ShapleyCLIPConfig, ShapleySiglipConfig
from .models.explaining import upsample_attributions
from .models.heads import AttributionHead
from .models.image_text import ShapleyImageTextOutput
from .models.image_text_explaining import ImageTextExplanation
from .models.images import load_image, to_rgb
from .models.modeling_shapley import ShapleyImageClassifierOutput
from .models.modeling_shapley_any import ShapleyForImageClassification
from .models.modeling_shapley_beit import ShapleyBeitConfig, ShapleyBeitForImageClassification
from .models.modeling_shapley_clip import ShapleyCLIPModel
from .models.modeling_shapley_convnext import ShapleyConvNextForImageClassification
from .models.modeling_shapley_convnextv2 import ShapleyConvNextV2Config, ShapleyConvNextV2ForImageClassification
from .models.modeling_shapley_data2vec_vision import (
    ShapleyData2VecVisionConfig,
    ShapleyData2VecVisionForImageClassification,
)
from .models.modeling_shapley_deit import ShapleyDeiTConfig, ShapleyDeiTForImageClassification
from .models.modeling_shapley_dinov2 import (
    ShapleyDinov2Config,
    ShapleyDinov2ForImageClassification,
    ShapleyDinov2WithRegistersConfig,
    ShapleyDinov2WithRegistersForImageClassification,
)
from .models.modeling_shapley_ijepa import ShapleyIJepaConfig, ShapleyIJepaForImageClassification
from .models.modeling_shapley_siglip import ShapleySiglipModel
from .models.modeling_shapley_swin import ShapleySwinConfig, ShapleySwinForImageClassification
from .models.modeling_shapley_swinv2 import ShapleySwinv2Config, ShapleySwinv2ForImageClassification
from .models.modeling_shapley_vision_towers import (
    ShapleyCLIPForImageClassification,
    ShapleyCLIPVisionConfig,
    ShapleyMetaClip2ForImageClassification,
    ShapleyMetaClip2VisionConfig,
    ShapleySiglipForImageClassification,
    ShapleySiglipVisionConfig,
)
from .models.modeling_shapley_vit import ShapleyViTForImageClassification
from .models.modeling_shapley_vit_msn import ShapleyViTMSNConfig, ShapleyViTMSNForImageClassification
from .models.overlay import map_colours, overlay, place_map, processor_geometry, symmetric_scale
from .models.pipeline_shapley import TASK, ShapleyImageClassificationPipeline
from .models.posterior import verdict
from .models.words import word_ids_of
from .publishing.card_data import ShapleyModelCard, ShapleyModelCardData
from .publishing.hub import push_to_hub
from .publishing.model_card import render_model_card, write_model_card
from .registration import register as _register
from .training.checkpoints import last_complete_checkpoint
from .training.losses import (
    coalition_loss,
    coalition_regression_loss,
    paired_residual_loss,
    paired_shapley_loss,
    shapley_loss,
)
from .version import __version__

if TYPE_CHECKING:
    from .data.digits import digits_dataset
    from .data.scenes import scenes_dataset, scenes_tokenizer
    from .faithfulness.evaluate_metrics import AttributionAgreement, FaithfulnessCorrelation, InsertionDeletion
    from .publishing.dataset_explanations import ExplanationRun, explain_dataset
    from .publishing.export import export_onnx, export_program
    from .publishing.interoperability import add_attributions, as_shapiq_game, captum_forward, to_shap_explanation
    from .publishing.saved_explanations import load_explanations
    from .training.arguments import ShapleyTrainingArguments
    from .training.digits import train_digits_model
    from .training.image_text import ShapleyImageTextTrainer, image_text_terms
    from .training.trainer import ShapleyTrainer

# Loaded when first asked for: they need `datasets`, `evaluate`, the Trainer or the exporter, which whoever only
# classifies and explains would wait for, and hold 100 MB of, in vain.
_LAZY = {
    "data.digits": ["digits_dataset"],
    "data.scenes": ["scenes_dataset", "scenes_tokenizer"],
    "publishing.dataset_explanations": ["ExplanationRun", "explain_dataset"],
    "publishing.saved_explanations": ["load_explanations"],
    "training.digits": ["train_digits_model"],
    "publishing.export": ["export_onnx", "export_program"],
    "publishing.interoperability": ["add_attributions", "as_shapiq_game", "captum_forward", "to_shap_explanation"],
    "faithfulness.evaluate_metrics": ["AttributionAgreement", "FaithfulnessCorrelation", "InsertionDeletion"],
    "training.arguments": ["ShapleyTrainingArguments"],
    "training.image_text": ["ShapleyImageTextTrainer", "image_text_terms"],
    "training.trainer": ["ShapleyTrainer"],
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Agreement",
    "AttributionAgreement",
    "AttributionCertificate",
    "AttributionHead",
    "AutoShapleyForImageClassification",
    "BatchedGame",
    "Erasure",
    "ExplanationRun",
    "FaithfulnessCorrelation",
    "Game",
    "ImageTextExplanation",
    "InsertionDeletion",
    "RankingCurves",
    "ShapleyAnyConfig",
    "ShapleyBeitConfig",
    "ShapleyBeitForImageClassification",
    "ShapleyCLIPConfig",
    "ShapleyCLIPForImageClassification",
    "ShapleyCLIPModel",
    "ShapleyCLIPVisionConfig",
    "ShapleyConvNextConfig",
    "ShapleyConvNextForImageClassification",
    "ShapleyConvNextV2Config",
    "ShapleyConvNextV2ForImageClassification",
    "ShapleyData2VecVisionConfig",
    "ShapleyData2VecVisionForImageClassification",
    "ShapleyDeiTConfig",
    "ShapleyDeiTForImageClassification",
    "ShapleyDinov2Config",
    "ShapleyDinov2ForImageClassification",
    "ShapleyDinov2WithRegistersConfig",
    "ShapleyDinov2WithRegistersForImageClassification",
    "ShapleyEstimate",
    "ShapleyForImageClassification",
    "ShapleyIJepaConfig",
    "ShapleyIJepaForImageClassification",
    "ShapleyImageClassificationPipeline",
    "ShapleyImageClassifierOutput",
    "ShapleyImageTextOutput",
    "ShapleyImageTextTrainer",
    "ShapleyMetaClip2ForImageClassification",
    "ShapleyMetaClip2VisionConfig",
    "ShapleyModelCard",
    "ShapleyModelCardData",
    "ShapleySiglipConfig",
    "ShapleySiglipForImageClassification",
    "ShapleySiglipModel",
    "ShapleySiglipVisionConfig",
    "ShapleySwinConfig",
    "ShapleySwinForImageClassification",
    "ShapleySwinv2Config",
    "ShapleySwinv2ForImageClassification",
    "ShapleyTrainer",
    "ShapleyTrainingArguments",
    "ShapleyViTConfig",
    "ShapleyViTForImageClassification",
    "ShapleyViTMSNConfig",
    "ShapleyViTMSNForImageClassification",
    "TASK",
    "__version__",
    "add_attributions",
    "aopc_bounds",
    "as_shapiq_game",
    "attribution_correlation",
    "attribution_error_certificate",
    "attribution_figure",
    "attribution_grid",
    "captum_forward",
    "coalition_loss",
    "coalition_regression_loss",
    "coalitions_to_ids",
    "comprehensiveness_sufficiency",
    "digits_dataset",
    "efficiency_gap",
    "enumerate_coalitions",
    "error_ratio",
    "exact_shapley",
    "explain_dataset",
    "export_onnx",
    "export_program",
    "faithfulness_correlation",
    "grid_pointing_game",
    "ids_to_coalitions",
    "image_text_terms",
    "importance_weights",
    "infidelity",
    "insertion_deletion",
    "interaction_share",
    "kernel_shapley",
    "last_complete_checkpoint",
    "leak",
    "load_explanations",
    "load_image",
    "make_mosaics",
    "map_colours",
    "normalised_aopc",
    "overlay",
    "paired_residual_loss",
    "paired_shapley_loss",
    "permutation_shapley",
    "place_map",
    "processor_geometry",
    "push_to_hub",
    "ranked_coalitions",
    "refine",
    "render_model_card",
    "sample_coalitions",
    "sample_uniform_sizes",
    "scenes_dataset",
    "scenes_tokenizer",
    "sensitivity_n",
    "shapley_kernel_size_probabilities",
    "shapley_loss",
    "symmetric_scale",
    "to_rgb",
    "to_shap_explanation",
    "train_digits_model",
    "upsample_attributions",
    "verdict",
    "word_ids_of",
    "write_model_card",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
