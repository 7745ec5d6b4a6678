"""What does this project's code use of upstream packages?  By `ast`, without importing.

Each file is walked with a table of what its names stand for: upstream modules, classes and
functions, objects of upstream classes, and NeMo-Run's configs of them.  types.yaml declares the
types that the code leaves open (`Any`).  A name under `hasattr`, under `getattr` with a default,
or in a `try` with `except ImportError` or `AttributeError`, may be absent.  What follows from
such a name is a use only where the name is there.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.contract.sources import Function, parameters

ABSENCE = {"ImportError", "ModuleNotFoundError", "AttributeError"}
LEAVES = (ast.Return, ast.Raise, ast.Continue)
CONFIGS = {"nemo_run.Config", "nemo_run.Partial"}


@dataclass(frozen=True)
class Call:
    """Arguments of a call: how many by position, and which by keyword.

    `open`: there are * or ** besides.  `bound`: self is given.  `partial`: a NeMo-Run config, whose
    arguments may be missing.
    """

    positional: int
    keywords: tuple[str, ...]
    open: bool
    bound: bool
    partial: bool = False


@dataclass(frozen=True)
class Condition:
    """A use counts only where `name`, or a parameter `name(parameter)`, is there, or is not."""

    name: str
    present: bool


Conditions = frozenset[Condition]


@dataclass(frozen=True)
class Use:
    """A use of an upstream name.

    `kind`: read (imports too), call, field (a constructor's parameter, set in a NeMo-Run config),
    patch (the name is assigned to), override (a method of a subclass), text (types.yaml, texts).
    `ours`: the parameters of our function in its place.
    """

    name: str
    kind: str
    where: str
    call: Call | None = None
    ours: str | None = None
    optional: bool = False
    conditions: frozenset[Condition] = frozenset()


@dataclass(frozen=True)
class Upstream:
    """An upstream module, class or function; `bound`: a method taken from an object."""

    name: str
    bound: bool = False


@dataclass(frozen=True)
class Instance:
    """An object of an upstream class."""

    name: str


@dataclass(frozen=True)
class Config:
    """A NeMo-Run config of an upstream class or function: its attributes are arguments."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A value that stands in the code."""

    value: Any


@dataclass(frozen=True)
class Several:
    """Any of several values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Replacement:
    """A function of ours, which may stand in for an upstream one."""

    node: Function | ast.Lambda


@dataclass(frozen=True)
class Signature:
    """inspect.signature of an upstream function."""

    name: str


@dataclass
class OurClass:
    """A class of ours: the upstream classes it derives from, and the attributes that it defines."""

    name: str
    bases: list[str]
    own: set[str]


@dataclass(frozen=True)
class Self:
    """An object of a class of ours (or, by super(), what it has from upstream)."""

    cls: Any
    upstream_only: bool = False


@dataclass
class Types:
    """What types.yaml declares."""

    packages: frozenset[str]
    names: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    returns: dict[str, Any] = field(default_factory=dict)
    mixed_into: dict[str, list[str]] = field(default_factory=dict)
    reached: dict[str, str] = field(default_factory=dict)

    def of(self, text: Any) -> Any:
        """Return the value that a declaration stands for."""
        if text is None:
            return None
        if isinstance(text, list):
            return Several(tuple(self.of(each) for each in text))
        kind, _, name = text.rpartition(" ")
        return {"": Instance, "config": Config, "class": Upstream, "module": Upstream}[kind](name)


class Collector:
    """Collects the uses of one file."""

    def __init__(self, path: str, tree: ast.Module, types: Types) -> None:
        self.path, self.types = path, types
        self.uses: list[Use] = []
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        self.called = {n.attr for n in attributes if isinstance(n.ctx, ast.Load)}
        self.declared = {**types.names.get("*", {}), **types.names.get(path, {})}
        self.conditions: frozenset[Condition] = frozenset()
        self.optional = False
        self.home: OurClass | None = None
        self.function = ""
        self.later: list[Any] = []
        scope: dict[str, Any] = {}
        self.block(tree.body, scope)
        while self.later:
            self._body(*self.later.pop(0))

    # Statements

    def block(self, body: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
        """Visit statements; after `if TEST: return`, the rest holds where TEST does not."""
        before = self.conditions
        for node in body:
            self.statement(node, scope)
            if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], LEAVES):
                self.conditions |= self._tests(node.test, scope)[1]
        self.conditions = before

    def statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        """Visit a statement, and those inside it."""
        handler = getattr(self, "_" + type(node).__name__.lower(), None)
        if handler:
            handler(node, scope)
        else:
            self._parts(node, scope)

    def _parts(self, node: ast.AST, scope: dict[str, Any]) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.value(part, scope)
            elif isinstance(part, ast.stmt):
                self.statement(part, scope)
            else:
                self._parts(part, scope)

    def _import(self, node: ast.Import, scope: dict[str, Any]) -> None:
        for alias in node.names:
            if self._is_upstream(alias.name):
                self._use(alias.name, "read", node)
                bound = alias.name if alias.asname else alias.name.partition(".")[0]
                scope[alias.asname or bound] = Upstream(bound)
                self._needs(alias.name)

    def _importfrom(self, node: ast.ImportFrom, scope: dict[str, Any]) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if node.module and self._is_upstream(name):
                self._use(name, "read", node)
                scope[alias.asname or alias.name] = Upstream(name)
                self._needs(name)

    def _needs(self, name: str) -> None:
        """What follows an import that may fail, follows only where it does not."""
        if self.optional:
            self.after_try |= {Condition(name, True)}

    after_try: frozenset[Condition] = frozenset()

    def _try(self, node: ast.Try, scope: dict[str, Any]) -> None:
        caught = {
            n.attr if isinstance(n, ast.Attribute) else n.id
            for h in node.handlers
            if h.type
            for n in ast.walk(h.type)
            if isinstance(n, ast.Attribute | ast.Name)
        }
        outer, self.after_try = self.after_try, frozenset()
        before, self.optional = self.optional, self.optional or bool(caught & ABSENCE)
        self.block(node.body, scope)
        self.optional = before
        needed, self.after_try = self.after_try, outer
        for handler in node.handlers:
            if handler.type:
                self.value(handler.type, scope)
            self.block(handler.body, scope)
        if node.handlers and all(isinstance(h.body[-1], LEAVES) for h in node.handlers):
            self.conditions |= needed  # up to the end of the block that the try stands in
        self.block(node.orelse, scope)
        self.block(node.finalbody, scope)

    def _if(self, node: ast.If, scope: dict[str, Any]) -> None:
        self.value(node.test, scope)
        true, false = self._tests(node.test, scope)
        for body, conditions in ((node.body, true), (node.orelse, false)):
            with self._under(conditions):
                self.block(body, scope)

    _while = _if

    def _for(self, node: ast.For, scope: dict[str, Any]) -> None:
        rows = self._rows(node.iter, scope)
        if rows is None:
            self.value(node.iter, scope)
            self._bind(node.target, None, scope)
            self.block(node.body, scope)
        else:
            for row in rows:
                self._bind(node.target, row, scope)
                self.block(node.body, scope)
        self.block(node.orelse, scope)

    _asyncfor = _for

    def _with(self, node: ast.With, scope: dict[str, Any]) -> None:
        for item in node.items:
            found = self.value(item.context_expr, scope)
            if item.optional_vars:
                known = found if isinstance(found, Instance) else None
                self._bind(item.optional_vars, known, scope)
        self.block(node.body, scope)

    _asyncwith = _with

    def _assign(self, node: ast.Assign, scope: dict[str, Any]) -> None:
        for target in node.targets:
            pairs = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if pairs and len(target.elts) == len(node.value.elts):
                for each, value in zip(target.elts, node.value.elts, strict=True):
                    self._store(each, self.value(value, scope), scope)
            else:
                self._store(target, self.value(node.value, scope), scope)

    def _annassign(self, node: ast.AnnAssign, scope: dict[str, Any]) -> None:
        found = self.value(node.value, scope) if node.value else None
        declared = self._annotated(node.annotation, scope)
        self._store(node.target, declared or found, scope)

    def _augassign(self, node: ast.AugAssign, scope: dict[str, Any]) -> None:
        self.value(node.value, scope)
        if isinstance(node.target, ast.Attribute):
            self._store(node.target, None, scope)

    def _functiondef(self, node: Function, scope: dict[str, Any]) -> None:
        for decorator in node.decorator_list:
            self.value(decorator, scope)
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self.value(default, scope)
        if node.returns:
            self.value(node.returns, scope)
        scope[node.name] = Replacement(node)
        self.later.append((node, scope, self.conditions, self.home, self.function, False))

    _asyncfunctiondef = _functiondef

    def _classdef(self, node: ast.ClassDef, scope: dict[str, Any]) -> None:
        bases = [self.value(base, scope) for base in node.bases]
        cls = OurClass(node.name, [], own_names(node))
        for base in bases:
            if isinstance(base, Upstream):
                cls.bases.append(base.name)
            elif isinstance(base, OurClass):
                cls.bases += base.bases
                cls.own |= base.own
        cls.bases = self.types.mixed_into.get(f"{self.path}:{node.name}", cls.bases)
        scope[node.name] = cls
        outer, self.home = self.home, cls
        inner = dict(scope)
        for part in node.body:
            if isinstance(part, Function):
                self._override(part, cls)
                for decorator in part.decorator_list:
                    self.value(decorator, scope)
                self.later.append((part, scope, self.conditions, cls, node.name, True))
            else:
                self.statement(part, inner)
        self.home = outer

    def _override(self, node: Function, cls: OurClass) -> None:
        decorators = {ast.unparse(d) for d in node.decorator_list}
        if node.name.startswith("__") or any(d.endswith(".setter") for d in decorators):
            return
        ours = None if "property" in decorators else parameters(node.args)
        for base in cls.bases:
            self._use(
                f"{base}.{node.name}",
                "override",
                node,
                ours=ours,
                optional=node.name in self.called,
            )

    def _body(
        self,
        node: Function | ast.Lambda,
        scope: dict[str, Any],
        conditions: Any,
        home: Any,
        where: str,
        method: bool,
    ) -> None:
        inner, self.conditions, self.home, self.optional = dict(scope), conditions, home, False
        name = getattr(node, "name", "lambda")
        for ours in (name, where):
            if f"{self.path}:{ours}" in self.types.reached:
                self.conditions |= {Condition(self.types.reached[f"{self.path}:{ours}"], True)}
        self.function = f"{where}.{name}" if where else name
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for number, argument in enumerate(arguments):
            inner[argument.arg] = self._parameter(argument, inner)
            if method and number == 0 and argument.arg in ("self", "cls"):
                inner[argument.arg] = Self(home)
        for extra in (node.args.vararg, node.args.kwarg):
            if extra:
                inner[extra.arg] = None
        if isinstance(node, ast.Lambda):
            self.value(node.body, inner)
        else:
            self.block(node.body, inner)

    def _parameter(self, argument: ast.arg, scope: dict[str, Any]) -> Any:
        for key in (f"{self.function}.{argument.arg}", argument.arg):
            if key in self.declared:
                return self.types.of(self.declared[key])
        return self._annotated(argument.annotation, scope) if argument.annotation else None

    def _annotated(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        """Return an object of the annotated class, where that is upstream's."""
        found = self.value(node, scope) if isinstance(node, ast.Name | ast.Attribute) else None
        if not isinstance(found, Upstream) or found.name in ("nemo_run.Config", "nemo_run.Partial"):
            return None
        return Instance(found.name)

    # Expressions

    def value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        """Visit an expression and return what it stands for; None where that is not known."""
        handler = getattr(self, "_of_" + type(node).__name__.lower(), None)
        if handler:
            return handler(node, scope)
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.value(part, scope)
        return None

    def _of_name(self, node: ast.Name, scope: dict[str, Any]) -> Any:
        needed = self.types.reached.get(f"{self.path}:{node.id}")
        if needed and Condition(needed, True) not in self.conditions:
            self._use(needed, "read", node)  # nothing asked for it before
        if node.id in scope:
            return scope[node.id]
        return self.types.of(self.declared[node.id]) if node.id in self.declared else None

    def _of_constant(self, node: ast.Constant, scope: dict[str, Any]) -> Any:
        return Literal(node.value)

    def _of_tuple(self, node: ast.Tuple | ast.List, scope: dict[str, Any]) -> Any:
        found = [self.value(part, scope) for part in node.elts]
        known = found and all(isinstance(part, Literal) for part in found)
        return Literal(tuple(part.value for part in found)) if known else None

    _of_list = _of_tuple

    def _of_dict(self, node: ast.Dict, scope: dict[str, Any]) -> Any:
        found = [self.value(v, scope) for v in node.values]
        keys = [self.value(k, scope) if k else None for k in node.keys]
        literal = [k.value for k in keys if isinstance(k, Literal)]
        known = len(literal) == len(keys)
        return Literal(dict(zip(literal, found, strict=True))) if known else None

    def _of_joinedstr(self, node: ast.JoinedStr, scope: dict[str, Any]) -> Any:
        inner = [p.value if isinstance(p, ast.FormattedValue) else p for p in node.values]
        parts = [self.value(part, scope) for part in inner]
        known = all(isinstance(part, Literal) for part in parts)
        return Literal("".join(str(part.value) for part in parts)) if known else None

    def _of_binop(self, node: ast.BinOp, scope: dict[str, Any]) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        known = isinstance(left, Literal) and isinstance(right, Literal)
        return Literal(left.value + right.value) if known and isinstance(node.op, ast.Add) else None

    def _of_ifexp(self, node: ast.IfExp, scope: dict[str, Any]) -> Any:
        self.value(node.test, scope)
        true, false = self._tests(node.test, scope)
        found = []
        for part, conditions in ((node.body, true), (node.orelse, false)):
            with self._under(conditions):
                found.append(self.value(part, scope))
        return next((each for each in found if not isinstance(each, Literal | None)), None)

    def _of_subscript(self, node: ast.Subscript, scope: dict[str, Any]) -> Any:
        base, key = self.value(node.value, scope), self.value(node.slice, scope)
        if isinstance(base, Literal) and isinstance(base.value, dict):
            if isinstance(key, Literal):
                return base.value.get(key.value)
            found = tuple(v for v in base.value.values() if v is not None)
            return Several(found) if found else None
        if isinstance(base, Instance):
            return self.types.of(self.types.attributes.get(base.name + "[]"))
        return None

    def _of_lambda(self, node: ast.Lambda, scope: dict[str, Any]) -> Any:
        self.later.append((node, scope, self.conditions, self.home, self.function, False))
        return Replacement(node)

    def _of_namedexpr(self, node: ast.NamedExpr, scope: dict[str, Any]) -> Any:
        found = self.value(node.value, scope)
        self._bind(node.target, found, scope)
        return found

    def _of_listcomp(self, node: Any, scope: dict[str, Any]) -> Any:
        inner = dict(scope)
        choices = []
        for part in node.generators:
            rows = self._rows(part.iter, inner)
            if rows is None:
                found = self.value(part.iter, inner)
                name = found.name if isinstance(found, Instance) else ""
                rows = [self.types.of(self.types.attributes.get(f"{name}[]"))]
            choices.append([(part, row) for row in rows])
        for chosen in itertools.product(*choices):
            for part, row in chosen:
                self._bind(part.target, row, inner)
                for test in part.ifs:
                    self.value(test, inner)
            for name in ("key", "value", "elt"):
                if hasattr(node, name):
                    self.value(getattr(node, name), inner)
        return None

    _of_setcomp = _of_generatorexp = _of_dictcomp = _of_listcomp

    def _of_attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        return self._member(self.value(node.value, scope), node.attr, node)

    def _member(self, base: Any, name: str, node: ast.AST) -> Any:
        """Record the use of an attribute and return what it stands for."""
        if isinstance(base, Several):
            return _several([self._member(each, name, node) for each in base.values])
        if isinstance(base, Self):
            return self._of_self(base, name, node)
        if isinstance(base, OurClass):
            return None
        if isinstance(base, Config):
            if name != "__fn_or_cls__":
                self._use(f"{base.name}({name})", "field", node)
            return self.types.of(self.types.attributes.get(f"{base.name}({name})"))
        if not isinstance(base, Upstream | Instance) or getattr(base, "bound", False):
            return None  # what an object's attribute holds is not known unless declared
        full = f"{base.name}.{name}"
        self._use(full, "read", node)
        if full in self.types.attributes:
            return self.types.of(self.types.attributes[full])
        return Upstream(full, bound=isinstance(base, Instance))

    def _of_self(self, base: Self, name: str, node: ast.AST) -> Any:
        declared = self.declared.get(f"{base.cls.name}.{name}")
        if name in base.cls.own and not base.upstream_only:
            return self.types.of(declared)
        for upstream in base.cls.bases:
            self._use(f"{upstream}.{name}", "read", node)
        if declared or not base.cls.bases:
            return self.types.of(declared)
        return Several(tuple(Upstream(f"{b}.{name}", bound=True) for b in base.cls.bases))

    def _of_call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        special = self._special(node, scope)
        if special is not NotImplemented:
            return special
        called = self.value(node.func, scope)
        for argument in node.args:
            self.value(argument.value if isinstance(argument, ast.Starred) else argument, scope)
        for keyword in node.keywords:
            self.value(keyword.value, scope)
        return self._called(called, node, scope)

    def _called(self, called: Any, node: ast.Call, scope: dict[str, Any]) -> Any:
        if isinstance(called, Several):
            return _several([self._called(each, node, scope) for each in called.values])
        if isinstance(called, OurClass):
            return Self(called)
        if not isinstance(called, Upstream):
            return None
        if called.name in CONFIGS:
            return self._configured(node, scope)
        self._use(called.name, "call", node, call=arguments_of(node, called.bound))
        if called.name in self.types.returns:
            return self.types.of(self.types.returns[called.name])
        last = called.name.rpartition(".")[2].lstrip("_")
        return Instance(called.name) if last[:1].isupper() and not called.bound else None

    def _configured(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        target = self.value(node.args[0], scope) if node.args else None
        if not isinstance(target, Upstream):
            return None
        self._use(
            target.name,
            "call",
            node,
            call=replace(arguments_of(node, True), positional=0, partial=True),
        )
        return Config(target.name)

    def _special(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        """Handle calls that take names as text, and those that make other values of functions."""
        name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        if name in ("getattr", "hasattr", "setattr") and len(node.args) >= 2:
            return self._by_text(name, node, scope)
        if name == "super":
            return Self(self.home, upstream_only=True) if self.home else None
        if name in ("staticmethod", "classmethod") and node.args:
            return self.value(node.args[0], scope)
        if name in ("inspect.signature", "signature") and node.args:
            found = self.value(node.args[0], scope)
            return Signature(found.name) if isinstance(found, Upstream) else None
        if name in ("importlib.import_module", "__import__") and node.args:
            return self._by_import(node, scope)
        if name in ("functools.partial", "partial") and node.args:
            for argument in node.args[1:]:
                self.value(argument, scope)
            return self._partially(self.value(node.args[0], scope), node, scope)
        return NotImplemented

    def _partially(self, called: Any, node: ast.Call, scope: dict[str, Any]) -> Any:
        for keyword in node.keywords:
            self.value(keyword.value, scope)
        if isinstance(called, Upstream):
            self._use(
                called.name,
                "call",
                node,
                call=replace(arguments_of(node, called.bound), partial=True, positional=0),
            )
        return None

    def _by_text(self, name: str, node: ast.Call, scope: dict[str, Any]) -> Any:
        base, text = self.value(node.args[0], scope), self.value(node.args[1], scope)
        rest = [self.value(argument, scope) for argument in node.args[2:]]
        texts = text.values if isinstance(text, Several) else (text,)
        names = [t.value for t in texts if isinstance(t, Literal) and isinstance(t.value, str)]
        if name == "setattr":
            for each in names:
                self._store_member(base, each, rest[0], node)
            return None
        before, self.optional = self.optional, self.optional or name == "hasattr" or bool(rest)
        found = [self._member(base, each, node) for each in names]
        self.optional = before
        if name == "hasattr" or not found:
            return None
        return found[0] if len(found) == 1 else Several(tuple(f for f in found if f is not None))

    def _by_import(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        text = self.value(node.args[0], scope)
        if not isinstance(text, Literal) or not self._is_upstream(str(text.value)):
            return None
        self._use(text.value, "read", node)
        return Upstream(text.value)

    # Assignments

    def _bind(self, target: ast.expr, found: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            other = self.declared.get(target.id)
            declared = self.declared.get(f"{self.function}.{target.id}", other)
            scope[target.id] = found if found is not None else self.types.of(declared)
        elif isinstance(target, ast.Tuple | ast.List):
            for each, value in zip(target.elts, _unpacked(found, len(target.elts)), strict=True):
                self._bind(each, value, scope)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, None, scope)

    def _store(self, target: ast.expr, found: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Attribute):
            self._store_member(self.value(target.value, scope), target.attr, found, target)
        elif isinstance(target, ast.Subscript):
            self.value(target, scope)
        else:
            self._bind(target, found, scope)

    def _store_member(self, base: Any, name: str, found: Any, node: ast.AST) -> None:
        """Record an assignment to an attribute: of upstream modules and classes it is a patch."""
        if isinstance(base, Upstream) and not base.bound:
            self._use(f"{base.name}.{name}", "patch", node, ours=_parameters_of(found))
        elif isinstance(base, Self):
            if name not in base.cls.own:
                self._member(base, name, node)
        else:
            self._member(base, name, node)

    # Conditions

    def _tests(self, test: ast.expr, scope: dict[str, Any]) -> tuple[Conditions, Conditions]:
        """Return what holds where `test` is true, and where it is false."""
        nothing: Conditions = frozenset()
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            true, false = self._tests(test.operand, scope)
            return false, true
        if isinstance(test, ast.BoolOp):
            parts = [self._tests(part, scope) for part in test.values]
            side = 0 if isinstance(test.op, ast.And) else 1
            joined = frozenset[Condition]().union(*(part[side] for part in parts))
            return (joined, nothing) if side == 0 else (nothing, joined)
        name = self._asked(test, scope)
        if name is None:
            return nothing, nothing
        return frozenset({Condition(name, True)}), frozenset({Condition(name, False)})

    def _asked(self, test: ast.expr, scope: dict[str, Any]) -> str | None:
        """Return the upstream name, or parameter, whose presence a test asks for."""
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr":
            base, text = (self._quietly(argument, scope) for argument in test.args)
            if isinstance(base, Upstream | Instance) and isinstance(text, Literal):
                return f"{base.name}.{text.value}"
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.In):
            text, container = self._quietly(test.left, scope), test.comparators[0]
            asks = isinstance(container, ast.Attribute) and container.attr == "parameters"
            if asks and isinstance(text, Literal):
                found = self._quietly(container.value, scope)
                return f"{found.name}({text.value})" if isinstance(found, Signature) else None
        return None

    def _quietly(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        kept = list(self.uses)
        found = self.value(node, scope)
        self.uses = kept
        return found

    @contextmanager
    def _under(self, conditions: frozenset[Condition]) -> Iterator[None]:
        before = self.conditions
        self.conditions |= conditions
        yield
        self.conditions = before

    def _rows(self, node: ast.expr, scope: dict[str, Any]) -> list[Any] | None:
        """Return the elements of a literal that a loop runs over; None where it is none."""
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr == "items":
            found = self.value(called.value, scope)
            known = isinstance(found, Literal) and isinstance(found.value, dict)
            return [Several((Literal(k), v)) for k, v in found.value.items()] if known else None
        if isinstance(node, ast.Tuple | ast.List):
            return [self._row(part, scope) for part in node.elts]
        found = self._quietly(node, scope) if isinstance(node, ast.Name) else None
        known = isinstance(found, Literal) and isinstance(found.value, tuple)
        return [Literal(v) for v in found.value] if known else None

    def _row(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        if isinstance(node, ast.Tuple):
            return Several(tuple(self.value(part, scope) for part in node.elts))
        return self.value(node, scope)

    def _is_upstream(self, name: str) -> bool:
        return name.partition(".")[0] in self.types.packages

    def _use(self, name: str, kind: str, node: ast.AST, **details: Any) -> None:
        optional = details.pop("optional", False) or self.optional
        where = f"{self.path}:{getattr(node, 'lineno', 0)}"
        use = Use(name, kind, where, optional=optional, conditions=self.conditions, **details)
        self.uses.append(use)


def arguments_of(node: ast.Call, bound: bool) -> Call:
    """Return how a call hands its arguments over."""
    plain = [a for a in node.args if not isinstance(a, ast.Starred)]
    keywords = tuple(k.arg for k in node.keywords if k.arg)
    stars = len(plain) < len(node.args) or len(keywords) < len(node.keywords)
    return Call(len(plain), keywords, stars, bound)


def _several(found: Sequence[Any]) -> Several | None:
    known = tuple(each for each in found if each is not None)
    return Several(known) if known else None


def _unpacked(found: Any, number: int) -> Sequence[Any]:
    """Return the values that a tuple of `number` names is bound to."""
    if isinstance(found, Literal) and isinstance(found.value, tuple) and len(found.value) == number:
        return [Literal(value) for value in found.value]
    if isinstance(found, Several) and len(found.values) == number:
        return found.values
    return [None] * number


def own_names(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class of ours defines itself."""
    found = set()
    for part in node.body:
        if isinstance(part, Function):
            found.add(part.name)
        for target in getattr(part, "targets", [getattr(part, "target", None)]):
            if isinstance(target, ast.Name):
                found.add(target.id)
    for method in ast.walk(node):
        if isinstance(method, Function) and method.name == "__init__":
            parts = [n for n in ast.walk(method) if isinstance(n, ast.Attribute)]
            stores = [n for n in parts if isinstance(n.ctx, ast.Store)]
            found |= {n.attr for n in stores if ast.unparse(n.value) == "self"}
    return found


def _parameters_of(found: Any) -> str | None:
    if not isinstance(found, Replacement):
        return None
    return parameters(found.node.args)


def collect(root: Path, files: Sequence[Path], types: Types) -> list[Use]:
    """Return the uses in `files`, with their places relative to `root`."""
    found = []
    for path in files:
        name = str(path.relative_to(root))
        found += Collector(name, ast.parse(path.read_text(encoding="utf-8")), types).uses
    return found
