"""What a log states about its own run: sizes, layout, batches, number format, schedule.

Sources, each named where it is read:
- Megatron-LM prints its arguments as `  name ....... value` and "using world size: N, ..."
  (megatron/training/arguments.py:985 and :338, core_v0.12.3).
- Megatron-Bridge and NeMo 1 print their configuration as YAML, a section indented under its name.
- NeMo 2 prints parts of it as `name=value`, and the ranks of its groups
  (nemo/lightning/megatron_init.py:443-536, v2.3.2).
- Lightning prints "Starting with N processes" and "MEMBER: 1/N"
  (lightning/fabric/utilities/distributed.py:296 and :307, 2.4.0).
- torchrun's own line and command line give nodes and processes a node; DeepSpeed's launcher prints
  dist_world_size (deepspeed/launcher/launch.py), Accelerate "Num processes"
  (AcceleratorState.__repr__).
- torchtitan prints its device mesh, and "Training starts at step 1, with ..."
  (torchtitan/distributed/parallel_dims.py and train.py, v0.2.0).

Only whole names and plain values are taken, never the text around them: a log may hold secrets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.errors import InputError

OFF = frozenset({"none", "null", "false", "0"})
SCALINGS = {
    "delayed": "delayed",
    "tensorwise": "current",
    "blockwise": "subchannel",
    "mxfp8": "mxfp8",
}
# nemo/collections/llm/recipes/precision/mixed_precision.py, v2.4.0; Bridge's have the same names
PRESETS = {
    "bf16_mixed": None,
    "bf16_with_fp8_mixed": "delayed",
    "bf16_with_fp8_delayed_scaling_mixed": "delayed",
    "bf16_with_fp8_current_scaling_mixed": "current",
    "bf16_with_fp8_subchannel_scaling_mixed": "subchannel",
    "bf16_with_mxfp8_mixed": "mxfp8",
}
PRECISIONS = {
    None: "bf16",
    "delayed": "fp8_delayed",
    "current": "fp8_current",
    "subchannel": "fp8_subchannel",
    "mxfp8": "mxfp8",
}
ALIASES = {
    "encoder_seq_length": "seq_length",
    "sequence_length": "seq_length",
    "fp8_format": "fp8",
    "fp8_param": "fp8_param_gather",
    "activations_checkpoint_granularity": "recompute_granularity",
    "activations_checkpoint_method": "recompute_method",
    "activations_checkpoint_num_layers": "recompute_num_layers",
    "virtual_pipeline_parallel_size": "virtual_pipeline_model_parallel_size",
    "max_target_length": "seq_length",  # MaxText
    "global_batch_size_to_train_on": "global_batch_size",
    "use_custom_fsdp": "fsdp",
    "use_megatron_fsdp": "fsdp",
    "external_cuda_graph": "enable_cuda_graph",
    "train_batch_size": "global_batch_size",
    "min_nodes": "nnodes",  # torchrun prints both, and they differ where it is elastic
    "max_nodes": "nnodes",
}
INTEGERS = {  # a name in a log -> the plan's key, for what is taken as it is
    "tensor_model_parallel_size": "mapping.tp",
    "pipeline_model_parallel_size": "mapping.pp",
    "context_parallel_size": "mapping.cp",
    "micro_batch_size": "mapping.micro_batch",
    "global_batch_size": "mapping.global_batch",
    "seq_length": "seq_length",
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "train_iters": "train.max_steps",
    "lr_warmup_iters": "train.warmup_steps",
    "eval_interval": "train.eval_interval",
    "eval_iters": "train.eval_batches",
    "seed": "seed",
}
NUMBERS = {
    "lr": "train.max_lr",
    "min_lr": "train.min_lr",
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "weight_decay": "train.weight_decay",
    "clip_grad": "train.clip_grad",
    "rotary_base": "model.rotary_base",
}
DERIVED = (  # names that give a key of the plan together with others
    "world_size",
    "data_parallel_size",
    "devices",
    "num_nodes",
    "nproc_per_node",
    "nnodes",
    "num_query_groups",
    "group_query_attention",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "share_embeddings_and_output_weights",
    "bf16",
    "fp16",
    "fp8",
    "fp8_recipe",
    "fp8_param_gather",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "virtual_pipeline_model_parallel_size",
    "fsdp",
    "enable_cuda_graph",
    "cuda_graph_impl",
    "precision",
    "vocab_size",
    "cpu_offloading",
    "cpu_offloading_num_layers",
    "tp_comm_overlap",
    "optimizer",
    "num_experts",
    "num_moe_experts",
    "multi_latent_attention",
    "fp4",
)
NAMES = frozenset([*INTEGERS, *NUMBERS, *DERIVED, *ALIASES])
ENUMS = frozenset(
    {"fp8", "fp8_recipe", "cuda_graph_impl"}
)  # may be printed with their type: Fp8Recipe.tensorwise
INLINE = frozenset(
    name for name in NAMES if name.count("_") > 1
) | {  # told apart from prose by their underscores
    *("num_layers", "hidden_size", "seq_length", "fp8", "fp8_recipe", "fp8_format", "fp8_margin"),
}
LAUNCHER = frozenset(
    {"nproc_per_node", "nnodes", "min_nodes", "max_nodes"}
)  # torchrun's, also written with hyphens
ELSEWHERE = frozenset(
    {"ddp", "checkpoint", "tokenizer", "profiling", "logger"}
)  # sections that repeat names

DEEPEST = 8  # sections within sections

VALUE = r"['\"]?(?P<value>[-+]?[\w.][-+\w.]{0,39})['\"]?"
PREFIX = r"^(?:.{0,80}?[\]:>]\s)?"  # a rank, a time stamp, "[NeMo I ... file:line]"
CLOCK = re.compile(r"\[?20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d[-+.,:\dZ]{0,20}\]?\s?")
ARGUMENT = re.compile(rf"{PREFIX}\s*(?P<name>\w{{2,40}})[ \t]\.{{2,}}[ \t]{VALUE}\s*$")
YAML = re.compile(rf"{PREFIX}(?P<indent>\s*)(?P<name>\w{{2,40}}):(?:\s+{VALUE})?,?\s*$")
WORD = r"[A-Za-z0-9][\w-]{1,40}"
NAMED = re.compile(
    rf"(?<![\w.$-])(?:--(?P<flag>{WORD})(?:=|\s+)|(?P<name>{WORD})['\"]?\s*[=:]\s*){VALUE}(?![\w:])"
)
UNKNOWN = "?"  # a value that a log names and does not print: --nnodes=$NODES
PRESET = re.compile(rf"\b({'|'.join(PRESETS)})\b")
WORLD = re.compile(
    r"\bStarting with (\d{1,7}) processes|\bMEMBER:"
    r" \d{1,7}/(\d{1,7})\b|(?<![\w$-])WORLD_SIZE['\"]?\s*[=:]\s*['\"]?(\d{1,7})\b"
    r"|\bNum_devices: (\d{1,7}), shape|\bdist_world_size=(\d{1,7})\b|^\s*Num processes:"
    r" (\d{1,7})\s*$"
    r"|\bNamespace\(.{0,20000}?\bworld_size=(\d{1,7})\b"
)
TRAINER = re.compile(r"(?<![\w.])(devices|num_nodes)=(\d{1,5})(?![\w.])")
FP8_ON = re.compile(
    r"\b(?:Float8|MXFP8|FP8|MX)(?: \w+){0,3} training (?:active|enabled)"
)  # torchtitan; nanochat
HUGGING_FACE = re.compile(
    r"\bTotal train batch size \(w\. parallel, distributed & accumulation\) = ([\d,]{1,12})\s*$"
)
ALONE = re.compile(r"\s*(?:devices|num_nodes)=\d{1,5},?\s*")
USING = re.compile(r"\b([a-z-]{5,30}) size: (\d{1,7})")
GROUPS = re.compile(
    r"All (tensor model|pipeline model|context) parallel group ranks: \[\[([\d, ]*)\]"
)
LAST_RANK = re.compile(r"(\d{1,7})\]\]\s*$")
MESH = re.compile(r"device mesh with \[([\w', ]{0,80})\], \[([\d, ]{1,60})\]")
TITAN = re.compile(
    r"global batch size (\d{1,9}), (?:gradient accumulation steps \d{1,9}, )?"
    r"sequence length (\d{1,9}), total steps (\d{1,12})(?: \(warmup"
    r" (\d{1,12})\))?"
)
WORDS = (  # a text without any of them states nothing
    *(
        " ..",
        "\t..",
        "fp8",
        "parallel_size",
        "micro_batch_size",
        "seq_length",
        "sequence_length",
        "num_layers",
        "hidden_size",
    ),
    *(
        "world size",
        "world_size",
        "WORLD_SIZE",
        "Starting with ",
        "MEMBER: ",
        "group ranks",
        "nproc",
        "nnodes",
        "_nodes",
        "devices:",
        "devices=",
    ),
    *(
        "Num_devices",
        "Total train batch size",
        "global_batch_size_to",
        "device mesh",
        "Num processes",
        "Trainer(",
        "training active",
        "training enabled",
        "max_target_length",
        "sequence length",
        "recompute",
        "activations_checkpoint",
        "_mixed",
    ),
)
GROUP_KEYS = {"tensor model": "mapping.tp", "pipeline model": "mapping.pp", "context": "mapping.cp"}
USING_NAMES = {
    "world": "world_size",
    "data-parallel": "data_parallel_size",
    "context-parallel": "context_parallel_size",
    "tensor-model-parallel": "tensor_model_parallel_size",
    "pipeline-model-parallel": "pipeline_model_parallel_size",
}
MESH_KEYS = {"tp": "mapping.tp", "pp": "mapping.pp", "cp": "mapping.cp"}


@dataclass(frozen=True)
class Stated:
    """A value of one of the plan's keys, and the log's own words for it."""

    value: str
    words: str


@dataclass
class Facts:
    """What one log states: `raw` by the log's own names, `keys` by the plan's; a name may have
    several values.
    """

    raw: dict[str, dict[str, str]] = field(default_factory=dict)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    sections: list[tuple[int, str]] = field(default_factory=list)

    def line(self, line: str) -> None:
        """Read a line that tells no training step."""
        line = CLOCK.sub("", line, count=1)
        if argument := ARGUMENT.match(line):
            self.add(argument["name"], argument["value"])
            return
        self._sentence(line)
        if (printed := line.strip()).startswith("{") and isinstance(tree := _json(printed), dict):
            self.configuration(tree)
        elif entry := YAML.match(line):
            self._entry(len(entry["indent"]), entry["name"], entry["value"])
        elif any(word in line for word in ("_", "-", "fp8")):
            for found in NAMED.finditer(line):
                name = (found["flag"] or found["name"]).replace("-", "_")
                if name in INLINE or name in LAUNCHER:
                    self.add(name, found["value"])
            if "nproc" in line and "nnodes" in line and "nnodes" not in self.raw:
                self.add("nnodes", UNKNOWN)

    def add(self, name: str, value: object) -> None:
        """Note a value under a name of the log's; names that state nothing about a plan are left
        out.
        """
        known, text = ALIASES.get(name, name), str(value).strip("'\"")
        if known in ENUMS:
            text = text.rpartition(".")[2]
        if known in NAMES and name in NAMES and len(text) <= 40:
            self.raw.setdefault(known, {}).setdefault(text.lower(), f"{name} {text}")

    def configuration(self, tree: Mapping[str, Any], parents: Sequence[str] = ()) -> None:
        """Read a configuration as nested or flat names (`model/num_layers`, `model.num_layers`)."""
        for key, value in tree.items():
            path = [*parents, *re.split(r"[./]", str(key))]
            within, name = path[:-1], path[-1]
            if isinstance(value, dict) and set(value) == {"value"}:  # as W&B keeps it
                value = value["value"]
            if isinstance(value, dict) and len(within) < DEEPEST:
                self.configuration(value, [*within, name])
            elif (value is None or isinstance(value, str | int | float)) and _is_of_the_run(
                name, within
            ):
                self.add(name, value)
                self._preset(str(value))

    def key(self, key: str, value: object, words: str) -> None:
        """Note a value of one of the plan's keys."""
        self.keys.setdefault(key, {}).setdefault(str(value), words)

    def merge(self, other: Facts) -> None:
        """Add what another log of the same run states."""
        for ours, theirs in ((self.raw, other.raw), (self.keys, other.keys)):
            for name, values in theirs.items():
                for value, words in values.items():
                    ours.setdefault(name, {}).setdefault(value, words)

    def _entry(self, indent: int, name: str, value: str | None) -> None:
        while self.sections and self.sections[-1][0] >= indent:
            self.sections.pop()
        if value is None:
            self.sections.append((indent, name))
        elif _is_of_the_run(name, [section for _, section in self.sections]):
            self.add(name, value)

    def _sentence(self, line: str) -> None:
        self._preset(line)
        if world := WORLD.search(line):
            self.add("world_size", next(filter(None, world.groups())))
        if FP8_ON.search(line):
            self.add("fp8", "active")
        if batch := HUGGING_FACE.search(line):
            self.key(
                "mapping.global_batch",
                batch[1].replace(",", ""),
                f"Total train batch size {batch[1]}",
            )
        if "Trainer(" in line or ALONE.fullmatch(
            line
        ):  # as Python prints it, in one line or several
            for name, count in TRAINER.findall(line):
                self.add(name, count)
        if "using world size" in line:
            for name, size in USING.findall(line):
                if name in USING_NAMES:
                    self.add(USING_NAMES[name], size)
        if groups := GROUPS.search(line):
            self.key(
                GROUP_KEYS[groups[1]],
                groups[2].count(",") + 1,
                f"All {groups[1]} parallel group ranks",
            )
            if last := LAST_RANK.search(line):
                self.add("world_size", int(last[1]) + 1)
        if mesh := MESH.search(line):
            self._mesh(
                re.findall(r"\w+", mesh[1]), [int(size) for size in re.findall(r"\d+", mesh[2])]
            )
        if titan := TITAN.search(line):
            names = ("mapping.global_batch", "seq_length", "train.max_steps", "train.warmup_steps")
            for key, size in zip(names, titan.groups(), strict=True):
                if size is not None:
                    self.key(key, size, f"Training starts ... {size}")

    def _preset(self, text: str) -> None:
        for name in PRESET.findall(text) if "_mixed" in text else ():
            self.raw.setdefault("precision", {}).setdefault(name, f"precision {name}")

    def _mesh(self, names: list[str], sizes: list[int]) -> None:
        """torchtitan: a mesh has no dimension of size 1, so tp, pp and cp that it lacks are 1."""
        world = 1
        for size in sizes:
            world *= size
        self.add("world_size", world)
        of = dict(zip(names, sizes, strict=False))
        for name, key in MESH_KEYS.items():
            self.key(key, of.get(name, 1), "device mesh")

    def stated(self) -> dict[str, dict[str, str]]:
        """Return the plan's keys that the log states, each with its values and their words."""
        found = {key: dict(values) for key, values in self.keys.items()}
        for key, stated in self._derived():
            found.setdefault(key, {}).setdefault(stated.value, stated.words)
        return found

    def fp8_is_on(self) -> str:
        """Return the log's words that switch FP8 on, also where it does not state the recipe; ""
        where none do.
        """
        on = [words for value, words in self.values("fp8") if value not in OFF]
        on += [words for value, words in self.values("precision") if PRESETS.get(value)]
        return on[0] if on and self.is_on("fp8") is not False else ""

    def _derived(self) -> Iterator[tuple[str, Stated]]:
        for name, key in INTEGERS.items():
            yield from ((key, each) for each in self._read(name, int))
        for name, key in NUMBERS.items():
            yield from ((key, each) for each in self._read(name, float))
        for rule in (_number_of_gpus, _shape, _layout, _precision, _recomputation):
            yield from rule(self)

    def _read(self, name: str, kind: Callable[[str], object]) -> Iterator[Stated]:
        """Yield the values of a name that are numbers; None and the like state nothing."""
        for value, words in self.raw.get(name, {}).items():
            try:
                yield Stated(f"{kind(value)}", words)
            except ValueError:
                continue

    def values(self, name: str) -> Iterable[tuple[str, str]]:
        """Return each value of a name, in lower case, with its words."""
        return self.raw.get(name, {}).items()

    def is_on(self, name: str) -> bool | None:
        """Return whether a name is switched on; None where the log does not say, or says both."""
        said = {value not in OFF for value, _ in self.values(name)}
        return said.pop() if len(said) == 1 else None

    def one(self, name: str) -> int | None:
        """Return the whole number under a name; None where there is none or several."""
        found = {each.value for each in self._read(name, int)}
        return int(found.pop()) if len(found) == 1 else None


