"""What is checked before the first step, so that what cannot work fails before anything is trained."""

from benchmarks.captions import check_installed
from cvlm.api import check_teacher, load_teacher
from cvlm.cli.experiment import TEACHER_SEED, Experiment
from cvlm.cli.teachers import check_composition
from cvlm.config import EmaTeacherSpec, PeerTeacherSpec, TeacherSpec
from cvlm.data import Examples
from cvlm.errors import CvlmError
from cvlm.training import EmaTeacher, LiveTarget, PeerTeacher
from distill import Teacher
from distill.imitation import check_teacher_answers


def check_experiment(experiment: Experiment) -> None:
    """Build every part of the experiment once.

    Raises:
        CvlmError: a part cannot be built, a picture cannot be read, or phases do not go together.
        DistillError: a teacher cannot give what an objective reads.
    """
    if experiment.recipe.task == "captioning":
        check_installed()
    _check_teachers(experiment)
    for split in (experiment.data.train, experiment.data.test):
        _check_pictures(experiment, split)


def check_earlier_phases(experiment: Experiment, phase: str, seed: int) -> None:
    """Refuse a student phase before the models that it starts from or is taught by are trained.

    Raises:
        CvlmError: naming the folder that is missing.
    """
    recipe = experiment.recipe
    start, previous = recipe.start_of(phase), recipe.chain_arms.get(phase)
    earlier = [] if start is None else [experiment.folder(start, seed)]
    if previous is not None:
        earlier.append(experiment.folder(previous, seed))
    elif "teacher" in recipe.phases and (
        (experiment.taught(phase) and recipe.companion_of(phase) is None) or experiment.imitates(phase)
    ):
        earlier.append(experiment.out / "teacher")
    for folder in earlier:
        if not (folder / "config.json").exists():
            raise CvlmError(f"phase {phase!r} needs the model {folder}, which is missing; run its phase first")


def _check_teachers(experiment: Experiment) -> None:
    """Compare what every arm asks with what its teacher gives."""
    recipe = experiment.recipe
    student = experiment.new_student(recipe.seeds[0])
    arms, chain = recipe.student_arms, recipe.chain_arms
    taught = {arm for arm in arms if experiment.taught(arm)}
    imitating = {arm for arm in arms if experiment.imitates(arm)}
    asking = ((taught & {*recipe.teacher_arms}) | imitating) - chain.keys()
    teacher = _teacher_preview(experiment, recipe.teacher) if asking else None
    last = load_teacher(experiment.new_student(recipe.seeds[0])) if chain else None
    for arm in arms:
        companion = recipe.phase_of(arm).companion
        own = last if arm in chain else teacher if companion is None else _teacher_preview(experiment, companion)
        check_teacher(student, own if arm in taught else None, experiment.objectives(arm))
    check_composition(recipe, taught)
    if teacher is not None and taught & {*recipe.teacher_arms}:
        # A table may lack pairs; that is said now, not when the first phase is trained.
        _ = LiveTarget(teacher=teacher, examples=experiment.data.train).missing
    if imitating:
        assert teacher is not None, "the recipe was checked to have one"
        check_teacher(student, teacher, [])
        check_teacher_answers(teacher, **recipe.imitation.model_dump(include={"samples", "temperature", "confidence"}))


def _teacher_preview(experiment: Experiment, spec: TeacherSpec | None) -> Teacher | None:
    """The teacher as far as requirements go: what will be trained here can be asked before it is."""
    seed = experiment.recipe.seeds[0]
    if isinstance(spec, EmaTeacherSpec):
        average = EmaTeacher(decay=spec.decay)
        average.follow(experiment.new_student(seed))
        return average
    if isinstance(spec, PeerTeacherSpec):
        return PeerTeacher(students=experiment.new_peers(spec, seed))
    if experiment.recipe.trained_teacher is None:
        return experiment.teacher if spec is not None else None
    return experiment.teacher_with(lambda own: load_teacher(experiment.new_model(own.model, TEACHER_SEED)))


def _check_pictures(experiment: Experiment, split: Examples) -> None:
    """Decode the user's own pictures once before the first step; packages and imports were checked before."""
    pictures = split.pictures if experiment.recipe.data.kind == "jsonl" else split.pictures[:1]
    bar, broken = experiment.console.bar(f"checking pictures, {split.split} split"), []
    for done, picture in enumerate(pictures, start=1):
        try:
            picture.load()
        except CvlmError as error:
            broken.append(str(error))
        if len(pictures) > 1:
            bar(done, len(pictures))
    if broken:
        more = f"\n  ... and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise CvlmError("\n  ".join([f"{len(broken)} picture(s) cannot be read:", *broken[:5]]) + more)
