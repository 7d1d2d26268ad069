"""The bilevel trainer: who trains on what, in which order, and that nothing mixes."""

import copy
import logging
from collections import Counter

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.handlers import (
    CheckpointSaver,
    MeanDice,
    StatsHandler,
    ValidationHandler,
    from_engine,
)
from monai.transforms import AsDiscreted
from torch.utils.data import DataLoader, DistributedSampler

from blosam_monai.__main__ import main
from blosam_monai.data.embeddings import StackedDraws
from blosam_monai.engines.bilevel_trainer import (
    BilevelEvents,
    BilevelTrainer,
    prepare_embedding_batch,
    split_variables,
)
from blosam_monai.engines.hypergradient import METHODS
from blosam_monai.losses import TaskDiceCELoss
from blosam_monai.methods import BUNDLE
from blosam_monai.networks.prompt_decoder import PromptDecoder

LR = 5e-3


def make_items(count: int, *, tasks: int = 1, seed: int = 0, dtype=torch.float32) -> list[dict[str, torch.Tensor]]:
    """Random embeddings (256, 4, 4) and labels (T, 16, 16): image i has i + 1 rows of foreground more than task t."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i in range(count):
        label = torch.zeros(tasks, 16, 16, dtype=dtype)
        for t in range(tasks):
            label[t, t : t + i + 1] = 1
        items.append({"embedding": torch.randn(256, 4, 4, generator=generator, dtype=dtype), "label": label})
    return items


def make_loader(items, *, batch_size: int = 1) -> DataLoader:
    sampler = DistributedSampler(items, num_replicas=1, rank=0, seed=0)
    return DataLoader(items, batch_size=batch_size, sampler=sampler)


def make_trainer(
    decoder, lower, upper, *, epochs=2, loss=None, eps=1e-8, swap=False, device="cpu", **options
) -> BilevelTrainer:
    decoder = decoder.to(device)
    levels = [
        torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1, eps=eps)
        for parameters in (decoder.lower_parameters(), decoder.upper_parameters())
    ]
    return BilevelTrainer(
        device,
        epochs,
        make_loader(lower),
        decoder,
        *(reversed(levels) if swap else levels),
        RecordingLoss() if loss is None else loss,
        upper_data_loader=None if upper is None else make_loader(upper),
        **options,
    )


class RecordingLoss(TaskDiceCELoss):
    """Notes which image each call sees: the number of foreground rows of its first task, minus one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, input, target):
        self.seen.append(int(target[0, 0, :, 0].sum()) - 1)
        return super().forward(input, target)

    @property
    def levels(self) -> tuple[list[int], list[int]]:
        """Images of the lower and of the upper level: with first_order the calls take turns."""
        return self.seen[::2], self.seen[1::2]


