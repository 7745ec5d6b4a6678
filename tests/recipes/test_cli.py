"""A wrong command line is one line on standard error and exit code 2, whatever the command."""

import pytest

from analysis import import_logs, predict, throughput
from analysis.post import __main__ as post
from launch import __main__ as launch
from launch import cancel
from recipes.measure import gemm
from tests.faults.commands import Main


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (throughput.main, [], "the following arguments are required: RUN"),
        (predict.main, ["--search", "x"], "argument --search: invalid int value: 'x'"),
        (
            predict.main,
            ["--search", "--validate"],
            "argument --validate: not allowed with argument --search",
        ),
        (
            import_logs.main,
            ["log", "--out", "x", "--format", "y"],
            "argument --format: invalid choice: 'y'",
        ),
        (post.main, ["--out", "x"], "the following arguments are required: figure; see --help"),
        (launch.main, ["--nope\nnope"], "unrecognized arguments: --nope nope"),
        (cancel.main, [], "the following arguments are required: RUN"),
        (gemm.main, ["--rounds", "x"], "argument --rounds: invalid int value: 'x'"),
    ],
)
def test_one_line(
    main: Main, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert (
        error.startswith(f"error: {said}")
        and error.endswith("; see --help\n")
        and error.count("\n") == 1
    )
