"""Sharing a model: weights, code, pipeline, image processor and card in one commit."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from transformers import BaseImageProcessor, PreTrainedModel

from .model_card import MARKER, render_model_card, write_model_card


def push_to_hub(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    repo_id: str,
    *,
    results: Mapping[str, Any] | None = None,
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
        results: what the card shows, see `hf_shapley.model_card`; None = a card without results.
        private: whether a new repository is private; None = the account's default.
        token: with write permission; None = the one of `hf auth login`.
        revision: branch, created if it does not exist; None = the main one.
        commit_message: title of the commit.

    Returns:
        The commit, with its address.

    Raises:
        HfHubHTTPError: the Hub refuses, because of the token for instance. Its files stay as they were.
        ConnectionError: the Hub cannot be reached.
        TypeError: the model is no Shapley image classifier.
    """
    if not hasattr(model, "coalition_values"):
        raise TypeError(f"`model` must be a Shapley image classifier, got {type(model).__name__}.")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (HfHubHTTPError, OSError, ValueError):
        raise
    except Exception as error:  # the transport's own types, which differ between versions of huggingface_hub
        raise ConnectionError(f"Cannot reach the Hub at {api.endpoint}: {error}. Check the network.") from error
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    results = {"model_name": repo_id.split("/")[-1], "labels": label_names(model)} if results is None else results
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        keep_card_of_hub(repo_id, folder, token=token, revision=revision)
        write_model_card(folder, render_model_card(results, model_id=repo_id))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=commit_message,
            revision=revision,
        )


def keep_card_of_hub(
    repo_id: str, folder: str | Path, *, token: str | None = None, revision: str | None = None
) -> None:
    """Bring a card that somebody wrote on the Hub into a folder that will be uploaded, so that it is not lost.

    Nothing happens where the repository has no card or a generated one, or where the folder's own card was written by
    somebody.

    Args:
        repo_id: "user/name" of an existing repository.
        folder: an existing folder.
        token: to read a private repository.
        revision: branch; None = the main one.
    """
    local = Path(folder) / "README.md"
    if local.exists() and MARKER not in local.read_text(encoding="utf-8", errors="replace"):
        return
    try:
        # A fresh copy in a folder of its own: the cache may hold an older one.
        with tempfile.TemporaryDirectory() as download:
            path = hf_hub_download(repo_id, "README.md", revision=revision, token=token, local_dir=download)
            card = Path(path).read_bytes()
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    if card.strip() and MARKER.encode() not in card:
        local.write_bytes(card)


def label_names(model: PreTrainedModel) -> list[str]:
    """The model's label names in order; empty where they were never given."""
    config = model.config
    names = [config.id2label[label] for label in range(config.num_labels)]
    return [] if names == [f"LABEL_{label}" for label in range(config.num_labels)] else names
