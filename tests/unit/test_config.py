"""Recipes: every problem at once, with its place; overrides; which phase starts from which."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cvlm.config import CvlmTeacherSpec, EasyVqaData, ObjectiveSpec, Recipe, Task, load_recipe, parse_recipe
from cvlm.errors import CvlmError, nearest, unknown_name
from cvlm.tasks import TASKS

TASK_NAMES = get_args(Task)

CONFIGS = Path(__file__).parents[2] / "configs"


def raw(**changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "task": "vqa",
        "data": {"kind": "easy_vqa", "labelled": 0.5},
        "student": {"vision": {"name": "timm:test_vit"}, "text": {"name": "hf:roberta-base"}},
        "teacher": {"kind": "saved", "path": "out/teacher"},
        "phases": {
            "finetune": {"objectives": ["labels"]},
            "distill": {"objectives": ["labels", {"kind": "logits", "temperature": 3.0, "weight": 0.5}]},
        },
    }
    return recipe | changes


def problems_of(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(CvlmError, match="problem") as caught:
        parse_recipe(recipe, source="my.yaml")
    head, *lines = str(caught.value).splitlines()
    assert head == f"my.yaml: {len(lines)} problem(s)"
    return [line.removeprefix("  - ") for line in lines]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw(), sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert load_recipe(path).student_arms[0] == "finetune"


def test_the_quickstart_says_what_it_compares() -> None:
    recipe = load_recipe(CONFIGS / "quickstart" / "vqa.yaml")
    assert recipe.student_arms == ("finetune", "distill_logits", "distill")
    assert isinstance(recipe.teacher, CvlmTeacherSpec)
    assert recipe.teacher.model.vision.name == "package:efficientnet_lite2"
    assert isinstance(recipe.data, EasyVqaData)
    assert recipe.data.labelled == 0.01
    assert recipe.phases["distill"].objectives[2].settings == {"layers": "last", "heads": "mean"}


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = parse_recipe(raw())
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe


class TestEveryProblemAtOnce:
    def test_three_typos_are_three_lines_with_the_nearest_key(self) -> None:
        recipe = raw(sedes=[0])
        recipe["data"]["labeled"] = 0.1
        recipe["phases"]["finetune"]["learning_rte"] = 1
        assert problems_of(recipe) == [
            "data.labeled: unknown key; did you mean 'labelled'?",
            "phases.finetune.learning_rte: unknown key; did you mean 'learning_rate'?",
            "sedes: unknown key; did you mean 'seeds'?",
        ]

    def test_values_come_with_place_reason_and_value(self) -> None:
        recipe = raw(task="vqaa", seeds=[0, -1])
        recipe["student"]["vision"]["train"] = "first_2"
        recipe["phases"]["finetune"] |= {"epochs": 0, "batch_size": 1, "learning_rate": float("inf")}
        lines = problems_of(recipe)
        assert len(lines) == 6
        for number, pattern in enumerate(
            (
                f"task: Input should be {', '.join(map(repr, TASK_NAMES[:-1]))} or {TASK_NAMES[-1]!r} (got 'vqaa')",
                "student.vision.train: train is 'first_2'; use frozen, full, or last_N such as last_2",
                "phases.finetune.epochs: Input should be greater than 0 (got 0)",
                "phases.finetune.batch_size: Input should be greater than or equal to 2 (got 1)",
                "phases.finetune.learning_rate: Input should be a finite number (got inf)",
                "seeds.1: Input should be greater than or equal to 0 (got -1)",
            )
        ):
            assert lines[number] == pattern

    def test_missing_keys_are_named(self) -> None:
        recipe = raw(phases={"finetune": {}})
        del recipe["student"]["text"]
        assert problems_of(recipe) == [
            "student.text: this key is required",
            "phases.finetune.objectives: this key is required",
        ]

    def test_the_kind_is_no_part_of_the_place(self) -> None:
        recipe = raw(teacher={"kind": "vilt", "nmae": "x"}, data={"kind": "jsonl"})
        recipe["phases"]["saved"] = {"objectives": []}
        lines = problems_of(recipe)
        assert lines[0] == "data.path: this key is required"
        assert lines[1] == "teacher.name: this key is required"
        assert lines[2] == "teacher.nmae: unknown key; did you mean 'name'?"
        assert lines[3].startswith("phases.saved.objectives: Tuple should have at least 1 item")

    def test_an_unknown_kind_lists_the_known_ones(self) -> None:
        (line,) = problems_of(raw(data={"kind": "easyvqa"}))
        assert line.startswith("data: ")
        assert "'easyvqa'" in line
        assert "'easy_vqa', 'openmoji', 'tweets', 'jsonl'" in line

    def test_heads_must_divide_the_width(self) -> None:
        recipe = raw()
        recipe["student"]["fusion"] = {"width": 100, "heads": 3}
        assert problems_of(recipe) == ["student.fusion: width 100 is not divisible by heads 3"]


class TestPhases:
    def refused(self, phases: dict[str, Any], **changes: Any) -> str:
        specs = {name: {"objectives": ["labels"], **settings} for name, settings in phases.items()}
        (line,) = problems_of(raw(phases=specs, **changes))
        return line

    def test_arms_start_from_finetune_unless_they_say_otherwise(self) -> None:
        phases = {"finetune": {}, "distill": {}, "chain": {"start": "distill"}}
        recipe = parse_recipe(raw(phases={name: {"objectives": ["labels"], **p} for name, p in phases.items()}))
        assert recipe.student_arms == ("finetune", "distill", "chain")
        assert [recipe.start_of(arm) for arm in recipe.student_arms] == [None, "finetune", "distill"]

    def test_without_finetune_a_student_is_fresh(self) -> None:
        recipe = parse_recipe(raw(phases={"distill": {"objectives": ["labels"]}}))
        assert recipe.start_of("distill") is None

    def test_the_teacher_is_no_arm(self) -> None:
        teacher = raw()["student"] | {"kind": "cvlm"}
        phases = {name: {"objectives": ["labels"]} for name in ("teacher", "finetune")}
        recipe = parse_recipe(raw(teacher=teacher, phases=phases))
        assert recipe.student_arms == ("finetune",)

    def test_a_start_must_stand_earlier(self) -> None:
        line = self.refused({"finetune": {}, "a": {"start": "b"}, "b": {}})
        assert line == "phase 'a' starts from 'b', which is no earlier student phase (finetune)"

    def test_the_silent_start_must_stand_earlier_too(self) -> None:
        line = self.refused({"distill": {}, "finetune": {}})
        assert line == "phase 'distill' starts from 'finetune', which is no earlier student phase (none)"

    def test_a_student_cannot_start_from_the_teacher(self) -> None:
        teacher = raw()["student"] | {"kind": "cvlm"}
        line = self.refused({"teacher": {}, "finetune": {"start": "teacher"}}, teacher=teacher)
        assert "'finetune' starts from 'teacher', which is no earlier student phase" in line

    def test_the_teacher_starts_from_nothing(self) -> None:
        teacher = raw()["student"] | {"kind": "cvlm"}
        line = self.refused({"finetune": {}, "teacher": {"start": "finetune"}}, teacher=teacher)
        assert "phase 'teacher' starts from 'finetune'" in line

    @pytest.mark.parametrize("name", ["majority", "features", "targets", "encode", "evaluate"])
    def test_names_that_a_run_uses_itself_are_refused(self, name: str) -> None:
        assert f"'{name}' names " in self.refused({"finetune": {}, name: {}})

    @pytest.mark.parametrize("name", ["Distill", "phase 2", "../up", "2nd"])
    def test_names_become_folders(self, name: str) -> None:
        assert "must be lower-case letters" in self.refused({"finetune": {}, name: {}})

    def test_several_problems_of_the_phases_are_all_told(self) -> None:
        line = self.refused({"teacher": {}, "majority": {}}, seeds=[1, 1])
        assert "the recipe has none" in line
        assert "'majority' names the baseline" in line
        assert "seeds [1, 1] repeat" in line

    def test_no_student_phase(self) -> None:
        assert self.refused({}) == "phases holds no student phase; add finetune"

    def test_a_cvlm_teacher_must_be_trained_or_saved(self) -> None:
        line = self.refused({"finetune": {}}, teacher=raw()["student"] | {"kind": "cvlm"})
        assert line == "a teacher of kind cvlm needs a phase 'teacher'; for a trained one use kind: saved"


class TestComposedTeachers:
    def test_a_chain_repeats_a_phase_behind_all_others(self) -> None:
        recipe = parse_recipe(raw(chain={"phase": "distill", "rounds": 2}))
        assert recipe.student_arms == ("finetune", "distill", "distill_chain1", "distill_chain2")
        assert recipe.chain_arms == {"distill_chain1": "distill", "distill_chain2": "distill_chain1"}
        assert recipe.phase_of("distill_chain2") is recipe.phases["distill"]
        assert recipe.start_of("distill_chain2") == "finetune"

    def test_a_fresh_start_beside_finetune(self) -> None:
        phases = {"finetune": {"objectives": ["labels"]}, "mutual": {"objectives": ["mutual"], "start": "fresh"}}
        assert parse_recipe(raw(phases=phases, teacher={"kind": "peer"})).start_of("mutual") is None

    def test_a_companion_teaches_one_phase(self) -> None:
        mutual = {"objectives": ["labels", "mutual"], "start": "fresh", "companion": {"kind": "peer"}}
        recipe = parse_recipe(raw(phases={**raw()["phases"], "mutual": mutual}))
        assert recipe.companion_of("mutual") == recipe.phases["mutual"].companion
        assert recipe.companion_of("distill") is None
        assert recipe.teacher_arms == ("finetune", "distill")
        wrong = raw(phases={**raw()["phases"], "mutual": mutual}, chain={"phase": "mutual"})
        assert problems_of(wrong)[0].endswith("this phase has a companion of its own")

    def test_the_phase_teacher_trains_a_member(self) -> None:
        own = raw()["student"] | {"kind": "cvlm"}
        phases = {"teacher": {"objectives": ["labels"]}, **raw()["phases"]}
        members = [{"kind": "saved", "path": "a"}, own]
        recipe = parse_recipe(raw(teacher={"kind": "ensemble", "members": members}, phases=phases))
        assert isinstance(recipe.trained_teacher, CvlmTeacherSpec)
        (line,) = problems_of(raw(teacher={"kind": "ensemble", "members": [own, own]}, phases=phases))
        assert line.startswith("teacher: the phase 'teacher' trains one member of kind cvlm")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"chain": {"phase": "distil"}}, "chain.phase is 'distil', which is no student phase (finetune, distill)"),
            ({"chain": {"phase": "distill", "rounds": 0}}, "chain.rounds: Input should be greater than or equal to 1"),
            (
                {
                    "chain": {"phase": "distill"},
                    "phases": {**raw()["phases"], "distill_chain1": raw()["phases"]["distill"]},
                },
                "the chain makes the arm(s) distill_chain1, and phases of that name exist",
            ),
            ({"chain": {"phase": "distill"}, "teacher": {"kind": "ema"}}, "has a companion of its own"),
            ({"teacher": {"kind": "ema", "decay": 1}}, "teacher.decay: Input should be less than 1 (got 1)"),
            ({"teacher": {"kind": "peer", "number": 0}}, "teacher.number: Input should be greater than or equal to 1"),
            (
                {"teacher": {"kind": "peer", "student": {**raw()["student"], "depth": 1}}},
                "teacher.student.depth: unknown key",
            ),
            ({"teacher": {"kind": "table", "path": "t", "skip": 1}}, "teacher.skip: Input should be less than 1"),
            (
                {"teacher": {"kind": "callable", "target": "a:b", "gives": "x"}},
                "teacher.gives: Input should be 'logits'",
            ),
            (
                {"teacher": {"kind": "ema"}, "initialise_fusion": "teacher"},
                "a teacher of kind ema has no fusion module to begin with",
            ),
            (
                {
                    "teacher": {"kind": "table", "path": "t.npz"},
                    "data": {"kind": "stream", "train": "a.tar", "samples": 9, "test": "out"},
                },
                "a teacher of kind table needs data whose pairs are known beforehand, not kind: stream",
            ),
            ({"phases": {"fresh": {"objectives": ["labels"]}}}, "'fresh' names a new student"),
        ],
    )
    def test_what_does_not_fit(self, changes: dict[str, Any], message: str) -> None:
        (line,) = problems_of(raw(**changes))
        assert message in line

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"members": [{"kind": "saved", "path": "a"}]}, "teacher.members: Tuple should have at least 2 items"),
            ({"weights": [1]}, "teacher: weights has 1 numbers for 2 members; give one for each"),
            ({"weights": [1, 0]}, "teacher.weights.1: Input should be greater than 0 (got 0)"),
            ({"attention": 2}, "teacher: attention is 2; members are counted from 0 to 1"),
            (
                {"members": [{"kind": "saved", "path": "a"}] * 2 + [{"kind": "ema"}]},
                "teacher.members.2: Input tag 'ema'",
            ),
            (
                {"members": [{"kind": "saved", "path": "a"}] * 2 + [{"kind": "table"}]},
                "teacher.members.2.path: this key",
            ),
        ],
    )
    def test_members_that_do_not_fit(self, changes: dict[str, Any], message: str) -> None:
        members = [{"kind": "saved", "path": "a"}, {"kind": "callable", "target": "a:b"}]
        (line,) = problems_of(raw(teacher={"kind": "ensemble", "members": members, **changes}))
        assert message in line


class TestObjectives:
    def test_a_bare_name_and_a_mapping(self) -> None:
        first, second = parse_recipe(raw()).phases["distill"].objectives
        assert first == ObjectiveSpec(kind="labels")
        assert (second.kind, second.weight, second.settings) == ("logits", 0.5, {"temperature": 3.0})

    def test_weights_are_not_negative(self) -> None:
        phases = {"finetune": {"objectives": [{"kind": "labels", "weight": -1}]}}
        (line,) = problems_of(raw(phases=phases))
        assert line.startswith("phases.finetune.objectives.0.weight: weight is -1, it must be finite and not negative")


class TestOverrides:
    def test_values_are_yaml_and_places_may_be_new(self, file: Path) -> None:
        recipe = load_recipe(
            file,
            [
                "seeds=[4, 5]",
                "data.labelled=1.0e-1",
                "engine.precision=bf16",
                "student.fusion.width=64",
                "phases.distill.objectives.1.temperature=4",
                "phases.distill.objectives.0={kind: labels, weight: 2}",
                "teacher=null",
            ],
        )
        assert recipe.seeds == (4, 5)
        assert recipe.data.labelled == 0.1
        assert recipe.engine.precision == "bf16"
        assert recipe.student.fusion.width == 64
        assert recipe.phases["distill"].objectives[1].settings == {"temperature": 4}
        assert recipe.phases["distill"].objectives[0].weight == 2
        assert recipe.teacher is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seeds", r"override 'seeds' must read key=value"),
            ("=3", r"override '=3' must read key=value"),
            ("seeds=[0", r"the value is not valid YAML"),
            ("task.kind=vqa", r"'task' holds 'vqa', which has no keys"),
            ("task.kind.name=vqa", r"'kind' is below a value that has no keys"),
            ("phases.distill.objectives.7.weight=1", r"'7' is no index into a list of 2"),
            ("phases.distill.objectives.-1=labels", r"'-1' is no index into a list of 2"),
            ("phases.distill.objectives.²=labels", r"'²' is no index into a list of 2"),
        ],
    )
    def test_bad_ones_say_what_is_wrong(self, file: Path, override: str, message: str) -> None:
        with pytest.raises(CvlmError, match=message):
            load_recipe(file, [override])

    def test_a_misspelt_one_is_an_unknown_key(self, file: Path) -> None:
        with pytest.raises(CvlmError, match=r"engin: unknown key; did you mean 'engine'\?"):
            load_recipe(file, ["engin.precision=bf16"])


class TestFiles:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CvlmError, match=r"cannot read the recipe .*nothing\.yaml: No such file"):
            load_recipe(tmp_path / "nothing.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("task: [vqa", "is not valid YAML"),
            ("- a\n- b", "must hold a mapping with the keys task, data, student"),
            ("", "must hold a mapping"),
            ("task: vqa\ntask: retrieval", "the key 'task' stands twice"),
            ("phases:\n  a: {start: b, start: c}", "the key 'start' stands twice"),
        ],
    )
    def test_files_that_are_no_recipe(self, file: Path, text: str, message: str) -> None:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(CvlmError, match=message):
            load_recipe(file)

    def test_anchors_may_be_merged(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8") + "\n"
        text = text.replace("phases:\n  finetune:\n", "phases:\n  finetune: &base\n") + "  more:\n    <<: *base\n"
        file.write_text(text.replace("  more:", "    start: finetune\n  more:", 1), encoding="utf-8")
        raw_text = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert raw_text["phases"]["more"]["objectives"] == ["labels"]
        assert load_recipe(file).student_arms == ("finetune", "distill", "more")

    def test_binary_is_no_recipe(self, file: Path) -> None:
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CvlmError, match="is not valid YAML"):
            load_recipe(file)


def test_specifications_never_change() -> None:
    recipe: Any = parse_recipe(raw())
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.task = "retrieval"


def test_nearest_names() -> None:
    assert nearest("labls", ["labels", "logits"]) == " (did you mean 'labels'?)"
    assert nearest("zzz", ["labels", "logits"]) == ""
    error = unknown_name("objective", "logit", ["logits", "labels"])
    assert str(error) == "unknown objective 'logit' (did you mean 'logits'?). Known: labels, logits."


def test_recipes_know_every_task() -> None:
    assert set(TASK_NAMES) == set(TASKS)
