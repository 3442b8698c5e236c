"""The package keeps its shape: imports point down, Hub files stand alone, importing changes nothing."""

import ast
import re
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hf_shapley"

# A folder may import from itself and from those before it; "" are the files beside the folders.
FOLDERS = ["models", "data", "faithfulness", "figures", "publishing", "training", "jobs", ""]
# What knows nothing of any folder but the models, and serves all that come after.
TOOLS = {"version", "files", "terminal", "backbones"}
# `save_pretrained` copies these beside the weights, where they run without hf_shapley.
HUB_FOLDER = "models"
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "PIL"}
# What setup.cfg requires. Extras may be imported inside functions only.
REQUIRED_PACKAGES = HUB_PACKAGES | {
    "accelerate",
    "datasets",
    "evaluate",
    "jinja2",
    "numpy",
    "pyarrow",
    "safetensors",
    "sklearn",
    "tqdm",
}
SIDE_EFFECTS = re.compile(
    r"filterwarnings|simplefilter|basicConfig|setLevel|set_verbosity|disable_progress_bar|environ\b.*|putenv"
    r"|manual_seed|\bseed|set_num_threads|set_default_dtype|set_float32_matmul_precision|matplotlib\.use"
)
LONGEST_FUNCTION = 50
LONGEST_FILE = 400
DEFERRED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)  # what does not run at import


def folder_and_name(module):
    """("models", "heads") of "models/heads"; ("", "cli") of "cli"."""
    folder, _, name = module.rpartition("/")
    return folder, name


PATHS = sorted(SOURCE.rglob("*.py"))
# "models/heads" and "cli": what is in them.
MODULES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
HUB_MODULES = [module for module in MODULES if folder_and_name(module)[0] == HUB_FOLDER]


def relative_imports(source, folder=""):
    """Modules of the package imported in a source of a folder, inside functions too, as `MODULES` has them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            inside = f"{folder}/" if node.level == 1 and folder else ""
            found.add(inside + node.module.replace(".", "/"))
    return found


def misshapen_imports(source, folder=""):
    """Imports of the package that are not `from .module import name`, with the folder where it is another one."""
    shape = re.compile(r"\.\w+|\.\.\w+(\.\w+)?" if folder else r"\.\w+(\.\w+)?")
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level and not (node.module and shape.fullmatch("." * node.level + node.module)):
                found.append(ast.unparse(node))
        if not getattr(node, "level", 0) and any(name.split(".")[0] == "hf_shapley" for name in names):
            found.append(ast.unparse(node))
    return found


def packages(source, *, at_import=False, inside_try=True):
    """Third-party packages imported in a source; on request only when it is imported, or only outside of `try`."""
    skipped = (*(DEFERRED if at_import else ()), *(() if inside_try else (ast.Try,)))
    nodes = walk(
        ast.parse(source),
        lambda node: isinstance(node, skipped) or (at_import and is_for_type_checkers(node)),
    )
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def walk(node, is_skipped):
    """`ast.walk` that does not enter some nodes."""
    for child in ast.iter_child_nodes(node):
        if not is_skipped(child):
            yield child
            yield from walk(child, is_skipped)


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_side_effects(source):
    """Calls and assignments at import that change the state of the process."""
    found = []
    for node in walk(ast.parse(source), lambda node: isinstance(node, DEFERRED)):
        if isinstance(node, ast.Call) and SIDE_EFFECTS.search(ast.unparse(node.func)):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            found += [ast.unparse(node) for target in targets if ast.unparse(target).startswith("os.environ")]
    return found


def long_functions(source):
    """Functions with more lines than allowed, the docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)
            if lines > LONGEST_FUNCTION:
                found.append(f"{node.name}: {lines} lines")
    return found


def import_cycle(graph):
    """A cycle of imports as a list of modules, or None."""
    done = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        cycles = (visit(target, [*path, module]) for target in sorted(graph.get(module, ())))
        cycle = next(filter(None, cycles), None)
        done.add(module)
        return cycle

    return next(filter(None, (visit(module, []) for module in graph)), None)


