"""Loading models of image and text, from plain checkpoints and ours, and what learns of them."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from .configuration_shapley_clip import ImageTextConfigMixin
from .heads import AttributionHead, is_own_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
else:
    Model = object  # the methods join those of the stock model that a class inherits from besides


class ImageTextLoadingMixin(Model):
    """`from_pretrained`, and which weights learn."""

    image_attribution_head: AttributionHead
    text_attribution_head: AttributionHead

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of ours or a plain one of the same architecture, as the stock model does.

        The heads' own layers start as copies of the last ones of their side. Weights are read from safetensors, never
        unpickled, unless `use_safetensors=False` asks for it.

        Raises:
            OSError: weights of the stock model are missing, or are more than its configuration has.
            ValueError: a checkpoint of another architecture.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            options = {option.name for option in fields(ImageTextConfigMixin)} & kwargs.keys()
            kwargs["config"] = cls.config_class.of(kwargs["config"], **{name: kwargs.pop(name) for name in options})
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, beyond its configuration,")):
            lost = sorted(name for name in info[kind] if not is_own_part(name) and "position_ids" not in name)
            if lost:
                raise OSError(
                    f"The checkpoint {str(pretrained_model_name_or_path)!r} {what} {len(lost)} weights of the stock "
                    f"model, such as {lost[:3]}: download or save it again, with the configuration it belongs to."
                )
        for head, stock, norm in (
            ("image_attribution_head", model.vision_model, model.vision_model.post_layernorm),
            ("text_attribution_head", model.text_model, model.text_model.final_layer_norm),
        ):
            if any(name.startswith(f"{head}.own_") for name in info["missing_keys"]):
                layers = stock.encoder.layers[-model.config.influence_own_layers :]
                getattr(model, head).copy_layers(layers, norm)
        return (model, info) if wants_info else model

    def freeze_embeddings(self) -> None:
        """Let the attribution heads alone learn from here on: embeddings and logits stay what they are."""
        self.requires_grad_(False)
        self.image_attribution_head.requires_grad_(True)
        self.text_attribution_head.requires_grad_(True)

    @property
    def attributions_trained(self) -> bool:
        """Whether training has reached both heads: their last layers start at zero."""
        corrections = [
            head.get_parameter("correction.weight")
            for head in (self.image_attribution_head, self.text_attribution_head)
        ]
        return all(bool(weight.detach().any()) for weight in corrections)
