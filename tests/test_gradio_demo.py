"""The Gradio demo, driven as a visitor would: in a browser, with pictures of every kind."""

import base64
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from browser import found_browser
from conftest import make_model
from PIL import Image
from transformers import ConvNextImageProcessorPil, pipeline

from hf_shapley.models.pipeline_shapley import TASK
from hf_shapley.training.digits import train_digits_model

ROOT = Path(__file__).parents[1]
APP = ROOT / "examples" / "gradio_demo" / "app.py"
SCREENSHOT = ROOT / "docs" / "images" / "gradio_demo.png"
# A new picture for the README is taken on request, or where there is none: tests leave the tree as it is.
TAKES_SCREENSHOT = bool(os.environ.get("HF_SHAPLEY_SCREENSHOT")) or not SCREENSHOT.exists()

gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def demo():
    """The example's module."""
    spec = importlib.util.spec_from_file_location("gradio_demo_app", APP)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def classifier():
    model, image_processor = train_digits_model(epochs=2)
    # A label that would be a script, if it were not escaped.
    names = [*"01234567", "<img src=x onerror=document.title='owned'>", "9"]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


@pytest.fixture(scope="module")
def examples(demo, tmp_path_factory):
    return demo.save_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def explanation(demo, classifier, examples):
    return demo.explain(classifier, Path(examples[3]).read_bytes())


def encoded(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def test_attributions_of_all_patches_give_the_prediction(explanation):
    torch.testing.assert_close(explanation.attributed, explanation.logits)
    assert explanation.present.all()


def test_what_is_measured_is_the_game_itself(demo, classifier, explanation):
    present = demo.without_top(explanation, label=3, count=5)
    assert present.sum() == 11
    # None of the patches left speaks more for the label than one of those removed.
    assert explanation.maps[3][present].max() <= explanation.maps[3][~present].min()
    measured = demo.with_present(classifier, explanation, present)
    expected = classifier.model.coalition_values(explanation.pixel_values, present.view(1, 1, 16))[0, 0]
    torch.testing.assert_close(measured.values, expected)
    torch.testing.assert_close(measured.attributed, explanation.base_values + explanation.maps[:, present].sum(1))
    empty = demo.with_present(classifier, explanation, torch.zeros(4, 4, dtype=torch.bool))
    torch.testing.assert_close(empty.values, explanation.base_values)


def test_a_click_toggles_its_patch(demo, classifier, explanation):
    """A click removes its patch, a second one puts it back, and one beside the picture does nothing."""
    width, height = explanation.picture.size
    present = demo.toggled(explanation, 0.9 * width, 0.1 * height)
    assert present.flatten().tolist() == [index != 3 for index in range(16)]
    once = demo.with_present(classifier, explanation, present)
    assert demo.toggled(once, 0.9 * width, 0.1 * height).all()
    assert demo.toggled(explanation, width + 5, 0).all()  # outside of what the model sees


def test_labels_are_shown_as_text(demo, explanation):
    names = ["<b>bold</b>"] * 10
    texts = [demo.readout(explanation, names, [3, 4]), *demo.map_titles(explanation, names, 3, 4)]
    assert all("&lt;b&gt;bold" in text and "<b>bold" not in text for text in texts)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (1500, 40)])
def test_pictures_of_any_shape_are_explained(demo, classifier, size):
    answers = demo.Answers(classifier)
    explanation = demo.explain(classifier, encoded(Image.new("RGB", size, "green")))
    assert max(explanation.picture.size) <= demo.SHOWN_EDGES[1]
    assert None not in answers.view(explanation, 0, 1)


