"""What do upstream packages define?  Read from their source files by `ast`, without importing.

A `Sources` knows the packages of one environment (a NeMo, a Megatron-Core, ...) as folders.  It
follows re-exports, star imports, aliases and base classes from one package into another, as
Python would.  Where a name has a definition and a fallback (`try` and `except ImportError`, `if`
and `else`), the definition counts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Defined = Function | ast.ClassDef | ast.expr
SETTERS = {"register_buffer", "register_parameter", "add_module", "setattr", "__setattr__"}
BINDING = re.compile(r'm\.def\(\s*"(\w+)"|py::(?:class_|enum_)<[^(]*\(\s*m\s*,\s*"(\w+)"')


@dataclass(frozen=True)
class Fact:
    """What a stack has under a name: its kind, where it is defined, and how it is called.

    `kind`: module, class, function, method, staticmethod, classmethod, bound (a method of an object
    that a module holds), property, attribute, parameter, unknown, or missing, where `at` is the
    place that lacks it.  `calls`: the parameters, a text for each overload; None where they cannot
    be known.  `body`: a hash of a function's code.
    """

    kind: str
    at: str
    calls: tuple[str, ...] | None = None
    body: str | None = None


@dataclass(frozen=True)
class Binding:
    """How a scope defines a name; `fallback`: in an `except` or an `else`."""

    node: Defined | ast.Import | ast.ImportFrom | None
    line: int
    fallback: bool
    imported: str | None = None  # the dotted name that an import binds


@dataclass
class Module:
    """A parsed module: its dotted name, file, and the names that it binds."""

    name: str
    file: str
    package: bool
    bound: dict[str, list[Binding]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    stub: Module | None = None  # the .pyi file beside it, which may say more


@dataclass(frozen=True)
class Scope:
    """A definition, the module that it stands in, and the class (`owner`) that it is part of."""

    module: Module
    node: Defined | None
    line: int
    owner: ast.ClassDef | None = None
    object: bool = False  # reached through an object that a module holds


@dataclass(frozen=True)
class External:
    """Something of the standard library, or of a package that is not among the sources."""

    name: str


Target = Module | Scope | External
Bound = Iterator[tuple[str, Binding]]


class Sources:
    """The packages of an environment; `roots`: the folders that hold them, by top-level name."""

    def __init__(self, roots: dict[str, Path], elsewhere: dict[str, str] | None = None) -> None:
        """`elsewhere`: attributes that another class sets, as `FILE: text` of its line."""
        self.roots, self.elsewhere = roots, elsewhere or {}
        self._modules: dict[str, Module | None] = {}
        self._busy: set[str] = set()
        self._members: dict[int, dict[str, tuple[Defined | None, int]]] = {}
        self._lines: dict[int, list[Scope | External]] = {}

    def fact(self, name: str) -> Fact:
        """Return what `name` is: dotted, `name(parameter)`, or `FILE: text`, a text in a file."""
        if ": " in name:
            return self._text(*name.split(": ", 1))
        name, _, parameter = name.rstrip(")").partition("(")
        found = self._of_name(name)
        if found.kind == "missing" and name in self.elsewhere:
            found = self._text(*self.elsewhere[name].split(": ", 1))
        return _parameter(found, parameter) if parameter else found

    def _text(self, file: str, text: str) -> Fact:
        path = self.roots[file.partition("/")[0]] / file
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        number = next((n for n, line in enumerate(lines, 1) if text in line), None)
        return Fact("attribute", f"{file}:{number}") if number else Fact("missing", file)

    def _of_name(self, name: str) -> Fact:
        target: Target | None = None
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            last, target = target, self._step(target, parts[:depth])
            if target is None:
                return Fact("missing", _place(last) if last else parts[0])
            if isinstance(target, External):
                return Fact("attribute" if _is_standard(target.name) else "unknown", target.name)
        assert target is not None
        return self._described(target)

    def _step(self, target: Target | None, parts: list[str]) -> Target | None:
        if target is None:
            return self.module(parts[0])
        return self.member(target, parts[-1])

    def member(self, target: Target, name: str) -> Target | None:
        """Return the attribute `name` of a module or class; None where it has none."""
        if isinstance(target, Module):
            return self.of_module(target, name)
        if isinstance(target, External):
            return External(f"{target.name}.{name}")
        if isinstance(target.node, ast.ClassDef):
            return self._of_class(target, name)
        if isinstance(target.node, ast.Call):  # an object that the module holds
            made = self._named(target.module, target.node.func)
            if isinstance(made, Scope) and isinstance(made.node, ast.ClassDef):
                found = self._of_class(made, name)
                return replace(found, object=True) if isinstance(found, Scope) else found
        return External(name)

    # Modules

    def module(self, name: str) -> Module | None:
        """Return a parsed module; None where the sources have no such file."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        root = self.roots.get(name.partition(".")[0])
        if root is None:
            return None
        base = root.joinpath(*name.split("."))
        for path in (
            base / "__init__.py",
            base.with_suffix(".py"),
            base / "__init__.pyi",
            base.with_suffix(".pyi"),
        ):
            if path.is_file():
                return self._parsed(name, path, root)
        if base.is_dir():
            return Module(name, str(base.relative_to(root)), package=True)
        return _extension(name, root)

    def _parsed(self, name: str, path: Path, root: Path) -> Module:
        module = Module(name, str(path.relative_to(root)), path.name.startswith("__init__."))
        self._modules[name] = module
        _fill(module, path)
        stub = path.with_suffix(".pyi")
        if path.suffix == ".py" and stub.is_file():
            module.stub = Module(name, str(stub.relative_to(root)), module.package)
            _fill(module.stub, stub)
        return module

    def of_module(self, module: Module, name: str) -> Target | None:
        """Return what a module has under `name`: its own, imported, or a submodule."""
        own = module.bound.get(name)
        key = f"{module.name}.{name}"
        if own and key not in self._busy:
            self._busy.add(key)
            try:
                for binding in _best_first(own, name):
                    found = self._bound(module, binding)
                    if found is not None and not isinstance(found, External):
                        return found
                return self._bound(module, _best_first(own, name)[0])
            finally:
                self._busy.discard(key)
        submodule = self.module(key)
        if submodule:
            return submodule
        for star in module.stars:
            if not name.startswith("_") and (found := self._starred(star, name)) is not None:
                return found
        if module.stub and name in module.stub.bound:
            return self._bound(module.stub, module.stub.bound[name][-1])
        return self._generated(module, name)

    def _generated(self, module: Module, name: str) -> Target | None:
        """PyTorch copies every function of its C extension into `torch` in a loop."""
        functions = self.module("torch._C._VariableFunctions") if module.name == "torch" else None
        return self.of_module(functions, name) if functions else None

    def _starred(self, star: str, name: str) -> Target | None:
        module = self.module(star)
        key = f"{star}.*{name}"
        if module is None or key in self._busy:
            return None
        self._busy.add(key)
        try:
            return self.of_module(module, name)
        finally:
            self._busy.discard(key)

    def _bound(self, module: Module, binding: Binding) -> Target | None:
        if binding.imported is not None:
            return self.look_up(binding.imported)
        if isinstance(binding.node, ast.Name | ast.Attribute):
            found = self._named(module, binding.node)
            if found is not None:
                return found
        return Scope(module, binding.node, binding.line)  # type: ignore[arg-type]

    def _named(self, module: Module, node: ast.expr) -> Target | None:
        """Return what an expression of names (a.b.C) stands for in a module."""
        if isinstance(node, ast.Subscript):
            return self._named(module, node.value)
        if isinstance(node, ast.Attribute):
            base = self._named(module, node.value)
            return None if base is None else self.member(base, node.attr)
        if isinstance(node, ast.Name):
            found = self.of_module(module, node.id)
            return found if found is not None else _builtin(node.id)
        return None

    def look_up(self, name: str) -> Target | None:
        """Return what a dotted name stands for; External outside the sources."""
        parts = name.split(".")
        if parts[0] not in self.roots:
            return External(name)
        target: Target | None = self.module(parts[0])
        for part in parts[1:]:
            if target is None:
                return None
            target = self.member(target, part)
        return target

    # Classes

    def classes(self, scope: Scope) -> list[Scope | External]:
        """Return a class and its bases, nearest first."""
        if id(scope.node) not in self._lines:
            self._lines[id(scope.node)] = list(self._line(scope))
        return self._lines[id(scope.node)]

    def _line(self, scope: Scope) -> Iterator[Scope | External]:
        seen: set[int] = set()
        queue: list[Scope | External] = [scope]
        while queue:
            found = queue.pop(0)
            if isinstance(found, External):
                yield found
                continue
            assert isinstance(found.node, ast.ClassDef)
            if id(found.node) in seen:
                continue
            seen.add(id(found.node))
            yield found
            bases = [self._base(found.module, base) for base in found.node.bases]
            queue = [*bases, *queue]

    def _base(self, module: Module, node: ast.expr) -> Scope | External:
        found = self._named(module, node)
        if isinstance(found, Scope) and isinstance(found.node, ast.ClassDef):
            return found
        return found if isinstance(found, External) else External(ast.unparse(node))

    def _of_class(self, scope: Scope, name: str) -> Target | None:
        """Return an attribute of a class or its objects; External where a base is unknown."""
        unknown: External | None = None
        for base in self.classes(scope):
            if isinstance(base, External):
                if _standard_has(base.name, name) in (True, None):
                    unknown = External(base.name)
                continue
            assert isinstance(base.node, ast.ClassDef)
            found = self.members(base.node)
            if name in found:
                return Scope(base.module, *found[name], base.node)
            if "__getattr__" in found and base.node.name != "Module":
                unknown = External(f"{base.node.name}.__getattr__")
        return unknown or (External("object") if hasattr(object, name) else None)

    def members(self, node: ast.ClassDef) -> dict[str, tuple[Defined | None, int]]:
        """Return the attributes of a class, without its bases', and their lines."""
        if id(node) not in self._members:
            self._members[id(node)] = members(node)
        return self._members[id(node)]

    # Facts

    def _described(self, target: Target) -> Fact:
        if isinstance(target, Module):
            return Fact("module", target.file)
        assert isinstance(target, Scope)
        node = target.node
        if isinstance(node, ast.ClassDef):
            return Fact("class", _place(target), self.constructor(target))
        if isinstance(node, Function):
            kind = "bound" if target.object else _kind(node, target.owner)
            body = None if target.module.file.endswith(".pyi") else body_hash(node)
            return Fact(kind, _place(target), self._calls(target), body)
        return Fact("attribute", _place(target))

    def _calls(self, scope: Scope) -> tuple[str, ...]:
        """Return the ways to call a function: one, or its overloads, which stub files spell out."""
        node = scope.node
        assert isinstance(node, Function)
        if scope.owner is not None:
            same = [n for n in scope.owner.body if isinstance(n, Function) and n.name == node.name]
        else:
            bound = scope.module.bound.get(node.name, [])
            same = [b.node for b in bound if isinstance(b.node, Function)]
        overloads = [n for n in same if any("overload" in ast.unparse(d) for d in n.decorator_list)]
        return tuple(dict.fromkeys(parameters(n.args) for n in overloads or [node]))

    def constructor(self, scope: Scope) -> tuple[str, ...] | None:
        """Return how a class is called; None where that cannot be known."""
        fields: list[str] = []
        for base in self.classes(scope):
            if isinstance(base, External):
                return tuple([", ".join(["self", *fields])]) if fields else None
            assert isinstance(base.node, ast.ClassDef)
            own = {n.name: n for n in base.node.body if isinstance(n, Function)}
            init = own.get("__init__") or own.get("__new__")
            if init is not None:
                calls = self._calls(Scope(base.module, init, init.lineno, base.node))
                return calls if len(calls) > 1 else self._with_parents(base, init)
            if _is_dataclass(base.node):
                return ("self, " + ", ".join(self._fields(base)),)
        return None

    def _with_parents(self, scope: Scope, init: Function) -> tuple[str, ...]:
        """Return `__init__`'s parameters, and its parent's where it hands **kwargs on."""
        text = parameters(init.args)
        if init.args.kwarg is None or not _hands_on(init, init.args.kwarg.arg):
            return (text,)
        own = text.rpartition("**")[0].rstrip(", ")
        for base in self.classes(scope)[1:]:
            if isinstance(base, External):
                return (text,)
            assert isinstance(base.node, ast.ClassDef)
            theirs = self.constructor(base)
            if theirs is None:
                return (text,)
            return (_merged(own, theirs[0]),)
        return (text,)

    def _fields(self, scope: Scope) -> list[str]:
        found: dict[str, str] = {}
        for base in reversed(self.classes(scope)):
            node = base.node if isinstance(base, Scope) else None
            if isinstance(node, ast.ClassDef) and _is_dataclass(node):
                found.update(_own_fields(node))
        return list(found.values())


