"""Models of image and text: stock outputs, games of patches and of words, exact sums, the patch x word matrix."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from hf_shapley import (
    ShapleyCLIPConfig,
    ShapleyCLIPModel,
    ShapleySiglipConfig,
    ShapleySiglipModel,
    enumerate_coalitions,
    exact_shapley,
    sample_coalitions,
    word_ids_of,
)
from hf_shapley.models.heads import is_own_part

PATCHES, WORDS = 9, 4
SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Kind:
    """One architecture: classes, two texts of at most four words, and its special tokens."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    plain_config: type[PreTrainedConfig]
    plain: type[PreTrainedModel]
    texts: list[list[int]]
    text_options: dict[str, Any]


KINDS = {
    "clip": Kind(
        ShapleyCLIPConfig,
        ShapleyCLIPModel,
        CLIPConfig,
        CLIPModel,
        [[18, 3, 4, 5, 6, 19, 0], [18, 7, 8, 19, 0, 0, 0]],
        {"eos_token_id": 19, "bos_token_id": 18, "pad_token_id": 0},
    ),
    "siglip": Kind(
        ShapleySiglipConfig,
        ShapleySiglipModel,
        SiglipConfig,
        SiglipModel,
        [[3, 4, 5, 6, 1, 1, 1], [7, 8, 1, 1, 1, 1, 1]],
        {"eos_token_id": 1, "bos_token_id": 18, "pad_token_id": 1, "projection_size": 32},
    ),
}


def sizes(kind: Kind, **text_options: Any) -> dict[str, Any]:
    text = {**SIDE, "vocab_size": 20, "max_position_embeddings": 12, **kind.text_options, **text_options}
    found = {"text_config": text, "vision_config": {**SIDE, "image_size": 12, "patch_size": 4}}
    return {**found, "projection_dim": 16} if kind.plain is CLIPModel else found


@cache
def pair(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **options: Any):
    """Ours with every weight altered, and the stock model of the same weights; to be left as they are."""
    kind = KINDS[name]
    torch.manual_seed(0)
    ours = kind.model(kind.config(**sizes(kind), **options))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    stock = kind.plain(kind.plain_config(**sizes(kind)))
    names = stock.state_dict().keys()
    stock.load_state_dict({name: weight for name, weight in ours.state_dict().items() if name in names})
    for model in (ours, stock):
        model.to(dtype).eval().set_attn_implementation(attention)
    return ours, stock


def pixels(count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def texts(name: str) -> dict[str, torch.Tensor]:
    """The ids of both texts, the first with four words, the second with two; CLIP's with a mask for padding."""
    ids = torch.tensor(KINDS[name].texts)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} if name == "clip" else {"input_ids": ids}


def full_text(name: str) -> torch.Tensor:
    """The text of four words alone, (6): with its end, and in SigLIP's one place of padding."""
    return torch.tensor(KINDS[name].texts[0][:6])


def weights(num_players: int) -> torch.Tensor:
    """What Shapley values are made of: (N, 2^N), from the formula, in the order of `enumerate_coalitions`."""
    rows = []
    for player in range(num_players):
        row = []
        for coalition in enumerate_coalitions(num_players).tolist():
            size = sum(coalition) - coalition[player]
            weight = math.factorial(size) * math.factorial(num_players - 1 - size) / math.factorial(num_players)
            row.append(weight if coalition[player] else -weight)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.double)


@pytest.fixture(params=KINDS)
def name(request) -> str:
    return request.param


# The stock model on the tokens that are there, run for each coalition by itself


def unit(embeds):
    return embeds / embeds.norm(dim=-1, keepdim=True)