def test_too_large_and_broken_pictures_are_refused(demo, classifier, tmp_path):
    with pytest.raises(ValueError, match="10 MB"):
        demo.explain(classifier, bytes(demo.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="pixels"):
        demo.explain(classifier, encoded(Image.new("1", (5001, 5000))))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(gradio.Error, match="Cannot read"):
        demo.Answers(classifier).on_picture(str(broken))


def test_a_non_picture_is_answered_by_the_library(demo, classifier, tmp_path):
    """Gradio itself looks into no file that comes in: what it raised there left a blank page and no message."""
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    given = demo._source(()).preprocess(gradio.data_classes.ImageData(path=str(path), orig_name="text.jpg"))
    with pytest.raises(gradio.Error, match="no known format"):
        demo.Answers(classifier).on_picture(given)
    assert demo._source(()).preprocess(None) is None


def test_a_refusal_speaks_to_visitors(demo, classifier, tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (5001, 5000)).save(path)
    with pytest.raises(gradio.Error, match="25000000 pixels .* Downscale the picture") as refused:
        demo.Answers(classifier).on_picture(str(path))
    assert "max_pixels" not in str(refused.value)


def test_pictures_enlarged_beyond_measure_are_refused(demo):
    """A picture that would be enlarged beyond measure is refused."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 224})
    classifier = pipeline(TASK, model=make_model("convnext"), image_processor=processor, device="cpu")
    with pytest.raises(ValueError, match="enlarge it to 5120000 x 256"):
        demo.explain(classifier, encoded(Image.new("1", (20_000, 1))))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    """Where the server puts what visitors upload."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def url(classifier, uploads, tmp_path_factory):
    """Address of the demo, served as a user would: by its own process."""
    folder = tmp_path_factory.mktemp("server")
    classifier.save_pretrained(folder / "model")
    command = [sys.executable, "-u", str(APP)] + ([] if TAKES_SCREENSHOT else ["--model", str(folder / "model")])
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    with open(folder / "log", "w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        try:
            yield address_in(folder / "log", server)
        finally:
            server.terminate()
            server.wait(timeout=30)


def address_in(log: Path, server: subprocess.Popen) -> str:
    """Wait until the server has said where it listens."""
    for _ in range(1200):
        if found := re.search(r"http://[\d.]+:\d+", log.read_text()):
            return found.group()
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"The demo does not answer:\n{log.read_text()[-4000:]}")


def upload(url: str, name: str, data: bytes) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{url}/gradio_api/upload", files={"files": (name, data)})


def test_the_server_takes_no_file_beyond_the_limit(demo, url):
    assert upload(url, "picture.png", b"0" * (demo.MAX_BYTES + 1)).status_code == 413
    assert upload(url, "picture.png", b"0" * 1000).status_code == 200


@pytest.mark.parametrize("name", ["../../../evil.png", "/etc/evil.png", "..", "<img src=x>.png", "a\\..\\evil.png"])
def test_an_uploads_name_leads_nowhere(name, url, uploads):
    answer = upload(url, name, encoded(Image.new("RGB", (4, 4))))
    assert answer.status_code in (200, 400)
    for path in answer.json() if answer.status_code == 200 else []:
        assert Path(path).resolve().is_relative_to(uploads.resolve())
        assert not set("<>") & set(Path(path).name)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = found_browser()
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


def open_page(browser, url: str, path: str):
    """The demo once it has answered a picture."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_selector("#source input[type=file]", state="attached")
    before = shown(page, "board")
    page.set_input_files("#source input[type=file]", path)
    wait_for_change(page, "board", before)
    return page


def answers_asked_for(page, api_name: str) -> list:
    """The requests that the page sends from now on for what has this name in the API."""
    ids = page.evaluate("name => gradio_config.dependencies.filter(x => x.api_name === name).map(x => x.id)", api_name)
    assert len(ids) == 1
    asked = []

    def look(request) -> None:
        if "/queue/join" in request.url and request.post_data_json["fn_index"] in ids:
            asked.append(request)

    page.on("request", look)
    return asked


def shown(page, name: str) -> bytes:
    """The picture that a component shows, or nothing."""
    script = """image => fetch(image.src).then(answer => answer.blob()).then(blob => new Promise(done => {
        const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(blob)}))"""
    picture = page.locator(f"#{name} img")
    return base64.b64decode(picture.evaluate(script).partition(",")[2]) if picture.count() else b""


def wait_for_change(page, name: str, before: bytes) -> bytes:
    """The next picture that a component shows."""
    for _ in range(300):
        if (after := shown(page, name)) != before:
            return after
        page.wait_for_timeout(100)
    raise AssertionError(f"#{name} still shows the same picture after 30 seconds.")


def choose(page, name: str, label: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=label, exact=True).click()


def test_visitors_upload_ask_and_remove_patches(browser, url, examples):
    """A visitor uploads a picture, asks about labels, removes patches and puts them back."""
    page = open_page(browser, url, examples[0])
    page.wait_for_selector("#map_a img")
    first = shown(page, "map_a")
    asked = answers_asked_for(page, "explain")
    page.set_input_files("#source input[type=file]", examples[3])
    uploaded = wait_for_change(page, "map_a", first)
    whole = shown(page, "board")
    assert "0 of 16 patches removed" in page.locator("#readout").inner_text()

    page.locator("#count input[type=number]").fill("4")
    page.locator("#count input[type=number]").press("Enter")
    page.get_by_text("4 of 16 patches removed").wait_for()
    removed = wait_for_change(page, "board", whole)
    assert shown(page, "map_a") == uploaded  # what is explained is the whole picture
    if TAKES_SCREENSHOT:
        page.mouse.move(0, 0)
        SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOT, full_page=True)

    difference = shown(page, "map_difference")
    choose(page, "label_a", "7")
    wait_for_change(page, "map_a", uploaded)
    wait_for_change(page, "map_difference", difference)
    page.get_by_text("For “7”", exact=True).wait_for()
    assert shown(page, "board") == removed

    page.locator("#reset").click()
    page.get_by_text("0 of 16 patches removed").wait_for()
    assert wait_for_change(page, "board", removed) == whole
    box = page.locator("#board img").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2 + 20)
    page.get_by_text("1 of 16 patches removed").wait_for()
    assert len(asked) == 1  # a second answer of the same picture would put all patches back, whenever it comes


def test_pictures_during_an_answer_are_not_lost(browser, url, examples):
    """A picture that comes while another is answered is not lost."""
    page = browser.new_page()
    held = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    page.goto(url)
    page.wait_for_selector("#source input[type=file]", state="attached")
    while not held:
        page.wait_for_timeout(100)
    with page.expect_response("**/upload?*"):
        page.set_input_files("#source input[type=file]", examples[3])
    page.wait_for_selector("#source img")
    before = shown(page, "map_a")
    held[0].continue_()
    wait_for_change(page, "map_a", before)


def test_two_visitors_do_not_see_each_others_pictures(browser, url, examples):
    pages = [open_page(browser, url, examples[index]) for index in (3, 5)]
    boards = [shown(page, "board") for page in pages]
    assert boards[0] != boards[1]
    for page in pages:
        page.locator("#count input[type=number]").fill("2")
        page.locator("#count input[type=number]").press("Enter")
        page.get_by_text("2 of 16 patches removed").wait_for()
    for page in pages:
        page.locator("#reset").click()
        page.get_by_text("0 of 16 patches removed").wait_for()
    assert [shown(page, "board") for page in pages] == boards


@pytest.mark.skipif(TAKES_SCREENSHOT, reason="the screenshot is taken with ordinary labels")
def test_a_label_cannot_run_as_a_script(browser, url, examples):
    page = open_page(browser, url, examples[0])
    page.locator("#label_b input").click()
    page.get_by_role("option").nth(8).click()
    page.get_by_text("Label “<img src=x").wait_for()
    assert page.title() == "hf_shapley"
    assert page.locator("img[src=x]").count() == 0
