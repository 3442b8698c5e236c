"""Models travel over the Hub and back: real clients, real HTTP, every client in a process with a cache of its own."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_clients import GENERATED, USERS_CARD
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard

# The tests read what a few processes saw: one worker must run them all, or those would run once for each worker.
pytestmark = pytest.mark.xdist_group("hub")

CLIENTS = Path(__file__).parents[1] / "hub_clients.py"
NOWHERE = "http://127.0.0.1:9"  # the discard port
CODE = {
    "coalitions.py",
    "configuration_shapley.py",
    "heads.py",
    "images.py",
    "modeling_shapley.py",
    "overlay.py",
    "pipeline_shapley.py",
}


def start(role: str, folder: Path, address: str, token: str = TOKEN, *, xet: bool = False) -> subprocess.Popen:
    """Run one of hub_clients.py's roles with a fresh Hugging Face home."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    environment = {
        **inherited,
        "HF_HOME": str(folder / f"home of {role}"),
        "HF_ENDPOINT": address,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CLIENTS.parent), inherited.get("PYTHONPATH")])),
    }
    with open(folder / f"{role}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, str(CLIENTS), role, str(folder)],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def results(processes: dict[str, subprocess.Popen], folder: Path) -> dict[str, dict]:
    """Wait for all of the processes, and read what they found."""
    try:
        codes = {role: process.wait(timeout=300) for role, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for role, code in codes.items():
        assert code == 0, (folder / f"{role}.log").read_text()[-3000:]
    return {role: json.loads((folder / f"{role}.json").read_text()) for role in processes}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.mute.add("tester/mute/README.md")
        yield hub


@pytest.fixture(scope="module")
def xet_hub():
    with Hub(xet=True) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def first_clients(hub, xet_hub, folder):
    """Two that push, and beside them one that looks for a Hub where nobody listens."""
    processes = {
        "push": start("push", folder, hub.address),
        "push_by_shell": start("push_by_shell", folder, xet_hub.address, xet=True),
        "find_no_hub": start("find_no_hub", folder, NOWHERE),
    }
    return results(processes, folder)


@pytest.fixture(scope="module")
def pushed(first_clients):
    return first_clients["push"]


@pytest.fixture(scope="module")
def pushed_by_shell(first_clients):
    return first_clients["push_by_shell"]


@pytest.fixture(scope="module")
def loaded(pushed, hub, xet_hub, folder):
    """What every kind of reader saw, run side by side; none has a token of its own."""
    roles = ("load_with_library", "load_without_library")
    processes = {role: start(role, folder, hub.address, token="") for role in roles}
    processes["explain_by_shell"] = start("explain_by_shell", folder, xet_hub.address, token="", xet=True)
    return results(processes, folder)


@pytest.fixture(scope="module")
def with_library(loaded):
    return loaded["load_with_library"]


@pytest.fixture(scope="module")
def without_library(loaded):
    return loaded["load_without_library"]


# ---- what is published


@pytest.mark.parametrize(
    "name, revision", [("vit", "main"), ("vit", "second"), ("secret", "main"), ("trained", "main")]
)
def test_a_push_publishes_all_that_loading_needs(pushed, hub, name, revision):
    files = hub.files(name, revision)
    needed = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md", "modeling_shapley_vit.py"}
    assert needed | CODE <= files.keys()
    assert files["model.safetensors"].sha256  # by the path of large files


def test_a_push_is_one_commit(pushed, hub):
    repository = hub.repositories["tester/secret"]
    assert len(repository.commits) == 2  # the empty one, and ours
    assert repository.private


def test_nothing_of_this_machine_is_published(pushed, hub, folder):
    for name in ("vit", "secret"):
        for path, file in hub.files(name).items():
            assert str(folder).encode() not in file.content, path
            assert str(Path.home()).encode() + b"/" not in file.content, path


def test_a_pushed_model_has_a_card(pushed, hub):
    card = ModelCard(hub.files("vit")["README.md"].content.decode())
    assert GENERATED in card.text
    assert card.data.pipeline_tag == "image-classification"
    assert "hf_shapley" in card.data.tags
    assert "cat, dog" in card.text
    assert "Whose game it is: the classifier's own" in card.text
    assert "tester/vit" in card.text


@pytest.mark.parametrize(
    "name, revision", [("convnext", "main"), ("piped", "second"), ("saved", "main"), ("requested", "refs/pr/1")]
)
def test_models_and_pipelines_publish_cards_by_themselves(pushed, hub, name, revision):
    """Models and pipelines publish the generated card by themselves, all in one commit."""
    card = ModelCard(hub.files(name, revision)["README.md"].content.decode())
    assert GENERATED in card.text
    assert "cat, dog" in card.text
    assert card.data.pipeline_tag == "image-classification"
    assert ("toy" in card.data.tags) == (name in ("piped", "saved"))
    assert ("preprocessor_config.json" in hub.files(name, revision)) == (name == "piped")
    assert len(hub.repositories[f"tester/{name}"].commits) == 2  # the empty one, and ours


def test_a_pull_request_leaves_the_main_branch_alone(pushed, hub):
    assert hub.files("requested") == {}
    assert hub.files("requested", "refs/pr/1")["model.safetensors"] == hub.files("vit")["model.safetensors"]


def test_a_model_saves_and_publishes_at_once(pushed, hub, folder):
    """A model saved and published at once lies in both places, with a card on the Hub only."""
    content = (folder / "published" / "model.safetensors").read_bytes()
    assert hub.files("saved")["model.safetensors"].sha256 == hashlib.sha256(content).hexdigest()
    assert not (folder / "published" / "README.md").exists()


def test_models_keep_cards_written_on_the_hub(pushed, hub):
    """A model keeps a card that somebody wrote on the Hub, and publishes its weights beside it."""
    assert hub.files("mine")["README.md"].content.decode() == USERS_CARD
    assert hub.files("mine")["model.safetensors"] == hub.files("vit", "second")["model.safetensors"]


def test_an_unanswered_card_question_stops_the_push(pushed, hub):
    """Nothing is published while the Hub does not say whether it has a card."""
    for who in ("no answer", "no answer to a trainer"):
        assert pushed[who].startswith("ConnectionError: The Hub does not say whether tester/mute has a card")
    assert hub.files("mute") == {}


# ---- the shell, over Xet


def test_the_shell_publishes_whole_models_over_xet(pushed_by_shell, xet_hub):
    """The shell publishes all that loading needs over Xet, into a branch or in private where asked."""
    for name, outcome, revision in (
        ("shell", "push", "main"),
        ("shell", "branch", "v2"),
        ("hidden", "private", "main"),
    ):
        code, printed, _ = pushed_by_shell[outcome]
        commit = xet_hub.repositories[f"tester/{name}"].branches[revision]
        assert (code, printed) == (0, f"{xet_hub.address}/tester/{name}/commit/{commit}\n")
        files = xet_hub.files(name, revision)
        assert CODE | {"config.json", "preprocessor_config.json", "README.md"} <= files.keys()
        assert xet_hub.xet_hash(files["model.safetensors"].sha256)
    assert xet_hub.large == {}
    assert "write" in xet_hub.xet_tokens
    assert xet_hub.repositories["tester/hidden"].private
    assert not xet_hub.repositories["tester/shell"].private


def test_the_shell_publishes_the_results_it_is_given(pushed_by_shell, xet_hub):
    cards = [ModelCard(xet_hub.files("shell", name)["README.md"].content.decode()) for name in ("main", "v2")]
    assert [result.metric_value for result in cards[0].data.eval_results] == [0.5]
    assert cards[1].data.eval_results is None


def test_what_the_shell_published_over_xet_comes_back(loaded, xet_hub):
    seen = loaded["explain_by_shell"]
    assert seen["same"]
    assert seen["from the Hub"][0] == 0
    assert seen["from the Hub"][:2] == seen["from the folder"][:2]
    assert "read" in xet_hub.xet_tokens


def test_the_shell_says_what_it_is_refused(pushed_by_shell, xet_hub):
    """The shell says what it is refused and why, and publishes nothing."""
    reasons = {"wrong token": "401", "broken results": "broken.json", "nameless results": "`model_name`"}
    for outcome, reason in reasons.items():
        code, printed, error = pushed_by_shell[outcome]
        assert (code, printed) == (1, "")
        assert error.startswith("hf-shapley push: ")
        assert reason in error
    assert "tester/never" not in xet_hub.repositories
    assert len(xet_hub.repositories["tester/shell"].commits) == 3  # the empty one, main and the branch


# ---- the trainer


def card_of_the_trainer(hub):
    """Its card before somebody wrote another one."""
    cards = (files.get("README.md") for files in hub.repositories["tester/trained"].commits.values())
    return ModelCard([card.content.decode() for card in cards if card and GENERATED in card.content.decode()][-1])


def test_the_trainer_publishes_its_results_and_recipe(pushed, hub):
    card = card_of_the_trainer(hub)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == 0.25
    assert card.data.eval_results[0].dataset_name == "Noise"
    assert card.data.license == "mit"
    assert {"test", "hf_shapley"} <= set(card.data.tags)
    assert "shapley warmup: 0.5" in card.text
    assert "steps: 2" in card.text


def test_the_trainer_keeps_cards_written_on_the_hub(pushed, hub):
    """The trainer keeps a card that somebody wrote on the Hub."""
    assert hub.files("trained")["README.md"].content.decode() == USERS_CARD


def test_every_checkpoint_on_the_way_can_be_loaded(pushed, hub):
    for files in hub.repositories["tester/trained"].commits.values():
        if "model.safetensors" in files:
            assert CODE | {"config.json", "preprocessor_config.json"} <= files.keys()


# ---- training, evaluation, publication


def figures(text: str) -> dict[tuple[str, str], float]:
    """The values of a published card, by type and name."""
    return {(found.metric_type, found.metric_name): found.metric_value for found in ModelCard(text).data.eval_results}


def test_training_evaluation_and_push_keep_every_figure(pushed, hub, folder):
    """A pushed card holds what the trained one says, and, when asked to, all that `hf-shapley evaluate -o` wrote."""
    assert {code for code, _, _ in pushed["chain"].values()} == {0}, pushed["chain"]
    trained = figures(card_of_the_trainer(hub).content)
    measured = json.loads((folder / "faithfulness.json").read_text())["metrics"]
    cards = {name: hub.files("chain", name)["README.md"].content.decode() for name in ("main", "all", "own")}
    assert len(trained) >= 2 and trained["accuracy", "Accuracy"] == 0.25
    assert figures(cards["main"]) == figures(hub.files("fork")["README.md"].content.decode()) == trained
    assert len(measured) == 3 * 6 + 3
    assert figures(cards["all"]) == trained | {(row["type"], row["name"]): row["value"] for row in measured}
    for name in ("main", "all"):
        assert "shapley warmup: 0.5" in cards[name] and "steps: 2" in cards[name]
        assert "Evaluation while training" in cards[name]
        assert ModelCard(cards[name]).data.license == "mit" and "test" in ModelCard(cards[name]).data.tags
        assert str(folder) not in cards[name]
    assert cards["own"] == USERS_CARD


def test_figures_of_several_data_sets_say_which(pushed, hub):
    data = ModelCard(hub.files("chain", "all")["README.md"].content.decode()).data
    datasets = {found.metric_type: found.dataset_name for found in data.eval_results}
    assert datasets["accuracy"] == "Noise"
    assert datasets["insertion_auc"] == datasets["error_ratio"] == "scikit-learn digits"


# ---- reading with the library


def test_weights_come_back_equal(with_library):
    assert with_library["same"] == dict.fromkeys(("vit", "vit-2", "convnext", "trained"), True)


def test_the_library_runs_its_own_code_without_trust(with_library):
    """The library needs no trust in a repository and uses its own code."""
    assert with_library["classes"] == [
        "hf_shapley.models.modeling_shapley_vit",
        "hf_shapley.models.modeling_shapley_convnext",
    ]
    assert {label for label, _, _ in with_library["entries"]} == {"cat", "dog"}
    assert with_library["entries"][0][1:] == [[4, 6], [60, 40]]


def test_the_stock_pipeline_takes_our_models(with_library):
    assert sorted(with_library["stock"]) == ["cat", "dog"]
    assert with_library["task from the card"] == "ImageClassificationPipeline"


# ---- reading without the library


def test_trusted_code_needs_no_library(pushed, without_library):
    assert without_library["classes"] == ["transformers_modules"] * 2
    for name in ("vit", "vit-2", "convnext"):
        assert without_library["logits"][name] == pytest.approx(pushed["logits"][name], abs=1e-6)
    assert without_library["trained logits"] == pytest.approx(pushed["trained logits"], abs=1e-6)


def test_a_revision_is_another_model(pushed):
    assert pushed["logits"]["vit"] != pytest.approx(pushed["logits"]["vit-2"], abs=1e-3)


def test_trusted_pipelines_explain_and_save_again(with_library, without_library):
    """The trusted pipeline explains as the library does, and can be saved again."""
    assert without_library["entries"] == with_library["entries"]
    assert without_library["saved again"]


def test_code_is_not_run_without_trust(without_library):
    assert "trust_remote_code=True" in without_library["no trust"]


# ---- refusals


def test_a_private_repository_needs_the_token(pushed, without_library):
    assert without_library["logits"]["secret"] == pytest.approx(pushed["logits"]["vit-2"], abs=1e-6)
    assert "OSError" in without_library["no token"]
    assert "private repo" in without_library["no token"]
    assert "OSError" in without_library["wrong token"] or "401" in without_library["wrong token"]


def test_what_does_not_exist_is_named(without_library):
    assert "third" in without_library["no such revision"]
    assert "tester/nothing" in without_library["no such repository"]


def test_a_wrong_token_publishes_nothing(pushed, hub):
    assert "401" in pushed["wrong token"]
    assert "401" in pushed["wrong token for a new repository"]
    assert "tester/new" not in hub.repositories
    assert len(hub.repositories["tester/vit"].commits) == 3  # the empty one, main and the branch


def test_only_shapley_models_are_published(pushed):
    assert "must be a Shapley image classifier, got Linear" in pushed["no Shapley model"]


def test_interrupted_uploads_leave_the_repository_alone(loaded, hub, folder):
    """An interrupted upload leaves the repository as it was."""
    before, stored = hub.files("vit"), len(hub.large)
    hub.uploads.open.clear()
    process = start("push_and_be_killed", folder, hub.address)
    try:
        assert hub.uploads.reached.wait(120), "the upload never came"
    finally:
        process.kill()
        process.wait()
        hub.uploads.open.set()
    assert len(hub.large) <= stored + 1  # the large file may have arrived: no commit points at it
    assert hub.files("vit") == before
    assert len(hub.repositories["tester/vit"].commits) == 3


def test_a_hub_that_cannot_be_reached_is_named(first_clients):
    errors = first_clients["find_no_hub"]
    assert errors["load"].startswith("OSError")
    assert errors["push"].startswith("ConnectionError")
    assert errors["push of a model by itself"].startswith("ConnectionError")
    for action, error in errors.items():
        assert NOWHERE in error, action
