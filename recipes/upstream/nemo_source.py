"""What do NeMo's recipes build?  Read from NeMo's source, which is parsed and never imported.

    python -m recipes.upstream.nemo_source
        compare the list with the NeMo that is installed
    python -m recipes.upstream.nemo_source SOURCE
        the same with a source tree (a folder that holds nemo/)
    python -m recipes.upstream.nemo_source SOURCE --write
        write the rows of that version into the list, and docs/models.md
    python -m recipes.upstream.nemo_source --model NAME
        print a conf/model file for a recipe of the list

A recipe is a module of nemo/collections/llm/recipes with a `pretrain_recipe`, or with a
`finetune_recipe` alone.  Its function `model` names the class of its configuration, whose fields
come from the classes that it inherits from (nemo/collections/llm/*/model) and in the end from
Megatron-Core's TransformerConfig.  The exit code is 1 where the list differs from the source.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.cli import ArgumentParser, command
from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.nemo_recipes import ARCHITECTURE, COLUMNS, NEMO_RECIPES, SIZES, by_version
from recipes.upstream import models_page

RECIPES = Path("nemo/collections/llm/recipes")
MODELS = Path("nemo/collections/llm")  # its gpt/model, bert/model and t5/model
DIFFERENT = 1
Row = dict[str, str]
Fields = dict[str, Any]

# Defaults of Megatron-Core's TransformerConfig, the same in 0.12.3 and 0.13.0
# (transformer/transformer_config.py); None for ffn_hidden_size is four times hidden_size, for
# num_query_groups the number of heads.
MEGATRON: Fields = {
    "activation_func": "gelu",
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "attention_backend": "auto",
    "attention_dropout": 0.1,
    "bias_activation_fusion": False,
    "ffn_hidden_size": None,
    "gated_linear_unit": False,
    "hidden_dropout": 0.1,
    "kv_channels": None,
    "layernorm_zero_centered_gamma": False,
    "normalization": "LayerNorm",
    "num_query_groups": None,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "window_size": None,
}
# A class that the configuration inherits from: why this project does not train the model
FAMILIES = {
    "T5Config": "an encoder and a decoder (T5), and this project trains decoders alone",
    "BertConfig": "an encoder (BERT), and this project trains decoders alone",
    "HyenaConfig": "a model of Hyena's convolutions, and this project trains transformers alone",
    "SSMConfig": (
        "a Mamba model or a hybrid with Mamba layers, and this project trains transformers alone"
    ),
}
ACTIVATIONS = {
    ("silu", True): "swiglu",
    ("gelu", True): "geglu",
    ("openai_gelu", True): "geglu",
    ("gelu", False): "gelu",
    ("openai_gelu", False): "gelu",
    ("squared_relu", False): "squared_relu",
}
NORMS = {
    ("RMSNorm", False): "rmsnorm",
    ("RMSNorm", True): "rmsnorm1p",
    ("LayerNorm", False): "layernorm",
    ("LayerNorm", True): "layernorm1p",
}
LAYERS = (
    "default_layer_spec",
    "gemma2_layer_spec",
)  # layers that recipes/training/layers.py has too
NEEDED = (
    "dir",
    "name",
    "num_nodes",
    "num_gpus_per_node",
)  # arguments that recipes/training/recipe.py gives


# -------------------------------------------------------------------------------- classes of models


@dataclass
class Source:
    """A parsed NeMo: its version ("2.3"), recipe modules, classes and functions of its models by
    name.
    """

    version: str
    modules: dict[str, ast.Module]
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    types: dict[str, type] = field(default_factory=dict)

    def ancestors(self, name: str) -> list[str]:
        """Return the names of a class and its bases in Python's order, those that NeMo does not
        define too.
        """
        return [cls.__name__ for cls in self._type(name).__mro__ if cls is not object]

    def _type(self, name: str) -> type:
        if name not in self.types:
            bases = (
                [_last(base) for base in self.classes[name].bases] if name in self.classes else []
            )
            self.types[name] = type(name, tuple(self._type(base) for base in bases if base), {})
        return self.types[name]

    def fields(self, name: str) -> Fields:
        """Return the values of a configuration's fields, as its dataclasses give them."""
        values = dict(MEGATRON)
        for ancestor in reversed(self.ancestors(name)):
            cls = self.classes.get(ancestor)
            if cls and any(_last(mark) == "dataclass" for mark in cls.decorator_list):
                set_here = (
                    s for s in cls.body if isinstance(s, ast.AnnAssign) and s.value is not None
                )
                values |= {
                    s.target.id: _value(s.value)
                    for s in set_here
                    if isinstance(s.target, ast.Name) and s.value
                }
        return values


