"""Losses and gradients stay finite and attributions add up: 1 to 10,000 labels, 2 to 1,024 players, any dtype."""

import os

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PrinterCallback

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    coalition_loss,
    coalitions_to_ids,
    paired_residual_loss,
    sample_coalitions,
)

GRIDS = {2: (1, 2), 12: (3, 4), 256: (16, 16), 1024: (32, 32)}
PICTURES = {
    "noise": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    "black": lambda shape: torch.full(shape, -1.0),
    "grey": torch.zeros,
    "huge": lambda shape: torch.full(shape, 1e4),
    "checked": lambda shape: (torch.arange(shape[-1]) % 2 * 2.0 - 1).expand(shape).clone(),
}


def model_for(backbone: str, players: int = 12, *, saturation: float = 1.0, **options):
    """A small model on a grid of so many players, whose logits are multiplied by `saturation`."""
    size = {"image_size": tuple(4 * edge for edge in GRIDS[players])} if backbone == "vit" else {}
    model = make_model(backbone, **{"head": "votes+influence", **size, **options})
    with torch.no_grad():
        model.classifier.weight *= saturation
    return model.train()


def pixels_for(players: int, picture: str = "noise", images: int = 2) -> torch.Tensor:
    height, width = GRIDS[players]
    return PICTURES[picture]((images, 3, 4 * height, 4 * width))


def joint_loss(model, pixels: torch.Tensor, players: int, *, sums_only: bool = True):
    """The three terms with weight 1, as training adds them up; and the forward's output."""
    generator = torch.Generator().manual_seed(1)
    coalitions = sample_coalitions(len(pixels), 1, num_players=players, generator=generator)
    labels = torch.arange(len(pixels)) % model.config.num_labels
    if model.config.num_labels == 1:
        labels = labels.float()
    output = model(
        pixels, coalition_ids=coalitions_to_ids(coalitions), labels=labels, num_coalitions=2, sums_only=True
    )
    residuals = output.coalition_gains - output.coalition_attributions
    coalition = coalition_loss(output.base_values + output.coalition_gains, output.logits)
    return output.loss.float() + coalition + paired_residual_loss(residuals, players), output


def assert_finite_and_efficient(model, pixels: torch.Tensor, players: int, *, has_room: bool = True) -> None:
    """`has_room`: the dtype can hold the gradients, which only a scaled loss would keep from overflowing otherwise."""
    loss, output = joint_loss(model, pixels, players)
    loss.backward()
    assert loss.isfinite()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    assert not has_room or all(gradient.isfinite().all() for gradient in gradients.values())

    # Each structure's coalitions together are everyone: the attributions of both add up to the logits.
    explained = output.base_values + output.coalition_attributions.sum(2).squeeze(1)
    terms = output.coalition_attributions.abs().amax(2).squeeze(1) + output.logits.abs() + 1
    assert ((explained - output.logits).abs() <= 1e-5 * players**0.5 * terms).all()

    with torch.no_grad():
        plain = model.eval()(pixels)
        best = model(pixels, attributed=1)
    logits = best.logits.gather(1, best.attributed_labels)
    explained = best.base_values[best.attributed_labels] + best.attributions.sum(1)
    terms = best.attributions.abs().amax(1) + logits.abs() + 1
    assert ((explained - logits).abs() <= 1e-5 * players**0.5 * terms).all()
    gap = plain.base_values.double() + plain.attributions.double().sum(1) - plain.logits.double()
    size = plain.attributions.double().abs().sum(1) + plain.base_values.abs()
    assert (gap.abs() <= 4 * torch.finfo(torch.float32).eps * players**0.5 * size).all()


@pytest.mark.parametrize("labels", [1, 2, 1000, 10_000])
def test_any_number_of_labels(labels, backbone):
    assert_finite_and_efficient(model_for(backbone, num_labels=labels), pixels_for(12), 12)


