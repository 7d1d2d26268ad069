"""SAM at any image size, its checkpoints, and the guard around torchvision."""

from __future__ import annotations

import hashlib
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blosam_monai.networks import sam as sam_module
from blosam_monai.networks.sam import (
    TINY_FILE,
    TINY_SHA256,
    SamFile,
    build_sam,
    find_checkpoint,
    import_segment_anything,
)

# Head width and global blocks of Meta's models, from the SAM paper's code; the width of a token comes with the file.
HEAD_WIDTH = {"vit_b": 64, "vit_l": 64, "vit_h": 80}
GLOBAL_BLOCKS = {"vit_b": (2, 5, 8, 11), "vit_l": (5, 11, 17, 23), "vit_h": (7, 15, 23, 31)}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def ramp(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)


def save_meta_shapes(model: str, path: Path) -> dict[str, torch.Tensor]:
    """Write a state dict of Meta's own builder at 1024 pixels: zeros that take no room, position tables a ramp."""
    with torch.device("meta"):
        shapes = {n: v.shape for n, v in import_segment_anything().sam_model_registry[model]().state_dict().items()}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    state["image_encoder.pos_embed"] = ramp(64)[None, :, None, None].expand(shapes["image_encoder.pos_embed"])
    for name, shape in shapes.items():
        if ".rel_pos_" in name:
            state[name] = ramp(shape[0])[:, None].expand(shape)
    torch.save(state, path)
    return state


