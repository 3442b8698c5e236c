"""Sharing a model: weights, code, pipeline, image processor and card in one commit."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BaseImageProcessor, Pipeline, PreTrainedModel

from ..files import whole_file
from ..models.checks import check_shapley_model
from ..models.loading import UNTRAINED
from .card_data import ShapleyModelCard, ShapleyModelCardData, reading_metadata
from .card_results import merge_results
from .model_card import is_generated, render_model_card, results_of_card

logger = logging.getLogger(__name__)


def push_to_hub(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Publish everything that `from_pretrained` and `pipeline` need, in one commit: it arrives whole or not at all.

    A card in the repository that somebody wrote is kept; one that was generated is replaced.

    Args:
        model: a Shapley image classifier.
        image_processor: its image processor.
        repo_id: "user/name"; created if it does not exist.
        results: what the card shows, see `hf_shapley.publishing.card_results`; None = no results but those of `card`.
        card: text of the model's README.md, as a trainer or the demo wrote it: what it shows is shown too, and where
            somebody wrote it, it is published as it is. None = there is none.
        private: whether a new repository is private; None = the account's default.
        token: with write permission; None = the one of `hf auth login`.
        revision: branch, created if it does not exist; None = the main one.
        commit_message: title of the commit.

    Returns:
        The commit, with its address.

    Raises:
        HfHubHTTPError: the Hub refuses, because of the token for instance. Its files stay as they were.
        ConnectionError: the Hub cannot be reached.
        ValueError: `results` is malformed. The Hub has not heard of anything.
        TypeError: the model is no Shapley image classifier.
    """
    check_shapley_model(model)

    def save(folder: str) -> None:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)

    commit = {"commit_message": commit_message, "revision": revision}
    return _publish(model, save, repo_id, results=results, card=card, private=private, token=token, commit=commit)


