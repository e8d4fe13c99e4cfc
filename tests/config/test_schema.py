"""Recipes: strict, all mistakes at once, saved and loaded to the same values."""

import pytest
import yaml

from defeat_cli.config import schema as recipes
from defeat_cli.config.schema import Recipe
from defeat_cli.config.variants import VARIANTS, find_variant, read_variants
from defeat_cli.config.yaml import parse_assignments
from defeat_cli.errors import RecipeError


def write(folder, text, name="r.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipes.shipped_recipes())
def test_shipped_recipes_load_and_open_with_a_command_that_names_them(name):
    loaded = recipes.load(name)
    assert loaded.run.name == name
    text = recipes.shipped_recipes()[name].read_text()
    header = text[: text.index("\n\n")]
    assert header.startswith("# ")
    assert f"--recipe {name}" in header


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.load("quickstart").run.name == "quickstart"


def test_all_mistakes_are_named_at_once_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "optimiser: {lr: 1}\noptimizer: {lr: fast, momentums: 0.9}\n"
        "student: {backbone: resnet51}\nschedule: {epochs: 0}",
    )
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    message = str(caught.value)
    assert "optimiser: unknown key (did you mean optimizer?)" in message
    assert "optimizer.momentums: unknown key (did you mean momentum?)" in message
    assert "optimizer.lr" in message
    assert "'fast'" in message
    assert "student.backbone" in message
    assert "did you mean resnet50?" in message
    assert "schedule.epochs" in message


def test_a_value_is_not_cast_from_another_type(tmp_path):
    with pytest.raises(RecipeError, match=r"schedule\.epochs"):
        recipes.load(write(tmp_path, "schedule: {epochs: '12'}"))
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):
        recipes.load(write(tmp_path, "optimizer: {lr: .nan}"))


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2.5E+1", 25.0), ("3e2", 300.0), ("0.02", 0.02)])
def test_exponents_are_numbers_as_people_write_them(tmp_path, text, value):
    assert recipes.load(write(tmp_path, f"optimizer: {{lr: {text}}}")).optimizer.lr == value


def test_broken_yaml_names_file_and_line(tmp_path):
    path = write(tmp_path, "student:\n  backbone: resnet50\n bad: [\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:3"):
        recipes.load(path)


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"r\.yaml:2: not valid YAML: 'run' is given twice"):
        recipes.load(write(tmp_path, "run: {seed: 1}\nrun: {seed: 2}\n"))


def test_a_list_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="expected a mapping"):
        recipes.load(write(tmp_path, "- student\n"))


def test_no_such_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        recipes.load("quickstrat")


def test_assignments_override_the_file(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 0.5, momentum: 0.8}")
    changes = parse_assignments(["optimizer.lr=1e-3", "data.short_side=[640, 800]", "run.name=null"])
    loaded = recipes.load(path, changes)
    assert loaded.optimizer.lr == 1e-3
    assert loaded.optimizer.momentum == 0.8
    assert loaded.data.short_side == [640, 800]


@pytest.mark.parametrize("assignment", ["optimizer.lr", "=3", "optimizer.lr=[1"])
def test_an_assignment_of_another_form_is_refused(assignment):
    with pytest.raises(RecipeError, match="--set"):
        parse_assignments([assignment])


def test_an_assignment_to_an_unknown_key_is_refused():
    with pytest.raises(RecipeError, match=r"optimizer\.lrr: unknown key \(did you mean lr\?\)"):
        recipes.load(None, {"optimizer.lrr": 1})


def test_a_saved_recipe_loads_to_the_same_values(tmp_path):
    before = recipes.load("quickstart", {"optimizer.lr": 0.123})
    recipes.save(before, tmp_path / "recipe.yaml")
    assert recipes.load(str(tmp_path / "recipe.yaml")) == before
    assert set(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == set(Recipe.model_fields)


def test_regnet_needs_widths_and_nothing_else_takes_them():
    with pytest.raises(RecipeError, match="widths is needed"):
        recipes.load(None, {"student.backbone": "regnet"})
    with pytest.raises(RecipeError, match="for backbone regnet only"):
        recipes.load(None, {"student.widths": [8, 16, 32, 64]})


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_a_valid_change_of_the_distillation_settings(name):
    loaded = recipes.load("quickstart", VARIANTS[name].overrides)
    assert bool(loaded.distillation.terms) is (name != "none")
    assert all(key.startswith("distillation.") for key in VARIANTS[name].overrides)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("alpha_fg", 3.0, r"distillation\.alpha_fg: is distillation\.neck\.alpha_fg now"),
        ("decoupled_head", False, r"distillation\.decoupled_head: is distillation\.head\.decoupled now"),
        ("head", False, r"distillation\.head: is a section of settings"),
        ("hed", None, r"distillation\.hed: unknown key \(did you mean head\?\)"),
        ("neck.alpha_gf", 1.0, r"distillation\.neck\.alpha_gf: unknown key \(did you mean alpha_fg\?\)"),
        ("only", ["nck"], r"distillation\.nck: unknown key \(did you mean neck\?\)"),
        ("only", "neck", r"distillation\.only: expected a list of terms"),
    ],
)
def test_a_key_of_the_flat_form_or_of_no_term_is_refused_with_the_right_name(key, value, told):
    with pytest.raises(RecipeError, match=told):
        recipes.load(None, {f"distillation.{key}": value})


def test_only_switches_terms_on_and_all_others_off_and_later_settings_win(tmp_path):
    path = write(tmp_path, "distillation: {neck: {alpha_fg: 3.0}, backbone: {alpha_fg: 5.0}}")
    only = recipes.load(path, {"distillation.only": ["backbone", "head"]}).distillation
    assert list(only.terms) == ["head", "backbone"]
    assert only.backbone.alpha_fg == 5.0
    both = recipes.load(path, {"distillation.only": ["neck", "head"], "distillation.head": None}).distillation
    assert list(both.terms) == ["neck"]
    assert both.neck.alpha_fg == 3.0
    inside = write(tmp_path, "distillation: {only: [head]}", "inside.yaml")
    assert list(recipes.load(inside).distillation.terms) == ["head"]


def test_a_misspelt_variant_gets_the_nearest_name():
    with pytest.raises(RecipeError, match="did you mean fg-only"):
        find_variant("fg-onyl", VARIANTS)


def test_own_variants_join_the_shipped_ones(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "strong:\n  distillation: {neck: {alpha_bg: 32.0}}\nslow:\n  optimizer.lr: 0.001\n"
        "told:\n  summary: half the usual\n  overrides: {distillation.neck.alpha_bg: 8.0}\n"
    )
    own = read_variants(path)
    assert own["strong"].overrides == {"distillation.neck.alpha_bg": 32.0}
    assert own["slow"].overrides == {"optimizer.lr": 0.001}
    assert (own["told"].summary, own["told"].overrides) == ("half the usual", {"distillation.neck.alpha_bg": 8.0})
    assert set(VARIANTS) < set(own)
    path.write_text("neck: {distillation.neck.alpha_bg: 1.0}\n")
    with pytest.raises(RecipeError, match="neck is a shipped variant"):
        read_variants(path)
