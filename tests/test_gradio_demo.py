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
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil, pipeline

import hf_shapley
from hf_shapley.faithfulness.estimators import exact_shapley
from hf_shapley.models.pipeline_shapley import TASK
from hf_shapley.models.posterior import GOOD_ERROR, ROUGH_ERROR, verdict
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


@pytest.fixture
def answers(demo, classifier):
    return demo.Answers(classifier)


def words(parts: list) -> str:
    """All that a list of outputs says, tags included."""
    return " ".join(part for part in parts if isinstance(part, str))


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


def test_too_large_pictures_are_refused(demo, classifier):
    with pytest.raises(ValueError, match="10 MB"):
        demo.explain(classifier, bytes(demo.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="pixels"):
        demo.explain(classifier, encoded(Image.new("1", (5001, 5000))))


def test_refusals_are_said_in_place_of_maps(answers, tmp_path):
    """A picture that is refused leaves neither an error nor another picture's maps, but a reason and what to do."""
    broken, large, gone = tmp_path / "broken.png", tmp_path / "large.png", tmp_path / "gone.png"
    broken.write_bytes(b"<b>no</b> picture")
    Image.new("1", (5001, 5000)).save(large)
    wanted = {
        broken: "cannot be explained.*no known format.*Choose another one",
        large: "cannot be explained.*25000000 pixels .*Downscale the picture",
        gone: "no longer kept.*choose a picture again",
    }
    for path, reason in wanted.items():
        state, *outputs = answers.on_picture(str(path))
        assert state is None
        assert re.search(reason, words(outputs))
        assert not re.search(f"max_pixels|{tmp_path}|<b>no</b>", words(outputs))
        assert not any(isinstance(part, Image.Image) for part in outputs)


def test_file_without_picture_reaches_the_library(demo, answers, tmp_path):
    """Gradio itself looks into no file that comes in: what it raised there left a blank page and no message."""
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    given = demo._source(()).preprocess(gradio.data_classes.ImageData(path=str(path), orig_name="text.jpg"))
    assert "no known format" in words(answers.on_picture(given))
    assert demo._source(()).preprocess(None) is None


@pytest.mark.parametrize("has_examples", [False, True])
def test_without_picture_page_says_what_to_do(has_examples, demo, classifier):
    """An empty page asks for a picture, and speaks of examples only where there are any: it opens with the first."""
    answers = demo.Answers(classifier, has_examples)
    said = words(answers.on_picture(None))
    assert "No picture yet" in said and "upload" in said
    assert ("choose an example" in said) is has_examples
    assert answers.opening == (None if has_examples else words(answers.on_picture(None)))


def test_expired_pictures_are_said_to_be_gone(answers):
    """Whatever is asked of a picture that is no longer kept is answered by what to do."""
    asked = (None, 3, 4)
    event = gradio.SelectData(None, {"index": [0, 0], "value": None})
    shown = [answers.on_count(*asked, 2), answers.on_click(*asked, event), answers.on_reset(*asked)]
    shown += [answers.on_a(*asked), answers.on_b(*asked), answers.view(*asked)]
    assert all("no longer kept" in words(parts) for parts in shown)
    assert answers.on_check(*asked) is answers.on_refine(*asked) is None


def test_labels_a_and_b_always_differ(answers, explanation):
    """Whichever of the two is chosen, the other one gives way: to the likeliest label that is left."""
    first, second, *_ = explanation.likeliest
    assert answers.on_picture(None)[2:4] == [None, None]
    for label in range(10):
        other = second if label == first else first
        assert answers.on_a(explanation, label, label)[0] == other
        assert answers.on_b(explanation, label, label)[0] == other
        free = (label + 1) % 10
        assert answers.on_a(explanation, label, free)[0] == free


def test_single_label_has_a_single_map(demo):
    """A model of one label has nothing to be against: one map, one check, and it can be refined."""
    model = make_model("vit", num_labels=1)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 24})
    classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu")
    answers = demo.Answers(classifier)
    explanation = demo.explain(classifier, encoded(Image.new("RGB", (24, 16), "green")))
    answers.on_refine(explanation, 0, None)
    assert explanation.found.refined == {0}
    assert sum(isinstance(part, Image.Image) for part in answers.view(explanation, 0, None)) == 2  # and the board


