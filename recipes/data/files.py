"""A plan's data on disk: are the files there, whole, and enough for what the plan trains?

The launch asks before it queues a job, and the job asks again on its node before NeMo starts
(launch/preflight.py).  Nothing heavy is imported.  What the paths say by themselves is checked by
the rules (recipes/compose/rules.py), with the plan.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.indexed import Indexed, check_contents, open_indexed
from recipes.data.tokenizer_files import entries, is_on_the_hub
from recipes.errors import InputError
from recipes.plan import Data, Plan
from recipes.run_folder import read_json

SPLITS = ("train", "heldout")
TWICE = (
    "{prefix} is in data.train and in data.heldout: a held-out loss would be one of text trained"
    " on; name other files, or data.split=[949,50,1] in place of data.heldout"
)
SHARES = ("train", "held-out", "test")  # of data.split
PREPARE = "python -m recipes.training.data prepares it ahead"


@dataclass(frozen=True)
class Facts:
    """What is known of a plan's data without loading them.

    `checked`: how much was read, None where nothing could be; `reason` then says why.
    `epochs`: how often the training data are gone through, of several sets the one repeated most.
    """

    checked: str | None
    reason: str = ""
    train_tokens: int | None = None
    heldout_tokens: int | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class Part:
    """What one split reads of a data set: the tokens from `start` to `stop`, with its weight."""

    data: Indexed
    start: int
    stop: int
    weight: float | None

    @property
    def tokens(self) -> int:
        """Tokens in the part."""
        return self.stop - self.start

    def __str__(self) -> str:
        """Return its prefix, with its tokens where it is not the whole."""
        whole = self.tokens == self.data.tokens
        return self.data.prefix if whole else f"{self.data.prefix}[{self.start}:{self.stop}]"


def blend(items: Sequence[str]) -> list[tuple[float | None, str]]:
    """Return weight and prefix of each data set of `data.train` or `data.heldout`.

    Read as Megatron-Core reads them (datasets/utils.py, v0.12.3: get_blend_from_list), which takes
    a list for weighted by its length alone.  ValueError with a sentence where it is neither form.
    """
    numbers = [_number(item) for item in items]
    if not any(number is not None for number in numbers):
        return [(None, item.strip()) for item in items]
    weights, prefixes = numbers[::2], numbers[1::2]
    if len(items) % 2 or None in weights or any(number is not None for number in prefixes):
        raise ValueError(
            "mixes weights and prefixes; write prefixes alone, or a weight before each (write ./"
            " before a path that is a number)"
        )
    pairs = list(zip(weights, (item.strip() for item in items[1::2]), strict=True))
    bad = next((w for w, _ in pairs if w is None or not 0 < w < math.inf), None)
    if bad is not None:
        raise ValueError(f"has a weight of {bad}; weights are numbers above 0")
    return pairs


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def prepared_root(data: Data, vocab_size: int) -> Path:
    """Return the folder of prepared text: data.root/vocabN."""
    return Path(data.root or "") / f"vocab{vocab_size}"


def tokenizer_of_job(plan: Plan) -> str:
    """Return what the plan's job loads as tokenizer: for text the copy beside the prepared
    files.
    """
    if plan.data.kind == "text":
        return str(prepared_root(plan.data, plan.model.vocab_size) / "tokenizer")
    return str(plan.data.tokenizer)


def asked(data: Data) -> dict[str, Any]:
    """Return what decides which tokens a preparation makes, as provenance.json keeps it."""
    return {"sources": list(data.sources), "tokenizer": data.tokenizer}


def check_made_from(root: Path, data: Data) -> None:
    """Raise InputError where prepared text was made from other sources or another tokenizer."""
    record = root / "provenance.json"
    try:
        made = read_json(record)["asked"]
    except (ValueError, KeyError):
        raise InputError(
            f"{record} was changed or cut: nothing says what was prepared; remove {root} to prepare"
            " it again"
        ) from None
    except OSError as error:
        raise InputError(f"{record} cannot be read ({error.strerror})") from None
    if made != asked(data):
        raise InputError(
            f"{root} was prepared from {made}, the plan asks for {asked(data)}; choose another"
            " data.root"
        )


def check_data(plan: Plan, in_job: bool = False, contents: bool = True) -> Facts:
    """Return the facts of a plan's data; InputError where the job could not train on them.

    `in_job`: paths are those of this machine; else a container's are looked for behind its mounts,
    and where the launch cannot see a folder, the facts say so.  `contents`: whether tokens are
    compared with the vocabulary, beside the sizes of the files.
    """
    data, vocab_size = plan.data, plan.model.vocab_size
    if data.kind == "mock":
        return Facts("random tokens")
    away = None if in_job else _out_of_sight(plan)
    if away:
        return Facts(None, f"{away} is not on this machine; the job checks it before it trains")
    seen = data if in_job else _seen_from_here(plan)
    if data.kind == "text" and not (prepared_root(seen, vocab_size) / "provenance.json").exists():
        return _unprepared(seen, vocab_size)
    parts = _parts(seen, vocab_size)
    checked = check_contents(sets_of(parts), vocab_size) if contents else "sizes of the files"
    if data.kind == "indexed":
        check_tokenizer(data.tokenizer, seen.tokenizer, vocab_size)
    return Facts(checked, "", *_enough(plan, parts))


def what_is_read(plan: Plan) -> tuple[object, ...]:
    """Return what the facts of a plan's data depend on: plans that agree in it need one check."""
    train, settings = plan.train, plan.settings
    schedule = (train.max_steps, train.eval_interval, train.eval_batches, settings.evaluation)
    place = (plan.executor.kind, plan.cluster.container_runtime, plan.cluster.mounts)
    batch = (plan.model.vocab_size, plan.seq_length, plan.mapping.global_batch)
    return (plan.data, batch, schedule, place)


