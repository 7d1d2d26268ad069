"""The best adapters of each task, and a training that goes on where it was stopped."""

import csv
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, ValidationHandler, from_engine
from torch.utils.data import DataLoader

from blosam_monai.__main__ import main
from blosam_monai.engines.bilevel_trainer import prepare_embedding_batch
from blosam_monai.engines.case_evaluator import DONE, FAILED, KEPT, Case
from blosam_monai.handlers import (
    AdapterState,
    BestAdapters,
    CaseTableHandler,
    CurvesHandler,
    ManifestHandler,
    TrainingState,
    check_preset,
)
from blosam_monai.networks.adapters import read_adapters
from blosam_monai.networks.prompt_sam import PromptSam
from blosam_monai.report import collect


@pytest.fixture
def network() -> PromptSam:
    return PromptSam("tiny", 64, "random", tasks=("lung", "heart"))


class ScriptedRun:
    """A trainer and an evaluator whose scores are given; after epoch n every trained number is n."""

    def __init__(self, network: PromptSam, path: Path, *, selection: str) -> None:
        self.network, self.path = network, path
        self.trainer, self.evaluator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
        self.best = BestAdapters(network, path, {}, selection=selection, evaluator=self.evaluator)
        self.best.attach(self.trainer)

    def epoch(self, number: int, *cases: tuple[float, float]) -> None:
        """One epoch, then a validation with these Dice of the two tasks, case by case."""
        with torch.no_grad():
            for p in (*self.network.lower_parameters(), *self.network.upper_parameters()):
                p.fill_(float(number))
        self.trainer.state.epoch = self.evaluator.state.epoch = number
        self.evaluator.state.metric_details = {"val_mean_dice": torch.tensor(cases)}
        self.evaluator.fire_event(Events.EPOCH_COMPLETED)

    def finish(self) -> None:
        self.trainer.fire_event(Events.COMPLETED)

    def written(self) -> dict[str, set[float]]:
        """The epoch, or epochs, that the numbers in the file come from, task by task."""
        state, _ = read_adapters(self.path)
        return {name: {v for p in state.values() for v in p[t].unique().tolist()} for t, name in enumerate(self.tasks)}

    @property
    def tasks(self) -> list[str]:
        return self.network.tasks