def _json(text: str) -> Any:
    """Return a configuration that is printed as JSON; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_of_the_run(name: str, sections: Sequence[str]) -> bool:
    """An optimizer's section repeats fp8_recipe with its default, but holds the learning rate.

    A seed in the section of the data is not the run's.
    """
    if name == "seed" and "data" in sections:
        return False
    return not ELSEWHERE.intersection(sections) and ("optimizer" not in sections or name in NUMBERS)


def _number_of_gpus(facts: Facts) -> Iterator[tuple[str, Stated]]:
    for stated in facts._read("world_size", int):
        yield "num_gpus", stated
    if facts.raw.get("world_size"):
        return
    for per_node, nodes in (("nproc_per_node", "nnodes"), ("devices", "num_nodes")):
        each, count = facts.one(per_node), facts.one(nodes)
        if each and (count or (per_node == "nproc_per_node" and nodes not in facts.raw)):
            count = count or 1  # torchrun's default
            yield "num_gpus", Stated(f"{each * count}", f"{per_node} {each}, {nodes} {count}")
            return
    sizes = [facts.one(name) for name in ("data_parallel_size", *list(INTEGERS)[:3])]
    if all(sizes):
        product = 1
        for size in sizes:
            product *= size or 1
        yield (
            "num_gpus",
            Stated(f"{product}", f"data_parallel_size {sizes[0]} times the model-parallel sizes"),
        )


def _shape(facts: Facts) -> Iterator[tuple[str, Stated]]:
    """Megatron-LM prints num_query_groups=1 also where it is not used (group_query_attention
    False).
    """
    for name in ("num_experts", "num_moe_experts"):
        for stated in facts._read(name, int):
            if int(stated.value) > 1:
                raise InputError(
                    f"the log states {stated.words}: a mixture of experts, which no model of this"
                    " project is; import a dense model's run"
                )
    if facts.is_on("multi_latent_attention"):
        raise InputError(
            "the log states multi_latent_attention, which no model of this project has; import"
            " another model's run"
        )
    if facts.is_on("group_query_attention") is not False:
        for stated in facts._read("num_query_groups", int):
            yield "model.num_query_groups", stated
    for value, words in facts.values("swiglu"):
        if value not in OFF:
            yield "model.activation", Stated("swiglu", words)
    for name, tied_when in (
        ("untie_embeddings_and_output_weights", False),
        ("share_embeddings_and_output_weights", True),
    ):
        for value, words in facts.values(name):
            yield (
                "model.tied_embeddings",
                Stated(str((value not in OFF) == tied_when).lower(), words),
            )
    for stated in facts._read("vocab_size", int):
        yield "model.vocab_size", stated


def _layout(facts: Facts) -> Iterator[tuple[str, Stated]]:
    for value, words in facts.values("virtual_pipeline_model_parallel_size"):
        if value in OFF or value.isdigit():
            yield "mapping.vp", Stated("1" if value in OFF else value, words)
    for value, words in facts.values("fsdp"):
        yield "mapping.fsdp", Stated(str(value not in OFF).lower(), words)
    for name in ("enable_cuda_graph", "cuda_graph_impl"):
        for value, words in facts.values(name):
            yield "mapping.cuda_graphs", Stated(str(value not in OFF).lower(), words)
    if facts.is_on("cpu_offloading") is False:
        yield "mapping.offload_layers", Stated("0", "cpu_offloading False")
    elif facts.is_on("cpu_offloading"):
        for stated in facts._read("cpu_offloading_num_layers", int):
            yield "mapping.offload_layers", stated
    if facts.is_on("tp_comm_overlap") is False:
        yield "mapping.tp_overlap", Stated("false", "tp_comm_overlap False")


def _precision(facts: Facts) -> Iterator[tuple[str, Stated]]:
    """FP8's recipe has its default printed where FP8 is off, so it counts only where it is on."""
    if facts.is_on("fp16"):
        raise InputError(
            "the log states fp16, which no precision of this project is; import a run in BF16"
            " or FP8"
        )
    for value, words in facts.values("fp4"):
        if value not in OFF:
            raise InputError(
                f"the log states {words}, which no precision of this project is; import a run in"
                " BF16 or FP8"
            )
    for value, words in facts.values("precision"):
        if value in PRESETS:
            yield "precision", Stated(PRECISIONS[PRESETS[value]], words)
    is_on = facts.is_on("fp8")
    if is_on is False and not any(PRESETS.get(value) for value, _ in facts.values("precision")):
        yield "precision", Stated("bf16", next(words for _, words in facts.values("fp8")))
    if not is_on:
        return
    for value, words in facts.values("fp8_recipe"):
        if value in SCALINGS:
            yield "precision", Stated(PRECISIONS[SCALINGS[value]], words)
    for value, words in facts.values("fp8"):
        if value in ("hybrid", "e4m3"):
            yield "precision.fp8.format", Stated(value, words)
    yield from _fp8_details(facts)


