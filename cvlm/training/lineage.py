"""What a model learns from that `cvlm.distill` trains: its split, and all that its start and its teacher did."""

from cvlm.data import Examples
from cvlm.data.training_record import beyond_first, source_of
from cvlm.lineage import TrainingRecord, inherit
from cvlm.model import CVLM
from cvlm.training.ema import EmaTeacher
from cvlm.training.peers import PeerTeacher
from cvlm.training.teacher import CvlmTeacher
from distill import Teacher
from distill.teachers.ensemble import EnsembleTeacher

Learned = list[tuple[str, TrainingRecord | None]]


def record_of_training(
    student: CVLM, teacher: Teacher | None, examples: Examples, *, phase: str, streamed: bool
) -> TrainingRecord:
    """Describe what a student will have been trained on; call it before, since training takes its record away.

    Every picture is decoded once, unless the student or its teacher has a record of the same split.

    Args:
        student: as it is before the phase.
        teacher: what the phase's objectives read, if they read one.
        examples: the training split; of a stream its first pairs.
        phase: what the record calls the training.
        streamed: whether there are more pairs than these.
    """
    learned: Learned = [("the student as it was given", student.training_record), *_teachers(teacher)]
    known = {(one.fingerprint, one.split): one for _, record in learned if record for one in record.sources}
    own = known.get((examples.fingerprint, examples.split)) or source_of(examples)
    beyond = (beyond_first(examples),) if streamed else ()
    return inherit(own.model_copy(update={"used_by": (phase,)}), learned, beyond)


def _teachers(teacher: Teacher | None) -> Learned:
    """Return what to call each model that teaches, and its record."""
    if teacher is None or isinstance(teacher, EmaTeacher):  # the student's average saw what the student saw
        return []
    if isinstance(teacher, EnsembleTeacher):
        return [one for member in teacher.members for one in _teachers(member)]
    if isinstance(teacher, PeerTeacher):
        return [(f"peer {number}", peer.training_record) for number, peer in enumerate(teacher.students, start=1)]
    return [(f"teacher {teacher.name}", teacher.model.training_record if isinstance(teacher, CvlmTeacher) else None)]