@pytest.mark.parametrize("players", GRIDS)
@pytest.mark.parametrize("head", ["votes", "votes+influence", "recommended"])
def test_any_number_of_players(players, backbone, head):
    model = model_for(backbone, players, head=head)
    assert_finite_and_efficient(model, pixels_for(players), players)


@pytest.mark.parametrize("picture", PICTURES)
def test_any_picture(picture, backbone):
    assert_finite_and_efficient(model_for(backbone), pixels_for(12, picture), 12)


@pytest.mark.parametrize("saturation", [0.0, 1e3, 1e6, 1e12])
def test_saturated_logits(saturation, backbone):
    assert_finite_and_efficient(model_for(backbone, saturation=saturation), pixels_for(12), 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("picture", ["noise", "grey", "huge"])
@pytest.mark.parametrize("saturation", [1.0, 1e3])
def test_half_precision(dtype, picture, saturation, backbone):
    model = model_for(backbone, saturation=saturation).to(dtype)
    has_room = dtype == torch.bfloat16 or saturation == 1
    assert_finite_and_efficient(model, pixels_for(12, picture).to(dtype), 12, has_room=has_room)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backbone):
    with torch.autocast("cpu", dtype=dtype):
        assert_finite_and_efficient(model_for(backbone), pixels_for(12), 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_half_precision_are_near_single_ones(dtype, backbone):
    """Values in half precision are near those in single precision, and are given in float32."""
    model, pixels = model_for(backbone).eval(), pixels_for(12)
    coalitions = sample_coalitions(2, 8, num_players=12, generator=torch.Generator().manual_seed(2))
    expected = model.coalition_values(pixels, coalitions)
    found = model.to(dtype).coalition_values(pixels.to(dtype), coalitions)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 60 * torch.finfo(dtype).eps * expected.abs().max()


class Casts(TorchDispatchMode):
    """Counts casts of tensors of at least so many numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].numel() >= self.size:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_tokens_are_cast_twice_a_layer_under_autocast():
    """Autocast casts the tokens of a layer once for attention and once for the MLP."""
    counts = []
    for layers in (2, 4):
        model = make_model("vit", num_hidden_layers=layers, head="pooled")
        pixel_values = torch.randn(8, 3, 16, 24)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts(8 * 24 * model.config.hidden_size) as casts:
            model(pixel_values)
        counts.append(casts.count)
    # A stock layer does it four times: queries, keys and values, each for itself.
    assert counts[1] - counts[0] == 2 * 2


def train(folder, model, labels: torch.Tensor, **options) -> ShapleyTrainer:
    data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels_for(12, images=len(labels)), labels, strict=True)]
    args = ShapleyTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=1e-3,
        **options,
    )
    trainer = ShapleyTrainer(model, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def test_a_single_target_is_regressed_for_coalitions_too(backbone, tmp_path):
    """As in transformers, one label means regression: the coalitions' term is then a squared error, not 0."""
    trainer = train(tmp_path, model_for(backbone, num_labels=1), torch.randn(8))
    terms = [entry["loss_coalition"] for entry in trainer.state.log_history if "loss_coalition" in entry]
    assert len(terms) == 4
    assert all(0 < term < 1e6 for term in terms)


@pytest.fixture
def restored_determinism(monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", os.environ.get("FLASH_ATTENTION_DETERMINISTIC", ""))
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("restored_determinism")
def test_full_determinism_repeats_weights_bit_by_bit(backbone, tmp_path):
    """Full determinism gives the same weights bit by bit, whatever was drawn before."""
    dropout = {"hidden_dropout_prob": 0.1} if backbone == "vit" else {"drop_path_rate": 0.3}
    weights = []
    for disturbance in (7, 8):
        model = model_for(backbone, **dropout)
        torch.manual_seed(disturbance)
        folder = tmp_path / str(disturbance)
        weights.append(train(folder, model, torch.arange(8) % 5, full_determinism=True).model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
