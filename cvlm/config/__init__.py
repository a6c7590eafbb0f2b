"""Recipes and model specifications: strict, immutable, every error of a file reported at once."""

from cvlm.config.data import (
    SKIP,
    DataSpec,
    EasyVqaData,
    JsonLinesData,
    OpenMojiData,
    ShardsData,
    StreamData,
    TweetsData,
)
from cvlm.config.models import EncoderSpec, FusionSpec, Strict, StudentSpec, TextSpec, VisionSpec
from cvlm.config.phases import ChainSpec, EngineSpec, ImitationSpec, ObjectiveSpec, PhaseSpec
from cvlm.config.reading import load_recipe, parse_recipe
from cvlm.config.recipe import Recipe, Task
from cvlm.config.teachers import (
    CallableTeacherSpec,
    CvlmTeacherSpec,
    EmaTeacherSpec,
    EnsembleTeacherSpec,
    GenerativeTeacherSpec,
    MemberSpec,
    PeerTeacherSpec,
    SavedTeacherSpec,
    ServerTeacherSpec,
    TableTeacherSpec,
    TeacherSpec,
    TransformersTeacherSpec,
)

__all__ = [
    "SKIP",
    "CallableTeacherSpec",
    "ChainSpec",
    "CvlmTeacherSpec",
    "DataSpec",
    "EasyVqaData",
    "EmaTeacherSpec",
    "EncoderSpec",
    "EngineSpec",
    "EnsembleTeacherSpec",
    "FusionSpec",
    "GenerativeTeacherSpec",
    "ImitationSpec",
    "JsonLinesData",
    "MemberSpec",
    "ObjectiveSpec",
    "OpenMojiData",
    "PeerTeacherSpec",
    "PhaseSpec",
    "Recipe",
    "SavedTeacherSpec",
    "ServerTeacherSpec",
    "ShardsData",
    "StreamData",
    "Strict",
    "StudentSpec",
    "TableTeacherSpec",
    "Task",
    "TeacherSpec",
    "TextSpec",
    "TransformersTeacherSpec",
    "TweetsData",
    "VisionSpec",
    "load_recipe",
    "parse_recipe",
]