def sets_of(parts: dict[str, list[Part]]) -> list[Indexed]:
    """Return the data sets of all splits, each once."""
    return list({part.data.prefix: part.data for part in itertools.chain(*parts.values())}.values())


def _unprepared(data: Data, vocab_size: int) -> Facts:
    for source in data.sources:
        if not os.path.exists(source):
            raise InputError(f"data.sources: no such file or folder {source}; name what there is")
    check_tokenizer(data.tokenizer, data.tokenizer, vocab_size)
    return Facts(None, f"not prepared in {data.root} yet: the job would; {PREPARE}")


def check_tokenizer(named: str | None, path: str | None, vocab_size: int) -> None:
    """Raise InputError where `path`, which the plan calls `named`, has no tokenizer of this
    vocabulary.
    """
    found = entries(path) if path else None
    if found and found > vocab_size:
        raise InputError(
            f"data.tokenizer={named} has {found} entries, the model's vocabulary {vocab_size}"
            " (model.vocab_size); choose another model or tokenizer"
        )


# What the fields say by themselves

NEEDED = {"text": ("root",), "indexed": ("train", "tokenizer"), "mock": ()}
OF_BOTH = ("tokenizer", "reset_attention_mask", "eod_mask_loss")
READ = {
    "text": ("sources", "root", "demo_text", *OF_BOTH),
    "indexed": ("train", "heldout", "split", *OF_BOTH),
    "mock": (),
}
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def wrong_data(data: Data) -> str | None:
    """Return what is wrong with the fields of a plan's data and what to do instead, or None."""
    missing = next((name for name in NEEDED[data.kind] if not getattr(data, name)), None)
    if missing:
        return f"data.{missing} is empty, data={data.kind} needs it; set it"
    return (
        _without_effect(data)
        or _nothing_held_out(data)
        or _no_path(data)
        or _malformed(data)
        or _one_set_twice(data)
    )


def _without_effect(data: Data) -> str | None:
    """A field that a kind of data does not read would be ignored."""
    known = dict.fromkeys(name for names in READ.values() for name in names)
    given = next(
        (name for name in known if getattr(data, name) and name not in READ[data.kind]), None
    )
    if given is None:
        return None
    takes = " or ".join(f"data={kind}" for kind, names in READ.items() if given in names)
    return f"data.{given} has no effect with data={data.kind}; leave it out, or use {takes}"


