"""The table of objectives. An instance of your own `Objective` subclass stands wherever a name does."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from distill.errors import DistillError
from distill.objectives.attention import CrossAttention
from distill.objectives.base import Objective
from distill.objectives.boundary import ActivationBoundary
from distill.objectives.calibration import Entropy, Focal
from distill.objectives.contrastive import Contrastive
from distill.objectives.correlation import Dist
from distill.objectives.crd import ContrastiveRepresentation
from distill.objectives.decoupled import DecoupledKD
from distill.objectives.divergences import JensenShannon, LogitMSE, ReverseKL, SymmetricKL, TotalVariation
from distill.objectives.features import Hidden
from distill.objectives.heterogeneous import Heterogeneous
from distill.objectives.inheritance import InheritanceExploration
from distill.objectives.ranking import Ranking
from distill.objectives.relational import Correlation, ProbabilisticTransfer, Relational, SimilarityPreserving
from distill.objectives.relations import ValueRelation
from distill.objectives.response import Labels, Logits, Similarity
from distill.objectives.structure import Continual, Mutual
from distill.objectives.top_k import TopK
from distill.objectives.variational import Variational

OBJECTIVES: dict[str, type[Objective]] = {
    "labels": Labels,
    "logits": Logits,
    "similarity": Similarity,
    "jsd": JensenShannon,
    "reverse_kl": ReverseKL,
    "symmetric_kl": SymmetricKL,
    "tvd": TotalVariation,
    "logit_mse": LogitMSE,
    "top_k": TopK,
    "dkd": DecoupledKD,
    "ranking": Ranking,
    "focal": Focal,
    "entropy": Entropy,
    "cross_attention": CrossAttention,
    "value_relation": ValueRelation,
    "hidden": Hidden,
    "activation_boundary": ActivationBoundary,
    "pkt": ProbabilisticTransfer,
    "relational": Relational,
    "similarity_preserving": SimilarityPreserving,
    "correlation": Correlation,
    "dist": Dist,
    "internal_external": InheritanceExploration,
    "vid": Variational,
    "crd": ContrastiveRepresentation,
    "contrastive": Contrastive,
    "mutual": Mutual,
    "heterogeneous": Heterogeneous,
    "continual": Continual,
}


def build_objective(kind: str | Objective, **settings: Any) -> Objective:
    """Make an objective from its name and settings; an instance is returned as it is.

    Raises:
        DistillError: the name or a setting is unknown, or a value is out of range.
    """
    if isinstance(kind, Objective):
        return kind
    if kind not in OBJECTIVES:
        close = get_close_matches(kind, OBJECTIVES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DistillError(f"unknown objective {kind!r}{hint}. Known: {', '.join(OBJECTIVES)}.")
    known = [name for name in inspect.signature(OBJECTIVES[kind].__init__).parameters if name != "self"]
    for name in settings:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DistillError(f"objective {kind!r} has no setting {name!r}{hint}. Known: {', '.join(known)}.")
    try:
        return OBJECTIVES[kind](**settings)
    except TypeError as error:
        raise DistillError(f"objective {kind!r} with settings {settings}: {error}") from error


def check_requirements(
    objectives: Iterable[Objective], student: frozenset[str], teacher: frozenset[str], teacher_name: str
) -> None:
    """Refuse, before the first step, objectives that need what a side cannot give.

    Args:
        objectives: the terms of a loss.
        student: signal fields that the student can give.
        teacher: signal fields that the teacher can give; empty without a teacher.
        teacher_name: how to call the teacher in the message.

    Raises:
        DistillError: with one line per objective, naming it, the missing field and the side.
    """
    problems = []
    for objective in objectives:
        missing = objective.missing(student, teacher)
        for side, given in (("student", student), ("teacher", teacher)):
            if missing[side]:
                who = f"the teacher {teacher_name}" if side == "teacher" else "the student"
                gives = ", ".join(sorted(given)) or "nothing"
                problems.append(
                    f"objective {objective.kind!r} needs {', '.join(sorted(missing[side]))} of {who}, which gives "
                    f"{gives}"
                )
    if problems:
        raise DistillError("; ".join(problems) + ". Take the objective out, or another model.")


__all__ = ["OBJECTIVES", "Objective", "build_objective", "check_requirements"]
