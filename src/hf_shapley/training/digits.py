"""scikit-learn's 8 x 8 digits as a `datasets` data set, and a small model of them: nothing needs a download."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from torch import Tensor
from transformers import PrinterCallback, ViTImageProcessorPil

from ..models.configuration_shapley import ShapleyConvNextConfig
from ..models.modeling_shapley_convnext import ShapleyConvNextForImageClassification
from .arguments import ShapleyTrainingArguments
from .trainer import ShapleyTrainer

TEST_FRACTION = 0.25
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


def digits_dataset() -> DatasetDict:
    """Load the 1,797 hand-written digits (Alpaydin and Kaynak, UCI 1998) that scikit-learn ships.

    Returns:
        `train` (1,347) and `test` (450) splits, the same on every call, stratified by label; columns `image`
        (PIL, RGB, 8 x 8) and `label` (`ClassLabel` "0" ... "9").
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0 ... 16
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=TEST_FRACTION, random_state=0, stratify=digits.target
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(label) for label in digits.target_names])})
    splits = {
        name: Dataset.from_dict(
            {
                "image": [PILImage.fromarray(pixels[i]).convert("RGB") for i in rows],
                "label": digits.target[rows].tolist(),
            },
            features=features,
        )
        for name, rows in {"train": train, "test": test}.items()
    }
    return DatasetDict(splits)


def label_maps(names: Sequence[str]) -> dict[str, dict]:
    """What a configuration keeps of label names, `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


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