def _fill(module: Module, path: Path) -> None:
    for found, binding in bindings(_tree(path).body, module):
        if found == "*":
            module.stars.append(binding.imported or "")
        else:
            module.bound.setdefault(found, []).append(binding)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _parameter(found: Fact, name: str) -> Fact:
    """Return whether a function or class has a parameter; unknown where it takes any."""
    if found.kind == "missing" or found.calls is None:
        return Fact("missing" if found.kind == "missing" else "unknown", found.at)
    parts = [part.rstrip("=") for call in found.calls for part in call.split(", ")]
    if name in parts:
        return Fact("parameter", found.at)
    return Fact("unknown" if any(part.startswith("**") for part in parts) else "missing", found.at)


def bindings(body: list[ast.stmt], module: Module, fallback: bool = False) -> Bound:
    """Yield the names that statements bind, those in branches included; "*" for a star import."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, Binding(node, node.lineno, fallback)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                full = alias.name if alias.asname else name
                yield name, Binding(node, node.lineno, fallback, full)
        elif isinstance(node, ast.ImportFrom):
            home = _absolute(node, module)
            for alias in node.names:
                imported = home if alias.name == "*" else f"{home}.{alias.name}"
                yield alias.asname or alias.name, Binding(node, node.lineno, fallback, imported)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _assigned(node, fallback)
        else:
            yield from _branches(node, module, fallback)


def _branches(node: ast.stmt, module: Module, fallback: bool) -> Bound:
    yield from bindings(getattr(node, "body", []), module, fallback)
    yield from bindings(getattr(node, "orelse", []), module, True)
    for handler in getattr(node, "handlers", []):
        yield from bindings(handler.body, module, True)
    yield from bindings(getattr(node, "finalbody", []), module, fallback)


def _assigned(node: ast.Assign | ast.AnnAssign, fallback: bool) -> Bound:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in names:
            if isinstance(name, ast.Name):
                value = None if isinstance(target, ast.Tuple) else node.value
                yield name.id, Binding(value, node.lineno, fallback)


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _best_first(found: list[Binding], name: str) -> list[Binding]:
    """Return bindings: the last definition first, what is made of `name` itself, fallbacks."""
    calls = [b for b in found if isinstance(b.node, ast.Call)]
    of_itself = [b for b in calls if name in _names(b.node)]
    plain = [b for b in found if not b.fallback and b not in of_itself]
    return [*reversed(plain), *of_itself, *[b for b in found if b.fallback and b not in of_itself]]


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def members(node: ast.ClassDef) -> dict[str, tuple[Defined | None, int]]:
    """Return the attributes of a class and of its objects, with their lines."""
    found: dict[str, tuple[Defined | None, int]] = {}
    for name, binding in bindings(node.body, Module("", "", False)):
        if name not in found or not (binding.fallback or _sets(binding.node)):
            imported = isinstance(binding.node, ast.Import | ast.ImportFrom)
            defined: Any = None if imported else binding.node
            found[_mangled(node, name)] = (defined, binding.line)
    for part in ast.walk(node):
        for name in _set_on_self(part):
            found.setdefault(_mangled(node, name), (None, getattr(part, "lineno", node.lineno)))
    return found


def _sets(node: ast.AST | None) -> bool:
    """Return whether a function is a property's setter, which stands after its getter."""
    decorators = node.decorator_list if isinstance(node, Function) else []
    return any(ast.unparse(d).endswith(".setter") for d in decorators)


