"""Whatever comes in, a call gives the right answer or says at the door which argument is wrong and what is wanted."""

import dataclasses
import inspect
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from conftest import make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import hf_shapley
from hf_shapley.cli import main
from hf_shapley.figures import attribution_figures
from hf_shapley.models import coalitions, images
from hf_shapley.models import overlay as vis
from hf_shapley.publishing import card_texts, interoperability, model_card
from hf_shapley.training import losses

SOURCE = str(Path(hf_shapley.__file__).parent)
B, M, N, K = 2, 4, 5, 3  # images, coalitions, players, labels
EFFORT = int(os.environ.get("EFFORT", 1))  # how many times as many cases as in the test suite


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


PRESENT = draw(B, M, N) > 0
WEIGHTS = draw(N, K)


class OtherPlayers(Exception):
    """What a caller's own game raises: it reaches the caller as it is."""


def game(present: torch.Tensor) -> torch.Tensor:
    """A game with interactions, for one image or a batch."""
    if present.shape[-1] != N:
        raise OtherPlayers(present.shape)
    additive = present.float() @ WEIGHTS
    return additive + 0.1 * additive.square()


class Call(NamedTuple):
    """A function, arguments that it takes, and the kind of each argument that may go wrong."""

    function: Callable
    arguments: dict[str, Any]
    kinds: dict[str, str]


ATTRIBUTIONS = draw(B, N, K)
MAPS = draw(B, K, 2, 3)
PICTURE = Image.new("RGB", (12, 8), (10, 200, 30))
HEAD = {
    "vote_readout": "patches", "influence_own_layers": 0, "influence_layers": 1, "influence_block": "mlp",
    "attribution_gradient": True, "coalition_adapter_size": 4, "id2label": {0: "a", 1: "b"},
    "label2id": {"a": 0, "b": 1}, "hidden_act": "gelu", "num_channels": 3, "patch_size": 4, "num_labels": 2,
}  # fmt: skip


def model_calls(backbone: str) -> dict[str, Call]:
    model = make_model(backbone, num_labels=3)
    pixels, present = draw(2, 3, 16, 24), draw(2, 4, 24) > 0
    ids = {
        "coalition_ids": present.long(),
        "labels": torch.tensor([0, 2]),
        "num_coalitions": 2,
        "num_with_gradient": 1,
    }
    return {
        f"{backbone} forward": Call(
            model.forward,
            {"pixel_values": pixels, **ids},
            {"pixel_values": "images", "coalition_ids": "ids", "labels": "labels", "num_with_gradient": "count"},
        ),
        f"{backbone} explain": Call(
            model.explain, {"pixel_values": pixels, "labels": [0, 2]}, {"pixel_values": "images", "labels": "chosen"}
        ),
        f"{backbone} coalition_values": Call(
            model.coalition_values,
            {"pixel_values": pixels, "coalitions": present, "batch_size": 4},
            {"pixel_values": "images", "coalitions": "bool", "batch_size": "count"},
        ),
        f"{backbone} as_shapiq_game": Call(
            lambda pixel_values, label: interoperability.as_shapiq_game(model, pixel_values, label),
            {"pixel_values": pixels[:1], "label": 0},
            {"pixel_values": "images", "label": "one label"},
        ),
        f"{backbone} captum_forward": Call(
            lambda pixel_values: interoperability.captum_forward(model, pixel_values),
            {"pixel_values": pixels},
            {"pixel_values": "images"},
        ),
    }


