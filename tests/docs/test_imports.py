"""The house keeps its order: imports run one way, files and functions stay short, slow imports wait."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dtron"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports from its own floor and from those before it.
FLOORS = [
    {"config", "mesh", "models"},
    {"ranks"},
    {"parallel"},
    {"data", "checkpoint", "observe", "optim"},
    {"registry"},
    {"train"},
    {"hf", "cluster", "plan", "explain", "verify", "compare"},
    {"__main__", "library"},
]
ANYWHERE = {
    "dtron",
    "compat",
    "errors",
    "files",
}  # may be imported from anywhere, and import nothing of dtron but each other
LAZY = {"transformers", "datasets", "tokenizers", "tensorboard", "torchdata", "matplotlib", "wandb"}


def room(module: str) -> str:
    """`dtron.parallel.tensor` -> `parallel`."""
    return (module.split(".") + ["dtron"])[1] if "." in module else "dtron"


def floor(name: str) -> int:
    if name in ANYWHERE:
        return -1
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imported(tree: ast.AST) -> set[str]:
    """Full names of the modules that the statements in `tree` import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from dtron import compat` imports a module, `from dtron.errors import UserError` a name of one.
            names |= {f"dtron.{alias.name}" for alias in node.names} if node.module == "dtron" else {node.module or ""}
    return names


def upward(name: str, source: str) -> list[str]:
    """What module `name` imports from a floor above its own."""
    ours = {module for module in imported(ast.parse(source)) if module.split(".")[0] == "dtron"}
    return sorted(module for module in ours if floor(room(module)) > floor(room(name)))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    assert upward(module_name(path), path.read_text()) == []


def test_an_import_the_wrong_way_is_found() -> None:
    assert upward("dtron.models.llama", "def f():\n    from dtron.parallel import tensor") == ["dtron.parallel"]
    assert upward("dtron.compat", "from dtron import mesh, errors") == ["dtron.mesh"]
    assert upward("dtron.data.loader", "import dtron.registry") == ["dtron.registry"]


def circles(files: dict[str, str]) -> list[list[str]]:
    """Modules that import each other in a circle. files: module name -> source; late imports count too."""
    arrows = {
        name: {module for module in imported(ast.parse(source)) if module in files and module != name}
        for name, source in files.items()
    }
    found: list[list[str]] = []

    def walk(path: list[str], done: set[str]) -> None:
        for module in sorted(arrows[path[-1]]):
            if module in path:
                found.append([*path[path.index(module) :], module])
            elif module not in done:
                walk([*path, module], done)
                done.add(module)

    done: set[str] = set()
    for name in sorted(files):
        if name not in done:
            walk([name], done)
            done.add(name)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not between rooms, and not inside one; what only a type checker imports counts as well."""
    assert circles({module_name(path): path.read_text() for path in FILES}) == []


def test_a_circle_is_found() -> None:
    files = {
        "dtron.a": "from dtron.b import x",
        "dtron.b": "def f():\n    from dtron.c import y",
        "dtron.c": "import dtron.a",
        "dtron.d": "from dtron import a",
    }
    assert circles(files) == [["dtron.a", "dtron.b", "dtron.c", "dtron.a"]]


def test_only_train_py_starts_from_the_top() -> None:
    assert imported(ast.parse((ROOT / "train.py").read_text())) == {"dtron.train.launch"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_slow_libraries_are_imported_where_they_are_used(path: Path) -> None:
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported(ast.Module(top, []))} & LAZY == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "parallel").glob("*.py")), ids=module_name)
def test_a_dimension_is_read_in_one_sitting(path: Path) -> None:
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) < 300


def test_functions_fit_a_screen() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f"{module_name(path)}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []
