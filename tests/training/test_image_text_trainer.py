"""Training models of image and text: the joint loss's terms, the draws of words, and that it learns."""

import math

import pytest
import torch
from test_image_and_text import KINDS, PATCHES, WORDS, full_text, pair, pixels, sizes, texts
from torch.nn import functional as F
from transformers import PrinterCallback

from hf_shapley import (
    ShapleyImageTextTrainer,
    ShapleyTrainingArguments,
    enumerate_coalitions,
    exact_shapley,
    image_text_terms,
    sample_coalitions,
    shapley_kernel_size_probabilities,
)
from hf_shapley.training.image_text import word_coalitions


def rows(name: str, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Pairs of random images and texts of one to four words."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for image in torch.randn(count, 3, 12, 12, generator=generator):
        length = int(torch.randint(1, 5, (1,), generator=generator))
        words = torch.randint(3, 18, (length,), generator=generator).tolist()
        ids = [18, *words, 19] if name == "clip" else words
        pad = 0 if name == "clip" else 1
        ids = torch.tensor(ids + [pad] * (7 - len(ids)))
        row = {"pixel_values": image, "input_ids": ids}
        found.append({**row, "attention_mask": (ids != 0).long()} if name == "clip" else row)
    return found


def make_trainer(tmp_path, name: str, model=None, **options) -> ShapleyImageTextTrainer:
    torch.manual_seed(0)
    kind = KINDS[name]
    model = model or kind.model(kind.config(**sizes(kind)))
    args = ShapleyTrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy=options.pop("save_strategy", "no"),
        per_device_train_batch_size=8,
        logging_steps=1,
        **options,
    )
    trainer = ShapleyImageTextTrainer(model, args, train_dataset=rows(name), eval_dataset=rows(name, 6))
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(params=KINDS)
def name(request) -> str:
    return request.param


def played(name: str):
    """A model's output under coalitions of both sides, and what those were; float64."""
    ours, _ = pair(name, torch.double)
    generator = torch.Generator().manual_seed(7)
    patches = sample_coalitions(2, 3, num_players=PATCHES, generator=generator)
    words = sample_coalitions(2, 3, num_players=WORDS, generator=generator)
    given = {"pixel_values": pixels(2, torch.double), **texts(name), "return_loss": True}
    output = ours(**given, image_coalitions=patches, text_coalitions=words)
    return ours, output, patches, words


@pytest.mark.parametrize("value_gradient", [1.0, 0.25])
@torch.no_grad()
def test_the_terms_are_the_formula_by_hand(name, value_gradient):
    """The mean over sides, pairs and embeddings of: CE with the full similarities; N odd^2 and even^2. Slowly."""
    ours, output, patches, words = played(name)
    weights = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(8))
    scale = ours.logit_scale.exp()
    bias = ours.logit_bias if name == "siglip" else None
    counts = torch.tensor([4, 2])
    terms = image_text_terms(
        output,
        patches,
        words,
        importance=(weights[0], weights[1]),
        num_words=counts,
        scale=scale,
        bias=bias,
        value_gradient=value_gradient,
    )
    expected = dict.fromkeys(("coalition", "shapley", "readout"), 0.0)
    for side in (0, 1):
        embeds = (output.image_coalition_embeds, output.text_coalition_embeds)[side]
        others = (output.text_embeds, output.image_embeds)[side]
        logits = (output.logits_per_image, output.logits_per_text)[side]
        for row in range(2):
            base = (output.image_base_embeds, output.text_base_embeds[row])[side]
            phi = (output.image_attributions[row], output.text_attributions[row])[side]
            for draw in range(3):
                present = (patches, words)[side][row, draw]
                residuals = []
                for half, members in enumerate((present, ~present)):
                    values = scale * others @ embeds[row, draw, half] + (0 if bias is None else bias)
                    if bias is None:
                        loss = F.cross_entropy(values, logits[row].softmax(-1))
                    else:
                        loss = F.binary_cross_entropy_with_logits(values, logits[row].sigmoid())
                    expected["coalition"] += weights[side, row, draw] * loss / 24
                    residuals.append(embeds[row, draw, half] - base - phi[members].sum(0))
                players = (PATCHES, counts[row])[side]
                odd, even = (residuals[0] - residuals[1]) / 2, (residuals[0] + residuals[1]) / 2
                factor = weights[side, row, draw] * players / 12
                of_odd, of_even = (scale * others @ part for part in (odd, even))
                expected["shapley"] += factor * (of_odd.square().mean() + value_gradient * of_even.square().mean())
                expected["readout"] += factor * (scale * odd).square().mean()
    assert terms["contrastive"] == output.loss
    for key, value in expected.items():
        assert value > 1e-3
        torch.testing.assert_close(terms[key], value.squeeze().to(terms[key].dtype), atol=1e-6, rtol=1e-6)