CALLS = {
    "shapley_kernel_size_probabilities": Call(
        coalitions.shapley_kernel_size_probabilities, {"num_players": N}, {"num_players": "count"}
    ),
    "sample_coalitions": Call(
        lambda shape, **rest: coalitions.sample_coalitions(shape, **rest),
        {"shape": 3, "num_players": N, "sizes": "spread", "generator": torch.Generator()},
        {"shape": "count or 0", "num_players": "count", "sizes": "other", "generator": "other"},
    ),
    "importance_weights": Call(
        coalitions.importance_weights,
        {"coalitions": PRESENT, "sizes": "spread"},
        {"coalitions": "bool any shape", "sizes": "other"},
    ),
    "enumerate_coalitions": Call(coalitions.enumerate_coalitions, {"num_players": N}, {"num_players": "few"}),
    "ranked_coalitions": Call(coalitions.ranked_coalitions, {"scores": draw(B, N)}, {"scores": "scores"}),
    "coalitions_to_ids": Call(coalitions.coalitions_to_ids, {"coalitions": PRESENT}, {"coalitions": "bool any shape"}),
    "ids_to_coalitions": Call(
        coalitions.ids_to_coalitions,
        {"coalition_ids": PRESENT.long(), "num_coalitions": 2},
        {"coalition_ids": "long", "num_coalitions": "count"},
    ),
    "sum_over_coalitions": Call(
        coalitions.sum_over_coalitions,
        {"coalitions": PRESENT, "votes": ATTRIBUTIONS},
        {"coalitions": "bool", "votes": "float any width"},
    ),
    "shapley_loss": Call(
        losses.shapley_loss,
        {"attributions": ATTRIBUTIONS, "coalitions": PRESENT, "gains": draw(B, M, K)},
        {"attributions": "float", "coalitions": "bool", "gains": "float"},
    ),
    "paired_shapley_loss": Call(
        losses.paired_shapley_loss,
        {"attributions": ATTRIBUTIONS, "coalitions": PRESENT, "gains": draw(B, M, 2, K), "weights": draw(B, M).abs()},
        {"attributions": "float", "coalitions": "bool", "gains": "float", "weights": "float"},
    ),
    "paired_residual_loss": Call(
        losses.paired_residual_loss,
        {"residuals": draw(B, M, 2, K), "num_players": N, "weights": draw(B, M).abs()},
        {"residuals": "float any width", "num_players": "count", "weights": "float any width"},
    ),
    "coalition_loss": Call(
        losses.coalition_loss,
        {"values": draw(B, M, K), "logits": draw(B, K), "weights": draw(B, M).abs()},
        {"values": "float", "logits": "float", "weights": "float"},
    ),
    "exact_shapley": Call(
        hf_shapley.exact_shapley,
        {"game": game, "num_players": N, "batch_size": 8},
        {"game": "game", "num_players": "few", "batch_size": "count"},
    ),
    "permutation_shapley": Call(
        hf_shapley.permutation_shapley,
        {"game": game, "num_players": N, "budget": 30, "batch_size": 8, "generator": torch.Generator()},
        {"game": "game", "num_players": "count", "budget": "count", "batch_size": "count", "generator": "other"},
    ),
    "kernel_shapley": Call(
        hf_shapley.kernel_shapley,
        {
            "game": game,
            "num_players": N,
            "budget": 30,
            "batch_size": 8,
            "unbiased": True,
            "sizes": "spread",
            "control_variate": draw(N, K),
            "generator": torch.Generator(),
        },
        {
            "game": "game",
            "num_players": "count",
            "budget": "count",
            "batch_size": "count",
            "control_variate": "finite",
            "sizes": "other",
            "generator": "other",
        },
    ),
    "attribution_error_certificate": Call(
        hf_shapley.attribution_error_certificate,
        {"games": [game, game], "attributions": ATTRIBUTIONS, "budget": 30, "confidence": 0.9, "estimator": "kernel",
         "generator": torch.Generator()},
        {
            "games": "other",
            "attributions": "finite any width",
            "budget": "count",
            "confidence": "share",
            "estimator": "choice",
        },
    ),
    **{
        function.__name__: Call(
            function,
            {"game": game, "attributions": ATTRIBUTIONS, "labels": torch.tensor([0, 2]), **options},
            {"game": "game", "attributions": "finite", "labels": "labels", "link": "choice", **kinds},
        )
        for function, options, kinds in [
            (hf_shapley.insertion_deletion, {"link": "logit"}, {"batch_size": "count"}),
            (
                hf_shapley.comprehensiveness_sufficiency,
                {"link": "logit", "shares": [0.2, 0.5]},
                {"shares": "shares", "batch_size": "count"},
            ),
            (
                hf_shapley.faithfulness_correlation,
                {"link": "logit", "coalitions": PRESENT, "method": "pearson"},
                {"coalitions": "bool", "method": "choice", "batch_size": "count"},
            ),
            (
                hf_shapley.sensitivity_n,
                {"link": "logit", "sizes": [2], "num_samples": 4, "generator": torch.Generator()},
                {"sizes": "sizes", "num_samples": "count", "batch_size": "count"},
            ),
            (hf_shapley.infidelity, {"link": "logit", "coalitions": PRESENT}, {"coalitions": "bool"}),
        ]
    },
    "efficiency_gap": Call(
        hf_shapley.efficiency_gap,
        {"game": game, "attributions": ATTRIBUTIONS},
        {"game": "game", "attributions": "finite"},
    ),
    "leak": Call(
        hf_shapley.leak,
        {"game": game, "changed_game": game, "coalitions": PRESENT, "batch_size": 8},
        {"game": "game", "changed_game": "game", "coalitions": "bool any shape", "batch_size": "count"},
    ),
    "interaction_share": Call(
        hf_shapley.interaction_share,
        {"game": game, "attributions": ATTRIBUTIONS, "coalitions": PRESENT},
        {"game": "game", "attributions": "finite", "coalitions": "bool"},
    ),
    "sample_uniform_sizes": Call(
        hf_shapley.sample_uniform_sizes,
        {"images": B, "num_samples": M, "num_players": N},
        {"images": "count", "num_samples": "count", "num_players": "count"},
    ),
    "aopc_bounds": Call(
        hf_shapley.aopc_bounds,
        {"game": game, "labels": torch.tensor([0, 2]), "num_players": N, "link": "logit", "beam_size": 2},
        {"game": "game", "labels": "labels of images", "num_players": "count", "link": "choice", "beam_size": "count"},
    ),
    "normalised_aopc": Call(
        hf_shapley.normalised_aopc,
        {"aopc": draw(B), "lower": -draw(B).abs(), "upper": draw(B).abs()},
        {"aopc": "float", "lower": "float", "upper": "float"},
    ),
    "make_mosaics": Call(
        hf_shapley.make_mosaics,
        {
            "images": draw(6, 3, 4, 4),
            "labels": torch.arange(6),
            "num_mosaics": 2,
            "grid": (2, 2),
            "generator": torch.Generator(),
        },
        {"images": "any images", "labels": "any labels", "num_mosaics": "count", "grid": "sizes"},
    ),
    "grid_pointing_game": Call(
        hf_shapley.grid_pointing_game,
        {"maps": draw(B, 4, 4), "cells": torch.tensor([0, 3]), "grid": (2, 2)},
        {"maps": "finite any width", "cells": "labels", "grid": "sizes"},
    ),
    **{
        function.__name__: Call(
            function,
            {"attributions": ATTRIBUTIONS, "references": ATTRIBUTIONS.flip(0)},
            {"attributions": "finite", "references": "finite"},
        )
        for function in (hf_shapley.attribution_correlation, hf_shapley.error_ratio)
    },
    "upsample_attributions": Call(
        hf_shapley.upsample_attributions, {"maps": MAPS, "size": (8, 12)}, {"maps": "maps", "size": "sizes"}
    ),
    "symmetric_scale": Call(vis.symmetric_scale, {"maps": MAPS}, {"maps": "array"}),
    "place_map": Call(
        vis.place_map,
        {"attribution_map": MAPS[0, 0], "image_size": (12, 8)},
        {"attribution_map": "map", "image_size": "pixels"},
    ),
    "map_colours": Call(
        vis.map_colours,
        {"attribution_map": MAPS[0, 0], "scale": 1.0, "cmap": vis.BLUE_WHITE_RED},
        {"attribution_map": "map", "scale": "scale", "cmap": "other"},
    ),
    "overlay": Call(
        vis.overlay,
        {"image": PICTURE, "attribution_map": MAPS[0, 0], "scale": 1.0, "alpha": 0.5, "box": (0.0, 0.0, 12.0, 8.0)},
        {"image": "picture", "attribution_map": "map", "scale": "scale", "alpha": "share or 0", "box": "other"},
    ),
    "attribution_figure": Call(
        attribution_figures.attribution_figure,
        {"image": PICTURE, "maps": MAPS[0], "labels": ["a", "b", "c"]},
        {"image": "picture", "maps": "map", "labels": "other", "scale": "scale", "alpha": "share or 0"},
    ),
    "attribution_grid": Call(
        attribution_figures.attribution_grid,
        {"images": [PICTURE] * B, "maps": MAPS, "labels": [["a", "b", "c"]] * B, "blocks_per_row": 2},
        {"images": "pictures", "maps": "map", "labels": "other", "blocks_per_row": "count"},
    ),
    "to_rgb": Call(images.to_rgb, {"image": PICTURE}, {"image": "picture"}),
    "load_image": Call(
        images.load_image, {"source": PICTURE, "max_pixels": 1000}, {"source": "picture", "max_pixels": "count"}
    ),
    "format_number": Call(card_texts.format_number, {"value": 0.5}, {"value": "number"}),
    "render_model_card": Call(
        model_card.render_model_card, {"results": {"model_name": "x"}, "model_id": "u/x"}, {"results": "other"}
    ),
    "write_model_card": Call(
        model_card.write_model_card, {"path": "nowhere/README.md", "card": "text"}, {"card": "other"}
    ),
    **model_calls("vit"),
    **model_calls("convnext"),
    **{
        f"{config.__name__}": Call(
            config,
            options,
            {
                "vote_readout": "choice", "influence_own_layers": "layers", "influence_layers": "layers",
                "influence_block": "choice", "attribution_gradient": "flag", "coalition_adapter_size": "layers",
                "id2label": "label map", "label2id": "label map", "hidden_act": "choice", "num_channels": "count",
                "patch_size": "count", "num_labels": "labels wanted", **kinds,
            },
        )
        for config, options, kinds in [
            (
                hf_shapley.ShapleyViTConfig,
                dict(HEAD, hidden_size=8, num_attention_heads=2, image_size=(8, 12), hidden_dropout_prob=0.1),
                {"hidden_size": "count", "num_attention_heads": "heads", "image_size": "sizes or one",
                 "hidden_dropout_prob": "share or 0"},
            ),
            (
                hf_shapley.ShapleyConvNextConfig,
                dict(HEAD, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, drop_path_rate=0.1),
                {"hidden_sizes": "widths", "depths": "widths", "num_stages": "stages", "drop_path_rate": "share or 0"},
            ),
        ]
    },
    "ShapleyTrainingArguments": Call(
        hf_shapley.ShapleyTrainingArguments,
        {
            "output_dir": "nowhere", "use_cpu": True, "report_to": [], "shapley_weight": 1.0, "coalition_weight": 1.0,
            "shapley_warmup": 0.5, "value_gradient": 0.5, "value_gradient_fraction": 0.5, "num_pairs": 1,
            "attribution_learning_rate": 0.1, "attribution_error_images": 2,
        },
        {
            **dict.fromkeys(["shapley_weight", "coalition_weight"], "weight"),
            **dict.fromkeys(["shapley_warmup", "value_gradient"], "share or 0"),
            "value_gradient_fraction": "positive share", "num_pairs": "count",
            "attribution_learning_rate": "scale", "attribution_error_images": "count or 0",
        },
    ),
}  # fmt: skip

