"""Linear layers that are more than their weights: adapted, quantised, hooked or nested, honoured or refused."""

import copy

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.nn import functional as F

from hf_shapley import coalitions_to_ids, sample_coalitions

HEADS = {
    "votes": {},
    "votes+influence": {"head": "votes+influence"},
    "pooled": {"head": "pooled", "influence_own_layers": 1},
}


class LowRank(nn.Module):
    """A linear layer with a low-rank update beside it, as PEFT's LoRA has it: its own weight does not say all."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    def forward(self, inputs):
        return self.base_layer(inputs) + F.linear(F.linear(inputs, self.down), self.up)

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.base_layer)
        layer.weight.data += (self.up @ self.down).detach()
        return layer


def played(model, pixel_values):
    """All that a forward gives, with and without coalitions."""
    ids = coalitions_to_ids(sample_coalitions(3, 2, num_players=24, generator=torch.Generator().manual_seed(0)))
    whole, sums = model(pixel_values), model(pixel_values, ids, sums_only=True)
    values = model.coalition_values(pixel_values, ids == 0)
    votes = model(pixel_values, ids).coalition_votes
    chosen = model(pixel_values, attributed=[1, 3]).attributions
    parts = whole.logits, whole.attributions, whole.base_values, sums.coalition_gains, sums.coalition_attributions
    return [*parts, sums.readout_errors, values, votes, chosen]


@pytest.mark.parametrize(
    ("head", "part"),
    [
        *((head, "classifier") for head in HEADS),
        *((head, "attribution_head.correction") for head in HEADS if head != "votes"),  # votes are not corrected
    ],
)
def test_an_adapted_layer_is_its_merged_one(backbone, head, part, pixel_values):
    model = make_model(backbone, **HEADS[head])
    torch.manual_seed(1)
    adapted = LowRank(model.get_submodule(part))
    model.set_submodule(part, adapted)
    found = played(model, pixel_values)
    (found[0].sum() + found[1].square().sum() + found[3].sum() + found[4].square().sum()).backward()
    assert adapted.down.grad.any() and adapted.up.grad.any()
    model.set_submodule(part, adapted.merged())
    for one, other in zip(found, played(model, pixel_values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_hook_on_the_classifier_acts(backbone, head, pixel_values):
    """Doubling what it gives doubles logits, values and attributions alike."""
    model = make_model(backbone, **HEADS[head])
    before = played(model, pixel_values)
    handle = model.classifier.register_forward_hook(lambda module, inputs, output: 2 * output)
    for one, other in zip(played(model, pixel_values), before, strict=True):
        if one.shape[-1] == 5 or one.shape[-1] == 2:
            torch.testing.assert_close(one, 2 * other, atol=1e-5, rtol=1e-4)
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("head", HEADS)
def test_quantised_layers_explain_what_they_predict(backbone, head, pixel_values):
    """The sum is that of the quantised logits, and maps are near those of the model that was quantised."""
    model = make_model(backbone, **HEADS[head])
    expected = model(pixel_values)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.classifier, nn.Linear)
    output = quantised(pixel_values)
    assert 0 < (output.logits - expected.logits).abs().max() < 0.2 * expected.logits.abs().max()
    gains = output.logits - output.base_values
    torch.testing.assert_close(output.attributions.sum(1), gains, atol=1e-5, rtol=1e-5)
    assert (output.attributions - expected.attributions).std() < 0.3 * expected.attributions.std()
    assert quantised.explain(pixel_values, evaluations=4).isfinite().all()


def test_a_nested_linear_classifier_is_one(backbone, pixel_values):
    model = make_model(backbone, **HEADS["pooled"])
    expected = played(model, pixel_values)
    model.classifier = nn.Sequential(model.classifier)
    for one, other in zip(played(model, pixel_values), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_classifier_that_is_not_linear_is_refused(backbone, pixel_values):
    model = make_model(backbone)
    model.classifier = nn.Sequential(model.classifier, nn.Softplus(), nn.Linear(5, 5)).eval()
    with pytest.raises(ValueError, match="`Sequential` in place of a linear layer"):
        model.explain(pixel_values)