# ---- the package


def rank(module):
    """How far up a module is: it may import what ranks as high or lower."""
    folder, name = folder_and_name(module)
    return 0.5 if not folder and name in TOOLS else FOLDERS.index(folder)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    imported = relative_imports(MODULES[module], folder_and_name(module)[0])
    assert {name for name in imported if rank(name) > rank(module)} == set()


def test_imports_have_no_cycle():
    graph = {module: relative_imports(source, folder_and_name(module)[0]) for module, source in MODULES.items()}
    assert import_cycle(graph) is None


@pytest.mark.parametrize("module", MODULES)
def test_imports_have_one_shape(module):
    assert misshapen_imports(MODULES[module], folder_and_name(module)[0]) == []


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    assert packages(MODULES[module], at_import=True, inside_try=False) <= REQUIRED_PACKAGES


@pytest.mark.parametrize("module", MODULES)
def test_importing_changes_no_state(module):
    assert import_side_effects(MODULES[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_short(module):
    assert long_functions(MODULES[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module):
    assert MODULES[module].count("\n") <= LONGEST_FILE


@pytest.mark.parametrize("module", MODULES)
def test_figures_stay_outside_of_pyplot(module):
    assert "pyplot" not in re.sub(r'""".*?"""', "", MODULES[module], flags=re.DOTALL)


@pytest.mark.parametrize("module", HUB_MODULES)
def test_hub_files_need_nothing_but_each_other(module):
    source = MODULES[module]
    assert relative_imports(source, HUB_FOLDER) <= set(HUB_MODULES)
    assert packages(source, inside_try=False) <= HUB_PACKAGES


@pytest.mark.parametrize("module", HUB_MODULES)
def test_hub_files_show_transformers_their_real_imports(module):
    source = MODULES[module]
    # transformers finds the files to copy by this pattern, which also matches inside docstrings.
    copied = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    assert {f"{HUB_FOLDER}/{name}" for name in copied} == relative_imports(source, HUB_FOLDER)
    # Annotations as strings would hide the config class of a model from transformers.
    assert "from __future__ import annotations" not in source


# ---- the checks themselves


def test_the_checks_see_what_they_forbid():
    assert relative_imports("def f():\n    from .losses import x") == {"losses"}
    assert relative_imports("from .a import x\nfrom ..b.c import y\nfrom ..d import z", "e") == {"e/a", "b/c", "d"}
    assert len(misshapen_imports("from . import x\nfrom ..a import y\nfrom .a.b.c import z\nimport hf_shapley.a")) == 4
    assert len(misshapen_imports("from . import x\nfrom ...a import y\nfrom .a.b import z", "e")) == 3
    assert misshapen_imports("from hf_shapley.a import x") == ["from hf_shapley.a import x"]
    assert misshapen_imports("from .a import x\nimport torch\nfrom transformers import y") == []
    source = "import os, gradio\ndef f():\n    import shap\ntry:\n    import captum\nexcept ImportError:\n    pass"
    assert packages(source) == {"gradio", "shap", "captum"}
    assert packages(source, at_import=True, inside_try=False) == {"gradio"}
    for_type_checkers = "if TYPE_CHECKING:\n    import shap"
    assert packages(for_type_checkers, at_import=True) == set()
    assert packages(for_type_checkers) == {"shap"}
    effects = "import os\nos.environ['A'] = '1'\nwarnings.simplefilter('ignore')\nos.environ.setdefault('B', '2')\n"
    assert len(import_side_effects(effects)) == 3
    assert import_side_effects("def f():\n    torch.manual_seed(0)\nseeds = [1]") == []
    assert import_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert import_cycle({"a": {"b", "c"}, "b": {"c"}}) is None
    assert long_functions("def f():\n" + "    x = 1\n" * 50) == ["f: 51 lines"]
    assert long_functions('def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 49) == []
