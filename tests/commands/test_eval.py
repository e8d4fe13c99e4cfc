"""`defeat eval`, `check` and `convert` through the real command, and the student in plain torchvision."""

import json
import shutil

import pytest
import torch
import yaml
from oracles.torchvision_alone import evaluate_alone, tiny_model, tiny_settings
from runs import setting
from tiny import OWN

from defeat_cli.config.schema import merged
from defeat_cli.config.yaml import parse_assignments
from defeat_cli.engine.evaluation import FIGURES


@pytest.fixture(scope="module")
def run(tmp_path_factory, defeat, tiny):
    """A student of some skill: enough steps on few images that it finds some of them again."""
    folder = tmp_path_factory.mktemp("runs") / "skilled"
    defeat(
        "train", "-r", tiny, "-o", folder, "--set", "schedule.epochs=60", "--set", "run.evaluate_every=60",
        "--set", "optimizer.name=adamw", "--set", "optimizer.lr=5e-3", "--set", "schedule.decay=cosine",
        *tiny_settings("faster_rcnn"), "--set", "data.val_annotations=train.json", "-q",
    )  # fmt: skip
    return folder


def assert_same(found, expected):
    """Detections of `eval` and of the reference evaluation, in COCO results format."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def evaluated(defeat, folder, checkpoint, *options):
    """Figures, detections and output of `eval` on the training images."""
    figures, detections = folder / "figures.json", folder / "detections.json"
    output = defeat(
        "eval", checkpoint, "--split", "train", "--json", figures, "--save-detections", detections, *options
    )
    return json.loads(figures.read_text()), json.loads(detections.read_text()), output


@pytest.fixture(scope="module")
def usual(run, defeat, tmp_path_factory):
    """What `eval` finds by the checkpoint's own settings."""
    return evaluated(defeat, tmp_path_factory.mktemp("usual"), run / "best.pt")


def test_eval_equals_the_reference_evaluation_of_plain_torchvision(run, defeat, shapes, tmp_path):
    results, stats = evaluate_alone(tiny_model("faster_rcnn"), run / "student.pth", shapes, "train")
    assert stats[0] > 0.05  # there is something to compare
    for checkpoint in ("best.pt", "student.pth"):
        figures, detections, output = evaluated(defeat, tmp_path, run / checkpoint)
        assert [figures[name] for name in FIGURES] == pytest.approx(list(stats), abs=1e-4)
        assert_same(detections, results)
        assert "in force" not in output
        assert "assumed" not in output


@pytest.fixture(scope="module")
def onnx_file(run, defeat, tmp_path_factory):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("exported") / "skilled.onnx"
    defeat("export", run / "best.pt", path)
    return path


def test_an_exported_file_has_the_figures_of_its_checkpoint(usual, onnx_file, defeat, shapes, tmp_path):
    figures, detections, _ = evaluated(defeat, tmp_path, onnx_file, "-d", shapes)
    assert [figures[name] for name in FIGURES] == pytest.approx([usual[0][name] for name in FIGURES], abs=1e-3)
    assert figures["per_class"] == pytest.approx(usual[0]["per_class"], abs=1e-3)
    assert len(detections) == len(usual[1])


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_fewer_bits_tell_size_and_ap_before_and_after(run, onnx_file, defeat, shapes, tmp_path, precision):
    """On the data that the checkpoint remembers, whose validation images are those it was trained on."""
    target = tmp_path / "small.onnx"
    output = defeat("export", run / "best.pt", target, f"--{precision}").splitlines()
    names = ("float ", "half ", "int8 ")
    rows = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in output if line.startswith(names)}
    assert list(rows) == ["float", precision]
    for path, (size, _, score, *_) in zip((onnx_file, target), rows.values(), strict=True):
        assert size == pytest.approx(path.stat().st_size / 2**20, abs=0.051)
        figures, *_ = evaluated(defeat, tmp_path, path, "-d", shapes)
        assert score == pytest.approx(100 * figures["AP"], abs=0.051)
        assert score > 5
    before, after = rows["float"][2], rows[precision][2]
    assert rows[precision][3] == pytest.approx(after - before, abs=0.11)
    assert target.read_bytes() != onnx_file.read_bytes()


SAID = {
    "sizes": (["data.short_side=[48]", "data.long_side=48"], {"min_size": 48, "max_size": 48}),
    "score threshold": (["student.score_threshold=0.3"], {"box_score_thresh": 0.3}),
    "suppression": (
        ["student.detections_per_image=1", "student.nms_threshold=0.1"],
        {"box_detections_per_img": 1, "box_nms_thresh": 0.1},
    ),
    "normalisation": (
        ["student.conventions.image_mean=[0.2, 0.3, 0.4]", "student.conventions.image_std=[0.5, 0.5, 0.5]"],
        {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.5, 0.5]},
    ),
    "proposals": (["student.proposals=5"], {"rpn_pre_nms_top_n_test": 5, "rpn_post_nms_top_n_test": 5}),
}


@pytest.mark.parametrize("kind", SAID)
def test_settings_that_are_said_are_in_force(run, usual, defeat, shapes, tmp_path, kind):
    """Against plain torchvision with those settings, on the command line or in a recipe that is named there."""
    assignments, settings = SAID[kind]
    results, stats = evaluate_alone(tiny_model("faster_rcnn", **settings), run / "student.pth", shapes, "train")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(merged({}, parse_assignments(assignments))))
    given = [part for assignment in assignments for part in ("--set", assignment)]
    in_recipe = ["-r", tmp_path / "other.yaml"]
    for checkpoint, options, where in (
        ("best.pt", given, "the command line"), ("student.pth", given, "the command line"),
        ("best.pt", in_recipe, "other.yaml"),
    ):  # fmt: skip
        figures, detections, output = evaluated(defeat, tmp_path, run / checkpoint, *options)
        assert [figures[name] for name in FIGURES] == pytest.approx(list(stats), abs=1e-4)
        assert_same(detections, results)
        (told,) = [line for line in output.splitlines() if line.startswith("in force")]
        for assignment in assignments:
            assert assignment.partition("=")[0] in told
        assert where in told
        assert figures != usual[0]


