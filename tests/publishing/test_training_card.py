"""A trainer's card tells what the run knows, and never replaces a card that somebody wrote."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import PrinterCallback

from hf_shapley import ShapleyTrainer, ShapleyTrainingArguments
from hf_shapley.models.heads import ZeroLinear
from hf_shapley.models.loading import UNTRAINED
from hf_shapley.publishing.hub import with_what_holds
from hf_shapley.publishing.training_card import _last_evaluation, _metrics

ROWS = [{"pixel_values": torch.full((3, 16, 24), float(row)), "labels": torch.tensor(row)} for row in range(4)]


def make_trainer(folder, dataset=ROWS, model=None, **options):
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "eval_strategy": "no"}
    args = ShapleyTrainingArguments(
        str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{**settings, **options},
    )
    labels = {"id2label": {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}}
    trainer = ShapleyTrainer(
        make_model("vit", **labels, **(model or {})),
        args,
        train_dataset=ROWS,
        eval_dataset=dataset,
        compute_metrics=lambda prediction: {"accuracy": 0.625, "f1 macro": 0.5, "odd": float("nan")},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def card_in(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_saved_models_have_cards_of_results_and_recipe(tmp_path):
    """A saved model has a card with its results and its recipe, and without this machine's paths."""
    trainer = make_trainer(tmp_path, learning_rate=3e-4, shapley_weight=0.25, num_pairs=2)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = card_in(tmp_path)
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values.pop("loss") > 0
    assert values == {"accuracy": 0.625, "f1_macro": 0.5}
    for setting in ("learning rate: 0.0003", "shapley weight: 0.25", "num pairs: 2", "vote readout: patches"):
        assert setting in card.text
    assert "ant, bee, cat, dog, eel" in card.text and "frozen" not in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("trained", [False, True])
def test_the_card_says_whether_attributions_were_trained(trained, tmp_path):
    """Without a training step, or with one that leaves the attribution head out, a limit of the card says so."""
    trainer = make_trainer(tmp_path, model={"head": "votes+influence"}, shapley_warmup=0.0)
    for module in trainer.model.attribution_head.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.zeros_(module.weight)
    if trained:
        trainer.train()
    trainer.create_model_card()
    assert (f"- {UNTRAINED}" in card_in(tmp_path).text) is not trained


def test_pushed_cards_say_that_attributions_are_untrained():
    """A pushed card says that attributions were not trained where that is so, and else does not."""
    results = {"model_name": "new", "limits": ["Small."]}
    model = make_model("vit", head="votes+influence")
    assert with_what_holds(results, model) == {**results, "game": model.game_name}
    for module in model.attribution_head.modules():
        if isinstance(module, ZeroLinear):
            torch.nn.init.zeros_(module.weight)
    assert with_what_holds(results, model)["limits"] == ["Small.", UNTRAINED] and results["limits"] == ["Small."]


def test_the_card_of_a_frozen_classifier_says_so(tmp_path):
    trainer = make_trainer(tmp_path, model={"head": "votes+influence", "coalition_adapter_size": 4})
    trainer.model.freeze_classifier()
    trainer.create_model_card()
    assert "coalition adapter size: 4, classifier: frozen" in card_in(tmp_path).text


@pytest.mark.parametrize("game", ["own", "adapted"])
def test_the_training_card_says_whose_game_it_is(game, tmp_path):
    trainer = make_trainer(tmp_path, model={"head": {"own": "recommended", "adapted": "adapted"}[game]})
    trainer.create_model_card()
    whose = {"own": "the classifier's own", "adapted": "the classifier with adapters for masked images"}[game]
    assert f"Whose game it is: {whose}, absent patches dropped." in card_in(tmp_path).text


def test_the_card_names_every_head_option_set(tmp_path):
    """The card names every option of the head that was set, and none that was not."""
    make_trainer(tmp_path, model={"head": "adapted"}).create_model_card()
    text = card_in(tmp_path).text
    for setting in ("vote readout: pooled", "influence own layers: 1", "coalition adapter size: 64"):
        assert setting in text
    assert "attribution gradient" not in text


def test_the_card_tells_what_was_not_given(tmp_path):
    """The values that the trainer chose; of a weight that warms up, the one it warms up to."""
    trainer = make_trainer(tmp_path, model={"head": "adapted"}, learning_rate=1e-3)
    trainer.state.max_steps = 10
    assert trainer.shapley_weight == 0
    trainer.create_model_card()
    text = card_in(tmp_path).text
    for setting in ("value gradient: 0.03", "num pairs: 1", "attribution learning rate: 0.008", "shapley weight: 1"):
        assert setting in text


