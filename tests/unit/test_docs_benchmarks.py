"""The example of docs/benchmarks.md runs as it stands, and gives the result that stands below it."""

import json
import re
from pathlib import Path

import pytest

from cvlm.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[dict, str, list[str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours.py").write_text(block("example: colours.py"), encoding="utf-8")
    command, _, shown = block("result: colours.json").partition("\n")
    assert main(command.removeprefix("$ cvlm ").split()) == 0
    printed = capsys.readouterr().out
    return json.loads((tmp_path / "colours.json").read_text()), shown, printed.splitlines()


def test_the_example_gives_what_the_page_shows(result: tuple[dict, str, list[str]]) -> None:
    written, shown, printed = result
    assert printed == shown.splitlines()
    by_type = written["by_type"]["answer_type"]
    (said,) = re.findall(r"([\d.]+) on colours, ([\d.]+) on yes/no, ([\d.]+) on\s+shapes", PAGE)
    assert [f"{by_type[kind]['mean']:.2f}" for kind in ("colour", "yes/no", "shape")] == list(said)
    (table,) = re.findall(r"<!-- result fields -->\n\n((?:\|.*\n)+)", PAGE)
    rows = [row.split("|") for row in table.splitlines()[2:] if not row.split("|")[2].startswith(" retrieval:")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row[1])}
    assert written.keys() == documented


def test_the_example_serves_retrieval_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours_too.py").write_text(block("example: colours.py"), encoding="utf-8")
    command = "bench colours_too:load --task retrieval --data openmoji --out r.json --quiet"
    assert main(command.split()) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["n"] == 422
    recall = found["metrics"]["text_to_image_recall@10"]["mean"]
    assert recall > 10 / 422, "better than chance: some names name a colour"
