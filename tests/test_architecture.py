"""The rules of the layout, read off the source; each rule is also shown something that breaks it."""

import ast
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdconvert.cli.road import ROAD

ROOT = Path(__file__).parents[1]
STAGES = [name.partition("-")[2] for name in ROAD]
MECHANISMS = {"plugins", "adapters", "models", "pipelines", "parallel", "io"}
SOURCES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for folder in ("sdconvert", "scripts")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGE = {name: tree for name, tree in SOURCES.items() if name.startswith("sdconvert/")}


def part(name: str) -> str:
    """Return the part of the package that a file belongs to: `io` for `sdconvert/io/tensors.py`, else its stem."""
    return name.split("/")[1].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what is imported: (module, name), the name empty for plain imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def stage_imports(name: str, tree: ast.Module) -> Iterator[str]:
    """A mechanism imports no stage; a stage no later one, and earlier ones only through their artifact."""
    own = part(name)
    if own in ("cli", "__main__") or not name.startswith("sdconvert/"):
        return
    for module, _ in imports(tree):
        parts = module.split(".")
        if parts[0] != "sdconvert" or len(parts) < 2 or parts[1] == own:
            continue
        if parts[1] == "cli":
            yield f"imports {module}"
        if parts[1] not in STAGES:
            continue
        if own not in STAGES:
            yield f"mechanism imports {module}"
        elif STAGES.index(parts[1]) > STAGES.index(own):
            yield f"imports the later stage {module}"
        elif parts[2:] != ["artifact"]:
            yield f"imports {module} past its artifact"


def private_packages(name: str, tree: ast.Module) -> Iterator[str]:
    """Each of these packages has one door."""
    doors = {
        "aimet_torch": ("sdconvert/quantize/aimet.py",),
        "onnxruntime_qnn": ("sdconvert/qnn/",),
        "xfuser": ("sdconvert/parallel/xfuser_engine.py",),
        "safetensors": ("sdconvert/io/tensors.py",),
        "hydra": ("sdconvert/plugins/build.py",),
        "omegaconf": ("sdconvert/plugins/build.py", "sdconvert/plugins/configuration.py"),
        "typer": ("sdconvert/cli/", "scripts/make_docs.py"),
    }
    for module, _ in imports(tree):
        door = doors.get(module.partition(".")[0])
        if door and not name.startswith(door):
            yield f"imports {module}"


def torch_files(name: str, tree: ast.Module) -> Iterator[str]:
    """In the package, only io/tensors.py reads and writes torch's files."""
    if name.startswith("sdconvert/") and name != "sdconvert/io/tensors.py":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                yield f"line {node.lineno} uses {ast.unparse(node)}"


def printing(name: str, tree: ast.Module) -> Iterator[str]:
    """Only the command line prints."""
    if part(name) != "cli" and name.startswith("sdconvert/"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield f"line {node.lineno} prints"


def module_state(name: str, tree: ast.Module) -> Iterator[str]:
    """No state at module level other than registries, and nothing happens at import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno} rebinds {', '.join(node.names)}"
    if part(name) in ("cli", "__main__") or Path(name).name == "registry.py":
        return
    for node in tree.body:
        if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            yield f"line {node.lineno} works at import"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield f"line {node.lineno} calls {ast.unparse(node.value.func)} at import"
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value and ast.unparse(value) in ("{}", "[]", "set()", "dict()", "list()"):
            yield f"line {node.lineno} keeps a container that starts empty"


def stubs(name: str, tree: ast.Module) -> Iterator[str]:
    """Nothing is left undone, and no error is swallowed whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc):
            yield f"line {node.lineno} is a stub"
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            yield f"line {node.lineno} catches everything"


def length(name: str, tree: ast.Module) -> Iterator[str]:
    """Files end by line 600, functions take at most 80 lines."""
    if tree.body and (tree.body[-1].end_lineno or 0) > 600:
        yield f"has {tree.body[-1].end_lineno} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
            yield f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"


Rule = Callable[[str, ast.Module], Iterator[str]]
BROKEN: list[tuple[Rule, str, str]] = [
    (stage_imports, "sdconvert/io/x.py", "from sdconvert.quantize.artifact import A"),
    (stage_imports, "sdconvert/stages.py", "def f():\n    import sdconvert.qnn.stage"),
    (stage_imports, "sdconvert/quantize/x.py", "from sdconvert.export.artifact import A"),
    (stage_imports, "sdconvert/export/x.py", "from sdconvert.quantize.stage import A"),
    (stage_imports, "sdconvert/export/x.py", "from sdconvert.quantize import A"),
    (stage_imports, "sdconvert/export/x.py", "from sdconvert.cli.session import Session"),
    (private_packages, "sdconvert/models/x.py", "import aimet_torch.v2"),
    (private_packages, "sdconvert/io/images.py", "from safetensors.torch import load_file"),
    (torch_files, "sdconvert/models/x.py", "import torch\ntorch.save({}, 'x')"),
    (printing, "sdconvert/qnn/x.py", "def f():\n    print('x')"),
    (module_state, "sdconvert/models/x.py", "_CACHE: dict[str, int] = {}"),
    (module_state, "sdconvert/models/x.py", "import torch\ntorch.set_num_threads(1)"),
    (module_state, "sdconvert/models/x.py", "def f():\n    global x\n    x = 1"),
    (module_state, "sdconvert/models/x.py", "try:\n    import xfuser\nexcept ImportError:\n    xfuser = None"),
    (stubs, "sdconvert/models/x.py", "def f():\n    raise NotImplementedError"),
    (stubs, "sdconvert/models/x.py", "try:\n    pass\nexcept Exception:\n    pass"),
    (length, "sdconvert/models/x.py", "\n" * 600 + "x = 1"),
    (length, "sdconvert/models/x.py", "def f():\n" + "    x = 1\n" * 80),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule: Rule) -> None:
    assert [f"{name}: {fault}" for name, tree in SOURCES.items() for fault in rule(name, tree)] == []


@pytest.mark.parametrize(("rule", "name", "text"), BROKEN)
def test_rule_sees_what_breaks_it(rule: Rule, name: str, text: str) -> None:
    assert list(rule(name, ast.parse(text)))


def test_files_are_short_as_a_rule() -> None:
    lengths = [tree.body[-1].end_lineno or 0 for tree in PACKAGE.values() if tree.body]
    assert statistics.median(lengths) <= 150


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {part(name) for name in PACKAGE if name.count("/") > 1}
    assert parts <= {*STAGES, *MECHANISMS, "cli", "assets"}


def test_every_folder_of_tests_mirrors_one_of_the_package() -> None:
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if any(folder.glob("test_*.py"))}
    assert folders <= {folder.name for folder in (ROOT / "sdconvert").iterdir()} | {"distributed", "device", "scripts"}


def test_no_two_files_of_tests_share_a_name() -> None:
    """Test files are modules of one level; pytest refuses the second of a name, and only when both are collected."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_every_file_states_its_idea() -> None:
    assert [name for name, tree in SOURCES.items() if not ast.get_docstring(tree)] == []
