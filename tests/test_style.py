"""What the linter cannot see: assignments and choices that put two thoughts on a line, and long functions without air.

See "Rules" in CONTRIBUTING.md. Only the code that a user runs is held to it, not the tests.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "vae").rglob("*.py"))
LONG = 15  # lines of a function's body, from which on it needs a blank line or a comment


def _parallel_assignments(tree: ast.AST) -> Iterator[str]:
    """Find `a, b = x, y` of values that have nothing to do with each other."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        targets = node.targets[0]
        if isinstance(targets, ast.Tuple) and not _is_swap(targets, node.value) and not _are_alike(node.value.elts):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_swap(targets: ast.Tuple, values: ast.Tuple) -> bool:
    """Say whether a value uses what is assigned beside it, as in `a, b = b, a + b`: two lines would differ."""
    assigned = {ast.dump(target).replace("Store()", "Load()") for target in targets.elts}
    return any(ast.dump(node) in assigned for value in values.elts for node in ast.walk(value))


def _are_alike(values: list[ast.expr]) -> bool:
    """Say whether all values are constants, parts of one thing, or expressions of one form."""
    if all(isinstance(value, ast.Constant) for value in values):
        return True
    if all(isinstance(value, ast.Attribute) for value in values):
        attributes = [value for value in values if isinstance(value, ast.Attribute)]
        return 1 in (len({ast.dump(one.value) for one in attributes}), len({one.attr for one in attributes}))
    return len({_form(value) for value in values}) == 1 and not isinstance(values[0], ast.Name)


def _form(value: ast.expr) -> str:
    """Return an expression without names and constants: `_[_]` for `rows[0]`, `_(_)` for `self.rows(images)`."""
    return ast.dump(_Anonymous().visit(ast.parse(ast.unparse(value), mode="eval")))


class _Anonymous(ast.NodeTransformer):
    """Replace every name, every attribute and every constant by `_`."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name("_", node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        owner = self.visit(node.value)
        return ast.Name("_", node.ctx) if isinstance(owner, ast.Name) else ast.Attribute(owner, "_", node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Name("_", ast.Load())


def _nested_ternaries(tree: ast.AST) -> Iterator[str]:
    """Find a choice within a choice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            inner = [part for part in (node.test, node.body, node.orelse) if isinstance(part, ast.IfExp)]
            if inner:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def _bare_functions(tree: ast.AST, source: str) -> Iterator[str]:
    """Find long functions whose body has neither a blank line nor a comment."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            if not statements:
                continue
            body = lines[statements[0].lineno - 1 : node.end_lineno]
            has_air = any(not line.strip() or line.strip().startswith("#") for line in body)
            if len(body) >= LONG and not has_air:
                yield f"line {node.lineno}: {node.name} has {len(body)} lines"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_a_line_is_one_thought_and_a_long_function_has_air(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert [*_parallel_assignments(tree), *_nested_ternaries(tree), *_bare_functions(tree, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "a, b = 1, f(x)",
        "started, folder = time.monotonic(), best.run",
        "a = b if c else d if e else f",
        "def f():\n" + "    x = 1\n" * LONG,
    ],
)
def test_the_style_test_can_fail(source):
    tree = ast.parse(source)
    assert [*_parallel_assignments(tree), *_nested_ternaries(tree), *_bare_functions(tree, source)] != []


@pytest.mark.parametrize(
    "source",
    [
        "a, b = b, a + b",
        "a, b = f(x)",
        "height, width = image.height, image.width",
        "ours, theirs = gradient(one), gradient(two)",
        "q, k = self.to_q(x), self.to_k(x)",
        "low, high = 0.0, 1.0",
        "a = b if c else d",
        "def f():\n" + "    x = 1\n" * 10 + "\n" + "    y = 2\n" * 10,
    ],
)
def test_what_belongs_together_may_stand_together(source):
    tree = ast.parse(source)
    assert [*_parallel_assignments(tree), *_nested_ternaries(tree), *_bare_functions(tree, source)] == []