def test_each_task_keeps_its_own_best_epoch(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    for number, dice in enumerate([(0.1, 0.2), (0.8, 0.3), (0.5, 0.6), (0.7, 0.9), (0.6, 0.1)]):
        run.epoch(number, dice)
    run.finish()
    assert run.written() == {"lung": {1.0}, "heart": {3.0}}


def test_the_file_says_which_epoch_and_dice_each_task_was_chosen_for(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    run.epoch(1, (0.5, 0.25))
    run.epoch(2, (0.25, 0.5))
    run.finish()
    settings = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert settings["selection"] == "validation"
    assert settings["selected_epoch"] == {"lung": 1, "heart": 2}
    assert settings["selected_dice"] == {"lung": 0.5, "heart": 0.5}


def test_the_earlier_of_two_equal_scores_is_kept(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    for number in (1, 2):
        run.epoch(number, (0.5, 0.5))
    run.finish()
    assert run.written() == {"lung": {1.0}, "heart": {1.0}}


def test_a_score_is_the_mean_over_cases_that_have_one(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    run.epoch(1, (0.6, 0.2), (0.2, math.nan))  # means 0.4 and 0.2
    run.epoch(2, (0.5, 0.1), (0.1, 0.1))  # means 0.3 and 0.1
    run.finish()
    assert run.written() == {"lung": {1.0}, "heart": {1.0}}


def test_the_file_holds_the_best_so_far_before_the_training_ends(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    run.epoch(1, (0.8, 0.3))
    run.epoch(2, (0.5, 0.6))
    assert run.written() == {"lung": {1.0}, "heart": {2.0}}


def test_selection_last_takes_the_last_epoch_whatever_the_scores(network, tmp_path):
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="last")
    run.epoch(1, (0.9, 0.9))
    run.epoch(2, (0.1, 0.1))
    run.finish()
    assert run.written() == {"lung": {2.0}, "heart": {2.0}}


def test_tasks_that_share_tensors_keep_the_epoch_of_their_best_mean(tmp_path):
    """Means 0.5, 0.6, 0.55; each task's own best would be the first and the second epoch."""
    network = PromptSam("tiny", 64, "random", tasks=("lung", "heart"), train_encoder="lora", prompt="none")
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="validation")
    for number, dice in ((1, (0.9, 0.1)), (2, (0.4, 0.8)), (3, (0.8, 0.3))):
        run.epoch(number, dice)
    run.finish()
    state, settings = read_adapters(run.path)
    assert {v for p in state.values() for v in p.unique().tolist()} == {2.0}
    assert settings["selected_epoch"] == {"lung": 2, "heart": 2}
    assert settings["selected_dice"] == pytest.approx({"lung": 0.6, "heart": 0.6})


def test_the_file_of_learned_ranks_holds_no_gates_and_the_ranks_are_logged(tmp_path, caplog):
    network = PromptSam("tiny", 64, "random", tasks=("lung", "heart"), train_decoder="gated", lora_rank=3)
    run = ScriptedRun(network, tmp_path / "model.safetensors", selection="last")
    run.epoch(2, (0.5, 0.5))
    gates = [p for name, p in network.decoder.phi.items() if name.endswith("gate")]
    gates[0].data[0, 1:] = 0  # of three gates the first task keeps one
    with caplog.at_level(logging.INFO, logger="blosam_monai.handlers"):
        run.finish()
    state, settings = read_adapters(run.path)
    assert not [name for name in state if name.endswith("gate")]
    assert (settings["train_decoder"], settings["lora_rank"]) == ("lora", [3] * 14)
    first, *others = [record.getMessage() for record in caplog.records if "effective rank" in record.getMessage()]
    assert first.endswith(": 1, 3")
    assert len(others) == 13
    b = next(value for name, value in state.items() if name.endswith("lora_b"))
    assert [value.unique().tolist() for value in b[0].unbind(1)] == [[4.0], [0.0], [0.0]]  # B times gate, 2 times 2


@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_the_state_of_a_training_holds_all_that_trains(how):
    network = PromptSam("tiny", 64, "random", tasks=("lung", "heart"), train_encoder=how)
    state = {name: value.clone() for name, value in AdapterState(network).state_dict().items()}
    trained = (*network.lower_parameters(), *network.upper_parameters())
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in trained)
    for p in trained:
        p.data += 1
    AdapterState(network).load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in AdapterState(network).state_dict().items())


def test_a_method_whose_preset_was_not_loaded_is_refused():
    check_preset("samed", "samed")
    with pytest.raises(ValueError, match=r"method: samed was asked for, the configs are those of blosam; add configs/"):
        check_preset("samed", "blosam")


@pytest.mark.parametrize("cases", [1, 3])
def test_the_untrained_network_and_the_last_epoch_are_judged_once_each_under_their_own_numbers(
    network, tmp_path, cases
):
    """With the evaluator of MONAI, which makes its own count of epochs from the number it is run at."""
    items = [{"embedding": torch.zeros(128, 8, 8), "label": torch.ones(2, 32, 32)}] * cases
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(items),
        network=network.decoder,
        prepare_batch=prepare_embedding_batch,
        key_val_metric={"val_mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )
    trainer, judged = Engine(lambda engine, batch: None), []
    ValidationHandler(interval=5, validator=evaluator, exec_at_start=True).attach(trainer)
    best = BestAdapters(network, tmp_path / "model.safetensors", {}, selection="validation", evaluator=evaluator)
    best.attach(trainer)
    evaluator.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: judged.append((evaluator.state.epoch, trainer.state.epoch))
    )
    trainer.run([0, 0], max_epochs=1)
    assert judged == [(0, 0), (1, 1)]
    assert best.epoch.tolist() == [0, 0]  # it did not change, and the earlier of equals is kept


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("validation", "selection: validation needs a validation set that is not empty; use last"),
        ("best", "selection: 'best' is not one of last, upper, validation"),
    ],
)
def test_a_selection_that_nothing_can_score_is_refused(network, tmp_path, selection, message):
    with pytest.raises(ValueError, match=message):
        BestAdapters(network, tmp_path / "model.safetensors", {}, selection=selection, evaluator=None)


