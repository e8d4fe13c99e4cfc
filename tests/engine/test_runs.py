"""The run folder: what may be begun where, files written whole, metrics that a resumed run takes up."""

import pytest

from defeat_cli.config import schema as recipes
from defeat_cli.engine.runs import METRICS, RECIPE, RESULTS, STUDENT, RunFolder
from defeat_cli.errors import RunError
from defeat_cli.files import replacing, write_json


@pytest.fixture
def recipe():
    return recipes.load(None, {"run.name": "r"})


def begun(folder, recipe):
    run = RunFolder(folder / "run")
    run.open(recipe)
    return run


def test_a_new_run_keeps_its_recipe(tmp_path, recipe):
    run = begun(tmp_path, recipe)
    assert run.exists
    assert not run.finished
    assert recipes.load(str(run / RECIPE)) == recipe


def test_a_folder_with_a_run_is_refused_unless_told_what_to_do(tmp_path, recipe):
    run = begun(tmp_path, recipe)
    with pytest.raises(RunError, match=r"unfinished run; add --resume .* --overwrite"):
        run.check(recipe)
    (run / STUDENT).touch()
    write_json(run / RESULTS, {"student": {"AP": 0.5}})
    with pytest.raises(RunError, match="a finished run"):
        run.check(recipe)
    run.check(recipe, resume=True)
    assert run.results() == {"student": {"AP": 0.5}}
    run.open(recipe, overwrite=True)
    assert not run.finished


def test_resuming_with_another_recipe_names_each_difference(tmp_path, recipe):
    run = begun(tmp_path, recipe)
    other = recipe.model_copy(deep=True)
    other.optimizer.lr = 0.5
    with pytest.raises(RunError, match=r"optimizer\.lr: 0\.02 there, 0\.5 here"):
        run.check(other, resume=True)
    other = recipe.model_copy(deep=True)
    other.data.workers = 0
    run.check(other, resume=True)


def test_a_file_is_no_run_folder(tmp_path, recipe):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunFolder(tmp_path / "run").check(recipe)


def test_metrics_after_a_step_are_dropped_and_a_cut_line_is_passed_over(tmp_path, recipe):
    run = begun(tmp_path, recipe)
    for step in (10, 20, 30):
        run.log({"step": step})
    with (run / METRICS).open("a") as file:
        file.write('{"step": 4')
    assert [entry["step"] for entry in run.metrics()] == [10, 20, 30]
    run.forget_after(20)
    assert (run / METRICS).read_text() == '{"step": 10}\n{"step": 20}\n'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [1])

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert path.read_text() == "[\n  1\n]\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_given_more_epochs_is_not_finished(tmp_path, recipe):
    run = RunFolder(tmp_path)
    run.open(recipe)
    for name in ("student.pth", "best.pt"):
        (run / name).touch()
    (run / RESULTS).write_text('{"student": {"AP"')
    assert not run.finished  # half a file
    write_json(run / RESULTS, {"student": {"AP": 0.5}})
    assert run.finished
    recipe.schedule.epochs += 1
    run.open(recipe, resume=True)
    # The recipe in the folder is the longer one now: nothing else would tell a later --resume that there is work left.
    assert not run.finished
    assert (run / "best.pt").is_file()
