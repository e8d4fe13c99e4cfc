"""A protocol, followed through the real command with small scripts in place of the processes that train."""

from __future__ import annotations

import json

import pytest
import small_worker
import yaml

from defeat_cli.ablation import processes, running
from defeat_cli.jobs import ablating, following


@pytest.fixture
def study(defeat, tiny, teacher, tmp_path, monkeypatch):
    """`defeat ablate` in one folder, without pictures; what workers did is in trained.txt of each study."""
    monkeypatch.setattr(ablating, "command", small_worker.command)
    monkeypatch.setattr(following, "draw_pictures", lambda *arguments: None)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    for draw in ("draw_study", "draw_sweeps"):
        monkeypatch.setattr(running, draw, lambda *arguments, **named: arguments[-1].touch())

    def run(*arguments, code=0):
        return defeat("ablate", *arguments, "-r", tiny, "-t", teacher, "-o", tmp_path / "s", code=code)

    return run


def trained(folder):
    path = folder / "trained.txt"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_settings_are_chosen_on_some_seeds_and_reported_on_others(study, tmp_path, defeat):
    folder = tmp_path / "s"
    (tmp_path / "p.yaml").write_text("variants: ['neck:alpha_bg=1,16', full]\ntuning_seeds: [5]\nseeds: [0, 1, 2]\n")
    said = study("--protocol", tmp_path / "p.yaml")
    assert sorted(trained(folder / "tuning")) == ["neck_alpha_bg=1-seed5@2", "neck_alpha_bg=16-seed5@2", "none-seed5@2"]
    names = trained(folder / "final")
    # The longest name has the best AP: 16 is chosen. The best variant, neck, takes 1.6 times as long: 2 · 1.6 = 3.2.
    assert names[:9] == [f"{variant}-seed{s}@2" for s in range(3) for variant in ("none", "neck", "full")]
    assert sorted(names[9:]) == [f"none-longer-seed{s}@3" for s in range(3)]
    variants = yaml.safe_load((folder / "final" / "study.yaml").read_text())["variants"]
    assert variants["neck"]["overrides"]["distillation.neck.alpha_bg"] == 16
    assert "chosen for neck: distillation.neck.alpha_bg=16" in said

    assert "Δ to none-longer" in said
    page = (folder / "report.md").read_text()
    assert "Trained on seeds 0, 1, 2, none of which had a say in any choice." in page
    assert "highest mean AP at the last epoch on seeds 5" in page
    assert "| none-longer | 3 | 0:01 | 17.0 ± 0.0 | - |" in page
    # All seeds differ by the length of the names alone: 10 and 17 letters.
    assert "| neck | 2 | 0:02 | 10.0 ± 0.0 | -7.0 [-7.0, -7.0]* |" in page
    assert (folder / "report.html").is_file()
    assert not (folder / "features").exists()
    assert json.loads((folder / "final" / "study.json").read_text())["teacher_AP"] == 0.5

    # Again: nothing is left to do, and what was chosen stays. Further seeds train all that is reported.
    study("--protocol", tmp_path / "p.yaml")
    assert trained(folder / "tuning") == trained(folder / "final") == []
    (tmp_path / "p.yaml").write_text("variants: ['neck:alpha_bg=1,16', full]\ntuning_seeds: [5]\nseeds: [3]\n")
    study("--protocol", tmp_path / "p.yaml")
    assert trained(folder / "tuning") == []
    assert sorted(trained(folder / "final")) == ["full-seed3@2", "neck-seed3@2", "none-longer-seed3@3", "none-seed3@2"]
    page = (folder / "report.md").read_bytes()
    (folder / "report.md").unlink()
    assert "report.html" in defeat("ablate", "--report-only", "-o", folder)
    assert (folder / "report.md").read_bytes() == page
    assert "Δ AP to full" in defeat("ablate", "--report-only", "-o", folder, "--against", "full")
    page = (folder / "report.md").read_text()
    for text in ("Δ AP to full", "its difference to full", "Δ to none-longer", "Δ AP to none "):  # of the tuning
        assert text in page
    refused = defeat("ablate", "--report-only", "-o", folder, "--against", "none-longer", code=2)
    assert "the page has these differences already" in refused


def test_a_protocol_of_plain_options_that_was_stopped_goes_on(study, tmp_path):
    folder = tmp_path / "s"
    arguments = ["neck:alpha_bg=1,16", "--tuning-seeds", "5", "--seeds", "0", "--equal-time", "off"]
    (folder / "tuning").mkdir(parents=True)
    for value in (1, 16):
        (folder / "tuning" / f"break-neck_alpha_bg={value}-seed5").touch()
    assert "no value of distillation.neck.alpha_bg of neck was trained to the end" in study(*arguments, code=2)
    assert not (folder / "final").exists()
    assert (folder / "features").is_dir()  # for the next time
    (folder / "tuning" / "break-neck_alpha_bg=1-seed5").unlink()
    trained(folder / "tuning")
    study(*arguments, code=1)  # 16 fails again, so 1 is chosen
    assert trained(folder / "tuning") == ["neck_alpha_bg=1-seed5@2", "neck_alpha_bg=16-seed5@2"]
    assert trained(folder / "final") == ["none-seed0@2", "neck-seed0@2"]
    assert "There is no none-longer" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neck:alpha_bg=1,4", "--tuning-seeds", "0,1", "--seeds", "1,2"], "tuning_seeds and seeds both have 1"),
        (["neck", "--tuning-seeds", "0"], "tuning_seeds: nothing is swept"),
        (["neck", "--equal-time", "nec"], "did you mean neck"),
        (["neck", "--protocol", "p.yaml"], "--protocol: has no use for names"),
        (["--protocol", "p.yaml", "--seeds", "3"], "--protocol: has no use for --seeds"),
        (["--protocol", "p.yaml"], "no protocol file p.yaml"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_written(study, tmp_path, arguments, message):
    assert message in study(*arguments, code=2)
    assert not (tmp_path / "s").exists()


def test_a_study_of_which_nothing_was_trained_has_no_report(tmp_path, defeat):
    (tmp_path / "protocol.yaml").write_text("variants: [neck]\n")
    assert "nothing was trained yet" in defeat("ablate", "--report-only", "-o", tmp_path, code=2)