def test_a_resumed_run_does_not_replace_a_better_model_by_a_worse_one(network, tmp_path):
    path = tmp_path / "model.safetensors"
    first = ScriptedRun(network, path, selection="validation")
    first.epoch(1, (0.9, 0.4))
    first.trainer.state.max_epochs = 3
    TrainingState(tmp_path / "state.pt", {"best": first.best}, {}).save(first.trainer)

    second = ScriptedRun(network, path, selection="validation")
    second.trainer.state.epoch_length = 1
    TrainingState(tmp_path / "state.pt", {"best": second.best}, {}).attach(second.trainer, resume=True)
    second.epoch(2, (0.5, 0.5))
    second.finish()
    assert second.written() == {"lung": {1.0}, "heart": {2.0}}


def test_the_state_is_saved_at_its_interval_and_after_the_last_epoch(tmp_path):
    trainer = Engine(lambda engine, batch: None)
    saved = []
    state = TrainingState(tmp_path / "state.pt", {}, {}, interval=2)
    state.attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def note() -> None:
        path = tmp_path / "state.pt"
        saved.append(torch.load(path, weights_only=True)["epoch"] if path.exists() else None)

    trainer.run([0], max_epochs=5)
    assert saved == [None, 2, 2, 4, 5]


class ScriptedEvaluator(Engine):
    """Its Dice of the two tasks is a tenth and a hundredth of the epoch it is run at; its own count is always 1."""

    def __init__(self) -> None:
        super().__init__(lambda engine, batch: None)

    def run(self, epoch: int) -> None:
        self.state.metric_details = {"lower_mean_dice": torch.tensor([[epoch / 10, epoch / 100]])}
        super().run([0], max_epochs=1)


