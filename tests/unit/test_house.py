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


#: Longest module, in lines.
LONGEST = 400
#: Parameters that a caller may give by position; the others are given by name.
MOST_POSITIONAL = 5
#: Signatures that torch or Lightning prescribe, which call them by position.
PRESCRIBED = {"OpenAttention.attend", "OpenAttention.multi_head", "PredictionWriter.on_predict_batch_end", "ClassHead.forward"}


def sources() -> list[tuple[str, str]]:
    return [(str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))]


def test_no_module_is_long():
    assert {name: length for name, text in sources() if (length := text.count("\n")) > LONGEST} == {}


def crowded(source: str) -> dict[str, int]:
    """Public functions and methods that take more than MOST_POSITIONAL arguments by position, with how many (without ``self``)."""
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], inside: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{inside}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (not node.name.startswith("_") or node.name.endswith("__")):
                bound = bool(inside) and "staticmethod" not in [ast.unparse(d) for d in node.decorator_list]
                number = len(node.args.posonlyargs) + len(node.args.args) - bound
                if number > MOST_POSITIONAL:
                    found[inside + node.name] = number

    visit(ast.parse(source).body, "")
    return found


def test_crowded_functions_are_found():
    source = """
def many(a, b, c, d, e, f): ...
def named(a, b, c, d, e, *, f, g): ...
def _own(a, b, c, d, e, f): ...
class Public:
    def __init__(self, a, b, c, d, e, f): ...
    def five(self, a, b, c, d, e): ...
    @staticmethod
    def six(a, b, c, d, e, f): ...
class _Own:
    def many(self, a, b, c, d, e, f): ...
"""
    assert crowded(source) == {"many": 6, "Public.__init__": 6, "Public.six": 6}


def test_public_functions_take_what_is_beyond_five_arguments_by_name():
    found = {name: (path, number) for path, text in sources() for name, number in crowded(text).items()}
    assert set(found) == PRESCRIBED, {name: found[name] for name in set(found) - PRESCRIBED}


def test_formatting_is_the_formatters_alone():
    tests = Path(__file__).parents[1]
    texts = [*sources(), *((str(path.relative_to(tests)), path.read_text("utf-8")) for path in sorted(tests.rglob("*.py")))]
    marks = [f"fmt: {word}" for word in ("skip", "off")]
    assert [name for name, text in texts if any(mark in text for mark in marks)] == []