def image_embedding(stock, name, image, present):
    """e_S by the stock layers, on the tokens of the patches (N) that are present."""
    vision = stock.vision_model
    tokens = vision.embeddings(image[None])
    if name == "clip":
        tokens = vision.pre_layrnorm(tokens)[:, torch.cat([torch.tensor([True]), present])]
    else:
        tokens = tokens[:, present]
    for layer in vision.encoder.layers if tokens.shape[1] else []:
        tokens = layer(tokens, None)
    if name == "clip":
        return unit(stock.visual_projection(vision.post_layernorm(tokens[:, 0])))[0]
    if present.any():
        return unit(vision.head(vision.post_layernorm(tokens)))[0]
    nothing = vision.head.attention.out_proj.bias  # attention to nothing gives 0
    return unit(nothing + vision.head.mlp(vision.head.layernorm(nothing)))


def text_embedding(stock, name, ids, words, present):
    """t_T by the stock layers, on the tokens of words (T) that are present (M), and on those of no word."""
    text = stock.text_model
    kept = (words < 0) | present[words.clamp(min=0)]
    tokens = text.embeddings(ids[None])[:, kept]
    mask = None
    if name == "clip":
        mask = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=tokens.dtype).triu(1)[None, None]
    for layer in text.encoder.layers:
        tokens = layer(tokens, mask)
    tokens = text.final_layer_norm(tokens)
    if name == "clip":
        return unit(stock.text_projection(tokens[:, ids[kept].tolist().index(19)]))[0]
    return unit(text.head(tokens[:, -1]))[0]


def words_of(name: str) -> torch.Tensor:
    return torch.tensor([-1, 0, 1, 2, 3, -1] if name == "clip" else [0, 1, 2, 3, -1, -1])


@cache
def tables(name: str):
    """e_S (2^N, D) and t_T (2^M, D) of all coalitions, each by the stock layers; and the scale of the logits."""
    _, stock = pair(name, torch.double)
    with torch.no_grad():
        images = [
            image_embedding(stock, name, pixels(1, torch.double)[0], each) for each in enumerate_coalitions(PATCHES)
        ]
        sentences = [
            text_embedding(stock, name, full_text(name), words_of(name), each) for each in enumerate_coalitions(WORDS)
        ]
        return torch.stack(images), torch.stack(sentences), stock.logit_scale.exp()


# Plain checkpoints


@torch.no_grad()
def test_plain_weights_load_and_none_is_lost(name, tmp_path):
    """A stock checkpoint's weights are all taken, and all that ours lacks is the heads'; outputs stay, to the bit."""
    kind, (_, stock) = KINDS[name], pair(name)
    stock.save_pretrained(tmp_path)
    ours, info = kind.model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(key.startswith(("image_attribution_head.", "text_attribution_head.")) for key in info["missing_keys"])
    state = ours.state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in stock.state_dict().items())
    found, expected = ours.eval()(pixel_values=pixels(), **texts(name)), stock(pixel_values=pixels(), **texts(name))
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    own = ours.image_attribution_head.own_blocks[0].state_dict()
    last = ours.vision_model.encoder.layers[-1].state_dict()
    assert all(torch.equal(own[key], weight) for key, weight in last.items())
    assert not ours.attributions_trained


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_are_the_stock_models(name, attention):
    ours, stock = pair(name, attention=attention)
    given = {"pixel_values": pixels(), **texts(name), "return_loss": True}
    found, expected = ours(**given), stock(**given)
    for key in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert torch.equal(found[key], expected[key]), key
    assert "hidden_states" not in found.vision_model_output
    recorded = ours(**given, output_hidden_states=True).text_model_output.hidden_states
    assert len(recorded) == 3


@torch.no_grad()
def test_own_checkpoints_come_back_through_automodel(name, tmp_path):
    ours, _ = pair(name)
    ours.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is KINDS[name].model
    found, expected = (model.explain_pair(pixels(), **texts(name)) for model in (again, ours))
    assert torch.equal(found, expected)


