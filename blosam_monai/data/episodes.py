"""Episodes: a class, K labelled support pictures and a query picture of another subject.

Few-shot networks are trained on episodes of base classes and tested on episodes of novel classes; or, where there is
nothing but the K labelled images of one set, on episodes inside these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor
from torch.utils.data import Dataset

from blosam_monai.data.class_lists import ClassLists, Picture
from blosam_monai.data.embeddings import EncodeImaged
from blosam_monai.data.supports import Item
from blosam_monai.transforms import LabelToGridd, PreprocessImaged

ALPNET_SIDE = 256  # pixels: the side of the slices of which ALPNet asks for 100 pixels of a class


class InSupportEpisodes(Dataset):
    """Leave-one-out episodes inside the support set: item i is the query, the others support it.

    Of k items with ``embedding`` (C, h, w) and ``label`` (T, G, G), item i is ``support`` (k - 1, C, h, w), ``mask``
    (k - 1, T, G, G), ``embedding`` and ``label``. Embeddings of another form, as (L,), are stacked alike.

    Args:
        items: the k labelled images, which are all there is.

    Raises:
        ValueError: fewer than two.
    """

    def __init__(self, items: Any) -> None:
        self.items = items
        if len(self.items) < 2:
            raise ValueError(f"n_shot: {len(self.items)} labelled image; an episode needs 2, one to support the other.")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        others = [self.items[n] for n in range(len(self)) if n != index]
        return _episode(others, self.items[index])


@dataclass(frozen=True)
class Episode:
    """Which items make an episode.

    Attributes:
        name: the class.
        task: number of its mask in the labels.
        support: numbers of the K items.
        query: number of the item that is segmented.
    """

    name: str
    task: int
    support: tuple[int, ...]
    query: int


@dataclass(frozen=True)
class EpisodeList:
    """Episodes, and the ``items`` that they number: those used, each once."""

    items: list[Item]
    episodes: list[Episode]


def draw_episodes(
    lists: ClassLists,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    *,
    n_shot: int,
    count: int,
    seed: int,
    min_area: float = 100,
    avoid: Sequence[str] = (),
) -> EpisodeList:
    """A fixed list of episodes: the same arguments give the same, and a shorter list is the beginning of a longer.

    Classes take turns. The query's subject walks through all that show the class, in an order drawn anew at every pass;
    a picture of it is drawn. Supports are of other subjects, of as many as there are.

    Args:
        lists: where the pictures are from.
        pictures: see ``ClassLists.survey``.
        classes: as their masks stand in the labels that ``lists.reader(classes)`` gives.
        n_shot: K.
        count: number of episodes.
        seed: of the drawing.
        min_area: pixels of the class that a picture must show, were it of 256 x 256 pixels (ALPNet: 100).
        avoid: classes that no picture of an episode may show, however little: "setting 2" of ALPNet.

    Raises:
        ValueError: a class with too few subjects or pictures.
    """
    for name, value, least in (("n_shot", n_shot, 1), ("n_episodes", count, 1), ("min_area", min_area, 0)):
        if value < least:
            raise ValueError(f"{name}: {value} is too little; at least {least}.")
    allowed = [p for p in pictures if not set(avoid) & set(p.shares)]
    rng = np.random.default_rng(seed)
    draws = []
    for name in classes:
        showing = [p for p in allowed if p.shares.get(name, 0) * ALPNET_SIDE**2 >= max(min_area, 1e-9)]
        _check_enough(name, showing, n_shot, min_area, avoid)
        draws.append(_draw(showing, n_shot, np.random.default_rng(rng.integers(2**63))))
    drawn = [(name, next(own)) for name, own in islice(cycle(list(zip(classes, draws, strict=True))), count)]
    numbers: dict[int, int] = {}  # of a picture -> of the item
    items: list[Item] = []
    episodes = []
    for name, used in drawn:
        for picture in used:
            if id(picture) not in numbers:
                numbers[id(picture)] = len(items)
                items.append(picture.item)
        query, *support = (numbers[id(picture)] for picture in used)
        episodes.append(Episode(name, lists.place(name, classes), tuple(support), query))
    return EpisodeList(items, episodes)


class Episodes(Dataset):
    """The episodes of a list: ``support`` (K, C, h, w), ``mask`` (K, 1, G, G), ``embedding``, ``label`` (1, G, G).

    Args:
        listed: see ``draw_episodes``.
        items: data set of its items with ``embedding`` and ``label``.
    """

    def __init__(self, listed: EpisodeList, items: Any) -> None:
        self.listed, self.items = listed, items

    def __len__(self) -> int:
        return len(self.listed.episodes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        episode = self.listed.episodes[index]
        return _episode([self.items[n] for n in episode.support], self.items[episode.query], episode.task)


class ScaledEpisodes(Dataset):
    """The episodes of a list as an evaluation needs them: at every scale, with the query on its own grid.

    An item is ``name``, ``supports`` and ``query`` (the items' own), ``label`` (1, H, W) of the query, and ``scales``:
    for each scale an episode as of ``Episodes``, with the query's ``input_size`` and the ``image_size``.

    Args:
        listed: see ``draw_episodes``.
        items: data set of its items after ``EncodeScalesd``.
    """

    def __init__(self, listed: EpisodeList, items: Any) -> None:
        self.listed, self.items = listed, items

    def __len__(self) -> int:
        return len(self.listed.episodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        episode = self.listed.episodes[index]
        supports, query = [self.items[n] for n in episode.support], self.items[episode.query]
        scales = []
        for number, view in enumerate(query["views"]):
            one = _episode([item["views"][number] for item in supports], view, episode.task)
            scales.append({**one, "input_size": view["input_size"], "image_size": view["image_size"]})
        return {
            "name": episode.name,
            "supports": supports,
            "query": query,
            "label": query["label"][episode.task : episode.task + 1],
            "scales": scales,
        }


class EncodeScalesd(Transform):
    """A picture (3, H, W) with its label (T, H, W), bool -> ``views``, one for each encoder: how it sees the picture.

    A view has ``embedding``, ``label`` (T, G, G), ``input_size`` and ``image_size``. The picture is dropped, the label
    stays as bool.

    Args:
        encoders: each with a network of its own ``image_size`` and ``grid_size``.
        mode: see ``PreprocessImaged``.
    """

    def __init__(self, encoders: Sequence[EncodeImaged], mode: str = "sam") -> None:
        self.sizes = [encode.network.image_size for encode in encoders]
        self.chains: list[list[Callable[[Any], dict]]] = [
            [
                PreprocessImaged(encode.network.image_size, mode),
                LabelToGridd(encode.network.image_size, encode.network.grid_size),
                encode,
            ]
            for encode in encoders
        ]

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Encode one item."""
        views = []
        for size, chain in zip(self.sizes, self.chains, strict=True):
            item = {**data, "image_size": size}
            for step in chain:
                item = step(item)
            views.append({key: item[key] for key in ("embedding", "label", "input_size", "image_size")})
        kept = {key: value for key, value in data.items() if key != "image"}
        return {**kept, "label": data["label"] > 0, "views": views}


def _episode(supports: Sequence[Mapping[str, Tensor]], query: Mapping[str, Tensor], task: int | None = None) -> dict:
    """An episode of one task, or of all."""
    own = slice(None) if task is None else slice(task, task + 1)
    return {
        "support": torch.stack([item["embedding"] for item in supports]),
        "mask": torch.stack([item["label"][own] for item in supports]),
        "embedding": query["embedding"],
        "label": query["label"][own],
    }


def _check_enough(name: str, showing: Sequence[Picture], n_shot: int, min_area: float, avoid: Sequence[str]) -> None:
    """Whatever subject the query is of, K pictures of others must be left."""
    subjects = [p.item["subject"] for p in showing]
    most = max((subjects.count(subject) for subject in set(subjects)), default=0)
    if len(set(subjects)) >= 2 and len(subjects) - most >= n_shot:
        return
    remedy = "lower min_area or n_shot" + (", give exclude_novel=false" if avoid else "")
    raise ValueError(
        f"{name}: shown by {len(subjects)} pictures of {len(set(subjects))} subjects (min_area {min_area:g}), needed "
        f"are a query and {n_shot} supports of other subjects; label more, {remedy}, or leave the class out."
    )


def _draw(showing: Sequence[Picture], n_shot: int, rng: np.random.Generator) -> Iterator[list[Picture]]:
    """For ever: a query and its K supports."""
    own: dict[str, list[Picture]] = {}
    for picture in showing:
        own.setdefault(picture.item["subject"], []).append(picture)
    while True:
        for subject in rng.permutation(sorted(own)).tolist():
            query = own[subject][rng.integers(len(own[subject]))]
            yield [query, *_supports([own[s] for s in sorted(own) if s != subject], n_shot, rng)]


def _supports(others: Sequence[Sequence[Picture]], n_shot: int, rng: np.random.Generator) -> list[Picture]:
    """K pictures of other subjects, each subject's first before any one's second."""
    shuffled = [[pictures[i] for i in rng.permutation(len(pictures))] for pictures in others]
    order = rng.permutation(len(shuffled)).tolist()
    rounds = (shuffled[s][turn] for turn in range(n_shot) for s in order if turn < len(shuffled[s]))
    return list(islice(rounds, n_shot))