NAN, INFINITY = float("nan"), float("inf")
NOT_NUMBERS = ["3", b"3", [3], {"a": 1}, object(), None, 2j]
NOT_COUNTS = [*NOT_NUMBERS, -1, -(10**20), 2.5, NAN, INFINITY, torch.ones(2)]
NOT_TENSORS = ["text", 3, 0.5, {"a": 1}, object(), None, [[0.5, None]]]


def damaged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor with NaN or infinity in one place."""
    spoilt = [tensor.clone() for _ in range(3)]
    for copy, value in zip(spoilt, (NAN, INFINITY, -INFINITY), strict=True):
        copy.view(-1)[-1] = value
    return spoilt


def misshapen(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor in shapes that no other argument can fit."""
    return [tensor.flatten()[0], tensor[:0], tensor[..., :0], tensor[None, None, None], torch.cat([tensor] * 3, -1)]


def wrong_floats(good: torch.Tensor) -> list[Any]:
    return [*NOT_TENSORS, good.long(), good > 0, good.to(torch.complex64), *misshapen(good)]


def wrong_games(good: Callable) -> list[Any]:
    """Not callable, or with values of a wrong kind, dtype, shape or size, or not finite."""
    spoilers = [
        lambda values: None,
        lambda values: values.tolist(),
        lambda values: values.long(),
        lambda values: values[..., 0],
        lambda values: values[..., :1, :],
        lambda values: values[..., :0],
        lambda values: values.mean(),
        lambda values: values * NAN,
        lambda values: values / 0,
    ]
    return ["game", None, 3, draw(4), *[lambda c, spoil=spoil: spoil(good(c)) for spoil in spoilers]]


