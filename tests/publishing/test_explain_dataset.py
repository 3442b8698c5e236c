"""`explain_dataset`: the rows are the model's, whatever interrupts it and however the data set is stored."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_model
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from test_images import png_header
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil, pipeline

from hf_shapley.publishing import dataset_explanations, explanation_files, explanation_resuming, explanation_rows
from hf_shapley.publishing.dataset_explanations import explain_dataset
from hf_shapley.publishing.saved_explanations import load_explanations

PARTS = (dataset_explanations, explanation_files, explanation_resuming, explanation_rows)
UNDER_TEST = {module.__file__ for module in PARTS}

ROWS, OPTIONS = 23, {"batch_size": 3, "shard_size": 7, "show_progress": False}


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 16, "width": 24})


def pictures(rows: int = ROWS) -> list[PILImage.Image]:
    generator = np.random.default_rng(0)
    return [PILImage.fromarray(generator.integers(0, 256, (10, 14, 3), dtype=np.uint8)) for _ in range(rows)]


def picture_dataset(rows: int = ROWS) -> Dataset:
    features = Features({"image": Image(), "note": Value("string")})
    return Dataset.from_dict({"image": pictures(rows), "note": ["x"] * rows}, features=features)


def run(folder, dataset=None, model=None, **options):
    dataset = picture_dataset() if dataset is None else dataset
    model = model or make_model("vit")
    return explain_dataset(model, dataset, folder, image_processor=processor(), **{**OPTIONS, **options})


def contents(folder) -> dict[str, bytes]:
    """Every file but the manifest, hidden ones too."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("labels, expected", [("all", None), ("predicted", 1), (2, 2), (["LABEL_3", 0], None)])
def test_rows_are_the_models_own_outputs(backbone, labels, expected, tmp_path):
    model = make_model(backbone, head="votes+influence")
    result = run(tmp_path, model=model, labels=labels)
    assert (result.num_rows, result.computed_rows) == (ROWS, ROWS)
    assert result.rows_per_second > 0
    found = load_explanations(tmp_path).with_format("torch")[:]
    output = model(processor()(images=pictures(), return_tensors="pt")["pixel_values"])
    assert found["row"].tolist() == list(range(ROWS))
    torch.testing.assert_close(found["logits"], output.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["score"], output.logits.softmax(-1).amax(-1), atol=1e-6, rtol=1e-5)
    assert found["predicted_label"] == [f"LABEL_{i}" for i in output.logits.argmax(-1)]
    fixed = {"all": torch.arange(5).expand(ROWS, -1)}.get(labels if isinstance(labels, str) else "")
    ids = (
        output.logits.topk(expected).indices if expected else torch.tensor([[3, 0]] * ROWS) if fixed is None else fixed
    )
    assert torch.equal(found["label_ids"], ids)
    maps = output.attributions.transpose(1, 2).unflatten(-1, (4, 6))
    expected_maps = maps[torch.arange(ROWS).unsqueeze(1), ids]
    torch.testing.assert_close(found["attributions"], expected_maps, atol=1e-6, rtol=1e-5)


def test_streamed_data_sets_give_the_same_files(tmp_path):
    """Streams give the same files as data sets in memory; what was never encoded has other fingerprints."""
    data = picture_dataset()
    run(tmp_path / "memory", data)
    run(tmp_path / "stream", data.to_iterable_dataset(num_shards=4))
    run(tmp_path / "generated", IterableDataset.from_generator(lambda: ({"image": x} for x in pictures())))
    expected = contents(tmp_path / "memory")
    assert len(expected) == 2 * 4  # each with its checksum
    assert contents(tmp_path / "stream") == expected
    # Pictures that were never encoded have other fingerprints, and all else the same.
    found, wanted = (load_explanations(tmp_path / name)[:] for name in ("generated", "memory"))
    assert found.keys() == wanted.keys()
    assert {name for name in wanted if found[name] != wanted[name]} == {"image_sha256"}
    assert [row["row"] for row in load_explanations(tmp_path / "stream", streaming=True)] == list(range(ROWS))


