"""The recipe: everything that decides a run, as typed and documented fields. Every default of the tool lives here.

Imports neither torch nor anything slow, so that the CLI can check a recipe at once.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from typing_extensions import is_typeddict

from defeat_cli.config.architecture import STRICT, Architecture, SomeSettings
from defeat_cli.config.terms import DEFAULT_TERMS, SETTINGS, TermSettings
from defeat_cli.config.types import Count, EpochsOrSteps, Flag, Fraction, Interval, NonNegative, Positive, Seed
from defeat_cli.config.yaml import read_yaml
from defeat_cli.errors import RecipeError
from defeat_cli.files import replacing


class Section(BaseModel):
    """A group of recipe keys. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Student(Architecture):
    """The detector that is trained."""

    backbone_weights: str | None = None
    """ImageNet weights of the backbone: `imagenet` (downloaded by torchvision) or a file; null starts from scratch."""
    weights: str | None = None
    """Detector checkpoint to start from; `--student-weights`. Its classes go by name, and its conventions are to be
    the student's."""
    sync_bn: Flag = False
    """Batch normalisation over the images that all processes have on their GPUs at a time, not over each one's own."""
    inherit: list[Literal["neck", "head"]] = field(default_factory=list)
    """Parts that start as the teacher's, where shapes agree (FGD's and MGD's `init_student`). Never compare a student
    that inherits with one that does not: the plain student of a study or of `--compare-plain` inherits too."""


class Teacher(Section):
    """The trained detector that supervises. Without one the student is trained plainly."""

    checkpoint: str | None = None
    """A checkpoint file, `torchvision:NAME` for torchvision's COCO weights, `shipped:NAME`; `--teacher`."""
    recipe: str | None = None
    """Recipe that trains the teacher first, where no checkpoint is given."""
    architecture: SomeSettings | None = None
    """Settings of the teacher in place of its checkpoint's own, e.g. `score_threshold`, or what a plain state dict
    does not tell (`anchor_sizes`). They cannot change what its weights are of."""
    size: Literal["student", "own"] = "student"
    """The image size that it sees: the student's (cheapest: images are prepared once), or the one that it was trained
    with (its features are resized to the student's grid, its regions scaled)."""
    cache_gib: Positive | None = None
    """GiB of the device's memory, for each process, in which the teacher's features of images are kept, so that it
    looks at an image once, and once mirrored, and not in every epoch; null keeps none, as does too little for all.
    `check` says what they take. An image is looked at alone, as in evaluation, not padded as in its batch; that takes
    longer than in a batch and pays off in more than four epochs."""


class Shapes(Section):
    """The data set that is drawn on the spot where `data.format` is `shapes`."""

    train_images: Count = 800
    val_images: Count = 200
    size: Annotated[int, Field(ge=32)] = 128
    """Side of the square images, pixels."""
    seed: Seed = 0