BAD: dict[str, Callable[[Any], list[Any]]] = {
    "count": lambda good: [*NOT_COUNTS, 0],
    "count or 0": lambda good: NOT_COUNTS,
    "few": lambda good: [*NOT_COUNTS, 0, 1, 25, 10**12],
    "number": lambda good: [*NOT_NUMBERS, NAN, INFINITY, -INFINITY, True, torch.ones(2)],
    "share": lambda good: [*NOT_NUMBERS, 0, 1, -0.1, 1.1, NAN, INFINITY],
    "share or 0": lambda good: [*NOT_NUMBERS, -0.1, 1.1, NAN, INFINITY],
    "scale": lambda good: [*NOT_NUMBERS, 0, -1.0, NAN, INFINITY],
    "shares": lambda good: [[], [0.0], [-0.5], [1.5], [NAN], ["a"], "ab", 0.5, None, {"a": 1}, object()],
    "sizes": lambda good: [(), (0, 0), (-1, 2), (10**6, 1), ("a", "b"), (2.5, 2), (NAN, 1), "ab", 7, None, object()],
    "choice": lambda good: ["nonsense", "", 3, None, [], object()],
    "labels": lambda good: [
        good.float(), good - 100, good + 100, good[None], good[:1][:0], good[0], good[:-1], torch.cat([good, good]),
        "text", 2.5, [NAN], ["a"], {"a": 1}, object(), good > 0,
    ],  # fmt: skip
    "float": wrong_floats,
    "finite": lambda good: [*wrong_floats(good), *damaged(good)],
    "scores": lambda good: [*NOT_TENSORS, good[0, 0], good[:, :0], good.to(torch.complex64), *damaged(good)],
    "map": lambda good: ["text", {"a": 1}, object(), None, [[0.5, None]], 2j, *damaged(good), *misshapen(good)[:4]],
    "any images": lambda good: [*NOT_TENSORS, good[0], good[:0], good[..., :0]],
    "images": lambda good: [
        *NOT_TENSORS, good.long(), good > 0, good.to(torch.complex64), *damaged(good), good[0, 0], good[:0],
        good[:, :2], good[..., :-1], good[..., :0], good[None],
    ],
    "ids": lambda good: [
        *NOT_TENSORS[:-3], [[1]], good.float(), good > 0, good[0], good[..., :-1], good[:, :0],
        torch.cat([good, good]),
    ],
    "chosen": lambda good: [
        [3], [-1], ["nonsense"], [], [[0]], [0.5], [None], "ab", 3, object(), {"a": 1}, [NAN],
        torch.tensor([[[0]]]), torch.tensor([0.5]), torch.tensor([7]), torch.tensor([True]), torch.zeros(5, 2).long(),
    ],
    "one label": lambda good: [3, -1, "nonsense", 0.5, None, object(), [0]],
    "labels of images": lambda good: [
        good.float(), good - 100, good + 100, good[None], good[0], good[:0], "text", 2.5, ["a"], {"a": 1}, object(),
    ],
    "any labels": lambda good: [good.float(), good - 100, good[None], good[0], good[:-1], "text", 2.5, ["a"]],
    "maps": lambda good: [*NOT_TENSORS, good.long(), good > 0, good[0, 0, 0], good[:0], good[..., :0]],
    "float any width": lambda good: wrong_floats(good)[:-1],
    "finite any width": lambda good: [*wrong_floats(good)[:-1], *damaged(good)],
    "pixels": lambda good: [(), (0, 0), (-1, 2), ("a", "b"), (2.5, 2), (NAN, 1), "ab", 7, None, object()],
    "sizes or one": lambda good: [(), (0, 0), (-1, 2), ("a", "b"), (2.5, 2), (1, 2, 3), "ab", 0, -3, 2.5, object()],
    "widths": lambda good: [(), (0, 0), (-1, 2), ("a", "b"), (2.5, 2), (NAN, 1), "ab", 7, object()],
    "layers": lambda good: [*NOT_NUMBERS, -1, 2.5, NAN, INFINITY],
    "flag": lambda good: ["yes", 2, 0.5, None, [], object()],
    "stages": lambda good: [*NOT_COUNTS, 0, 1, 3],
    "heads": lambda good: [*NOT_COUNTS, 0, 3],
    "labels wanted": lambda good: [],
    "label map": lambda good: ["text", [1], 3, {"x": "y"}, {5: "a"}, {0: "a", 2: "b"}, {"a": 1, "b": 0}, object()],
    "weight": lambda good: [*NOT_NUMBERS, -0.1, NAN, INFINITY],
    "positive share": lambda good: [*NOT_NUMBERS, 0, -0.1, 1.1, NAN, INFINITY],
    "array": lambda good: ["text", {"a": 1}, object(), None, [[0.5, None]], 2j, [], *damaged(good), good[:0]],
    "bool": lambda good: [*NOT_TENSORS, good.float(), good.long(), good.to(torch.uint8), *misshapen(good)],
    "bool any shape": lambda good: [*NOT_TENSORS, good.float(), good.long(), good.to(torch.uint8), good[0, 0, 0]],
    "long": lambda good: [*NOT_TENSORS, good.float(), good > 0, good.int(), good[0, 0, 0]],
    "game": wrong_games,
    "picture": lambda good: [None, 3, 0.5, object(), [good], {"a": 1}, draw(3, 4, 4), good.convert("F"), ""],
    "pictures": lambda good: [None, 3, "ab", object(), [], [None] * len(good), [draw(3, 4, 4)] * len(good)],
    "other": lambda good: [3, 0.5, object(), 2j, draw(2, 2)],
}  # fmt: skip