def test_a_state_dict_far_from_its_run_needs_no_recipe(run, usual, defeat, shapes, tmp_path):
    """It says what it is; where it does not, keys and shapes tell all but what is not seen in them."""
    expected, found, _ = usual
    assert expected["AP"] > 0.05  # there is something to compare
    shutil.copy(run / "student.pth", tmp_path / "says.pth")
    torch.save(dict(torch.load(run / "student.pth", weights_only=True)), tmp_path / "silent.pth")
    unseen = setting(
        student__anchor_sizes=OWN["faster_rcnn"]["anchor_sizes"], student__proposals=32, student__score_threshold=0.0,
        data__short_side=[64], data__long_side=64,
    )  # fmt: skip
    for name, options in (("says.pth", []), ("silent.pth", unseen)):
        figures, detections, _ = evaluated(defeat, tmp_path, tmp_path / name, "-d", shapes, *options)
        assert (figures, detections) == (expected, found)
    assert evaluated(defeat, tmp_path, tmp_path / "silent.pth", "-d", shapes)[0] != expected


def test_per_class_and_errors_are_shown(run, defeat, tmp_path):
    output = defeat(
        "eval", run / "best.pt", "--split", "train", "--per-class", "--errors", "--json", tmp_path / "f.json"
    )
    for word in ("circle", "ring", "background false positives", "localisation", "missed"):
        assert word in output
    errors = json.loads((tmp_path / "f.json").read_text())["errors"]
    assert set(errors["types"]) >= {"classification", "localisation", "both", "duplicate", "background", "missed"}


def test_category_ids_of_any_kind_go_back_at_evaluation(run, defeat, shapes, tmp_path):
    content = json.loads((shapes / "train.json").read_text())
    for category in content["categories"]:
        category["id"] *= 100
    for annotation in content["annotations"]:
        annotation["category_id"] *= 100
    (tmp_path / "gaps.json").write_text(json.dumps(content))
    for name, annotations in (("plain", shapes / "train.json"), ("gaps", tmp_path / "gaps.json")):
        defeat(
            "eval", run / "best.pt", "--set", f"data.val_annotations={annotations}", "--json", tmp_path / f"{name}.out",
            "--save-detections", tmp_path / f"{name}.det",
        )  # fmt: skip
    assert (tmp_path / "plain.out").read_text() == (tmp_path / "gaps.out").read_text()
    ids = {d["category_id"] for d in json.loads((tmp_path / "gaps.det").read_text())}
    assert ids <= {100, 200, 300, 400, 500, 600}
    assert ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], "nowhere.pt"),
        (["{run}/best.pt", "--split", "tset"], "no split 'tset'"),
        (["{run}/best.pt", "-d", "nowhere"], "nowhere"),
        (["{run}/results.json"], "results.json"),
        (["{run}/best.pt", "-d", "{other}", "--split", "train"], "share no class"),
    ],
)
def test_bad_input(run, defeat, shapes, tmp_path, arguments, message):
    content = json.loads((shapes / "val.json").read_text())
    for category in content["categories"]:
        category["name"] = f"other {category['id']}"
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(shapes / "images")
    output = defeat("eval", *[a.format(run=run, other=tmp_path) for a in arguments], code=2)
    assert message in output
    assert "Traceback" not in output


def test_check_tells_what_a_run_would_do(defeat, tiny, teacher):
    output = defeat("check", "-r", tiny, "-t", teacher)
    for part in ("parameters", "16x8x3x3", "neck_fg", "head_bg", "GiB", "Shared classes: 6", "teacher: AP"):
        assert part in output
    assert "neck_fg" not in defeat("check", "-r", tiny, "-t", teacher, "--variant", "head")


def test_check_warns_of_anchors_that_fit_no_box(defeat, tiny):
    assert "fit the boxes badly" not in defeat("check", "-r", tiny)
    huge = "student.anchor_sizes=[[200], [300], [400], [500], [600]]"
    assert "fit the boxes badly" in defeat("check", "-r", tiny, "--set", huge)


def test_convert_writes_a_state_dict_and_the_recipe_that_reads_it(run, defeat, shapes, tmp_path):
    output = defeat("convert", run / "best.pt", tmp_path / "out.pth")
    assert "out.yaml" in output
    converted, student = (torch.load(p, weights_only=True) for p in (tmp_path / "out.pth", run / "student.pth"))
    assert converted.keys() == student.keys()
    assert all(torch.equal(converted[key], student[key]) for key in student)
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["student"]["widths"] == [16, 16, 32, 32]
    with_recipe = ["-r", tmp_path / "out.yaml", "--set", "data.val_annotations=train.json"]
    for checkpoint, options, figures in ((run / "best.pt", [], "a"), (tmp_path / "out.pth", with_recipe, "b")):
        defeat("eval", checkpoint, "-d", shapes, *options, "--json", tmp_path / figures)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert "is there already" in defeat("convert", run / "best.pt", tmp_path / "out.pth", code=2)


def test_two_results_are_not_written_to_one_file(defeat, shapes, teacher, tmp_path):
    places = ["--json", tmp_path / "x.json", "--save-detections", tmp_path / "x.json"]
    assert "cannot hold both" in defeat("eval", teacher, "-d", shapes, *places, code=2)
    assert not (tmp_path / "x.json").exists()