def numbers(root: Path) -> dict[str, Any]:
    """Return MAJOR, MINOR, PATCH and the like of the NeMo below `root`; InputError where there is
    none.
    """
    try:
        info = (root / "nemo/package_info.py").read_text()
    except OSError:
        raise InputError(
            f"{root} holds no nemo/package_info.py; name the folder of a NeMo source tree"
        ) from None
    return {
        _last(s.targets[0]): _value(s.value)
        for s in ast.parse(info).body
        if isinstance(s, ast.Assign)
    }


def read(root: Path) -> Source:
    """Return the NeMo below `root` (a folder that holds nemo/); InputError where there is none."""
    found = numbers(root)
    modules = {
        path.stem: ast.parse(path.read_text()) for path in sorted((root / RECIPES).glob("*.py"))
    }
    source = Source(f"{found['MAJOR']}.{found['MINOR']}", modules)
    for path in sorted((root / MODELS).glob("*/model/*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                source.classes[node.name] = node
            elif isinstance(node, ast.FunctionDef):
                source.functions[node.name] = node
    return source


def installed() -> Path:
    """Return the folder that holds the installed NeMo, without importing it; InputError where there
    is none.
    """
    spec = find_spec("nemo")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("NeMo is not installed here; name the folder of its source tree")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _last(node: ast.AST | None) -> str:
    """Return the last part of a dotted name: silu of torch.nn.functional.silu; "" of anything
    else.
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return _last(node.func) if isinstance(node, ast.Call) else ""


def _value(node: ast.expr) -> Any:
    """Return what an expression stands for: a literal, the last part of a name, or its text."""
    if isinstance(node, ast.Call) and _last(node) == "field":
        made = next(k.value for k in node.keywords if k.arg in ("default", "default_factory"))
        return _value(made.body if isinstance(made, ast.Lambda) else made)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _last(node) or ast.unparse(node)


# ------------------------------------------------------------------------------------------ recipes


@dataclass
class Built:
    """What a recipe's function `model` builds: classes of model and configuration, and fields set
    by the recipe.
    """

    model: str = ""
    config: str = ""
    fields: Fields = field(default_factory=dict)


def rows(source: Source) -> list[Row]:
    """Return the rows of the list for a version of NeMo, by name."""
    recipes = {name: _functions(module) for name, module in source.modules.items()}
    known = {
        name: found
        for name, found in recipes.items()
        if {"pretrain_recipe", "finetune_recipe"} & found.keys()
    }
    return [_row(source, name, found) for name, found in known.items()]


def _functions(module: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}


def _row(source: Source, name: str, functions: dict[str, ast.FunctionDef]) -> Row:
    built = Built()
    if "model" in functions:
        _follow(source, name, functions["model"], {}, built)
    fields = {**source.fields(built.config), **built.fields} if built.config else {}
    refused = _refused(source, functions.get("pretrain_recipe"), built, fields)
    values: Fields = {"nemo": source.version, "recipe": name, "refused": refused}
    if not refused:
        try:
            values |= (
                {"config": built.config} | _sizes(fields) | _architecture(source, built, fields)
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{name}: {built.config} has something that this command does not know:"
                f" {one_line(str(error))}"
            ) from None
        values["performance_mode"] = "performance_mode" in _arguments(functions["pretrain_recipe"])
    return {column: _text(values.get(column)) for column in COLUMNS}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _follow(
    source: Source, module: str, function: ast.FunctionDef, given: Fields, built: Built
) -> None:
    """Note in `built` what a function of a recipe's module builds, given the values of its
    arguments.
    """
    names = {**_constants(source.modules[module]), **_defaults(function), **given}
    for statement in _executed(function.body, names):
        for node in ast.walk(statement):
            if isinstance(node, (ast.Name, ast.Attribute)) and _last(node) in source.classes:
                _note_class(source, _last(node), built)
            if isinstance(node, ast.Call):
                _follow_call(source, module, node, names, built)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
            built.fields[statement.targets[0].attr] = _value(statement.value)


def _note_class(source: Source, name: str, built: Built) -> None:
    """Keep the first model and the first configuration that a function names."""
    if name.endswith("Model"):
        built.model = built.model or name
    elif any(ancestor.endswith("Config") for ancestor in source.ancestors(name)):
        built.config = built.config or name


def _follow_call(source: Source, module: str, call: ast.Call, names: Fields, built: Built) -> None:
    """Follow a call of another recipe's `model`, or of a function that modules share."""
    if _last(call) == "Config":
        built.fields |= {
            k.arg: _value(k.value)
            for k in call.keywords
            if k.arg and isinstance(k.value, ast.Constant)
        }
        return
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    home = _last(owner) if owner is not None else _home(source, module, _last(call))
    function = _functions(source.modules[home]).get(_last(call)) if home in source.modules else None
    if function is not None and "model" in function.name.split("_"):
        given = dict(zip(_arguments(function), (_known(a, names) for a in call.args), strict=False))
        given |= {k.arg: _known(k.value, names) for k in call.keywords if k.arg}
        _follow(source, home, function, given, built)


def _home(source: Source, module: str, function: str) -> str:
    """Return the recipe module that a function comes from: one that `module` imports it from, or
    itself.
    """
    for node in source.modules[module].body:
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and any(alias.name == function for alias in node.names)
        ):
            return node.module.rpartition(".")[2]
    return module


def _constants(module: ast.Module) -> Fields:
    return {
        _last(s.targets[0]): s.value.value
        for s in module.body
        if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant)
    }