@pytest.fixture
def tiny_file(tmp_path) -> Path:
    """A checkpoint of tiny at 64 pixels."""
    torch.save(build_sam("tiny", 64, "random").state_dict(), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


# Building


@pytest.mark.parametrize("image_size", [0, 8, 100, 1023])
def test_an_image_size_off_the_tokens_is_refused_with_their_side(image_size):
    with pytest.raises(ValueError, match=rf"image_size: {image_size} is not a positive multiple of 16 pixels"):
        build_sam("tiny", image_size)


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'vit_x' is not one of vit_b, vit_l, vit_h, tiny"):
        build_sam("vit_x", 64)


def count(sam: nn.Module) -> int:
    return sum(p.numel() for p in sam.parameters())


def test_tiny_has_at_most_five_million_parameters():
    assert count(build_sam("tiny", 256, "random")) <= 5_000_000  # ten megabytes, at two bytes each


def test_a_larger_image_adds_nothing_to_tiny_but_rows_of_position_tables():
    # 64 x 64 tokens of width 192 instead of 16 x 16; in six blocks two tables of 127 rows of 32 instead of 31.
    added = (64**2 - 16**2) * 192 + 6 * 2 * (127 - 31) * 32
    assert count(build_sam("tiny", 1024, "random")) == count(build_sam("tiny", 256, "random")) + added


def test_random_weights_are_the_same_twice():
    first, second = build_sam("tiny", 64, "random").state_dict(), build_sam("tiny", 64, "random").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("checkpoint", ["random", None])
def test_building_leaves_the_global_seed_alone(checkpoint):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_sam("tiny", 64, checkpoint)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_l", "vit_h"])
def test_a_large_sam_runs_at_256(model):
    sam = build_sam(model, 256, "random")
    with torch.no_grad():
        embedding = sam.image_encoder(torch.rand(1, 3, 256, 256))
    assert embedding.shape == (1, 256, 16, 16)
    assert torch.isfinite(embedding).all()


# Position tables


@pytest.mark.parametrize(
    "model", ["vit_b", pytest.param("vit_l", marks=pytest.mark.slow), pytest.param("vit_h", marks=pytest.mark.slow)]
)
def test_a_file_of_1024_pixels_loads_at_256_with_resized_tables(model, tmp_path):
    file = save_meta_shapes(model, tmp_path / "sam.pth")
    encoder = build_sam(model, 256, tmp_path / "sam.pth").image_encoder
    assert encoder.pos_embed.shape == (1, 16, 16, file["image_encoder.pos_embed"].shape[-1])
    lengths = {i: block.attn.rel_pos_h.shape for i, block in enumerate(encoder.blocks)}
    window, whole = (27, HEAD_WIDTH[model]), (31, HEAD_WIDTH[model])  # 2 * 14 - 1 and 2 * 16 - 1
    assert lengths == {i: whole if i in GLOBAL_BLOCKS[model] else window for i in range(len(encoder.blocks))}


@pytest.mark.parametrize("model", ["vit_b", pytest.param("vit_l", marks=pytest.mark.slow)])
def test_a_ramp_in_a_table_stays_the_same_ramp_when_resized(model, tmp_path):
    save_meta_shapes(model, tmp_path / "sam.pth")
    encoder = build_sam(model, 256, tmp_path / "sam.pth").image_encoder
    # Cell centres: cell i of 16 lies over cells 4i to 4i + 3 of 64, cell k of 31 at (k + 1/2) 127/31 - 1/2 of 127.
    torch.testing.assert_close(encoder.pos_embed[0, :, 3, 7], 4 * ramp(16) + 1.5)
    expected = (ramp(31) + 0.5) * 127 / 31 - 0.5
    torch.testing.assert_close(encoder.blocks[GLOBAL_BLOCKS[model][0]].attn.rel_pos_w[:, 5], expected)
    torch.testing.assert_close(encoder.blocks[0].attn.rel_pos_w[:, 5], ramp(27))  # a window: nothing to resize


def test_the_columns_of_a_position_table_stay_columns(tmp_path):
    state = build_sam("tiny", 1024, "random").state_dict()
    state["image_encoder.pos_embed"] = (100 * ramp(64)[:, None] + ramp(64))[None, :, :, None].expand(1, 64, 64, 192)
    torch.save(state, tmp_path / "sam.pth")
    table = build_sam("tiny", 256, tmp_path / "sam.pth").image_encoder.pos_embed[0, :, :, 0]
    centres = 4 * ramp(16) + 1.5
    torch.testing.assert_close(table, 100 * centres[:, None] + centres)


@pytest.mark.parametrize("model", ["tiny", "small_vit"])
def test_resized_relative_tables_act_as_the_lookup_of_segment_anything_does(model, small_vit, tmp_path):
    torch.manual_seed(0)
    large = build_sam(model, 1024, "random")
    for block in large.image_encoder.blocks:
        nn.init.normal_(block.attn.rel_pos_h)
        nn.init.normal_(block.attn.rel_pos_w)
    torch.save(large.state_dict(), tmp_path / "sam.pth")
    resized, looked_up = (build_sam(model, 256, tmp_path / "sam.pth") for _ in range(2))
    for block, source in zip(looked_up.image_encoder.blocks, large.image_encoder.blocks, strict=True):
        block.attn.rel_pos_h, block.attn.rel_pos_w = source.attn.rel_pos_h, source.attn.rel_pos_w  # resized at each use
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(resized.image_encoder(image), looked_up.image_encoder(image), atol=1e-5, rtol=0)


def test_a_file_of_the_same_size_loads_bit_for_bit(tiny_file):
    loaded = build_sam("tiny", 64, tiny_file).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in torch.load(tiny_file).items())


def test_a_loaded_sam_carries_the_hash_of_its_file(tiny_file):
    assert build_sam("tiny", 64, tiny_file).weights == hashlib.sha256(tiny_file.read_bytes()).hexdigest()


# Files that are no checkpoint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.pth"))):
        build_sam("tiny", 64, tmp_path / "none.pth")


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>Log in</html>"],
    ids=["half", "empty", "web page"],
)
def test_a_spoilt_file_is_refused_by_name(spoil, tiny_file):
    tiny_file.write_bytes(spoil(tiny_file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tiny_file))} cannot be read as a SAM checkpoint"):
        build_sam("tiny", 64, tiny_file)


def test_a_truncated_safetensors_file_is_refused_by_name(tmp_path):
    (tmp_path / "tiny.safetensors").write_bytes(TINY_FILE.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"tiny\.safetensors cannot be read as a SAM checkpoint"):
        build_sam("tiny", 64, tmp_path / "tiny.safetensors")


def test_a_plain_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"image": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"data\.pkl cannot be read as a SAM checkpoint"):
        build_sam("tiny", 64, tmp_path / "data.pkl")


def test_a_nested_state_dict_is_refused(tiny_file):
    torch.save({"model": torch.load(tiny_file), "epoch": 3}, tiny_file)
    with pytest.raises(ValueError, match=r"tiny\.pth holds no flat state dict of tensors"):
        build_sam("tiny", 64, tiny_file)


