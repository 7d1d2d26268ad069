"""The report says what the tables say, to whom it may say it, in one file that a browser shows without complaint."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blosam_monai import report
from blosam_monai.__main__ import main
from blosam_monai.report import write_report

PATIENT = "Doe_Jane_1970"
DICE = {  # case -> Dice of lung, of heart; means 0.75, 0.45, 0.9
    f"{PATIENT}_a": (0.9, 0.6),
    f"{PATIENT}_b": (0.7, 0.2),
    f"{PATIENT}_c": (0.8, 1.0),
}
NUMBERS = {
    **{f"{score}_{n}": 0.5 for score in ("iou", "hd95", "nsd") for n in ("mean", "low", "high")},
    **{"volume_error_ml_mean": None, "cases": 3, "empty_labels": 0},
}
SETTINGS = {
    **{"tasks": ["lung", "heart"], "method": "blosam", "n_shot": 2, "crossfit": False, "sam_model": "tiny"},
    **{"sam_weights": "random", "data_list_name": "films", "torch_version": "2.13.0"},
}
MODEL = {"model_sha256": "ab" * 32, "sam_model": "vit_b", "sam_weights": "ec" * 32, "blosam_monai_version": "0.1.0"}


def case_id(name: str) -> str:
    """Twelve digits that stand for a case."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def rows(section: str, dice: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    fixed = {
        "section": section,
        "unit": "pixel",
        "iou": 0.5,
        "hd95": 3.0,
        "nsd": 0.5,
        "label_empty": 0,
        "pred_empty": 0,
    }
    return [
        {"case": name, "case_id": case_id(name), "subject": name, "task": task, "dice": value, **fixed}
        for name, values in dice.items()
        for task, value in zip(("lung", "heart"), values, strict=True)
    ]


def scores(dice: float, low: float | None = 0.71, high: float | None = 0.93) -> dict[str, Any]:
    numbers = NUMBERS | {"dice_mean": dice, "dice_low": low, "dice_high": high}
    return dict.fromkeys(("lung", "heart", "all"), numbers)


def write_tables(folder: Path, settings: dict[str, Any], by_section: dict[str, Any], table: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"scores": by_section, "settings": settings}))
    (folder / "cases.json").write_text(json.dumps(table))
    return folder


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (640, 320)) -> None:
    (folder / "overlays").mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(folder / "overlays" / f"{name}.png")


@pytest.fixture
def training(tmp_path) -> Path:
    """A training on two images with one for validation; its D1 reaches Dice 0.9, validation 0.6."""
    table = [
        *rows("lower", {"s1": (0.9, 0.9)}),
        *rows("upper", {"s2": (0.8, 0.8)}),
        *rows("validation", {"v": (0.6, 0.6)}),
    ]
    folder = write_tables(tmp_path / "training", SETTINGS, {"lower": scores(0.9), "validation": scores(0.6)}, table)
    dice = ",".join(f"{s}_dice/{task}" for s in ("lower", "upper", "validation") for task in ("lung", "heart"))
    (folder / "curves.csv").write_text(
        f"epoch,loss,upper_loss,{dice}\n0,,,0.1,0.1,0.1,0.1,0.1,0.1\n1,0.7,0.8,,,,,,\n2,0.25,0.5,0.9,0.9,0.8,0.8,0.6,0.6\n"
    )
    write_pictures(folder, ["s1", "s2", "v"])
    return folder


@pytest.fixture
def evaluation(tmp_path) -> Path:
    settings = SETTINGS | {"section": "testing", "failed_cases": 0}
    folder = write_tables(tmp_path / "evaluation", settings, {"testing": scores(0.7)}, rows("testing", DICE))
    write_pictures(folder, list(DICE))
    return folder


@pytest.fixture
def prediction(tmp_path) -> Path:
    """Two cases; the second failed, with ``log_paths``."""
    folder = tmp_path / "prediction"
    folder.mkdir()
    write_pictures(folder, ["x"])
    failed = {"error": f"/data/{PATIENT}.png: is damaged", "image": f"/data/{PATIENT}.png"}
    lines = [manifest_line(1, "x", "done", ["x.png"], **MODEL), manifest_line(2, "y", "failed", **failed, **MODEL)]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    return folder