def _defaults(function: ast.FunctionDef) -> Fields:
    named = function.args.args[len(function.args.args) - len(function.args.defaults) :]
    return {
        argument.arg: _value(default)
        for argument, default in zip(named, function.args.defaults, strict=True)
    }


def _known(node: ast.expr, names: Fields) -> Any:
    return names.get(node.id) if isinstance(node, ast.Name) else _value(node)


def _executed(body: Sequence[ast.stmt], names: Fields) -> Iterator[ast.stmt]:
    """Yield the statements that run, taking of an `if` the branch that the known values choose."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _executed(
                statement.body if _holds(statement.test, names) else statement.orelse, names
            )
        else:
            yield statement


def _holds(test: ast.expr, names: Fields) -> bool:
    if isinstance(test, ast.Compare):
        return bool(_known(test.left, names) == _known(test.comparators[0], names))
    return bool(_known(test, names))


# --------------------------------------------------------------------------------- what it comes to


def _refused(source: Source, pretrain: ast.FunctionDef | None, built: Built, fields: Fields) -> str:
    """Return why this project does not train a recipe's model; "" for a dense decoder."""
    if pretrain is None:
        return "for fine-tuning alone: it has no pretrain_recipe"
    raised = next((s.exc for s in pretrain.body if isinstance(s, ast.Raise)), None)
    if isinstance(raised, ast.Call):
        return (
            f"not for pretraining: its pretrain_recipe raises {_last(raised)}:"
            f" {_value(raised.args[0])}"
        )
    if not built.config:
        return "a Hugging Face model in a wrapper, and this project trains Megatron-Core's layers"
    family = next(
        (FAMILIES[name] for name in source.ancestors(built.config) if name in FAMILIES), None
    )
    if family:
        return family
    if fields.get("num_moe_experts"):
        return (
            f"a mixture of {fields['num_moe_experts']} experts, and this project trains dense"
            " models"
        )
    if _layers_of(fields) not in LAYERS:
        return (
            f"a model with layers of its own ({_layers_of(fields)}), which this project does not"
            " know"
        )
    missing = [name for name in NEEDED if name not in _arguments(pretrain)]
    return f"not buildable: its pretrain_recipe takes no {', '.join(missing)}" if missing else ""


def _layers_of(fields: Fields) -> str:
    return str(fields.get("transformer_layer_spec"))


def _sizes(fields: Fields) -> Fields:
    sizes = {name: fields.get(name) for name in SIZES}
    sizes["ffn_hidden_size"] = sizes["ffn_hidden_size"] or 4 * fields["hidden_size"]
    sizes["num_query_groups"] = sizes["num_query_groups"] or fields["num_attention_heads"]
    return sizes