def _set_on_self(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node.attr
    elif isinstance(node, ast.Call):
        constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str)]
        if ast.unparse(node.func).rpartition(".")[2] in SETTERS and texts:
            yield texts[0]
    elif isinstance(node, ast.Assign) and "__slots__" in map(ast.unparse, node.targets):
        yield from (str(e.value) for e in ast.walk(node.value) if isinstance(e, ast.Constant))


def _mangled(node: ast.ClassDef, name: str) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{node.name.lstrip('_')}{name}" if private else name


def _kind(node: Function, owner: ast.ClassDef | None) -> str:
    decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    for kind in ("staticmethod", "classmethod"):
        if kind in decorators:
            return kind
    if decorators & {"property", "cached_property", "abstractproperty"}:
        return "property"
    return "function" if owner is None else "method"


def parameters(args: ast.arguments) -> str:
    """Return parameters as text, `a, b=, /, c=, *rest, d=, **others`; `=` marks a default."""
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    parts = [a.arg + ("=" if n >= required else "") for n, a in enumerate(positional)]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if args.vararg:
        parts.append("*" + args.vararg.arg)
    elif args.kwonlyargs:
        parts.append("*")
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parts.append(argument.arg + ("=" if default is not None else ""))
    return ", ".join([*parts, *(["**" + args.kwarg.arg] if args.kwarg else [])])