def train_with_curves(folder: Path, *, stop: int | None = None, resume: bool = False) -> list[dict[str, str]]:
    """Five epochs of two iterations, measured at 0, 2, 4 and the end; the loss is a tenth of the iteration's number."""

    def step(engine: Engine, batch: object) -> list[dict[str, float]]:
        if engine.state.epoch == stop:
            raise KeyboardInterrupt
        return [{"loss": engine.state.iteration / 10, "upper_loss": 1.0}]

    trainer, evaluator = Engine(step), ScriptedEvaluator()
    trainer.state.max_epochs, trainer.state.epoch_length = 5, 2
    if not resume:
        trainer.add_event_handler(Events.STARTED, lambda: evaluator.run(0))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda: evaluator.run(trainer.state.epoch))
    curves = CurvesHandler(folder, ["lung", "heart"], {"lower": evaluator, "validation": None})
    curves.attach(trainer)
    TrainingState(folder / "state.pt", {"curves": curves}, {}, interval=2).attach(trainer, resume=resume)
    trainer.run([0, 0])
    with open(folder / "curves.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_curves_have_a_line_an_epoch_with_mean_losses_and_dice_where_it_was_measured(tmp_path):
    rows = train_with_curves(tmp_path)
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[0]["loss"] == ""
    assert [float(row["loss"]) for row in rows[1:]] == pytest.approx([0.15, 0.35, 0.55, 0.75, 0.95])
    assert [row["lower_dice/heart"] and round(float(row["lower_dice/heart"]), 6) for row in rows] == [
        *(0.0, "", 0.02, "", 0.04),
        0.05,  # the end is measured too
    ]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_curves_of_a_killed_training_lose_and_double_no_epoch(tmp_path, stop):
    whole = train_with_curves(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_with_curves(tmp_path / "killed", stop=stop)
    assert train_with_curves(tmp_path / "killed", resume=True) == whole


def test_an_interrupted_training_leaves_the_curves_to_its_last_measurement(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_with_curves(tmp_path, stop=4)
    assert (tmp_path / "curves.csv").read_text().splitlines()[-1].startswith("2,0.35,1.0,")


def manifest_of(folder: Path, status: str, **options: object) -> dict:
    """The line of one case of this status."""
    handler = ManifestHandler(folder, model={"model_sha256": "ab"}, **options)
    handler.note(SimpleNamespace(cases=[Case(1, {"image": folder / "gone.png"}, status, 0.5)]))
    return json.loads((folder / "manifest.jsonl").read_text())


@pytest.mark.parametrize(("status", "model"), [(DONE, "ab"), (FAILED, "ab"), (KEPT, None)])
def test_the_line_of_a_kept_result_does_not_claim_it_for_the_present_model(tmp_path, status, model):
    assert manifest_of(tmp_path, status).get("model_sha256") == model


def test_the_lines_of_an_evaluation_say_its_section(tmp_path):
    assert manifest_of(tmp_path, FAILED, section="testing")["section"] == "testing"


@pytest.mark.parametrize(
    ("section", "supports", "said"),
    [
        ("testing", ["0123456789ab_slice004"], ["1 of the cases were trained on: the scores may be too high"]),
        ("testing", ["ba9876543210"], []),
        ("upper", ["0123456789ab"], []),
    ],
)
def test_scores_of_cases_that_were_trained_on_are_warned_of(tmp_path, caplog, section, supports, said):
    table = CaseTableHandler(tmp_path, ["lung"], {"supports": supports})
    scores = dict.fromkeys(("dice", "iou", "hd95", "nsd", "volume_error_ml"), 0.5)
    case = {"case": "x", "case_id": "0123456789ab", "subject": "x", "section": section, "task": "lung", "unit": "mm"}
    table.rows.append(case | scores | {"label_empty": 0, "pred_empty": 0})
    with caplog.at_level(logging.WARNING):
        table.write(Engine(lambda engine, batch: None))
    assert [record.getMessage() for record in caplog.records] == said


RUNS = {
    "validation": {"selection": "validation", "hypergradient": "first_order"},
    "crossfit": {"selection": "last", "crossfit": "true"},
}


def train(phantoms: Path, output_dir: Path, **options: object) -> int:
    """A training of the bundle of four epochs at 64 pixels; returns the exit status."""
    settings = {
        "data_list": phantoms / "list.json",
        "dataset_dir": phantoms,
        "output_dir": output_dir,
        "image_size": 64,
        "max_epochs": 4,
        "val_interval": 1,
        "use_mlflow": "false",
        **options,
    }
    return main(["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))])


@pytest.fixture(scope="module", params=RUNS)
def finished(request, phantoms, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A training that ran through, and its options. Shared: tests must not change it."""
    output_dir = tmp_path_factory.mktemp(request.param) / "out"
    assert train(phantoms, output_dir, **RUNS[request.param]) == 0
    return output_dir, RUNS[request.param]


@pytest.fixture
def done(finished, tmp_path) -> Path:
    """A copy of a finished training."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same(found, expected, where: str = "state") -> None:
    """Equal to the bit, through dictionaries and lists."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}.{i}")
    else:
        assert found == expected, where


def stop_after(monkeypatch, epoch: int) -> None:
    save = TrainingState.save

    def save_and_stop(self, engine):
        save(self, engine)
        if engine.state.epoch == epoch:
            raise RuntimeError("the power is gone")

    monkeypatch.setattr(TrainingState, "save", save_and_stop)


@pytest.fixture(scope="module")
def resumed(finished, phantoms, tmp_path_factory) -> Path:
    """The same training stopped after its second epoch, and resumed."""
    output_dir = tmp_path_factory.mktemp("resumed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(RuntimeError) as stopped:
            train(phantoms, output_dir, **finished[1])
    assert "the power is gone" in str(stopped.getrepr(chain=True))
    assert train(phantoms, output_dir, **finished[1], resume="true") == 0
    return output_dir


def test_a_resumed_training_ends_with_the_same_model_to_the_bit(finished, resumed):
    model = Path("models", "model.safetensors")
    assert (resumed / model).read_bytes() == (finished[0] / model).read_bytes()


def test_a_resumed_training_ends_in_the_same_state_to_the_bit(finished, resumed):
    states = [torch.load(folder / "models" / "state.pt", weights_only=True) for folder in (resumed, finished[0])]
    assert_same(*states)


def test_a_resumed_training_has_the_same_table_of_cases(finished, resumed):
    assert (resumed / "cases.csv").read_bytes() == (finished[0] / "cases.csv").read_bytes()


def test_a_resumed_training_has_the_same_curves(finished, resumed):
    assert (resumed / "curves.csv").read_bytes() == (finished[0] / "curves.csv").read_bytes()


def test_resuming_a_finished_training_changes_nothing(finished, done, phantoms):
    assert train(phantoms, done, **finished[1], resume="true") == 0
    before, after = files_of(finished[0]), files_of(done)
    assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []


# What follows does not depend on the options of the training: one of the two is enough.
one_training = pytest.mark.parametrize("finished", ["crossfit"], indirect=True)


@one_training
def test_the_curves_end_at_the_dice_of_the_table_of_cases(finished):
    """Both are of the last epoch; the table is scored case by case in other code."""
    folder, _ = finished
    last = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))[-1]
    table = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    for section in ("lower", "upper", "validation"):
        for task in ("lung", "heart"):
            dice = [row["dice"] for row in table if row["section"] == section and row["task"] == task]
            assert len(dice) == 2
            assert float(last[f"{section}_dice/{task}"]) == pytest.approx(sum(dice) / 2, abs=1e-6)


def refusal(capsys, status: int) -> str:
    """The one line in which the command line says why it refused."""
    assert status == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blosam: ")]
    assert len(lines) == 1
    return lines[0]


@one_training
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lower_lr": "0.001"}, "resume: lower_lr was 0.005 and is now 0.001; go on with the same settings"),
        ({"max_epochs": "6"}, "resume: max_epochs was 4 and is now 6"),
        ({"hypergradient": "exact"}, "resume: hypergradient was 'first_order' and is now 'exact'"),
    ],
)
def test_a_changed_setting_is_refused_by_name_and_nothing_is_touched(
    finished, done, phantoms, capsys, changed, message
):
    line = refusal(capsys, train(phantoms, done, **finished[1], **changed, resume="true"))
    assert message in line
    assert files_of(done) == files_of(finished[0])


@one_training
def test_a_missing_state_file_is_named(finished, done, phantoms, capsys):
    path = done / "models" / "state.pt"
    path.unlink()
    line = refusal(capsys, train(phantoms, done, **finished[1], resume="true"))
    assert line == f"blosam: resume: {path} does not exist; start without resume."


@one_training
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_state_file_is_named(finished, done, phantoms, capsys, share):
    path = done / "models" / "state.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    line = refusal(capsys, train(phantoms, done, **finished[1], resume="true"))
    assert line.startswith(f"blosam: resume: {path} is damaged")


@one_training
def test_a_second_training_into_the_same_folder_is_refused_and_nothing_is_touched(finished, done, phantoms, capsys):
    line = refusal(capsys, train(phantoms, done, **finished[1]))
    assert line.startswith(f"blosam: output_dir: {done / 'models'} holds an earlier training; choose another")
    assert files_of(done) == files_of(finished[0])


@one_training
def test_overwrite_replaces_an_earlier_training(finished, done, phantoms):
    assert train(phantoms, done, **finished[1], overwrite="true", max_epochs=1) == 0
    assert torch.load(done / "models" / "state.pt", weights_only=True)["epoch"] == 1


@one_training
def test_a_training_that_replaces_another_and_is_stopped_leaves_nothing_of_the_former(
    finished, done, phantoms, monkeypatch
):
    assert list((done / "overlays").glob("*.png"))
    stop_after(monkeypatch, 1)
    with pytest.raises(RuntimeError):
        train(phantoms, done, **finished[1], overwrite="true", val_interval=2)
    assert [name for name in files_of(done) if not name.startswith("mlruns")] == []
    with pytest.raises(ValueError, match="give the output_dir of a training that has ended"):
        collect(done)


@one_training
def test_the_summary_says_the_hash_of_the_model_wherever_it_is_kept(finished, done, phantoms, tmp_path):
    """A resumed training that is done only scores: its state and its model are in another folder now."""
    (done / "models").rename(tmp_path / "elsewhere")
    assert train(phantoms, done, **finished[1], ckpt_dir=tmp_path / "elsewhere", resume="true") == 0
    model = (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    settings = json.loads((done / "summary.json").read_text(encoding="utf-8"))["settings"]
    assert settings["model_sha256"] == hashlib.sha256(model).hexdigest()


def test_selection_by_validation_without_a_validation_set_is_refused_before_anything_is_written(
    phantoms, tmp_path, capsys
):
    datalist = json.loads((phantoms / "list.json").read_text(encoding="utf-8"))
    datalist["testing"] += datalist["validation"]
    datalist["validation"] = []
    (tmp_path / "list.json").write_text(json.dumps(datalist), encoding="utf-8")
    status = train(phantoms, tmp_path / "out", data_list=tmp_path / "list.json", selection="validation")
    assert "selection: validation needs a validation set that is not empty; use last" in refusal(capsys, status)
    assert not (tmp_path / "out").exists()