def test_exact_values_minimise_the_regression(name):
    """At the exact Phi and Psi the gradient over all coalitions, by the kernel, pushes all players alike."""
    ours, output, _, _ = played(name)
    one = {"pixel_values": pixels(1, torch.double), "input_ids": full_text(name)[None], "return_loss": True}
    coalitions, importance = [], []
    for players in (PATCHES, WORDS):
        each = enumerate_coalitions(players)[2::2]  # one of each pair; row 0 is the empty coalition
        each_size = each.sum(1)
        law = shapley_kernel_size_probabilities(players)[each_size - 1]
        coalitions.append(each[None])
        importance.append((law / torch.tensor([math.comb(players, int(k)) for k in each_size]))[None])
    with torch.no_grad():
        output = ours(**one, image_coalitions=coalitions[0], text_coalitions=coalitions[1])
    phi = exact_shapley(ours.image_game(one["pixel_values"][0]), num_players=PATCHES)[None].requires_grad_()
    psi = exact_shapley(ours.text_game(full_text(name)), num_players=WORDS)[None].requires_grad_()
    output.image_attributions, output.text_attributions = phi, psi
    terms = image_text_terms(
        output,
        *coalitions,
        importance=tuple(importance),
        num_words=torch.tensor([WORDS]),
        scale=ours.logit_scale.detach().exp(),
        bias=ours.logit_bias.detach() if name == "siglip" else None,
    )
    for term in ("shapley", "readout"):
        for gradient in torch.autograd.grad(terms[term], (phi, psi), retain_graph=True):
            apart = gradient - gradient.mean(1, keepdim=True)
            torch.testing.assert_close(apart, torch.zeros_like(apart), atol=1e-12, rtol=0)
    wrong = phi.detach().roll(1, 1).requires_grad_()
    output.image_attributions = wrong
    terms = image_text_terms(
        output,
        *coalitions,
        importance=tuple(importance),
        num_words=torch.tensor([WORDS]),
        scale=ours.logit_scale.detach().exp(),
    )
    (gradient,) = torch.autograd.grad(terms["readout"], wrong)
    assert (gradient - gradient.mean(1, keepdim=True)).abs().max() > 1e-6


def test_words_are_drawn_by_their_law():
    """Of each text's own words: sizes by the spread law within 5e-3, members uniform, weights 1 on average."""
    counts = torch.tensor([1, 2, 5, 7])
    generator = torch.Generator().manual_seed(9)
    uniform = torch.rand(4, 100_000, generator=generator, dtype=torch.float64)
    coalitions, weights = word_coalitions(uniform, torch.rand(4, 100_000, 9, generator=generator), counts)
    assert coalitions.shape == (4, 100_000, 7)
    for row, count in enumerate(counts.tolist()):
        assert not coalitions[row, :, count:].any()
        if count == 1:
            assert not weights[row].any()
            continue
        kernel = shapley_kernel_size_probabilities(count)
        spread = kernel.sqrt() / kernel.sqrt().sum()
        found = coalitions[row].sum(1).bincount(minlength=count)[1:count] / 100_000
        torch.testing.assert_close(found.double(), spread, atol=5e-3, rtol=0)
        members = coalitions[row, :, :count].double().mean(0)
        torch.testing.assert_close(members, members.mean().expand(count), atol=5e-3, rtol=0)
        torch.testing.assert_close(weights[row].mean(), torch.tensor(1.0), atol=5e-3, rtol=0)


def test_training_learns_and_logs_every_term(name, tmp_path):
    """All weights move, and each term is in the log, not 0; evaluation gives the stock loss."""
    trainer = make_trainer(tmp_path, name, num_train_epochs=2, learning_rate=1e-3, shapley_warmup=0.0)
    before = {key: weight.clone() for key, weight in trainer.model.named_parameters()}
    trainer.train()
    terms = ("loss_contrastive", "loss_coalition", "loss_shapley", "loss_readout")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(entry[term] > 0 for entry in logs for term in terms)
    moved = {key for key, weight in trainer.model.named_parameters() if not torch.equal(weight, before[key])}
    assert {key.split(".")[0] for key in before} == {key.split(".")[0] for key in moved}
    batch = {key: torch.stack([row[key] for row in rows(name, 6)]) for key in rows(name, 1)[0]}
    expected = trainer.model.eval()(**batch, return_loss=True).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_frozen_model_learns_to_explain(name, tmp_path):
    """Embeddings stay, to the bit, and the regression's loss on the training rows falls to under 0.7 of its start."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = kind.model(kind.config(**sizes(kind)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.image_attribution_head.correction.weight.zero_()
        model.text_attribution_head.correction.weight.zero_()
    model.freeze_embeddings()
    before = model.eval()(pixel_values=pixels(), **texts(name)).logits_per_image
    trainer = make_trainer(tmp_path, name, model, num_train_epochs=12, attribution_learning_rate=1e-2)
    trainer.train()
    assert torch.equal(model.eval()(pixel_values=pixels(), **texts(name)).logits_per_image, before)
    losses = [entry["loss_shapley"] for entry in trainer.state.log_history if "loss_shapley" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_words_drawn_follow_the_seed_alone(tmp_path):
    """And the step, and the place in the global batch: whatever torch's own generator has done meanwhile."""
    trainer = make_trainer(tmp_path, "clip")
    trainer.current_gradient_accumulation_steps = 1
    batch = {key: torch.stack([row[key] for row in rows("clip", 8)]) for key in ("input_ids", "attention_mask")}

    def drawn(micro_step: int = 0) -> torch.Tensor:
        torch.rand(1)
        return trainer._draw_words(trainer.model, batch, micro_step)[0]

    assert torch.equal(drawn(), drawn()) and not torch.equal(drawn(), drawn(micro_step=1))
    first = drawn()
    trainer.state.global_step = 1
    assert not torch.equal(first, drawn())


def test_what_it_cannot_train_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model of image and text"):
        ShapleyImageTextTrainer(torch.nn.Linear(1, 1), ShapleyTrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="`attribution_error_images`"):
        make_trainer(tmp_path, "clip", attribution_error_images=4)
    trainer = make_trainer(tmp_path, "clip")
    with pytest.raises(ValueError, match="as many `pixel_values` as `input_ids`"):
        trainer.compute_loss(trainer.model.train(), {"pixel_values": pixels()})


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = make_trainer(tmp_path / "whole", "clip", num_train_epochs=2)
    whole.train()
    options = {"num_train_epochs": 2, "save_steps": 3, "save_strategy": "steps"}
    make_trainer(tmp_path / "stopped", "clip", **options).train()
    resumed = make_trainer(tmp_path / "stopped", "clip", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key