def test_every_map_has_its_verdict(demo, classifier, explanation):
    """A and B have the error that `check_explanation` gives them, in words, with a number and what to do."""
    demo.check(classifier, explanation, 3, 4)
    generator = torch.Generator().manual_seed(0)
    expected = classifier.model.check_explanation(
        explanation.pixel_values, [3, 4], evaluations=demo.CHECK, generator=generator
    )[0].tolist()
    assert [explanation.found.errors[label] for label in (3, 4)] == expected
    said = demo.map_checks(explanation, 3, 4)
    for text, error in zip(said, [*expected, explanation.found.differences[3, 4]], strict=True):
        assert f">{verdict(error)}<" in text and f"{error:.2f}" in text
        assert demo.ADVICE[verdict(error)] in text


@pytest.mark.parametrize("error", [0.0, GOOD_ERROR, ROUGH_ERROR, 1.5, float("nan")])
def test_verdicts_are_the_librarys_own(error, demo):
    """Where good ends and rough ends is what the library says, as is a map of unknown error."""
    assert f">{verdict(error)}<" in demo.check_in_words(error, False)
    assert demo.ADVICE_ONCE_REFINED[verdict(error)] in demo.check_in_words(error, True)
    assert "Refine" not in demo.check_in_words(error, True)
    assert f"good up to {GOOD_ERROR}, rough up to {ROUGH_ERROR}" in demo.legend(1.0)


def test_check_of_difference_tells_right_from_wrong(demo, classifier, explanation):
    """The map of A less B is judged in its own game: exact values pass, and their opposite does not."""
    exact = exact_shapley(classifier.model.game(explanation.pixel_values[0]), num_players=16).T.view(10, 4, 4)
    errors = []
    for maps in (exact.float(), -exact.float()):
        explanation.found.maps = maps
        draws = torch.Generator().manual_seed(0)
        errors.append(demo.difference_error(classifier, explanation, 3, 9, draws))
    assert errors[0] < GOOD_ERROR < 1 < errors[1]


def test_pictures_are_checked_only_once(demo, answers, explanation, monkeypatch):
    """All labels are checked together and once; another pair of labels costs its difference alone."""
    asked = []
    model = answers.classifier.model
    one_check = model.check_explanation
    monkeypatch.setattr(
        model, "check_explanation", lambda *args, **kwargs: asked.append(1) or one_check(*args, **kwargs)
    )
    for a, b in [(3, 4), (4, 3), (3, 5)]:
        assert "being checked" in words(answers.checks(explanation, 3, 5))
        answers.on_check(explanation, a, b)
    assert len(asked) == 1
    assert set(explanation.found.differences) == {(3, 4), (3, 5)}
    assert "being checked" not in words(answers.checks(explanation, 3, 5))


def test_refined_maps_are_nearer_and_add_up(demo, classifier, examples, explanation):
    """Refined maps of the labels shown are nearer to the exact values, add up, and are one picture's alone."""
    exact = exact_shapley(classifier.model.game(explanation.pixel_values[0]), num_players=16).T.view(10, 4, 4)
    other = demo.explain(classifier, Path(examples[3]).read_bytes())
    before = explanation.maps
    demo.refine(classifier, explanation, [3, 9])
    for label in (3, 9):
        distance = [(maps[label] - exact[label]).square().sum() for maps in (before, explanation.maps)]
        assert distance[1] < 0.2 * distance[0]
    torch.testing.assert_close(explanation.maps.sum((1, 2)), explanation.logits - explanation.base_values)
    assert explanation.found.refined == {3, 9} and other.found.refined == set()
    torch.testing.assert_close(explanation.maps[4], before[4], rtol=0, atol=0)
    torch.testing.assert_close(other.maps, before, rtol=0, atol=0)


def test_refined_maps_are_judged_by_other_draws(demo, classifier, explanation, monkeypatch):
    """The check of refined maps goes on with the generator where refining left it, and asks about these maps."""
    model, asked = classifier.model, []
    one_check = model.check_explanation

    def look(pixel_values, labels, *, maps=None, generator, **options):
        asked.append((labels, maps, generator.get_state()))
        return one_check(pixel_values, labels, maps=maps, generator=generator, **options)

    monkeypatch.setattr(model, "check_explanation", look)
    demo.refine(classifier, explanation, [3, 9])
    ((labels, maps, state),) = asked
    draws = torch.Generator().manual_seed(1)
    expected = model.explain(explanation.pixel_values, [3, 9], evaluations=demo.REFINE, generator=draws)
    assert labels == [3, 9]
    torch.testing.assert_close(maps, expected)
    assert torch.equal(state, draws.get_state())
    demo.refine(classifier, explanation, [9, 3])
    assert len(asked) == 1  # it is done


