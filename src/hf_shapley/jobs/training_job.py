"""Train, evaluate and use a Shapley image classifier on any `datasets` data set: the job behind `hf-shapley train`."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, set_seed

from ..data.splits import load_splits
from ..data.transforms import with_transforms
from ..files import whole_file
from ..models.pipeline_shapley import label_scores
from ..training.trainer import ShapleyTrainer
from .starting_model import load_model
from .training_arguments import parse_arguments


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of pictures whose most likely label is the right one."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def write_predictions(trainer: ShapleyTrainer, rows: Dataset, path: Path) -> dict[str, float]:
    """Predict every picture, write one line of JSON per picture, and return the metrics."""
    result = trainer.predict(rows, metric_key_prefix="predict")
    probabilities = label_scores(torch.from_numpy(result.predictions), trainer.model.config)
    names = trainer.model.config.id2label
    if trainer.is_world_process_zero():
        scores, ids = probabilities.max(-1)
        lines = [
            json.dumps({"row": i, "label": names[label], "score": round(score, 6)})
            for i, (label, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True))
        ]
        with whole_file(path) as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return result.metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run what the options ask for; return the evaluation's metrics."""
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=args.get_process_log_level())
    set_seed(args.seed)  # before the weights are drawn

    splits = load_splits(data_args, args.seed, evaluates=args.do_eval or args.eval_strategy != "no")
    model, processor = load_model(model_args, splits["train"].features["label"].names)
    splits = with_transforms(splits, model, processor, data_args)
    trainer = ShapleyTrainer(
        model,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    if args.do_train:
        # True tells the Trainer to look for the last checkpoint in the output folder itself.
        resume = True if args.resume_from_checkpoint == "last" else args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        _report(trainer, "train", result.metrics)
    metrics = {}
    if args.do_eval:
        metrics = trainer.evaluate()
        _report(trainer, "eval", metrics)
    if args.do_predict:
        path = Path(args.output_dir) / "predictions.jsonl"
        _report(trainer, "predict", write_predictions(trainer, splits["predict"], path))
    card = {
        "finetuned_from": _hub_id(model_args.model),
        "dataset": data_args.dataset or "scikit-learn digits",
        "dataset_tags": _hub_id(data_args.dataset),
        "dataset_args": data_args.dataset_config,
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    elif args.do_train:
        trainer.create_model_card(**card)  # once more: now it has the evaluation
    return metrics


def _hub_id(name: str | None) -> str | None:
    return None if name is None or Path(name).exists() else name


def _report(trainer: ShapleyTrainer, name: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)