def numbered(first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Images of these numbers, see ``RecordingLoss``."""
    return make_items(first + count)[first:]


@pytest.fixture
def decoder(small_sam) -> PromptDecoder:
    return PromptDecoder(small_sam)


def largest_difference(together: PromptDecoder, alone: list[PromptDecoder]) -> float:
    whole = together.adapter_state()
    parts = [one.adapter_state() for one in alone]
    return max((value - torch.cat([p[name] for p in parts])).abs().max().item() for name, value in whole.items())


# AdamW's first steps are nearly the sign of the gradient: an element whose gradient is all rounding steps either way.
# A larger eps leaves rounding as small as it is; with AdamW's own eps float64 has the room for it.
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "eps", "tolerance"),
    [(torch.float32, 1e-2, 1e-5), (torch.float64, 1e-8, 1e-8)],
    ids=["float32", "float64 and AdamW's own eps"],
)


@PRECISIONS
@pytest.mark.parametrize("method", METHODS)
def test_tasks_trained_together_equal_tasks_trained_apart(small_sam, method, dtype, eps, tolerance):
    lower, upper = make_items(2, tasks=2, dtype=dtype), make_items(2, tasks=2, seed=1, dtype=dtype)
    together = PromptDecoder(small_sam, tasks=2, seed=[0, 1]).to(dtype)
    make_trainer(together, lower, upper, hypergradient=method, eps=eps).run()
    alone = []
    for t in range(2):
        own = [[{**item, "label": item["label"][t : t + 1]} for item in half] for half in (lower, upper)]
        alone.append(PromptDecoder(small_sam, seed=t).to(dtype))
        make_trainer(alone[-1], *own, hypergradient=method, eps=eps).run()
    assert largest_difference(together, alone) <= tolerance


@PRECISIONS
@pytest.mark.parametrize("method", METHODS)
def test_draws_trained_as_tasks_equal_runs_of_their_own(small_sam, method, dtype, eps, tolerance):
    draws = [[make_items(2, seed=10 * r + half, dtype=dtype) for half in range(2)] for r in range(2)]
    together = PromptDecoder(small_sam, tasks=2).to(dtype)
    halves = [StackedDraws([draw[half] for draw in draws]) for half in range(2)]
    make_trainer(together, *halves, hypergradient=method, eps=eps).run()
    alone = [PromptDecoder(small_sam).to(dtype) for _ in draws]
    for one, draw in zip(alone, draws, strict=True):
        make_trainer(one, *draw, hypergradient=method, eps=eps).run()
    assert largest_difference(together, alone) <= tolerance


@pytest.mark.parametrize(("n_lower", "n_upper", "epochs"), [(2, 2, 3), (2, 3, 6), (1, 5, 10), (3, 1, 2)])
def test_both_levels_see_each_of_their_images_equally_often(decoder, n_lower, n_upper, epochs):
    trainer = make_trainer(decoder, numbered(0, n_lower), numbered(n_lower, n_upper), epochs=epochs)
    trainer.run()
    lower, upper = trainer.loss_function.levels
    iterations = n_lower * epochs
    assert Counter(lower) == dict.fromkeys(range(n_lower), epochs)
    assert Counter(upper) == {n_lower + i: iterations // n_upper for i in range(n_upper)}


def test_the_order_of_the_upper_images_changes_from_pass_to_pass(decoder):
    trainer = make_trainer(decoder, numbered(0, 1), numbered(1, 4), epochs=16)
    trainer.run()
    upper = trainer.loss_function.levels[1]
    assert len({tuple(upper[i : i + 4]) for i in range(0, 16, 4)}) > 1


def test_crossfit_swaps_the_halves_at_every_second_iteration(decoder):
    trainer = make_trainer(decoder, numbered(0, 2), numbered(2, 2), epochs=8, crossfit=True)
    trainer.run()
    lower, upper = trainer.loss_function.levels
    assert [i < 2 for i in lower] == [True, False] * 8
    assert [i < 2 for i in upper] == [False, True] * 8


def test_crossfit_lets_every_image_serve_both_levels(decoder):
    trainer = make_trainer(decoder, numbered(0, 2), numbered(2, 2), epochs=8, crossfit=True)
    trainer.run()
    lower, upper = trainer.loss_function.levels
    assert set(lower) == set(upper) == {0, 1, 2, 3}


def test_joint_training_moves_both_variables_on_the_same_images(decoder):
    before = copy.deepcopy(decoder.adapter_state())
    trainer = make_trainer(decoder, numbered(0, 4), None, epochs=2)
    trainer.run()
    assert Counter(trainer.loss_function.seen) == {0: 2, 1: 2, 2: 2, 3: 2}  # one loss an iteration
    assert all(not torch.equal(value, before[name]) for name, value in decoder.adapter_state().items())


def test_joint_training_takes_both_gradients_at_the_same_point(decoder):
    item = numbered(0, 1)[0]
    trainer = make_trainer(decoder, [item], None, epochs=1)
    start = copy.deepcopy(decoder)
    TaskDiceCELoss()(start(item["embedding"][None]), item["label"][None]).sum().backward()
    trainer.run()
    for p, q in zip(decoder.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def moved_by_level(trainer: BilevelTrainer, decoder: PromptDecoder) -> tuple[set[str], set[str]]:
    """Which of theta and phi the lower and the upper step of a training change."""
    moved: tuple[set[str], set[str]] = (set(), set())
    last = {}

    def compare(level: int | None) -> None:
        now = copy.deepcopy(decoder.adapter_state())
        if level is not None:
            moved[level].update(name.split(".")[0] for name in now if not torch.equal(now[name], last[name]))
        last.update(now)

    trainer.add_event_handler(Events.ITERATION_STARTED, compare, None)
    trainer.add_event_handler(BilevelEvents.LOWER_STEP_COMPLETED, compare, 0)
    trainer.add_event_handler(BilevelEvents.UPPER_STEP_COMPLETED, compare, 1)
    trainer.run()
    return moved


@pytest.mark.parametrize("method", METHODS)
def test_the_lower_step_moves_theta_alone_and_the_upper_step_phi_alone(decoder, method):
    trainer = make_trainer(decoder, make_items(2), make_items(2, seed=1), hypergradient=method)
    assert moved_by_level(trainer, decoder) == ({"theta"}, {"phi"})


@pytest.mark.parametrize("method", METHODS)
def test_exchanged_optimizers_exchange_the_levels(decoder, method):
    trainer = make_trainer(decoder, make_items(2), make_items(2, seed=1), hypergradient=method, swap=True)
    assert moved_by_level(trainer, decoder) == ({"phi"}, {"theta"})


@pytest.mark.parametrize("upper", [make_items(2, seed=1), None], ids=["bilevel", "joint"])
def test_events_fire_once_an_iteration_in_the_documented_order(decoder, upper):
    order = [
        Events.ITERATION_STARTED,
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        BilevelEvents.LOWER_STEP_COMPLETED,
        BilevelEvents.UPPER_BACKWARD_COMPLETED,
        BilevelEvents.UPPER_STEP_COMPLETED,
        IterationEvents.MODEL_COMPLETED,
        Events.ITERATION_COMPLETED,
    ]
    trainer = make_trainer(decoder, make_items(2), upper, epochs=2)
    fired = []
    for event in (*BilevelEvents, *IterationEvents, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, fired.append, event)
    trainer.run()
    assert fired == order * 4


def test_the_output_names_both_losses_and_both_norms(decoder):
    trainer = make_trainer(decoder, make_items(1), make_items(1, seed=1), epochs=1, decollate=False)
    trainer.run()
    output = trainer.state.output
    assert output["prompt_norm"].item() == pytest.approx(decoder.phi["dense_prompt"].norm().item(), rel=1e-6)
    assert output["hypergradient_norm"].item() == pytest.approx(
        decoder.phi["dense_prompt"].grad.norm().item(), rel=1e-6
    )
    assert output["pred"].shape == output["label"].shape == (1, 1, 16, 16)
    assert {"image", "loss", "upper_loss"} < output.keys()


def configured_handlers(decoder: PromptDecoder, iterations: int, **overrides):
    """Both optimizers, and the handlers of their learning rates, as the bundle's train.json builds them."""
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    parser.update({"theta": decoder.lower_parameters(), "phi": decoder.upper_parameters(), "iterations": iterations})
    parser["optimizer#params"], parser["upper_optimizer#params"] = "@theta", "@phi"  # without gates, as they are
    parser.update(overrides)
    handlers = [parser.get_parsed_content(f"train#handlers#{i}") for i in range(2)]
    return parser.get_parsed_content("optimizer"), parser.get_parsed_content("upper_optimizer"), handlers


def as_the_bundle_trains(decoder, epochs: int, **rates) -> tuple[BilevelTrainer, list]:
    """A trainer on two images a level, with the optimizers and schedules of the bundle."""
    lower, upper, handlers = configured_handlers(decoder, 2 * epochs, **rates)
    trainer = BilevelTrainer(
        "cpu",
        epochs,
        make_loader(make_items(2)),
        decoder,
        lower,
        upper,
        TaskDiceCELoss(),
        upper_data_loader=make_loader(make_items(2, seed=1)),
        train_handlers=handlers,
    )
    return trainer, [lower, upper]


def test_each_level_has_its_rate_which_decays_by_the_power_nine_tenths(decoder):
    trainer, optimizers = as_the_bundle_trains(decoder, 3, lower_lr=4e-3, upper_lr=1e-3)
    rates = []
    read = lambda: rates.append([opt.param_groups[0]["lr"] for opt in optimizers])
    trainer.add_event_handler(BilevelEvents.LOWER_STEP_COMPLETED, read)
    trainer.run()
    expected = [[lr0 * (1 - i / 6) ** 0.9 for lr0 in (4e-3, 1e-3)] for i in range(6)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), rtol=1e-9, atol=0)


