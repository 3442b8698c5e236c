"""What must hold for both backbones: the structured forward, the game, loading and saving, and clear refusals."""

import copy
from collections import Counter
from threading import Event, Thread, current_thread

import pytest
import torch
from conftest import CONVNEXT, HEADS, VIT, make_model
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_shapley import (
    ShapleyConvNextConfig,
    ShapleyConvNextForImageClassification,
    ShapleyViTConfig,
    ShapleyViTForImageClassification,
    coalitions_to_ids,
    ids_to_coalitions,
    sample_coalitions,
    upsample_attributions,
)
from hf_shapley.models.coalitions import sum_over_coalitions
from hf_shapley.models.loading import UNTRAINED, _check_copies
from hf_shapley.models.modeling_shapley_convnext import CellRule, ShapleyConvNextLayer
from hf_shapley.models.speed import activated
from hf_shapley.models.token_backbone import TokenRule

PLAYERS = 24
SHAPLEY = {"vit": ShapleyViTForImageClassification, "convnext": ShapleyConvNextForImageClassification}


def draw(batch: int = 3, structures: int = 2) -> torch.Tensor:
    return sample_coalitions(batch, structures, num_players=PLAYERS, generator=torch.Generator().manual_seed(2))


def plain_model(backbone: str, seed: int = 0, **options):
    """A stock classifier whose every weight was altered."""
    torch.manual_seed(seed)
    if backbone == "vit":
        model = ViTForImageClassification(ViTConfig(**{**VIT, **options}))
    else:
        model = ConvNextForImageClassification(ConvNextConfig(**{**CONVNEXT, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stock_tokens(model, pixel_values):
    """Patch tokens (B, N, D) from the stock backbone's own forward."""
    if hasattr(model, "vit"):
        return model.vit(pixel_values).last_hidden_state[:, 1:]
    features = model.convnext(pixel_values).last_hidden_state
    return model.convnext.layernorm(features.flatten(2).transpose(1, 2))


def stock_voters(model, pixel_values):
    """What votes for each patch (B, N, D), from the stock backbone's own forward."""
    if not model.attribution_head.pooled:
        return stock_tokens(model, pixel_values)
    if hasattr(model, "vit"):
        pooled = model.vit(pixel_values).last_hidden_state[:, 0]
    else:
        pooled = model.convnext(pixel_values).pooler_output
    return (pooled - model.empty_token()).unsqueeze(1).expand(-1, PLAYERS, -1)


def interrupt_once(module, call):
    """Let another thread make a whole call while this one is at a module, the first time that it is."""
    calls = [call]

    def interrupt(*_):
        if calls:
            thread = Thread(target=calls.pop())
            thread.start()
            thread.join()

    module.register_forward_pre_hook(interrupt)


def hide(pixel_values, coalition, value):
    """Replace the pixels of absent players of 4 x 4 pixels."""
    pixels = coalition.view(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return torch.where(pixels, pixel_values, value)


# The sum


def test_attributions_sum_to_logits_less_base_values(model, pixel_values):
    output = model(pixel_values)
    torch.testing.assert_close(output.attributions.sum(1), output.logits - output.base_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.base_values, model.base_values, atol=1e-6, rtol=0)
    if not model.attribution_head.pooled:
        assert torch.equal(output.base_values, model.classifier.bias)


def test_the_influence_term_changes_attributions_but_not_logits(backbone, pixel_values):
    model = make_model(backbone, head="votes+influence")
    before = model(pixel_values)
    nn.init.normal_(model.attribution_head.correction.weight)
    after = model(pixel_values)
    assert torch.equal(before.logits, after.logits)
    assert (before.attributions - after.attributions).abs().max() > 1e-2


# The structured forward


def test_the_ordinary_forward_is_the_stock_backbones(model, pixel_values):
    votes = stock_voters(model, pixel_values)
    votes = nn.functional.linear(votes, model.classifier.weight) / PLAYERS
    expected = model.base_values + votes.sum(1)
    # What patches vote is summed before it is mapped to labels, which rounds differently.
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-6, rtol=1e-6)


def test_one_id_everywhere_is_the_ordinary_forward(model, pixel_values):
    output = model(pixel_values, coalition_ids=torch.zeros(3, 1, PLAYERS, dtype=torch.long))
    votes = nn.functional.linear(stock_voters(model, pixel_values), model.classifier.weight) / PLAYERS
    # A mean over all cells, and one over the members, which are all, round differently.
    tolerance = 1e-6 if model.attribution_head.pooled else 0
    torch.testing.assert_close(output.coalition_votes, votes.unsqueeze(1), atol=tolerance, rtol=tolerance)
    assert torch.equal(output.logits, model(pixel_values).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_pixels_leak_exactly_nothing(backbone, dtype, attention, pixel_values):
    if backbone == "convnext" and attention == "sdpa":
        return  # ConvNeXt has no attention: one run is enough.
    model = make_model(backbone).to(dtype)
    if backbone == "vit":
        model.set_attn_implementation(attention)
    coalitions = draw()
    ids = coalitions_to_ids(coalitions[:1, :1])
    changed = hide(pixel_values[:1], coalitions[0, 0], 7.0)
    before = model(pixel_values[:1].to(dtype), coalition_ids=ids).coalition_votes
    after = model(changed.to(dtype), coalition_ids=ids).coalition_votes
    present = coalitions[0, 0]
    assert torch.equal(before[0, 0][present], after[0, 0][present])
    assert not torch.equal(before[0, 0][~present], after[0, 0][~present])
    values = [model.coalition_values(x.to(dtype), coalitions[:1, :1]) for x in (pixel_values[:1], changed)]
    assert torch.equal(*values)


def test_three_coalitions_equal_each_one_run_alone(model, pixel_values):
    """A structure of three coalitions gives each the value that it has when run alone."""
    ids = torch.randint(0, 3, (3, 1, PLAYERS), generator=torch.Generator().manual_seed(0))
    together = model(pixel_values, coalition_ids=ids).coalition_votes[:, 0]
    for coalition in range(3):
        members = ids[:, 0] == coalition
        alone = model.coalition_values(pixel_values, members.unsqueeze(1))[:, 0]
        expected = model.base_values + (together * members.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


def test_vit_coalitions_equal_dropping_the_other_patches(pixel_values):
    """The value of a ViT's coalition equals that of really dropping the other patches."""
    model = make_model("vit")
    coalition = draw()[0, 0]
    embeddings = model.vit.embeddings(pixel_values[:1])
    kept = torch.cat([embeddings[:, :1], embeddings[:, 1:][:, coalition]], dim=1)
    for layer in model.vit.layers:
        kept = layer(kept)
    votes = model.classifier.weight @ model.vit.layernorm(kept)[0, 1:].T / PLAYERS
    value = model.coalition_values(pixel_values[:1], coalition[None, None])[0, 0]
    torch.testing.assert_close(value, model.classifier.bias + votes.sum(1), atol=1e-5, rtol=1e-5)


def test_convnext_coalitions_equal_zeroing_before_every_convolution(pixel_values):
    """The value of a ConvNeXt's coalition equals that of zeroing the others before every convolution."""
    model = make_model("convnext")
    coalition = draw()[0, 0].view(1, 1, 4, 6)
    features = model.convnext.embeddings(pixel_values[:1])
    for stage in model.convnext.encoder.stages:
        for layer in stage.downsampling_layer:
            features = layer(features)
        mask = nn.functional.interpolate(coalition.float(), size=features.shape[-2:])
        for layer in stage.layers:
            features = layer(features * mask)
    tokens = model.convnext.layernorm(features.flatten(2).transpose(1, 2))
    votes = (model.classifier(tokens) - model.classifier.bias) / PLAYERS * coalition.view(1, -1, 1)
    value = model.coalition_values(pixel_values[:1], draw()[:1, :1])[0, 0]
    torch.testing.assert_close(value, model.classifier.bias + votes.sum(1)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_depthwise_convolution_learns_as_the_stock_one(dtype, autocast):
    model = make_model("convnext").to(dtype)
    ours = model.convnext.encoder.stages[0].layers[0].dwconv
    stock = nn.Conv2d(16, 16, kernel_size=7, padding=3, groups=16, dtype=dtype)
    stock.load_state_dict(ours.state_dict())
    features = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    outputs, gradients = [], []
    for layer in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(layer(features.requires_grad_()))
        gradients.append(torch.autograd.grad(outputs[-1].sin().sum(), [features, layer.weight, layer.bias]))
    assert torch.equal(*outputs)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_masked_convnext_gradients_equal_finite_differences():
    """A masked ConvNeXt layer has the first and second gradients that finite differences find."""
    config = make_model("convnext", hidden_act="tanh").config
    layer = ShapleyConvNextLayer(config, dim=3).double()
    features = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.tensor([[True, False, False], [False, True, False]])
    second = torch.tensor([[False, True, False], [True, False, False]])
    masks = torch.stack([first, second, ~(first | second)])[None, ..., None].double()  # (1, 3, 2, 3, 1)
    rule = CellRule(masks[..., 0].flatten(2).bool(), {3: masks}, {})
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda features: layer(features, rule), features.requires_grad_())


def test_structures_for_the_first_images_are_enough(model, pixel_values):
    """Structures may be given for the first images only, which have the same votes then."""
    ids = coalitions_to_ids(draw())
    whole = model(pixel_values, coalition_ids=ids)
    part = model(pixel_values, coalition_ids=ids[:2])
    assert part.coalition_votes.shape == (2, 2, PLAYERS, 5)
    torch.testing.assert_close(part.coalition_votes, whole.coalition_votes[:2], atol=1e-6, rtol=1e-5)
    assert torch.equal(part.logits, whole.logits)


@pytest.mark.parametrize("sums_only", [False, True])
def test_last_images_may_play_without_gradient(backbone, pixel_values, sums_only):
    """Structures of the last images may be played without gradient: values stay, and so do the first's gradients."""
    model = make_model(backbone).train()
    inputs = {"pixel_values": pixel_values, "coalition_ids": coalitions_to_ids(draw()), "sums_only": sums_only}
    whole, part = model(**inputs), model(**inputs, num_with_gradient=1)
    played = "coalition_gains" if sums_only else "coalition_votes"
    torch.testing.assert_close(part[played], whole[played], atol=1e-6, rtol=1e-5)
    parameters = list(model.parameters())

    def gradients(tensor):
        return torch.autograd.grad(tensor.sum(), parameters, retain_graph=True, allow_unused=True)

    for found, expected in zip(gradients(part[played]), gradients(whole[played][:1]), strict=True):
        if expected is None or not expected.any():
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="at most 3"):
        model(**inputs, num_with_gradient=4)


def test_gradient_checkpointing_leaves_gradients_alone(pixel_values):
    model = make_model("vit").train()
    ids = coalitions_to_ids(draw())

    def gradients():
        model.zero_grad()
        output = model(pixel_values, coalition_ids=ids, labels=torch.tensor([0, 1, 2]))
        (output.loss + output.coalition_votes.square().sum()).backward()
        return [p.grad.clone() for p in model.vit.layers.parameters()]

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the first name is that of transformers 5.23
    for expected, got in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch maps the CPU's attention image by image
@pytest.mark.parametrize("played", [False, True])
@pytest.mark.parametrize("recipe", [False, True])
def test_gradients_of_each_image_are_found_at_once(backbone, recipe, played, pixel_values):
    """`vmap` over images gives the gradients, classification alone or with coalitions, that each image has alone."""
    model = make_model(backbone, head="recommended" if recipe else "votes").train()
    labels, ids = torch.tensor([0, 4, 2]), coalitions_to_ids(draw())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, pixels, label, ids):
        inputs = {"pixel_values": pixels[None], "labels": label[None]}
        if played:
            inputs |= {"coalition_ids": ids[None], "num_coalitions": 2, "sums_only": True}
        output = torch.func.functional_call(model, weights, kwargs=inputs)
        error = output.coalition_gains - output.coalition_attributions if played else output.attributions
        return output.loss + error.square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weights, pixel_values, labels, ids)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    for image in range(3):
        alone = loss(weights, pixel_values[image], labels[image], ids[image])
        gradients = torch.autograd.grad(alone, list(weights.values()), materialize_grads=True)
        for name, expected in zip(weights, gradients, strict=True):
            torch.testing.assert_close(found[name][image], expected, atol=1e-5, rtol=1e-4)


def test_half_precision_keeps_float32_sums(backbone, pixel_values):
    model = make_model(backbone, head="votes+influence")
    exact = model(pixel_values).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixel_values, coalition_ids=coalitions_to_ids(draw()))
    half = model.to(torch.bfloat16)(pixel_values)
    for got in (output, half):
        assert got.logits.dtype == got.attributions.dtype == torch.float32
        gap = got.attributions.sum(1) - (got.logits - got.base_values)
        assert gap.abs().max() < 1e-5
        torch.testing.assert_close(got.logits, exact, atol=0.1, rtol=0.05)


# The game and explanations


def test_full_coalitions_give_logits_empty_ones_base_values(model, pixel_values):
    """The value of the full coalition is the logits, and that of the empty one the base values."""
    coalitions = torch.stack([torch.ones(3, PLAYERS), torch.zeros(3, PLAYERS)], dim=1).bool()
    values = model.coalition_values(pixel_values, coalitions)
    torch.testing.assert_close(values[:, 0], model(pixel_values).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(values[:, 1], model.base_values.expand(3, -1))


def test_pairs_and_chunks_do_not_change_values(model, pixel_values):
    coalitions = draw(structures=5)
    expected = model.coalition_values(pixel_values, coalitions)
    paired = torch.stack([coalitions, ~coalitions], dim=2).flatten(1, 2)
    values = model.coalition_values(pixel_values, paired, batch_size=4)
    torch.testing.assert_close(values[:, 0::2], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values[:, 1::2], model.coalition_values(pixel_values, ~coalitions))


def test_maps_hold_the_attributions_of_the_chosen_labels(model, pixel_values):
    attributions = model(pixel_values).attributions  # (3, 24, 5)
    maps = model.explain(pixel_values)
    assert maps.shape == (3, 5, 4, 6)
    torch.testing.assert_close(maps[1, 2, 3, 4], attributions[1, 3 * 6 + 4, 2])
    torch.testing.assert_close(model.explain(pixel_values, ["LABEL_3", 1]), maps[:, [3, 1]])
    per_image = torch.tensor([[0], [4], [2]])
    torch.testing.assert_close(model.explain(pixel_values, per_image)[:, 0], maps[range(3), [0, 4, 2]])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_best_labels_can_be_attributed_alone(model, pixel_values, count):
    expected = model(pixel_values)
    found = model(pixel_values, attributed=count)
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(found.attributed_labels, expected.logits.topk(count).indices)
    chosen = found.attributed_labels.unsqueeze(1).expand(-1, PLAYERS, -1)
    torch.testing.assert_close(found.attributions, expected.attributions.gather(2, chosen))


@pytest.mark.parametrize("labels", [0, 6, 1.5, ["cat"], [5], torch.zeros(2, 1, dtype=torch.long)])
def test_bad_labels_to_attribute_are_refused(model, pixel_values, labels):
    model.base_model.embeddings.register_forward_pre_hook(lambda *_: pytest.fail("The backbone ran."))
    with pytest.raises((TypeError, ValueError), match="attributed|labels"):
        model(pixel_values, attributed=labels)
    with pytest.raises(pytest.fail.Exception, match="backbone ran"):
        model(pixel_values, attributed=1)


def test_attributing_some_labels_takes_the_ordinary_forward(model, pixel_values):
    """Some labels alone are attributed in the ordinary forward only: beside coalitions this is refused."""
    with pytest.raises(ValueError, match="drop `coalition_ids`"):
        model(pixel_values, coalitions_to_ids(draw()), attributed=2)


def test_upsampled_maps_keep_their_sum(model, pixel_values):
    maps = model.explain(pixel_values)
    pixels = model.explain(pixel_values, upsample=True)
    assert pixels.shape == (3, 5, 16, 24)
    torch.testing.assert_close(pixels.sum((-2, -1)), maps.sum((-2, -1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pixels[..., 5, 9] * 16, maps[..., 1, 2])


def test_explaining_leaves_the_training_mode_as_it_was(model, pixel_values):
    model.train()
    model.explain(pixel_values)
    model.coalition_values(pixel_values, draw())
    assert model.training and all(module.training for module in model.modules())


def test_explaining_keeps_a_training_models_evaluated_parts(model, pixel_values):
    """A part that its user keeps in evaluation mode, as a frozen one is, stays in it."""
    model.train()
    model.base_model.embeddings.eval()
    expected = [module.training for module in model.modules()]
    model.explain(pixel_values)
    assert [module.training for module in model.modules()] == expected and len(set(expected)) == 2


def test_ending_threads_leave_others_in_evaluation_mode(pixel_values):
    """Of two threads that explain with a model in training mode, the first to end does not give the other dropout."""
    model = make_model("vit", hidden_dropout_prob=0.5)
    expected, found = model.explain(pixel_values), []
    late = Thread(target=lambda: found.append(model.explain(pixel_values)))
    begun, ended = Event(), Event()

    def gate(*_):
        if current_thread() is late:
            begun.set()
            ended.wait(10)
        elif late.ident is None:
            late.start()
            begun.wait(10)

    model.vit.layers[0].register_forward_pre_hook(gate)
    model.train()
    found.append(model.explain(pixel_values))
    ended.set()
    late.join()
    for maps in found:
        torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-6)
    assert len(found) == 2 and all(module.training for module in model.modules())


@pytest.mark.parametrize("own_layers", [0, 1, 2])
def test_threads_that_record_do_not_see_each_other(backbone, own_layers, pixel_values):
    """What another thread computes in the midst of a recorded forward does not enter it."""
    model = make_model(backbone, head="votes+influence", influence_own_layers=own_layers)
    expected = model(pixel_values)
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        interrupt_once(layer, lambda: model(2 * pixel_values, output_hidden_states=True))
    output = model(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.attributions, expected.attributions, atol=1e-5, rtol=1e-5)
    assert len(output.hidden_states) == 3


def test_other_image_sizes_with_interpolated_positions():
    model = make_model("vit", image_size=16)
    x = torch.randn(1, 3, 8, 20)
    assert model.explain(x, interpolate_pos_encoding=True).shape == (1, 5, 2, 5)
    values = model.coalition_values(x, torch.ones(1, 1, 10, dtype=torch.bool), interpolate_pos_encoding=True)
    logits = model(x, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(values[:, 0], logits, atol=1e-5, rtol=1e-5)


def test_hidden_states_and_attentions_are_given_on_request(pixel_values):
    model = make_model("vit", attn_implementation="eager")
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.attentions[0].shape == (3, 4, 25, 25)
    with pytest.raises(ValueError, match="drop `coalition_ids`"):
        model(pixel_values, coalition_ids=coalitions_to_ids(draw()), output_hidden_states=True)
    assert len(make_model("convnext")(pixel_values, output_hidden_states=True).hidden_states) == 3


def test_an_ordinary_forward_runs_the_backbone_once(model, pixel_values):
    calls = Counter()
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [model.base_model.embeddings, *layers]:
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    model.explain(pixel_values)
    assert len(layers) > 1
    assert calls == Counter([model.base_model.embeddings, *layers])


def test_recording_changes_nothing(model, pixel_values):
    expected = model(pixel_values)
    assert expected.hidden_states is None
    for wanted in (True, [1], None):  # which layer's [1] is depends on transformers' version
        output = model(pixel_values, output_hidden_states=wanted, output_attentions=True)
        assert output.hidden_states[1] is not None if wanted else output.hidden_states is None
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.attributions, expected.attributions, atol=1e-5, rtol=1e-5)
    model.config.output_hidden_states = True
    assert len(model(pixel_values).hidden_states) == 3


# The influence head's blocks and own layers


@pytest.mark.parametrize(("kind", "mixes"), [("mlp", False), ("convolution", True), ("backbone", True)])
def test_influence_blocks_mix_tokens_or_not(backbone, kind, mixes):
    head = make_model(backbone, head="votes+influence", influence_block=kind, influence_layers=1).attribution_head
    tokens = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 7] += 1.0
    before, after = (head.influence_blocks[0](cells, (4, 6)) for cells in (tokens, other))
    changed = ((before - after).abs().amax(dim=(0, 2)) > 0).view(4, 6)
    assert changed[1, 1]
    reached = torch.zeros(4, 6, dtype=torch.bool)
    if mixes:  # a convolution reaches 3 cells far, attention all
        reached[:, : 6 if (backbone, kind) == ("vit", "backbone") else 5] = True
    else:
        reached[1, 1] = True
    assert torch.equal(changed, reached)


@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_new_influence_blocks_change_nothing(kind):
    config = ShapleyViTConfig(**VIT | HEADS["votes+influence"] | {"influence_block": kind})
    tokens = torch.randn(2, 24, 32)
    for block in ShapleyViTForImageClassification(config).attribution_head.influence_blocks:
        assert torch.equal(block(tokens, (4, 6)), tokens)


@pytest.mark.parametrize("readout", ["patches", "pooled"])
@pytest.mark.parametrize("count", [1, 2])
def test_own_layers_start_as_the_backbones_last_ones(backbone, readout, count, pixel_values, tmp_path):
    model = make_model(backbone, head="votes+influence", vote_readout=readout)
    model.save_pretrained(tmp_path / "shared")
    own = SHAPLEY[backbone].from_pretrained(tmp_path / "shared", influence_own_layers=count).eval()
    assert len(own.attribution_head.own_blocks) == count
    for name in ("logits", "attributions"):
        expected, found = getattr(model(pixel_values), name), getattr(own(pixel_values), name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_learned_own_layers_are_loaded_unchanged(backbone, pixel_values, tmp_path):
    """Own layers that have learned are loaded as they are, and not as the backbone's."""
    options = {"head": "votes+influence", "influence_own_layers": 1, "influence_layers": 0}
    model = make_model(backbone, **options)  # weights of their own, unlike the backbone's
    model.save_pretrained(tmp_path)
    loaded = SHAPLEY[backbone].from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixel_values).attributions, model(pixel_values).attributions)


def test_own_layers_skip_images_nobody_asks_about(backbone, pixel_values):
    """Own layers leave out images whose attributions nobody asks for, and give the others the same."""
    model = make_model(backbone, head="votes+influence", influence_own_layers=1)
    sizes = []
    model.attribution_head.own_blocks[0].register_forward_hook(lambda *called: sizes.append(len(called[-1])))
    ids = coalitions_to_ids(draw(batch=1))
    summed = model(pixel_values, ids, sums_only=True)
    whole = model(pixel_values, ids)
    assert sizes == [1, 3]
    torch.testing.assert_close(summed.logits, whole.logits)
    members = ids_to_coalitions(ids, 2)  # (1, R, G, N)
    expected = sum_over_coalitions(members.flatten(1, 2), whole.attributions[:1]).unflatten(1, members.shape[1:3])
    torch.testing.assert_close(summed.coalition_attributions, expected, atol=1e-5, rtol=1e-5)


# Coalition adapters


@pytest.mark.parametrize("readout", ["patches", "pooled"])
def test_adapters_leave_full_and_empty_coalitions_alone(backbone, readout, pixel_values):
    """Adapters act where some players are absent, and not at all on the full image or the empty coalition."""
    options = {"head": "votes+influence", "vote_readout": readout}
    adapted, bare = (make_model(backbone, coalition_adapter_size=size, **options) for size in (4, 0))
    bare.load_state_dict(adapted.state_dict(), strict=False)
    for name in ("logits", "attributions", "base_values"):
        assert torch.equal(getattr(adapted(pixel_values), name), getattr(bare(pixel_values), name))
    full = torch.ones(3, 1, 24, dtype=torch.bool)
    for coalitions in (full, ~full):
        found, expected = (model.coalition_values(pixel_values, coalitions) for model in (adapted, bare))
        assert torch.equal(found, expected)
    coalitions = sample_coalitions(3, 8, num_players=24, generator=torch.Generator().manual_seed(0))
    found, expected = (model.coalition_values(pixel_values, coalitions) for model in (adapted, bare))
    assert (found - expected).abs().amin(dim=-1).min() > 1e-6


def test_adapters_start_at_nothing(backbone, pixel_values, tmp_path):
    make_model(backbone).save_pretrained(tmp_path)
    bare, adapted = (
        SHAPLEY[backbone].from_pretrained(tmp_path, coalition_adapter_size=size).eval() for size in (0, 4)
    )
    assert len(adapted.coalition_adapters) == {"vit": 2, "convnext": 3}[backbone]
    coalitions = sample_coalitions(3, 8, num_players=24, generator=torch.Generator().manual_seed(0))
    found, expected = (model.coalition_values(pixel_values, coalitions) for model in (adapted, bare))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flows", [False, True])
@pytest.mark.parametrize("head", ["votes+influence", "pooled", "recommended"])
def test_attributions_teach_the_classifier_only_if_asked(backbone, head, flows, pixel_values):
    """`attribution_gradient` decides whether the gradient of attributions reaches anything but the head."""
    model = make_model(backbone, head=head, attribution_gradient=flows).train()
    model(pixel_values).attributions.square().sum().backward()
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    outside = {name for name in learned if not name.startswith("attribution_head.")}
    assert bool(outside) == flows and "attribution_head.correction.weight" in learned


def test_hooks_inside_layers_act_on_coalitions(pixel_values):
    """Hooks of a layer's parts act on coalitions too, with and without gradients."""
    model = make_model("vit").train()
    ids = coalitions_to_ids(sample_coalitions(3, 1, num_players=24, generator=torch.Generator().manual_seed(0)))
    found = model(pixel_values, ids).coalition_votes
    for part in (model.vit.layers[0].attention.o_proj, model.vit.layers[0].layernorm_after):
        handle = part.register_forward_hook(lambda module, inputs, output: 2 * output)
        hooked = model(pixel_values, ids).coalition_votes
        with torch.no_grad():  # where the parts are called as they are
            torch.testing.assert_close(hooked, model(pixel_values, ids).coalition_votes, atol=1e-6, rtol=1e-5)
        handle.remove()
        assert (hooked - found).abs().max() > 0.01


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_hooks_keep_what_they_saw_without_gradients(backbone, pixel_values):
    """Hooks keep what they saw where nothing is learned: no later step writes over it."""
    model = make_model(backbone)
    seen = []
    for layer in model.vit.layers if backbone == "vit" else model.convnext.encoder.stages[1].layers:
        part = layer.mlp.fc1 if backbone == "vit" else layer.pwconv1
        part.register_forward_hook(lambda part, inputs, output: seen.append((part, inputs[0].clone(), output)))
    with torch.no_grad():
        model(pixel_values, coalitions_to_ids(draw()))
        assert len(seen) > 2
        for part, given, output in seen:
            torch.testing.assert_close(output, nn.functional.linear(given, part.weight, part.bias), rtol=0, atol=0)


def test_activations_work_in_place_where_unseen():
    """An activation takes no memory of its own where nothing else needs its input, and its own elsewhere."""
    gelu, linear, given = ACT2FN["gelu"], nn.Linear(4, 8), torch.linspace(-2, 2, 4)
    with torch.no_grad():

        def in_place(act=gelu, source=linear):
            hidden = linear(given)
            expected = act(hidden)
            result = activated(act, hidden, source)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            return result.data_ptr() == hidden.data_ptr()

        assert in_place()
        assert not in_place(act=ACT2FN["relu"])
        assert not in_place(source=nn.Sequential(linear))
        parts = (gelu, linear)
        own = [kind for part in parts for kind in (part.register_forward_hook, part.register_forward_pre_hook)]
        for register in [*own, register_module_forward_hook, register_module_forward_pre_hook]:
            handle = register(lambda *_: None)
            assert not in_place()
            handle.remove()
        assert in_place()
    assert not in_place()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_first_tokens_alone_have_the_same_outputs(attention):
    """A layer run for its first tokens gives them what it gives when run for all."""
    model = make_model("vit", attn_implementation=attention)
    tokens, layer = torch.randn(2, 7, 32), model.vit.layers[-1]
    ids = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0, 0]])
    for mask in (None, model._mask(tokens, ids)):
        expected = layer(tokens, mask)[:, :2]
        torch.testing.assert_close(layer(tokens, TokenRule(mask, readers=2)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_adapted_weights_are_used_as_adapted(attention):
    """Weights that an adapter changes are used as it changes them."""
    layer = make_model("vit", attn_implementation=attention).vit.layers[-1]
    tokens = torch.randn(2, 7, 32)
    layer.attention.k_proj = nn.Sequential(layer.attention.k_proj, nn.Linear(32, 32))
    layer.attention.v_proj = nn.Sequential(layer.attention.v_proj, nn.Linear(32, 32))
    torch.testing.assert_close(layer(tokens, TokenRule(readers=2)), layer(tokens)[:, :2], atol=1e-5, rtol=1e-5)


def test_a_pooled_vits_step_reaches_every_parameter(pixel_values):
    model = make_model("vit", head="pooled", influence_own_layers=1)
    output = model(pixel_values, coalitions_to_ids(draw()), sums_only=True)
    (output.logits.sum() + output.coalition_gains.sum() + output.coalition_attributions.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("readers", [None, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_lone_token_along_changes_no_output(attention, readers):
    """A layer that takes a lone token along gives what it gives for the images and for the token apart."""
    layer = make_model("vit", attn_implementation=attention).vit.layers[-1]
    tokens, lone = torch.randn(2, 7, 32), torch.randn(1, 32)
    packed = layer(torch.cat([tokens.flatten(0, 1), lone]), TokenRule(readers=readers, images=2))
    expected = torch.cat([layer(tokens)[:, :readers].flatten(0, 1), layer(lone[None])[0]])
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


# Loading and saving


@pytest.mark.parametrize(
    "offloaded",
    ["embeddings", "layers", "layernorm", "classifier", "attribution_head", "coalition_adapters", "everything"],
)
def test_any_part_may_be_offloaded(backbone, offloaded, pixel_values, tmp_path):
    model = make_model(backbone, head="adapted")
    model.save_pretrained(tmp_path / "model")
    parts = [f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_children()]
    device_map = dict.fromkeys([*parts, "classifier", "attribution_head", "coalition_adapters"], "cpu")
    names = {part.split(".")[-1].replace("encoder", "layers"): part for part in device_map}
    if offloaded == "everything":  # what "auto" does where hardly any memory is free
        device_map = {"": "disk"}
    else:
        device_map[names[offloaded]] = "disk"
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.explain(pixel_values), model.explain(pixel_values), atol=1e-6, rtol=1e-5)
    found, expected = (played.coalition_values(pixel_values, draw()) for played in (loaded, model))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offloaded", ["backbone", "attribution_head"])
def test_own_layers_never_copy_offloaded_weights(backbone, offloaded, tmp_path):
    """Neither from nor into an offloaded layer can be copied: refused, with the way round, not left at random."""
    plain_model(backbone).save_pretrained(tmp_path / "plain")
    options = HEADS["votes+influence"] | {"influence_own_layers": 1}
    whole = SHAPLEY[backbone].from_pretrained(tmp_path / "plain", **options)
    place = {"backbone": whole.base_model_prefix}.get(offloaded, offloaded)
    where = {name: "disk" if name == place else "cpu" for name, _ in whole.named_children()}
    devices = {"device_map": where, "offload_folder": str(tmp_path / "offloaded")}
    with pytest.raises(ValueError, match="offloaded or quantised: load .* once without `device_map`"):
        SHAPLEY[backbone].from_pretrained(tmp_path / "plain", **options, **devices)
    whole.save_pretrained(tmp_path / "ours")
    loaded = SHAPLEY[backbone].from_pretrained(tmp_path / "ours", **devices)
    assert any(weight.is_meta for weight in loaded.parameters())


def test_own_layers_never_copy_quantised_weights(backbone):
    """Own layers are no copies of what is quantised: this is refused."""
    model = make_model(backbone, head="votes+influence", influence_own_layers=1)
    layer = model.last_layers(1)[0][0]
    linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="offloaded or quantised"):
        _check_copies(model, "plain")


def test_auto_classes_load_a_saved_model_unchanged(model, pixel_values, tmp_path):
    """A saved model loads the same through the auto classes of model and configuration."""
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert loaded.config.model_type == model.config.model_type
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    # Every weight is equal; a product with one row may round by where in memory they lie.
    found, wanted = loaded(pixel_values).attributions, model(pixel_values).attributions
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_auto_model_gives_the_backbones_features(backbone, pixel_values, tmp_path):
    """`AutoModel` loads of a checkpoint of ours what it would of a plain one; so does the pipeline for features."""
    model = make_model(backbone, head="recommended")
    model.save_pretrained(tmp_path / "ours")
    features, report = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not any(
        "vit." in key or "convnext." in key for key in report["unexpected_keys"]
    )
    expected = model.base_model(pixel_values).last_hidden_state
    assert torch.equal(features.eval()(pixel_values).last_hidden_state, expected)

    processor = {"vit": ViTImageProcessorPil, "convnext": ConvNextImageProcessorPil}[backbone](do_resize=False)
    processor.save_pretrained(tmp_path / "ours")
    picture = Image.linear_gradient("L").convert("RGB").resize((24, 16))
    found = torch.tensor(pipeline("image-feature-extraction", model=str(tmp_path / "ours"))(picture))
    expected = model.base_model(**processor(picture, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    features.save_pretrained(tmp_path / "features")
    assert type(AutoModel.from_pretrained(tmp_path / "features")) is type(features)


def test_a_plain_classifier_keeps_every_weight(backbone, tmp_path):
    plain = plain_model(backbone)
    plain.save_pretrained(tmp_path)
    model, report = SHAPLEY[backbone].from_pretrained(tmp_path, **HEADS["votes"], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weights = model.state_dict()
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


def test_the_pooled_readout_keeps_a_plain_classifiers_predictions(backbone, pixel_values, tmp_path):
    plain = plain_model(backbone)
    plain.save_pretrained(tmp_path)
    options = HEADS["pooled"]
    model = SHAPLEY[backbone].from_pretrained(tmp_path, **options).eval()
    torch.testing.assert_close(model(pixel_values).logits, plain(pixel_values).logits, atol=1e-5, rtol=1e-5)


def test_pooled_vit_coalitions_equal_masked_plain_classifiers(pixel_values, tmp_path):
    """A coalition of a pooled ViT has the logits of the plain classifier without the other patches."""
    plain = plain_model("vit")
    plain.save_pretrained(tmp_path)
    options = HEADS["pooled"]
    model = SHAPLEY["vit"].from_pretrained(tmp_path, **options)
    coalitions = draw(structures=1)
    seen = nn.functional.pad(coalitions[:, 0], (1, 0), value=True).long()  # CLS is always there
    expected = plain(pixel_values, attention_mask=seen).logits
    torch.testing.assert_close(model.coalition_values(pixel_values, coalitions)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_pooled_convnext_coalitions_average_their_cells(pixel_values):
    """A coalition of a pooled ConvNeXt is classified by the mean over its cells."""
    options = {"head": "pooled"}
    model = make_model("convnext", **options)
    coalitions = draw(structures=1)
    apart = copy.deepcopy(model)  # each cell by itself, before the final norm
    apart.attribution_head.pooled = False
    apart.convnext.layernorm = nn.Identity()
    members = torch.stack([coalitions, ~coalitions], dim=2)
    cells = apart.encode(apart.embed(pixel_values), (4, 6), members).voting
    for image, coalition in enumerate(coalitions[:, 0]):
        pooled = model.convnext.layernorm(cells[image][coalition].mean(0))
        expected = model.classifier(pooled)
        found = model.coalition_values(pixel_values, coalitions)[image, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_only_what_is_new_is_reported_missing(backbone, pixel_values, tmp_path):
    plain_model(backbone).save_pretrained(tmp_path)
    model, report = SHAPLEY[backbone].from_pretrained(tmp_path, **HEADS["votes+influence"], output_loading_info=True)
    assert report["missing_keys"] and all(key.startswith("attribution_head.") for key in report["missing_keys"])
    votes = SHAPLEY[backbone].from_pretrained(tmp_path, **HEADS["votes"])
    # New parts start at nothing: the attributions are the plain votes until training.
    assert torch.equal(model.eval()(pixel_values).attributions, votes.eval()(pixel_values).attributions)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("head", ["votes+influence", "pooled, own layer", "recommended"])
def test_a_model_says_whether_its_attributions_were_trained(backbone, head, pixel_values, tmp_path, caplog):
    """A plain checkpoint, loaded or saved and loaded again, says once that it was not; after a step it does not."""
    plain_model(backbone).save_pretrained(tmp_path / "plain")
    SHAPLEY[backbone].from_pretrained(tmp_path / "plain", **HEADS[head]).save_pretrained(tmp_path / "ours")
    assert UNTRAINED not in caplog.text  # whoever loads a checkpoint to train it need not hear of it
    for folder in ("plain", "ours"):
        model = SHAPLEY[backbone].from_pretrained(tmp_path / folder, **HEADS[head])
        caplog.clear()
        for _ in range(2):
            model.explain(pixel_values)
        assert not model.attributions_trained and caplog.text.count(UNTRAINED) == 1
    coalitions = draw(structures=1)
    output = model.train()(pixel_values, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
    output.coalition_attributions.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.attributions_trained
    model.save_pretrained(tmp_path / "trained")
    caplog.clear()
    SHAPLEY[backbone].from_pretrained(tmp_path / "trained").explain(pixel_values)
    assert UNTRAINED not in caplog.text


def test_loading_names_a_plain_classifier_reading_patches(backbone, tmp_path, caplog):
    """Nothing in such a model starts at zero, so that later nobody could tell."""
    plain_model(backbone).save_pretrained(tmp_path / "plain")
    SHAPLEY[backbone].from_pretrained(tmp_path / "plain", **HEADS["votes"]).save_pretrained(tmp_path / "ours")
    assert caplog.text.count(UNTRAINED) == 1
    SHAPLEY[backbone].from_pretrained(tmp_path / "ours")
    assert caplog.text.count(UNTRAINED) == 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["classifier.bias", "attribution_head.influence_norm.weight", "layernorm"])
def test_weights_that_are_not_finite_are_refused(backbone, name, broken, pixel_values, tmp_path):
    """A checkpoint that holds some is not loaded; where training made some, `explain` names them in place of a map."""
    model = make_model(backbone, head="votes+influence")
    name = f"{model.base_model_prefix}.{name}.weight" if name == "layernorm" else name
    model.get_parameter(name).data[1] = broken
    with pytest.raises(ValueError, match=f"answers NaN or infinity: weights \\['{name}'\\] are not finite"):
        model.explain(pixel_values)
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=f"NaN or infinity in 1 weights, such as \\['{name}'\\]"):
        type(model).from_pretrained(tmp_path)


def test_logits_beyond_half_precision_are_refused(backbone, pixel_values):
    """Every weight is finite, but what the layers make of them is not."""
    model = make_model(backbone, head="votes+influence").to(torch.float16)
    model.attribution_head.influence_norm.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="too large for torch.float16"):
        model.explain(pixel_values.half())


def test_a_vit_without_classifier_keeps_its_backbone(tmp_path):
    options = {key: value for key, value in VIT.items() if key != "num_labels"}
    torch.manual_seed(0)
    backbone = ViTModel(ViTConfig(**options))
    nn.init.normal_(backbone.layers[1].mlp.fc1.weight)
    backbone.save_pretrained(tmp_path)
    options = HEADS["votes"] | {"num_labels": 5}
    model, report = ShapleyViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert sorted(report["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, backbone.layers[1].mlp.fc1.weight)


def test_a_plain_configuration_is_taken_as_ours(backbone, pixel_values, tmp_path):
    """The pattern of Hugging Face's example scripts loads what loading without a configuration does."""
    plain_model(backbone).save_pretrained(tmp_path)
    labels = {"id2label": {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}, "num_labels": 5}
    config = AutoConfig.from_pretrained(tmp_path, **labels)
    options = HEADS["pooled"]
    model = SHAPLEY[backbone].from_pretrained(tmp_path, config=config, **options).eval()
    expected = SHAPLEY[backbone].from_pretrained(tmp_path, **options).eval()
    assert torch.equal(model(pixel_values).attributions, expected(pixel_values).attributions)
    assert type(model.config) is type(expected.config) and model.config.model_type == expected.config.model_type
    assert model.config.id2label == labels["id2label"] and model.config.name_or_path == str(tmp_path)
    assert type(config).model_type == backbone  # what was given is left as it was
    assert type(SHAPLEY[backbone](config).config) is type(expected.config)


def test_labels_named_while_loading_are_saved_both_ways(backbone, tmp_path):
    """A plain checkpoint whose labels `id2label` alone names comes back with these names, and their ids by name."""
    plain_model(backbone).save_pretrained(tmp_path / "plain")
    model = SHAPLEY[backbone].from_pretrained(tmp_path / "plain", id2label=dict(enumerate("abcde")))
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    model.save_pretrained(tmp_path / "ours")
    loaded = SHAPLEY[backbone].from_pretrained(tmp_path / "ours")
    assert loaded.config.id2label == dict(enumerate("abcde")) and loaded.config.label2id == model.config.label2id


def test_options_beside_our_configuration_leave_it_alone(backbone, tmp_path):
    make_model(backbone).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = SHAPLEY[backbone].from_pretrained(tmp_path, config=config, **HEADS["votes+influence"])
    assert (model.config.influence_layers, config.influence_layers) == (2, 0)


@pytest.mark.parametrize(("ours", "theirs"), [("vit", ConvNextConfig), ("convnext", ViTConfig)])
def test_a_configuration_of_another_architecture_is_refused(ours, theirs, tmp_path):
    make_model(ours).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use a checkpoint of that backbone"):
        SHAPLEY[ours].from_pretrained(tmp_path, config=theirs())
    with pytest.raises(ValueError, match="use a checkpoint of that backbone"):
        SHAPLEY[ours](theirs())


def test_another_number_of_labels_replaces_the_classifier_only(backbone, tmp_path):
    plain = plain_model(backbone)
    plain.save_pretrained(tmp_path)
    model = SHAPLEY[backbone].from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape[0] == 7
    body = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in body.items())


def test_our_checkpoint_loads_into_the_plain_class(backbone, tmp_path):
    model = make_model(backbone)
    model.save_pretrained(tmp_path)
    plain_class = {"vit": ViTForImageClassification, "convnext": ConvNextForImageClassification}[backbone]
    plain_config = {"vit": ViTConfig, "convnext": ConvNextConfig}[backbone]
    options = {"vit": VIT, "convnext": CONVNEXT}[backbone]
    plain = plain_class.from_pretrained(tmp_path, config=plain_config(**options))
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_other_sizes_are_refused_as_transformers_refuses_them(backbone, tmp_path):
    """Whoever catches transformers' RuntimeError catches ours, which is a ValueError as all our refusals are."""
    plain_model(backbone).save_pretrained(tmp_path)
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="set `ignore_mismatched_sizes=True`"):
            SHAPLEY[backbone].from_pretrained(tmp_path, num_labels=7)


@pytest.mark.parametrize(("ours", "theirs"), [("vit", "convnext"), ("convnext", "vit")])
def test_a_checkpoint_of_another_architecture_is_refused(ours, theirs, tmp_path):
    plain_model(theirs).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use a checkpoint of that backbone"):
        SHAPLEY[ours].from_pretrained(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 16, 24), "must be of shape"),
        (torch.zeros(0, 3, 16, 24), "batch > 0"),
        (torch.zeros(1, 1, 16, 24), "3 channels.* got 1 in shape.*image processor"),
        (torch.zeros(1, 16, 24, 3), r"3 channels.* got 16 in shape \(1, 16, 24, 3\): permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.uint8), "floating point"),
        (torch.zeros(1, 3, 17, 24), r"resize or crop|use the image processor"),
        (torch.full((1, 3, 16, 24), torch.nan), "must be finite"),
        (torch.full((1, 3, 16, 24), torch.inf), "must be finite"),
        ([[1.0]], "got list"),
    ],
)
def test_bad_pixels_are_refused(backbone, pixels, message):
    model = make_model(backbone)
    for call in (model, model.explain):
        with pytest.raises((ValueError, TypeError), match=message):
            call(pixels)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 1, PLAYERS), "long tensor"),
        (torch.zeros(3, 1, PLAYERS, dtype=torch.bool), "long tensor"),
        (torch.zeros(3, PLAYERS, dtype=torch.long), "must be of shape"),
        (torch.zeros(4, 1, PLAYERS, dtype=torch.long), "must be of shape"),
        (torch.zeros(3, 0, PLAYERS, dtype=torch.long), "must be of shape"),
        (torch.zeros(3, 1, PLAYERS + 1, dtype=torch.long), "players = 24"),
        (torch.full((3, 1, PLAYERS), -1), "must lie in"),
        (torch.full((3, 1, PLAYERS), PLAYERS), "must lie in"),
    ],
)
def test_bad_coalition_ids_are_refused(model, pixel_values, ids, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, coalition_ids=ids)


