"""The pipeline gives what the model gives, for every kind of input, and refuses the rest with a reason."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import make_model
from datasets import Dataset
from PIL import Image
from test_refinement import additive_model
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessorPil,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from hf_shapley import ShapleyImageClassificationPipeline
from hf_shapley.jobs.training_job import write_predictions

TASK = "shapley-image-classification"
NAMES = ["ant", "bee", "cat", "dog", "eel"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: label for label, name in enumerate(NAMES)}}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 24})


def pictures(count=3, size=(60, 40)):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


def same(left, right):
    """Two results of the pipeline hold the same labels and numbers."""
    assert [entry["label"] for entry in left] == [entry["label"] for entry in right]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one["attributions"], other["attributions"], atol=1e-6)
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


@pytest.fixture(scope="module")
def vit():
    return make_model("vit", **LABELS)


@pytest.fixture(scope="module")
def classifier(vit):
    return pipeline(TASK, model=vit, image_processor=PROCESSOR, device="cpu")


@pytest.fixture(scope="module")
def expected(classifier):
    return classifier(pictures(), top_k=5)


# ---- what it gives


def test_checks_tell_exact_maps_from_wrong_ones():
    """Where patches do not mix, votes are the exact Shapley values; a head of random weights knows nothing of them."""

    def verdicts(model, **options):
        classifier = ShapleyImageClassificationPipeline(model=model, image_processor=PROCESSOR, device="cpu")
        return [entry["check"]["verdict"] for entries in classifier(pictures(), **options) for entry in entries]

    model = additive_model()
    assert verdicts(model, check=16) == ["good"] * 15
    assert verdicts(make_model("vit", head="votes+influence"), check=64, top_k=1) == ["do not trust"] * 3
    right = model._attributions
    model._attributions = lambda *args: -right(*args)
    assert verdicts(model, check=64, top_k=1) == ["do not trust"] * 3
    # What is judged is what is shown: refined maps are exact again, whatever they began with.
    assert verdicts(model, check=64, top_k=1, evaluations=64) == ["good"] * 3


def test_a_check_is_the_models_own(vit, classifier):
    """The same error for a picture alone, in a batch, and from the model itself with that seed."""
    generator = torch.Generator().manual_seed(7)
    pixel_values = PROCESSOR(images=pictures()[1], return_tensors="pt")["pixel_values"]
    expected = vit.check_explanation(pixel_values, ["cat", "ant"], generator=generator)[0]
    options = {"labels": ["cat", "ant"], "check": 16, "seed": 7}
    alone = {entry["label"]: entry["check"]["error"] for entry in classifier(pictures()[1], **options)}
    assert alone == dict(zip(["cat", "ant"], expected.tolist(), strict=True))
    batched = classifier(pictures(), batch_size=3, **options)[1]
    assert {entry["label"]: entry["check"]["error"] for entry in batched} == pytest.approx(alone, rel=1e-4)
    assert "check" not in classifier(pictures()[1])[0]
    assert "check" not in classifier(pictures()[1], check=0)[0]


def test_evaluations_refine_the_maps(vit, classifier):
    generator = torch.Generator().manual_seed(0)
    pixel_values = PROCESSOR(images=pictures()[0], return_tensors="pt")["pixel_values"]
    entries = classifier(pictures()[0], top_k=2, evaluations=64)
    labels = [entry["label"] for entry in entries]
    expected = vit.explain(pixel_values, labels, evaluations=64, generator=generator)[0]
    for entry, one in zip(entries, expected, strict=True):
        np.testing.assert_allclose(entry["attributions"], one, atol=1e-5)
        assert entry["base_value"] + entry["attributions"].sum() == pytest.approx(entry["logit"], abs=1e-4)


def test_entries_hold_what_the_model_gives(model, backbone):
    classifier = ShapleyImageClassificationPipeline(model=model, image_processor=PROCESSOR, device="cpu")
    image = pictures(1)[0]
    entries = classifier(image, top_k=5)
    pixel_values = PROCESSOR(images=image, return_tensors="pt")["pixel_values"]
    output = model(pixel_values)
    logits = output.logits[0]
    maps = model.explain(pixel_values)[0]
    order = logits.argsort(descending=True).tolist()
    assert [entry["label"] for entry in entries] == [f"LABEL_{label}" for label in order]
    for entry, label in zip(entries, order, strict=True):
        np.testing.assert_allclose(entry["attributions"], maps[label].numpy(), atol=1e-6)
        assert entry["score"] == pytest.approx(logits.softmax(0)[label].item(), abs=1e-6)
        assert entry["base_value"] == output.base_values[label].item()


def test_attributions_and_base_value_give_the_logit(expected):
    """The base value and the attributions add up to the logit."""
    for entry in (entry for entries in expected for entry in entries):
        assert entry["attributions"].shape == (4, 6)
        assert entry["attributions"].dtype == np.float32
        assert entry["base_value"] + entry["attributions"].sum() == pytest.approx(entry["logit"], abs=1e-5)


def test_the_best_labels_come_first(classifier):
    entries = classifier(pictures(1)[0], top_k=3)
    scores = [entry["score"] for entry in entries]
    assert len(entries) == 3
    assert scores == sorted(scores, reverse=True)


def test_chosen_labels_are_all_given(classifier, expected):
    entries = classifier(pictures(1)[0], labels=["eel", 1])
    same(entries, [entry for entry in expected[0] if entry["label"] in ("eel", "bee")])
    assert [entry["label"] for entry in classifier(pictures(1)[0], labels="dog")] == ["dog"]
    assert len(classifier(pictures(1)[0], labels=["eel", 1], top_k=1)) == 1


def test_labels_that_are_not_shown_are_not_attributed():
    model, attributed = make_model("vit"), []
    model.register_forward_hook(lambda _, arguments, output: attributed.append(output.attributions.shape[-1]))
    classifier = pipeline(TASK, model=model, image_processor=PROCESSOR, device="cpu", top_k=2)
    for options in ({}, {"top_k": 1}, {"labels": [3, 1, 0]}):
        classifier(pictures(1)[0], **options)
    assert attributed == [2, 1, 3]


@pytest.mark.parametrize(
    "function, apply",
    [
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum()),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("none", np.array),
    ],
)
def test_scores_are_the_function_of_the_logits(classifier, function, apply):
    entries = classifier(pictures(1)[0], function_to_apply=function)
    logits = np.array([entry["logit"] for entry in entries])
    np.testing.assert_allclose([entry["score"] for entry in entries], apply(logits), atol=1e-6)


PROBLEMS = ["single_label_classification", "multi_label_classification", "regression", None]
CASES = [(problem, 5) for problem in PROBLEMS] + [(problem, 1) for problem in PROBLEMS[1:]]


@pytest.mark.parametrize("problem, num_labels", CASES)
def test_problem_types_decide_scores_as_in_stock_pipelines(problem, num_labels):
    """Scores follow the problem type as in the stock pipeline."""
    model = make_model("vit", problem_type=problem, num_labels=num_labels)
    image = pictures(1)[0]
    ours = pipeline(TASK, model=model, image_processor=PROCESSOR, device="cpu")(image)
    # transformers 5.23 does this by itself, its predecessors do not.
    options = {"function_to_apply": "none"} if problem == "regression" else {}
    stock = pipeline("image-classification", model=model, image_processor=PROCESSOR, device="cpu")(image, **options)
    assert [entry["label"] for entry in ours] == [entry["label"] for entry in stock]
    np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in stock], atol=1e-6)
    if problem in (None, "single_label_classification") and num_labels > 1:
        assert sum(entry["score"] for entry in ours) == pytest.approx(1)


@pytest.mark.parametrize("problem, num_labels", CASES)
def test_training_jobs_predict_the_pipelines_scores(problem, num_labels, tmp_path):
    """The predictions of a training job have the labels and scores of the pipeline."""
    model = make_model("vit", problem_type=problem, num_labels=num_labels)
    entries = [pipeline(TASK, model=model, image_processor=PROCESSOR, device="cpu")(image)[0] for image in pictures()]
    pixel_values = PROCESSOR(images=pictures(), return_tensors="pt")["pixel_values"]
    result = SimpleNamespace(predictions=model(pixel_values).logits.detach().numpy(), metrics={})
    trainer = SimpleNamespace(predict=lambda *_, **__: result, model=model, is_world_process_zero=lambda: True)
    write_predictions(trainer, None, tmp_path / "predictions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [entry["label"] for entry in entries]
    assert [line["score"] for line in lines] == pytest.approx([entry["score"] for entry in entries], abs=1e-5)


def test_numbers_of_numpys_kinds_are_numbers(classifier):
    assert len(classifier(pictures(1)[0], top_k=np.int64(3))) == 3
    assert [entry["label"] for entry in classifier(pictures(1)[0], labels=np.int64(3))] == ["dog"]


def test_pipeline_options_hold_for_every_call(vit):
    """Options given to the pipeline hold for every call that does not give its own."""
    classifier = pipeline(TASK, model=vit, image_processor=PROCESSOR, device="cpu", top_k=1, function_to_apply="none")
    (entry,) = classifier(pictures(1)[0])
    assert entry["score"] == entry["logit"]
    assert len(classifier(pictures(1)[0], top_k=2)) == 2


def test_half_precision_gives_float32_attributions_that_add_up(vit):
    classifier = pipeline(
        TASK, model=make_model("vit").bfloat16(), image_processor=PROCESSOR, device="cpu", batch_size=2
    )
    for entry in (entry for entries in classifier(pictures()) for entry in entries):
        assert entry["attributions"].dtype == np.float32
        assert entry["base_value"] + entry["attributions"].sum() == pytest.approx(entry["logit"], abs=1e-5)


def test_an_entry_keeps_no_other_label_in_memory(expected):
    assert expected[0][0]["attributions"].base.untyped_storage().nbytes() == 4 * 6 * 4


# ---- overlays


def test_overlays_have_the_upright_pictures_size(classifier):
    """An overlay has the size of the upright picture, and is there only where asked for."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = encoded(pictures(1)[0], format="JPEG", exif=exif)
    entries = classifier(turned, top_k=2, overlay=True)
    assert [entry["overlay"].size for entry in entries] == [(40, 60)] * 2
    assert "overlay" not in classifier(turned)[0]