@pytest.mark.parametrize(
    ("said", "did", "word"), [(-1.0, -0.9, "good"), (-1.0, -0.5, "rough"), (-1.0, 0.5, "do not trust")]
)
def test_removals_are_compared_in_plain_words(said, did, word, demo, explanation):
    """After a removal each label says how far apart attributed and measured are, and what each of them says."""
    names = list("0123456789")
    assert "remove some" in demo.readout(explanation, names, [3, 4])
    removed = explanation.present.clone()
    removed[0, 0] = False
    maps = explanation.maps.clone()
    maps[3, 0, 0] = -said
    maps[3, 1, 1] += explanation.maps[3, 0, 0] + said  # the sum stays
    found = demo.Findings(maps)
    values = explanation.values.clone()
    values[3] += did
    less = demo.replace(explanation, found=found, present=removed, values=values)
    text = demo.removal_in_words(less, 3)
    assert text in demo.readout(less, names, [3, 4]) and "remove some" not in demo.readout(less, names, [3, 4])
    assert demo.AGREEMENTS[word] + "</span>" in text
    assert all(number in text for number in (f"{abs(said - did):.2f} logits apart", f"{said:+.2f}", f"{did:+.2f}"))


def test_examples_are_a_folders_pictures(demo, tmp_path):
    """`--examples` takes the pictures of a folder by name, and refuses one that has none."""
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert demo.pictures_in(tmp_path) == [str(tmp_path / name) for name in ("a.JPG", "b.png")]
    for folder in (tmp_path / "missing", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="--examples.*folder with pictures"):
            demo.pictures_in(folder)