def outcome(call: Call, argument: str, value: Any) -> tuple[str | None, Any]:
    """None if the call refuses the value well, "accepted" if it takes it, else what is wrong; and its result."""
    try:
        return "accepted", call.function(**{**call.arguments, argument: value})
    except (ValueError, TypeError, OSError) as error:
        places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not places[-1].startswith(SOURCE):
            return f"raised deep inside, by {places[-1]}: {type(error).__name__}: {error}", None
        # Of two that do not fit each other either may be named.
        fits_no_other = isinstance(value, torch.Tensor | list | Image.Image)
        named = [*call.arguments, "image", "game"] if fits_no_other else [argument, "game"]
        return None if any(name in str(error) for name in named) else f"names none of {named}: {error}", None
    except OtherPlayers:
        return None, None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}", None


def is_default(call: Call, argument: str, value: Any) -> bool:
    parameter = inspect.signature(call.function).parameters.get(argument)
    return value is None and parameter is not None and parameter.default is None


@pytest.mark.parametrize("name", CALLS)
def test_every_wrong_argument_is_refused_by_name(name, record_property):
    """Every wrong value of every argument is refused with an error that names the argument."""
    call = CALLS[name]
    tried = [
        (argument, value)
        for argument, kind in call.kinds.items()
        if argument in call.arguments
        for value in BAD[kind](call.arguments[argument])
        if not is_default(call, argument, value)
    ]
    complaints = [(argument, value, outcome(call, argument, value)[0]) for argument, value in tried]
    assert [f"{argument}={value!r:.60}: {why}" for argument, value, why in complaints if why] == []
    assert len(tried) >= 5
    record_property("cases", len(tried))


