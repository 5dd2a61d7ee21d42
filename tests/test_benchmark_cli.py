"""The command line of the benchmarks: help, and the comparison of two saved runs."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import compare


def table(*rows):
    environment = {"commit": "abc", "device": "cpu", "versions": {"jax": "0.10.2"}}
    return {
        "environment": environment,
        "solve": {"table": {"title": "", "columns": ["solver", "ms", "calls"], "rows": rows}},
    }


@pytest.fixture
def files(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(table(["bfgs", 10.0, 5], ["lbfgs", 4.0, None], ["gone", 1.0, 1])))
    changed = table(["bfgs", 20.0, 5], ["lbfgs", 4.1, 3], ["come", 1.0, 1])
    changed["environment"] |= {"commit": "def", "versions": {"jax": "0.11.0"}}
    new.write_text(json.dumps(changed))
    return old, new


def test_figures_beyond_the_tolerance_are_shown_with_their_ratio(files, capsys):
    assert command.main(["compare", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 figures differ by more than 10 %" in out
    assert "abc -> def" in out
    assert "jax 0.10.2 -> 0.11.0" in out
    (line,) = [line for line in out.splitlines() if line.startswith("solve")]
    assert line.split() == ["solve", "bfgs", "ms", "10", "20", "2"]
    assert "2 only in old.json, 3 only in new.json" in out  # two of each row, and a number in place of None


def test_a_limit_turns_a_slowdown_into_a_failure_and_json_holds_every_figure(files, tmp_path):
    out = tmp_path / "out.json"
    assert command.main(["compare", *map(str, files), "--fail-above", "1.5", "--json", str(out)]) == 1
    assert command.main(["compare", *map(str, files), "--fail-above", "2.5"]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert {(f["row"], f["column"]): round(f["ratio"], 3) for f in figures} == {
        ("bfgs", "ms"): 2.0,
        ("bfgs", "calls"): 1.0,
        ("lbfgs", "ms"): 1.025,
    }


def test_runs_of_problems_are_matched_by_problem_and_solver(tmp_path, capsys):
    paths = []
    for name, evaluations in (("a.jsonl", 30), ("b.jsonl", 45)):
        lines = [{"environment": {}}, {"problem": "BEALE", "n": 2, "solver": "bfgs", "evaluations": evaluations}]
        paths.append(tmp_path / name)
        paths[-1].write_text("\n".join(map(json.dumps, lines)))
    assert command.main(["compare", *map(str, paths)]) == 0
    assert "BEALE 2  evaluations   30   45        1.5" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [("[1]", "no file of the benchmarks"), ("{", "neither JSON nor")])
def test_another_file_is_an_error_that_says_what_to_do(content, message, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        compare.main([str(path), str(path)])
    assert message in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in command.BENCHMARKS)
