"""The Segment Anything Model of any size at any image size, and its checkpoints.

Built from the classes of the ``segment_anything`` package (Kirillov et al. 2023); nothing of it is copied. What that
package fixes (1024 pixels, position tables of that size, an unverified ``torch.load``) is open here.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from blosam_monai.files import PathLike, file_sha256
from blosam_monai.networks.hybrid_encoder import EMBEDDING_STRIDE, TOKEN_STRIDE, HybridEncoder

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

logger = logging.getLogger(__name__)

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, intensities 0 to 255; ImageNet, as SAM was trained
PIXEL_STD = (58.395, 57.12, 57.375)
RANDOM = "random"  # a checkpoint's name: seeded random weights, said explicitly
DOWNLOAD = "download"  # a checkpoint's name: Meta's file, fetched if it is not in the cache


@dataclass(frozen=True)
class SamSize:
    """The numbers that make a SAM: widths and depths, lengths in tokens, the stride of the embedding in pixels."""

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    global_blocks: tuple[int, ...] | None  # of SAM's ViT; None: the hybrid encoder, whose blocks are all global
    decoder_mlp: int = 2048
    stride: int = 16
    embedding_channels: int = 256


SAM_SIZES = {
    "vit_b": SamSize(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": SamSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamSize(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": SamSize(192, 6, 6, None, decoder_mlp=512, stride=EMBEDDING_STRIDE, embedding_channels=128),
}


class SamFile(NamedTuple):
    """One of Meta's published checkpoints: address, size in bytes, SHA-256."""

    url: str
    size: int
    sha256: str


_META = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {
    "vit_b": SamFile(
        f"{_META}/sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": SamFile(
        f"{_META}/sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": SamFile(
        f"{_META}/sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
TINY_FILE = Path(__file__).parent / "weights" / "tiny.safetensors"  # ours; its model card lies beside it
TINY_SHA256 = "979b904d548b411d0386294a1f6d5f80d1158f1f3595c31a82e9db25b62c26ff"


def build_sam(model: str, image_size: int, checkpoint: PathLike | None = None) -> Sam:
    """Build a SAM in evaluation mode, its position tables resized to the image size.

    Args:
        model: ``vit_b``, ``vit_l``, ``vit_h`` or ``tiny``.
        image_size: side of the square input in pixels, a multiple of 16.
        checkpoint: a file (Meta's ``.pth`` or a ``.safetensors``); ``random`` for seeded random weights; None for the
            published file: of ``tiny`` in this package, of the others in the cache; ``download`` likewise, fetched
            into the cache if it is not on this machine.

    Returns:
        The network, with ``weights`` = ``random`` or the SHA-256 of the file it was read from.

    Raises:
        ValueError: an unknown model, an image size that 16 does not divide, a published file that was altered, or a
            file that is not this model's checkpoint.
        FileNotFoundError: no checkpoint where one is needed.
    """
    if model not in SAM_SIZES:
        raise ValueError(f"sam_model: {model!r} is not one of {', '.join(SAM_SIZES)}.")
    size = SAM_SIZES[model]
    if image_size < TOKEN_STRIDE or image_size % TOKEN_STRIDE:
        raise ValueError(
            f"image_size: {image_size} is not a positive multiple of {TOKEN_STRIDE} pixels, a token's side."
        )
    path, weights = (None, RANDOM) if checkpoint == RANDOM else _find_file(model, checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = _assemble(size, image_size)
    if path is None:
        logger.warning("SAM %s has random weights: it shows that the machine runs, not accuracy.", model)
    else:
        sam.load_state_dict(_read_state(path, sam, model))
    sam.weights = weights
    return sam.eval()


def _find_file(model: str, checkpoint: PathLike | None) -> tuple[Path, str]:
    """The checkpoint file of ``build_sam`` and its SHA-256, which of a published file must be the published one."""
    if checkpoint and checkpoint != DOWNLOAD:
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"sam_checkpoint: {path} does not exist; give a SAM checkpoint file for {model}.")
        return path, file_sha256(path)
    path = find_checkpoint(model, fetch=checkpoint == DOWNLOAD)
    found = file_sha256(path)
    expected = TINY_SHA256 if model == "tiny" else SAM_FILES[model].sha256
    if found != expected:
        remedy = "reinstall blosam_monai" if model == "tiny" else "replace it"
        raise ValueError(
            f"sam_checkpoint: {path} has SHA-256 {found}, the published file {expected}; {remedy}, or give its path as "
            "sam_checkpoint to use it as it is."
        )
    return path, found


def _assemble(size: SamSize, image_size: int) -> Sam:
    modeling = import_segment_anything().modeling
    side = image_size // size.stride
    return modeling.Sam(
        image_encoder=_image_encoder(size, image_size),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=size.embedding_channels,
            image_embedding_size=(side, side),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=size.embedding_channels, mlp_dim=size.decoder_mlp, num_heads=8
            ),
            transformer_dim=size.embedding_channels,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )


def _image_encoder(size: SamSize, image_size: int) -> nn.Module:
    encoder = import_segment_anything().modeling.image_encoder
    if size.global_blocks is None:
        return HybridEncoder(
            image_size,
            size.encoder_width,
            size.encoder_depth,
            size.encoder_heads,
            out_channels=size.embedding_channels,
            block=encoder.Block,
        )
    return encoder.ImageEncoderViT(
        depth=size.encoder_depth,
        embed_dim=size.encoder_width,
        img_size=image_size,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_heads=size.encoder_heads,
        patch_size=size.stride,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=size.global_blocks,
        window_size=14,
        out_chans=size.embedding_channels,
    )


def import_segment_anything() -> Any:
    """Import ``segment_anything``, also beside a CPU build of torch.

    torchvision's wheel is a CUDA build. Beside a CPU torch its compiled operators do not load, its import fails for
    want of two operator schemas, and with it segment_anything's, which needs none of them. Declaring the schemas is
    enough. Done here, once, and only where that very import fails.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        # MONAI may have tried both imports before us; what a failed import leaves behind must go.
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "segment_anything")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _SCHEMAS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    return importlib.import_module("segment_anything")


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as the process: dropping it undeclares


def _read_state(path: Path, sam: Sam, model: str) -> dict[str, Tensor]:
    """Read a SAM state dict and resize its position tables to those of ``sam``; say what differs if it does not fit."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"sam_checkpoint: {path} cannot be read as a SAM checkpoint ({type(error).__name__}): it is truncated, "
            f"damaged or another kind of file; replace it (SHA-256 in `blosam doctor`)."
        ) from error
    expected = sam.state_dict()
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"sam_checkpoint: {path} holds no flat state dict of tensors; give Meta's file for {model}.")
    missing, foreign = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"sam_checkpoint: {path} is not a {model}: {_some(missing, 'missing')}{_some(foreign, 'not known')}"
            f"choose the sam_model that it belongs to."
        )
    state = {name: _resize_table(name, value.float(), expected[name].shape) for name, value in state.items()}
    wrong = [name for name, value in state.items() if value.shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"sam_checkpoint: {path} is not a {model}: {name} has shape {tuple(state[name].shape)}, {model} has "
            f"{tuple(expected[name].shape)}, and {len(wrong) - 1} more; choose the sam_model that it belongs to."
        )
    return state