def test_betas_and_weight_decay_stay_those_of_the_paper(decoder):
    trainer, (lower, upper) = as_the_bundle_trains(decoder, 2)
    trainer.run()
    for optimizer in (lower, upper):
        assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.999)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1


def make_evaluator(decoder: PromptDecoder) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(make_items(2, seed=2)),
        network=decoder,
        prepare_batch=prepare_embedding_batch,
        postprocessing=AsDiscreted("pred", threshold=0.0),
        key_val_metric={"val_mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )


def test_validation_runs_before_the_first_step_and_at_its_interval(decoder):
    evaluator = make_evaluator(decoder)
    validation = ValidationHandler(interval=2, validator=evaluator, exec_at_start=True)
    trainer = make_trainer(decoder, make_items(2), make_items(2, seed=1), epochs=4, train_handlers=[validation])
    when = []
    evaluator.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: when.append((evaluator.state.epoch, trainer.state.iteration))
    )
    trainer.run()
    assert when == [(0, 0), (2, 4), (4, 8)]


def test_the_stats_handler_of_monai_logs_the_lower_loss(decoder, caplog):
    stats = StatsHandler(name="stats", tag_name="lower_loss", output_transform=from_engine(["loss"], first=True))
    trainer = make_trainer(decoder, make_items(1), make_items(1, seed=1), epochs=1, train_handlers=[stats])
    logging.getLogger("stats").addHandler(caplog.handler)
    item = make_items(1)[0]
    before = TaskDiceCELoss()(decoder(item["embedding"][None]), item["label"][None]).item()
    trainer.run()
    assert f"lower_loss: {before:.4f}" in caplog.text