def test_overlays_of_one_picture_share_a_scale(classifier):
    entries = classifier(Image.new("RGB", (60, 40), "black"), top_k=5, overlay=True)
    strongest = [np.abs(entry["attributions"]).max() for entry in entries]
    # The strongest patch of all takes a full colour at 0.6 of the blend; a weaker map stays whiter, so lighter.
    darkest = [np.asarray(entry["overlay"]).max(axis=2).min() for entry in entries]
    assert int(np.argmax(strongest)) == int(np.argmin(darkest))
    assert len(set(darkest)) > 1


def test_overlays_leave_cropped_edges_alone():
    """An overlay leaves alone what a centre crop hides from the model."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0)
    classifier = pipeline(TASK, model=make_model("convnext"), image_processor=processor, device="cpu")
    image = pictures(1, size=(40, 16))[0]
    overlay = np.asarray(classifier(image, top_k=1, overlay=True)[0]["overlay"])
    np.testing.assert_array_equal(overlay[:, :12], np.asarray(image)[:, :12])
    np.testing.assert_array_equal(overlay[:, 28:], np.asarray(image)[:, 28:])
    assert (overlay[:, 12:28] != np.asarray(image)[:, 12:28]).any()


# ---- many pictures


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_changes_nothing(classifier, expected, batch_size):
    for left, right in zip(
        classifier(pictures(), top_k=5, batch_size=batch_size, overlay=True), expected, strict=True
    ):
        same(left, right)
        assert left[0]["overlay"].size == (60, 40)


def test_pictures_of_many_sizes_share_a_batch(classifier):
    sizes = [(60, 40), (24, 16), (7, 90)]
    entries = classifier([Image.new("RGB", size, "red") for size in sizes], batch_size=3, overlay=True)
    assert [entry[0]["overlay"].size for entry in entries] == sizes


def test_every_container_of_pictures_gives_the_same(classifier, expected):
    dataset = Dataset.from_dict({"image": [{"bytes": encoded(image), "path": None} for image in pictures()]})
    from datasets import Image as ImageFeature

    decoded = dataset.cast_column("image", ImageFeature())
    undecoded = dataset.cast_column("image", ImageFeature(decode=False))
    containers = {
        "tuple": tuple(pictures()),
        "column": decoded["image"],
        "undecoded column": undecoded["image"],
        "KeyDataset": KeyDataset(decoded, "image"),
        "generator": (image for image in pictures()),
        "iterator": iter(pictures()),
        "stream": decoded.to_iterable_dataset()["image"],
    }
    for name, container in containers.items():
        results = list(classifier(container, top_k=5, batch_size=2))
        assert len(results) == 3, name
        for left, right in zip(results, expected, strict=True):
            same(left, right)


def test_sequences_give_lists_and_streams_are_lazy(classifier):
    read = []

    def stream():
        for image in pictures():
            read.append(1)
            yield image

    results = classifier(stream())
    assert len(read) <= 1  # transformers looks at the first
    next(iter(results))
    assert len(read) <= 2
    assert isinstance(classifier(tuple(pictures())), list)
    assert classifier([]) == classifier(()) == []


def test_rows_instead_of_a_column_are_refused(classifier):
    dataset = Dataset.from_dict({"image": ["a.png"], "label": [0]})
    with pytest.raises(TypeError, match="give the column"):
        list(classifier(dataset))


# ---- one picture, from anywhere


@pytest.fixture(scope="module")
def site():
    """A web site with one picture, one page that is none, one that is too slow and one that breaks off."""
    picture = encoded(pictures(1)[0])
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow.png":
                release.wait(10)
                return
            found = {"/picture.png": picture, "/page.html": b"<html>", "/broken.png": picture}.get(self.path)
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write((found or b"")[: 100 if self.path == "/broken.png" else None])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()
    thread.join()
    server.server_close()


FORMS = ["image", "path", "Path", "bytes", "bytes dict", "path dict", "data url", "url", "bytearray", "memoryview"]
FORMS += ["array", "tensor", "BytesIO", "open file", "data url with line breaks", "quoted data url", "base64"]
FORMS += ["base64 with line breaks"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same(classifier, expected, form, tmp_path, site):
    image = pictures(1)[0]
    path = tmp_path / "http picture.png"  # not to be taken for a URL
    path.write_bytes(encoded(image))
    forms = {
        "image": image,
        "path": str(path),
        "Path": path,
        "bytes": encoded(image),
        "bytes dict": {"bytes": encoded(image), "path": "ignored.png"},
        "path dict": {"bytes": None, "path": str(path)},
        "data url": "data:image/png;base64," + base64.b64encode(encoded(image)).decode(),
        "url": f"{site}/picture.png",
        "bytearray": bytearray(encoded(image)),
        "memoryview": memoryview(encoded(image)),
        "array": np.asarray(image),
        "tensor": torch.tensor(np.asarray(image)).permute(2, 0, 1),
        "BytesIO": io.BytesIO(encoded(image)),
        "data url with line breaks": "data:image/png;base64," + base64.encodebytes(encoded(image)).decode(),
        "quoted data url": "data:image/png;base64," + quote(base64.b64encode(encoded(image)), safe=""),
        "base64": base64.b64encode(encoded(image)).decode(),
        "base64 with line breaks": base64.encodebytes(encoded(image)).decode(),
    }
    if form == "open file":
        with path.open("rb") as file:
            same(classifier(file, top_k=5), expected[0])
            same(classifier([file], top_k=5)[0], expected[0])
        return
    same(classifier(forms[form], top_k=5), expected[0])
    same(classifier([forms[form]], top_k=5)[0], expected[0])


def test_an_array_of_pictures_is_many_pictures(classifier, expected):
    stacked = np.stack([np.asarray(image) for image in pictures()])
    for batch in (stacked, torch.tensor(stacked).permute(0, 3, 1, 2)):
        for left, right in zip(classifier(batch, top_k=5), expected, strict=True):
            same(left, right)


def test_missing_files_of_long_names_are_named(classifier):
    """A missing file is named even where its name is long."""
    with pytest.raises(FileNotFoundError, match="missing.png"):
        classifier("x" * 90 + "/missing.png")


def test_pictures_are_refused_by_their_processed_size():
    """A file of 140 bytes would take gigabytes where its shorter edge, of one pixel, is enlarged to hundreds."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)
    small = encoded(Image.new("1", (20_000, 1)), optimize=True)
    assert len(small) < 200
    classifier = pipeline(TASK, model=make_model("convnext"), image_processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"20000 x 1 .* enlarge it to 5120000 x 256, .* 64000000 pixels"):
        classifier(small)
    assert len(classifier(Image.new("RGB", (300, 2)))) == 5


