"""The embedding cache on disk: exact, bounded, shared, and never the reason why a run fails."""

import errno
import hashlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from blosam_monai.data.embedding_cache import EmbeddingCache

HOUR = 3600

# Writes entry after entry, each the tensor of its number, until it is killed.
WRITER = """
import itertools, sys, torch
from blosam_monai.data.embedding_cache import EmbeddingCache
cache = EmbeddingCache(sys.argv[1])
for number in itertools.count():
    cache.put(cache.key({"image": number}), torch.full((64, 64, 64), float(number)))
"""

# Gets or makes 60 tensors through one cache after the other, and prints what it got as one hash for each cache.
TRAINER = """
import hashlib, sys, torch
from blosam_monai.data.embedding_cache import EmbeddingCache
print("ready", flush=True)
sys.stdin.readline()
for folder, max_bytes in zip(sys.argv[1::2], sys.argv[2::2]):
    cache, digest = EmbeddingCache(folder, max_bytes=int(max_bytes)), hashlib.sha256()
    for number in range(60):
        key = cache.key({"image": number})
        tensor = cache.get(key)
        if tensor is None:
            tensor = torch.full((16, 32, 32), number / 7)
            cache.put(key, tensor)
        digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""
TRAINER_ENTRY = 16 * 32 * 32 * 4  # bytes, without the header


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def key(number):
    return EmbeddingCache.key({"image": number})


def path_of(cache, number):
    return cache.folder / key(number)[:2] / f"{key(number)}.safetensors"


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tensor(number):
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


@pytest.fixture
def entry_bytes(tmp_path):
    """Size of the file of one ``tensor``."""
    sample = EmbeddingCache(tmp_path / "sample")
    sample.put(key(0), tensor(0))
    return path_of(sample, 0).stat().st_size


def test_the_key_is_the_sha256_of_the_sorted_parts():
    # printf '{"size": 1024, "view": null}' | sha256sum
    expected = "945b0efc62c243eb67fd14d4de1fdb98d43d3fafd0d8c9532461319825af2473"
    assert EmbeddingCache.key({"view": None, "size": 1024}) == expected


@pytest.mark.parametrize("change", [{"size": 65}, {"view": 0}, {"dtype": "float16"}, {"more": ""}])
def test_the_key_changes_with_every_part(change):
    parts = {"size": 64, "view": None, "dtype": "float32"}
    assert EmbeddingCache.key({**parts, **change}) != EmbeddingCache.key(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_comes_back_to_the_bit(cache, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every pattern of 16 bits: NaN, infinities, -0 among them
    stored = bits.view(dtype).reshape(2, 64, -1)
    cache.put(key(0), stored)
    found = EmbeddingCache(cache.folder).get(key(0))
    assert (found.dtype, found.shape) == (dtype, stored.shape)
    assert torch.equal(found.flatten().view(torch.int16), bits)


def test_a_transposed_tensor_comes_back_as_it_was(cache):
    cache.put(key(0), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T)
    assert cache.get(key(0)).tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]


def test_changing_what_came_back_does_not_change_the_entry(cache):
    cache.put(key(0), torch.ones(3))
    cache.get(key(0)).zero_()
    assert cache.get(key(0)).tolist() == [1.0, 1.0, 1.0]


def test_hits_and_misses_are_counted(cache):
    cache.get(key(0))
    cache.put(key(0), tensor(0))
    cache.get(key(0))
    cache.get(key(0))
    assert (cache.hits, cache.misses) == (2, 1)


def test_looking_makes_no_folder(cache):
    assert cache.get(key(0)) is None
    assert cache.stats() == (0, 0)
    assert cache.clear() == 0
    assert not cache.folder.exists()


def test_a_loader_worker_can_be_given_the_cache(cache):
    cache.put(key(0), tensor(0))
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get(key(0)), tensor(0))


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_one_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))  # what some file systems leave after a power failure


def fill_with_garbage(path):
    path.write_bytes(hashlib.shake_256(b"garbage").digest(1000))


def replace_by_other_entry(path):
    other = EmbeddingCache(path.parent.parent)
    other.put(key(1), tensor(1))
    shutil.copy(path_of(other, 1), path)


def replace_by_foreign_safetensors(path):
    save_file({"embedding": tensor(0)}, path)


def replace_by_null_metadata(path):
    header = b'{"__metadata__":null,"embedding":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")


DAMAGES = [
    cut_in_half,
    cut_one_byte,
    empty,
    fill_with_zeros,
    fill_with_garbage,
    replace_by_other_entry,
    replace_by_foreign_safetensors,
    replace_by_null_metadata,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_and_is_removed(cache, damage):
    cache.put(key(0), tensor(0))
    damage(path_of(cache, 0))
    assert cache.get(key(0)) is None
    assert not path_of(cache, 0).exists()


def test_every_single_flipped_bit_is_noticed(cache):
    cache.put(key(0), tensor(0))
    path = path_of(cache, 0)
    good = path.read_bytes()
    unnoticed = []
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if cache.get(key(0)) is not None:
            unnoticed.append(bit)
    assert unnoticed == []


def test_a_damaged_entry_can_be_stored_again(cache):
    cache.put(key(0), tensor(0))
    cut_in_half(path_of(cache, 0))
    cache.get(key(0))
    cache.put(key(0), tensor(0))
    assert torch.equal(cache.get(key(0)), tensor(0))


def test_a_damaged_entry_is_logged_once_without_its_path(cache, caplog):
    cache.put(key(0), tensor(0))
    empty(path_of(cache, 0))
    cache.get(key(0))
    cache.get(key(0))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "damaged" in caplog.text
    assert str(cache.folder) not in caplog.text
    assert key(0) not in caplog.text


def test_the_entry_unused_for_longest_goes_first(tmp_path, entry_bytes):
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=int(3.5 * entry_bytes))  # 90 % of it are 3.15 entries
    for number in range(3):
        cache.put(key(number), tensor(number))
        os.utime(path_of(cache, number), (1000 + number, 1000 + number))
    cache.get(key(0))  # written first, used last
    cache.put(key(3), tensor(3))
    assert [number for number in range(4) if path_of(cache, number).exists()] == [0, 2, 3]


def test_the_bound_holds_after_every_put(tmp_path, entry_bytes):
    max_bytes = int(40.5 * entry_bytes)
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=max_bytes)
    sizes = []
    for number in range(100):
        cache.put(key(number), tensor(number % 5))
        sizes.append(sum(path.stat().st_size for path in files_in(cache.folder)))
    assert max(sizes) <= max_bytes
    assert min(sizes[40:]) >= 0.9 * max_bytes - entry_bytes  # no more is thrown away than to 90 %


def test_two_writers_exceed_the_bound_by_a_tenth_and_two_entries_at_most(tmp_path, entry_bytes):
    max_bytes = 40 * entry_bytes
    writers = [EmbeddingCache(tmp_path / "cache", max_bytes=max_bytes) for _ in range(2)]
    sizes = []
    for number in range(160):
        writers[number % 2].put(key(number), tensor(number % 5))
        sizes.append(writers[0].stats()[1])
    assert max(sizes) <= max_bytes + 2 * (max_bytes / 20 + entry_bytes)


def test_a_put_seldom_looks_at_the_whole_folder(tmp_path, entry_bytes, monkeypatch):
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=1000 * entry_bytes)
    scandir, scanned = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    for number in range(100):
        cache.put(key(number), tensor(number % 5))
    # At the first put, and then whenever a twentieth, here more than 50 entries, has been written: twice in all. A look
    # is at 256 folders for leftovers and for entries.
    assert len(scanned) == 2 * 2 * 256


def test_an_existing_folder_is_brought_within_a_smaller_bound(tmp_path, entry_bytes):
    large = EmbeddingCache(tmp_path / "cache")
    for number in range(20):
        large.put(key(number), tensor(number))
    small = EmbeddingCache(tmp_path / "cache", max_bytes=5 * entry_bytes)
    small.put(key(20), tensor(20))
    assert small.stats() == (4, 4 * entry_bytes)  # 90 % of 5 entries


def test_an_entry_larger_than_the_bound_is_not_stored(tmp_path, entry_bytes):
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=entry_bytes - 1)
    cache.put(key(0), tensor(0))
    assert cache.get(key(0)) is None
    assert cache.stats() == (0, 0)


def test_an_entry_as_large_as_the_bound_stays_until_the_next(tmp_path, entry_bytes):
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=entry_bytes)
    cache.put(key(0), tensor(0))
    os.utime(path_of(cache, 0), (1000, 1000))
    cache.put(key(1), tensor(1))
    assert cache.get(key(0)) is None
    assert torch.equal(cache.get(key(1)), tensor(1))


def test_stats_are_the_number_and_bytes_of_the_files(cache):
    for number in range(5):
        cache.put(key(number), tensor(number))
    sizes = [path.stat().st_size for path in files_in(cache.folder)]
    assert cache.stats() == (5, sum(sizes))


def test_clear_removes_the_entries_and_says_how_many(cache):
    for number in range(5):
        cache.put(key(number), tensor(number))
    assert cache.clear() == 5
    assert files_in(cache.folder) == []


def test_clear_leaves_files_of_others(cache):
    cache.put(key(0), tensor(0))
    others = [cache.folder / "sam_vit_b.safetensors", path_of(cache, 0).with_name("model.safetensors")]
    for other in others:
        other.write_bytes(b"other")
    cache.clear()
    assert files_in(cache.folder) == sorted(others)


def test_a_full_disk_is_one_warning_and_no_path(cache, caplog, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "replace", full)
    cache.put(key(0), tensor(0))
    cache.put(key(1), tensor(1))
    assert len(caplog.records) == 1
    assert "cannot be written (No space left on device)" in caplog.text
    assert str(cache.folder) not in caplog.text


def test_a_full_disk_leaves_no_half_written_file(cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    cache.put(key(0), tensor(0))
    assert files_in(cache.folder) == []


def test_a_full_disk_still_serves_what_is_there(cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache.put(key(0), tensor(0))
    monkeypatch.setattr(os, "replace", full)
    cache.put(key(1), tensor(1))
    assert torch.equal(cache.get(key(0)), tensor(0))
    assert cache.get(key(1)) is None


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    cache = EmbeddingCache(tmp_path / "parent" / "cache")
    (tmp_path / "parent").write_text("a file by now")
    cache.put(key(0), tensor(0))
    assert cache.get(key(0)) is None
    assert len(caplog.records) == 1
    assert "cannot be written (Not a directory)" in caplog.text


def test_a_folder_that_may_only_be_read_serves(cache, caplog, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    cache.put(key(0), tensor(0))
    monkeypatch.setattr(os, "utime", denied)
    assert torch.equal(cache.get(key(0)), tensor(0))
    assert caplog.records == []


@pytest.mark.parametrize("inside", ["", "cache"])
def test_a_file_is_refused_as_a_folder(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cache_dir: .*file is a file; give a folder\.$"):
        EmbeddingCache(tmp_path / "file" / inside)


def test_a_bound_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^max_bytes: 0 must be positive\.$"):
        EmbeddingCache(tmp_path, max_bytes=0)


def test_a_key_that_is_no_hash_is_refused(cache):
    with pytest.raises(ValueError, match=r"^key: '\.\./x' is not 64 hexadecimal digits"):
        cache.get("../x")


def test_threads_may_write_and_read_one_entry_at_once(cache, caplog):
    stored = torch.arange(2**16, dtype=torch.float32)

    def put_and_get(_):
        cache.put(key(0), stored)
        return torch.equal(cache.get(key(0)), stored)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(put_and_get, range(100)))
    assert caplog.records == []
    assert files_in(cache.folder) == [path_of(cache, 0)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of a process that was killed (-9) while it had an unfinished file."""
    folder = tmp_path_factory.mktemp("killed")
    deadline = time.monotonic() + 60
    with start(WRITER, folder) as writer:
        try:
            unfinished = False
            while not unfinished or len(files_in(folder)) < 4:
                assert time.monotonic() < deadline, "the writer wrote nothing"
                os.kill(writer.pid, signal.SIGCONT)
                time.sleep(0.01)
                os.kill(writer.pid, signal.SIGSTOP)
                os.waitpid(writer.pid, os.WUNTRACED)
                unfinished = any(".part" in path.suffixes for path in files_in(folder))
        finally:
            writer.kill()
    return folder


