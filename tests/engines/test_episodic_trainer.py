"""The episodic trainer: which episodes count, what a step is, and that it works with the handlers of the others."""

import copy

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointSaver, MeanDice, StatsHandler, from_engine
from monai.transforms import AsDiscreted
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from blosam_monai.data.episodes import InSupportEpisodes
from blosam_monai.engines.bilevel_trainer import BilevelEvents
from blosam_monai.engines.episodic_trainer import EpisodicTrainer, make_episodes
from blosam_monai.handlers import CurvesHandler, ProgressHandler, TrainingState
from blosam_monai.tracking import BilevelMLFlowHandler

C, SIDE, GRID = 3, 4, 16


class Head(nn.Module):
    """Scaled cosine with the mean of the supports' foreground; notes the episodes of each call of its loss."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.norm = nn.BatchNorm2d(C, affine=False)
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, support, mask, query):
        prototype = torch.einsum("ekchw,ekhw->ec", support, mask) / mask.flatten(1).sum(1)[:, None]
        return self.scale * F.cosine_similarity(self.norm(query), prototype[..., None, None], dim=1)

    def loss(self, support, mask, query, label):
        self.seen.append((support, mask, query, label))
        logit = F.interpolate(self(support, mask, query)[:, None], label.shape[-2:])[:, 0]
        return F.binary_cross_entropy_with_logits(logit, label, reduction="none").mean((1, 2))


def make_items(count=3, tasks=2, empty=()) -> list[dict[str, torch.Tensor]]:
    """Item i has i + 1 rows of foreground of task 0, and from the right as many columns of task 1; (i, t) are empty."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        label = torch.zeros(tasks, GRID, GRID)
        label[0, : i + 1] = 1
        label[1:, :, -i - 1 :] = 1
        for number, task in empty:
            if number == i:
                label[task] = 0
        items.append({"embedding": torch.randn(C, SIDE, SIDE, generator=generator), "label": label})
    return items


def make_trainer(head, items, *, epochs=1, batch_size=1, lr=0.1, **options) -> EpisodicTrainer:
    episodes = InSupportEpisodes(items)
    sampler = DistributedSampler(episodes, num_replicas=1, rank=0, seed=0)
    loader = DataLoader(episodes, batch_size=batch_size, sampler=sampler)
    return EpisodicTrainer("cpu", epochs, loader, head, torch.optim.SGD(head.parameters(), lr=lr), **options)


def batch_of(items) -> dict[str, torch.Tensor]:
    return next(iter(DataLoader(InSupportEpisodes(items), batch_size=len(items))))


def test_every_query_and_class_is_an_episode_of_its_own():
    items = make_items(3)
    batch = batch_of(items)
    episodes = make_episodes(*(batch[key] for key in ("support", "mask", "embedding", "label")))
    assert episodes.support.shape == (6, 2, C, SIDE, SIDE)
    for e in range(6):
        query, task = divmod(e, 2)
        others = [items[i] for i in range(3) if i != query]
        assert torch.equal(episodes.query[e], items[query]["embedding"])
        assert torch.equal(episodes.label[e], items[query]["label"][task])
        assert torch.equal(episodes.support[e], torch.stack([item["embedding"] for item in others]))
        by_place = torch.stack([item["label"][task] for item in others]).reshape(2, SIDE, 4, SIDE, 4).mean((2, 4))
        assert torch.equal(episodes.mask[e], by_place)


def test_packed_embeddings_keep_the_grid_of_their_masks():
    packed = [{**item, "embedding": item["embedding"].flatten()} for item in make_items(3)]
    batch = batch_of(packed)
    episodes = make_episodes(*(batch[key] for key in ("support", "mask", "embedding", "label")))
    assert episodes.support.shape == (6, 2, C * SIDE * SIDE)
    assert torch.equal(episodes.mask, batch["mask"].transpose(1, 2).flatten(0, 1))


def test_a_step_is_down_the_mean_loss_of_the_episodes():
    items, head = make_items(3), Head()
    before = copy.deepcopy(head)
    make_trainer(head, items, batch_size=3).run()
    order = list(DistributedSampler(items, num_replicas=1, rank=0, seed=0))
    assert sorted(order) == [0, 1, 2]
    # One by one in one batch: the head's norm sees the whole batch, so the episodes are put together by hand.
    episodes = [(q, t) for q in order for t in range(2)]
    others = lambda q: [items[i] for i in range(3) if i != q]
    support = torch.stack([torch.stack([o["embedding"] for o in others(q)]) for q, _ in episodes])
    mask = torch.stack([torch.stack([o["label"][t] for o in others(q)]) for q, t in episodes])
    losses = before.loss(
        support,
        mask.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)),
        torch.stack([items[q]["embedding"] for q, _ in episodes]),
        torch.stack([items[q]["label"][t] for q, t in episodes]),
    )
    (gradient,) = torch.autograd.grad(losses.sum() / 6, [before.scale])
    assert head.scale.item() == pytest.approx(2.0 - 0.1 * gradient.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("empty", "counted"),
    [
        ([], 6),
        ([(0, 1)], 5),  # its own query; as a support beside another it says no more than background
        ([(0, 1), (1, 1)], 3),  # two queries; of the third the supports are empty
        ([(0, 1), (1, 1), (2, 1)], 3),
    ],
)
def test_episodes_whose_query_or_supports_are_empty_do_not_count(empty, counted):
    head = Head()
    trainer = make_trainer(head, make_items(3, empty=empty), batch_size=3, decollate=False)
    trainer.run()
    ((support, mask, query, label),) = head.seen
    assert len(support) == len(query) == trainer.state.output["episodes"] == counted
    assert mask.flatten(1).any(1).all()
    assert label.flatten(1).any(1).all()
    assert torch.isfinite(head.scale)


