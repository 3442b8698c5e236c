"""Loading a model in a pipeline where this library is installed: a repository's code stays out, without a question."""

from typing import Any

from transformers import AutoImageProcessor, AutoModelForImageClassification


class ForeignCodeError(Exception):
    """A repository wants to run code of its own.

    No `ValueError`, for which transformers' pipelines would go on to the next way of loading.
    """


class ModelForPipeline(AutoModelForImageClassification):
    """What `pipeline("shapley-image-classification", model=name)` loads the model with, ahead of its image processor.

    Of a processor that it does not know transformers would ask, on the terminal, whether to run the repository's code.
    """

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, trust_remote_code: bool | None = None, **options: Any) -> Any:
        """As `AutoModelForImageClassification.from_pretrained`.

        Raises:
            ForeignCodeError: the image processor needs the repository's code, and `trust_remote_code` is not True.
        """
        if not trust_remote_code:
            place = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
            try:
                AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **place)
            except Exception as error:  # other faults are told by whoever needs the processor
                if "trust_remote_code" in str(error):
                    raise ForeignCodeError(
                        f"The image processor of {name!r} is code of that repository, which is not run: read it first "
                        "and give `trust_remote_code=True`, or load a processor of transformers and give both as "
                        "`model` and `image_processor`."
                    ) from error
        return AutoModelForImageClassification.from_pretrained(
            name, *args, trust_remote_code=bool(trust_remote_code), **options
        )
