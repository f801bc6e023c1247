"""The arrows of the architecture: YAML -> modules, datamodules, callbacks -> prism_pl -> the libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SYSTEMS = {"modules", "datamodules", "callbacks"}


def imported_packages(source: str) -> set[str]:
    """Top-level names a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def forbidden(path: Path) -> set[str]:
    """What a file may not import: the library no system (its command line may), a system no other kind of system."""
    package = path.relative_to(ROOT).parts[0]
    if path == ROOT / "prism_pl" / "cli.py":
        return {"tests", "benchmarks"}
    return (SYSTEMS - {package}) | {"tests", "benchmarks"}


@pytest.mark.parametrize("package", ["prism_pl", *sorted(SYSTEMS)])
def test_imports_follow_the_arrows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in files
        if (found := imported_packages(path.read_text()) & forbidden(path))
    }
    assert wrong == {}


def test_an_import_inside_a_function_counts():
    assert imported_packages("def f():\n    from modules.align import X\n    import callbacks.y\n") == {
        "modules",
        "callbacks",
    }


def test_every_package_is_installed():
    """setup.py names the packages; one that is not named is missing from a plain install."""
    setup_py = (ROOT / "setup.py").read_text()
    for package in ["prism_pl", *SYSTEMS]:
        for init in (ROOT / package).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            assert f'"{name}"' in setup_py, f"setup.py does not name {name}"