# By their documentation: the correlation with a constant, for one.
MAY_BE_NAN = {"attribution_correlation", "faithfulness_correlation", "sensitivity_n", "interaction_share"}
MAY_BE_NAN |= {"normalised_aopc", "place_map"}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int64]
DTYPES += [torch.complex64]
NUMBERS = [0.0, 1.0, -1.0, 1e-30, 3e38, -3e38, INFINITY, NAN]
TENSORS = [(name, argument) for name, call in CALLS.items() for argument in call.kinds
           if isinstance(call.arguments.get(argument), torch.Tensor)]  # fmt: skip


@st.composite
def tensors(draw_from, like: torch.Tensor):
    """Any dtype and strides; any shape, mostly near another one; ordinary, huge, infinite or missing numbers."""
    near = [size + draw_from(st.sampled_from([0, 0, 0, 0, 1, -1])) for size in like.shape]
    shape = draw_from(st.one_of(st.just(near), st.lists(st.integers(0, 4), max_size=5)))
    number = draw_from(st.sampled_from(NUMBERS))
    dtype = draw_from(st.sampled_from([like.dtype, *DTYPES]))
    tensor = draw(*[max(0, size) for size in shape], dtype=torch.float32)
    if draw_from(st.booleans()):
        tensor = torch.where(tensor > 1, number, tensor)
    if not (dtype.is_floating_point or dtype.is_complex):
        tensor = tensor.nan_to_num(0).clamp(0, 3)
    tensor = tensor.to(dtype)
    return tensor.mT.contiguous().mT if tensor.ndim >= 2 and draw_from(st.booleans()) else tensor