def push_with_card(
    self: PreTrainedModel | Pipeline,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Publish a model or pipeline in one commit, as transformers does, but with this library's card.

    A card in the repository that somebody wrote is kept; one that was generated is replaced.

    Args:
        repo_id: "user/name"; created if it does not exist.
        commit_message: title of the commit.
        commit_description: its text.
        private: whether a new repository is private; None = the account's default.
        token: with write permission; None = the one of `hf auth login`.
        revision: branch, created if it does not exist; None = the main one.
        create_pr: open a pull request in place of changing the branch.
        max_shard_size: size from which on weights are split into several files.
        tags: added to the card, whoever wrote it.

    Returns:
        The commit, with its address.

    Raises:
        HfHubHTTPError: the Hub refuses, because of the token for instance. Its files stay as they were.
        ConnectionError: the Hub cannot be reached.
    """
    return _publish(
        getattr(self, "model", self),
        lambda folder: self.save_pretrained(folder, max_shard_size=max_shard_size),
        repo_id,
        private=private,
        token=token,
        tags=tags or (),
        commit={
            "commit_message": commit_message or "Upload model",
            "commit_description": commit_description,
            "revision": revision,
            "create_pr": create_pr,
        },
    )


def keep_card_of_hub(
    repo_id: str, folder: str | Path, *, token: str | None = None, revision: str | None = None
) -> None:
    """Bring a card that somebody wrote on the Hub into a folder that will be uploaded, so that it is not lost.

    Nothing happens where the repository has no card or a generated one, or where the folder's own was written by
    somebody.

    Args:
        repo_id: "user/name" of an existing repository.
        folder: an existing folder.
        token: to read a private repository.
        revision: branch; None = the main one.

    Raises:
        ConnectionError: the Hub does not say whether there is a card.
    """
    local = Path(folder) / "README.md"
    if local.is_file() and not is_generated(local.read_text(encoding="utf-8", errors="replace")):
        return
    card = _written_card(repo_id, token, revision)
    if card is not None:
        with whole_file(local) as draft:
            draft.write_bytes(card)


def card_of(model: str) -> str | None:
    """Text of the card in a model's folder, or else in its repository on the Hub; None if there is none."""
    path = Path(model) / "README.md"
    if Path(model).is_dir():
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    card = _downloaded_card(model, token=None, revision=None)
    return None if card is None else card.decode(errors="replace")


def label_names(model: PreTrainedModel) -> list[str]:
    """The model's label names in order; empty where they were never given."""
    config = model.config
    names = [config.id2label[label] for label in range(config.num_labels)]
    return [] if names == [f"LABEL_{label}" for label in range(config.num_labels)] else names


def with_what_holds(results: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Results for a card that says whose game is explained, and if the model's attributions have not been trained."""
    # An older model's code, from a repository, lacks either.
    if game := getattr(model, "game_name", None):
        results = {**results, "game": game}
    if getattr(model, "attributions_trained", True):
        return results
    return {**results, "limits": list(dict.fromkeys([*results.get("limits", []), UNTRAINED]))}


def _publish(
    model: PreTrainedModel,
    save: Callable[[str], None],
    repo_id: str,
    *,
    commit: dict[str, Any],
    results: Mapping[str, Any] | None = None,
    card: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """One commit of what `save` writes into a folder, and of a card."""
    api, revision = HfApi(token=token), commit["revision"]
    with tempfile.TemporaryDirectory() as folder:
        # First what may fail here, so that no empty repository is left.
        save(folder)
        _card_to_publish(model, repo_id, results, card)
        with _reaching(api):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        readme = Path(folder) / "README.md"
        readme.write_bytes(
            _written_card(repo_id, token, revision) or _card_to_publish(model, repo_id, results, card).encode()
        )
        if results is not None and not is_generated(readme.read_text(encoding="utf-8", errors="replace")):
            logger.warning(
                "The card of %s was written by somebody and stays so: it does not show the results.", repo_id
            )
        _add_tags(readme, [*(model.model_tags or ()), *tags])
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        with _reaching(api):
            return api.create_commit(repo_id, additions, **commit)


def _card_to_publish(model: PreTrainedModel, repo_id: str, results: Mapping[str, Any] | None, card: str | None) -> str:
    """The model's own card if somebody wrote it, else one with its results and the given ones."""
    if card is not None and not is_generated(card):
        return card
    name = repo_id.split("/")[-1]
    if results is not None:
        render_model_card(results, model_id=repo_id)  # which refuses what is malformed, whatever the card adds
    shown = {"labels": label_names(model), **merge_results(results_of_card(card or ""), results or {})}
    shown = with_what_holds({"model_name": name, **shown}, model)
    data = ShapleyModelCardData.from_results(shown)
    if card is not None:
        for entry, value in vars(ShapleyModelCard(card).data).items():
            if entry == "tags":
                value = list(dict.fromkeys([*(value or []), *(data.tags or [])]))
            if entry == "tags" or getattr(data, entry, None) is None:
                setattr(data, entry, value)
    return render_model_card(shown, model_id=repo_id, data=data)


@contextmanager
def _reaching(api: HfApi) -> Iterator[None]:
    """Name the Hub where the connection to it fails."""
    try:
        yield
    except (HfHubHTTPError, OSError, ValueError):
        raise
    except Exception as error:  # the transport's own types, which differ between versions of huggingface_hub
        raise ConnectionError(f"Cannot reach the Hub at {api.endpoint}: {error}. Check the network.") from error


def _written_card(repo_id: str, token: bool | str | None, revision: str | None) -> bytes | None:
    """The card that somebody wrote on the Hub; None if there is none, or a generated one."""
    card = _downloaded_card(repo_id, token, revision)
    return None if card is None or is_generated(card.decode(errors="replace")) else card


def _downloaded_card(repo_id: str, token: bool | str | None, revision: str | None) -> bytes | None:
    """The card on the Hub, whoever wrote it; None if there is none."""
    try:
        # A fresh copy in a folder of its own: the cache may hold an older one.
        with tempfile.TemporaryDirectory() as download:
            path = hf_hub_download(repo_id, "README.md", revision=revision, token=token, local_dir=download)
            return Path(path).read_bytes()
    except LocalEntryNotFoundError as error:  # no answer, which does not say that there is no card
        raise ConnectionError(f"The Hub does not say whether {repo_id} has a card: {error}. Try again.") from error
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


def _add_tags(readme: Path, tags: Sequence[str]) -> None:
    """Put tags that a card lacks into its metadata."""
    if not tags:
        return
    with reading_metadata():
        card = ModelCard.load(readme)
    missing = [tag for tag in dict.fromkeys(tags) if tag not in (card.data.tags or [])]
    if missing:
        card.data.tags = [*(card.data.tags or []), *missing]
        card.save(readme)
