"""Nothing from a repository, a label, a file name or an upload runs, escapes its folder or stays behind."""

import ast
import io
import json
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

import hf_shapley
from hf_shapley import (
    TASK,
    ShapleyTrainer,
    ShapleyTrainingArguments,
    ShapleyViTForImageClassification,
    attribution_figure,
    load_image,
    render_model_card,
    write_model_card,
)
from hf_shapley.cli import main
from hf_shapley.registration import ForeignCodeError

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "gradio_demo"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "](javascript:alert(1))",
    "{{ 7 * 7 }} {% include '/etc/passwd' %}",
    "../../../etc/cron.d/x",
    "$\\input{/etc/passwd}$",
    "-->\n---\nlicense: stolen\n---\n",
    "a\0b\x1b[31m\u202egnp.exe",
]


class Bomb:
    """Unpickling it writes a file: proof that somebody unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.write_text, (self.trace, "unpickled")


@pytest.fixture
def trace(tmp_path) -> Path:
    """A file that exists once hostile code has run."""
    return tmp_path / "trace"


def save_model(folder: Path, labels: list[str] | None = None, **options) -> Path:
    labels = labels or ["a", "b", "c"]
    model = make_model("vit", id2label=dict(enumerate(labels)), label2id={}, num_labels=len(labels), **options)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    return folder


def test_pickles_in_a_repository_are_never_loaded(tmp_path, trace):
    folder = save_model(tmp_path / "model")
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "model.pkl",
    ):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    ShapleyViTForImageClassification.from_pretrained(folder)
    AutoModelForImageClassification.from_pretrained(folder)
    pipeline(TASK, model=str(folder), device="cpu")
    assert not trace.exists()


@pytest.mark.parametrize("cls", [ShapleyViTForImageClassification, AutoModelForImageClassification])
def test_weights_that_are_no_safetensors_are_refused(cls, tmp_path, trace):
    folder = save_model(tmp_path / "model")
    weights = make_model("vit", num_labels=3).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        cls.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        cls.from_pretrained(folder)
    assert not trace.exists()


def test_plain_checkpoints_are_read_as_safetensors_alone(tmp_path):
    plain = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    plain.save_pretrained(tmp_path)
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ShapleyViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_never_runs_what_checkpoints_pickled(file, tmp_path, trace):
    """A resumed run does not run what a checkpoint pickled."""

    def trainer():
        options = dict(max_steps=2, save_steps=1, per_device_train_batch_size=2, dataloader_pin_memory=False)
        args = ShapleyTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **options)
        data = [{"pixel_values": torch.zeros(3, 16, 24), "labels": torch.tensor(0)}] * 4
        return ShapleyTrainer(make_model("vit"), args, train_dataset=data)

    trainer().train()
    (tmp_path / "checkpoint-1" / file).write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not trace.exists()


def plant_code(folder: Path, trace: Path, **entries) -> None:
    """Python files that leave a trace when they run, and a configuration that points to them."""
    text = f"from pathlib import Path\nPath({str(trace)!r}).write_text('ran')\n"
    for name in ("modeling_shapley_vit", "configuration_shapley", "pipeline_shapley", "evil"):
        (folder / f"{name}.py").write_text(text)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_the_installed_package_runs_no_repositorys_code(tmp_path, trace):
    """The code of a repository does not run where the package is installed."""
    folder = save_model(tmp_path / "model")
    custom = {TASK: {"impl": "evil.Evil", "pt": ["AutoModelForImageClassification"], "type": "image"}}
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    plant_code(folder, trace, custom_pipelines=custom, auto_map=auto_map)
    Image.new("RGB", (24, 16)).save(tmp_path / "picture.png")
    AutoModelForImageClassification.from_pretrained(folder)
    pipeline(TASK, model=str(folder), device="cpu")(str(tmp_path / "picture.png"))
    assert main(["explain", str(tmp_path / "picture.png"), "--model", str(folder), "-o", str(tmp_path / "o.png")]) == 0
    assert not trace.exists()


def test_unknown_architectures_run_no_untrusted_code(tmp_path, trace):
    """The code of an unknown architecture does not run where it is not trusted."""
    folder = save_model(tmp_path / "model")
    plant_code(folder, trace, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    assert not trace.exists()


def test_image_processor_code_is_not_even_offered(tmp_path, trace, monkeypatch):
    """Neither by the pipeline nor by the command line; transformers asks "Do you wish to run the custom code?"."""
    folder, picture = save_model(tmp_path / "model"), tmp_path / "picture.png"
    Image.new("RGB", (24, 16)).save(picture)
    plant_code(folder, trace, architectures=["ViTForImageClassification"])
    path = folder / "preprocessor_config.json"
    stored = json.loads(path.read_text())
    path.write_text(
        json.dumps({**stored, "image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}})
    )
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    with pytest.raises(ForeignCodeError, match="image processor of .* is code of that repository, which is not run"):
        pipeline(TASK, model=str(folder), device="cpu")
    assert main(["explain", str(picture), "--model", str(folder), "-o", str(tmp_path / "out.png")]) == 1
    assert not trace.exists()


def test_the_package_unpickles_and_evaluates_nothing():
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "subprocess"}
    for path in (ROOT / "src" / "hf_shapley").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & forbidden, path
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {
            "eval",
            "exec",
            "compile",
            "torch.load",
            "np.load",
            "os.system",
            "os.popen",
            "yaml.load",
        }, path


SIZES = {
    "vit": ["num_hidden_layers", "hidden_size", "intermediate_size", "image_size", "patch_size", "num_channels"],
    "convnext": ["depths", "hidden_sizes", "patch_size", "num_channels"],
}
OWN_SIZES = ["influence_layers", "influence_own_layers", "coalition_adapter_size", "num_labels"]


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_sizes_beyond_the_weight_files_are_refused(backbone, auto, sharded, tmp_path):
    """A line of config.json that asks for 10^9 layers would keep a machine busy until its memory is full."""
    model = make_model(backbone, head="votes+influence", influence_block="convolution")
    model.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "5GB")
    load = (AutoModelForImageClassification if auto else type(model)).from_pretrained
    load(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for option in [*SIZES[backbone], *OWN_SIZES]:
        value = stored.get(option)
        large = [*value[:-1], 10**9] if isinstance(value, list) else 10**9
        named = {} if option == "num_labels" else {name: stored[name] for name in ("id2label", "label2id")}
        others = {name: value for name, value in stored.items() if name not in ("id2label", "label2id")}
        path.write_text(json.dumps({**others, **named, option: large}))
        with pytest.raises(
            (OSError, ValueError), match="calls for at least|`num_labels` must be|must be at most 2, the layers"
        ):
            load(tmp_path)


def test_an_honest_checkpoint_is_never_called_too_large(model):
    """The fewest weights that a configuration can call for are not more than its model has, and nearly as many."""
    fewest = sum(model.config._fewest_weights(model.config.to_dict()).values())
    assert 0.7 * model.num_parameters() < fewest <= model.num_parameters()


class Tags(HTMLParser):
    """Names of all elements and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(name for name, _ in attrs)}


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_results_inject_nothing_into_cards(text, tmp_path):
    """Texts of results cannot inject anything into a card: no tag, link, template or metadata."""
    metric = {"type": "accuracy", "value": 0.5, "name": text, "group": text, "settings": {text: text}}
    results = {
        "model_name": text, "summary": text, "labels": [text], "metrics": [metric], "limits": [text], "command": text,
        "dataset": {"name": text, "id": text, "split": text}, "base_model": text, "training": {text: text},
    }  # fmt: skip
    card = render_model_card(results, model_id=text, source=text)
    body = card.split("\n---\n", 1)[1]
    body = re.sub(r"(?ms)^(`{3,}).*?^\1`*$|<!--.*?-->|(`+).*?\2", "", body)
    assert not Tags(body).found & {"script", "img", "onerror"}
    assert "](javascript" not in body
    assert " 49 " not in body, "a template inside of a text was rendered"
    write_model_card(tmp_path / "README.md", card)
    loaded = hf_shapley.ShapleyModelCard.load(tmp_path / "README.md")
    assert getattr(loaded.data, "license", None) != "stolen"


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_cannot_inject_anything_into_figures_and_answers(text, tmp_path, capsys):
    folder = save_model(tmp_path / "model", labels=[text, "b", "c"])
    Image.new("RGB", (24, 16)).save(tmp_path / "picture.png")
    before = set(tmp_path.rglob("*"))
    for suffix in ("svg", "png"):
        target = tmp_path / f"out.{suffix}"
        arguments = ["explain", str(tmp_path / "picture.png"), "--model", str(folder), "-o", str(target), "--json"]
        assert main([*arguments, "--top-k", "3"]) == 0
        assert any(row["label"] == text for row in json.loads(capsys.readouterr().out))
    assert not Tags((tmp_path / "out.svg").read_text()).found & {"script", "img", "onerror"}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "out.svg", tmp_path / "out.png"}