def manifest_line(number: int, name: str, status: str, files: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A line of a manifest; ``files`` are the overlays that it wrote."""
    fixed = {"content": "overlay", "format": "picture", "task": None}
    outputs = [fixed | {"name_id": hashlib.sha256(file.encode()).hexdigest()[:12]} for file in files]
    line = {"number": number, "case_id": case_id(name), "status": status, "seconds": 0.25, "outputs": outputs}
    return line | {"notes": []} | more


def add_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    """The folder, with these lines at the end of its manifest."""
    folder.mkdir(exist_ok=True)
    with open(folder / "manifest.jsonl", "a", encoding="utf-8") as file:
        file.writelines(f"\n{json.dumps(line)}" for line in lines)
    return folder


class Page(HTMLParser):
    """What stands on a page: elements with their attributes, and the text that is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def cells(self, name: str) -> list[str | None]:
        return [cell["data-v"] for cell in self.all("td") if cell.get("data-name") == name]

    def pictures(self) -> list[Image.Image]:
        data = [(image["src"] or "").split("base64,")[1] for image in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]


def page_of(*folders: Path, **options: Any) -> Page:
    return Page(write_report(folders, overwrite=True, **options))


def test_cases_are_sorted_by_their_mean_dice_worst_first(evaluation):
    assert page_of(evaluation).cells("Case") == [case_id(f"{PATIENT}_{x}") for x in "bac"]
    assert [float(value) for value in page_of(evaluation).cells("Dice")] == pytest.approx([0.45, 0.75, 0.9])


def test_the_summary_shows_mean_and_interval(evaluation):
    assert "lung blosam 0.700 (0.71 to 0.93)" in page_of(evaluation).text


def test_where_there_is_no_interval_the_report_says_why(tmp_path):
    settings = SETTINGS | {"section": "testing"}
    table = rows("testing", {"a": (0.5, 0.5)})
    folder = write_tables(tmp_path / "x", settings, {"testing": scores(0.5, None, None)}, table)
    assert "no interval: fewer than two subjects" in page_of(folder).text


def test_the_gap_is_the_last_dice_of_d1_minus_the_held_out_one(training):
    text = page_of(training).text
    assert "Last epoch: lower loss 0.250, upper loss 0.500." in text
    assert (
        "Last epoch: D1 (lower) 0.900, D2 (upper) 0.800, held-out 0.600. Gap from D1 (lower) to held-out: 0.300."
        in text
    )


def test_there_is_a_curve_of_the_losses_and_one_of_each_task(training):
    page = page_of(training)
    assert len(page.all("svg")) == 3
    assert page.text.count("Gap from") == 2


def test_a_training_without_validation_has_no_held_out_curve_and_no_gap(training):
    lines = (training / "curves.csv").read_text().splitlines()
    (training / "curves.csv").write_text("\n".join(",".join(line.split(",")[:-2]) for line in lines))
    page = page_of(training)
    assert "The testing section is never looked at during training" in page.text
    assert "no overfitting gap: D1 and D2 both train" in page.text
    assert "Gap from" not in page.text


def test_the_supports_are_shown_with_their_halves(training):
    page = page_of(training)
    assert "Trained on 2 labelled images" in page.text
    assert f"D1 {case_id('s1')}" in page.text
    assert f"D2 {case_id('s2')}" in page.text
    assert sum("Labelled image" in (image["alt"] or "") for image in page.all("img")) == 2
    assert page.cells("Case") == [case_id("v")]


def test_random_weights_are_said_to_be_no_measure_of_accuracy(evaluation):
    assert "SAM weights: random (tiny). Nothing was pretrained" in page_of(evaluation).text


def test_the_hash_of_the_weights_is_said_in_full(prediction):
    assert f"SAM weights: vit_b , SHA-256 {'ec' * 32}" in page_of(prediction).text


@pytest.mark.parametrize("fixture", ["training", "evaluation", "prediction"])
def test_every_report_says_research_use_only(fixture, request):
    assert "Research use only, not a medical device" in page_of(request.getfixturevalue(fixture)).text


def test_no_patient_folder_or_file_is_named_unless_asked(training, evaluation, prediction, tmp_path):
    source = page_of(training, evaluation, prediction).source
    assert PATIENT not in source
    assert str(tmp_path) not in source
    named = page_of(evaluation, prediction, log_paths=True)
    assert named.cells("Case")[:3] == [f"{PATIENT}_{x}" for x in "bac"]
    assert f"/data/{PATIENT}.png: is damaged" in named.text
    assert str(evaluation) in named.text


def test_failed_cases_are_counted_and_said(prediction):
    page = page_of(prediction)
    assert f"1 case failed and is in no mean. case 2 ({case_id('y')}): see manifest.jsonl" in page.text
    assert "1 of 2 cases" in page.text
    assert page.cells("Status") == ["failed", "done"]


def test_the_overlay_of_a_prediction_is_found_by_the_hash_of_its_name(prediction):
    (image,) = page_of(prediction).all("img")
    assert case_id("x") in image["alt"]


def test_texts_are_escaped(evaluation):
    summary = json.loads((evaluation / "summary.json").read_text())
    summary["settings"] |= {"data_list_name": "<script>alert('a & b')</script>"}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    page = page_of(evaluation)
    assert len(page.all("script")) == 1  # that which sorts
    assert "<script>alert('a & b')</script>" in page.text


def test_the_page_loads_nothing_from_anywhere(training, evaluation, prediction):
    page = page_of(training, evaluation, prediction)
    links = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert re.findall(r"@import|url\((?!#)", page.source) == []
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_no_two_elements_share_an_id(training, evaluation):
    ids = [attributes["id"] for _, attributes in page_of(training, evaluation).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_pictures_are_made_small(evaluation):
    assert [image.size for image in page_of(evaluation).pictures()] == [(320, 160)] * 3


def test_only_the_worst_cases_have_a_picture_and_the_rest_is_counted(evaluation, monkeypatch):
    monkeypatch.setattr(report, "MAX_PICTURES", 2)
    page = page_of(evaluation)
    assert [case_id(f"{PATIENT}_{x}") in (i["alt"] or "") for i, x in zip(page.all("img"), "ba", strict=True)] == [
        True
    ] * 2
    assert "The 2 worst are shown; the pictures of the other 1 are in overlays" in page.text


def test_pictures_can_be_left_out(training):
    page = page_of(training, overlays=False)
    assert page.all("img") == []
    assert "Pictures were left out of this report" in page.text


def test_a_folder_that_keeps_no_pictures_says_so(evaluation):
    shutil.rmtree(evaluation / "overlays")
    assert "No pictures: the folder keeps none" in page_of(evaluation).text


def with_settings(folder: Path, **settings: Any) -> Path:
    """The folder, with these among the settings of its summary."""
    summary = json.loads((folder / "summary.json").read_text())
    summary["settings"] |= settings
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_model_has_one_name_in_its_training_and_its_evaluation(training, evaluation):
    assert "Training: blosam 1 Evaluation (testing): blosam 2 Settings" in page_of(training, evaluation).text
    text = page_of(*(with_settings(folder, model_sha256="cd" * 32) for folder in (training, evaluation))).text
    assert "Training: blosam Evaluation (testing): blosam Settings" in text
    assert "cd" * 32 in text


def test_two_evaluations_of_one_model_are_told_apart(evaluation, tmp_path):
    with_settings(evaluation, model_sha256="cd" * 32)
    page = page_of(evaluation, shutil.copytree(evaluation, tmp_path / "again"))
    for number in (1, 2):
        assert f"lung Evaluation (testing) {number}: blosam 0.700" in page.text
    assert "Evaluation (testing) 1: blosam Evaluation (testing) 2: blosam Settings" in page.text


def test_a_subject_has_one_number_in_all_folders_of_a_page(training, evaluation, tmp_path):
    """The training has three; the fourth is the first of the evaluation, and the only one of the last folder."""
    table = [row | {"subject": f"{PATIENT}_a"} for row in rows("testing", {"p": (0.5, 0.5), "q": (0.6, 0.6)})]
    again = write_tables(tmp_path / "x", SETTINGS | {"section": "testing"}, {"testing": scores(0.5)}, table)
    assert page_of(training, evaluation, again).cells("Subject") == ["subject 4", "subject 4"]


def test_cases_that_were_trained_on_are_counted_and_marked(evaluation):
    assert "trained on" not in page_of(evaluation).text
    supports = [case_id(f"{PATIENT}_a"), case_id(f"{PATIENT}_b") + "_slice007", "0" * 12]  # of b one slice
    text = page_of(with_settings(evaluation, supports=supports)).text
    assert "2 of these cases were trained on" in text
    assert text.count("was trained on") == 2
    assert "testing : not used in training, but for the cases that are marked" in text
    assert "lung blosam 2 cases trained on 0.700" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"method": "blosam"},
            "D1, the lower set, trains what adapts the network; D2, the upper set, trains the prompt",
        ),
        (
            {"method": "swap"},
            "D1, the lower set, trains the prompt; D2, the upper set, trains what adapts the network.",
        ),
        ({"method": "joint"}, "Joint fine-tuning: all of them train everything. Dice"),
        ({"method": "ssp", "levels": "joint", "head_options": {}}, "Each of them in turn is segmented by comparison"),
        ({"method": "arena", "levels": "alternate"}, "Joint fine-tuning, one kind of variable after the other: all of"),
        (
            {"crossfit": True},
            "trains the prompt and gates, if any (crossfit: the halves swap roles at every second iteration). Dice",
        ),
    ],
)
def test_what_each_half_trained_is_said_of_every_method(training, changed, said):
    assert said in page_of(with_settings(training, **changed)).text


