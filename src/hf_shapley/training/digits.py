"""A small model of scikit-learn's digits, trained within seconds: nothing needs a download."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import PrinterCallback, ViTImageProcessorPil

from ..data.digits import digits_dataset
from ..data.labels import label_maps
from ..models.configuration_shapley import ShapleyConvNextConfig
from ..models.modeling_shapley_convnext import ShapleyConvNextForImageClassification
from .arguments import ShapleyTrainingArguments
from .trainer import ShapleyTrainer

# From scratch on few images everything learns to be explained: patches vote one by one, each term has its full weight.
VOTES = {"vote_readout": "patches", "influence_own_layers": 0, "influence_layers": 0}
EVERYTHING_FLOWS = {
    "coalition_weight": 1.0,
    "shapley_warmup": 0.0,
    "value_gradient": 1.0,
    "value_gradient_fraction": 1.0,
}
# Of every run on them: short, on the CPU, and nobody's log.
SHORT_RUN = dict(
    save_strategy="no", lr_scheduler_type="cosine", report_to=[], use_cpu=True, dataloader_pin_memory=False
)


def trainable(pixel_values: Tensor, labels: Sequence[int] | Tensor) -> list[dict]:
    """Rows that a Trainer takes: pixels (images, C, H, W), labels (images)."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixel_values, labels, strict=True)]


def train_digits_model(
    *, epochs: float = 16, seed: int = 0
) -> tuple[ShapleyConvNextForImageClassification, ViTImageProcessorPil]:
    """Train a small ConvNeXt of 4 x 4 players on the digits jointly, on the CPU, within seconds: a model for examples.

    Like any Trainer, it seeds Python's, NumPy's and torch's global generators.

    Args:
        epochs: passes over the 1,347 training images.
        seed: of the weights, the order of the images and the coalitions.

    Returns:
        The model in evaluation mode, and its image processor.
    """
    train = digits_dataset()["train"]
    labels = train.features["label"].names
    # By area, so that an enlarged digit comes back as it was.
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, resample=PILImage.Resampling.BOX)
    pixels = processor(train["image"][:], return_tensors="pt")["pixel_values"]  # (1347, 3, 8, 8)
    config = ShapleyConvNextConfig(
        hidden_sizes=[64],
        depths=[2],
        num_stages=1,
        patch_size=2,
        image_size=8,
        layer_scale_init_value=1.0,
        **VOTES,
        **label_maps(labels),
    )
    with TemporaryDirectory() as folder:
        args = ShapleyTrainingArguments(
            output_dir=folder,
            seed=seed,
            num_train_epochs=epochs,
            per_device_train_batch_size=128,
            learning_rate=1e-2,
            shapley_weight=3.0,
            **EVERYTHING_FLOWS,
            warmup_steps=20,
            logging_strategy="no",
            disable_tqdm=True,
            **SHORT_RUN,
        )
        torch.manual_seed(seed)
        model = ShapleyConvNextForImageClassification(config)
        trainer = ShapleyTrainer(model, args, train_dataset=trainable(pixels, train["label"][:]))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval(), processor