def test_a_foreign_state_dict_is_refused_with_what_is_missing_and_what_is_not_known(tmp_path, tiny_sam):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    count = len(tiny_sam.state_dict())
    with pytest.raises(ValueError, match=rf"not a tiny: {count} tensors missing .*2 tensors not known \(first: bias\)"):
        build_sam("tiny", 64, tmp_path / "linear.pth")


def test_a_smaller_model_of_the_family_is_refused_with_the_missing_blocks(small_vit, tmp_path):
    torch.save(build_sam(small_vit, 64, "random").state_dict(), tmp_path / "small.pth")
    # vit_b has 12 blocks of 14 tensors, this one has 2.
    with pytest.raises(ValueError, match=r"not a vit_b: 140 tensors missing \(first: image_encoder\.blocks\.10\."):
        build_sam("vit_b", 64, tmp_path / "small.pth")


def test_a_file_of_tiny_is_refused_as_another_model(tiny_file):
    with pytest.raises(ValueError, match=r"not a vit_b: \d+ tensors missing .*; \d+ tensors not known .*choose"):
        build_sam("vit_b", 64, tiny_file)


def test_half_precision_becomes_single_whatever_the_kind_of_file(tmp_path):
    torch.manual_seed(0)
    state = {name: value.half() for name, value in build_sam("tiny", 128, "random").state_dict().items()}
    torch.save(state, tmp_path / "sam.pth")
    save_file(state, tmp_path / "sam.safetensors")
    for path in tmp_path.iterdir():
        loaded = build_sam("tiny", 64, path).state_dict()
        assert {value.dtype for value in loaded.values()} == {torch.float32}
        name = "mask_decoder.iou_token.weight"
        assert torch.equal(loaded[name], state[name].float())


def test_a_tensor_of_another_shape_is_refused_with_its_name_and_both_shapes(tiny_file):
    state = torch.load(tiny_file)
    state["image_encoder.blocks.0.norm1.weight"] = torch.ones(99)
    torch.save(state, tiny_file)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1\.weight has shape \(99,\), tiny has \(192,\)"):
        build_sam("tiny", 64, tiny_file)


class Bomb:
    """Unpickled without care, it makes the folder that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


def test_code_inside_a_checkpoint_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "ran"
    torch.save({"weight": Bomb(folder)}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as a SAM checkpoint"):
        build_sam("tiny", 64, tmp_path / "bomb.pth")
    assert not folder.exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert folder.exists()  # the bomb was live


# Meta's files, from a server of our own

CONTENT = bytes(range(256)) * 12_000  # 3 MB: more than one block of reading
PLACE = "/sam_vit_b_test.pth"


class Depot(ThreadingHTTPServer):
    """Serves one file; can refuse ranges and cut the connection."""

    daemon_threads = True
    content = CONTENT
    cut: int | None = None  # bytes sent before the connection ends
    ranges = True
    garbled = False  # answers in no HTTP

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str | None] = []  # the Range of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{PLACE}"


class _Handler(BaseHTTPRequestHandler):
    server: Depot

    def do_GET(self) -> None:
        depot, asked = self.server, self.headers["Range"]
        depot.asked.append(asked)
        if depot.garbled:
            self.wfile.write(b"who are you?\r\n")
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and depot.ranges else 0
        found = self.path == PLACE
        body = depot.content[start:] if found else b""
        self.send_response(404 if not found else 416 if not body else 206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: depot.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def depot(tmp_path, monkeypatch):
    """A server that has vit_b's file, and an empty cache."""
    server = Depot()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    file = SamFile(server.url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(sam_module.SAM_FILES, "vit_b", file)
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "cache").mkdir()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cached(tmp_path) -> Path:
    """Where vit_b's file belongs."""
    return tmp_path / "cache" / PLACE[1:]


@pytest.fixture
def part(cached) -> Path:
    """What an interrupted download leaves."""
    return cached.with_name(cached.name + ".part")


def assert_says_how_to_get(message: str, depot: Depot, path: Path) -> None:
    """One paragraph with address, hash and place."""
    assert depot.url in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert str(path) in message
    assert "\n" not in message


