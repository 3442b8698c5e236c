"""How a training run shares its model: with code, image processor and a card that nobody's own is lost for."""

import logging
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..publishing.hub import keep_card_of_hub
from ..publishing.model_card import write_model_card
from ..publishing.training_card import render_training_card

logger = logging.getLogger(__name__)


class SharingTrainer(Trainer):
    """`Trainer` with cards and pushes of ours."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        output_dir: str | None = None,
    ) -> None:
        """Write a card with the data set, the last evaluation and the recipe; a card that somebody wrote is kept.

        Args:
            language: of the labels, as the Hub writes it.
            license: as the Hub writes it.
            tags: further tags.
            model_name: title; defaults to the repository's or the folder's name.
            finetuned_from: Hub id of the model that training started from; defaults to what the model remembers.
            tasks: further tags.
            dataset_tags: the data set's id on the Hub.
            dataset: the data set's name; defaults to what the data set remembers.
            dataset_args: the data set's configuration.
            output_dir: folder of the README.md; defaults to `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(output_dir or self.args.output_dir)
        model_id = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        card = render_training_card(
            self,
            model_id=model_id,
            model_name=model_name or model_id.split("/")[-1],
            base_model=finetuned_from,
            dataset={"name": dataset, "id": dataset_tags, "config": dataset_args},
            tags=[tags, tasks],
            license=license,
            language=language,
        )
        write_model_card(folder / "README.md", card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Upload model, code, image processor and card as `Trainer` does, keeping a card that somebody wrote there."""
        if private is not None:
            self.args.hub_private_repo = private  # the only way that every supported transformers knows
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self._keep_card_of_hub(token, revision)
        return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            try:
                self._keep_card_of_hub()
            except ConnectionError as error:
                logger.warning("This checkpoint is not pushed: %s", error)
                return
            # The stock Trainer copies weights and configuration only, but the configuration names the code.
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _keep_card_of_hub(self, token: str | None = None, revision: str | None = None) -> None:
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            revision = revision or self.args.hub_revision
            keep_card_of_hub(self.hub_model_id, folder, token=token or self.args.hub_token, revision=revision)
