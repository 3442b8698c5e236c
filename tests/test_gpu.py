"""On a CUDA device: the numbers of a CPU, no waiting for the device within a step, mixed precision, compiled too."""

import pytest
import torch
from conftest import make_model
from PIL import Image
from transformers import ViTImageProcessorPil, pipeline

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    coalitions_to_ids,
    kernel_shapley,
    sample_coalitions,
)
from hf_shapley.faithfulness.certificate import attribution_error_certificate
from hf_shapley.faithfulness.curves import insertion_deletion
from hf_shapley.models.pipeline_shapley import TASK
from hf_shapley.training.digits import EVERYTHING_FLOWS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

# Options of the model and of the training arguments.
RECIPES = {
    "votes": ({"head": "votes"}, EVERYTHING_FLOWS),
    "recommended": ({"head": "recommended"}, {}),
    "adapted": ({"head": "adapted"}, {}),
}


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions of a GPU round to TF32 unless they are told not to."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(params=RECIPES)
def recipe(request) -> tuple[dict, dict]:
    return RECIPES[request.param]


def batch(device: str = "cuda") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(8, 3, 16, 24, generator=generator)
    return {"pixel_values": pixel_values.to(device), "labels": torch.arange(8, device=device) % 5}


def structures(device: str = "cuda") -> dict:
    coalitions = sample_coalitions(8, 2, num_players=24, generator=torch.Generator().manual_seed(2))
    return {"coalition_ids": coalitions_to_ids(coalitions).to(device), "num_coalitions": 2}


def gradients(model, device: str, forward=None) -> dict[str, torch.Tensor]:
    """Of a loss that everything takes part in, on the CPU."""
    model.zero_grad()
    output = (model if forward is None else forward)(
        **batch(device), **structures(device), sums_only=True, num_with_gradient=5
    )
    residuals = output.coalition_gains - output.coalition_attributions
    (output.loss + residuals.square().mean() + output.coalition_attributions.square().mean()).backward()
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def make_trainer(model, folder, **options) -> ShapleyTrainer:
    images = [{name: tensor[index] for name, tensor in batch("cpu").items()} for index in range(8)]
    args = ShapleyTrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, logging_steps=2, save_steps=3, report_to=[], **options
    )
    return ShapleyTrainer(model, args, train_dataset=images * 4, eval_dataset=images)


def test_it_explains_as_on_a_cpu(model):
    pixel_values = batch("cpu")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values, **structures("cpu"))
        found = model.cuda()(pixel_values.cuda(), **structures())
    for name in ("logits", "base_values", "attributions", "coalition_votes"):
        torch.testing.assert_close(found[name].cpu(), expected[name], atol=1e-5, rtol=1e-4)
    gap = found.base_values + found.attributions.sum(1) - found.logits
    assert gap.abs().max() < 1e-5


def test_gradients_are_those_of_a_cpu(backbone, recipe):
    model = make_model(backbone, **recipe[0]).train()
    expected = gradients(model, "cpu")
    found = gradients(model.cuda(), "cuda")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_step_never_waits_for_the_device(backbone, recipe, tmp_path):
    model_options, training_options = recipe
    model = make_model(backbone, **model_options).train()
    trainer = make_trainer(model, tmp_path, bf16=True, **training_options)
    trainer.current_gradient_accumulation_steps = 1
    inputs = {name: tensor[:4] for name, tensor in batch().items()}
    trainer.compute_loss(model, inputs).backward()  # with what is done once
    trainer.state.global_step += 1
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_goes_on_where_it_stopped(backbone, recipe, precision, tmp_path):
    model_options, training_options = recipe
    options = training_options | ({} if precision == "fp32" else {precision: True})
    make_trainer(make_model(backbone, **model_options).train(), tmp_path, **options).train()
    resumed = make_trainer(make_model(backbone, seed=1, **model_options).train(), tmp_path, **options)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert result.global_step == 6
    weights = resumed.model.state_dict()
    assert all(tensor.device.type == "cuda" and tensor.isfinite().all() for tensor in weights.values())
    assert resumed.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_attributions_add_up(model, dtype):
    model = model.cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        found = model(batch()["pixel_values"])
    expected = model(batch()["pixel_values"])
    size = found.attributions.abs().sum(1) + found.logits.abs() + 1
    assert ((found.base_values + found.attributions.sum(1) - found.logits).abs() <= 1e-5 * size).all()
    error = (found.attributions - expected.attributions).norm() / expected.attributions.norm()
    assert error < 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_it_trains_and_explains_the_same(backbone, recipe):
    torch.compiler.reset()
    model = make_model(backbone, **recipe[0]).train().cuda()
    expected = gradients(model, "cuda")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    found = gradients(model, "cuda", compiled)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-3, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}"
        )
    model.eval()
    with torch.no_grad():
        found, expected = (each(batch()["pixel_values"]).attributions for each in (compiled, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_estimates_metrics_and_certificate_stay_on_the_device(backbone):
    model = make_model(backbone, head="votes+influence").cuda()
    images = batch()["pixel_values"][:2]

    def game_of(image):
        return lambda coalitions: model.coalition_values(image[None], coalitions[None])[0]

    generator = torch.Generator("cuda").manual_seed(0)
    estimate = kernel_shapley(game_of(images[0]), num_players=24, budget=512, generator=generator).values
    with torch.no_grad():
        output = model(images)
        curves = insertion_deletion(lambda coalitions: model.coalition_values(images, coalitions), output.attributions)
        certificate = attribution_error_certificate(
            map(game_of, images), output.attributions, budget=512, generator=generator
        )
    torch.testing.assert_close(estimate.sum(0), (output.logits - output.base_values)[0], atol=1e-4, rtol=1e-4)
    assert estimate.is_cuda
    assert curves.insertion_auc.is_cuda
    assert certificate.evaluations == 2 * 512


def test_the_pipeline_explains_on_the_device(backbone, tmp_path):
    make_model(backbone, head="votes+influence").save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    picture = Image.effect_noise((24, 16), 64).convert("RGB")
    expected, found = (
        pipeline(TASK, model=str(tmp_path), image_processor=processor, device=device)(picture, top_k=1)[0]
        for device in ("cpu", "cuda:0")
    )
    assert found["label"] == expected["label"]
    torch.testing.assert_close(
        torch.tensor(found["attributions"]), torch.tensor(expected["attributions"]), atol=1e-5, rtol=1e-4
    )