def _nothing_held_out(data: Data) -> str | None:
    if data.kind != "indexed":
        return None
    if data.split and data.heldout:
        return "data.split and data.heldout both say what is held out; set one of them"
    if not data.split and not data.heldout:
        return (
            "data.heldout is empty; set it, or data.split=[949,50,1] to hold out a share of"
            " data.train"
        )
    return None


def _no_path(data: Data) -> str | None:
    given = {
        name: getattr(data, name) for name in ("root", "sources", "train", "heldout", "tokenizer")
    }
    texts = [(name, text) for name, value in given.items() for text in _texts(value)]
    name, text = next(((n, t) for n, t in texts if ADDRESS.match(t)), ("", ""))
    return (
        f"data.{name} names {text}, no path of a file system; copy it to a disk that the nodes"
        " share"
        if text
        else None
    )


def _texts(value: object) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ()


def _malformed(data: Data) -> str | None:
    for name in ("train", "heldout"):
        try:
            blend(getattr(data, name))
        except ValueError as error:
            return f"data.{name} {error}"
    return None


def _one_set_twice(data: Data) -> str | None:
    train = {os.path.normpath(prefix) for _, prefix in blend(data.train)}
    twice = next((p for _, p in blend(data.heldout) if os.path.normpath(p) in train), None)
    return TWICE.format(prefix=twice) if twice else None


# Where the files lie