def test_saved_code_answers_without_the_library(name, tmp_path):
    """In a process that knows transformers alone, the code beside the weights gives the same matrix."""
    ours, _ = pair(name)
    ours.save_pretrained(tmp_path / "model")
    given = {"pixel_values": pixels(1), "input_ids": full_text(name)[None]}
    torch.save([given, ours.explain_pair(**given)], tmp_path / "asked.pt")
    code = """
import sys, torch
from transformers import AutoModel
folder = sys.argv[1]
given, expected = torch.load(f"{folder}/asked.pt")
model = AutoModel.from_pretrained(f"{folder}/model", trust_remote_code=True).eval()
assert "hf_shapley" not in sys.modules
torch.testing.assert_close(model.explain_pair(**given), expected, atol=1e-6, rtol=0)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_plain_configuration_is_taken_as_ours(name):
    kind = KINDS[name]
    config = kind.plain_config(**sizes(kind))
    ours = kind.model(config).config
    assert ours.text_config.to_dict() == config.text_config.to_dict()
    assert type(ours) is kind.config and kind.config.of(ours, influence_layers=1).influence_layers == 1


# The structured forward


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_id_everywhere_is_the_stock_embedding(name, attention):
    """With one coalition of everyone, both sides' embeddings are the stock model's, bit for bit, padding or not."""
    ours, stock = pair(name, attention=attention)
    expected = stock(pixel_values=pixels(), **texts(name))
    found = ours.image_game(pixels())(torch.ones(2, 1, PATCHES, dtype=torch.bool))
    assert torch.equal(found[:, 0], expected.image_embeds)
    found = ours.text_game(**texts(name))(torch.ones(2, 1, WORDS, dtype=torch.bool))
    assert torch.equal(found[:, 0], expected.text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_patches_leak_exactly_nothing(name, attention, dtype):
    """Changing the pixels of absent patches leaves the embedding of those present alone, to the bit."""
    ours, _ = pair(name, dtype, attention)
    present = sample_coalitions(1, num_players=PATCHES, generator=torch.Generator().manual_seed(2))[0]
    shown = present.view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    before = pixels(1, dtype)
    after = torch.where(shown, before, torch.tensor(7.0, dtype=dtype))
    values = [ours.image_game(x[0])(torch.stack([present, ~present])) for x in (before, after)]
    assert torch.equal(values[0][0], values[1][0]) and not torch.equal(values[0][1], values[1][1])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_words_leak_exactly_nothing(name, attention, dtype):
    """Changing absent words leaves the embedding of those present alone, to the bit."""
    ours, _ = pair(name, dtype, attention)
    before, words = full_text(name), words_of(name)
    present = torch.tensor([True, False, True, False])
    absent = (words >= 0) & ~present[words.clamp(min=0)]
    after = torch.where(absent, 11, before)
    values = [ours.text_game(ids)(torch.stack([present, ~present])) for ids in (before, after)]
    assert torch.equal(values[0][0], values[1][0]) and not torch.equal(values[0][1], values[1][1])


@torch.no_grad()
def test_a_structure_equals_each_coalition_alone(name):
    """A coalition and its complement from one forward are what each gives by itself; on both sides, float64."""
    ours, _ = pair(name, torch.double)
    generator = torch.Generator().manual_seed(3)
    for game, players in ((ours.image_game(pixels(2, torch.double)), 9), (ours.text_game(**texts(name)), 4)):
        coalitions = sample_coalitions(2, 3, num_players=players, generator=generator)
        together = game(torch.stack([coalitions, ~coalitions], dim=2).flatten(1, 2))
        alone = torch.cat([game(each) for each in (coalitions[:, [0]], ~coalitions[:, [0]])], dim=1)
        torch.testing.assert_close(together[:, :2], alone, atol=1e-13, rtol=0)


@torch.no_grad()
def test_embeddings_are_those_of_dropped_tokens(name):
    """All 2^9 and 2^4 embeddings are the stock layers' on the tokens that are there; the empty ones too."""
    ours, _ = pair(name, torch.double)
    images, sentences, _ = tables(name)
    found = ours.image_game(pixels(1, torch.double)[0])(enumerate_coalitions(PATCHES))
    torch.testing.assert_close(found, images, atol=1e-12, rtol=0)
    found = ours.text_game(full_text(name))(enumerate_coalitions(WORDS))
    torch.testing.assert_close(found, sentences, atol=1e-12, rtol=0)


