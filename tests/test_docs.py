"""The documentation does what it says: its code runs, its commands parse, its tables match, its pages build."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_interoperability import optional
from test_layout import MODULES
from test_public_api import INTERNAL, INTERNAL_MODULES, definitions
from transformers import TrainingArguments

from hf_shapley import ShapleyTrainingArguments
from hf_shapley.backbones import FAMILIES
from hf_shapley.cli import _parser
from hf_shapley.data.digits import digits_dataset
from hf_shapley.models.configuration_shapley import ShapleyConfigMixin

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]
BLOCK = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)

# The same code with fewer steps, images and draws.
TINY = {
    r"num_train_epochs=\d+": "max_steps=2",
    r"train_digits_model\(\)": "train_digits_model(epochs=0.5)",
    r"num_samples=\d+": "num_samples=20",
    r"budget=1024": "budget=64",
    r"\[:8\]": "[:3]",
    r"\[:2\]": "[:1]",  # of images whose 65,536 coalitions are enumerated
}


def blocks(path, *, run):
    """Code of the ```python blocks that are, or are not, to be run, each at its own line for tracebacks."""
    text = path.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if ("no-run" not in block["options"]) == run:
            yield "\n" * text[: block.start("code")].count("\n") + block["code"]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


COMMANDS = next(action.choices for action in _parser()._actions if action.dest == "command")
README = ROOT / "README.md"
RUNNABLE = [path for path in PAGES if path != README and any(blocks(path, run=True))]
COMPILED = [path for path in PAGES if any(blocks(path, run=False))]


# A GPU would use pinned memory; the pages' code does not turn it off for those who have none.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("path", RUNNABLE, ids=names(RUNNABLE))
def test_code_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    for package in ("shap", "shapiq", "captum"):
        if any(f"import {package}" in code or f"from {package}." in code for code in blocks(path, run=True)):
            optional(package)
    monkeypatch.chdir(tmp_path)
    run(path, TINY)


def run(path, settings):
    """Run a page's code, each block after the one before, with other settings."""
    namespace = {"__name__": "page"}
    for code in blocks(path, run=True):
        for pattern, replacement in settings.items():
            code = re.sub(pattern, replacement, code)
        exec(compile(code, path, "exec"), namespace)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_readmes_example_answers_with_the_right_name(tmp_path, monkeypatch, capsys):
    """The picture, of which the page says what it shows, is called so, after a fifth of the page's epochs already."""
    monkeypatch.chdir(tmp_path)
    run(README, {r"num_train_epochs=20": "num_train_epochs=4"})
    printed = capsys.readouterr().out
    said = re.search(
        r'explain\(data\["test"\]\[(\d+)\]\["image"\], top_k=2\):  # an? (\d)', README.read_text(encoding="utf-8")
    )
    assert digits_dataset()["test"][int(said[1])]["label"] == int(said[2])
    answers = re.findall(r"^(\w+) 0\.\d+ \[\[", printed, re.MULTILINE)
    assert answers[0] == said[2] and len(answers) == 2


@pytest.mark.parametrize("path", COMPILED, ids=names(COMPILED))
def test_code_that_needs_a_network_compiles(path):
    for code in blocks(path, run=False):
        compile(code, path, "exec")


def test_every_shrunk_setting_is_on_a_page():
    """Every setting that these tests make tiny is still on a page."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [pattern for pattern in TINY if not re.search(pattern, text)] == []


def test_commands_parse():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    commands = re.findall(r"^hf-shapley ([a-z].*)", text, re.MULTILINE)
    parsed = [_parser().parse_known_args(shlex.split(command, comments=True))[0].command for command in commands]
    assert set(parsed) == set(COMMANDS)


def test_the_page_of_commands_lists_all_of_them():
    listed = re.findall(
        r"^\| `hf-shapley (\w+)` \|", (ROOT / "docs/api/cli.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert listed == list(COMMANDS)


def test_scripts_that_pages_name_exist():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {name for name in re.findall(r"\bexamples/[\w/]+\.py", text) if not (ROOT / name).is_file()} == set()


def rows_of_options():
    """Option -> its default, as the page's tables have them."""
    text = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    return {
        name: default.replace("`", "") for name, default in re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    }


def test_the_table_of_training_options_is_complete():
    rows, stock = rows_of_options(), {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(ShapleyTrainingArguments) if field.name not in stock]
    assert len(own) == 8 and {field.name for field in own} <= set(rows)
    for field in own:
        if field.default is not None:
            assert rows[field.name] == repr(field.default)
        else:  # what it stands for depends on the model, and is said in the help too
            numbers = re.findall(r"\d[\d.]*", rows[field.name])
            assert numbers and all(number in field.metadata["help"] for number in numbers)


def test_the_table_of_the_heads_options_is_complete():
    rows = rows_of_options()
    defaults = {field.name: field.default for field in fields(ShapleyConfigMixin)}
    assert len(defaults) == 6 and set(defaults) <= set(rows)
    for name, default in defaults.items():
        recommended = [family.config.recommended_head.get(name, default) for family in FAMILIES.values()]
        shown = [json.dumps(value) if isinstance(value, str) else repr(value) for value in recommended]
        # ViT's, which all others share, before ConvNeXt's where it has another.
        assert re.sub(r"\w+ (?=[\d\"])", "", rows[name]).split(", ") == list(dict.fromkeys(shown))


def test_the_reference_covers_every_public_module():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    public = {
        module
        for module, source in MODULES.items()
        if module not in INTERNAL_MODULES and definitions(source) - INTERNAL.get(module, set())
    }
    described = {name.replace(".", "/") for name in re.findall(r"^::: hf_shapley\.([\w.]+)$", pages, re.MULTILINE)}
    assert public - described == set()
    assert described <= set(MODULES)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_builds_strictly_and_stands_alone(tmp_path):
    """The site builds without warnings, resolves its references and needs no other site."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text) == [], page
        assert re.findall(r"\[<code>\w+</code>\]", text) == [], page  # a reference that nobody resolved