def test_a_killed_writer_leaves_every_entry_right(killed):
    cache = EmbeddingCache(killed)
    entries = cache.stats()[0]
    found = [cache.get(key(number)) for number in range(entries)]
    assert entries >= 3
    assert [number for number, got in enumerate(found) if not torch.equal(got, torch.full((64, 64, 64), number))] == []


def test_what_a_killed_writer_left_goes_when_it_is_old(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "cache")
    leftovers = list(folder.rglob("*.part.safetensors"))
    for leftover in leftovers:
        os.utime(leftover, (time.time() - 1.1 * HOUR,) * 2)
    EmbeddingCache(folder).put(key(-1), tensor(0))
    assert len(leftovers) == 1
    assert list(folder.rglob("*.part.safetensors")) == []


def test_what_may_still_be_being_written_stays(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "cache")
    for leftover in folder.rglob("*.part.safetensors"):
        os.utime(leftover, (time.time() - 0.9 * HOUR,) * 2)
    EmbeddingCache(folder).put(key(-1), tensor(0))
    assert len(list(folder.rglob("*.part.safetensors"))) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two processes, started together on a large and then on a tight empty cache: folder, and (output, errors) each."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = folder / "large", 2**30, folder / "tight", 5 * TRAINER_ENTRY
    trainers = [start(TRAINER, *arguments) for _ in range(2)]
    for trainer in trainers:
        assert trainer.stdout.readline() == "ready\n"
    for trainer in trainers:
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
    return folder, [trainer.communicate(timeout=60) for trainer in trainers]


def test_two_processes_on_an_empty_cache_get_the_same(trained):
    _, outcomes = trained
    digest = hashlib.sha256()
    for number in range(60):
        digest.update(torch.full((16, 32, 32), number / 7).numpy().tobytes())
    output = f"{digest.hexdigest()}\n" * 2  # the large cache, the tight cache
    assert outcomes == [(output, ""), (output, "")]


def test_two_processes_fill_a_large_cache_once(trained):
    folder, _ = trained
    assert len(files_in(folder / "large")) == 60


def test_two_processes_keep_a_tight_cache_tight(trained):
    folder, _ = trained
    # 5 entries; a twentieth of them and one entry more for each process
    assert sum(path.stat().st_size for path in files_in(folder / "tight")) <= 5.5 * TRAINER_ENTRY + 2 * (
        TRAINER_ENTRY + 1024
    )