def test_folder_is_ready_for_a_space():
    """The README's front matter names app and SDK; every requirement is pinned to the version that is tested."""
    front, _ = (APP.parent / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    told = dict(line.split(": ", 1) for line in front.splitlines())
    pins = dict(line.split("==") for line in (APP.parent / "requirements.txt").read_text().split())
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert (told["sdk"], told["app_file"]) == ("gradio", APP.name)
    assert told["sdk_version"] == pins["gradio"]
    assert pins.pop("hf_shapley") == hf_shapley.__version__
    assert pins == {name: tested[name] for name in pins}


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
def url(classifier, examples, uploads, tmp_path_factory):
    """Address of the demo, served as a user would: by its own process."""
    folder = tmp_path_factory.mktemp("server")
    classifier.save_pretrained(folder / "model")
    options = ["--model", str(folder / "model"), "--examples", str(Path(examples[0]).parent)]
    command = [sys.executable, "-u", str(APP)] + ([] if TAKES_SCREENSHOT else options)
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


def test_only_one_endpoint_is_public(url):
    """Programs can ask for an explanation, and for nothing else."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        told = client.get(f"{url}/gradio_api/info").json()
    assert set(told["named_endpoints"]) == {"/explain"}
    assert told["unnamed_endpoints"] == {}


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    path = found_browser()
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium):
    """One visitor's: nothing of another test is left in it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    yield context
    context.close()


def open_page(browser, url: str, path: str | None = None):
    """The demo once it has answered its first example, and then another picture."""
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("#board img")
    if path is not None:
        before = shown(page, "board")
        page.set_input_files("#source input[type=file]", path)
        wait_for_change(page, "board", before)
    return page


def wait_for_checks(page) -> dict[str, str]:
    """What the page says of each map, once it is checked."""
    names = ("check_a", "check_b", "check_difference")
    for name in names:
        page.locator(f"#{name} .verdict:not(:text('being checked'))").wait_for()
    return {name: page.locator(f"#{name}").inner_text() for name in names}


def chosen(page) -> list[str]:
    """Labels A and B."""
    return [page.locator(f"#label_{name} input").input_value() for name in "ab"]


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
    page = open_page(browser, url)
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


@pytest.mark.skipif(TAKES_SCREENSHOT, reason="the screenshot is of another model")
def test_page_opens_with_an_answered_example(browser, url, demo, classifier, examples):
    """The first example is explained and checked before a visitor does anything; the page says whose game it is."""
    page = open_page(browser, url)
    said = wait_for_checks(page)
    explanation = demo.explain(classifier, Path(examples[0]).read_bytes())
    a, b = explanation.likeliest[:2]
    demo.check(classifier, explanation, a, b)
    assert chosen(page) == [demo.Answers(classifier).names[label] for label in (a, b)]
    errors = [
        explanation.found.errors[a],
        explanation.found.errors[b],
        explanation.found.differences[min(a, b), max(a, b)],
    ]
    for text, error in zip(said.values(), errors, strict=True):
        assert text.startswith(verdict(error)) and f"{error:.2f}" in text
    assert classifier.model.game_name in page.locator("#introduction").inner_text()


def test_refine_says_its_cost_and_ends(browser, url):
    """The button names its evaluations, refines the labels shown once, and offers another label's map."""
    page = open_page(browser, url)
    wait_for_checks(page)
    button = page.locator("#refine")
    assert re.search(r"Refine both maps: 288 evaluations of the model, about \d+ s", button.inner_text())
    titles, before = page.locator("#map_a").locator("..").inner_text().splitlines()[0], shown(page, "map_a")
    button.click()
    page.get_by_text("Refined by 256 evaluations").wait_for()
    assert button.is_disabled()
    assert all("refined, error" in text for text in wait_for_checks(page).values())
    wait_for_change(page, "map_a", before)
    assert page.locator("#map_a").locator("..").inner_text().splitlines()[0] == titles  # the same sum
    choose(page, "label_b", "5")
    page.get_by_text("Refine map B: 288 evaluations").wait_for()
    assert button.is_enabled()


def test_a_and_b_differ_on_the_page(browser, url):
    """A label that is chosen a second time leaves the other dropdown."""
    page = open_page(browser, url)
    a, b = chosen(page)
    choose(page, "label_a", b)
    page.get_by_text(f"For “{b}” and against “{a}”").wait_for()
    assert chosen(page) == [b, a]
    choose(page, "label_b", b)
    page.get_by_text(f"For “{a}” and against “{b}”").wait_for()
    assert chosen(page) == [a, b]


def test_refused_and_removed_pictures_leave_words(browser, url, demo, examples, tmp_path):
    """Where a picture is removed, broken or too large, the page says so, shows no maps, and takes the next one."""
    page = open_page(browser, url)
    page.get_by_label("Remove Image").click()
    page.get_by_text("No picture yet").wait_for()
    assert not page.locator("#map_a").is_visible() and not page.locator("#label_a").is_visible()
    large, broken = tmp_path / "large.png", tmp_path / "broken.png"
    large.write_bytes(bytes(demo.MAX_BYTES + 1))
    broken.write_bytes(b"no picture")
    page.set_input_files("#source input[type=file]", large)
    page.get_by_text("maximum allowed size").wait_for()
    page.set_input_files("#source input[type=file]", broken)
    page.get_by_text("This picture cannot be explained.").wait_for()
    assert not page.locator("#map_a").is_visible()
    page.locator("#examples button.gallery-item").nth(5).click()
    page.wait_for_selector("#board img")
    assert not page.get_by_text("cannot be explained").is_visible()


def test_narrow_screens_need_no_sideways_scrolling(browser, url):
    """On a telephone, 390 pixels wide, everything is on the page."""
    page = open_page(browser, url)
    page.set_viewport_size({"width": 390, "height": 844})
    wait_for_checks(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_during_an_answer_are_not_lost(browser, url, demo, classifier, examples):
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
    held[0].continue_()
    wanted = demo.removal_picture(demo.explain(classifier, Path(examples[3]).read_bytes()))
    page.wait_for_selector("#board img")
    for _ in range(300):
        if Image.open(io.BytesIO(shown(page, "board"))).convert("RGB").tobytes() == wanted.tobytes():
            return
        page.wait_for_timeout(100)
    raise AssertionError("The page does not show the picture that came last.")


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
def test_a_label_cannot_run_as_a_script(browser, url):
    page = open_page(browser, url)
    page.locator("#label_b input").click()
    page.get_by_role("option").nth(8).click()
    page.get_by_text("Label “<img src=x").wait_for()
    assert page.title() == "hf_shapley"
    assert page.locator("img[src=x]").count() == 0