@torch.no_grad()
def test_all_tokens_of_a_word_go_together(name):
    """With two words of two tokens each, an absent word is the text without both of its tokens."""
    ours, stock = pair(name, torch.double)
    words = torch.tensor([-1, 0, 0, 1, 1, -1] if name == "clip" else [0, 0, 1, 1, -1, -1])
    coalitions = enumerate_coalitions(2)
    found = ours.text_game(full_text(name), None, words)(coalitions)
    expected = [text_embedding(stock, name, full_text(name), words, each) for each in coalitions]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=0)


@torch.no_grad()
def test_some_words_may_always_be_there(name):
    """Tokens in the middle of a text that are no player's are there in every coalition."""
    ours, stock = pair(name, torch.double)
    words = torch.tensor([-1, 0, -1, 1, -1, -1] if name == "clip" else [0, -1, 1, -1, -1, -1])
    coalitions = enumerate_coalitions(2)
    found = ours.text_game(full_text(name), None, words)(coalitions)
    expected = [text_embedding(stock, name, full_text(name), words, each) for each in coalitions]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=0)


@torch.no_grad()
def test_old_configurations_end_at_largest_id():
    """With `eos_token_id` 2, as old checkpoints have it, the end is the largest id: embeddings and games follow."""
    kind = KINDS["clip"]
    torch.manual_seed(0)
    ours = kind.model(kind.config(**sizes(kind, eos_token_id=2))).eval()
    stock = kind.plain(kind.plain_config(**sizes(kind, eos_token_id=2))).eval()
    stock.load_state_dict({key: ours.state_dict()[key] for key in stock.state_dict()})
    found = ours.text_game(**texts("clip"))(torch.ones(2, 1, WORDS, dtype=torch.bool))[:, 0]
    assert torch.equal(found, stock(pixel_values=pixels(), **texts("clip")).text_embeds)


@torch.no_grad()
def test_other_sizes_interpolate_as_the_stock(name):
    ours, stock = pair(name)
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(4))
    given = {"pixel_values": images, **texts(name), "interpolate_pos_encoding": True}
    assert torch.equal(ours(**given).image_embeds, stock(**given).image_embeds)
    assert ours.explain(**given).maps.shape == (2, 2, 3, 5)


# Attributions


@torch.no_grad()
@pytest.mark.parametrize("head", [{}, {"influence_own_layers": 0, "influence_layers": 1}, {"influence_layers": 2}])
@pytest.mark.parametrize("block", ["mlp", "backbone"])
def test_attributions_sum_to_what_embeddings_gain(name, head, block):
    """Phi sums to e_all - e_empty, Psi to t_all - t_empty; what a short text does not have is 0. Float64."""
    ours, _ = pair(name, torch.double, **head, influence_block=block)
    output = ours(pixel_values=pixels(2, torch.double), **texts(name))
    gains = output.image_embeds - output.image_base_embeds
    torch.testing.assert_close(output.image_attributions.sum(1), gains, atol=1e-14, rtol=0)
    gains = output.text_embeds - output.text_base_embeds
    torch.testing.assert_close(output.text_attributions.sum(1), gains, atol=1e-14, rtol=0)
    assert not output.text_attributions[1, 2:].any()
    assert output.image_attributions.std(1).max() > 1e-3 and output.text_attributions[1, :2].std(0).max() > 1e-3
    everyone, nobody = (torch.full((2, 1, WORDS), there) for there in (True, False))
    game = ours.text_game(**texts(name))
    assert torch.equal(game(nobody)[:, 0], output.text_base_embeds)
    torch.testing.assert_close(game(everyone)[:, 0], output.text_embeds, atol=1e-13, rtol=0)


