"""The pipeline "shapley-image-classification": labels, scores and attribution maps from any picture."""

import base64
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from numbers import Integral
from typing import Any
from urllib.parse import unquote

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedConfig

from .checks import known_labels
from .images import is_array, load_image
from .overlay import check_enlargement, overlay, processor_geometry, symmetric_scale
from .posterior import MOST_PAIRS, verdict

TASK = "shapley-image-classification"

MAX_DOWNLOAD = 100_000_000
"""Largest picture that is fetched from a URL, in bytes."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


SHORTEST_BASE64 = 80
"""A text of fewer characters is never taken for a picture in base64, but for a file's name."""

ONE_PICTURE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, dict)


def score_function(config: PreTrainedConfig) -> str:
    """How a model's logits become scores, by the rule of transformers' image-classification pipeline.

    Args:
        config: its `problem_type` and number of labels decide; one label, or labels that may hold together, have
            probabilities of their own, and a regression's outputs stay what they are.

    Returns:
        "none", "sigmoid" or "softmax", a key of `SCORES`.
    """
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def label_scores(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Scores of a model's labels, (..., K) from logits (..., K): the same whatever part of the library says them."""
    return SCORES[score_function(config)](logits)


def pixel_values_of(
    pictures: Image.Image | Sequence[Image.Image], image_processor: Any, config: PreTrainedConfig
) -> Tensor:
    """What a model sees of pictures.

    Args:
        pictures: one or many, upright RGB as `load_image` gives them.
        image_processor: the model's own.
        config: the model's; one whose `num_channels` is 1 is given grey levels.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a picture that the processor would enlarge beyond all measure.
    """
    pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    for picture in pictures:
        check_enlargement(image_processor, picture.size)
    if getattr(config, "num_channels", 3) == 1:
        pictures = [picture.convert("L") for picture in pictures]
    return image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def check_evaluations(value: Any, name: str) -> int:
    """How many evaluations of the game are asked for, 0 for none; refuse what is no such number."""
    most = 2 * MOST_PAIRS
    if not isinstance(value, Integral) or not (value == 0 or 2 <= value <= most):
        raise ValueError(
            f"`{name}` must be 0 or a number of evaluations from 2 to {most}, got {value!r}: 16 make a check, 256 "
            "refine a map."
        )
    return int(value)


def asked_of_the_game(
    model: Any,
    pixel_values: Tensor,
    maps: Tensor,
    labels: Tensor,
    *,
    evaluations: int = 0,
    check: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Maps of one pass refined, then checked; a picture's answer depends on no other's.

    Args:
        model: a Shapley image classifier.
        pixel_values: (B, C, H, W).
        maps: (B, L, h, w) of one pass.
        labels: (B, L), theirs.
        evaluations: of the game, for each picture, to refine its maps with; 0 leaves them.
        check: of the game, for each picture, to judge its maps by, refined or not; 0 leaves it out.
        seed: of each picture's draws.

    Returns:
        The maps (B, L, h, w); error ratios (B, L) as `check_explanation` gives them, or None.
    """
    if not (evaluations or check):
        return maps, None
    refined, errors = [], []
    for pixels, one, ids in zip(pixel_values.split(1), maps.split(1), labels.split(1), strict=True):
        generator = torch.Generator().manual_seed(seed)
        if evaluations:
            one = model.explain(pixels, ids, evaluations=evaluations, generator=generator)
        refined.append(one)
        if check:
            judged = one if evaluations else None
            errors.append(model.check_explanation(pixels, ids, maps=judged, evaluations=check, generator=generator))
    return torch.cat(refined), torch.cat(errors) if errors else None


def check_in_words(error: float) -> dict[str, Any]:
    """A map's check as answers hold it: the error ratio and the verdict on it."""
    return {"error": error, "verdict": verdict(error)}


def custom_pipelines() -> dict[str, Any]:
    """The entry of config.json that lets `pipeline(..., trust_remote_code=True)` find this file in a repository."""
    implementation = f"{__name__.rpartition('.')[2]}.{ShapleyImageClassificationPipeline.__name__}"
    return {TASK: {"impl": implementation, "pt": ["AutoModelForImageClassification"], "type": "image"}}


class ShapleyImageClassificationPipeline(Pipeline):
    """Classify pictures and attribute each label's logit to the patches, all from one forward pass per batch.

    Example:

    ```python
    classifier = pipeline("shapley-image-classification", model="user/model", device="cpu")
    for entry in classifier("picture.jpg", top_k=2, overlay=True):
        print(entry["label"], entry["score"], entry["attributions"].shape)
        entry["overlay"].save(f"{entry['label']}.png")
    ```

    `pipeline`'s own options hold: `device`, `dtype`, `batch_size`, `num_workers`, `image_processor`, `revision`, ...
    The options of `__call__` may be given to `pipeline` too, as defaults for every call.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "coalition_values"):
            raise ValueError(
                f"`model` must be a Shapley image classifier, got {type(self.model).__name__}: load the checkpoint "
                "with AutoShapleyForImageClassification and train it."
            )
        if self.image_processor is None:
            raise ValueError("`image_processor` must be given: AutoImageProcessor.from_pretrained(checkpoint).")

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Classify and explain one picture or many.

        Args:
            inputs: a picture: path, http(s) URL, base64 text with or without "data:image/...;base64," before it, or
                anything else that `load_image` reads: encoded bytes, an open file, `PIL.Image.Image`, a NumPy array or
                tensor of 8-bit levels, a dict with "bytes" or "path" (an undecoded `datasets` image). Or many of them:
                a sequence (list, tuple, `dataset["image"]`, an array of pictures (B, ...)), or, to stream, any torch
                `Dataset`, such as `KeyDataset`, or any iterable.
            top_k (int, default 5): number of labels per picture, those of the highest scores.
            labels (list of ids or names): restrict the output to these labels, all of them unless `top_k` is given.
            function_to_apply (str): "softmax", "sigmoid" or "none"; the default follows the model's problem type.
            overlay (bool, default False): add to each entry a picture of the map over the input.
            check (int, default 0): evaluations of the game for each picture, such as 16, to judge its maps by; few
                can miss a wrong map, 64 are surer.
            evaluations (int, default 0): of the game for each picture, such as 256, to bring its maps nearer to the
                exact Shapley values.
            seed (int, default 0): of the draws of both; the same picture gets the same answer.
            timeout (float, default 30): seconds to wait for a URL.
            batch_size (int, default 1), num_workers (int, default 0): how many pictures are taken at once.

        Returns:
            For one picture a list of dicts, best score first; for a sequence a list of such lists; for a stream an
            iterator of such lists. A dict holds

            - label (str) and score (float);
            - logit and base_value (float): the label's logit with all patches, and with none;
            - attributions (float32 array (h, w), in logits): what each patch adds; base_value + sum = logit;
            - overlay (RGB picture of the upright input's size), if asked for: red speaks for the label, blue against
              it, on one colour scale for all labels of the picture;
            - check (dict), if asked for: "error" (float), the map's expected squared error over the variance of the
              exact values, 0 is exact and 1 no better than an even map; "verdict" (str), this in words: "good",
              "rough" or "do not trust".

        Raises:
            ValueError: an option or a label is unknown, a picture is too large, or the model answers NaN.
            OSError: a picture is missing, empty, corrupt or cannot be fetched.
            TypeError: an input is none of the above.
        """
        if is_array(inputs) and inputs.ndim == 4:
            inputs = list(inputs)
        if isinstance(inputs, ONE_PICTURE) or hasattr(inputs, "read") or is_array(inputs):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Dataset):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, Sequence):
            # Read one by one: a column of a large data set is not decoded into memory at once.
            return list(super().__call__(_SequenceDataset(inputs), **kwargs))
        if isinstance(inputs, Iterable):
            return super().__call__(_generator(inputs), **kwargs)
        raise TypeError(f"`inputs` must be a picture or an iterable of pictures, got {type(inputs).__name__}.")

    def _sanitize_parameters(
        self,
        top_k: Any = None,
        labels: int | str | Sequence[int | str] | None = None,
        function_to_apply: str | None = None,
        overlay: bool | None = None,
        timeout: float | None = None,
        check: int | None = None,
        evaluations: int | None = None,
        seed: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if top_k is not None:
            if not isinstance(top_k, Integral) or top_k < 1:
                raise ValueError(f"`top_k` must be an integer of at least 1, got {top_k!r}.")
            top_k = int(top_k)  # of NumPy's kinds too
        if function_to_apply is not None:
            function_to_apply = str(getattr(function_to_apply, "value", function_to_apply)).lower()
            if function_to_apply not in SCORES:
                raise ValueError(f"`function_to_apply` must be one of {list(SCORES)}, got {function_to_apply!r}.")
        label_ids = None if labels is None else self._label_ids(labels)
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise ValueError(f"`seed` must be an integer from 0 to 2^63 - 1, got {seed!r}.")
        asked = {
            "check": None if check is None else check_evaluations(check, "check"),
            "evaluations": None if evaluations is None else check_evaluations(evaluations, "evaluations"),
            "seed": None if seed is None else int(seed),
        }
        parts = (
            {"keep_image": overlay, "timeout": timeout},
            {"top_k": top_k, "label_ids": label_ids, **asked},
            {"top_k": top_k, "function_to_apply": function_to_apply},
        )
        return tuple({name: x for name, x in part.items() if x is not None} for part in parts)

    def _label_ids(self, labels: int | str | Sequence[int | str]) -> list[int]:
        """Label ids of names or ids, each once."""
        labels = [labels] if isinstance(labels, Integral | str) else labels
        return list(dict.fromkeys(known_labels(labels, self.model.config.id2label)))

    def preprocess(self, source: Any, keep_image: bool = False, timeout: float = 30.0) -> dict[str, Any]:
        """Any input -> pixel_values (1, C, H, W), and the upright RGB picture if it is needed later."""
        image = _read(source, timeout)
        pixel_values = pixel_values_of(image, self.image_processor, self.model.config)
        inputs = {"pixel_values": pixel_values.to(self.dtype)}
        return {**inputs, "picture": image} if keep_image else inputs

    def _forward(
        self,
        inputs: dict[str, Any],
        top_k: int | None = None,
        label_ids: Sequence[int] | None = None,
        **asked: int,
    ) -> dict[str, Any]:
        """One forward for the batch: logits and base values (B, K), label ids (B, L) and their maps (B, L, h, w).

        What is `asked` of the game beside it comes picture by picture: errors (B, L), if a check is among that.
        """
        pixel_values = inputs["pixel_values"]
        grid = self.model.grid_size(*pixel_values.shape[-2:])
        best = min(5 if top_k is None else top_k, self.model.config.num_labels)
        outputs = self.model(pixel_values, attributed=best if label_ids is None else label_ids)
        self.model._check_answers(outputs)
        maps = outputs.attributions.transpose(1, 2).unflatten(-1, grid)
        maps, errors = asked_of_the_game(self.model, pixel_values, maps, outputs.attributed_labels, **asked)
        results = {
            "logits": outputs.logits,
            "label_ids": outputs.attributed_labels,
            "maps": maps,
            "base_values": outputs.base_values.expand_as(outputs.logits),
            **({} if errors is None else {"errors": errors}),
        }
        return {**results, "picture": inputs["picture"]} if "picture" in inputs else results

    def postprocess(
        self,
        outputs: dict[str, Any],
        top_k: int | None = None,
        function_to_apply: str | None = None,
    ) -> list[dict[str, Any]]:
        """One picture's outputs, each with a leading dimension of 1 -> a dict per label, best score first."""
        names = ("logits", "label_ids", "maps", "base_values")
        logits, label_ids, maps, base_values = (outputs[name][0] for name in names)
        scores = SCORES[function_to_apply or score_function(self.model.config)](logits)
        best = scores[label_ids].argsort(descending=True, stable=True)[:top_k]
        entries = [
            {
                "label": self.model.config.id2label[label],
                "score": scores[label].item(),
                "logit": logits[label].item(),
                "base_value": base_values[label].item(),
                "attributions": attribution_map.clone().numpy(),  # no view: it would keep the batch in memory
            }
            for label, attribution_map in zip(label_ids[best].tolist(), maps[best], strict=True)
        ]
        if "errors" in outputs:
            for entry, error in zip(entries, outputs["errors"][0][best].tolist(), strict=True):
                entry["check"] = check_in_words(error)
        if "picture" in outputs:
            self._add_overlays(entries, maps[best], outputs["picture"])
        return entries

    def _add_overlays(self, entries: list[dict[str, Any]], maps: Tensor, picture: Image.Image) -> None:
        box = processor_geometry(self.image_processor, picture.size)
        scale = symmetric_scale(maps)
        for entry, attribution_map in zip(entries, maps, strict=True):
            entry["overlay"] = overlay(picture, attribution_map, scale=scale, box=box)


class _SequenceDataset(Dataset):
    """Any sequence as the kind of data set that pipelines read item by item."""

    def __init__(self, sequence: Sequence[Any]):
        self.sequence = sequence

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, index: int) -> Any:
        return self.sequence[index]