def _architecture(source: Source, built: Built, fields: Fields) -> Fields:
    """Return the fields of a plan's model; a choice of NeMo that the tables above do not have is a
    KeyError.
    """
    rope = fields["position_embedding_type"] == "rope"
    window = fields["window_size"]
    values: Fields = {
        "head_size": fields["kv_channels"],
        "tied_embeddings": fields["share_embeddings_and_output_weights"],
        "sliding_window": window[0] if window else None,
        "activation": ACTIVATIONS[fields["activation_func"], fields["gated_linear_unit"]],
        "fused_activation": fields["bias_activation_fusion"],
        "normalization": NORMS[fields["normalization"], fields["layernorm_zero_centered_gamma"]],
        "post_norms": _mentions(
            source.functions.get(_layers_of(fields)), "TERowParallelLinearLayerNorm"
        ),
        "linear_bias": fields["add_bias_linear"],
        "qkv_bias": fields["add_bias_linear"] or fields["add_qkv_bias"],
        "qk_norm": fields["qk_layernorm"],
        "position_embedding": fields["position_embedding_type"],
        "rotary_base": float(fields["rotary_base"]) if rope else None,
        "rotary_percent": float(fields["rotary_percent"]) if rope else None,
        "rope_scaling": float(fields["scale_factor"]) if "scale_factor" in fields else None,
        "attention_softcap": fields.get("attn_logit_softcapping"),
        "logit_softcap": fields.get("final_logit_softcapping"),
        "embedding_scaling": _mentions(source.classes.get(built.model), "EmbeddingScalingMixin"),
        "dropout": float(max(fields["hidden_dropout"], fields["attention_dropout"])),
        "attention_backend": fields["attention_backend"],
    }
    assert values.keys() >= set(ARCHITECTURE)
    return values


def _mentions(node: ast.AST | None, name: str) -> bool:
    return node is not None and any(
        _last(part) == name
        for part in ast.walk(node)
        if isinstance(part, (ast.Name, ast.Attribute))
    )


# ----------------------------------------------------------------------------------------- the list


def listed() -> list[Row]:
    """Return the rows of the list as they stand in the file."""
    with NEMO_RECIPES.open(newline="") as file:
        return list(csv.DictReader(file))


def differences(found: Sequence[Row], version: str) -> list[str]:
    """Return a line for each recipe of a version that the list has otherwise, lacks or has too
    many.
    """
    ours = {row["recipe"]: row for row in listed() if row["nemo"] == version}
    theirs = {row["recipe"]: row for row in found}
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            lines.append(f"{name}: {'not in the list' if a is None else 'not in the source'}")
        else:
            lines += [
                f"{name}: {key} is {b[key]!r}, the list has {a.get(key)!r}"
                for key in COLUMNS
                if a.get(key) != b[key]
            ]
    return lines


def write(found: Sequence[Row], version: str) -> None:
    """Put the rows of a version into the list, in place of those that it has."""
    others = [row for row in listed() if row["nemo"] != version]
    ordered = sorted([*others, *found], key=lambda row: (row["nemo"], row["recipe"]))
    with NEMO_RECIPES.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered)


def model_file(name: str) -> str:
    """Return the text of a conf/model file for a recipe, of the newest version that has it;
    InputError where none has.
    """
    version = max(
        (version for version, recipes in by_version().items() if name in recipes), default=None
    )
    if version is None:
        raise InputError(
            f"no version of NeMo in the list has a recipe {name}; docs/models.md lists them"
        )
    recipe = by_version()[version][name]
    if recipe.refused:
        raise InputError(f"{name} is {recipe.refused}")
    values = {"name": name, "nemo_recipe": name, **recipe.model}
    values["vocab_size"] = values["vocab_size"] or "???   # the tokenizer's"
    lines = [f"{key}: {_text(value)}" for key, value in values.items() if value is not None]
    return "\n".join([f"# NeMo {version} nemo/collections/llm, {recipe.config}.", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can correct."""
    parser = ArgumentParser(
        prog="python -m recipes.upstream.nemo_source",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="a folder that holds nemo/ (default: the installed NeMo)",
    )
    parser.add_argument(
        "--write", action="store_true", help="write the rows of the source's version into the list"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="print a conf/model file for a recipe of the list"
    )
    args = parser.parse_args(argv)
    try:
        if args.model:
            print(model_file(args.model))
            return 0
        source = read(args.source or installed())
        return _compare(rows(source), source.version, args.write)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _compare(found: Sequence[Row], version: str, to_write: bool) -> int:
    dense = sum(not row["refused"] for row in found)
    what = f"NeMo {version}: {len(found)} recipes, {dense} of them dense decoders"
    if to_write:
        write(found, version)
        by_version.cache_clear()
        models_page.PAGE.write_text(models_page.text(), encoding="utf-8")
        print(f"{what}; written to {NEMO_RECIPES.name} and {models_page.PAGE.name}")
        return 0
    different = differences(found, version)
    print("\n".join([f"{what}; {len(different)} difference(s) from the list", *different]))
    return DIFFERENT if different else 0


if __name__ == "__main__":
    command(main)
