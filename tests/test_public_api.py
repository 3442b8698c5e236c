"""Everything public can be imported from `hf_shapley`, and only what is asked for is loaded."""

import ast

import pytest
from test_layout import MODULES, folder_and_name, packages, relative_imports

import hf_shapley

# Public within the package: what users reach through something else, such as the command line or the Trainer.
INTERNAL_MODULES = {
    "backbones",
    "models/backbone",
    "models/checks",
    "models/evaluation_mode",
    "models/inputs",
    "models/loading",
    "models/speed",
    "models/stock_places",
    "models/token_backbone",
    "training/joint_loss",
    "training/sharing",
    "cli",
    "data/dataset_images",
    "figures/optional_matplotlib",
    "figures/panel_titles",
    "jobs/demo",
    "jobs/demo_report",
    "publishing/evaluation_card",
    "jobs/evaluation_job",
    "files",
    "data/labels",
    "data/picture_rows",
    "data/splits",
    "data/transforms",
    "terminal",
    "publishing/training_card",
    "jobs/starting_model",
    "jobs/training_arguments",
    "jobs/training_job",
}
INTERNAL = {
    "models/modeling_shapley": {"ShapleyImageClassifierMixin"},
    "models/explaining": {"ExplainingMixin"},
    "models/heads": {
        "CoalitionAdapter",
        "NarrowConvolution",
        "ResidualMLP",
        "ZeroLinear",
        "at_least_float32",
        "coalition_adapters",
        "is_own_part",
        "is_plain_linear",
        "linear_of",
        "mapped",
        "share_evenly",
        "sums_of_centred",
        "weight_of",
    },
    "training/checkpoints": {"complete_checkpoint", "discard_surplus_checkpoints", "marked_incomplete"},
    "models/coalitions": {"check_coalitions", "sum_over_coalitions", "with_complements"},
    "models/configuration_shapley": {"ShapleyConfigMixin", "place_of"},
    "models/configuration_shapley_any": {"is_plain_classifier"},
    "models/modeling_shapley_any": {"Heard", "MeanOfClassifiers"},
    "models/posterior": {"ShapleyPosterior", "coalitions_to_ask", "shapley_posterior"},
    "training/trainer": {"collate"},
    "training/digits": {"trainable"},
    "faithfulness/correlations": {"pearson"},
    "faithfulness/estimators": {"check_budget", "check_request", "covers_every_coalition", "exact_estimate"},
    "faithfulness/games": {
        "CheckedGame",
        "LabelGame",
        "check_attributions",
        "check_finite_floats",
        "check_same_labels",
        "evaluated",
    },
    "publishing/hub": {"card_of", "keep_card_of_hub", "label_names", "push_with_card", "with_what_holds"},
    "models/images": {"is_array"},
    "publishing/interoperability": {"ImageGame"},
    "loading": {"ForeignCodeError", "ModelForPipeline"},
    "publishing/model_card": {
        "escape_markdown",
        "format_number",
        "is_generated",
        "merge_results",
        "numbers_in_card",
        "reading_metadata",
        "results_of_card",
    },
    "models/modeling_shapley_convnext": {
        "DepthwiseConv2d",
        "InfluenceConvNextLayer",
        "ShapleyConvNextLayer",
        "ShapleyConvNextModel",
    },
    "models/modeling_shapley_vit": {"InfluenceViTLayer", "ShapleyViTLayer", "ShapleyViTMLP", "ShapleyViTModel"},
    "models/pipeline_shapley": {
        "asked_of_the_game",
        "check_evaluations",
        "check_in_words",
        "custom_pipelines",
        "label_scores",
        "pixel_values_of",
        "score_function",
    },
    "models/overlay": {"check_box", "check_enlargement", "check_scale", "finite_values"},
}
HEAVY = {"datasets", "evaluate", "sklearn", "scipy", "matplotlib", "gradio", "shap", "shapiq", "captum", "onnx"}


# By their names without the folder, of which the lists above need none.
SOURCES = {folder_and_name(module)[1]: source for module, source in MODULES.items() if "/__init__" not in module}


def definitions(source):
    """Names of a module's functions and classes without a leading underscore."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")}


def imports(nodes):
    """Names imported from sibling modules by statements, as {module: names}."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    return {node.module: sorted(alias.name for alias in node.names) for node in found}


def imported_at_once(module):
    """Modules of the package that one imports when it is imported itself."""
    statements = [node for node in ast.parse(MODULES[module]).body if isinstance(node, ast.ImportFrom)]
    return relative_imports("\n".join(map(ast.unparse, statements)), folder_and_name(module)[0])


def test_every_public_definition_is_exported_or_known_as_internal():
    left_out = {
        module: sorted(names)
        for module, source in SOURCES.items()
        if module not in INTERNAL_MODULES
        and (names := definitions(source) - set(hf_shapley.__all__) - INTERNAL.get(module, set()))
    }
    assert left_out == {}


def test_the_list_of_internal_names_is_not_out_of_date():
    for module, names in INTERNAL.items():
        assert names <= definitions(SOURCES[module]), module
        assert not names & set(hf_shapley.__all__), module


def test_exports_are_sorted_and_exist():
    statements = ast.parse(MODULES["__init__"]).body
    exported = {name for names in imports(statements).values() for name in names}
    lazy = {name for names in hf_shapley._LAZY.values() for name in names}
    assert hf_shapley.__all__ == sorted(exported | lazy)
    assert [name for name in hf_shapley.__all__ if not hasattr(hf_shapley, name)] == []
    assert set(hf_shapley.__all__) <= set(dir(hf_shapley))


def test_type_checkers_see_the_names_that_are_loaded_late():
    blocks = [node for node in ast.parse(MODULES["__init__"]).body if isinstance(node, ast.If)]
    assert [ast.unparse(block.test) for block in blocks] == ["TYPE_CHECKING"]
    assert imports(blocks[0].body) == {module: sorted(names) for module, names in hf_shapley._LAZY.items()}


def test_no_name_is_hidden_by_a_module_of_the_same_name():
    assert set(hf_shapley.__all__) & set(MODULES) == set()


def test_importing_the_package_loads_nothing_heavy():
    loaded, waiting = set(), list(imported_at_once("__init__"))
    while waiting:
        module = waiting.pop()
        if module not in loaded:
            loaded.add(module)
            assert packages(MODULES[module], at_import=True) & HEAVY == set(), module
            waiting += imported_at_once(module)
    assert "models/modeling_shapley_vit" in loaded
    assert not loaded & {module.replace(".", "/") for module in hf_shapley._LAZY}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'shapely'"):
        _ = hf_shapley.shapely