def _generator(inputs: Iterable[Any]) -> Iterator[Any]:
    yield from inputs


def _read(source: Any, timeout: float) -> Image.Image:
    """A picture from anywhere as an upright RGB image."""
    if isinstance(source, dict):
        if source.get("bytes") is None and source.get("path") is None:
            raise TypeError(
                f"A picture given as a dict must have 'bytes' or 'path', got {sorted(source)}: "
                'for rows of a data set give the column, `dataset["image"]`.'
            )
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _download(source, timeout)
    elif isinstance(source, str) and source.startswith("data:image/"):
        source = _decode_data_url(source)
    elif isinstance(source, str) and len(source) > SHORTEST_BASE64 and not os.path.exists(source):
        source = _decode_base64(source) or source
    return load_image(source)


def _decode_data_url(url: str) -> bytes:
    header, _, encoded = url.partition(",")
    data = _decode_base64(unquote(encoded)) if header.endswith(";base64") else None
    if data is None:
        raise OSError(f"Cannot read the picture {url[:40]!r}...: its base64 is damaged or not marked by ';base64,'.")
    return data


def _decode_base64(text: str) -> bytes | None:
    """The bytes, or None if the text, line breaks aside, is no base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:  # binascii's for damage; letters beyond ASCII
        return None


def _download(url: str, timeout: float) -> bytes:
    """Fetch a picture over http(s), at most `MAX_DOWNLOAD` bytes."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hf_shapley", "Accept": "image/*,*/*"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, HTTPException) as error:  # no answer or an error; malformed URL; broken answer
        raise OSError(f"Cannot fetch the picture {url!r}: {error}. Check the address, or save it first.") from error
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"Cannot fetch the picture {url!r}: more than {MAX_DOWNLOAD} bytes. Download and shrink it.")
    return data
