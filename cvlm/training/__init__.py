"""Where student, teacher signal and data meet."""

from cvlm.training.candidates import NONE, Candidates, Fold, image_of_texts, make_folds
from cvlm.training.ema import EmaTeacher
from cvlm.training.imitation import Imitation, collect_answers
from cvlm.training.inputs import ModelInputs, model_inputs
from cvlm.training.job import PhaseJob
from cvlm.training.peers import PeersTarget, PeerTeacher
from cvlm.training.phase import clear_checkpoints, merged_requests, pick_device, requests, train_phase
from cvlm.training.predict import Prediction, predict
from cvlm.training.retrieval import Lists, Rerank, RetrievalSettings, Retrieved, retrieve
from cvlm.training.target import (
    BuiltTargets,
    LiveTarget,
    StoredTarget,
    TargetSource,
    store_targets,
    target_name,
    teacher_inputs,
)
from cvlm.training.teacher import CvlmTeacher, initialise_from_teacher, load_cvlm_teacher

__all__ = [
    "NONE",
    "BuiltTargets",
    "Candidates",
    "CvlmTeacher",
    "EmaTeacher",
    "Fold",
    "Imitation",
    "Lists",
    "LiveTarget",
    "ModelInputs",
    "PeerTeacher",
    "PeersTarget",
    "PhaseJob",
    "Prediction",
    "Rerank",
    "RetrievalSettings",
    "Retrieved",
    "StoredTarget",
    "TargetSource",
    "clear_checkpoints",
    "collect_answers",
    "image_of_texts",
    "initialise_from_teacher",
    "load_cvlm_teacher",
    "make_folds",
    "merged_requests",
    "model_inputs",
    "pick_device",
    "predict",
    "requests",
    "retrieve",
    "store_targets",
    "target_name",
    "teacher_inputs",
    "train_phase",
]