def body_hash(node: Function) -> str:
    """Return a hash of a function's code, without comments, docstring, annotations, layout."""
    body = node.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    text = parameters(node.args) + "".join(ast.dump(statement) for statement in body)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _own_fields(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for part in node.body:
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
            continue
        value = ast.unparse(part.value) if part.value else ""
        if "ClassVar" not in ast.unparse(part.annotation) and "init=False" not in value:
            required = part.value is None or (value.startswith("field(") and "default" not in value)
            found[part.target.id] = part.target.id + ("" if required else "=")
    return found


def _hands_on(init: Function, name: str) -> bool:
    """Return whether `super().__init__` gets **name."""
    return any(
        isinstance(call, ast.Call)
        and "__init__" in ast.unparse(call.func)
        and any(k.arg is None and ast.unparse(k.value) == name for k in call.keywords)
        for call in ast.walk(init)
    )


def _merged(own: str, theirs: str) -> str:
    """Return own parameters, and the parent's as keywords."""
    kept = [part for part in theirs.split(", ") if part not in ("self", "*", "/")]
    have = {part.rstrip("=") for part in own.split(", ")}
    named = [part.rstrip("=") for part in kept if not part.startswith("*")]
    rest = [part for part in named if part not in have]
    more = [part for part in kept if part.startswith("**")]
    star = [] if "*" in own else ["*"]
    return ", ".join([own, *star, *(part + "=" for part in rest), *more])


def _extension(name: str, root: Path) -> Module | None:
    """Return the names that Transformer Engine's C++ extension binds (pybind.cpp)."""
    if name != "transformer_engine_torch":
        return None
    module = Module(name, "transformer_engine/pytorch/csrc", package=False)
    for path in sorted((root / module.file).rglob("pybind.*")):
        module.file = str(path.relative_to(root))
        text = path.read_text(encoding="utf-8")
        for match in BINDING.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            module.bound[match[1] or match[2]] = [Binding(None, line, False)]
    return module if module.bound else None


def _builtin(name: str) -> Target | None:
    import builtins

    return External(f"builtins.{name}") if hasattr(builtins, name) else None


def _standard_has(base: str, name: str) -> bool | None:
    """Return whether a class of the standard library has an attribute; None for others."""
    module, _, attribute = base.rpartition(".")
    top = module.partition(".")[0] or base
    if base in ("Generic", "Protocol", "ABC", "NamedTuple") or top in (
        "typing",
        "typing_extensions",
        "abc",
    ):
        return False
    if not module or (top not in sys.stdlib_module_names and top != "builtins"):
        return None
    return hasattr(getattr(importlib.import_module(module), attribute, None), name)


def _is_standard(name: str) -> bool:
    """Return whether the standard library has a module-level name."""
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return False
    return hasattr(importlib.import_module(module), attribute)


def _place(target: Target) -> str:
    if isinstance(target, Module):
        return target.file
    return f"{target.module.file}:{target.line}" if isinstance(target, Scope) else target.name
