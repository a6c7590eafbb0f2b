"""Knowledge distillation between unlike vision-language models: signals, alignment, objectives, teachers."""

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.objectives import OBJECTIVES, Objective, build_objective, check_requirements
from distill.signal import Request, Signal
from distill.teachers import TEACHERS, load_teacher
from distill.teachers.base import Teacher

__all__ = [
    "OBJECTIVES",
    "TEACHERS",
    "DistillError",
    "ImageLayout",
    "Objective",
    "Request",
    "Signal",
    "Teacher",
    "TextLayout",
    "build_objective",
    "check_requirements",
    "load_teacher",
]
