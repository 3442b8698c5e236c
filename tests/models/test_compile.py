"""Compiled, in reduced precision and with gradient checkpointing: the same model."""

import shutil

import pytest
import torch
from conftest import make_model
from torch.nn import functional as F

from hf_shapley import coalitions_to_ids, sample_coalitions

# One layer each: what is compiled takes seconds either way, and its depth only repeats it.
SMALL = {
    "vit": {"num_hidden_layers": 1},
    "convnext": {"depths": [1, 1]},
}

# torch's own: its compiler does so where it meets an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """What other tests compiled would count towards the limit of recompilations."""
    torch.compiler.reset()


def small_model(backbone: str, **options):
    return make_model(backbone, **{"head": "votes+influence", **SMALL[backbone], **options})


def inputs(backbone: str = "vit") -> dict:
    coalitions = sample_coalitions(3, 1, num_players=24, generator=torch.Generator().manual_seed(2))
    return {
        "pixel_values": torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)),
        "labels": torch.tensor([0, 3, 4]),
        "coalition_ids": coalitions_to_ids(coalitions),
        "num_coalitions": 2,
    }


def joint_loss(output) -> torch.Tensor:
    """Something that every output and parameter takes part in."""
    if output.coalition_gains is None:
        return output.loss + output.coalition_votes.square().sum() + output.attributions.square().sum()
    return output.loss + F.mse_loss(output.coalition_gains, output.coalition_attributions)


def gradients(model, forward=None, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    joint_loss((model if forward is None else forward)(**inputs(), **arguments)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found: dict, expected: dict, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("head", ["votes+influence", "adapted"])
def test_compiled_models_train_and_explain_the_same(backbone, head):
    """A model compiled without graph breaks has the same gradients, logits, attributions and votes."""
    model = small_model(backbone, head=head).train()
    # "aot_eager" shares with "inductor" all that can break a graph, and needs no C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = gradients(model, sums_only=True, num_with_gradient=2)
    found = gradients(model, compiled, sums_only=True, num_with_gradient=2)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model.eval()
    pixel_values = inputs()["pixel_values"]
    with torch.no_grad():
        found, ordinary = compiled(pixel_values), model(pixel_values)
        votes = compiled(**inputs()).coalition_votes
    torch.testing.assert_close(found.attributions, ordinary.attributions, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.logits, ordinary.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(votes, model(**inputs()).coalition_votes, atol=1e-6, rtol=1e-5)


def test_explain_compiles_without_graph_breaks(backbone):
    model = small_model(backbone)
    pixel_values = inputs()["pixel_values"]
    explain = torch.compile(model.explain, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(explain(pixel_values), model.explain(pixel_values), atol=1e-6, rtol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        found, expected = (each(pixel_values, attributed=2) for each in (compiled, model))
    torch.testing.assert_close(found.attributions, expected.attributions, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_inductor_gives_the_same_step(backbone):
    model = small_model(backbone).train()
    expected = gradients(model, sums_only=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_close(gradients(model, compiled, sums_only=True), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("sums_only", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_leaves_gradients_alone(backbone, sums_only, use_reentrant):
    model = small_model(backbone, influence_own_layers=1, influence_block="backbone").train()
    expected = gradients(model, sums_only=sums_only)
    # The older name is deprecated by later versions of transformers.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})
    calls = []
    layer = model.vit.layers[0] if backbone == "vit" else model.convnext.encoder.stages[1].layers[0]
    recomputed = layer.layernorm_before if backbone == "vit" else layer.layernorm
    recomputed.register_forward_hook(lambda *_: calls.append("norm"))
    pixel_values = inputs()["pixel_values"].requires_grad_(use_reentrant)
    model.zero_grad()
    joint_loss(model(**{**inputs(), "pixel_values": pixel_values}, sums_only=sums_only)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert calls.count("norm") == 4  # each of the two passes once more, in the backward pass
    getattr(model, f"{name}_checkpointing_disable")()
    assert_close(gradients(model, sums_only=sums_only), expected, atol=1e-6, rtol=1e-5)


def test_sums_only_adds_up_what_players_have(backbone):
    """Sums over coalitions are the sums of the votes and attributions that each player has."""
    for head in ("votes", "votes+influence", "adapted"):
        model = make_model(backbone, head=head)
        players = model(**inputs())
        sums = model(**inputs(), sums_only=True)
        members = torch.stack([inputs()["coalition_ids"] == c for c in range(2)], dim=2).float()  # (B, R, 2, N)
        gains = torch.einsum("brgn,brnk->brgk", members, players.coalition_votes)
        attributions = torch.einsum("brgn,bnk->brgk", members, players.attributions)
        torch.testing.assert_close(sums.coalition_gains, gains, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sums.coalition_attributions, attributions, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sums.logits, players.logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sums.loss, players.loss)
        assert sums.attributions is None and sums.coalition_votes is None
    with pytest.raises(ValueError, match="sums_only"):
        model(inputs()["pixel_values"], sums_only=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("whole", [False, True])
def test_half_precision_keeps_attributions_and_an_exact_sum(backbone, dtype, tolerance, whole):
    """bfloat16 keeps 8 bits and float16 11: outputs of order 1 differ by a few times 2^-8 and 2^-11."""
    model = small_model(backbone)
    expected = model(**inputs())
    if whole:
        arguments = {**inputs(), "pixel_values": inputs()["pixel_values"].to(dtype)}
        found = model.to(dtype)(**arguments)
    else:
        with torch.autocast("cpu", dtype=dtype):
            found = model(**inputs())
    for name in ("logits", "attributions", "coalition_votes", "base_values"):
        assert found[name].dtype == torch.float32
    scale = expected.attributions.abs().max().item()
    torch.testing.assert_close(found.attributions, expected.attributions, atol=tolerance * scale, rtol=0)
    assert not torch.equal(found.attributions, expected.attributions)
    gap = found.attributions.sum(1) - (found.logits - found.base_values)
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_near_full_ones(backbone, dtype):
    """Gradients under half-precision autocast are finite and point where those in full precision do."""
    model = small_model(backbone).train()
    expected = gradients(model, sums_only=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = joint_loss(model(**inputs(), sums_only=True))
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        cosine = F.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98 or expected[name].norm() < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_pixels_leak_nothing_under_autocast(backbone, dtype):
    model = small_model(backbone)
    arguments = inputs()
    present = arguments["coalition_ids"][:, 0] == 0  # (B, N)
    pixels = present.view(3, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(pixels, arguments["pixel_values"], 7.0)
    with torch.autocast("cpu", dtype=dtype):
        before, after = (
            model(**{**arguments, "pixel_values": x}).coalition_votes[:, 0]
            for x in (arguments["pixel_values"], changed)
        )
    assert torch.equal(before[present], after[present])
    assert not torch.equal(before[~present], after[~present])


def test_autocast_leaves_double_precision_alone(backbone):
    model = small_model(backbone).double()
    arguments = {**inputs(), "pixel_values": inputs()["pixel_values"].double()}
    expected = model(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**arguments)
    for name in ("logits", "attributions", "coalition_votes"):
        assert torch.equal(found[name], expected[name])


def test_channels_last_pixels_change_nothing(backbone):
    model = small_model(backbone)
    arguments = inputs()
    expected = model(**arguments)
    arguments["pixel_values"] = arguments["pixel_values"].contiguous(memory_format=torch.channels_last)
    found = model.to(memory_format=torch.channels_last)(**arguments)
    torch.testing.assert_close(found.attributions, expected.attributions, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.coalition_votes, expected.coalition_votes, atol=1e-6, rtol=1e-5)