def test_labels_like_tex_are_drawn_as_text():
    """A label that looks like TeX is drawn as it is, and not parsed."""
    figure = attribution_figure(Image.new("RGB", (6, 4)), np.ones((1, 2, 3)), ["$\\frac{1}{$"])
    figure.savefig(io.BytesIO(), format="svg")


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("gradio")
    sys.path.insert(0, str(DEMO))
    try:
        import app
    finally:
        sys.path.pop(0)
    return app


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_cannot_inject_html_into_the_demo(text, demo, tmp_path):
    folder = save_model(tmp_path / "model", labels=[text, "b", "c"])
    answers = demo.Answers(demo.load_classifier(str(folder)))
    data = io.BytesIO()
    Image.new("RGB", (24, 16)).save(data, "PNG")
    explanation = demo.explain(answers.classifier, data.getvalue())
    page = "".join(part for part in answers.view(explanation, 0, 1) if isinstance(part, str))
    assert not Tags(page).found & {"script", "img", "onerror"}
    assert {"div", "b", "style"} <= Tags(page).found


def test_uploads_are_limited_before_they_are_decoded(demo, tmp_path):
    """Uploads are limited in bytes and pixels before they are decoded."""
    classifier = demo.load_classifier(str(save_model(tmp_path / "model")))
    with pytest.raises(ValueError, match="at most 10 MB"):
        demo.explain(classifier, b"\0" * (demo.MAX_BYTES + 1))
    header = io.BytesIO()
    Image.new("1", (8, 8)).save(header, "PNG")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, of which no pixel follows
    bomb[29:33] = __import__("zlib").crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises((ValueError, OSError), match="pixels|size"):
        demo.explain(classifier, bytes(bomb))
    assert demo.LAUNCH["max_file_size"] == demo.MAX_BYTES


