"""Rules that the whole package keeps: what type checkers and completion see of it."""

import ast
from pathlib import Path

import explainer

ROOT = Path(explainer.__file__).parent


def test_completion_offers_the_public_names_and_not_the_imports_of_the_file():
    offered = dir(explainer)
    assert {"load", "Explanandum", "from_pretrained", "baselines", "__version__"} <= set(offered)
    assert not {"Any", "TYPE_CHECKING", "annotations", "importlib"} & set(offered)
    for name in offered:
        getattr(explainer, name)


def test_type_checkers_see_every_lazy_name_where_it_is_defined():
    block = next(node for node in ast.parse((ROOT / "__init__.py").read_text("utf-8")).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == explainer._LAZY
    assert (ROOT / "py.typed").is_file()  # without it a type checker ignores the package's annotations