class Data(Section):
    """Images with boxes, and how they are fed to the network."""

    path: str | None = None
    """Folder that holds the data set; `--data`."""
    format: Literal["auto", "coco", "voc", "yolo", "xml", "shapes"] = "auto"
    """Layout; `auto` sees it from the folder, `xml` is images with a VOC XML file each, `shapes` is drawn."""
    train_annotations: str | None = None
    """Annotation file, relative to `path`; null finds it by the layout. For VOC the image set, e.g. `trainval`."""
    val_annotations: str | None = None
    train_images: str | None = None
    """Image folder, relative to `path`; null finds it by the layout."""
    val_images: str | None = None
    test_annotations: str | None = None
    """For `--split test`, as is `test_images`."""
    test_images: str | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training images that is set apart for validation, by image; null takes the layout's own split."""
    split_seed: Seed = 0
    """Decides which images these are. Not `run.seed`: runs of all seeds share one split."""
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """Classes to keep; null keeps all."""
    short_side: Annotated[list[Count], Field(min_length=1)] = [800]
    """Images are resized to this short side; several are drawn from in training, the last is used at evaluation."""
    long_side: Count = 1333
    """The long side is kept at or below this."""
    flip: Fraction = 0.5
    """Chance of a horizontal flip in training."""
    batch_size: Count = 2
    """Images a batch. A step takes `optimizer.accumulate` batches, on however many processes, which share them."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes of each process that trains, together at most the CPU cores; 0 reads in that process."""
    verify: Literal["full", "headers"] = "full"
    """What is read of every image before a training starts: all of it (once: sound images are remembered in the user's
    cache folder), or the header alone, which does not find images that are cut short."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do with an image that is missing, cannot be read, or is not of its annotated size: stop, or leave it out
    of training and validation, which is counted and told."""
    unlabelled: str | None = None
    """Folder of images without annotations, not relative to `path`; subfolders count. The terms of distillation see
    these images beside the labelled ones, which alone make the detection loss."""
    unlabelled_batch: Count | None = None
    """Unlabelled images beside each batch; null takes `batch_size`."""
    unlabelled_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Score from which on what the teacher detects on an unlabelled image stands for an annotated box."""
    shapes: Shapes = Shapes()

    @property
    def unlabelled_a_batch(self) -> int:
        """Unlabelled images beside each batch, where there are any."""
        return self.unlabelled_batch or self.batch_size

    def labelled_only(self) -> Data:
        """The same data without unlabelled images."""
        return self.model_copy(update={name: Data.model_fields[name].default for name in UNLABELLED})

    @model_validator(mode="after")
    def _settings_need_the_folder(self) -> Data:
        for name in UNLABELLED:
            if self.unlabelled is None and getattr(self, name) != Data.model_fields[name].default:
                raise ValueError(f"{name} is about unlabelled images, and there are none; give unlabelled: FOLDER")
        return self

    @model_validator(mode="after")
    def _skip_what_is_known(self) -> Data:
        if self.on_bad_image == "skip" and self.verify != "full":
            raise ValueError("on_bad_image: skip needs verify: full, which finds the images before the first step")
        return self

    @model_validator(mode="after")
    def _one_split(self) -> Data:
        named = [name for name in ("val_annotations", "val_images") if getattr(self, name) is not None]
        if self.val_fraction is not None and named:
            raise ValueError(f"val_fraction divides the training images, and {named[0]} names others; leave one out")
        return self


UNLABELLED = ("unlabelled", "unlabelled_batch", "unlabelled_threshold")
"""Keys of `data` that are about unlabelled images."""


class _Distillation(Section):
    """Which terms supervise the student, each a section of settings; null switches one off."""

    # Keys beyond the fields are terms that bring their own settings; any other is refused below.
    model_config = ConfigDict(extra="allow")

    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps over which terms grow linearly from 0 to their weight, where they do not say themselves."""
    class_map: dict[str, str] = {}
    """Teacher class name to student class name, where names differ."""
    balance: Positive | None = None
    """The pull that each term is to have: the norm of its gradient at the student's features as a share of the
    detection loss's. Factors on the terms' weights are measured in the first steps and then fixed; null leaves the
    weights as they are."""

    @property
    def terms(self) -> dict[str, TermSettings]:
        """The settings of the terms that are on, by name."""
        sections = [*SETTINGS, *(self.model_extra or {})]
        return {name: getattr(self, name) for name in sections if getattr(self, name) is not None}

    @model_validator(mode="before")
    @classmethod
    def _read_sections(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        sections, problems = dict(content), []
        for name, value in content.items():
            if name in MOVED and not (name in SETTINGS and (value is None or isinstance(value, dict))):
                problems.append(f"distillation.{name}: {MOVED[name]}")
            elif name not in cls.model_fields:
                kind = _own_settings(name)
                if kind is None:
                    problems.append(f"distillation.{name}: unknown key{nearest(name, cls.model_fields)}")
                elif value is not None:
                    try:
                        sections[name] = TypeAdapter(kind).validate_python(value)
                    except ValidationError as error:
                        problems += [_problem(d, ("distillation", name)) for d in error.errors()]
        if problems:
            raise PydanticCustomError("sections", "\n  ".join(problems))
        return sections


MOVED = {
    **dict.fromkeys(
        ("neck", "head", "backbone"), "is a section of settings, e.g. {alpha_bg: 8}; null switches it off, {} on"
    ),
    **{key: f"is distillation.neck.{key} now" for key in ("mask", "finest_scale")},
    **{key: f"is distillation.neck.{key} now, and distillation.backbone.{key}" for key in ("alpha_fg", "alpha_bg")},
    **{key: f"is distillation.head.{key} now" for key in ("beta_fg", "beta_bg", "temperature_fg", "temperature_bg")},
    "decoupled_head": "is distillation.head.decoupled now",
}
"""Keys of the form that recipes had before terms had sections."""


def _own_settings(name: str) -> type | None:
    """The settings of a term that is not among the shipped ones."""
    from defeat_cli.distillation.terms import TERMS  # imports torch, so only where such a term is asked for

    return TERMS[name].Settings if name in TERMS else None


Distillation = create_model(
    "Distillation",
    __base__=_Distillation,
    __doc__=_Distillation.__doc__,
    **{name: (settings | None, settings() if name in DEFAULT_TERMS else None) for name, settings in SETTINGS.items()},
)


class Optimizer(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.02
    """Learning rate for the recipe's step, which is `data.batch_size` times `accumulate` images on any number of
    processes; it is not rescaled."""
    momentum: Fraction = 0.9
    """SGD momentum."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW betas."""
    weight_decay: NonNegative = 1e-4
    norm_weight_decay: NonNegative | None = None
    """Weight decay of normalisation parameters and biases; null takes `weight_decay`."""
    clip_norm: Positive | None = 35.0
    """Gradients are scaled down to this norm; null leaves them."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Steps in a row that may be left out because a loss or gradient is not finite; the next one ends the run."""
    accumulate: Count = 1
    """Batches whose gradients are averaged in one step: those of a process one after another, several processes' at the
    same time. Where there are fewer batches than processes each batch is cut into pieces."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the student, which is then what is evaluated and exported."""


class Schedule(Section):
    epochs: Count = 12
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    warmup_factor: Fraction = 0.001
    """Share of the learning rate at step 0; grows linearly to 1."""
    decay: Literal["steps", "cosine"] = "steps"
    milestones: list[Count] = [8, 11]
    """Epochs after which the learning rate is multiplied by `gamma`; for `steps`."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Run(Section):
    name: str | None = None
    """Folder under `runs/`; null takes the recipe's name. `--output` overrides it."""
    seed: Seed = 0
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; `auto` is bf16 on GPUs and CPUs that have instructions for it (CPUs: AVX512-BF16 or AMX), else
    fp32. fp16 needs CUDA. Distillation terms, boxes and anchors are always computed in fp32."""
    compile: bool = False
    """Compile backbones and necks by `torch.compile`, which takes a minute or more at the first steps and pays in long
    trainings; scoring is not compiled."""
    evaluate_every: EpochsOrSteps = 1
    """Epochs between evaluations, or steps: `500 steps`. The last epoch is always evaluated."""
    patience: Count | None = None
    """Evaluations in a row without a better AP after which the run stops early; null trains to the last epoch."""
    log_every: Count = 50
    """Steps between lines in metrics.jsonl."""
    pull_every: Annotated[int, Field(ge=0)] = 100
    """Steps between measurements of the terms' pulls, which cost about half a step; 0 measures none."""
    save_every: Interval = 1000
    """Steps between saves of last.pt, or the time, e.g. `30m` or `2h`; it is saved after each epoch too."""
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where the run can be watched too; `pip install 'defeat-cli[track]'` has them all."""
    compare_plain: bool = False
    """Also train the same student without a teacher, and report it beside the distilled one."""
    plain_beside: bool = False
    """Train it at the same time on a CPU, by a process of its own; each has half of the threads, and memory is needed
    twice. For networks too narrow to gain from several threads."""
    teacher_check_images: Annotated[int, Field(ge=0)] = 50
    """Validation images on which the teacher is scored before distilling; 0 skips it."""

    @property
    def evaluate_steps(self) -> int | None:
        """Steps between evaluations; None where they are counted in epochs."""
        every = self.evaluate_every
        return int(every.split()[0]) if isinstance(every, str) else None


class Recipe(Section):
    """Everything that decides a run."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    data: Data = Data()
    distillation: Distillation = Distillation()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: Run = Run()


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"no recipe {name!r}: it is neither a file nor a shipped recipe{nearest(name, shipped)}. "
        f"Shipped: {', '.join(shipped)}"
    )


def merged(content: dict[str, Any], overrides: dict[str, Any], origin: str = "--set") -> dict[str, Any]:
    """A copy of nested `content` with dotted overrides set in it."""
    result = dict(content)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            if inner is not None and not isinstance(inner, dict):
                raise RecipeError(f"{origin} {dotted}: {parent} is a value, not a group of keys")
            place[parent] = dict(inner or {})
            place = place[parent]
        place[last] = value
        if dotted == ONLY:
            place.update(_only(place))
            del place[last]
    return result


ONLY = "distillation.only"
"""`distillation.only: [neck, head]` switches these terms on, where they are not, and all others off. Not a key that is
kept: it stands for what it does."""


def _only(distillation: dict[str, Any]) -> dict[str, Any]:
    """The sections of terms by which `only` is obeyed."""
    wanted = distillation["only"]
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise RecipeError(f"{ONLY}: expected a list of terms, e.g. [neck, head] (got {wanted!r})")
    on = {name: distillation.get(name) or {} for name in wanted}
    terms = {*SETTINGS, *(name for name in distillation if name not in _Distillation.model_fields and name != "only")}
    return {**dict.fromkeys(terms - set(wanted)), **on}


def validate(content: dict[str, Any], origin: str) -> Recipe:
    """A recipe from nested content.

    Raises:
        RecipeError: lists every unknown key, wrong type and value out of range, by dotted name.
    """
    if isinstance(content.get("distillation"), dict) and "only" in content["distillation"]:
        content = merged(content, {ONLY: content["distillation"]["only"]})
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_problem(details) for details in error.errors()]
    raise RecipeError("\n  ".join([f"{origin} cannot be used:", *problems]))


