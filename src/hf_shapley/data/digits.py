"""scikit-learn's 8 x 8 digits as a `datasets` data set: nothing needs a download."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

TEST_FRACTION = 0.25


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