@settings(max_examples=400 * EFFORT, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_tensor_gives_finite_answers_or_a_refusal(data):
    """Any tensor in place of an argument gives a finite answer or a refusal."""
    name, argument = data.draw(st.sampled_from(TENSORS))
    call = CALLS[name]
    value = data.draw(tensors(call.arguments[argument]))
    what = f"{name}({argument}={value.dtype}{tuple(value.shape)})"
    why, result = outcome(call, argument, value)
    assert why is None or why == "accepted", f"{what}: {why}"
    if why and value.numel() and value.isfinite().all() and value.double().abs().max() < 10 and name not in MAY_BE_NAN:
        assert all(found.isfinite().all() for found in tensors_in(result)), f"{what} gave NaN or infinity"


def tensors_in(result: Any) -> list[torch.Tensor]:
    """Every float tensor of a result."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    if dataclasses.is_dataclass(result):
        result = list(vars(result).values())
    parts = result if isinstance(result, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name, argument", TENSORS)
def test_tensors_on_another_device_are_refused_by_name(name, argument):
    """The meta device is one that every machine has; where shapes are enough, what comes out is on it too."""
    call = CALLS[name]
    why, result = outcome(call, argument, call.arguments[argument].to("meta"))
    assert why is None or (why == "accepted" and all(found.is_meta for found in tensors_in(result))), why


@pytest.mark.parametrize("name, argument", TENSORS)
def test_a_tensors_strides_and_history_do_not_matter(name, argument):
    """The strides of a tensor do not change the answer, and one that records gradients is taken too."""
    call = CALLS[name]
    good = call.arguments[argument]
    expected = repeatable(call, good, argument)
    spread = torch.stack([good, good], dim=-1)[..., 0]  # every second element
    for value in [spread, good.mT.contiguous().mT if good.ndim >= 2 else spread]:
        torch.testing.assert_close(repeatable(call, value, argument), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if good.is_floating_point():
        repeatable(call, good.clone().requires_grad_(), argument)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name, argument", [case for case in TENSORS if CALLS[case[0]].arguments[case[1]].is_floating_point()]
)
def test_other_precisions_change_answers_only_by_rounding(name, argument, dtype):
    """Arguments in another precision are taken, and change the answer by their rounding only."""
    call = CALLS[name]
    rounded = call.arguments[argument].to(dtype)
    expected = repeatable(call, rounded.float(), argument)
    for one, other in zip(repeatable(call, rounded, argument), expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0.05, atol=0.05, equal_nan=True)


def repeatable(call: Call, value: torch.Tensor, argument: str) -> list[torch.Tensor]:
    """Float tensors of the call's result; random draws are the same each time."""
    arguments = {**call.arguments, argument: value}
    for generator in arguments.values():
        if isinstance(generator, torch.Generator):
            generator.manual_seed(0)
    return tensors_in(call.function(**arguments))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for backbone in ("vit", "convnext"):
        folders[backbone] = tmp_path_factory.mktemp(backbone)
        make_model(backbone, head="votes+influence", hidden_act="gelu").save_pretrained(folders[backbone])
    return folders


@pytest.fixture(params=["vit", "convnext"])
def checkpoint(request, checkpoints, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(checkpoints[request.param], tmp_path / "copy")


def model_class(folder: Path) -> type:
    return getattr(hf_shapley, json.loads((folder / "config.json").read_text())["architectures"][0])


@pytest.mark.parametrize("kept", [0.0, 1e-5, 1e-4, 0.01, 0.3, 0.9, 0.99999])
def test_truncated_weights_are_refused(kept, checkpoint):
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(OSError, match="weights of .* are damaged .* download or save them again"):
        model_class(checkpoint).from_pretrained(checkpoint)


@settings(max_examples=12 * EFFORT, deadline=None, derandomize=True, database=None)
@given(place=st.integers(0, 3000), byte=st.integers(0, 255), backbone=st.sampled_from(["vit", "convnext"]))
def test_a_changed_header_byte_is_refused_or_harmless(place, byte, backbone, checkpoints):
    """A changed byte in the header of the weights is refused, or leaves a model that still answers."""
    folder = checkpoints[backbone]
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
    try:
        model = model_class(folder).from_pretrained(folder)
    except (OSError, ValueError):
        return
    finally:
        path.write_bytes(data)
    assert model(draw(1, 3, 16, 24)).logits.shape == (1, 5)


def test_weights_unlike_their_configuration_are_refused(checkpoint):
    """Weights that lack what the configuration says, go beyond it or have other sizes are refused."""
    path = checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    cls = model_class(checkpoint)
    name = next(key for key in weights if key.startswith(cls.base_model_prefix) and len(weights[key]) > 1)
    changed = {
        "lacks 1 weights of the backbone": {key: value for key, value in weights.items() if key != name},
        "has, beyond its configuration, 1": {**weights, f"{cls.base_model_prefix}.layers.9.extra": torch.zeros(2)},
        "other sizes than its configuration": {**weights, name: weights[name][:1].clone()},
    }
    for message, tensors_of in changed.items():
        safetensors.torch.save_file(tensors_of, path, metadata={"format": "pt"})
        with pytest.raises((OSError, ValueError), match=message):
            cls.from_pretrained(checkpoint)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100 * EFFORT, deadline=None, derandomize=True, database=None)
@given(data=st.data(), backbone=st.sampled_from(["vit", "convnext"]))
def test_any_configuration_entry_works_or_is_refused(data, backbone, checkpoints):
    """Any value of an entry of a configuration file gives a working model or a refusal."""
    folder = checkpoints[backbone]
    text = (folder / "config.json").read_text()
    entries = json.loads(text)
    ignored = {"architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version", "model_type"}
    name = data.draw(st.sampled_from(sorted(entries.keys() - ignored)))
    value = data.draw(ANY_JSON)
    config = model_class(folder).config_class
    try:
        made = config(**{**entries, name: value})
        model = model_class(folder)._from_config(made)
        height, width = made.image_size if backbone == "vit" and not isinstance(made.image_size, int) else (16, 24)
        logits = model(torch.zeros(1, made.num_channels, height, width)).logits
    except (OSError, ValueError, TypeError):
        return
    assert logits.shape == (1, made.num_labels)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', '{"model_type": "bert"}', '{"hidden_size": "x"}']
)
def test_a_configuration_file_that_is_none_is_refused(text, checkpoint):
    cls = model_class(checkpoint)
    (checkpoint / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError, TypeError)):
        cls.from_pretrained(checkpoint)


