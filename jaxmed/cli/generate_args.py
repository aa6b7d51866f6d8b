"""The flags of `jaxmed generate`, and what is read of the folders that they name before the first answer."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxmed.cli import common
from jaxmed.config import DistributedConfig, Experiment, MeshConfig
from jaxmed.data.conversation import reading_of
from jaxmed.data.inputs import FOLDERS, input_folder
from jaxmed.data.record_files import records_file
from jaxmed.data.records import Reading, Record, load_records
from jaxmed.distributed import say
from jaxmed.errors import Problem, UserError

JOINED = "The processes that --join means. Left empty, SLURM's, TPU's and GKE's own variables decide."
UPSTREAM_DEFECTS = ("history_eot", "na_choices", "pad_grey")


@dataclass(frozen=True)
class Args:
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A run, an upstream folder, or a Hugging Face language model"""
    records: str
    """LLaVA-style JSON, a CSV of M3D, SAMF or CT-RATE, AMOS-MM's dataset.json (dataset.json:validation:vqa), or a mixture; its
    human turns are the questions"""
    out: str
    """Result, by custom named ..._vqa.json"""
    embeddings: str = ""
    """Folder of the .npz token files"""
    base: str = ""
    """The language model's folder, where FOLDER holds an adapter alone"""
    tower: str = ""
    """The image tower's folder, for models that have one apart, and for runs on its tokens that shall read --volumes"""
    volumes: str = ""
    """Folder of volumes, for models that read them directly"""
    images: str = ""
    """Folder of 2-D images, for models that read them"""
    max_new_tokens: int = 512
    """Tokens of an answer at most"""
    temperature: float = 0.0
    """0: greedy"""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability (1: all)"""
    top_k: int = 0
    """Draw among the k most likely tokens (0: all)"""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the answer has already become less likely"""
    seed: int = 0
    """Seed of the draws and of --control"""
    batch: int = 8
    """Prompts decoded together"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of weights and computation"""
    template: str = ""
    """Conversation template; "": the folder's"""
    token_ids: bool = False
    """Add the generated ids to each answer"""
    answers: Literal["generated", "likelihood"] = "generated"
    """How questions with options are answered: by writing, or by the likelihood of each option (nothing is generated for them,
    and the result has their probabilities)"""
    likelihood: Literal["letters", "options", "texts"] = "letters"
    """With --answers likelihood, of what: the letter, letter and text as in M3D's targets, or the option's text alone"""
    per_token: bool = False
    """With --answers likelihood: the mean over an option's tokens in place of their sum, so that long ones do not lose"""
    calibration: Literal["none", "batch"] = "none"
    """With --answers likelihood: divide each letter's probability by its mean over the set (batch calibration, arXiv
    2309.17249). It is applied to the finished file alone: the same command with another choice only writes that anew"""
    submission: str = ""
    """AMOS-MM: the challenge's file, --records' entries with the findings written here and a prediction a question"""
    submission_with: tuple[str, ...] = ()
    """Results of earlier runs over the same entries that go into --submission too, such as the other task's"""
    keep_special_tokens: bool = False
    """Leave end tokens and their like in the printed text, as upstream does"""
    control: Literal["", "shuffled", "zeros", "noise"] = ""
    """Show the wrong image: another study's, zeros, or noise"""
    process: int = 0
    """Index of this process (with --join: of this job) among --processes"""
    processes: int = 1
    """Processes (with --join: jobs) that share the studies"""
    join: bool = False
    """The processes of this job hold one model together, over the devices of all of them"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: list all such records and stop, or go on without them (in --submission they stay empty)"""
    upstream_exact: str = ""
    """Upstream's defects to reproduce, comma-separated: history_eot, na_choices, pad_grey (see the README)"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as lora.alpha=12"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: Annotated[DistributedConfig, tyro.conf.arg(help=JOINED)] = field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class Asked:
    """What all processes of a job have found and agree on, no weight read yet."""

    model: Any
    """jaxmed.api.Model"""
    request: Any
    """jaxmed.generate.request.Request"""
    records: list[Record]
    """All of the file"""
    usable: list[Record]
    problems: list[Problem]
    header: dict[str, Any]
    """Of the journal"""


def asked(args: Args, devices: Sequence[jax.Device]) -> Asked:
    """`devices`: those that hold the model."""
    # imported late: --help and wrong flags need none of it
    from jaxmed.api import Model, load
    from jaxmed.generate.request import Request, check_records
    from jaxmed.generate.sampling import Sampling
    from jaxmed.sharding import make_mesh, mesh_notices

    defects = common.names(args.upstream_exact, UPSTREAM_DEFECTS, "--upstream-exact")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    try:
        mesh = make_mesh(args.mesh, devices)
    except UserError as error:
        raise UserError(f"{error}{_hint(args.mesh, devices)}") from None
    tower, kind = _tower(args)
    overrides = kind | common.settings(args.set) | ({"visual.pixels.pad_grey": True} if "pad_grey" in defects else {})
    model = load(args.folder, args.base, tower, mesh, args.dtype, overrides)
    if not isinstance(model, Model):
        raise UserError(f"{args.folder}: holds encoders alone, which write no text; use it from Python (jaxmed.load)")
    for text in mesh_notices(model.experiment, dict(mesh.shape)):
        say(text)
    records, problems = load_records(args.records, _reading(model.experiment, defects))
    request = Request(
        args.records,
        _folder(args, model.experiment),
        sampling,
        args.max_new_tokens,
        args.template or model.experiment.data.template,
        args.control,
        "history_eot" in defects,
        args.keep_special_tokens,
        args.token_ids,
        args.likelihood if args.answers == "likelihood" else None,
        args.per_token,
    )
    usable, problems = check_records(records, problems, request, model, args.on_bad_record == "skip")
    return Asked(model, request, records, usable, problems, request.header(model))


def _hint(mesh: MeshConfig, devices: Sequence[jax.Device]) -> str:
    """For a mesh that one process's devices cannot be."""
    larger = max(mesh.data, 1) * mesh.fsdp * mesh.context * mesh.tensor > len(devices)
    several = larger and jax.process_count() == 1
    return "; with --join the processes of a job hold one model together, over the devices of all" if several else ""