@torch.no_grad()
def test_explanations_sum_to_logits(name):
    """Maps and word attributions of every image and text sum to their logit less that of nothing. Float64."""
    ours, _ = pair(name, torch.double)
    found = ours.explain(pixels(3, torch.double), **texts(name))
    assert found.maps.shape == (3, 2, 3, 3) and found.word_attributions.shape == (3, 2, WORDS)
    gains = found.logits_per_image - found.image_base_logits
    torch.testing.assert_close(found.maps.sum((2, 3)), gains, atol=1e-12, rtol=0)
    gains = found.logits_per_image - found.text_base_logits
    torch.testing.assert_close(found.word_attributions.sum(2), gains, atol=1e-12, rtol=0)
    sentences = ours(pixel_values=pixels(3, torch.double), **texts(name)).text_embeds
    base = ours.image_game(pixels(3, torch.double), sentences)(torch.zeros(3, 1, PATCHES, dtype=torch.bool))
    torch.testing.assert_close(base[0, 0], found.image_base_logits, atol=1e-12, rtol=0)


@torch.no_grad()
def test_shapley_values_are_linear_in_the_text(name):
    """Those of the scalar game through a text are s Phi t, with Phi those of the vector-valued game; so for words."""
    ours, _ = pair(name, torch.double)
    images, sentences, scale = tables(name)
    phi, psi = weights(PATCHES) @ images, weights(WORDS) @ sentences
    game = ours.image_game(pixels(1, torch.double)[0], sentences[[1, 4]])
    found = exact_shapley(game, num_players=PATCHES)
    assert found.abs().max() > 1e-2
    torch.testing.assert_close(found, scale * phi @ sentences[[1, 4]].T, atol=1e-10, rtol=0)
    game = ours.text_game(full_text(name), image_embeds=images[[1, 7]])
    found = exact_shapley(game, num_players=WORDS)
    torch.testing.assert_close(found, scale * psi @ images[[1, 7]].T, atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_matrix_is_that_of_both_enumerations(name, monkeypatch):
    """With exact Phi and Psi, `explain_pair` is the Shapley values of words in the games of patches' Shapley values.

    Those come from all 2^9 x 2^4 values v(S, T), of embeddings by the stock layers; the sum has four of them.
    """
    ours, _ = pair(name, torch.double)
    images, sentences, scale = tables(name)
    values = scale * images @ sentences.T  # (2^N, 2^M)
    expected = weights(PATCHES) @ values @ weights(WORDS).T
    phi = exact_shapley(ours.image_game(pixels(1, torch.double)[0]), num_players=PATCHES)
    psi = exact_shapley(ours.text_game(full_text(name)), num_players=WORDS)
    monkeypatch.setattr(ours, "_image_attributions", lambda *_: phi[None])
    monkeypatch.setattr(ours, "_text_attributions", lambda *_: psi[None])
    found = ours.explain_pair(pixels(1, torch.double), full_text(name)[None])[0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    total = values[1, 1] - values[0, 1] - values[1, 0] + values[0, 0]  # row 0 is empty, row 1 full
    torch.testing.assert_close(found.sum(), total, atol=1e-10, rtol=0)


@torch.no_grad()
def test_an_untrained_matrix_has_the_same_sum(name):
    """Whatever the heads say, a matrix sums to v(all, all) - v(empty, all) - v(all, empty) + v(empty, empty)."""
    ours, _ = pair(name, torch.double)
    images, sentences, scale = tables(name)
    found = ours.explain_pair(pixels(1, torch.double), full_text(name)[None])
    values = scale * images[:2] @ sentences[:2].T
    total = values[1, 1] - values[0, 1] - values[1, 0] + values[0, 0]
    torch.testing.assert_close(found.sum(), total, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_word_hears_of_later_ones(name):
    """Even where text is causal: the attribution of the first word changes with the last one, beyond its share."""
    ours, _ = pair(name, torch.double)
    before = full_text(name)
    after = torch.where(words_of(name) == WORDS - 1, 11, before)
    centred = []
    for ids in (before, after):
        psi = ours(pixel_values=pixels(1, torch.double), input_ids=ids[None]).text_attributions[0]
        centred.append(psi[0] - psi[1])
    assert (centred[0] - centred[1]).abs().max() > 1e-4


@torch.no_grad()
def test_padding_changes_no_attribution():
    """CLIP's: of a text by itself, and beside a longer one."""
    ours, _ = pair("clip", torch.double)
    both = ours(pixel_values=pixels(1, torch.double), **texts("clip")).text_attributions[1, :2]
    alone = ours(pixel_values=pixels(1, torch.double), input_ids=torch.tensor([[18, 7, 8, 19]])).text_attributions[0]
    torch.testing.assert_close(both, alone, atol=1e-13, rtol=0)


@torch.no_grad()
def test_coalitions_of_a_forward_are_the_games(name):
    ours, _ = pair(name, torch.double)
    generator = torch.Generator().manual_seed(5)
    patches, words = (sample_coalitions(2, 2, num_players=count, generator=generator) for count in (9, 4))
    output = ours(pixel_values=pixels(2, torch.double), **texts(name), image_coalitions=patches, text_coalitions=words)
    for found, game, coalitions in (
        (output.image_coalition_embeds, ours.image_game(pixels(2, torch.double)), patches),
        (output.text_coalition_embeds, ours.text_game(**texts(name)), words),
    ):
        expected = game(torch.stack([coalitions, ~coalitions], dim=2).flatten(1, 2)).unflatten(1, (2, 2))
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


def test_frozen_embeddings_leave_the_heads_to_learn(name):
    kind = KINDS[name]
    model = kind.model(kind.config(**sizes(kind)))
    model.freeze_embeddings()
    output = model(pixel_values=pixels(), **texts(name))
    (output.image_attributions[:, 0].sum() + output.text_attributions[:, 0].sum()).backward()
    learning = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert learning == {
        "image_attribution_head.correction.weight",
        "text_attribution_head.correction.weight",
    }  # those that start at 0


def test_embeddings_learn_through_attributions_when_asked(name):
    kind = KINDS[name]
    for asked in (False, True):
        model = kind.model(kind.config(**sizes(kind), attribution_gradient=asked))
        output = model(pixel_values=pixels(), **texts(name))
        (output.image_attributions[:, 0].sum() + output.text_attributions[:, 0].sum()).backward()
        stock = [weight.grad for key, weight in model.named_parameters() if not is_own_part(key)]
        assert any(grad is not None and bool(grad.any()) for grad in stock) == asked


# Words


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "red", "cat", "##s", "."])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def test_words_are_what_spaces_part():
    """From offsets a word has all between two spaces; without them it is what the tokenizer takes for one."""
    made = tokenizer()
    options = {"padding": True, "return_tensors": "pt"}
    by_spaces = word_ids_of(made(["red cats.", "cat"], return_offsets_mapping=True, **options))
    assert by_spaces.tolist() == [[-1, 0, 1, 1, 1, -1], [-1, 0, -1, -1, -1, -1]]
    by_tokenizer = word_ids_of(made(["red cats.", "cat"], **options))
    assert by_tokenizer.tolist() == [[-1, 0, 1, 1, 2, -1], [-1, 0, -1, -1, -1, -1]]
    with pytest.raises(TypeError, match="fast tokenizer"):
        word_ids_of({"input_ids": [[1, 2]]})


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.tensor([[18, 19]])}, "Text 0 has no words"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.full((1, 13), 19)}, "at most 12 tokens.*got 13.*truncation=True"),
        ({"input_ids": torch.tensor([[18, 3, 4]])}, "`eos_token_id` = 19"),
        ({"input_ids": torch.tensor([18, 3, 19])}, r"\(texts, tokens\)"),
        ({"word_ids": torch.tensor([[-1, 0, 1, -1, -1]])}, "shape of `input_ids`"),
        ({"word_ids": torch.tensor([[-1, 0, 2, -1]])}, r"without a gap.*got \[0, 2\] in text 0"),
        ({"word_ids": torch.tensor([[-1, 0, 1, 2]])}, r"words at places \[3\] of text 0"),
        ({"word_ids": torch.full((1, 4), -1)}, "Text 0 has no words"),
        ({"attention_mask": torch.ones(1, 5)}, "`attention_mask`.*shape of `input_ids`"),
        ({"pixel_values": torch.zeros(1, 3, 12, 16)}, "12 x 12 pixels, got 12 x 16"),
        ({"pixel_values": torch.zeros(1, 1, 12, 12)}, "`pixel_values`.*image processor"),
        ({"image_coalitions": torch.ones(1, 1, 8, dtype=torch.bool)}, "`image_coalitions`.*9 players"),
        ({"image_coalitions": torch.ones(2, 1, 9, dtype=torch.bool)}, "`image_coalitions`"),
        ({"text_coalitions": torch.ones(1, 1, 2)}, "`text_coalitions`"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    """Each refusal says what was wanted, what came and what helps."""
    ours, _ = pair("clip")
    fine = {"input_ids": torch.tensor([[18, 3, 4, 19]]), "pixel_values": pixels(1)}
    ours(**fine)
    with pytest.raises(ValueError, match=message):
        ours(**{**fine, **given})


def test_games_refuse_what_does_not_fit():
    ours, _ = pair("clip")
    with pytest.raises(ValueError, match=r"shape \('coalitions', 9\)"):
        ours.image_game(pixels(1)[0])(torch.ones(1, 1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="`text_embeds`.*16"):
        ours.image_game(pixels(1)[0], torch.zeros(2, 15))
    with pytest.raises(ValueError, match="as many texts as images, got 2 images and 1 texts"):
        ours.explain_pair(pixels(2), torch.tensor([[18, 3, 19]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"influence_own_layers": 0}, "Without a head"),
        ({"influence_own_layers": 3}, "at most 2, the layers"),
        ({"influence_block": "convolution"}, "`influence_block`"),
        ({"influence_layers": -1}, "`influence_layers`"),
    ],
)
def test_impossible_heads_are_refused(name, options, message):
    kind = KINDS[name]
    with pytest.raises(ValueError, match=message):
        kind.config(**sizes(kind), **options)


@torch.no_grad()
def test_a_heads_options_go_with_a_checkpoint(name, tmp_path):
    """Options beside a plain checkpoint, with its configuration or without; those that make no sense are refused."""
    kind, (_, stock) = KINDS[name], pair(name)
    stock.save_pretrained(tmp_path)
    for given in ({}, {"config": stock.config}):
        ours = kind.model.from_pretrained(tmp_path, influence_layers=1, influence_own_layers=2, **given)
        assert len(ours.text_attribution_head.own_blocks) == 2 and ours.config.influence_layers == 1
        with pytest.raises(ValueError, match="at most 2, the layers"):
            kind.model.from_pretrained(tmp_path, influence_own_layers=3, **given)
    unmoved = stock(pixel_values=pixels(), **texts(name)).image_embeds
    assert torch.equal(ours.eval()(pixel_values=pixels(), **texts(name)).image_embeds, unmoved)


def test_other_and_damaged_checkpoints_are_refused(name, tmp_path):
    kind, (_, stock) = KINDS[name], pair(name)
    other = next(each for key, each in KINDS.items() if key != name)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"reads checkpoints of type {other.plain_config.model_type!r}")):
        other.model.from_pretrained(tmp_path)
    state = {key: weight for key, weight in stock.state_dict().items() if "layers.1.mlp.fc1" not in key}
    stock.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(OSError, match="lacks 4 weights of the stock model"):
        kind.model.from_pretrained(tmp_path)


def test_an_attention_that_cannot_hide_is_refused(name, monkeypatch):
    ours, _ = pair(name)
    monkeypatch.setattr(ours.vision_model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="cannot hide players"):
        ours.image_game(pixels())(torch.ones(2, 1, PATCHES, dtype=torch.bool))