def test_grey_image_models_get_grey_levels():
    """A model of grey images is asked with grey levels, and its overlay has the picture's size."""
    model, image = make_model("vit", num_channels=1), pictures(1)[0]
    grey = ViTImageProcessorPil(size={"height": 16, "width": 24}, image_mean=[0.5], image_std=[0.5])
    logits = model(grey(images=image.convert("L"), return_tensors="pt")["pixel_values"]).logits[0]
    entries = pipeline(TASK, model=model, image_processor=grey, device="cpu")(image, overlay=True)
    assert [entry["logit"] for entry in entries] == pytest.approx(logits.sort(descending=True).values.tolist())
    assert entries[0]["overlay"].size == image.size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_is_read_as_rgb(classifier, mode):
    """A picture of every mode is read as its RGB form."""
    level = 255 * 257 if mode.startswith("I") else 255 if mode != "CMYK" else 0
    image = Image.new(mode, (60, 40), level if mode not in ("LA", "RGBA", "CMYK") else (level,) * len(mode))
    if mode == "P":
        image = Image.new("RGB", (60, 40), "white").convert("P")
    same(classifier(image), classifier(Image.new("RGB", (60, 40), "white")))


def test_refused_pictures_say_why(classifier, tmp_path, site):
    empty = tmp_path / "empty.png"
    empty.touch()
    cases = [
        (str(empty), OSError, "it is empty"),
        (b"", OSError, "it is empty"),
        ("data:image/png,abcd", OSError, "not marked by"),
        (np.zeros((4, 4)), ValueError, "scale to 0"),
        (encoded(pictures(1)[0])[:200], OSError, "complete file"),
        (b"no picture at all", OSError, "no known format"),
        (str(tmp_path / "missing.png"), FileNotFoundError, "missing.png"),
        (Image.new("1", (8001, 8000)), ValueError, "64000000 pixels"),
        (Image.new("RGB", (0, 5)), ValueError, "at least one pixel"),
        ("data:image/png;base64,!!!!", OSError, "base64 is damaged"),
        ({"label": 3}, TypeError, "'bytes' or 'path'"),
        (3, TypeError, "must be a picture"),
        (f"{site}/absent.png", OSError, "404"),
        (f"{site}/page.html", OSError, "no known format"),
        (f"{site}/broken.png", OSError, "truncated"),
        ("http://[", OSError, "Cannot fetch"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            classifier(source)


def test_a_slow_site_is_given_up(classifier, site):
    with pytest.raises(OSError, match="timed out"):
        classifier(f"{site}/slow.png", timeout=0.1)


def test_a_download_has_a_limit(classifier, site, monkeypatch):
    monkeypatch.setattr("hf_shapley.models.pipeline_shapley.MAX_DOWNLOAD", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        classifier(f"{site}/picture.png")


# ---- options


def test_an_answer_that_is_not_finite_is_refused():
    model = make_model("vit", num_labels=5)
    model.classifier.bias.data[0] = float("nan")
    classifier = pipeline(TASK, model=model, image_processor=PROCESSOR)
    with pytest.raises(ValueError, match="answers NaN or infinity"):
        classifier(pictures()[0])


@pytest.mark.parametrize(
    "option, message",
    [
        ({"check": True}, "`check` must be 0 or a number of evaluations from 2 to 16384, got True"),
        ({"check": 16.0}, "`check` must be"),
        ({"evaluations": 1}, "`evaluations` must be"),
        ({"evaluations": 20_000}, "`evaluations` must be"),
        ({"seed": -1}, "`seed` must be"),
        ({"top_k": 0}, "`top_k` must be"),
        ({"top_k": "all"}, "`top_k` must be"),
        ({"labels": ["cow"]}, "got 'cow'"),
        ({"labels": [5]}, "got 5"),
        ({"labels": [-1]}, "got -1"),
        ({"labels": []}, "got none"),
        ({"function_to_apply": "tanh"}, "'tanh'"),
    ],
)
def test_unknown_options_are_refused(classifier, option, message):
    with pytest.raises(ValueError, match=message):
        classifier(pictures(1)[0], **option)


def test_models_without_attributions_are_refused(vit):
    stock = ViTForImageClassification(vit.config)
    with pytest.raises(TypeError, match="must be a Shapley image classifier, got ViTForImageClassification"):
        ShapleyImageClassificationPipeline(model=stock, image_processor=PROCESSOR, device="cpu")


def test_a_missing_image_processor_is_named(vit):
    with pytest.raises(ValueError, match="`image_processor` must be given"):
        ShapleyImageClassificationPipeline(model=vit, device="cpu")


# ---- folders


def expected_from(folder, vit):
    """What the model says of a picture, read by the processor that the folder gives: torchvision's, if it is there."""
    processor = AutoImageProcessor.from_pretrained(folder)
    return pipeline(TASK, model=vit, image_processor=processor, device="cpu")(pictures(1)[0])


def test_a_saved_folder_serves_both_pipelines_without_trust(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert TASK in json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    expected = expected_from(tmp_path, vit)
    same(pipeline(TASK, model=str(tmp_path), device="cpu")(pictures(1)[0]), expected)
    stock = pipeline("image-classification", model=str(tmp_path), device="cpu")(pictures(1)[0])
    assert [entry["label"] for entry in stock] == [entry["label"] for entry in expected]


def test_a_saved_pipeline_comes_back(vit, tmp_path):
    pipeline(TASK, model=vit, image_processor=PROCESSOR, device="cpu").save_pretrained(tmp_path)
    expected = expected_from(tmp_path, vit)
    same(pipeline(TASK, model=str(tmp_path), device="cpu")(pictures(1)[0]), expected)
    # Saved once more: nothing of the first load may stand in the way.
    again = tmp_path / "again"
    pipeline(TASK, model=str(tmp_path), device="cpu").save_pretrained(again)
    same(pipeline(TASK, model=str(again), device="cpu")(pictures(1)[0]), expected)
