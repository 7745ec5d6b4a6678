"""The plan: what composes, what is refused, and that none of it needs the heavy half."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from recipes.compose.tree import CONF, compose_plan, sweep
from recipes.errors import InputError
from recipes.estimate.sizes import parameters
from recipes.plan import Plan

MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
PRECISIONS = sorted(p.stem for p in (CONF / "precision").glob("*.yaml"))

BAD_INPUTS = [
    (["modle=llama3_8b"], "did you mean model"),
    (["model=llama9"], "choose one of"),
    (["train.max_stps=3"], "did you mean train.max_steps"),
    (["train.max_steps=many"], "train.max_steps"),
    (["train.max_steps=0"], "greater than 0"),
    (["train.max_lr=nan"], "train.max_lr"),
    (["train.warmup_steps=100"], "warmup_steps"),
    (["seed=-1"], "seed"),
    (["+model.layers=3"], "no such field"),
    (["precision.fp8=7"], "precision.fp8"),
    (["mapping.global_batch=3"], "global_batch"),
    (["model.num_query_groups=3"], "num_query_groups"),
    (["mapping.cp=2", "num_gpus=2"], "no attention for context parallelism"),
    (["num_gpus=2", "gpu=h100", "mapping.pp=3"], "num_gpus=2"),
    (["run_name=../../etc"], "run_name"),
    (["seed=${nowhere}"], "nowhere"),
    (["a b"], "a b"),
    (["precision=fp8_current", "precision.fp8.last_layers_bf16=9"], "nothing would run in FP8"),
    (["precision=fp8_delayed", "precision.fp8.first_layers_bf16=1"], "delayed"),
    (["precision=mxfp8", "gpu=h100"], "10.0 to 10.3"),
    (["precision=fp8_subchannel", "gpu=h100"], "stack=nemo_25_07"),
    (
        ["precision=fp8_subchannel", "gpu=b200", "stack=nemo_25_07"],
        "needs compute capability 9.0 and not 10.0",
    ),
    (["model=llama3_8b", "precision=mxfp8"], "this machine has"),
]


@pytest.mark.parametrize(
    ("overrides", "hint"), BAD_INPUTS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_input_is_one_clear_line(overrides: list[str], hint: str) -> None:
    with pytest.raises(InputError) as caught:
        compose_plan(overrides)
    line = str(caught.value)
    assert hint in line
    assert "\n" not in line


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_composes_on_the_cpu(precision: str) -> None:
    plan = compose_plan([f"precision={precision}"])
    assert plan.precision.name == precision
    assert (plan.precision.fp8 is None) == (precision == "bf16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_every_precision_composes_on_the_emulated_stack_and_fp8_is_labelled(
    precision: str, gpu: str
) -> None:
    plan = compose_plan(
        [f"precision={precision}", f"gpu={gpu}", "stack=emulated", "executor=local"]
    )
    assert not plan.on_cpu and plan.emulated == (precision != "bf16")
    assert plan.precision.fp8 is None or not plan.precision.fp8.param_gather


def test_who_computes_fp8_is_the_stacks_to_say_and_the_cpus_always_this_project() -> None:
    assert {
        precision: compose_plan([f"precision={precision}"]).emulated
        for precision in ("bf16", "mxfp8")
    } == {"bf16": True, "mxfp8": True}
    hardware = compose_plan(
        ["gpu=h200", "stack=nemo_25_04_te_2_11", "executor=local", "precision=fp8_current"]
    )
    assert not hardware.emulated and not hardware.stack.emulates_fp8
    old = hardware.model_dump()
    del old["stack"]["emulates_fp8"]
    assert Plan.model_validate(old) == hardware  # as run folders had it before there was a choice


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_on_a_gpu(model: str) -> None:
    stack = (
        "nemo_25_07" if model == "qwen3_8b" else "nemo_25_04"
    )  # the first whose NeMo has the recipe
    larger = (
        ["num_gpus=8", "mapping.global_batch=32"] if model == "gemma2_9b" else []
    )  # one GPU does not hold it
    assert (
        compose_plan(
            [
                f"model={model}",
                f"stack={stack}",
                "gpu=b200",
                "precision=mxfp8",
                "experiment=throughput",
                *larger,
            ]
        ).model.name
        == model
    )


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("llama3_8b", 8.03),
        ("llama3_70b", 70.55),
        ("llama31_405b", 405.85),
        ("nemotron4_15b", 15.6),
        ("nemotron4_340b", 341.0),
    ],
)
def test_parameter_counts_match_the_published_ones(model: str, billions: float) -> None:
    assert parameters(
        compose_plan([f"model={model}", "gpu=b200", "experiment=throughput"]).model
    ) / 1e9 == pytest.approx(billions, rel=0.005)


# model.num_parameters() of the Hugging Face checkpoints that bear the model's name.
EXACT = {
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "qwen25_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_241_732_096,
    "gemma2_9b": 9_241_705_984,
    "llama2_7b": 6_738_415_616,
}


@pytest.mark.parametrize("model", EXACT)
def test_parameters_are_counted_to_the_last(model: str) -> None:
    stack = "nemo_25_07" if model == "qwen3_8b" else "nemo_25_04"
    plan = compose_plan(
        [
            f"model={model}",
            f"stack={stack}",
            "gpu=b200",
            "num_gpus=8",
            "mapping.global_batch=32",
            "experiment=throughput",
        ]
    )
    assert parameters(plan.model) == EXACT[model]


def test_the_plan_is_immutable() -> None:
    with pytest.raises(ValidationError):
        compose_plan().seed = 2


@pytest.mark.parametrize("experiment", ["demo", "convergence", "throughput"])
def test_a_short_run_of_an_experiment_has_a_short_warmup(experiment: str) -> None:
    """Unless the command line names one: that is refused where it is too long."""
    cell = [
        f"experiment={experiment}",
        "train.max_steps=10",
        *(["gpu=h100"] if experiment != "demo" else []),
    ]
    assert compose_plan(cell).train.warmup_steps == 1
    with pytest.raises(InputError, match=r"train\.warmup_steps=10 must be less"):
        compose_plan([*cell, "train.warmup_steps=10"])


@pytest.mark.parametrize(
    ("max_steps", "interval", "expected"),
    [
        (3, 10, [1, 2, 3]),
        (50, 10, range(5, 51, 5)),
        (57, 20, [*range(5, 56, 5), 57]),
        (400, 20, range(20, 401, 20)),
        (12, 1, range(1, 13)),
    ],
)
def test_a_run_prints_ten_lines_or_more(
    max_steps: int, interval: int, expected: Sequence[int]
) -> None:
    train = compose_plan(
        [f"train.max_steps={max_steps}", "train.warmup_steps=1", f"train.log_interval={interval}"]
    ).train
    assert [step for step in range(1, max_steps + 1) if train.is_printed(step)] == list(expected)


def test_sweep_is_the_product_of_its_axes() -> None:
    assert sweep(["precision=bf16,mxfp8", "seed=1,2"]) == [
        [f"precision={p}", f"seed={s}"] for p in ("bf16", "mxfp8") for s in (1, 2)
    ]


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from recipes.compose.tree import compose_plan;"
        " compose_plan(['precision=mxfp8']);print(sorted({m.split('.')[0] for m in sys.modules} &"
        " {'torch', 'nemo', 'megatron', 'transformer_engine', 'lightning'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_sites_own_file_sets_what_differs_there(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "local/site.yaml").write_text(
        "# @package cluster\naccount: ours\nmounts: [/data:/data]\n"
    )
    plan = compose_plan(["model=llama3_8b", "gpu=h100", "precision=fp8_current"], conf)
    assert (plan.cluster.account, plan.cluster.mounts, plan.cluster.mpi) == (
        "ours",
        ("/data:/data",),
        "pmix",
    )


def test_keys_of_the_users_own_are_set_in_every_form() -> None:
    """As a mapping, within a mapping around it, one by one, with and without Hydra's plus signs."""
    wanted = {"NCCL_SOCKET_IFNAME": "bond0", "OMP_NUM_THREADS": "4"}
    one_by_one = [f"cluster.environment.{name}={value}" for name, value in wanted.items()]
    inner = "{NCCL_SOCKET_IFNAME: bond0, OMP_NUM_THREADS: 4}"
    forms = [[f"{sign}cluster.environment={inner}"] for sign in ("", "+", "++")]
    forms += [[f"{sign}{one}" for one in one_by_one] for sign in ("", "+", "++")]
    forms += [
        [f"cluster={{environment: {inner}}}"],
        ["cluster.environment={OMP_NUM_THREADS: 4}", one_by_one[0]],
    ]
    assert [compose_plan(form).cluster.environment for form in forms] == [wanted] * len(forms)
    assert compose_plan(["cluster.token_files={HF_TOKEN: /home/me/.hf}"]).cluster.token_files == {
        "HF_TOKEN": "/home/me/.hf"
    }
    assert compose_plan(["stack.versions={torch: '2.6'}"]).stack.versions["torch"] == "2.6"
    assert [one for (one,) in sweep(["cluster.environment.NCCL_ALGO=Ring,Tree"])] == [
        f"cluster.environment.NCCL_ALGO={a}" for a in ("Ring", "Tree")
    ]