def test_scores_with_prompts_from_the_label_are_called_so_wherever_they_stand(training):
    assert "oracle" not in page_of(training).text
    text = page_of(with_settings(training, method="med_sa", levels="joint", oracle="box")).text
    assert "Its scores show what a perfect prompt is worth" in text
    assert text.count("med_sa (oracle)") >= 3  # headline, summary, title of the run


def test_supports_keep_their_pictures_however_many_other_cases_are_worse(training, monkeypatch):
    monkeypatch.setattr(report, "MAX_PICTURES", 0)
    assert [(image["alt"] or "")[:14] for image in page_of(training).all("img")] == ["Labelled image"] * 2


def test_masks_that_were_kept_are_of_the_model_that_wrote_them(prediction):
    """``x`` was written by ab...; a run of cd... keeps it and writes ``z``, one of ef... finds nothing to do."""
    add_lines(
        prediction,
        manifest_line(1, "x", "kept"),
        manifest_line(2, "z", "done", ["z.png"], **MODEL | {"model_sha256": "cd" * 32}),
    )
    add_lines(prediction, manifest_line(1, "x", "kept"), manifest_line(2, "z", "kept"))
    text = page_of(prediction).text
    assert "The masks in this folder are by 2 models : abababababab , cdcdcdcdcdcd ." in text
    assert text.count("by model abababababab") == 1
    assert "by model cd" not in text
    assert f"model_sha256 {'cd' * 32}" in text