def test_paths_and_encoded_bytes_are_images_too(tmp_path):
    paths = []
    for number, picture in enumerate(pictures(5)):
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    run(tmp_path / "a", picture_dataset(5))
    run(tmp_path / "b", Dataset.from_dict({"image": paths}))
    run(tmp_path / "c", Dataset.from_dict({"image": [Path(path).read_bytes() for path in paths]}))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_streams_are_read_only_slightly_ahead(tmp_path):
    """A stream is read a few batches ahead of the model at most."""
    read, lead = [0], []

    def stream():
        for picture in pictures(120):
            read[0] += 1
            yield {"image": picture}

    model = make_model("vit")
    seen = [0]

    def count(module, arguments, output):
        seen[0] += len(arguments[0])
        lead.append(read[0] - seen[0])

    model.register_forward_hook(count)
    run(tmp_path, IterableDataset.from_generator(stream), model)
    assert len(lead) > 40
    assert max(lead) <= 2 * OPTIONS["batch_size"] + 1


def test_killed_runs_lose_nothing_and_repeat_nothing(tmp_path):
    """12 runs, killed at random lines and then finished, leave byte for byte what an undisturbed run leaves."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=300)
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 2 * 4
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == 12
    for folder in killed:
        assert contents(folder) == expected, folder.name
    # The kills came at different times.
    assert len({int(path.read_text()) for path in tmp_path.glob("left-*")}) >= 3


def test_a_complete_run_is_not_computed_again(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    assert run(tmp_path, batch_size=5).computed_rows == 0
    (tmp_path / "part-00001.parquet").unlink()
    assert run(tmp_path).computed_rows == 7
    assert contents(tmp_path) == before


def test_other_models_labels_and_lengths_are_refused(tmp_path):
    """A run with another model, other labels or another length is refused, and the earlier one stays."""
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="other model"):
        run(tmp_path, model=make_model("vit", seed=1))
    with pytest.raises(ValueError, match="other labels, num_rows, shard_size"):
        run(tmp_path, picture_dataset(5), labels="all", shard_size=8)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="without manifest"):
        run(tmp_path)
    assert contents(tmp_path) == before


def test_broken_images_are_named_and_earlier_files_kept(tmp_path):
    """A broken image is named by its row, and the files written before it are kept."""
    encoded = [b"no image"] * ROWS
    for number in range(9):
        path = tmp_path / "x.png"
        pictures()[number].save(path)
        encoded[number] = path.read_bytes()
    with pytest.raises(ValueError, match="Row 9 holds no readable image"):
        run(tmp_path / "out", Dataset.from_dict({"image": encoded}))
    assert set(contents(tmp_path / "out")) == {"part-00000.parquet", "part-00000.sha256"}
    with pytest.raises(ValueError, match="no complete run"):
        load_explanations(tmp_path / "out")


def test_missing_doubled_and_foreign_files_are_found(tmp_path):
    run(tmp_path)
    first = pq.read_table(tmp_path / "part-00000.parquet")
    pq.write_table(first, tmp_path / "part-00009.parquet")
    with pytest.raises(OSError, match=r"part-00009.parquet' has no part-00009.sha256"):
        run(tmp_path)
    checksum = hashlib.sha256((tmp_path / "part-00009.parquet").read_bytes()).hexdigest()
    (tmp_path / "part-00009.sha256").write_text(f"{checksum}  part-00009.parquet\n")
    with pytest.raises(OSError, match="missing or in excess: .*part-00009"):
        run(tmp_path)
    (tmp_path / "part-00009.parquet").unlink()
    pq.write_table(pa.concat_tables([first.slice(0, 6), first.slice(0, 1)]), tmp_path / "part-00000.parquet")
    with pytest.raises(OSError, match="part-00000.parquet' is damaged"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["run[1]", "run?", "run*", "a::b", "#1", "{x}"])
def test_a_folders_name_is_no_pattern(name, tmp_path):
    """What is read back is the folder's own run, not one of a neighbour whose name the folder's would match."""
    data, neighbour = picture_dataset(3), tmp_path / "run1"
    run(neighbour, data, make_model("vit", seed=1))
    model = make_model("vit")
    run(tmp_path / name, data, model)
    expected = model(processor()(images=pictures(3), return_tensors="pt")["pixel_values"]).logits
    for streaming in (False, True):
        rows = list(load_explanations(tmp_path / name, streaming=streaming))
        torch.testing.assert_close(torch.tensor([row["logits"] for row in rows]), expected, atol=1e-6, rtol=1e-5)


def test_rows_carry_the_fingerprint_of_their_image(tmp_path):
    encoded = [encode(picture) for picture in pictures(4)]
    run(tmp_path, Dataset.from_dict({"image": encoded}).cast_column("image", Image()))
    assert load_explanations(tmp_path)["image_sha256"][:] == [hashlib.sha256(data).hexdigest() for data in encoded]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", [list(reversed(range(ROWS))), [*range(5), 6, 5, *range(7, ROWS)]])
def test_another_order_is_not_mixed_in(order, stream, tmp_path):
    """A run that was cut off does not go on with the same rows in another order, nor with other images."""
    first, other = picture_dataset(), picture_dataset().select(order)
    if stream:
        first, other = first.to_iterable_dataset(), other.to_iterable_dataset()
    run(tmp_path, first)
    (tmp_path / "part-00002.parquet").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"Row {0 if order[0] else 5} of the data set has another image"):
        run(tmp_path, other)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: data[:-60] + bytes([data[-60] ^ 64]) + data[-59:],
    ],
    ids=["empty", "half", "one byte short", "a bit in the data", "a bit in the footer"],
)
def test_a_damaged_file_is_found(damage, tmp_path):
    run(tmp_path, picture_dataset(9))
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match="part-00000.parquet' is damaged"):
        run(tmp_path, picture_dataset(9))
    for streaming in (False, True):
        with pytest.raises(OSError, match="part-00000.parquet' is damaged"):
            list(load_explanations(tmp_path, streaming=streaming))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="part-00000.parquet"):
        load_explanations(tmp_path)
    assert run(tmp_path, picture_dataset(9)).computed_rows == 7


def encode(picture: PILImage.Image, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


UNREADABLE = {
    "no picture": b"no image",
    "SyntaxError": encode(pictures(1)[0])[:40] + b"\0" * 60,
    "decompression bomb": png_header(100_000, 100_000),
    "unsafe format": encode(pictures(1)[0], format="EPS"),
    "too long": encode(PILImage.new("1", (20_000, 1))),
}


def with_unreadable(kind: str, places: set[int], tmp_path: Path) -> Dataset:
    """A data set with an `Image()` column of files, of which some cannot be read."""
    paths = []
    for row, picture in enumerate(pictures()):
        paths.append(str(tmp_path / f"picture-{row}.png"))
        Path(paths[-1]).write_bytes(UNREADABLE[kind] if row in places else encode(picture))
    return Dataset.from_dict({"image": paths}).cast_column("image", Image())


def run_convnext(folder, dataset, **options):
    shape = ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=1.0)
    return explain_dataset(make_model("convnext"), dataset, folder, image_processor=shape, **{**OPTIONS, **options})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_row_is_named_or_left_out(kind, stream, tmp_path, monkeypatch, caplog):
    """A decoded `Image()` column too: its row and path are named; on request such rows are left out and counted."""
    monkeypatch.setattr("hf_shapley.models.overlay.MAX_PIXELS", 1_000_000)
    places = {4, *range(7, 14)}  # all rows of the second file
    data = with_unreadable(kind, places, tmp_path)
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(ValueError, match="Row 4 holds no readable image.*picture-4.png"):
        run_convnext(tmp_path / "out", data)
    result = run_convnext(tmp_path / "out", data, skip_unreadable=True)
    assert (result.num_rows, result.computed_rows, result.skipped_rows) == (ROWS, ROWS - 8, 8)
    kept = [row for row in range(ROWS) if row not in places]
    assert load_explanations(tmp_path / "out")["row"][:] == kept
    assert [row["row"] for row in load_explanations(tmp_path / "out", streaming=True)] == kept
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped_rows"] == sorted(places)
    again = run_convnext(tmp_path / "out", data, skip_unreadable=True)
    assert (again.computed_rows, again.skipped_rows) == (0, 8)
    assert "picture-4.png" in caplog.text
    (tmp_path / "picture-4.png").write_bytes(encode(pictures(5)[4]))
    with pytest.raises(ValueError, match="Row 4 of the data set has another image"):
        run_convnext(tmp_path / "out", data, skip_unreadable=True)


def test_a_data_set_of_unreadable_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one readable image, got none in 3 rows"):
        run(tmp_path, Dataset.from_dict({"image": [b"no image"] * 3}), skip_unreadable=True)


def test_a_transform_gets_pictures_and_other_columns(tmp_path):
    """`with_transform` is honoured, on pictures that `load_image` has read."""

    def mirror(batch):
        assert batch["note"] == ["x"] * len(batch["note"])
        return {"image": [image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) for image in batch["image"]]}

    model, data = make_model("vit"), picture_dataset(4)
    run(tmp_path, data.with_transform(mirror), model)
    mirrored = [image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) for image in pictures(4)]
    expected = model(processor()(images=mirrored, return_tensors="pt")["pixel_values"]).logits
    found = torch.tensor(load_explanations(tmp_path)["logits"][:])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_columns_own_mode_is_kept(tmp_path):
    """`Image(mode="L")` is what the data set says its pictures are, in memory and as a stream."""
    model = make_model("vit")
    data = picture_dataset(3).cast_column("image", Image(mode="L"))
    grey = [image.convert("L").convert("RGB") for image in pictures(3)]
    expected = model(processor()(images=grey, return_tensors="pt")["pixel_values"]).logits
    for name, rows in (("memory", data), ("stream", data.to_iterable_dataset())):
        run(tmp_path / name, rows, model)
        found = torch.tensor(load_explanations(tmp_path / name)["logits"][:])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, {"num_labels": 1}, {}],
    ids=["regression", "several labels", "one label", "single label"],
)
def test_scores_are_the_stock_pipelines(options, tmp_path):
    model = make_model("vit", **options)
    run(tmp_path, picture_dataset(3), model)
    # transformers 5.23 does this by itself, its predecessors do not.
    function = {"function_to_apply": "none"} if options.get("problem_type") == "regression" else {}
    classify = pipeline("image-classification", model=model, image_processor=processor(), device="cpu")
    expected = [classify(picture, top_k=1, **function)[0] for picture in pictures(3)]
    for row, entry in zip(load_explanations(tmp_path), expected, strict=True):
        assert row["predicted_label"] == entry["label"]
        assert row["score"] == pytest.approx(entry["score"], abs=1e-6)


def test_numbers_of_numpys_kinds_are_numbers(tmp_path):
    count = np.int64(2)
    run(tmp_path, picture_dataset(3), labels=count, shard_size=count, batch_size=count)
    assert len(load_explanations(tmp_path)[0]["label_ids"]) == 2
    run(tmp_path / "ids", picture_dataset(3), labels=np.array([3, 1]))
    assert load_explanations(tmp_path / "ids")[0]["label_ids"] == [3, 1]


def test_grey_image_models_explain_data_sets(tmp_path):
    """A model of grey images explains a data set by the grey levels of its pictures."""
    model = make_model("vit", num_channels=1)
    grey = ViTImageProcessorPil(size={"height": 16, "width": 24}, image_mean=[0.5], image_std=[0.5])
    explain_dataset(model, picture_dataset(3), tmp_path, image_processor=grey, **OPTIONS)
    pixel_values = grey(images=[image.convert("L") for image in pictures(3)], return_tensors="pt")["pixel_values"]
    found = torch.tensor(load_explanations(tmp_path)["logits"][:])
    torch.testing.assert_close(found, model(pixel_values).logits, atol=1e-6, rtol=1e-5)


def test_images_of_another_grid_are_refused(tmp_path):
    class Uneven:
        """A processor whose size follows the first picture."""

        def __call__(self, images, return_tensors):
            size = {"height": 16, "width": 24 if images[0].width == 14 else 16}
            return ViTImageProcessorPil(size=size)(images=images, return_tensors=return_tensors)

        def to_json_string(self):
            return "{}"

    data = Dataset.from_list([{"image": x.resize((14 if i < 3 else 10, 10))} for i, x in enumerate(pictures())])
    with pytest.raises(ValueError, match="another grid"):
        explain_dataset(make_model("convnext"), data, tmp_path, image_processor=Uneven(), **OPTIONS)
    assert contents(tmp_path) == {}


def test_the_training_mode_stays_and_progress_is_shown(tmp_path, capsys):
    """The model keeps its training mode, and the progress bar shows rows and images per second."""
    model = make_model("vit").train()
    run(tmp_path, model=model, show_progress=True)
    assert model.training
    shown = capsys.readouterr().err
    assert "23/23" in shown
    assert "images/s" in shown


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "Shapley image classifier", {"model": torch.nn.Linear(1, 1)}),
        (TypeError, "choose a split", {"dataset": datasets.DatasetDict()}),
        (ValueError, "at least one row", {"dataset": Dataset.from_dict({"image": []})}),
        (ValueError, "at least one row", {"dataset": IterableDataset.from_generator(lambda: iter(()))}),
        (ValueError, "image_column", {"image_column": "picture"}),
        (ValueError, "labels", {"labels": "best"}),
        (ValueError, "labels", {"labels": 6}),
        (ValueError, "labels", {"labels": ["cat"]}),
        (ValueError, "batch_size", {"batch_size": 0}),
        (ValueError, "shard_size", {"shard_size": 0}),
    ],
)
def test_bad_input_is_refused(error, message, change, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path, **change)
    assert contents(tmp_path) == {}


def run_and_die(folder: Path, stream: bool, after: int | None) -> None:
    """In a forked process: explain, and be killed when `after` lines of its modules have run."""
    process = os.fork()
    if process:
        os.waitpid(process, 0)
        return
    lines = [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in UNDER_TEST:
            return None
        lines[0] += event == "line"
        if lines[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    data = picture_dataset()
    sys.settrace(trace)
    run(folder, data.to_iterable_dataset() if stream else data)
    sys.settrace(None)
    (folder.parent / f"lines-{stream}").write_text(str(lines[0]))
    os._exit(0)


def kill_runs(folder: Path) -> None:
    """What the test of killed runs starts as a process of its own, which may fork safely."""
    draw = random.Random(0)
    run_and_die(folder / "undisturbed", False, None)
    run_and_die(folder / "undisturbed-stream", True, None)
    for number in range(12):
        stream = bool(number % 2)
        total = int((folder / f"lines-{stream}").read_text())
        target = folder / f"killed-{number}"
        for _ in range(2 if number % 4 == 0 else 1):
            run_and_die(target, stream, draw.randrange(1, total))
        (folder / f"left-{number}").write_text(str(len(list(target.glob("part-*")))))
        run_and_die(target, stream, None)


if __name__ == "__main__":
    kill_runs(Path(sys.argv[1]))