@pytest.mark.parametrize(
    "coalitions",
    [
        torch.zeros(3, 1, PLAYERS),
        torch.zeros(3, 1, 5).bool(),
        torch.zeros(2, 1, PLAYERS).bool(),
        torch.zeros(24).bool(),
    ],
)
def test_bad_coalitions_are_refused(model, pixel_values, coalitions):
    with pytest.raises(ValueError, match="`coalitions` must be"):
        model.coalition_values(pixel_values, coalitions)


@pytest.mark.parametrize("labels", [["cat"], [5], [-1], [], torch.zeros(2, 1, dtype=torch.long)])
def test_bad_labels_are_refused(model, pixel_values, labels):
    with pytest.raises(ValueError, match="labels"):
        model.explain(pixel_values, labels)


def test_one_player_is_no_game():
    with pytest.raises(ValueError, match="at least 2 players"):
        make_model("vit", image_size=4)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 2 players"):
        make_model("convnext")(torch.zeros(1, 3, 4, 4))


def test_attention_that_cannot_hide_players_is_refused(pixel_values):
    model = make_model("vit")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot hide players"):
        model.coalition_values(pixel_values, draw())


@pytest.mark.parametrize(
    "options",
    [
        {"influence_block": "gru"},
        {"vote_readout": "mean"},
        {"vote_readout": "pooled", "influence_layers": 0, "influence_own_layers": 0},
        {"influence_layers": -1},
        {"influence_own_layers": -1},
        {"coalition_adapter_size": -1},
        {"influence_own_layers": 13},
    ],
)
@pytest.mark.parametrize("config", [ShapleyViTConfig, ShapleyConvNextConfig])
def test_bad_options_are_refused(config, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


def test_loading_options_mean_what_creation_options_mean(backbone, tmp_path):
    """Options given while loading mean what they mean at creation, and bad ones are refused."""
    plain_model(backbone).save_pretrained(tmp_path)
    load = SHAPLEY[backbone].from_pretrained
    assert not load(tmp_path).attribution_head.gradient_flows
    assert load(tmp_path, attribution_gradient=True).attribution_head.gradient_flows
    assert load(tmp_path, **HEADS["votes"]).attribution_head.gradient_flows
    with pytest.raises(ValueError, match="influence_block"):
        load(tmp_path, influence_block="gru")


def test_upsampling_to_no_multiple_is_refused():
    with pytest.raises(ValueError, match="multiple of the grid"):
        upsample_attributions(torch.zeros(4, 6), (16, 25))


def test_an_exported_model_takes_any_batch_size(model, pixel_values):
    any_batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (pixel_values[:2],), dynamic_shapes=any_batch).module()(pixel_values)
    expected = model(pixel_values)
    torch.testing.assert_close(exported.logits, expected.logits)
    torch.testing.assert_close(exported.attributions, expected.attributions)
