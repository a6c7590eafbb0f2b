import subprocess
import sys

import pytest

import cvlm.cost


def test_every_public_name_loads():
    for name in cvlm.cost.__all__:
        assert getattr(cvlm.cost, name) is not None
    assert set(cvlm.cost.__all__) == set(cvlm.cost._HOMES)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Leger'"):
        _ = cvlm.cost.Leger


def test_reading_references_does_not_import_torch():
    code = "import sys, cvlm.cost as c; c.compare, c.Ledger, c.PhaseMeter; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
