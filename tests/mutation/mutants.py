"""Small faults for a source file, one at a time: a sign, a scale, an index, a bound, a denominator.

Only bodies of functions are changed. Left alone: text, messages of errors and of logs, annotations, defaults, decorators.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
SIGN = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.BitAnd: "&", ast.BitOr: "|",
}  # fmt: skip
# The bound moves by one value, and the direction turns round.
COMPARISON = {
    ast.Lt: ("<", "<=", ">"), ast.LtE: ("<=", "<", ">="), ast.Gt: (">", ">=", "<"), ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
_PAIRS = (
    ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("clamp_min", "clamp_max"),
    ("any", "all"), ("sum", "mean"), ("floor", "ceil"),
)  # fmt: skip
CALLS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
DROPPED = ("detach", "abs")  # methods without arguments whose result is of the same shape
SILENT = ("log", "logging", "logger", "warnings")  # what is said there is nobody's contract


class Mutant(NamedTuple):
    """One fault: where it is, what it does, and the whole file with it."""

    number: int  # of the line, from 1
    line: str  # as it was, stripped
    change: str  # "+ becomes -"
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every fault, in the order of the file. One that reads like another, or changes nothing, is left out."""
    lines, found, seen = source.splitlines(), [], {source}
    for node, change, new in _faults(ast.parse(source)):
        text = _replaced(source, node, new)
        if text not in seen:
            seen.add(text)
            found.append(Mutant(node.lineno, lines[node.lineno - 1].strip(), change, text))
    return sorted(found, key=lambda m: m.number)


def _faults(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    for function in _functions(tree):
        for statement in function.body:
            for node in _changeable(statement):
                for change, new in _changes(node):
                    yield node, change, new


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods; those inside of another belong to it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if node.name != "__repr__":
                yield node
        elif isinstance(node, ast.ClassDef | ast.If):
            yield from _functions(node)


def _changeable(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """A node and what is below it, without what is only said or declared."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom) or _speaks(node):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    declared: set[ast.AST] = set()
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # zip's: a precaution
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        declared = {node.args, *getattr(node, "decorator_list", ()), *filter(None, [getattr(node, "returns", None)])}
    elif isinstance(node, ast.AnnAssign):
        declared = {node.annotation}
    for child in ast.iter_child_nodes(node):
        if child not in declared:
            yield from _changeable(child)


def _speaks(node: ast.AST) -> bool:
    """Is it text for a reader, or a call that logs?"""
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    root = node.value.func if isinstance(node.value, ast.Call) else None
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(root, ast.Name) and root.id in SILENT


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(what is changed, the node's new text)"""
    match node:
        case ast.BinOp() | ast.AugAssign():
            yield from _computed(node)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            yield from _compared(left, ops, rights)
        case ast.BoolOp(op=op, values=values):
            sign, other = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
            yield f"{sign} becomes {other}", "(" + f" {other} ".join(f"({ast.unparse(v)})" for v in values) + ")"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            pass  # -1 becomes -2 and 0 by its own constant; 1 would be the same axis of a table
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert() as op, operand=operand):
            sign = {ast.Not: "not", ast.USub: "the minus", ast.Invert: "~"}[type(op)]
            yield f"{sign} is dropped", f"({ast.unparse(operand)})"
        case ast.IfExp(test=test, body=body, orelse=other) if not _turned_by_itself(test):
            yield "the two cases change places", _text(ast.IfExp(test, other, body))
        case ast.Constant(value=bool(value)):
            yield f"{value} becomes {not value}", str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from ((f"{value} becomes {new}", f"({new})") for new in (value + 1, value - 1))
        case ast.Call(func=func, args=args, keywords=keywords):
            yield from _called(func, args, keywords)
        case ast.Expr(value=ast.Call() as call):
            yield f"{ast.unparse(call.func)}(...) is dropped", "pass"


def _computed(node: ast.BinOp | ast.AugAssign) -> Iterator[tuple[str, str]]:
    if type(node.op) not in SIGN:
        return
    sign, other = SIGN[type(node.op)], ARITHMETIC[type(node.op)]
    match node:
        case ast.BinOp(left=left, op=op, right=right) if not (_is_text(left) or _is_text(right)):
            a, b = ast.unparse(left), ast.unparse(right)
            yield f"{sign} becomes {other}", f"(({a}) {other} ({b}))"
            if isinstance(op, ast.Add | ast.Sub):
                yield f"{sign} {b} is dropped", f"({a})"
        case ast.AugAssign(target=target, value=value) if not _is_text(value):
            yield f"{sign}= becomes {other}=", f"{ast.unparse(target)} {other}= {ast.unparse(value)}"


def _compared(left: ast.expr, ops: list[ast.cmpop], rights: list[ast.expr]) -> Iterator[tuple[str, str]]:
    for i, op in enumerate(ops):
        sign, *others = COMPARISON[type(op)]
        for other in others:
            signs = [other if j == i else COMPARISON[type(o)][0] for j, o in enumerate(ops)]
            chain = " ".join(f"{s} ({ast.unparse(r)})" for s, r in zip(signs, rights, strict=True))
            yield f"{sign} becomes {other}", f"(({ast.unparse(left)}) {chain})"


def _called(func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> Iterator[tuple[str, str]]:
    match func:
        case ast.Name(id=name) if name in CALLS:
            if name not in ("sum", "floor", "ceil"):  # there is no such plain function as the other
                yield f"{name} becomes {CALLS[name]}", _text(ast.Call(ast.Name(CALLS[name]), args, keywords))
        case ast.Attribute(value=value, attr=name) if name in CALLS:
            other = ast.Attribute(value, CALLS[name], ast.Load())
            yield f"{name} becomes {CALLS[name]}", _text(ast.Call(other, args, keywords))
        case ast.Attribute(value=value, attr=name) if name in DROPPED and not args and not keywords:
            yield f".{name}() is dropped", f"({ast.unparse(value)})"


def _turned_by_itself(test: ast.expr) -> bool:
    """Does another change turn this condition into its contrary?"""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare(ops=[op]):
            return len(COMPARISON[type(op)]) == 2
    return False


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"


def _replaced(source: str, node: ast.expr | ast.stmt, new: str) -> str:
    """The source with the node's text replaced; lines that fall away are made up for, so that numbers stay."""
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    # Columns count bytes of UTF-8.
    before = lines[first].encode()[: node.col_offset].decode()
    after = lines[last].encode()[node.end_col_offset :].decode()
    blank = "\n" * (last - first)
    return "".join(lines[:first]) + before + new + after + blank + "".join(lines[last + 1 :])
