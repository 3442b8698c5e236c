"""The one table of backbones: a new one is a file in `models/` and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    BaseImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessorPil,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    MetaClip2Config,
    MetaClip2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessorPil,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from .models.configuration_shapley import ShapleyConvNextConfig, ShapleyViTConfig
from .models.configuration_shapley_any import ShapleyAnyConfig, is_plain_classifier
from .models.modeling_shapley_any import ShapleyForImageClassification
from .models.modeling_shapley_beit import ShapleyBeitConfig, ShapleyBeitForImageClassification
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


def _small_tokens(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def _small_dinov2(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    shape = _small_tokens(hidden_size, num_layers, image_size, patch_size)
    return {**shape, "mlp_ratio": shape.pop("intermediate_size") // hidden_size}


def _small_tower(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    return {"vision_config": _small_tokens(hidden_size, num_layers, image_size, patch_size)}


def _small_cells(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    return {"hidden_sizes": [hidden_size], "depths": [num_layers], "num_stages": 1, "patch_size": patch_size}


def _small_scaled_cells(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    return {**_small_cells(hidden_size, num_layers, image_size, patch_size), "layer_scale_init_value": 1.0}


def _small_windows(hidden_size: int, num_layers: int, image_size: Any, patch_size: int) -> dict[str, Any]:
    shape = {"embed_dim": hidden_size, "depths": [num_layers], "num_heads": [4], "window_size": 2}
    return {**shape, "image_size": image_size, "patch_size": patch_size}


@dataclass(frozen=True)
class Family:
    """One backbone: our classes, the stock ones, and how a small model of it is shaped.

    Args:
        config: our configuration; its `recommended_head` is what a plain checkpoint gets.
        model: our classifier.
        plain_config: the stock configuration.
        plain_model: the stock classifier.
        processor: the stock image processor that needs no torchvision.
        small: hidden_size, num_layers, image_size and patch_size -> options of a configuration.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    plain_config: type[PreTrainedConfig]
    plain_model: type[PreTrainedModel]
    processor: type[BaseImageProcessor]
    small: Callable[..., dict[str, Any]]


FAMILIES: dict[str, Family] = {
    "vit": Family(
        ShapleyViTConfig,
        ShapleyViTForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
        _small_tokens,
    ),
    "convnext": Family(
        ShapleyConvNextConfig,
        ShapleyConvNextForImageClassification,
        ConvNextConfig,
        ConvNextForImageClassification,
        ConvNextImageProcessorPil,
        _small_scaled_cells,
    ),
    "convnextv2": Family(
        ShapleyConvNextV2Config,
        ShapleyConvNextV2ForImageClassification,
        ConvNextV2Config,
        ConvNextV2ForImageClassification,
        ConvNextImageProcessorPil,
        _small_cells,
    ),
    "deit": Family(
        ShapleyDeiTConfig,
        ShapleyDeiTForImageClassification,
        DeiTConfig,
        DeiTForImageClassification,
        DeiTImageProcessorPil,
        _small_tokens,
    ),
    "dinov2": Family(
        ShapleyDinov2Config,
        ShapleyDinov2ForImageClassification,
        Dinov2Config,
        Dinov2ForImageClassification,
        BitImageProcessorPil,
        _small_dinov2,
    ),
    "dinov2_with_registers": Family(
        ShapleyDinov2WithRegistersConfig,
        ShapleyDinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersForImageClassification,
        BitImageProcessorPil,
        _small_dinov2,
    ),
    "vit_msn": Family(
        ShapleyViTMSNConfig,
        ShapleyViTMSNForImageClassification,
        ViTMSNConfig,
        ViTMSNForImageClassification,
        ViTImageProcessorPil,
        _small_tokens,
    ),
    "ijepa": Family(
        ShapleyIJepaConfig,
        ShapleyIJepaForImageClassification,
        IJepaConfig,
        IJepaForImageClassification,
        ViTImageProcessorPil,
        _small_tokens,
    ),
    "beit": Family(
        ShapleyBeitConfig,
        ShapleyBeitForImageClassification,
        BeitConfig,
        BeitForImageClassification,
        BeitImageProcessorPil,
        _small_tokens,
    ),
    "data2vec-vision": Family(
        ShapleyData2VecVisionConfig,
        ShapleyData2VecVisionForImageClassification,
        Data2VecVisionConfig,
        Data2VecVisionForImageClassification,
        BeitImageProcessorPil,
        _small_tokens,
    ),
    "clip": Family(
        ShapleyCLIPVisionConfig,
        ShapleyCLIPForImageClassification,
        CLIPConfig,
        CLIPForImageClassification,
        CLIPImageProcessorPil,
        _small_tower,
    ),
    "metaclip_2": Family(
        ShapleyMetaClip2VisionConfig,
        ShapleyMetaClip2ForImageClassification,
        MetaClip2Config,
        MetaClip2ForImageClassification,
        CLIPImageProcessorPil,
        _small_tower,
    ),
    "siglip": Family(
        ShapleySiglipVisionConfig,
        ShapleySiglipForImageClassification,
        SiglipConfig,
        SiglipForImageClassification,
        SiglipImageProcessorPil,
        _small_tower,
    ),
    "swin": Family(
        ShapleySwinConfig,
        ShapleySwinForImageClassification,
        SwinConfig,
        SwinForImageClassification,
        ViTImageProcessorPil,
        _small_windows,
    ),
    "swinv2": Family(
        ShapleySwinv2Config,
        ShapleySwinv2ForImageClassification,
        Swinv2Config,
        Swinv2ForImageClassification,
        ViTImageProcessorPil,
        _small_windows,
    ),
}
"""By the model type of the plain checkpoint."""


def model_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """Our model for a checkpoint's model type, plain or ours: that of its backbone, else the one for any classifier.

    Raises:
        ValueError: there is none.
    """
    plain = model_type.removeprefix("shapley-")
    if plain in FAMILIES:
        return FAMILIES[plain].model
    if model_type == ShapleyAnyConfig.model_type or is_plain_classifier(model_type):
        return ShapleyForImageClassification
    raise ValueError(f"{name} is of type {model_type!r}, which is no image classifier that transformers has.")


class AutoShapleyForImageClassification:
    """Chooses the Shapley model of a checkpoint, plain or ours, with the attribution head that suits it.

        model = AutoShapleyForImageClassification.from_pretrained("google/vit-base-patch16-224")

    A plain checkpoint keeps its predictions; its explanation is learned by `ShapleyTrainer`. Of an architecture that
    has no Shapley model of its own, `ShapleyForImageClassification` holds the stock one.
    """

    def __init__(self) -> None:
        raise OSError("Make a model with `AutoShapleyForImageClassification.from_pretrained(checkpoint)`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As the chosen class's `from_pretrained`.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args: passed on.
            **kwargs: passed on: options of `from_pretrained` and of the configuration.

        Raises:
            ValueError: a checkpoint of no image classifier, or of one that cannot be explained.
            OSError: what is wrong with the checkpoint.
        """
        model_type = checkpoint_type(pretrained_model_name_or_path, kwargs)
        model = model_class(model_type, f"The checkpoint {str(pretrained_model_name_or_path)!r}")
        return model.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def checkpoint_type(name: Any, options: Mapping[str, Any] | None = None) -> str:
    """Model type of a folder or Hub id, from its config.json or the `config` given beside it."""
    options = options or {}
    if isinstance(options.get("config"), PreTrainedConfig):
        return options["config"].model_type
    places = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    return AutoConfig.from_pretrained(name, **{key: options[key] for key in places if key in options}).model_type