def _tower(args: Args) -> tuple[str, dict[str, Any]]:
    """The tower's folder, and overrides. A run on a tower's tokens needs that tower for --volumes alone."""
    from jaxmed.checkpoint.adapter import run_experiment
    from jaxmed.generate.tower import reads_tower_tokens

    if not (args.embeddings or args.volumes) or not reads_tower_tokens(args.folder):
        return args.tower, {}
    named = run_experiment(args.folder).model.tower_folder
    if args.embeddings:
        if args.tower and not named:
            say(f"--tower {args.tower}: is not used, --embeddings has its tokens")
        return args.tower if named else "", {"visual.kind": "embeddings"}
    tower = args.tower or named
    if not tower:
        raise UserError(
            f"--volumes: {args.folder} was trained on the tokens of a tower, which it does not hold; give that tower's folder "
            "with --tower, or the token files with --embeddings"
        )
    return tower, {}


def _reading(experiment: Experiment, defects: Collection[str]) -> Reading:
    """Upstream's scripts for 2-D images show the image whether or not the question names its place."""
    reading = reading_of(experiment, frozenset(defects))
    reading = replace(reading, unanswered=reading.placeholders)  # a test set has no reports
    return replace(reading, missing_image_token="prepend") if experiment.visual.kind == "pixels" else reading


def _folder(args: Args, experiment: Experiment) -> str:
    """The folder of the image files, from the flag that belongs to what the model reads."""
    visual = experiment.visual
    given = {name: getattr(args, name) for name in ("embeddings", "images", "volumes") if getattr(args, name)}
    wanted = "" if visual.kind == "none" else FOLDERS[visual.kind]
    for name in given:
        if name != wanted:
            reads = f"reads --{wanted}" if wanted else "reads no images"
            hint = "; make them with `jaxmed encode`" if wanted == "embeddings" else ""
            raise UserError(f"--{name}: this model {reads}{hint}")
    return given.get(wanted) or input_folder(experiment.data, visual)


def check(args: Args) -> None:
    if not os.path.isfile(records_file(args.records)):
        raise UserError(f"--records {args.records}: no such file")
    for name in ("embeddings", "images", "volumes"):
        if getattr(args, name) and not os.path.isdir(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: no such folder")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process {args.process} must be at least 0 and below --processes {args.processes}")
    if args.answers != "likelihood" and (args.per_token or args.calibration != "none" or args.likelihood != "letters"):
        raise UserError("--likelihood, --per-token and --calibration belong to --answers likelihood; add that")
    if args.submission_with and not args.submission:
        raise UserError("--submission-with: belongs to --submission, the file to be written")
    for path in args.submission_with:
        if not os.path.isfile(path):
            raise UserError(f"--submission-with {path}: no such file")
    if args.batch < 1 or args.max_new_tokens < 1:
        raise UserError("--batch and --max-new-tokens must be at least 1")
    parent = os.path.dirname(os.path.abspath(args.out))
    os.makedirs(parent, exist_ok=True)
