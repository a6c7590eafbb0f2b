"""Where student, teacher signal and data meet."""

from cvlm.training.inputs import ModelInputs, model_inputs
from cvlm.training.phase import PhaseJob, clear_checkpoints, merged_requests, pick_device, requests, train_phase
from cvlm.training.predict import Prediction, predict
from cvlm.training.target import BuiltTargets, LiveTarget, StoredTarget, TargetSource, store_targets, teacher_inputs
from cvlm.training.teacher import CvlmTeacher, initialise_from_teacher, load_cvlm_teacher

__all__ = [
    "BuiltTargets",
    "CvlmTeacher",
    "LiveTarget",
    "ModelInputs",
    "PhaseJob",
    "Prediction",
    "StoredTarget",
    "TargetSource",
    "clear_checkpoints",
    "initialise_from_teacher",
    "load_cvlm_teacher",
    "merged_requests",
    "model_inputs",
    "pick_device",
    "predict",
    "requests",
    "store_targets",
    "teacher_inputs",
    "train_phase",
]