def test_masks_of_one_model_are_not_said_to_be_of_several(prediction):
    add_lines(prediction, manifest_line(1, "x", "kept"))
    text = page_of(prediction).text
    assert "The masks in this folder are by" not in text
    assert f"model_sha256 {'ab' * 32}" in text


def test_an_evaluation_in_which_every_case_failed_is_no_prediction(tmp_path):
    failed = manifest_line(1, "x", "failed", error="<file>: is damaged", section="testing", **MODEL)
    text = page_of(add_lines(tmp_path / "failed", failed)).text
    assert "Evaluation (testing): model 1 case failed" in text
    assert f"case 1 ({case_id('x')}): <file>: is damaged" in text
    assert "This evaluation left no scores." in text
    assert "Prediction" not in text


def test_what_differs_between_two_runs_is_marked(evaluation, tmp_path):
    settings = SETTINGS | {"section": "testing", "failed_cases": 0, "method": "joint"}
    other = write_tables(tmp_path / "other", settings, {"testing": scores(0.8)}, rows("testing", DICE))
    source = page_of(evaluation, other).source
    assert re.findall(r'<tr class="differs"><th scope="row">(\w+)<', source) == ["method"]
    assert "lung joint 0.800" in page_of(evaluation, other).text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "", "run: .* has no summary.json and no manifest.jsonl; give the output_dir"),
        (
            "manifest.jsonl",
            "5",
            r"run: \S+: its tables are damaged or of another version \(TypeError: .*\); run it again\.",
        ),
        ("manifest.jsonl", '{"a": 1}', r"its tables are damaged .*KeyError"),
        ("manifest.jsonl", b"\xff", "its tables are damaged .*UnicodeDecodeError"),
        ("manifest.jsonl", "", "its tables are damaged .*IndexError"),
    ],
)
def test_a_folder_that_cannot_be_reported_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "error"),
    [
        ("summary.json", None, '{"scores"', "JSONDecodeError"),
        ("summary.json", None, "{}", "KeyError: 'settings'"),
        ("summary.json", None, "[]", "TypeError"),
        ("summary.json", '"n_shot": 2, ', "", "KeyError: 'n_shot'"),
        ("summary.json", '"method": "blosam", ', "", "KeyError: 'method'"),
        ("summary.json", '"iou_mean": 0.5, ', "", "KeyError: 'iou_mean'"),
        ("summary.json", '"iou_mean": 0.5, ', '"iou_mean": "high", ', "ValueError"),
        ("cases.json", None, "[5]", "TypeError"),
        ("cases.json", '"task": "heart"', '"task": "liver"', "KeyError: 'heart'"),
        ("curves.csv", "0.25,", "low,", "ValueError"),
        ("curves.csv", "0.6,0.6", "0.6,0.6,0.6", "TypeError"),
        ("overlays/s1.png", None, "", "UnidentifiedImageError"),
    ],
)
def test_a_damaged_table_is_said_with_its_folder_in_one_line(training, name, old, new, error):
    path = training / name
    text = new if old is None else path.read_text().replace(old, new)
    assert text != path.read_bytes().decode(errors="replace")
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^run: {training}: its tables are damaged .*\({error}.*; run it again\.$"):
        write_report([training])


def test_the_verb_writes_once_and_again_only_if_told_to(training, evaluation, tmp_path, capsys):
    arguments = ["report", "--run", str(training), str(evaluation), "--output", str(tmp_path / "r.html")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'r.html'}\n"
    assert main(arguments) == 1
    assert "r.html exists; choose another, or add overwrite=true" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "true"]) == 0
    assert main(["report", "--run", str(training)]) == 0
    assert (training / "report.html").is_file()