def _fp8_details(facts: Facts) -> Iterator[tuple[str, Stated]]:
    for value, words in facts.values("fp8_param_gather"):
        yield "precision.fp8.param_gather", Stated(str(value not in OFF).lower(), words)
    kept = facts.is_on("first_last_layers_bf16")
    if kept is not None:
        for end, key in (("start", "first"), ("end", "last")):
            count = facts.one(f"num_layers_at_{end}_in_bf16")
            number = (
                (1 if count is None else count) if kept else 0
            )  # Megatron-Core's default is one at each end
            yield (
                f"precision.fp8.{key}_layers_bf16",
                Stated(f"{number}", f"first_last_layers_bf16 {kept}"),
            )
    if "delayed" in dict(facts.values("fp8_recipe")):
        for name, key in (("fp8_margin", "margin"), ("fp8_amax_history_len", "amax_history_len")):
            yield from ((f"precision.fp8.{key}", stated) for stated in facts._read(name, int))
        for value, words in facts.values("fp8_amax_compute_algo"):
            if value in ("max", "most_recent"):
                yield "precision.fp8.amax_compute_algo", Stated(value, words)


ALL_LAYERS = "all"  # of a stage; how many that is, the plan knows


def _recomputation(facts: Facts) -> Iterator[tuple[str, Stated]]:
    """Megatron-Core: `uniform` recomputes every layer, in chunks of recompute_num_layers; `block`
    that many of each stage.
    """
    methods = dict(facts.values("recompute_method"))
    for value, words in facts.values("recompute_granularity"):
        count = facts.one("recompute_num_layers")
        if value != "full":
            yield "mapping.recompute_layers", Stated("0", words)
        elif "uniform" in methods:
            yield "mapping.recompute_layers", Stated(ALL_LAYERS, f"{words}, {methods['uniform']}")
        elif "block" in methods and count is not None:
            yield (
                "mapping.recompute_layers",
                Stated(f"{count}", f"{words}, {methods['block']}, recompute_num_layers {count}"),
            )