def test_checkpoints_on_the_way_have_no_card(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1" / "config.json").exists()
    assert list(tmp_path.rglob("README.md")) == []


def test_a_card_before_any_evaluation_claims_no_result(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()
    card = card_in(tmp_path)
    assert card.data.eval_results is None
    assert "No evaluation results" in card.text


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    make_trainer(tmp_path).save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine"


def blank_card_of_peft() -> str:
    """What `save_pretrained` of peft 0.21 leaves where there is no card: the Hub's form, and two lines."""
    data = ModelCardData(base_model="", library_name="peft", tags=["base_model:adapter:", "lora", "transformers"])
    return f"{ModelCard.from_template(data)}\n### Framework versions\n\n- PEFT 0.21.2\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_blank_card_of_peft_is_replaced(tmp_path, newline):
    """Nobody wrote it. The new one says that the folder holds adapters."""
    (tmp_path / "README.md").write_text(blank_card_of_peft(), newline=newline)
    trainer = make_trainer(tmp_path)
    trainer.model.peft_config = {"default": SimpleNamespace(peft_type="LORA")}
    trainer.create_model_card()
    card = card_in(tmp_path)
    assert "vote readout: patches" in card.text and "More Information Needed" not in card.text
    assert card.data.library_name == "peft"
    assert {"lora", "hf_shapley"} <= set(card.data.tags)


def test_a_form_that_somebody_filled_in_is_kept(tmp_path):
    filled = blank_card_of_peft().replace("**License:** [More Information Needed]", "**License:** mine")
    (tmp_path / "README.md").write_text(filled)
    make_trainer(tmp_path).create_model_card()
    assert (tmp_path / "README.md").read_text() == filled


def test_generated_cards_are_replaced_and_follow_the_model(tmp_path):
    """A generated card is replaced by a newer one, and can go to another folder with the model."""
    trainer = make_trainer(tmp_path / "run")
    trainer.create_model_card(model_name="First")
    trainer.create_model_card(model_name="Second")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "# Second" in card_in(tmp_path / "run").text
    assert "# elsewhere" in card_in(tmp_path / "elsewhere").text


def test_what_the_caller_says_reaches_the_card(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(
        language="en",
        license="mit",
        tags="mine",
        tasks=["toys"],
        finetuned_from="user/base",
        dataset="Toys",
        dataset_tags="user/toys",
    )
    data = card_in(tmp_path).data
    assert (data.language, data.license, data.base_model, data.datasets) == ("en", "mit", "user/base", ["user/toys"])
    assert {"mine", "toys", "hf_shapley"} <= set(data.tags)


@pytest.mark.parametrize("wrapped", [False, True])
def test_data_sets_are_described_by_name_and_split(tmp_path, wrapped):
    """A data set is described as far as it knows itself: by its name and split."""
    dataset = Dataset.from_dict({"labels": [0]}, split="validation")
    dataset.info.dataset_name = "toys"
    trainer = make_trainer(tmp_path, {"first": dataset} if wrapped else dataset)
    trainer.state.log_history = [{"eval_accuracy": 0.5, "step": 0}]
    trainer.create_model_card()
    (result,) = card_in(tmp_path).data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("toys", "validation")


@pytest.mark.parametrize(
    "history, best, expected",
    [
        ([], None, {}),
        ([{"loss": 1.0, "step": 1}], None, {}),
        ([{"eval_accuracy": 0.1, "step": 1}, {"eval_accuracy": 0.2, "step": 2}], None, {"accuracy": 0.2}),
        # Two evaluation sets log one after the other.
        (
            [{"eval_a_accuracy": 0.1, "step": 2}, {"eval_b_accuracy": 0.2, "step": 2}],
            None,
            {"a_accuracy": 0.1, "b_accuracy": 0.2},
        ),
        # The weights went back to the best step ...
        (
            [{"eval_accuracy": 0.9, "step": 1}, {"eval_accuracy": 0.2, "step": 2}, {"train_runtime": 1, "step": 2}],
            1,
            {"accuracy": 0.9},
        ),
        # ... and were evaluated there once more.
        (
            [{"eval_accuracy": 0.2, "step": 2}, {"train_runtime": 1, "step": 2}, {"eval_accuracy": 0.91, "step": 2}],
            1,
            {"accuracy": 0.91},
        ),
    ],
    ids=["nothing", "training only", "the last", "several sets", "the best", "after training"],
)
def test_the_evaluation_of_the_current_weights_counts(tmp_path, history, best, expected):
    trainer = make_trainer(tmp_path)
    trainer.state.log_history, trainer.state.best_global_step = history, best
    trainer.args.load_best_model_at_end = best is not None
    found = {metric["type"]: metric["value"] for metric in _metrics(_last_evaluation(trainer))}
    assert found == expected