def test_a_download_puts_the_file_in_the_cache_and_nothing_else(depot, cached):
    assert find_checkpoint("vit_b", fetch=True) == cached
    assert cached.read_bytes() == CONTENT
    assert list(cached.parent.iterdir()) == [cached]


def test_a_download_shows_its_progress(depot, cached, capsys):
    find_checkpoint("vit_b", fetch=True)
    assert f"{cached.name}: 100%" in capsys.readouterr().err


def test_a_sam_is_built_from_the_file_that_it_downloads(depot, tmp_path, monkeypatch):
    save_meta_shapes("vit_b", tmp_path / "sam.pth")
    depot.content = (tmp_path / "sam.pth").read_bytes()
    digest = hashlib.sha256(depot.content).hexdigest()
    monkeypatch.setitem(sam_module.SAM_FILES, "vit_b", SamFile(depot.url, len(depot.content), digest))
    sam = build_sam("vit_b", 64, "download")
    assert sam.weights == digest
    assert sam.image_encoder.pos_embed[0, 0, 0, 0] == 7.5  # cell 0 of 4 lies over cells 0 to 15 of the ramp


def test_a_file_in_the_cache_is_not_fetched_again(depot, cached):
    cached.write_bytes(b"already here")
    assert find_checkpoint("vit_b", fetch=True).read_bytes() == b"already here"
    assert depot.asked == []


def test_a_cut_connection_keeps_what_came_and_says_how_to_get_the_file(depot, cached, part):
    depot.cut = 2_000_000
    with pytest.raises(FileNotFoundError, match=r"ended after 2000000 of 3072000 bytes") as error:
        build_sam("vit_b", 64, "download")
    assert_says_how_to_get(str(error.value), depot, cached)
    assert part.read_bytes() == CONTENT[:2_000_000]
    assert list(cached.parent.iterdir()) == [part]


def test_a_download_goes_on_where_the_last_one_stopped(depot, cached, part):
    part.write_bytes(CONTENT[:2_000_000])
    find_checkpoint("vit_b", fetch=True)
    assert depot.asked == ["bytes=2000000-"]
    assert cached.read_bytes() == CONTENT
    assert not part.exists()


def test_a_second_cut_keeps_both_pieces(depot, part):
    part.write_bytes(CONTENT[:1_000_000])
    depot.cut = 500_000
    with pytest.raises(FileNotFoundError, match=r"ended after 1500000 of 3072000 bytes"):
        find_checkpoint("vit_b", fetch=True)
    assert part.read_bytes() == CONTENT[:1_500_000]


def test_a_server_without_ranges_sends_the_whole_file_anew(depot, cached, part):
    depot.ranges = False
    part.write_bytes(b"x" * 1000)
    find_checkpoint("vit_b", fetch=True)
    assert cached.read_bytes() == CONTENT


def test_a_part_that_is_whole_becomes_the_file(depot, cached, part):
    part.write_bytes(CONTENT)
    find_checkpoint("vit_b", fetch=True)
    assert depot.asked == ["bytes=3072000-"]  # answered with 416: there is nothing after the last byte
    assert list(cached.parent.iterdir()) == [cached]


def test_a_part_longer_than_the_file_is_deleted(depot, cached, part):
    part.write_bytes(CONTENT + b"x")
    with pytest.raises(ValueError, match="it was deleted"):
        find_checkpoint("vit_b", fetch=True)
    assert list(cached.parent.iterdir()) == []


def test_bytes_with_another_hash_are_refused_with_both_hashes_and_deleted(depot, cached):
    depot.content = CONTENT[:-1] + b"?"
    expected, found = (hashlib.sha256(data).hexdigest() for data in (CONTENT, depot.content))
    with pytest.raises(ValueError, match=f"SHA-256 {found}, expected {expected}"):
        build_sam("vit_b", 64, "download")
    assert list(cached.parent.iterdir()) == []


def test_without_asking_for_a_download_no_connection_is_opened(depot, cached):
    with pytest.raises(FileNotFoundError, match="sam_checkpoint=download") as error:
        build_sam("vit_b", 64)
    assert_says_how_to_get(str(error.value), depot, cached)
    assert depot.asked == []


