"""What must hold for every native backbone: plain weights, the game on dropped players, training and the Hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import HEADS
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from hf_shapley import (
    AutoShapleyForImageClassification,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    coalitions_to_ids,
    exact_shapley,
    export_program,
    sample_coalitions,
)
from hf_shapley.backbones import FAMILIES

PLAYERS = 9  # 3 x 3 patches of 4 x 4 pixels


def rest_of_vit(stock, tokens, kept=None):
    """Logits of tokens that enter the first layer."""
    for layer in stock.base_model.layers:
        tokens = layer(tokens)
    return stock.classifier(stock.base_model.layernorm(tokens)[:, 0])


def rest_of_distilled_deit(stock, tokens, kept=None):
    for layer in stock.deit.layers:
        tokens = layer(tokens)
    tokens = stock.deit.layernorm(tokens)
    return (stock.cls_classifier(tokens[:, 0]) + stock.distillation_classifier(tokens[:, 1])) / 2


def rest_of_dinov2(stock, tokens, kept=None):
    for layer in stock.base_model.encoder.layer:
        tokens = layer(tokens)
    tokens = stock.base_model.layernorm(tokens)
    cells = tokens[:, 1 + getattr(stock.config, "num_register_tokens", 0) :]
    mean = cells.mean(1) if cells.shape[1] else torch.zeros_like(tokens[:, 0])
    return stock.classifier(torch.cat([tokens[:, 0], mean], dim=1))


def rest_of_ijepa(stock, tokens, kept=None):
    if not tokens.shape[1]:
        return stock.classifier(torch.zeros(1, 32))  # the mean of nothing
    for layer in stock.ijepa.layers:
        tokens = layer(tokens)
    return stock.classifier(stock.ijepa.layernorm(tokens).mean(1))


def rest_of_beit(stock, tokens, kept=slice(None)):
    """With biases of the full grid, 3 x 3, restricted to the kept tokens before they are added."""

    def bias(of):
        return 0 if of is None else of((3, 3))[:, :, kept][:, :, :, kept]

    for layer in stock.beit.layers:
        scores = bias(stock.beit.shared_position_bias) + bias(layer.relative_position_bias)
        attended = layer.attention(layer.layernorm_before(tokens), scores + torch.zeros(1, 1, 1, 1))[0]
        tokens = tokens + layer.lambda_1 * attended
        tokens = tokens + layer.lambda_2 * layer.mlp(layer.layernorm_after(tokens))
    tokens = stock.beit.layernorm(tokens)
    if stock.config.use_mean_pooling and tokens.shape[1] == 1:
        return stock.classifier(stock.beit.pooler.layernorm(torch.zeros(1, 32)))  # the mean of nothing
    return stock.classifier(stock.beit.pooler(tokens))


def rest_of_data2vec(stock, tokens, kept):
    """As of BEiT, whose parts have other names here."""
    encoder = stock.data2vec_vision.encoder

    def bias(of):
        return 0 if of is None else of((3, 3))[:, :, kept][:, :, :, kept]

    for layer in encoder.layer:
        attention, normed = layer.attention.attention, layer.layernorm_before(tokens)
        heads = [
            part(normed).unflatten(-1, (4, 8)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        ]
        scores = heads[0] @ heads[1].mT / 8**0.5 + bias(getattr(encoder, "relative_position_bias", None))
        scores = scores + bias(getattr(attention, "relative_position_bias", None))
        attended = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        tokens = tokens + layer.lambda_1 * layer.attention.output.dense(attended)
        hidden = layer.intermediate(layer.layernorm_after(tokens))
        tokens = tokens + layer.lambda_2 * layer.output.dense(hidden)
    tokens = stock.data2vec_vision.layernorm(tokens)
    if stock.config.use_mean_pooling and tokens.shape[1] == 1:
        return stock.classifier(stock.data2vec_vision.pooler.layernorm(torch.zeros(1, 32)))
    return stock.classifier(stock.data2vec_vision.pooler(tokens))


def rest_of_tower(stock, tokens, kept=None):
    tower = stock.vision_model
    if not tokens.shape[1]:
        return stock.classifier(torch.zeros(1, 32))  # the mean of nothing
    for layer in tower.encoder.layers:
        tokens = layer(tokens, None)
    cells = tower.post_layernorm(tokens) if stock.config.model_type == "siglip" else tokens[:, 1:]
    return stock.classifier(cells.mean(1) if cells.shape[1] else torch.zeros(1, 32))


def enlarged(present, size):
    """Which cells of a feature map are there: bool (9) -> (H, W), of the players' grid 3 x 3."""
    rows, columns = (torch.arange(length) * 3 // length for length in size)
    return present.view(3, 3)[rows][:, columns]


def cells_alone(stock, pixel_values, present):
    """Absent cells are 0 before every convolution of space, and no part of a norm over space or of the mean."""
    features = stock.base_model.embeddings(pixel_values)
    for stage in stock.base_model.encoder.stages:
        for layer in stage.downsampling_layer:
            features = layer(features)
        there = enlarged(present, features.shape[-2:])
        for layer in stage.layers:
            cells = layer.dwconv(features * there).permute(0, 2, 3, 1)[:, there]  # (1, members, C)
            cells = layer.act(layer.pwconv1(layer.layernorm(cells)))
            cells = layer.grn(cells[:, None])[:, 0] if hasattr(layer, "grn") else cells
            added = torch.zeros_like(features)
            added[:, :, there] = (getattr(layer, "layer_scale_parameter", 1) * layer.pwconv2(cells)).transpose(1, 2)
            features = features + added
    mean = features[:, :, there].sum(-1) / there.sum().clamp(min=1)
    return stock.classifier(stock.base_model.layernorm(mean))


def windows_alone(stock, pixel_values, present):
    """The stock layers, each told window by window which of its cells may not be seen."""
    state, size = stock.base_model.embeddings(pixel_values)
    for stage in stock.base_model.encoder.layers:
        for layer in stage.blocks:
            hiding = hiding_from_windows(layer, layer.get_attn_mask, enlarged(present, size))
            with patch.object(layer, "get_attn_mask", hiding):
                state = layer(state, size)[0]
        if stage.downsample is not None:
            state, size = stage.downsample(state, size), (size[0] // 2, size[1] // 2)
    cells = stock.base_model.layernorm(state)[:, present]
    return stock.classifier(cells.sum(1) / max(1, cells.shape[1]))


def hiding_from_windows(layer, stock_mask, there):
    """The stock layer's mask of one image, with -inf where a key is an absent cell, and not the query's own."""

    def mask_of(height, width, dtype, device):
        side = layer.window_size
        corners = [(row, column) for row in range(0, height, side) for column in range(0, width, side)]
        mask = torch.zeros(len(corners), side * side, side * side)
        for window, (top, left) in enumerate(corners):
            for key in range(side * side):
                row = (top + key // side + layer.shift_size) % height
                column = (left + key % side + layer.shift_size) % width
                if row < there.shape[0] and column < there.shape[1] and not there[row, column]:
                    mask[window, :, key] = float("-inf")
                    mask[window, key, key] = 0
        stock = stock_mask(height, width, dtype, device)
        return mask if stock is None else mask + stock

    return mask_of


@dataclass(frozen=True)
class Case:
    """A stock classifier, and what of it is known from outside this package.

    Args:
        family: key of the table of backbones.
        prefix: of tokens, the number of its prefix tokens.
        rest: of tokens, the stock model, those that enter its first layer, which of the image's they are -> logits.
        alone: otherwise the stock model, pixels (1, 3, 12, 12) and which players are present (9) -> logits.
        options: of its configuration.
        plain: its class, where it is not the table's.
        without_part: pattern of weights that classification does not read.
        non_square: whether the stock configuration may have images that are not square.
    """

    family: str
    prefix: int = 0
    rest: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    alone: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plain: type[PreTrainedModel] | None = None
    without_part: str = r"$^"
    non_square: bool = True
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def plain_model(self) -> type[PreTrainedModel]:
        return self.plain or FAMILIES[self.family].plain_model


READ_BY_CLS = {
    "use_mean_pooling": False,
    "use_absolute_position_embeddings": True,
    "use_shared_relative_position_bias": True,
    "use_relative_position_bias": True,
    "drop_path_rate": 0.0,
}
# Two stages, so that a player of 4 x 4 pixels has 2 x 2 cells in the first.
CELLS = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "patch_size": 2}
# Windows of 2 cells, shifted by 1, tile the first stage's 6 x 6 and not the second's 3 x 3, which is padded.
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2, "drop_path_rate": 0.0}
CASES = {
    "vit": Case("vit", 1, rest_of_vit),
    "deit": Case("deit", 2, rest_of_vit),
    "deit, distilled": Case(
        "deit",
        2,
        rest_of_distilled_deit,
        options={"distilled": True},
        plain=DeiTForImageClassificationWithTeacher,
    ),
    "vit_msn": Case("vit_msn", 1, rest_of_vit),
    "ijepa": Case("ijepa", 0, rest_of_ijepa),
    "dinov2": Case("dinov2", 1, rest_of_dinov2, without_part="mask_token", non_square=False),
    "dinov2, gated": Case(
        "dinov2",
        1,
        rest_of_dinov2,
        options={"use_swiglu_ffn": True, "use_mask_token": False},
        non_square=False,
    ),
    "dinov2_with_registers": Case(
        "dinov2_with_registers",
        4,
        rest_of_dinov2,
        options={"num_register_tokens": 3},
        without_part="mask_token",
        non_square=False,
    ),
    "beit": Case("beit", 1, rest_of_beit, options={"use_relative_position_bias": True, "drop_path_rate": 0.0}),
    "beit, CLS": Case("beit", 1, rest_of_beit, options=READ_BY_CLS, non_square=False),
    "data2vec-vision": Case(
        "data2vec-vision", 1, rest_of_data2vec, options={"use_relative_position_bias": True, "drop_path_rate": 0.0}
    ),
    "clip": Case("clip", 1, rest_of_tower, without_part="vision_model.post_layernorm", non_square=False),
    "metaclip_2": Case("metaclip_2", 1, rest_of_tower, without_part="vision_model.post_layernorm", non_square=False),
    "siglip": Case("siglip", 0, rest_of_tower, without_part="vision_model.head", non_square=False),
    "data2vec-vision, CLS": Case("data2vec-vision", 1, rest_of_data2vec, options=READ_BY_CLS, non_square=False),
    "convnext": Case("convnext", alone=cells_alone, options=CELLS, attentions=("eager",)),
    "convnextv2": Case("convnextv2", alone=cells_alone, options=CELLS, attentions=("eager",)),
    "swin": Case("swin", alone=windows_alone, options=WINDOWS),
    "swin, wide windows": Case(
        "swin",
        alone=windows_alone,
        options={**WINDOWS, "window_size": 3, "use_absolute_embeddings": True},
        non_square=False,
    ),
    "swinv2": Case("swinv2", alone=windows_alone, options=WINDOWS, attentions=("eager",)),
    "swinv2, wide windows": Case(
        "swinv2",
        alone=windows_alone,
        options={**WINDOWS, "window_size": 4, "pretrained_window_sizes": [3, 2]},
        attentions=("eager",),
        non_square=False,
    ),
}


def altered(model):
    """The model in evaluation mode with every weight altered, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sizes_of(case: Case, image_size: int | tuple[int, int] = 12, **options: Any) -> dict[str, Any]:
    return {**FAMILIES[case.family].small(32, 2, image_size, 4), "num_labels": 5, **case.options, **options}


def make_stock(case: Case):
    torch.manual_seed(0)
    config = FAMILIES[case.family].plain_config(**sizes_of(case))
    config.architectures = [case.plain_model.__name__]
    return altered(case.plain_model(config))


def make_ours(case: Case, head: str = "recommended", **options):
    torch.manual_seed(0)
    family = FAMILIES[case.family]
    return altered(family.model(family.config(**HEADS[head], **sizes_of(case, **options))))


@cache
def pair(name: str, head: str = "recommended", **options):
    """Ours, and the stock model of the same weights under the same names; to be left as they are."""
    case = CASES[name]
    ours = make_ours(case, head, **options)
    stock = case.plain_model(FAMILIES[case.family].plain_config(**sizes_of(case, **options)))
    names = stock.state_dict().keys()
    stock.load_state_dict({name: weight for name, weight in ours.state_dict().items() if name in names})
    return ours, stock.eval()


def pixels(batch: int = 2, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def draw(batch: int = 2, structures: int = 1, num_players: int = PLAYERS) -> torch.Tensor:
    return sample_coalitions(batch, structures, num_players=num_players, generator=torch.Generator().manual_seed(2))


def as_tokens(state: torch.Tensor) -> torch.Tensor:
    """A stock hidden state, (B, T, D) or (B, D, h, w), as tokens (B, T, D)."""
    return state if state.ndim == 3 else state.flatten(2).transpose(1, 2)


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture
def case(name) -> Case:
    return CASES[name]


def test_every_family_has_a_case():
    assert set(FAMILIES) == {case.family for case in CASES.values()}


# Plain checkpoints


def test_plain_weights_load_and_none_is_lost(case, tmp_path):
    """A stock checkpoint's weights are all taken, and all that ours lacks is the attribution head's; logits stay."""
    stock = make_stock(case)
    stock.save_pretrained(tmp_path)
    ours, info = AutoShapleyForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(ours) is FAMILIES[case.family].model
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(key.startswith("attribution_head.") for key in info["missing_keys"])
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in stock.state_dict().items())
    torch.testing.assert_close(ours.eval()(pixels()).logits, stock(pixels()).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_recorded_states_are_the_stock_models(name):
    """Hidden states are the stock model's bit for bit, and logits those of the forward that records nothing."""
    ours, stock = pair(name)
    found, expected = (model(pixels(), output_hidden_states=True) for model in (ours, stock))
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.logits, ours(pixels()).logits, atol=1e-6, rtol=1e-5)


