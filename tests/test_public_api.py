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
    "models/groups",
    "models/image_text_loading",
    "models/inputs",
    "models/loading",
    "models/speed",
    "models/stored_checkpoint",
    "models/stock_places",
    "models/token_backbone",
    "models/window_backbone",
    "models/token_structures",
    "training/joint_loss",
    "training/sharing",
    "cli",
    "data/dataset_images",
    "figures/optional_matplotlib",
    "figures/panel_titles",
    "jobs/demo",
    "jobs/demo_report",
    "publishing/card_results",
    "publishing/card_texts",
    "publishing/evaluation_card",
    "publishing/explanation_files",
    "publishing/explanation_resuming",
    "publishing/explanation_rows",
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
    "models/explaining": {"ExplainingMixin", "attribution_maps"},
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
        "through",
        "weight_of",
    },
    "training/checkpoints": {"complete_checkpoint", "discard_surplus_checkpoints", "marked_incomplete"},
    "models/coalitions": {"check_coalitions", "sum_over_coalitions", "with_complements"},
    "models/configuration_shapley": {"CellConfigMixin", "ShapleyConfigMixin", "TokenConfigMixin"},
    "models/configuration_shapley_any": {"is_plain_classifier"},
    "models/configuration_shapley_clip": {"ImageTextConfigMixin", "SideOptions"},
    "models/image_text": {"ImageTextMixin", "unit"},
    "models/image_text_explaining": {"ImageTextExplainingMixin"},
    "models/words": {"check_text", "check_word_ids"},
    "models/modeling_shapley_any": {"Heard"},
    "models/posterior": {"ShapleyPosterior", "coalitions_to_ask", "shapley_posterior"},
    "training/trainer": {"collate"},
    "training/digits": {"trainable"},
    "training/image_text": {"word_coalitions"},
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
    "registration": {"ForeignCodeError", "ModelForPipeline", "register"},
    "publishing/card_data": {"reading_metadata"},
    "publishing/model_card": {"is_generated", "results_of_card"},
    "models/modeling_shapley_convnext": {
        "CellBackbone",
        "CellLayer",
        "CellRule",
        "InfluenceCellLayer",
        "InfluenceConvNextLayer",
        "ShapleyConvNextLayer",
        "ShapleyConvNextModel",
    },
    "models/modeling_shapley_convnextv2": {
        "InfluenceConvNextV2Layer",
        "ShapleyConvNextV2GRN",
        "ShapleyConvNextV2Layer",
        "ShapleyConvNextV2Model",
    },
    "models/modeling_shapley_deit": {"InfluenceDeiTLayer", "ShapleyDeiTLayer", "ShapleyDeiTMLP", "ShapleyDeiTModel"},
    "models/modeling_shapley_dinov2": {
        "Dinov2Classifier",
        "InfluenceDinov2Layer",
        "InfluenceDinov2WithRegistersLayer",
        "ScaledLayer",
        "ShapleyDinov2Layer",
        "ShapleyDinov2MLP",
        "ShapleyDinov2Model",
        "ShapleyDinov2WithRegistersLayer",
        "ShapleyDinov2WithRegistersMLP",
        "ShapleyDinov2WithRegistersModel",
    },
    "models/modeling_shapley_vit_msn": {
        "InfluenceViTMSNLayer",
        "ShapleyViTMSNLayer",
        "ShapleyViTMSNMLP",
        "ShapleyViTMSNModel",
    },
    "models/modeling_shapley_ijepa": {
        "InfluenceIJepaLayer",
        "ShapleyIJepaLayer",
        "ShapleyIJepaMLP",
        "ShapleyIJepaModel",
    },
    "models/modeling_shapley_beit": {
        "InfluenceBeitLayer",
        "ShapleyBeitLayer",
        "ShapleyBeitMLP",
        "ShapleyBeitModel",
        "restricted",
        "BiasedBackbone",
        "BiasedConfigMixin",
        "BiasedInfluenceLayer",
        "BiasedLayer",
    },
    "models/modeling_shapley_data2vec_vision": {
        "InfluenceData2VecVisionLayer",
        "NamedAsElsewhere",
        "ShapleyData2VecVisionLayer",
        "ShapleyData2VecVisionModel",
        "ShapleyData2VecVisionSdpaSelfAttention",
        "ShapleyData2VecVisionSelfAttention",
    },
    "models/modeling_shapley_vision_towers": {
        "InfluenceCLIPLayer",
        "InfluenceMetaClip2Layer",
        "InfluenceSiglipLayer",
        "ShapleyCLIPAttention",
        "ShapleyCLIPLayer",
        "ShapleyCLIPMLP",
        "ShapleyCLIPVisionTower",
        "ShapleyMetaClip2Attention",
        "ShapleyMetaClip2Layer",
        "ShapleyMetaClip2MLP",
        "ShapleyMetaClip2VisionTower",
        "ShapleySiglipAttention",
        "ShapleySiglipLayer",
        "ShapleySiglipMLP",
        "ShapleySiglipVisionTower",
        "TowerAttention",
        "TowerClassifier",
        "TowerConfigMixin",
        "TowerInfluenceLayer",
        "TowerLayer",
    },
    "models/modeling_shapley_swin": {"InfluenceSwinLayer", "ShapleySwinLayer", "ShapleySwinMLP", "ShapleySwinModel"},
    "models/modeling_shapley_swinv2": {"InfluenceSwinv2Layer", "ShapleySwinv2Layer", "ShapleySwinv2Model"},
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


SOURCES = {module: source for module, source in MODULES.items() if not module.endswith("__init__")}


def definitions(source):
    """Names of a module's functions and classes without a leading underscore."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")}


def imports(nodes):
    """Names imported from sibling modules by statements and left public, as {module: names}."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    public = {node.module: sorted(alias.name for alias in node.names if not alias.asname) for node in found}
    return {module: names for module, names in public.items() if names}


def imported_at_once(module):
    """Modules of the package that one imports when it is imported itself."""
    statements = [node for node in ast.parse(MODULES[module]).body if isinstance(node, ast.ImportFrom)]
    return relative_imports("\n".join(map(ast.unparse, statements)), folder_and_name(module)[0])


def test_public_definitions_are_exported_or_listed_internal():
    """Every public definition is exported or known as internal."""
    left_out = {
        module: sorted(names)
        for module, source in SOURCES.items()
        if module not in INTERNAL_MODULES
        and (names := definitions(source) - set(hf_shapley.__all__) - INTERNAL.get(module, set()))
    }
    assert left_out == {}


def test_listed_internal_names_exist_and_stay_internal():
    """The list of internal names is not out of date: each one exists and is not exported."""
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


def test_type_checkers_see_names_loaded_late():
    """Type checkers see the names that are loaded late."""
    blocks = [node for node in ast.parse(MODULES["__init__"]).body if isinstance(node, ast.If)]
    assert [ast.unparse(block.test) for block in blocks] == ["TYPE_CHECKING"]
    assert imports(blocks[0].body) == {module: sorted(names) for module, names in hf_shapley._LAZY.items()}


def test_no_module_hides_a_name():
    """No exported name is hidden by a module of the same name."""
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
