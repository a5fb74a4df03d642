"""Tells from a Triton kernel's source which of its arguments it reads memory through, and which it writes through."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

Names = frozenset[str]
NONE: Names = frozenset()


class Use(NamedTuple):
    """Arguments of a kernel that are pointers or tensor descriptors.

    Attributes:
        read: names of those that it loads from.
        written: names of those that it stores to.
    """

    read: Names
    written: Names


def use(kernel: Any, constants: Mapping[str, Any]) -> Use:
    """The arguments that a launch of a Triton kernel reads and writes through.

    Args:
        kernel: a ``triton.jit`` function.
        constants: the launch's arguments by name; ``if FLAG:`` and ``if not FLAG:`` go by those that are True or False.
    """
    return _use(kernel, frozenset((name, value) for name, value in constants.items() if isinstance(value, bool)))


@cache
def _use(kernel: Any, flags: frozenset[tuple[str, bool]]) -> Use:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    names = [argument.arg for argument in tree.args.args]
    walk = _Walk(names, dict(flags), kernel.fn.__globals__)
    before: object = None
    while before != (before := (dict(walk.origins), set(walk.read), set(walk.written))):  # loops carry pointers round
        walk.block(tree.body)
    return Use(frozenset(walk.read), frozenset(walk.written))


class _Walk:
    """Follows pointers through a function's statements: ``origins`` has the arguments that a variable comes from."""

    def __init__(self, names: Iterable[str], flags: Mapping[str, bool], functions: Mapping[str, Any]) -> None:
        self.origins: dict[str, Names] = {name: frozenset({name}) for name in names}
        self.read: set[str] = set()
        self.written: set[str] = set()
        self._flags, self._functions = flags, functions

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.If):
            chosen = self._decided(node.test)
            self._of(node.test)
            self.block([] if chosen is False else node.body)
            self.block([] if chosen is True else node.orelse)
        elif isinstance(node, (ast.For, ast.While)):
            self._of(node.iter if isinstance(node, ast.For) else node.test)
            self.block(node.body)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            origin = self._of(node.value) if node.value is not None else NONE
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in (one.id for one in ast.walk(target) if isinstance(one, ast.Name)):
                    self.origins[name] = self.origins.get(name, NONE) | origin
        elif isinstance(node, (ast.Expr, ast.Return)) and node.value is not None:
            self._of(node.value)

    def _decided(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._decided(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Constant) and isinstance(test.value, bool):
            return test.value
        return self._flags.get(test.id) if isinstance(test, ast.Name) else None

    def _of(self, node: ast.AST) -> Names:
        """Arguments that an expression's value points into. What is loaded points nowhere."""
        if isinstance(node, ast.Name):
            return self.origins.get(node.id, NONE)
        if isinstance(node, ast.Call):
            return self._call(node)
        return NONE.union(*(self._of(child) for child in ast.iter_child_nodes(node)))

    def _call(self, node: ast.Call) -> Names:
        given = [self._of(argument) for argument in node.args]
        named = {word.arg: self._of(word.value) for word in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "store"):
            of_module = isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"
            place = given[0] if of_module else self._of(node.func.value)
            (self.read if node.func.attr == "load" else self.written).update(place)
            return NONE
        called: Any = self._functions.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if hasattr(called, "arg_names"):  # another triton.jit function
            inner = use(called, self._constants(called, node))
            passed = {**dict(zip(called.arg_names, given, strict=False)), **named}
            self.read.update(*(passed.get(name, NONE) for name in inner.read))
            self.written.update(*(passed.get(name, NONE) for name in inner.written))
            return NONE  # ours return numbers
        of_object = self._of(node.func.value) if isinstance(node.func, ast.Attribute) else NONE
        return of_object.union(*given, *named.values())

    def _constants(self, called: Any, node: ast.Call) -> dict[str, Any]:
        """Flags that are handed on to another function."""
        words = [(word.arg, word.value) for word in node.keywords]
        pairs = [*zip(called.arg_names, node.args, strict=False), *words]
        return {name: decided for name, value in pairs if name and (decided := self._decided(value)) is not None}