def test_an_address_that_is_gone_says_how_to_get_the_file(depot, cached, monkeypatch):
    gone = sam_module.SAM_FILES["vit_b"]._replace(url=depot.url + ".old")
    monkeypatch.setitem(sam_module.SAM_FILES, "vit_b", gone)
    with pytest.raises(FileNotFoundError, match=r"The download failed: .*404"):
        build_sam("vit_b", 64, "download")
    assert list(cached.parent.iterdir()) == []


def test_a_server_that_does_not_answer_says_how_to_get_the_file(depot, cached, monkeypatch):
    silent = Depot()
    monkeypatch.setitem(sam_module.SAM_FILES, "vit_b", sam_module.SAM_FILES["vit_b"]._replace(url=silent.url))
    silent.server_close()
    with pytest.raises(FileNotFoundError, match="The download failed") as error:
        build_sam("vit_b", 64, "download")
    assert_says_how_to_get(str(error.value), silent, cached)
    assert list(cached.parent.iterdir()) == []


def test_an_answer_that_is_no_http_says_how_to_get_the_file(depot, cached):
    depot.garbled = True
    with pytest.raises(FileNotFoundError, match=r"The download failed: who are you\?"):
        build_sam("vit_b", 64, "download")
    assert list(cached.parent.iterdir()) == []


def test_an_altered_file_in_the_cache_is_refused_with_both_hashes(depot, cached):
    cached.write_bytes(b"altered")
    found, expected = hashlib.sha256(b"altered").hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ValueError, match=rf"{re.escape(str(cached))} has SHA-256 {found}, the published .*{expected}"):
        build_sam("vit_b", 64)


# The file in the package


@pytest.mark.parametrize("checkpoint", [None, "download"])
def test_tiny_is_loaded_from_the_package_and_never_fetched(checkpoint, depot, monkeypatch):
    monkeypatch.setattr(sam_module, "download", None)
    sam = build_sam("tiny", 64, checkpoint)
    assert sam.weights == TINY_SHA256 == hashlib.sha256(TINY_FILE.read_bytes()).hexdigest()
    assert depot.asked == []


@pytest.mark.parametrize("model", ["vit_b", "vit_l", "vit_h"])
def test_no_other_model_falls_back_to_tiny(model, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOSAM_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"SAM {model} needs Meta's checkpoint"):
        build_sam(model, 64)


def test_without_its_file_tiny_is_not_built_and_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sam_module, "TINY_FILE", tmp_path / "tiny.safetensors")
    with pytest.raises(FileNotFoundError, match=r"tiny\.safetensors belongs to this package and is missing; reinstall"):
        build_sam("tiny", 64)


@pytest.mark.parametrize("alter", [lambda data: data[:-1] + b"?", lambda data: data[:99]], ids=["a byte", "cut short"])
def test_an_altered_file_of_tiny_is_refused_with_both_hashes_and_the_remedy(alter, tmp_path, monkeypatch):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(alter(TINY_FILE.read_bytes()))
    monkeypatch.setattr(sam_module, "TINY_FILE", path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 {found}, the published file {TINY_SHA256}; reinstall") as error:
        build_sam("tiny", 64)
    assert "\n" not in str(error.value)


def test_a_given_file_of_tiny_may_be_another_than_the_published_one(tiny_file):
    assert build_sam("tiny", 64, tiny_file).weights != TINY_SHA256


# The guard around torchvision


def test_segment_anything_imports_in_a_fresh_process():
    done = run_python(
        "from blosam_monai.networks.sam import import_segment_anything as load\n"
        "print(load().SamPredictor.__name__, load() is load())"
    )
    assert (done.stdout.split(), done.returncode) == (["SamPredictor", "True"], 0), done.stderr


@pytest.mark.parametrize("first", ["torch", pytest.param("monai", marks=pytest.mark.slow)])
def test_segment_anything_imports_after_a_failed_import_left_its_pieces_behind(first):
    done = run_python(
        f"import {first}\n"
        "try:\n"
        "    import segment_anything\n"
        "except RuntimeError:\n"
        "    from blosam_monai.networks.sam import import_segment_anything\n"
        "    print(import_segment_anything().SamPredictor.__name__)\n"
        "else:\n"
        "    print('torchvision fits this torch')"
    )
    if "torchvision fits" in done.stdout:
        pytest.skip("torchvision's operators fit this torch: there is no failed import to repair")
    assert (done.stdout.split(), done.returncode) == (["SamPredictor"], 0), done.stderr