def test_a_report_is_quick_to_begin():
    check = "import sys, blosam_monai.report; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_the_tables_of_real_runs_are_read(phantoms, tmp_path):
    run, of_run = tmp_path / "run", tmp_path / "scores"
    listed = ["--dataset_dir", str(phantoms), "--data_list", str(phantoms / "list.json"), "--use_mlflow", "false"]
    options = ["--image_size", "64", "--max_epochs", "2", "--val_interval", "1", "--sam_checkpoint", "random"]
    assert main(["train", *listed, "--output_dir", str(run), *options]) == 0
    assert main(["evaluate", *listed, "--model", str(run), "--output_dir", str(of_run)]) == 0
    first = (of_run / "manifest.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["section"] == "testing"  # by which an evaluation without scores is told
    images = str(phantoms / "images")
    assert main(["predict", "--model", str(run), "--input", images, "--output_dir", str(tmp_path / "masks")]) == 0
    page = page_of(run, of_run, tmp_path / "masks")
    listed_cases = json.loads((phantoms / "list.json").read_text())
    n_images = len(list((phantoms / "images").iterdir()))
    assert len(page.cells("Dice")) == len(listed_cases["validation"]) + len(listed_cases["testing"])
    assert len(page.cells("Status")) == n_images
    assert len(page.all("img")) == 2 * n_images  # each in its section of the list, and as a prediction
    assert "Prediction: blosam" in page.text
    assert hashlib.sha256((run / "models" / "model.safetensors").read_bytes()).hexdigest() in page.text


class Browser:
    """Headless Chromium: what a script finds on a page, and what the console said meanwhile."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr")

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def ask(self, source: str, script: str, *, width: int = 1280, dark: bool = False) -> tuple[Any, list[str]]:
        """Show the page in a frame of this width; the script is a function of the frame's window."""
        frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(source)}"></iframe>'
        probe = f"""{frame}<pre id="probe"></pre><script>
            f.onload = () => {{ probe.textContent = JSON.stringify(({script})(f.contentWindow)) }};</script>"""
        path = self.folder / "probe.html"
        path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{probe}", encoding="utf-8")
        flags = [*self.FLAGS, f"--user-data-dir={self.folder / 'profile'}", "--virtual-time-budget=5000"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        run = [self.program, *flags, "--dump-dom", path.as_uri()]
        done = subprocess.run(run, capture_output=True, text=True, encoding="utf-8", timeout=60, check=True)
        found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
        assert found, done.stderr[-2000:]
        return json.loads(html.unescape(found[1]) or "null"), [x for x in done.stderr.splitlines() if "CONSOLE" in x]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium; apt-get install chromium")
    return Browser(program, tmp_path_factory.mktemp("browser"))


@pytest.mark.slow
def test_the_browser_has_nothing_to_complain_about(browser, training, evaluation, prediction):
    source = page_of(training, evaluation, prediction).source
    assert browser.ask(source, "w => 1") == (1, [])
    _, complaints = browser.ask(source.replace("</body>", '<img src="https://x.invalid/a.png"></body>'), "w => 1")
    assert any("Content Security Policy" in line for line in complaints)


@pytest.mark.slow
def test_every_picture_is_seen(browser, training, evaluation):
    script = "w => [...w.document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width > 50])"
    found, _ = browser.ask(page_of(training, evaluation).source, script)
    assert found == [[320, True]] * 6


@pytest.mark.slow
def test_curves_are_drawn_over_their_whole_width(browser, training):
    script = "w => [...w.document.querySelectorAll('svg')].map(s => s.getBBox().width / s.viewBox.baseVal.width)"
    found, _ = browser.ask(page_of(training).source, script)
    assert len(found) == 3
    assert all(0.9 < share < 1.1 for share in found)


CLICKS = """w => {
  const state = () => [
    [...w.document.querySelectorAll(".cases tbody tr")].map(r => r.querySelector("code").textContent),
    [...w.document.querySelectorAll(".cases th[aria-sort]")].map(h => h.textContent + " " + h.ariaSort)];
  const click = name =>
    [...w.document.querySelectorAll(".cases thead button")].find(b => b.textContent === name).click();
  return [state(), ...%s.map(name => (click(name), state()))];
}"""


@pytest.mark.slow
def test_a_click_on_a_column_sorts_by_it_and_another_turns_it_round(browser, evaluation):
    found, complaints = browser.ask(page_of(evaluation).source, CLICKS % '["heart", "heart", "lung"]')
    a, b, c = (case_id(f"{PATIENT}_{x}") for x in "abc")
    assert found == [
        [[b, a, c], ["Dice ascending"]],
        [[b, a, c], ["heart ascending"]],  # 0.2, 0.6, 1.0
        [[c, a, b], ["heart descending"]],
        [[b, c, a], ["lung ascending"]],  # 0.7, 0.8, 0.9
    ]
    assert complaints == []


@pytest.mark.slow
def test_what_has_no_number_is_sorted_last_both_ways(browser, evaluation):
    table = json.loads((evaluation / "cases.json").read_text())
    for row in table:
        row["hd95"] = {"a": 30.0, "b": None, "c": 4.0}[row["case"][-1]]  # by number: as text 30 comes first
    (evaluation / "cases.json").write_text(json.dumps(table))
    found, _ = browser.ask(page_of(evaluation).source, CLICKS % '["HD95", "HD95"]')
    a, b, c = (case_id(f"{PATIENT}_{x}") for x in "abc")
    assert [order for order, _ in found[1:]] == [[c, a, b], [a, c, b]]


@pytest.mark.slow
def test_a_phone_does_not_scroll_sideways(browser, training, evaluation, prediction):
    script = "w => [w.innerWidth, w.document.documentElement.scrollWidth]"
    found, _ = browser.ask(page_of(training, evaluation, prediction).source, script, width=390)
    assert found[0] == 390
    assert found[1] <= 390


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_in_dark_in_the_curves_too(browser, training, dark):
    script = """w => {
      const [page, text] = ["body", "svg text"].map(name => w.getComputedStyle(w.document.querySelector(name)));
      return [page.color, text.fill, page.backgroundColor];
    }"""
    found, _ = browser.ask(page_of(training).source, script, dark=dark)
    text, in_curves, ground = (_luminance(colour) for colour in found)
    assert text == in_curves
    assert (ground < 0.5) == dark
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 7  # WCAG 2, level AAA


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, WCAG 2."""
    values = np.array([float(v) for v in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
