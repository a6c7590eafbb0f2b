"""The table of a run's loss terms."""

import json

import pytest

from cvlm.errors import CvlmError
from cvlm.report.terms import HEADER, term_table


def test_one_row_per_term_of_the_first_seed(tmp_path):
    records = [
        {"step": 1, "loss": 2.0, "term/labels": 2.0, "weight/labels": 1.0, "weight/logits": 0, "gradient/labels": 1.0},
        {"step": 2, "loss": 1.5, "term/logits": 3.0, "weight/labels": 0, "weight/logits": 0.5, "gradient/logits": 0.2},
        {"step": 3, "loss": 1.0, "term/logits": 1.25, "weight/labels": 0, "weight/logits": 1.0, "gradient/logits": 0.4},
    ]
    for place, log in (("teacher", records[:1]), ("distill/seed10", records[:1]), ("distill/seed2", records)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "log.json").write_text(json.dumps(log))
    table = term_table(tmp_path, ["majority", "teacher", "distill"])
    assert table.header == HEADER
    assert table.rows == (
        ("teacher", "labels", "2", "2", "1", "1"),
        ("distill", "labels", "2", "2", "0", "1"),
        ("distill", "logits", "3", "1.25", "1", "0.3"),
    )


def test_logs_without_weights_are_shown_too(tmp_path):
    (tmp_path / "finetune" / "seed0").mkdir(parents=True)
    log = tmp_path / "finetune" / "seed0" / "log.json"
    log.write_text(json.dumps([{"step": 1, "term/labels": 0.5}]))
    assert term_table(tmp_path, ["finetune"]).rows == (("finetune", "labels", "0.5", "0.5", "-", "-"),)
    log.write_text('{"step": 1}')
    with pytest.raises(CvlmError, match=r"log\.json cannot be read: it is no list of records"):
        term_table(tmp_path, ["finetune"])