def _problem(details: dict[str, Any], within: tuple[str, ...] = ()) -> str:
    """One mistake in the user's dotted names; `within` is where the mistake's own location begins."""
    location = [*within, *(str(part) for part in details["loc"])]
    dotted = ".".join(location)
    if dotted in RENAMED:
        return f"{dotted}: is {RENAMED[dotted]} now"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        keys = _fields(_section_at(location[:-1]))
        return f"{dotted}: unknown key{nearest(location[-1], keys)}"
    if details["type"] == "sections":
        return details["msg"]
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    value = details["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" (got {value!r})"
    if details["type"] == "literal_error" and isinstance(value, str):
        message += nearest(value, re.findall(r"'([^']*)'", message))
    return f"{dotted or 'recipe'}: {message}{shown}"


RENAMED = {"run.checkpoint_every": "run.save_every"}
"""Keys of older recipes that are called otherwise now."""


def _fields(section: type | None) -> dict[str, Any]:
    """Keys of a section and their types; none where there is no such section."""
    if section is not None and is_typeddict(section):
        return get_type_hints(section)
    if section is None or not hasattr(section, "__pydantic_fields__"):
        return {}
    return {name: info.annotation for name, info in section.__pydantic_fields__.items()}


def _section_at(location: list[str]) -> type | None:
    """The section that a dotted location names."""
    section: type | None = Recipe
    for part in location:
        annotation = _fields(section).get(part) or (_own_settings(part) if section is Distillation else None)
        section = next((kind for kind in (annotation, *get_args(annotation)) if _fields(kind)), None)
    return section


def nearest(word: str, known: Any) -> str:
    """` (did you mean x?)` for the nearest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def load(name: str | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe by file or shipped name (None: all defaults) with dotted overrides, checked."""
    path = find_recipe(name) if name is not None else None
    content = read_yaml(path) if path else {}
    recipe = validate(merged(content, overrides or {}), str(path or "the recipe"))
    if recipe.run.name is None:
        recipe.run.name = path.stem if path else "run"
    return recipe


def save(recipe: Recipe, path: Path) -> None:
    """Write every value in force; loading the file gives the same recipe."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
