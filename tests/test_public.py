"""The public face: names, layers of the house, what importing costs, examples everywhere."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import e2kd

PACKAGE = Path(e2kd.__file__).parent

NAMES = {
    "BcosContributions", "BcosWeights", "CAM", "CanonicalView", "E2KDLoss", "Explainer", "Explanation",
    "ExplanationLoss", "FrozenDataset", "FrozenTeacher", "GradCAM", "HiResCAM", "InputGradient", "JointAugmentation",
    "KDLoss", "LayerCAM", "MultiLabelKDLoss", "NoEffectWarning", "Taught", "TransferMonitor", "UniCAMResult",
    "UnsupportedModel", "__version__", "check", "cosine", "explain", "freeze", "kd_loss", "label_embeddings",
    "multilabel_kd_loss", "unicam",
}  # fmt: skip
PARTS = {  # public as a whole
    "baselines", "bcos", "distance", "frozen", "guidance", "metrics", "monitor", "perturb", "trainers", "transfer",
}  # fmt: skip

# An import may only point to a lower layer, or sideways within one package.
LAYERS = [
    ["errors", "version", "taught", "graph", "folders", "pictures", "held", "hooks", "sharding", "percentiles"],
    ["kernels", "showing"],
    ["embeddings", "modes"],
    ["similarity", "layout", "outputs", "regions", "bcos", "distance"],
    ["objects", "warping", "kornia_stages", "normalization"],
    ["logits", "comparing", "augment", "perturb", "localization"],
    ["probe", "probing", "explainers", "classes", "tasks"],
    ["choosing", "lessons", "listening"],
    ["guards"],
    ["sites"],
    ["stages"],
    ["tracing"],
    ["heads"],
    ["narrow"],
    ["plans"],
    ["views"],
    ["passes"],
    ["forward"],
    ["capture", "inspection"],
    ["ways"],
    ["student", "teacher", "answers"],
    ["wrapping"],
    ["losses", "guidance", "frozen", "transfer", "baselines"],
    ["dryrun", "metrics", "monitor", "report"],
    ["commands"],
    ["demo"],
    ["cli", "trainers"],
]
HEAVY = (
    "timm", "torchvision", "transformers", "accelerate", "kornia", "torchmetrics", "matplotlib", "sklearn",
    "safetensors", "PIL", "fsspec", "tqdm",
)  # fmt: skip


def level(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The first name after `e2kd.` of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("e2kd."):
            found.add(str(node.module).split(".")[1])
    return found


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Everything inside that runs, and is not there for a type checker alone."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from executed(child)


def needs(path: Path, names: Collection[str]) -> set[str]:
    """The modules of e2kd that a file imports, at once or when a function of its is called."""
    found = set()
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("e2kd"):
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in names else str(node.module) for name in inside}
    return found


def test_public_names_are_these() -> None:
    """A name removed here breaks somebody's training script: deprecate it first and say so in CHANGELOG.md."""
    assert set(e2kd.__all__) == NAMES | PARTS
    assert all(hasattr(e2kd, name) for name in NAMES | PARTS)


@pytest.mark.parametrize("path", [p for p in modules() if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path) - {own}:
        assert level(name) < level(own), f"{own} imports {name}"


def test_no_modules_import_one_another() -> None:
    dotted = (".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in modules())
    paths = dict(zip((name.removesuffix(".__init__") for name in dotted), modules(), strict=True))
    list(TopologicalSorter({name: needs(path, paths) for name, path in paths.items()}).static_order())


def test_no_module_bears_the_name_of_a_public_function() -> None:
    assert not {p.stem for p in modules()} & NAMES


def test_importing_e2kd_loads_torch_and_nothing_heavy() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import e2kd; "
        f"new = set(sys.modules) - before; heavy = [m for m in new if m.split('.')[0] in {HEAVY!r}]; "
        "other = [m for m in new if not m.startswith('e2kd')]; print(heavy, len(other), sorted(other))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ")
    assert int(out.split()[1]) < 20, out


def test_what_messages_name_is_there_in_a_fresh_script() -> None:
    names = "e2kd.frozen.AppearanceOnly, e2kd.frozen.merge, e2kd.frozen.CacheError, e2kd.trainers.accelerate.Parts"
    code = f"import e2kd; print({names}); print(hasattr(e2kd.trainers, 'keras'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n")


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__", "NoEffectWarning", "UnsupportedModel", "Explanation"}))
def test_every_public_name_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(inspect.getdoc(getattr(e2kd, name)) or "")


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