def test_a_name_of_two_labels_is_refused():
    """A name that two labels share is refused where one is meant, and their ids are taken."""
    model = make_model("vit", num_labels=3, id2label={0: "crane", 1: "ship", 2: "crane"}, label2id={})
    pixels = draw(1, 3, 16, 24)
    with pytest.raises(ValueError, match=r"\[0, 2\] share the name 'crane': give the id"):
        model.explain(pixels, ["crane"])
    torch.testing.assert_close(model.explain(pixels, [2, "ship"]), model.explain(pixels)[:, [2, 1]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      "),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "shapley-vit", "hidden_size": 0}'),
        lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_the_command_names_a_damaged_model(damage, checkpoint, tmp_path, capsys):
    """The command says which model is damaged, and draws nothing."""
    PICTURE.save(tmp_path / "picture.png")
    damage(checkpoint)
    arguments = ["explain", str(tmp_path / "picture.png"), "--model", str(checkpoint), "-o", str(tmp_path / "out.png")]
    assert main(arguments) == 1
    assert str(checkpoint) in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


# Without "demo", which would train where the rest makes sense.
WORDS = ["explain", "push", "nonsense", "--model", "-o", "--top-k", "--label", "-1", "nan", "", "x", "\0", "--json"]


@settings(max_examples=60 * EFFORT, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*WORDS, "--results", "nowhere"]), max_size=6))
@example(["explain", "\0", "--model", "x", "-o", "x.png"])
@example(["explain", "nowhere", "--model", "nowhere", "-o", ".png"])
@example(["demo", "--seeds", "0"])
@example(["demo", "--epochs", "-1"])
@example(["demo", "--images", "0"])
def test_any_command_line_ends_in_an_exit_code(arguments):
    """Any command line that makes no sense ends in exit code 1 or 2, and never in a traceback."""
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse
        code = end.code
    assert code in (1, 2)