def test_a_batch_that_shows_nothing_takes_no_step():
    nothing = [(i, t) for i in range(3) for t in range(2)]
    head = Head()
    trainer = make_trainer(head, make_items(3, empty=nothing), decollate=False)
    trainer.run()
    assert head.scale.item() == 2.0
    assert trainer.state.output["loss"] == 0.0


def test_a_class_that_no_support_shows_is_predicted_nowhere():
    trainer = make_trainer(Head(), make_items(2, empty=[(0, 1), (1, 1)]), decollate=False)
    trainer.run()
    assert (trainer.state.output["pred"][:, 1] < 0).all()


def test_the_output_is_of_the_query_before_the_step():
    items, head = make_items(2), Head()
    before = copy.deepcopy(head).eval()
    trainer = make_trainer(head, items, decollate=False)
    first = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: first.append(e.state.output))
    trainer.run()
    (output,) = first
    query = next(i for i in range(2) if torch.equal(items[i]["embedding"], output["image"][0]))
    support = items[1 - query]
    mask = support["label"][0].reshape(SIDE, 4, SIDE, 4).mean((1, 3))
    drawn = before(support["embedding"][None, None], mask[None, None], output["image"])
    expected = F.interpolate(drawn[None], (GRID, GRID), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(output["pred"][0, 0], expected)
    assert output["pred"].shape == output["label"].shape == (1, 2, GRID, GRID)


def test_events_fire_once_an_iteration_in_the_documented_order():
    order = [
        Events.ITERATION_STARTED,
        IterationEvents.FORWARD_COMPLETED,
        IterationEvents.LOSS_COMPLETED,
        IterationEvents.BACKWARD_COMPLETED,
        BilevelEvents.LOWER_STEP_COMPLETED,
        IterationEvents.MODEL_COMPLETED,
        Events.ITERATION_COMPLETED,
    ]
    trainer = make_trainer(Head(), make_items(2), epochs=2)
    fired = []
    for event in order:
        trainer.add_event_handler(event, fired.append, event)
    trainer.run()
    assert fired == order * 4


def test_it_works_with_the_handlers_of_monai_and_of_the_bilevel_trainer(tmp_path):
    head = Head()
    curves = CurvesHandler(tmp_path, ["lung", "heart"], {})
    trainer = make_trainer(
        head,
        make_items(3),
        epochs=2,
        postprocessing=AsDiscreted("pred", threshold=0.0),
        key_train_metric={"train_mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
        train_handlers=[
            ProgressHandler(),
            StatsHandler(name="stats", tag_name="loss", output_transform=from_engine(["loss"], first=True)),
            CheckpointSaver(save_dir=str(tmp_path), save_dict={"head": head}, save_final=True),
        ],
    )
    curves.attach(trainer)
    tracker = BilevelMLFlowHandler(
        f"sqlite:///{tmp_path / 'mlruns.db'}",
        "biopt",
        "run",
        tasks=["lung", "heart"],
        optimizers={"outer": trainer.optimizer},
    )
    tracker.attach(trainer)
    trainer.run()
    tracker.close()
    lines = (tmp_path / "curves.csv").read_text().split()
    assert lines[0].startswith("epoch,loss")
    assert len(lines) == 1 + 2
    assert 0 < trainer.state.metrics["train_mean_dice"] <= 1
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert run.info.status == "FINISHED"
    assert {"loss", "lr_outer", "train_dice/heart"} <= run.data.metrics.keys()


def test_a_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path):
    heads = [Head(), Head()]
    make_trainer(heads[0], make_items(3), epochs=4).run()

    def state_of(trainer) -> TrainingState:
        return TrainingState(tmp_path / "state.pt", {"head": trainer.network, "optimizer": trainer.optimizer}, {})

    first = make_trainer(heads[1], make_items(3), epochs=2)
    state_of(first).attach(first)
    first.run()
    again = Head(scale=9.0)
    second = make_trainer(again, make_items(3), epochs=4)
    state_of(second).attach(second, resume=True)
    second.run()
    assert torch.equal(again.scale, heads[0].scale)
    second.run()  # what is finished stays as it is
    assert torch.equal(again.scale, heads[0].scale)


def test_a_head_without_parameters_is_refused():
    class Fixed(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"head: Fixed has nothing to train; give it a projection, or evaluate it"):
        EpisodicTrainer("cpu", 1, DataLoader([0]), Fixed(), torch.optim.SGD([torch.zeros(1)], lr=1.0))
