"""transformers' own tests of a model class, run on ours: what passes, and what assumes that which cannot hold.

The tests are `ModelTesterMixin` of the installed transformers' source distribution, which is fetched by its version.
It lacks the tests of exporters and of text generation, which the mixin only names: empty classes stand in for them.

    python benchmarks/model_tester.py
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import RESULTS, SHAPES, VOTES, write_result
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_shapley.backbones import FAMILIES

STAND_INS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}

# What our models do otherwise on purpose, or what images do not have: pattern of the tests' names -> reason.
NO_EMBEDDING = {"test_model_get_set_embeddings": "It wants an `nn.Embedding`: pixels are no words."}
REFUSED = {
    "test_model_weights_reload_no_missing_tied_weights": "It loads a file without any weight: a checkpoint that lacks "
    "the backbone is refused, where transformers would go on from random weights."
}
OWN_NAMES = {
    "test_reverse_loading_mapping": "It wants weights saved under the names of transformers 4: ours are saved under "
    "the model's own, by which Trainer resumes."
}
NO_MASK_TOKEN = {
    r"test_eager_matches_sdpa_inference_\d\d_.*": "It replaces patches by a mask token, which a classifier's backbone "
    "lacks; the classifiers themselves pass."
}
GRIDS = {"test_hidden_states_output": "It wants hidden states (tokens, width): a ConvNeXt's are grids, one per stage."}
CASES: dict[str, dict[str, str]] = {
    "vit": {**NO_EMBEDDING, **REFUSED, **OWN_NAMES},
    "vit, recommended": {**NO_EMBEDDING, **REFUSED, **OWN_NAMES},
    "vit, features": {**NO_EMBEDDING, **NO_MASK_TOKEN},
    "convnext": {**NO_EMBEDDING, **REFUSED, **GRIDS},
    "convnext, recommended": {**NO_EMBEDDING, **REFUSED, **GRIDS},
    "convnext, features": {**NO_EMBEDDING, **GRIDS},
}


class Inputs:
    """What `ModelTesterMixin` asks of a `model_tester`: a small configuration and a batch for it."""

    batch_size, is_training = 3, True

    def __init__(self, backbone: str, options: dict):
        self.config_class = FAMILIES[backbone].config
        self.options = {**SHAPES[f"{backbone}-test"], "num_labels": 5, **options}
        if backbone == "vit":  # 24 patches and CLS
            self.seq_length, self.mask_length, self.num_masks = 25, 24, 12
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
                setattr(self, name, self.options[name])

    def prepare_config_and_inputs_for_common(self) -> tuple:
        return self.config_class(**self.options), {"pixel_values": torch.randn(self.batch_size, 3, 16, 24)}


def fetch_tests(folder: Path) -> None:
    """Put transformers' tests, as far as its source distribution has them, where `import tests` finds them."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    name = f"transformers=={version('transformers')}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, name], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (folder / archive.name.removesuffix(".tar.gz") / "tests").rename(folder / "tests")
    for path, stand_in in STAND_INS.items():
        file = folder / "tests" / path
        file.parent.mkdir()
        file.write_text(f"class {stand_in}:\n    pass\n")
    if find_spec("parameterized") is None:
        subprocess.run([*pip, "install", "--no-deps", "--target", folder, "parameterized"], check=True)
    sys.path.insert(0, str(folder))


def name_as_transformers_models() -> None:
    """Enter our classes where the mixin looks up by name what kind of model it has, and so what labels to give it."""
    for family in FAMILIES.values():
        name, model = family.config.model_type, family.model
        modeling_auto.MODEL_MAPPING_NAMES[name] = model.features_class.__name__
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[name] = model.__name__


def test_case(name: str) -> type[unittest.TestCase]:
    """The mixin's tests of a classifier with plain votes or the recommended head, or for what `AutoModel` loads."""
    from tests.test_modeling_common import ModelTesterMixin

    backbone, _, kind = name.partition(", ")
    model = FAMILIES[backbone].model
    options = {} if kind == "recommended" else VOTES

    class Case(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model.features_class if kind == "features" else model,)
        test_resize_embeddings = False
        has_attentions = backbone == "vit"
        # Labels alone teach the classifier then; adapters and attribution head learn from coalitions.
        test_all_params_have_gradient = kind != "recommended"

        def setUp(self):
            torch.manual_seed(0)
            self.model_tester = Inputs(backbone, options)

    return Case


class Outcome(unittest.TestResult):
    """Names of the tests that passed and that were skipped, and the first line of why others failed."""

    def __init__(self):
        super().__init__()
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}

    def addSuccess(self, test):
        self.passed.add(test._testMethodName)

    def addError(self, test, err):
        self.failed[test._testMethodName] = str(err[1]).strip().split("\n")[0][:200]

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addError(test, err)


def run(name: str) -> dict:
    """Run all tests of a case; what fails is expected or not, and what was expected to fail has to."""
    outcome, reasons = Outcome(), CASES[name]
    unittest.defaultTestLoader.loadTestsFromTestCase(test_case(name)).run(outcome)
    failed = outcome.failed
    expected = {
        test: why for test in sorted(failed) for pattern, why in reasons.items() if re.fullmatch(pattern, test)
    }
    idle = [pattern for pattern in reasons if not any(re.fullmatch(pattern, test) for test in failed)]
    return {
        "passed": len(outcome.passed - failed.keys()),
        "skipped": len(outcome.skipped),
        "expected_failures": len(expected),
        "assumptions": {pattern: why for pattern, why in reasons.items() if pattern not in idle},
        "unexpected_failures": {test: why for test, why in sorted(failed.items()) if test not in expected},
        "passed_unexpectedly": idle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models to run")
    parser.add_argument("--output", default=RESULTS / "model_tester.json")
    args = parser.parse_args()
    logging.disable_progress_bar()
    name_as_transformers_models()
    with tempfile.TemporaryDirectory() as folder:
        fetch_tests(Path(folder))
        cases = {name: run(name) for name in args.cases}
    for name, case in cases.items():
        print(name, {key: value for key, value in case.items() if isinstance(value, int)})
        for test, why in case["unexpected_failures"].items():
            print(f"  {test} failed: {why}")
        for pattern in case["passed_unexpectedly"]:
            print(f"  {pattern} passed: it is no exception any more")
    write_result(args.output, {"cases": cases})
    if any(case["unexpected_failures"] or case["passed_unexpectedly"] for case in cases.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