WRONG_KEYS = [
    ("cluster.enviroment={A: b}", "did you mean environment"),
    ("cluster={partion: batch}", "did you mean partition"),
    ("train={max_stps: 3}", "did you mean max_steps"),
    ("trian={max_steps: 3}", "did you mean train"),
    ("cluster.environment=[A]", "write cluster.environment.NAME=value"),
    ("cluster.environment={A: {B: c}}", "cluster.environment.A"),
    ("cluster.environment={1A: b}", "cluster.environment.1A"),
    ("cluster.environment={A: true}", "put it in quotes"),
    ("cluster.token_files={HF_TOKEN: [a]}", "cluster.token_files.HF_TOKEN"),
    ("local=elsewhere", "conf/local/elsewhere.yaml is not there"),
]


@pytest.mark.parametrize(("override", "words"), WRONG_KEYS)
def test_a_wrong_key_within_a_mapping_is_named(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        compose_plan([override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


HEADER = "# @package cluster\n"
SITES = [
    ("account: ours\n", "first line `# @package cluster`"),
    (f"# our site\n{HEADER}account: ours\n", "first line `# @package cluster`"),
    (f"\ufeff{HEADER}account: ours\n", "first line `# @package cluster`"),
    ("# @package clustr\naccount: ours\n", "`# @package clustr`, which is no part of the plan"),
    (
        f"{HEADER}acount: ours\n",
        "cluster.acount: no such field in the plan (did you mean account?)",
    ),
    (f"{HEADER}environmnt: {{A: b}}\n", "did you mean environment?"),
    ("# @package _global_\ncluser: {account: ours}\n", "did you mean cluster?"),
    (
        f"{HEADER}mounts: /data:/data\n",
        "cluster.mounts: Input should be a list (given: '/data:/data')",
    ),
    (f"{HEADER}exclusive: maybe\n", "cluster.exclusive"),
    (
        f"{HEADER}environment: {{A: true}}\n",
        "cluster.environment.A: Input should be a valid string (given: True)",
    ),
    (f"{HEADER}account: ${{oc.env:NOT_THERE_AT_ALL}}\n", "NOT_THERE_AT_ALL"),
    (f"{HEADER}account: [ours\n", "no valid YAML: line 3"),
    (f"{HEADER}account: a\naccount: b\n", "no valid YAML: line 3, found duplicate key account"),
    (f"{HEADER}\taccount: ours\n", "no valid YAML: line 2"),
    (f"{HEADER}- account\n", "holds no keys"),
    (f"{HEADER}7\n", "holds no keys"),
    (b"\x00\x01\xff", "no text in UTF-8"),
    (b"\x00\x01", "no valid YAML"),
]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of conf/ that a test may write to."""
    return Path(shutil.copytree(CONF, tmp_path_factory.mktemp("site") / "conf"))


@pytest.fixture
def site(conf: Path) -> Iterator[Path]:
    """The place of the site's own file, empty before and after."""
    path = conf / "local/site.yaml"
    yield path
    for left in path.parent.glob("site.*"):
        left.rmdir() if left.is_dir() else left.unlink()


@pytest.mark.parametrize(("content", "words"), SITES, ids=lambda v: repr(v)[:40])
def test_a_site_file_that_is_wrong_is_named_with_what_is_wrong(
    content: str | bytes, words: str, site: Path
) -> None:
    site.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        compose_plan([], site.parents[1])
    line = str(caught.value)
    assert line.startswith("conf/local/site.yaml") and words in line and "\n" not in line


def test_a_site_file_that_hydra_would_pass_over_is_named(site: Path) -> None:
    conf = site.parents[1]
    makers = (site.mkdir, lambda: site.symlink_to("/nowhere"), site.with_suffix(".yml").touch)
    for make, words in zip(
        makers, ("is a directory", "a link to none", "rename it to site.yaml"), strict=True
    ):
        make()
        with pytest.raises(InputError, match=words):
            compose_plan([], conf)
        for left in site.parent.glob("site.*"):
            left.rmdir() if left.is_dir() else left.unlink()


@pytest.mark.parametrize(
    "content", ["", "# nothing yet\n", HEADER, "# @package _global_\ncluster: {account: null}\n"]
)
def test_a_site_file_without_settings_changes_nothing(content: str, site: Path) -> None:
    site.write_text(content)
    assert compose_plan([], site.parents[1]) == compose_plan()


def test_an_error_in_a_file_of_the_users_own_names_that_file(conf: Path) -> None:
    (conf / "cluster/ours.yaml").write_text("name: ours\npartion: batch\n")
    (conf / "model/ours.yaml").write_text(
        (CONF / "model/llama3_tiny.yaml").read_text().replace("num_layers: 4", "num_layers: four")
    )
    for group, words in (
        ("cluster", "cluster.partion: no such field"),
        ("model", "model.num_layers"),
    ):
        with pytest.raises(InputError, match=rf"^conf/{group}/ours.yaml: {words}"):
            compose_plan([f"{group}=ours"], conf)
        (conf / group / "ours.yaml").unlink()


def test_a_model_a_precision_and_a_gpu_are_added_by_files_alone(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for group, name, new in (
        ("model", "llama3_tiny", "llama3_mini"),
        ("precision", "fp8_current", "fp8_mine"),
        ("gpu", "b200", "b300"),
    ):
        text = (conf / group / f"{name}.yaml").read_text().replace(f"name: {name}", f"name: {new}")
        (conf / group / f"{new}.yaml").write_text(text)
    plan = compose_plan(["model=llama3_mini", "precision=fp8_mine", "gpu=b300"], conf)
    assert plan.run_name == "llama3_mini.fp8_mine.b300.seed1234"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["precision=bf16", "precision.fp8.param_gather=false"],
            "precision.fp8.param_gather=false: no such key",
        ),
        (["gpu=h100", "model=llama3_8b", "num_gpu=8"], "did you mean num_gpus"),
        (
            ["data=indexed", "data.train=[/a]", "data.heldouts=[/b]"],
            r"data.heldouts=\[/b\].*did you mean data.heldout\?",
        ),
        (
            ["data=indexed", "data.train=[/a]", "data.foo=3"],
            r"data.foo=3: no such key with these options; check its spelling$",
        ),
        (
            ["data=indexed", "data.train=[/a]", "+data.tokenizr=t"],
            r"data.tokenizr: no such field.*did you mean tokenizer",
        ),
        (
            ["data=indexed", "data.train=[/a]", "train.max_step=3"],
            "train.max_step=3: .*did you mean train.max_steps",
        ),
    ],
)
def test_a_key_that_is_not_there_is_named_and_not_the_option_beside_it(
    overrides: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        compose_plan(overrides)


def test_a_stack_names_its_version_of_nemo() -> None:
    with pytest.raises(InputError, match=r"stack\.versions.*names no version of nemo"):
        compose_plan(["~stack.versions.nemo"])