def test_a_plain_configuration_is_taken_as_ours(case):
    """With every entry of it, and the labels' names."""
    config = make_stock(case).config
    ours = FAMILIES[case.family].model(config).config
    entries, kept = config.to_dict(), ours.to_dict()
    different = {name for name in entries if entries[name] != kept.get(name)}
    assert different <= {"model_type", "architectures", "transformers_version"}


# The structured forward


@torch.no_grad()
@pytest.mark.parametrize("head", ["pooled", "pooled, own layer, adapters"])
def test_one_id_everywhere_is_the_stock_forward(name, head):
    """With one id everywhere the value is the stock model's logits, whatever the head; also without any id."""
    ours, stock = pair(name, head)
    ids = torch.zeros(2, 1, PLAYERS, dtype=torch.long)
    output, expected = ours(pixels(), coalition_ids=ids, sums_only=True), stock(pixels()).logits
    values = ours.base_values + output.coalition_gains[:, 0, 0]
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.logits, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_one_id_leaves_every_token_alone(name, case):
    """With one id everywhere, each player's token after the last layer is the stock model's, bit for bit."""
    ours, stock = pair(name, "votes")
    embeddings, states = ours.embed(pixels()), stock(pixels(), output_hidden_states=True).hidden_states
    assert torch.equal(ours.tokens(embeddings, None), as_tokens(states[0]))
    state, rule = ours.enter(embeddings, (3, 3), torch.ones(2, 1, 1, PLAYERS, dtype=torch.bool))
    for block in ours.blocks():
        state = block(state, rule)
    assert torch.equal(ours.tokens(state, rule), as_tokens(states[-1]))