def test_the_checkpoint_saver_of_monai_saves_what_was_trained(decoder, tmp_path):
    saver = CheckpointSaver(save_dir=str(tmp_path), save_dict={"decoder": decoder}, save_final=True)
    make_trainer(decoder, make_items(1), make_items(1, seed=1), epochs=1, train_handlers=[saver]).run()
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in decoder.state_dict().items())


def test_a_finished_training_run_again_stays_as_it_is(decoder):
    trainer = make_trainer(decoder, make_items(1), make_items(1, seed=1), epochs=2)
    trainer.run()
    before = copy.deepcopy(decoder.adapter_state())
    trainer.run()
    assert trainer.state.iteration == 2
    assert all(torch.equal(value, before[name]) for name, value in decoder.adapter_state().items())


@pytest.mark.parametrize(
    ("options", "upper", "message"),
    [
        ({"hypergradient": "second_order"}, True, "hypergradient: 'second_order' is not one of first_order, fin"),
        ({"amp": True, "hypergradient": "exact"}, True, "amp: the hypergradient exact needs float32"),
        ({"amp": True, "hypergradient": "finite_difference"}, True, "the hypergradient finite_difference needs float"),
        ({"amp": True}, True, "amp: bfloat16 is offered on CUDA only, the device is cpu"),
        ({"crossfit": True}, False, "joint training has no upper level: drop crossfit"),
        ({"hypergradient": "exact"}, False, "joint training has no upper level: drop crossfit and hypergradient"),
        ({"hypergradient": "finite_difference"}, False, "joint training has no upper level"),
    ],
)
def test_options_that_do_not_go_together_are_refused(decoder, options, upper, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(decoder, make_items(1), make_items(1) if upper else None, **options)


def test_levels_that_share_a_parameter_are_refused(decoder):
    lower = torch.optim.AdamW([*decoder.lower_parameters(), *decoder.upper_parameters()])
    upper = torch.optim.AdamW(decoder.upper_parameters())
    loader = make_loader(make_items(1))
    with pytest.raises(ValueError, match=r"parameter sets \(\d+ and 1 tensors\) must be disjoint"):
        BilevelTrainer("cpu", 1, loader, decoder, lower, upper, TaskDiceCELoss(), upper_data_loader=loader)


# One level, and block after block


class Product(torch.nn.Module):
    """Logits theta * phi of one task: with a squared loss every step can be worked out by hand."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.theta = torch.nn.Parameter(torch.tensor([[1.0]]))
        self.phi = torch.nn.Parameter(torch.tensor([[2.0]]))

    def forward(self, embedding):
        return (self.theta * self.phi).expand(len(embedding), 1, 1, 1)


def squared_loss(pred, label):
    return (pred - label).square().mean((0, 2, 3))


def train_product(*, alternate: bool, upper: bool = True) -> tuple[float, float, dict]:
    """Theta, phi and the output after one step of 0.1 on (theta phi - 5)^2 from theta = 1, phi = 2."""
    network = Product()
    trainer = BilevelTrainer(
        "cpu",
        1,
        DataLoader([{"embedding": torch.zeros(1), "label": torch.full((1, 1, 1), 5.0)}]),
        network,
        torch.optim.SGD([network.theta], lr=0.1),
        torch.optim.SGD([network.phi], lr=0.1) if upper else None,
        squared_loss,
        alternate=alternate,
        decollate=False,
    )
    trainer.run()
    return network.theta.item(), network.phi.item(), trainer.state.output


def test_joint_training_steps_phi_by_its_gradient_at_the_old_theta():
    """Gradients 2 (1 * 2 - 5) = -6, times phi = 2 for theta, times the old theta = 1 for phi."""
    theta, phi, _ = train_product(alternate=False)
    assert (theta, phi) == pytest.approx((1 + 0.1 * 12, 2 + 0.1 * 6))


def test_alternating_training_steps_phi_by_its_gradient_at_the_new_theta():
    """Theta goes to 2.2 as above; there the gradient of phi is 2 (2.2 * 2 - 5) * 2.2 = -2.64."""
    theta, phi, output = train_product(alternate=True)
    assert (theta, phi) == pytest.approx((2.2, 2 + 0.1 * 2.64))
    assert output["loss"].item() == pytest.approx(9)
    assert output["upper_loss"].item() == pytest.approx(0.36)  # (4.4 - 5)^2


def test_joint_training_without_phi_steps_theta_alone():
    theta, phi, output = train_product(alternate=False, upper=False)
    assert (theta, phi) == pytest.approx((2.2, 2))
    assert "prompt_norm" not in output


def test_alternating_training_moves_theta_first_and_then_phi(decoder):
    trainer = make_trainer(decoder, make_items(2), None, alternate=True)
    assert moved_by_level(trainer, decoder) == ({"theta"}, {"phi"})


def test_levels_that_take_turns_need_one_batch_and_two_optimizers(decoder):
    with pytest.raises(ValueError, match="alternate: the levels take turns on one batch; give an upper optimizer, no"):
        make_trainer(decoder, make_items(1), make_items(1, seed=1), alternate=True)
    with pytest.raises(ValueError, match="alternate: the levels take turns on one batch"):
        train_product(alternate=True, upper=False)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_second_order_gradients_are_refused_where_tasks_share_tensors(method):
    network, loader = Product(shared=True), make_loader(make_items(1))
    levels = [torch.optim.AdamW([network.theta]), torch.optim.AdamW([network.phi])]
    with pytest.raises(ValueError, match=f"hypergradient: {method} takes one task at a time, .*; use first_order"):
        BilevelTrainer("cpu", 1, loader, network, *levels, squared_loss, upper_data_loader=loader, hypergradient=method)


class Variables:
    """Stands in for a network: names for its variables."""

    def __init__(self, lower: str, upper: str) -> None:
        self.lower, self.upper = list(lower), list(upper)

    def lower_parameters(self):
        return self.lower

    def upper_parameters(self):
        return self.upper


@pytest.mark.parametrize(
    ("lower", "upper", "levels", "split"),
    [
        ("ab", "c", "bilevel", ("ab", "c")),
        ("ab", "c", "joint", ("ab", "c")),
        ("ab", "c", "alternate", ("ab", "c")),
        ("ab", "c", "swap", ("c", "ab")),
        ("ab", "", "joint", ("ab", "")),
        ("", "c", "joint", ("c", "")),
    ],
)
def test_variables_are_split_as_the_levels_say(lower, upper, levels, split):
    assert tuple("".join(part) for part in split_variables(Variables(lower, upper), levels)) == split


@pytest.mark.parametrize(
    ("lower", "upper", "levels", "message"),
    [
        ("a", "b", "trilevel", "levels: 'trilevel' is not one of bilevel, joint, alternate, swap"),
        ("a", "", "bilevel", "levels: bilevel needs variables of both levels, this network has one kind; choose joint"),
        ("", "b", "alternate", "levels: alternate needs variables of both levels"),
        ("a", "", "swap", "levels: swap needs variables of both levels"),
        ("", "", "joint", "levels: this method trains nothing; score it with `blosam bench`"),
    ],
)
def test_variables_that_do_not_suit_the_levels_are_refused(lower, upper, levels, message):
    with pytest.raises(ValueError, match=message):
        split_variables(Variables(lower, upper), levels)


def test_the_encoder_sees_each_image_and_view_once_in_a_whole_training(tiny_sam, phantoms, tmp_path, monkeypatch):
    images = []
    encoder = type(tiny_sam.image_encoder)
    encode = encoder.forward

    def counting(self, x):
        images.extend(x)
        return encode(self, x)

    monkeypatch.setattr(encoder, "forward", counting)
    options = {
        "data_list": phantoms / "list.json",
        "dataset_dir": phantoms,
        "output_dir": tmp_path / "out",
        "image_size": 64,
        "selection": "upper",
        "augment_views": 1,
        "cache_dir": "none",  # or images that another test has encoded would not be counted
        "max_epochs": 3,
        "val_interval": 1,
        "use_mlflow": "false",
    }
    assert main(["train", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]) == 0
    # 2 of D1 and 2 of D2, each with one extra view, and 2 for validation, however often they are trained on or scored
    assert len(images) == 2 * 2 + 2 * 2 + 2
    assert len({image.cpu().numpy().tobytes() for image in images}) == len(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_training_on_cuda_equals_the_one_on_the_cpu(small_sam, method):
    decoders = {}
    for device in ("cpu", "cuda"):
        decoders[device] = PromptDecoder(small_sam, tasks=2)
        trainer = make_trainer(
            *(decoders[device], make_items(2, tasks=2), make_items(2, tasks=2, seed=1)),
            hypergradient=method,
            eps=1e-2,
            device=device,
        )
        trainer.run()
    assert largest_difference(decoders["cuda"].cpu(), [decoders["cpu"]]) <= 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_cuda_has_the_losses_of_float32_to_two_digits(small_sam):
    losses = {}
    for amp in (False, True):
        decoder = PromptDecoder(small_sam, tasks=2)
        trainer = make_trainer(
            *(decoder, make_items(2, tasks=2), make_items(2, tasks=2, seed=1)),
            eps=1e-2,
            device="cuda",
            amp=amp,
            decollate=False,
        )
        losses[amp] = []
        for name in ("loss", "upper_loss"):
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED, lambda e, name=name, to=losses[amp]: to.append(e.state.output[name].item())
            )
        trainer.run()
    assert losses[True] == pytest.approx(losses[False], abs=1e-2)
    assert losses[True] != losses[False]
