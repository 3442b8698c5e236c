"""Small models and images that the tests share, and the count of cases that property tests tried."""

import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

from hf_shapley import (
    ShapleyConvNextConfig,
    ShapleyConvNextForImageClassification,
    ShapleyViTConfig,
    ShapleyViTForImageClassification,
)

logging.disable_progress_bar()
torch.set_num_threads(1)

# Both give a grid of 4 x 6 = 24 players on images of 16 x 24 pixels.
VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=(16, 24),
    patch_size=4,
    num_labels=5,
)
CONVNEXT = dict(
    hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=2, num_labels=5, layer_scale_init_value=1.0
)


# Kinds of attribution heads; "recommended" is what a plain checkpoint gets.
BLOCKS = {"influence_own_layers": 0, "influence_layers": 2, "influence_block": "mlp"}
HEADS = {
    "votes": {"vote_readout": "patches", "influence_own_layers": 0, "influence_layers": 0},
    "votes+influence": {"vote_readout": "patches", **BLOCKS},
    "pooled": {"vote_readout": "pooled", **BLOCKS},
    "pooled, own layer": {"vote_readout": "pooled", **BLOCKS, "influence_own_layers": 1},
    "pooled, own layer, adapters": {
        "vote_readout": "pooled", **BLOCKS, "influence_own_layers": 1, "coalition_adapter_size": 4
    },
    "recommended": {},
    "adapted": {"coalition_adapter_size": 64},
}  # fmt: skip


def make_model(backbone: str, seed: int = 0, head: str = "votes", **options):
    """A small random model in evaluation mode, with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    options = HEADS[head] | options
    if backbone == "vit":
        model = ShapleyViTForImageClassification(ShapleyViTConfig(**{**VIT, **options}))
    else:
        model = ShapleyConvNextForImageClassification(ShapleyConvNextConfig(**{**CONVNEXT, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=["vit", "convnext"])
def backbone(request) -> str:
    return request.param


@pytest.fixture(params=["votes", "votes+influence", "pooled", "pooled, own layer, adapters"])
def model(backbone, request):
    return make_model(backbone, head=request.param)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


# The tracer of older versions stops at lines of transformers' own; those from 2.7 to 2.10 are not tested.
TRACED = {
    "test_an_exported_model_takes_any_batch_size",
    "test_saved_programs_answer_alike_at_any_batch_size",
    "test_onnx_files_answer_alike_at_any_batch_size",
    "test_half_precision_gives_an_onnx_file_that_runs",
    "test_a_failed_export_leaves_the_file_there_was",
    "test_compiled_models_train_and_explain_the_same",
    "test_a_program_takes_any_batch_size",
    "test_explain_compiles_without_graph_breaks",
    "test_inductor_gives_the_same_step",
    "test_it_compiles_without_graph_breaks",
    "test_it_exports_for_any_batch_size",
}


def pytest_collection_modifyitems(items):
    """Skip what the oldest torch cannot trace."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        for item in items:
            if item.originalname in TRACED:
                item.add_marker(pytest.mark.skip(reason="this torch cannot trace transformers' models"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Note how many cases hypothesis made of a test, where `record_property("cases", ...)` does so for a table."""
    if call.when == "call":
        counts = re.findall(r"(\d+) passing\D*?, (\d+) failing", getattr(item, "hypothesis_statistics", ""))
        if counts:
            item.user_properties.append(("cases", sum(int(count) for pair in counts for count in pair)))


def pytest_terminal_summary(terminalreporter):
    """Say how many cases were tried, of how many tests."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    counts = [value for report in called for name, value in report.user_properties if name == "cases"]
    if counts:
        terminalreporter.write_line(f"{len(counts)} property and table tests tried {sum(counts)} cases.")