def _some(names: list[str], what: str) -> str:
    return f"{len(names)} tensors {what} (first: {names[0]}); " if names else ""


def _resize_table(name: str, table: Tensor, shape: torch.Size) -> Tensor:
    """Interpolate a position table to another image size; any other tensor passes unchanged."""
    if table.shape == shape:
        return table
    if name.endswith("pos_embed") and table.ndim == 4 and table.shape[-1] == shape[-1]:  # (1, h, w, width)
        resized = F.interpolate(table.permute(0, 3, 1, 2), shape[1:3], mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1)
    if ".rel_pos_" in name and table.ndim == 2 and table.shape[-1] == shape[-1]:  # (2h - 1, head width)
        return F.interpolate(table.T[None], shape[0], mode="linear", align_corners=False)[0].T
    return table


def cache_dir() -> Path:
    """Folder of downloaded checkpoints: ``$BLOSAM_CACHE`` or ``~/.cache/blosam_monai``."""
    return Path(os.environ.get("BLOSAM_CACHE") or Path.home() / ".cache" / "blosam_monai")


def embeddings_dir() -> Path:
    """Folder of images encoded before, unless another is asked for."""
    return cache_dir() / "embeddings"


def find_checkpoint(model: str, *, fetch: bool) -> Path:
    """Path of the tiny SAM in this package, or of Meta's checkpoint in the cache.

    Meta's is fetched if asked; if not, the error says how to get it. There is no fall-back from one to the other.
    """
    if model == "tiny":
        if not TINY_FILE.is_file():
            raise FileNotFoundError(
                f"sam_checkpoint: {TINY_FILE} belongs to this package and is missing; reinstall blosam_monai."
            )
        return TINY_FILE
    file = SAM_FILES[model]
    path = cache_dir() / Path(file.url).name
    if path.is_file():
        return path
    remedy = (
        f"SAM {model} needs Meta's checkpoint, which is not on this machine. Either run again with "
        f"sam_checkpoint=download, or fetch {file.url} ({file.size / 1e6:.0f} MB, SHA-256 {file.sha256}) on a machine "
        f"with access and put it at {path}, or give its path as sam_checkpoint."
    )
    if not fetch:
        raise FileNotFoundError(remedy)
    try:
        download(file.url, path, file.sha256)
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise FileNotFoundError(f"{remedy} The download failed: {error}.") from error
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch a file with progress, going on where an interrupted fetch stopped; it appears only if its hash is right.

    Raises:
        ValueError: the bytes received do not have the SHA-256; they are deleted.
        urllib.error.URLError, TimeoutError, ConnectionError, HTTPException: the network failed; what came is kept for
            the next try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            resumed = response.status == 206  # a server without ranges answers 200 and starts again
            start = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = int(length) + start if length else None
            with (
                open(part, "ab" if resumed else "wb") as file,
                tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total is not None and part.stat().st_size < total:
                raise ConnectionError(f"{url}: the connection ended after {part.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the part is whole already; its hash decides
            raise
    found = file_sha256(part)
    if found != sha256:
        part.unlink()
        raise ValueError(f"{url}: the file received has SHA-256 {found}, expected {sha256}; it was deleted.")
    os.replace(part, path)