def test_demo_uploads_are_removed_after_a_while():
    """Uploads to the demo are removed after a while, which is at most an hour by its settings."""
    calls = [node for node in ast.walk(ast.parse((DEMO / "app.py").read_text())) if isinstance(node, ast.Call)]
    (blocks,) = [call for call in calls if ast.unparse(call.func) == "gr.Blocks"]
    every, age = ast.literal_eval(next(word.value for word in blocks.keywords if word.arg == "delete_cache"))
    assert every <= age <= 3600


@pytest.mark.parametrize("format", ["EPS", "PSD", "ICNS", "PCX"])
def test_formats_of_risky_parsers_are_refused(format, tmp_path):
    """Formats whose parsers start programs or are hardly used are refused."""
    path = tmp_path / "picture.png"
    Image.new("RGB" if format != "PCX" else "L", (16, 16)).save(path, "TIFF" if format == "PSD" else format)
    if format == "PSD":
        path.write_bytes(b"8BPS" + path.read_bytes())
    with pytest.raises(OSError, match="no known format|as a picture"):
        load_image(path)


def test_no_temporary_file_stays_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = save_model(tmp_path / "model")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (24, 16)).save(picture)
    pipeline(TASK, model=str(folder), device="cpu")(str(picture), overlay=True)
    assert main(["explain", str(picture), "--model", str(folder), "-o", str(tmp_path / "out.png")]) == 0
    shutil.rmtree(folder)
    assert main(["explain", str(picture), "--model", str(folder), "-o", str(tmp_path / "out2.png")]) == 1
    assert list(scratch.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "picture.png", "scratch"]