def read_by_job(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the paths that the plan's job reads, each with its key; prepared text needs no more
    than its root.
    """
    data = plan.data
    root = prepared_root(data, plan.model.vocab_size)
    if data.kind == "text" and os.path.exists(on_this_machine(f"{root}/provenance.json", plan)):
        yield "data.root", str(data.root)
    else:
        yield from paths(data)


def paths(data: Data) -> Iterator[tuple[str, str]]:
    """Yield every path that the data's fields name, each with its key."""
    if data.kind == "indexed":
        for key, items in (("train", data.train), ("heldout", data.heldout)):
            yield from ((f"data.{key}", prefix) for _, prefix in blend(items))
    if data.kind == "text":
        yield from [("data.root", data.root)] if data.root else []
        yield from (("data.sources", source) for source in data.sources)
    if data.kind != "mock" and data.tokenizer and not is_on_the_hub(data.tokenizer):
        yield "data.tokenizer", data.tokenizer


def _out_of_sight(plan: Plan) -> str | None:
    """Return a folder of the data that this machine does not have; None where the job runs here."""
    if plan.executor.kind == "local":
        return None
    for key, path in paths(plan.data):
        folder = Path(on_this_machine(path, plan)).parent
        if key != "data.root" and not os.path.exists(folder):
            return str(folder)
    return None


def on_this_machine(path: str, plan: Plan) -> str:
    """Return where a path of the container lies outside it, by cluster.mounts."""
    if plan.executor.kind != "slurm" or plan.cluster.container_runtime != "pyxis":
        return path
    mounts = [(mount.split(":") * 2)[:2] for mount in plan.cluster.mounts]
    for host, target in sorted(mounts, key=lambda mount: -len(mount[1])):
        if os.path.isabs(path) and Path(path).is_relative_to(target):
            return str(Path(host) / Path(path).relative_to(target))
    return path


def _seen_from_here(plan: Plan) -> Data:
    data = plan.data

    def to(path: str) -> str:
        return on_this_machine(path, plan)

    moved = {
        "root": data.root and to(data.root),
        "sources": tuple(map(to, data.sources)),
        "train": tuple(map(to, data.train)),
        "heldout": tuple(map(to, data.heldout)),
        "tokenizer": data.tokenizer and to(data.tokenizer),
    }
    return data.model_copy(update=moved)


# What each split reads


def parts_of(data: Data, vocab_size: int) -> dict[str, list[Part]]:
    """Return what training and held-out evaluation read of which data sets.

    InputError where files are missing or cut, or where a split would be empty: Megatron-Core 0.12
    (datasets/gpt_dataset.py: _get_num_epochs) adds up empty epochs without end.
    """
    given: dict[str, list[tuple[float | None, str]]]
    if data.kind == "text":
        root = prepared_root(data, vocab_size)
        given = {split: [(None, str(root / split))] for split in SPLITS}
    else:
        given = {"train": blend(data.train), "heldout": blend(data.heldout)}
    if data.split:
        return _by_share(given["train"], data.split)
    found = {
        split: [
            Part(each := open_indexed(prefix), 0, each.tokens, weight) for weight, prefix in one
        ]
        for split, one in given.items()
    }
    _no_file_twice(found)
    return found


def _parts(data: Data, vocab_size: int) -> dict[str, list[Part]]:
    if data.kind == "text":
        check_made_from(prepared_root(data, vocab_size), data)
    return parts_of(data, vocab_size)


def _by_share(given: list[tuple[float | None, str]], split: str) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {name: [] for name in SPLITS}
    for weight, prefix in given:
        data = open_indexed(prefix)
        for name, (first, last) in zip(SHARES, bounds(split, data.sequences), strict=True):
            part = Part(data, data.start_of(first), data.start_of(last), weight)
            if _shares(split)[SHARES.index(name)] and not part.tokens:
                raise InputError(
                    f"{prefix} has {data.sequences:,} documents: data.split={split} leaves none "
                    f"for its {name} share; give that share more, or 0 where it may be (test)"
                )
            if name != "test":
                found[{"train": "train", "held-out": "heldout"}[name]].append(part)
    return found


def _shares(split: str) -> list[float]:
    return [float(share) for share in split.split(",")]


def bounds(split: str, sequences: int) -> list[tuple[int, int]]:
    """Return first and last sequence (excluded) of each share, as Megatron-Core 0.12 rounds them.

    datasets/blended_megatron_dataset_config.py (convert_split_vector_to_split_matrix) and
    datasets/blended_megatron_dataset_builder.py (_build_megatron_dataset_splits).
    """
    shares = _shares(split)
    cuts = [0.0, *itertools.accumulate(share / sum(shares) for share in shares)]
    at = [round(cut * float(sequences)) for cut in cuts]
    return list(itertools.pairwise(at))


def _no_file_twice(found: dict[str, list[Part]]) -> None:
    train = {os.path.realpath(f"{part.data.prefix}.bin") for part in found["train"]}
    for part in found["heldout"]:
        if os.path.realpath(f"{part.data.prefix}.bin") in train:
            raise InputError(TWICE.format(prefix=part.data.prefix))


# Is it enough?


def _enough(plan: Plan, parts: dict[str, list[Part]]) -> tuple[int, int, float]:
    """Return tokens to train on and held out, and epochs.

    InputError where sets without weights run out: Megatron-Core 0.12 repeats one set, or weighted
    ones, and ends a blend without weights after one epoch (blended_megatron_dataset_builder.py).
    """
    train, heldout = (sum(part.tokens for part in parts[split]) for split in SPLITS)
    batch, steps = plan.mapping.global_batch, plan.train.max_steps
    evaluations = steps // min(plan.train.eval_interval, steps) + 1
    held = evaluations * plan.train.eval_batches * batch if plan.settings.evaluation else 0
    for key, samples, split in (("train", steps * batch, "train"), ("heldout", held, "heldout")):
        have = sum(max(0, part.tokens - 1) // plan.seq_length for part in parts[split])
        if len(parts[split]) > 1 and parts[split][0].weight is None and have < samples:
            key = "train" if plan.data.split else key
            raise InputError(
                f"data.{key} has {have:,} sequences of {plan.seq_length} tokens for {split}, the "
                f"run needs {samples:,}, and without weights Megatron-Core does not repeat a "
                f"blend; give weights: data.{key}=[{_weighted(plan.data, key, parts[split])}]"
            )
    needed = steps * batch * plan.seq_length
    weights = sum(part.weight or part.tokens for part in parts["train"])
    epochs = max(needed * (p.weight or p.tokens) / weights / p.tokens for p in parts["train"])
    return train, heldout, epochs


def _weighted(data: Data, key: str, parts: Sequence[Part]) -> str:
    """Return the blend with each set's share of the tokens as its weight, as an override has it."""
    total = sum(part.tokens for part in parts)
    prefixes = [prefix for _, prefix in blend(getattr(data, key))]
    named = zip(parts, prefixes, strict=True)
    return ",".join(f"{part.tokens / total:.4g},{prefix}" for part, prefix in named)