@torch.no_grad()
@pytest.mark.parametrize("head", ["votes", "pooled", "pooled, own layer, adapters", "recommended"])
def test_a_structure_equals_each_coalition_alone(name, head):
    ours, _ = pair(name, head)
    ids = torch.randint(0, 3, (2, 1, PLAYERS), generator=torch.Generator().manual_seed(0))
    together = ours(pixels(), coalition_ids=ids).coalition_votes[:, 0]
    for coalition in range(3):
        members = ids[:, 0] == coalition
        alone = ours.coalition_values(pixels(), members.unsqueeze(1))[:, 0]
        expected = ours.base_values + (together * members.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "head, attention, precision",
    [
        ("recommended", "sdpa", "float32"),
        ("recommended", "sdpa", "bfloat16"),
        ("recommended", "sdpa", "autocast"),
        ("votes", "eager", "float32"),
    ],
)
def test_hidden_pixels_leak_exactly_nothing(case, head, attention, precision):
    """Changing the pixels of absent players leaves the value of those that are present alone, to the bit."""
    attention = attention if attention in case.attentions else "eager"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    ours = make_ours(case, head).to(dtype)
    ours.set_attn_implementation(attention)
    present = draw(1)[0, 0]
    shown = present.view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    before = pixels(1).to(dtype)
    after = torch.where(shown, before, torch.tensor(7.0, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        values = [ours.coalition_values(x, torch.stack([present, ~present])[None]) for x in (before, after)]
    assert torch.equal(values[0][:, 0], values[1][:, 0])
    assert not torch.equal(values[0][:, 1], values[1][:, 1])


@torch.no_grad()
def test_exact_values_are_those_of_dropped_players(name, case):
    """Shapley values of all 2^9 coalitions, each run by the stock layers on the tokens of its members alone."""
    ours, stock = pair(name)
    tokens = ours.embed(pixels(1))

    def stock_game(coalitions):
        if case.alone is not None:
            return torch.cat([case.alone(stock, pixels(1), each) for each in coalitions]).double()
        prefix = torch.ones(len(coalitions), case.prefix, dtype=torch.bool)
        kept = torch.cat([prefix, coalitions], dim=1)
        return torch.cat([case.rest(stock, tokens[:, each], each) for each in kept]).double()

    def our_game(coalitions):
        return ours.coalition_values(pixels(1), coalitions[None])[0].double()

    expected = exact_shapley(stock_game, num_players=PLAYERS)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(exact_shapley(our_game, num_players=PLAYERS), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dropped_paths_are_the_stock_models(name):
    """In training, layers drop what they add image by image, in the same draws as the stock model."""
    if not hasattr(pair(name)[0].config, "drop_path_rate"):
        return
    ours, stock = pair(name, drop_path_rate=0.5)
    logits = []
    for model in (ours, stock):
        torch.manual_seed(0)
        logits.append(model.train()(pixels(8)).logits)
        model.eval()
    torch.testing.assert_close(*logits, atol=2e-6, rtol=1e-5)
    kept = stock(pixels(8)).logits
    assert (logits[1] - kept).abs().max() > 1e-2


@torch.no_grad()
def test_attributions_sum_to_logits_less_base_values(name):
    ours, _ = pair(name, "pooled")
    output = ours(pixels())
    torch.testing.assert_close(output.attributions.sum(1), output.logits - output.base_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.base_values, ours.base_values, atol=1e-6, rtol=1e-5)


# Other sizes


@torch.no_grad()
def test_other_sizes_are_the_stock_models(name):
    """Images of 12 x 20 pixels, 15 players, where positions are interpolated as the stock model does."""
    ours, stock = pair(name)
    takes_any_size = getattr(ours, "takes_any_size", True)
    images, options = pixels(2, 12, 20), {} if takes_any_size else {"interpolate_pos_encoding": True}
    output = ours(images, interpolate_pos_encoding=True)
    torch.testing.assert_close(output.logits, stock(images, **options).logits, atol=2e-6, rtol=1e-5)
    assert ours.explain(images, interpolate_pos_encoding=True).shape == (2, 5, 3, 5)
    everyone = torch.ones(2, 1, 15, dtype=torch.bool)
    value = ours.coalition_values(images, everyone, interpolate_pos_encoding=True)[:, 0]
    torch.testing.assert_close(value, output.logits, atol=1e-5, rtol=1e-5)
    if not takes_any_size:
        with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
            ours(images)


@torch.no_grad()
def test_configurations_may_be_not_square(name, case):
    if not case.non_square:
        return
    ours, stock = pair(name, image_size=(8, 16))
    images = pixels(2, 8, 16)
    torch.testing.assert_close(ours(images).logits, stock(images).logits, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_small_images_leave_no_trace_in_windows():
    """The stock Swin no longer shifts windows after an image that one covers; ours answers as a new stock one."""
    ours, stock = pair("swin, wide windows", "recommended", use_absolute_embeddings=False)
    small, large = pixels(), pixels(2, 24, 24)
    expected = stock(large).logits
    ours(small, output_hidden_states=True)
    torch.testing.assert_close(ours(large).logits, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(ours(large, output_hidden_states=True).logits, expected, atol=2e-6, rtol=1e-5)
    stock(small)
    assert (stock(large).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_maps_smaller_than_windows_are_refused():
    """The stock Swin fails there, in the middle of its forward."""
    ours, stock = pair("swin, wide windows", "recommended", use_absolute_embeddings=False)
    with pytest.raises(RuntimeError, match="must match"):
        stock(pixels(1, 8, 12))
    with pytest.raises(ValueError, match="at least 3 players on each side"):
        ours(pixels(1, 8, 12))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_heads": [3, 4]}, "width 16 of stage 1.*`num_heads`, got 3"),
        ({"num_heads": [2]}, "must have 2 entries"),
        ({"window_size": 0}, "`window_size`"),
        ({"embed_dim": 0}, "`embed_dim`"),
    ],
)
def test_shapes_of_no_swin_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make_ours(CASES["swin"], **options)


# Training


def joint_loss(model) -> torch.Tensor:
    """Something that every output and parameter takes part in."""
    inputs = {"coalition_ids": coalitions_to_ids(draw()), "labels": torch.tensor([0, 3]), "num_coalitions": 2}
    output = model(pixels(), sums_only=True, **inputs)
    error = output.coalition_gains - output.coalition_attributions
    return output.loss + error.square().sum() + output.readout_errors.square().sum()


def gradients(model, loss=joint_loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_gradient_checkpointing_leaves_gradients_alone(case):
    model = make_ours(case, "pooled, own layer, adapters").train()
    expected = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the first name is that of transformers 5.23
    calls = []
    next(part for part in model.blocks()[0].modules() if isinstance(part, nn.LayerNorm)).register_forward_hook(
        lambda *_: calls.append("norm")
    )
    found = gradients(model)
    assert len(calls) == 4  # in two forwards, and each once more in the backward pass
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_empty_coalitions_leave_gradients_finite(case):
    """A structure may have a coalition of no player at all, over which norms and means are 0."""
    model = make_ours(case)
    ids = torch.zeros(2, 1, PLAYERS, dtype=torch.long)
    found = gradients(model, lambda m: m(pixels(), coalition_ids=ids, num_coalitions=2).coalition_votes.sum())
    assert found and all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_it_compiles_without_graph_breaks(case):
    """The forward under structures, which holds the ordinary one."""
    torch.compiler.reset()
    model = make_ours(case)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    options = {"coalition_ids": coalitions_to_ids(draw()), "num_coalitions": 2}
    with torch.no_grad():
        found, expected = compiled(pixels(), **options), model(pixels(), **options)
    for name in ("logits", "attributions", "coalition_votes"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


class Seen(TrainerCallback):
    """Notes which parameters have a gradient."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.without = {name for name, weight in model.named_parameters() if weight.grad is None}


def test_a_training_step_reaches_every_parameter(case, tmp_path):
    """Of what classification or the attribution head read; the loss is finite."""
    model = make_ours(case)
    rows = [{"pixel_values": image, "labels": label} for label, image in enumerate(pixels(4))]
    args = ShapleyTrainingArguments(
        output_dir=str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        save_strategy="no", max_steps=1, per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    trainer = ShapleyTrainer(model, args, train_dataset=rows, callbacks=[seen := Seen()])
    trainer.remove_callback(PrinterCallback)
    assert torch.tensor(trainer.train().training_loss).isfinite()
    assert {name for name in seen.without if not re.search(case.without_part, name)} == set()


def test_stock_layers_may_follow_in_the_head(case):
    """As blocks of the influence head, over the patches alone; all of their weights learn."""
    blocks = {"influence_own_layers": 0, "influence_layers": 1, "influence_block": "backbone"}
    model = make_ours(case, **blocks)
    found = gradients(model, lambda model: model(pixels()).attributions.square().sum())
    names = {name for name, _ in model.named_parameters() if name.startswith("attribution_head.influence_blocks.")}
    assert names and names <= found.keys()


# Saving and exporting


@torch.no_grad()
def test_it_exports_for_any_batch_size(case):
    model = make_ours(case)
    program = export_program(model, image_size=12).module()
    for batch in (1, 3):
        logits, maps = program(pixels(batch))
        torch.testing.assert_close(logits, model(pixels(batch)).logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(maps, model.explain(pixels(batch)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_saved_model_comes_back_the_same(case, tmp_path):
    """Through the Auto class and its own, in a folder that holds all files which the model's own imports."""
    model = make_ours(case)
    model.save_pretrained(tmp_path)
    for cls in (AutoModelForImageClassification, AutoShapleyForImageClassification):
        loaded = cls.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(loaded(pixels()).attributions, model(pixels()).attributions)
    features = AutoModel.from_pretrained(tmp_path).eval()(pixels()).last_hidden_state
    assert torch.equal(features, model.stock(pixels()).last_hidden_state)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")}
    named = {reference.split(".")[0] for reference in model.config.auto_map.values()}
    imported = {found for text in sources.values() for found in re.findall(r"^\s*from \.(\w+) import", text, re.M)}
    assert type(model).__module__.rpartition(".")[2] in named
    assert named | imported <= sources.keys()
