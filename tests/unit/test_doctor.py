"""`cvlm doctor` and the coverage it prints."""

from pathlib import Path

import pytest
import torch
from tiny_vlms import save_flava

from cvlm.cli.main import main
from distill.coverage import coverage
from distill.layout import ImageLayout, TextLayout
from distill.signal import Signal


def spans(*ends: int) -> TextLayout:
    starts = (0, *ends[:-1])
    rows = [(0, 0), *zip(starts, ends, strict=True), (0, 0)]
    return TextLayout(spans=torch.tensor([rows]))


class TestCoverage:
    def test_identical_layouts_keep_every_word(self) -> None:
        text, image = spans(3, 7, 9), ImageLayout(grid=(2, 2), special=1)
        even = torch.full((1, 2, 5, 5), 0.2)
        found = coverage(text, image, Signal(text_to_image={0: even}, text_layout=text, image_layout=image))
        assert (found.student_tokens, found.units, found.student_share, found.teacher_share) == (3, 3, 1, 1)
        assert found.grid == (2, 2)
        # One of the five keys is the class token.
        assert found.attention["text_to_image"] == pytest.approx(0.8)

    def test_mass_on_words_that_one_side_cut_off_has_no_counterpart(self) -> None:
        student, teacher = spans(3, 7), spans(3, 7, 9)
        image = ImageLayout(grid=(1, 2))
        even = torch.full((1, 1, 2, 5), 0.2)
        found = coverage(student, image, Signal(image_to_text={1: even}, text_layout=teacher, image_layout=image))
        assert found.teacher_share == pytest.approx(2 / 3)
        assert found.attention["image_to_text"] == pytest.approx(0.4)

    def test_unlike_grids_meet_on_the_coarser_one(self) -> None:
        text = spans(4)
        signal = Signal(text_layout=text, image_layout=ImageLayout(grid=(14, 7)))
        assert coverage(text, ImageLayout(grid=(7, 10)), signal).grid == (7, 7)

    def test_a_teacher_without_spans_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no text layout"):
            coverage(spans(4), ImageLayout(grid=(1, 1)), Signal())


class TestCommand:
    def test_the_machine_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        shown = capsys.readouterr().out
        assert "processor" in shown
        assert torch.__version__.split("+")[0] in shown

    def test_a_pair_and_a_teacher(
        self, bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cvlm.cli.doctor.SENTENCES", ("is the cat red?", "is the dog reddish?"))
        flava = save_flava(tmp_path / "flava")
        pair = ["--vision", "package:efficientnet_lite0", "--text", f"hf:{bert_folder}"]
        assert main(["doctor", *pair, "--teacher", str(flava)]) == 0
        shown = capsys.readouterr().out
        grid = next(line for line in shown.splitlines() if line.startswith("patch grid"))
        assert grid.split("  ")[-1].strip() == "4 x 4"
        share = next(line for line in shown.splitlines() if line.startswith("text_to_image:"))
        assert 0 < float(share.split()[1].rstrip("%")) <= 100

    def test_a_teacher_alone_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--teacher", "somewhere"]) == 2
        assert "--vision and --text" in capsys.readouterr().err

    def test_a_picture_that_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.png").write_text("no picture")
        assert main(["doctor", "--image", str(tmp_path / "a.png")]) == 2
        assert "cannot read the picture" in capsys.readouterr().err
