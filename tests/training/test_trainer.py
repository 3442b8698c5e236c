import json
import math
import warnings

import pytest
import torch
from conftest import make_model
from test_refinement import additive_model
from torch.nn import functional as F
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_shapley import (
    ShapleyTrainer,
    ShapleyTrainingArguments,
    coalitions_to_ids,
    exact_shapley,
    importance_weights,
    paired_residual_loss,
    sample_coalitions,
)
from hf_shapley.training.digits import EVERYTHING_FLOWS


def images(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 16, 24, generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def make_trainer(tmp_path, model=None, data=None, **options) -> ShapleyTrainer:
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "logging_steps": 1, **options}
    args = ShapleyTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    trainer = ShapleyTrainer(model or make_model("vit"), args, train_dataset=data or images(), eval_dataset=images(6))
    trainer.remove_callback(PrinterCallback)
    return trainer


def rebuilt(trainer: ShapleyTrainer, cls: type[ShapleyTrainer] = ShapleyTrainer, **parts) -> ShapleyTrainer:
    """A trainer of another class or with further parts, of the same model, arguments and rows."""
    other = cls(trainer.model, trainer.args, train_dataset=trainer.train_dataset, **parts)
    other.remove_callback(PrinterCallback)
    return other


def batch_of(rows: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("value_gradient", [1.0, 0.25])
def test_the_terms_are_the_formula_image_by_image(backbone, value_gradient, tmp_path):
    """L = CE + coalition_weight * mean w CE(v, p) + shapley_weight * N * mean w (odd^2 + value_gradient even^2).

    Odd and even are half the difference and half the sum of a pair's residuals v - base - sum phi; slowly.
    """
    model = make_model(backbone, head="votes+influence").train()
    options = {
        "coalition_weight": 0.5,
        "shapley_weight": 2.0,
        "num_pairs": 2,
        "value_gradient": value_gradient,
    }
    trainer = make_trainer(tmp_path, model, per_device_train_batch_size=4, **EVERYTHING_FLOWS | options)
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(images(4))
    loss = trainer.compute_loss(model, batch)
    coalitions = trainer._draw_coalitions(model, batch, 0)  # the same again
    sums = model(**batch, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
    terms = trainer.loss_terms(sums, 24, batch["labels"], importance=importance_weights(coalitions, "spread"))
    output = model(**batch)
    by_size = [1 / (size * (24 - size)) for size in range(1, 24)]
    of_root = sum(by_size) ** -1 * sum(chance**0.5 for chance in by_size)

    coalition, shapley = [], []
    for image in range(4):
        p = output.logits[image].softmax(-1)
        for pair in torch.stack([coalitions, ~coalitions], dim=2)[image]:  # (2, 24)
            weight, gaps = of_root * by_size[int(pair[0].sum()) - 1] ** 0.5, []
            values = model.coalition_values(batch["pixel_values"][image : image + 1], pair[None])[0]
            for members, value in zip(pair, values, strict=True):
                coalition.append(weight * -(p * value.log_softmax(-1)).sum())
                gaps.append(value - model.classifier.bias - output.attributions[image][members].sum(0))
            odd, even = (gaps[0] - gaps[1]) / 2, (gaps[0] + gaps[1]) / 2
            shapley.append(weight * 24 * (odd.square() + value_gradient * even.square()).mean())
    torch.testing.assert_close(terms["classification"], F.cross_entropy(output.logits, batch["labels"]))
    torch.testing.assert_close(terms["coalition"], torch.stack(coalition).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["shapley"], torch.stack(shapley).mean(), atol=1e-5, rtol=1e-4)
    assert all(term > 0 for term in terms.values())
    regression = terms["shapley"] + terms["readout"]
    torch.testing.assert_close(loss, terms["classification"] + 0.5 * terms["coalition"] + 2.0 * regression)


def test_the_readout_term_averages_over_directions(backbone, tmp_path):
    """It is the mean, over random directions in place of the classifier's weights, of the Shapley term's odd part."""
    model = make_model(backbone, head="pooled")
    trainer = make_trainer(tmp_path, model)
    batch = batch_of(images(2))
    coalitions = sample_coalitions(2, 3, num_players=24, generator=torch.Generator().manual_seed(0))
    sums = model(**batch, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
    found = trainer.loss_terms(sums, 24, batch["labels"])["readout"]
    weight = model.classifier.weight.data
    length = weight.square().sum(-1).mean().sqrt()
    terms = []
    for direction in torch.eye(weight.shape[1]):  # the mean over an orthonormal basis is that over all directions
        weight.copy_(length * direction.expand_as(weight))
        played = model(**batch, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
        residuals = played.coalition_gains - played.coalition_attributions
        terms.append(paired_residual_loss(residuals, 24, even_weight=0.0))
    torch.testing.assert_close(found, torch.stack(terms).mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head", ["votes+influence", "pooled"])
@pytest.mark.parametrize("adapters", ["none", "frozen", "learning"])
def test_frozen_classifiers_predict_alike_while_attributions_learn(backbone, head, adapters, tmp_path):
    """A frozen classifier predicts the same while its attributions, and adapters if asked, learn."""
    size = 4 * (adapters != "none")
    model = make_model(backbone, head=head, influence_own_layers=1, coalition_adapter_size=size)
    model.freeze_classifier(adapters=adapters == "frozen")
    pixels = batch_of(images(4))["pixel_values"]
    coalitions = sample_coalitions(4, 6, num_players=24, generator=torch.Generator().manual_seed(0))

    def played() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model.eval()
        with torch.no_grad():
            output = model(pixels)
        return output.logits, model.coalition_values(pixels, coalitions), output.attributions

    before = played()
    make_trainer(tmp_path, model, num_train_epochs=3, weight_decay=0.1, learning_rate=1e-2).train()
    after = played()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) == (adapters != "learning")
    assert (before[2] - after[2]).abs().max() > 1e-2
    torch.testing.assert_close(after[2].sum(1), after[0] - model.base_values)


def test_freezing_without_an_influence_head_is_refused(backbone):
    """Freezing the classifier of attributions that are its own is refused."""
    with pytest.raises(ValueError, match="A frozen classifier needs an influence head"):
        make_model(backbone).freeze_classifier()


def test_logged_terms_add_up_to_the_logged_loss(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=2, coalition_weight=0.5, shapley_weight=2.0, shapley_warmup=0.0)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    weighted = entry["loss_classification"] + 0.5 * entry["loss_coalition"] + 2.0 * entry["loss_shapley"]
    assert entry["loss"] == pytest.approx(weighted, rel=1e-3)


SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "attribution_learning_rate": 0.1,
    "max_grad_norm": 0.0,
    **EVERYTHING_FLOWS,
}


def test_accumulated_batches_equal_one_large_batch(backbone, tmp_path):
    """Accumulating two batches of four gives the losses and weights of one batch of eight."""
    weights, losses = [], []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            tmp_path / str(size),
            make_model(backbone, head="votes+influence"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **SGD,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
        losses.append([logged(trainer, f"loss_{name}") for name in ("classification", "coalition", "shapley")])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5, rtol=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


def gradients(tmp_path, **options) -> dict[str, torch.Tensor]:
    """Gradient of the Shapley term alone."""
    config = options.pop("config", {})
    model = make_model("vit", **config).train()
    trainer = make_trainer(tmp_path, model, **options)
    batch = batch_of(images(4))
    coalitions = sample_coalitions(4, 1, num_players=24, generator=torch.Generator().manual_seed(0))
    output = model(**batch, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
    trainer.loss_terms(output, 24, batch["labels"])["shapley"].backward()
    return {name: torch.zeros(()) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("value_gradient", [0.0, 0.3, 1.0])
def test_value_gradient_scales_what_flows_through_the_values(value_gradient, tmp_path):
    """A residual is v less the attributions' sum: the gradient of one is minus the other's, but for the share."""
    trainer = make_trainer(tmp_path, value_gradient=value_gradient)
    batch = batch_of(images(4))
    coalitions = sample_coalitions(4, 2, num_players=24, generator=torch.Generator().manual_seed(0))
    output = trainer.model(**batch, coalition_ids=coalitions_to_ids(coalitions), sums_only=True)
    output.coalition_gains.retain_grad()
    output.coalition_attributions.retain_grad()
    trainer.loss_terms(output, 24, batch["labels"])["shapley"].backward()
    of_attributions = output.coalition_attributions.grad
    of_values = torch.zeros_like(of_attributions) if value_gradient == 0 else output.coalition_gains.grad
    assert of_attributions.abs().max() > 0
    torch.testing.assert_close(of_values, -value_gradient * of_attributions)


@pytest.mark.parametrize("head", ["votes", "pooled"])
def test_a_learning_fraction_averages_to_everyones_gradient(backbone, head, tmp_path):
    """A fraction that learns through the values gives everyone's gradient on average."""
    model = make_model(backbone, head=head).train()
    trainer = make_trainer(tmp_path, model, value_gradient=0.4)
    batch, num_players = batch_of(images(4)), 24
    coalitions = sample_coalitions(4, 2, num_players=num_players, generator=torch.Generator().manual_seed(0))

    def gradients(first: int, count: int) -> dict[str, torch.Tensor]:
        """Of coalition and Shapley term, when `count` images learn through the values, from image `first` on."""
        order = torch.arange(4).roll(-first)
        turned = {name: tensor[order] for name, tensor in batch.items()}
        ids = coalitions_to_ids(coalitions[order])
        output = model(**turned, coalition_ids=ids, sums_only=True, num_with_gradient=count)
        terms = trainer.loss_terms(output, num_players, turned["labels"], count)
        model.zero_grad()
        (2 * terms["coalition"] + terms["shapley"]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    everyone = gradients(0, 4)
    parts = [gradients(first, 1) for first in range(4)]
    for name, gradient in everyone.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(mean, gradient, atol=1e-6, rtol=1e-4)


def test_the_shapley_term_leaves_detached_votes_alone(tmp_path):
    config = {"head": "votes+influence"}
    found = gradients(tmp_path, value_gradient=0.0, config=config)
    reached = {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert reached and all(name.startswith("attribution_head.") for name in reached)
    # With the gradient through the values, classifier and backbone learn too.
    assert gradients(tmp_path, value_gradient=1.0, config=config)["classifier.weight"].abs().max() > 0


def test_the_shapley_term_leaves_base_values_alone(tmp_path):
    """The base values get no gradient from the Shapley term while values are detached."""
    assert gradients(tmp_path, value_gradient=0.0)["classifier.bias"].abs().max() == 0


def test_a_frozen_classifiers_adapters_and_head_learn(backbone, tmp_path):
    model = make_model(backbone, head="adapted").train()
    model.freeze_classifier()
    trainer = make_trainer(tmp_path, model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, batch_of(images(4))).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    own = {
        name for name, _ in model.named_parameters() if name.startswith(("attribution_head.", "coalition_adapters."))
    }
    assert found.keys() == own
    assert all(found[name].any() for name in own if name.endswith(("up.weight", "correction.weight")))


@pytest.mark.parametrize(
    ("head", "frozen", "pairs", "value_gradient"),
    [("pooled", False, 1, 0.1), ("pooled", True, 4, 0.1), ("adapted", False, 1, 0.03), ("adapted", True, 4, 0.03)],
)
def test_what_is_not_given_suits_the_model(head, frozen, pairs, value_gradient, tmp_path):
    model = make_model("vit", head=head)
    if frozen:
        model.freeze_classifier()
    trainer = make_trainer(tmp_path, model, learning_rate=1e-3)
    found = (trainer.num_pairs, trainer.value_gradient, trainer.attribution_learning_rate)
    assert found == (pairs, value_gradient, pytest.approx(8e-3))
    given = make_trainer(tmp_path, model, num_pairs=2, value_gradient=0.0, attribution_learning_rate=1e-2)
    assert (given.num_pairs, given.value_gradient, given.attribution_learning_rate) == (2, 0.0, 1e-2)


def test_the_attribution_head_may_have_another_rate(tmp_path):
    """The attribution head may learn at a rate of its own, its weights decaying as in the stock trainer."""
    model = make_model("vit", head="votes+influence")
    args = ShapleyTrainingArguments(
        str(tmp_path), learning_rate=1e-3, attribution_learning_rate=5e-3, weight_decay=0.1, use_cpu=True
    )
    optimizer = ShapleyTrainer(model, args).create_optimizer()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    stock = Trainer(make_model("vit"), TrainingArguments(str(tmp_path), use_cpu=True))
    decaying = stock.get_decay_parameter_names(model)
    assert rates == {
        id(parameter): (5e-3 if name.startswith("attribution_head.") else 1e-3, 0.1 if name in decaying else 0.0)
        for name, parameter in model.named_parameters()
    }


def test_the_head_may_learn_on_alone(backbone, tmp_path):
    model = make_model(backbone, head="pooled")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attribution_head." in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"coalition_weight": 0.0, "value_gradient": 0.0, "attribution_learning_rate": 1e-2}
    make_trainer(tmp_path, model, num_pairs=2, **options).train()
    learned = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "attribution_head.correction.weight" in learned
    assert all(name.startswith("attribution_head.") for name in learned)


def test_the_shapley_weight_warms_up_as_asked(tmp_path):
    """The weight of the Shapley term warms up over its fraction of the steps."""
    trainer = make_trainer(tmp_path, num_train_epochs=4, shapley_weight=2.0, shapley_warmup=0.5)
    trainer.train()
    assert logged(trainer, "shapley_weight") == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_only_the_asked_fraction_learns_through_values(tmp_path):
    """A fraction of the batch learns through the values, and all of it plays coalitions."""
    trainer = make_trainer(tmp_path, value_gradient_fraction=0.25, num_pairs=3)
    asked = []

    def note(model, args, kwargs):
        asked.append((tuple(kwargs["coalition_ids"].shape), kwargs["num_with_gradient"]))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert asked == [((8, 3, 24), 2)] * 2


def test_a_resumed_run_ends_as_an_uninterrupted_one(backbone, tmp_path):
    def run(folder, **options):
        return make_trainer(folder, make_model(backbone), num_train_epochs=4, save_strategy="steps", **options)

    whole = run(tmp_path / "whole", save_steps=3)
    whole.train()
    resumed = run(tmp_path / "resumed", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=4,
        learning_rate=0.05,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses[:-1]) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def measured(trainer) -> dict[str, float]:
    """What an evaluation says of the attribution error."""
    return {name: value for name, value in trainer.evaluate().items() if "attribution_error" in name}


def test_evaluation_measures_first_images_attribution_error(tmp_path):
    """4 players: all 16 coalitions are asked, so it is the enumerated error over the variance, of predicted labels."""
    model = make_model("vit", image_size=(8, 8))
    rows = [{**row, "pixel_values": row["pixel_values"][:, :8, :8]} for row in images(6)]
    trainer = make_trainer(tmp_path, model, attribution_error_images=4, per_device_eval_batch_size=3)
    trainer.eval_dataset = rows
    pixels = batch_of(rows)["pixel_values"][:4]
    with torch.no_grad():
        outputs = model(pixels, attributed=1)
    errors, variances = [], []
    for x, label, found in zip(pixels, outputs.attributed_labels, outputs.attributions, strict=True):
        exact = exact_shapley(lambda c, x=x: model.coalition_values(x[None], c[None])[0], num_players=4)[:, label]
        errors.append((exact - found).square().mean())
        variances.append(exact.var(correction=0))
    expected = (sum(errors) / sum(variances)).item()
    found = measured(trainer)
    assert found["eval_attribution_error"] == pytest.approx(expected, rel=1e-3)
    assert found["eval_attribution_error_low"] < expected < found["eval_attribution_error_high"]
    assert "test_attribution_error" not in trainer.predict(rows).metrics


def test_the_evaluated_attribution_error_leaves_no_trace(tmp_path):
    """It is 0 for an additive game, the same each time, and draws nothing from the global generator."""
    states, model = [], additive_model()
    for count in (0, 3):
        trainer = make_trainer(tmp_path, model, attribution_error_images=count)
        torch.manual_seed(0)
        found = measured(trainer)
        states.append(torch.get_rng_state())
        assert len(found) == count and all(abs(value) < 1e-6 for value in found.values())
    assert measured(trainer) == found
    assert torch.equal(states[0], states[1])


def test_the_least_attribution_error_is_the_best_model(tmp_path):
    """The stock rule, greater is better, would choose the worst."""
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=3,
        learning_rate=0.05,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="attribution_error",
        attribution_error_images=4,
    )
    trainer.train()
    errors = logged(trainer, "eval_attribution_error")
    assert len(set(errors)) == 3
    assert trainer.state.best_metric == min(errors)
    assert measured(trainer)["eval_attribution_error"] == pytest.approx(min(errors), rel=1e-4)


def test_unmeasurable_attribution_errors_end_no_training(tmp_path, caplog):
    """A model that sees nothing has Shapley values without variance: the log says so, and the number is none."""
    model = make_model("vit")
    torch.nn.init.zeros_(model.classifier.weight)
    found = measured(make_trainer(tmp_path, model, attribution_error_images=3))
    assert len(found) == 3 and all(math.isnan(value) for value in found.values())
    assert "The attribution error could not be measured: The variance of the Shapley values" in caplog.text


@pytest.mark.parametrize("options", [{"attribution_error_images": 1}, {"metric_for_best_model": "attribution_error"}])
def test_too_few_images_for_the_error_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="`attribution_error_images` must be at least 2"):
        ShapleyTrainingArguments(str(tmp_path), **options)


def test_resuming_from_another_models_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path / "convnext", make_model("convnext"), save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path / "vit", make_model("vit"))
    with pytest.raises(ValueError, match="does not fit the model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "convnext" / "checkpoint-1"))


def test_coalitions_differ_by_step_and_seed_only(tmp_path):
    """Coalitions differ between steps and seeds, but not between runs."""

    def draws(seed):
        trainer = make_trainer(tmp_path, seed=seed)
        trainer.current_gradient_accumulation_steps = 1
        found = []
        for step in range(3):
            trainer.state.global_step = step
            batch = batch_of(images(8))
            found.append(trainer._draw_coalitions(trainer.model, batch, 0))
        return torch.stack(found)

    first = draws(0)
    assert torch.equal(first, draws(0))
    assert not torch.equal(first, draws(1)) and not torch.equal(first[0], first[1])


def test_evaluation_gives_plain_logits_to_compute_metrics(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = []
    trainer.compute_metrics = lambda p: seen.append(p.predictions) or {"accuracy": 0.5}
    metrics = trainer.evaluate()
    assert seen[0].shape == (6, 5) and metrics["eval_accuracy"] == 0.5
    with torch.no_grad():
        expected = trainer.model(batch_of(images(6))["pixel_values"]).logits
    torch.testing.assert_close(torch.tensor(seen[0]), expected)


def test_label_smoothing_is_that_of_cross_entropy(tmp_path):
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.2)
    trainer.train()
    assert logged(trainer, "loss_classification")[0] > 0
    batch = batch_of(images(4))
    output = trainer.model(**batch)
    smoothed = trainer._classification_loss(output, batch["labels"])
    torch.testing.assert_close(smoothed, F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.2))


def test_multi_label_classification_trains(tmp_path):
    data = [{**row, "labels": F.one_hot(row["labels"], 5).float()} for row in images()]
    model = make_model("vit", problem_type="multi_label_classification")
    trainer = make_trainer(tmp_path, model, data)
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "loss_coalition"))


def mixed(count: int = 16) -> list[dict]:
    """Rows whose labels are probabilities, as MixUp makes them."""
    rows = images(count)
    hot = [F.one_hot(row["labels"], 5).float() for row in rows]
    mixes = [0.7 * own + 0.3 * other for own, other in zip(hot, hot[1:] + hot[:1], strict=True)]
    return [{"pixel_values": row["pixel_values"], "labels": mix} for row, mix in zip(rows, mixes, strict=True)]


def cross_entropy_of_all(outputs, labels, num_items_in_batch=None):
    """A loss as the Trainer wants it: summed, over the number of labels in the whole optimizer step."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def test_a_callers_loss_leaves_the_problem_alone(tmp_path):
    """With `compute_loss_func` labels do not reach the model, as in `Trainer`: its scores stay those of a softmax."""
    given = []

    def loss(outputs, labels, num_items_in_batch=None):
        given.append((outputs.loss, labels.shape))
        return F.cross_entropy(outputs.logits, labels)

    trainer = make_trainer(tmp_path, data=mixed(), value_gradient_fraction=1.0)
    trainer.compute_loss_func = loss
    batch = batch_of(mixed(4))
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model.train(), batch)
    assert given == [(None, (4, 5))] and "labels" in batch
    assert trainer.model.config.problem_type is None
    coalitions = trainer._draw_coalitions(trainer.model, batch, 0)
    output = trainer.model(batch["pixel_values"], coalitions_to_ids(coalitions), sums_only=True)
    log_p = (output.base_values + output.coalition_gains).log_softmax(-1)  # (4, 1, 2, 5)
    losses = -(output.logits.softmax(-1)[:, None, None] * log_p).sum(-1)  # (4, 1, 2)
    expected = (importance_weights(coalitions, "spread").unsqueeze(-1) * losses).mean()
    torch.testing.assert_close(trainer._term_sums["coalition"], expected.detach())


def test_probabilities_as_labels_are_a_single_label_problem(tmp_path):
    """Where `problem_type` says so, probabilities are learned by cross-entropy, in training and in evaluation."""
    model = make_model("vit", problem_type="single_label_classification")
    trainer = make_trainer(tmp_path, model, mixed())
    trainer.eval_dataset = mixed(6)
    batch = batch_of(mixed(6))
    with torch.no_grad():
        expected = -(batch["labels"] * model(batch["pixel_values"]).logits.log_softmax(-1)).sum(-1).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert model.config.problem_type == "single_label_classification"
    assert all(value > 0 for value in logged(trainer, "loss_coalition"))


def test_callers_losses_accumulate_as_the_joint_loss(tmp_path):
    """Two batches of four with `num_items_in_batch` give the terms and the weights of one batch of eight."""
    weights, losses = [], []
    for size, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = rebuilt(make_trainer(tmp_path / str(size), **options, **SGD), compute_loss_func=cross_entropy_of_all)
        trainer.train()
        weights.append(trainer.model.state_dict())
        losses.append([logged(trainer, name) for name in ("loss", "loss_classification", "loss_shapley")])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5, rtol=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


def test_one_label_without_problem_type_means_regression(tmp_path):
    """With a caller's loss a model of one label learns masked predictions by their squared error, as regression."""
    data = [{**row, "labels": row["labels"].float()} for row in images()]
    trainer = make_trainer(tmp_path, make_model("vit", num_labels=1), data)
    trainer.compute_loss_func = lambda outputs, labels, **_: F.mse_loss(outputs.logits[:, 0], labels)
    trainer.train()
    assert trainer.model.config.problem_type is None
    assert all(value > 0 for value in logged(trainer, "loss_coalition"))


def recorded(trainer: ShapleyTrainer) -> list[torch.Tensor]:
    """Where the coalition ids of every forward will be."""
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["coalition_ids"]), with_kwargs=True
    )
    return seen


def doubled(rows: list[dict]) -> dict:
    """A collator that shows each image twice, as repeated augmentation does."""
    return batch_of([row for row in rows for _ in range(2)])


def test_larger_batches_have_coalitions_for_all_images(tmp_path):
    """A collator that repeats images: each copy has its own coalitions, the same in every run."""
    seen = []
    for _ in range(2):
        trainer = rebuilt(make_trainer(tmp_path, max_steps=1), data_collator=doubled)
        ids = recorded(trainer)
        trainer.train()
        seen += ids
    assert seen[0].shape == (16, 1, 24)
    assert len(seen[0].unique(dim=0)) == 16
    assert torch.equal(seen[0], seen[1])


def test_larger_batches_accumulate_as_one(tmp_path):
    """Two batches of four, each doubled by the collator, have the coalitions of one batch of eight, doubled."""
    seen = []
    for size, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = rebuilt(make_trainer(tmp_path, max_steps=1, **options), data_collator=doubled)
        ids = recorded(trainer)
        trainer.train()
        seen.append(torch.cat(ids))
    assert torch.equal(*seen)


class OwnLoss(ShapleyTrainer):
    """As Hugging Face's documentation shows it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class MoreLoss(ShapleyTrainer):
    """Adds to the joint loss, of which it asks twice."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        once = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return once + super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_that_forgets_the_explanation_warns_once(tmp_path):
    trainer = make_trainer(tmp_path)
    for cls, warned in ((OwnLoss, True), (MoreLoss, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rebuilt(trainer, cls).train()
        messages = [str(entry.message) for entry in caught if "compute_loss" in str(entry.message)]
        assert len(messages) == warned
        assert all("OwnLoss.compute_loss" in text and "compute_loss_func" in text for text in messages)


class Interrupted(TrainerCallback):
    """Raises once, in the middle of an optimizer step."""

    def __init__(self, error: BaseException):
        self.errors = [error]

    def on_substep_end(self, *_, **__):
        if self.errors:
            raise self.errors.pop()


TWO_BATCHES = {"gradient_accumulation_steps": 2, "max_steps": 1}


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_run_draws_what_the_first_did(stopped, tmp_path):
    """After a whole run, and after Ctrl-C within a step, terms and coalitions are those of a first run."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4, learning_rate=0.0, **TWO_BATCHES)
    seen = recorded(trainer)
    trainer.train()
    wanted, terms = torch.cat(seen), logged(trainer, "loss_shapley")
    if stopped:
        trainer.add_callback(Interrupted(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    seen.clear()
    trainer.train()
    assert torch.equal(torch.cat(seen), wanted)
    assert logged(trainer, "loss_shapley") == pytest.approx(terms)


def test_a_batch_shrunk_for_memory_draws_anew(tmp_path):
    """`auto_find_batch_size`: the run with batches of three is the one that starts with three."""
    options = {"per_device_train_batch_size": 3, **TWO_BATCHES}
    trainer = make_trainer(tmp_path, **options)
    wanted = recorded(trainer)
    trainer.train()
    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True, **TWO_BATCHES}
    trainer = make_trainer(tmp_path, **options)
    trainer.add_callback(Interrupted(RuntimeError("CUDA out of memory.")))
    seen = recorded(trainer)
    trainer.train()
    assert [len(ids) for ids in seen] == [4, 3, 3]
    assert torch.equal(torch.cat(seen[1:]), torch.cat(wanted))


def test_the_stock_trainer_trains_our_model(tmp_path):
    model = make_model("vit")
    before = model.classifier.weight.clone()
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, num_train_epochs=1, dataloader_pin_memory=False
    )
    trainer = Trainer(model, args, train_dataset=images())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert not torch.equal(before, model.classifier.weight)


def test_arguments_survive_command_line_and_json(tmp_path):
    """Arguments parse from a command line and survive JSON."""
    (args,) = HfArgumentParser(ShapleyTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--shapley_weight", "0.25", "--value_gradient", "0.5", "--use_cpu"]
    )
    assert args.shapley_weight == 0.25 and args.value_gradient == 0.5 and args.num_pairs is None
    assert json.loads(args.to_json_string())["shapley_weight"] == 0.25


@pytest.mark.parametrize(
    "option",
    [
        {"shapley_weight": -1.0},
        {"coalition_weight": float("nan")},
        {"shapley_warmup": 1.5},
        {"value_gradient": 2.0},
        {"num_pairs": 0},
        {"value_gradient_fraction": 0.0},
        {"attribution_learning_rate": 0.0},
    ],
)
def test_bad_arguments_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ShapleyTrainingArguments(output_dir=str(tmp_path), **option)


def test_other_models_arguments_and_batches_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a Shapley image classifier"):
        make_trainer(
            tmp_path, ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        )
    with pytest.raises(TypeError, match="must be ShapleyTrainingArguments"):
        ShapleyTrainer(make_model("vit"), TrainingArguments(str(tmp_path), use_cpu=True))
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in images()]
    with pytest.raises(ValueError, match="`pixel_values` and `labels` in each batch"):
        make_trainer(tmp_path, data=unlabelled).train()


@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_that_are_text_are_refused_by_name(column, tmp_path):
    """transformers' collator leaves text out, or fails on it: the message says what came and how to number it."""
    data = [{"pixel_values": row["pixel_values"], column: "cat"} for row in images()]
    with pytest.raises(ValueError, match=rf"`{column}` must hold ids of labels, got the text 'cat'.*ClassLabel"):
        make_trainer(tmp_path, data=data).train()
