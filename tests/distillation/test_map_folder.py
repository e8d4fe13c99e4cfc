"""Maps in files: what one process has computed, another finds, to the bit; and nothing that is of something else."""

import pytest
import torch
from tiny import batch, build

from defeat_cli.distillation import map_folder
from defeat_cli.distillation.caching import FeatureCache


@pytest.fixture
def prepared():
    return build().prepare(batch()[0])  # 64 x 64, 64 x 90 and 64 x 70


def teacher(seed=1):
    return build(seed=seed, fpn_channels=16).eval().requires_grad_(False)


def looks_for(detector, prepared, folder, place="neck"):
    """What a new cache on the folder gives; itself; and the batches that it has had the detector look at."""
    cache, looks = FeatureCache(2**30, place), []
    cache.shared = folder
    name = "features" if place == "neck" else "stages"
    real = getattr(detector, name)
    setattr(detector, name, lambda batch: looks.append(batch) or real(batch))
    return cache.maps(detector, prepared), cache, looks


def number_of_looks(detector, prepared, folder, place="neck"):
    return len(looks_for(detector, prepared, folder, place)[2])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("place", ["neck", "backbone"])
def test_a_second_process_finds_all_with_the_same_bits(prepared, tmp_path, place, dtype):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        first, cache, looks = looks_for(teacher(), prepared, tmp_path / "features", place)
        second, other, none = looks_for(teacher(), prepared, tmp_path / "features", place)
    assert (len(looks), len(none)) == (4, 0)  # the last is padding
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert cache.bytes == other.bytes
    assert cache.spared == 0 < other.spared


def test_what_was_spared_is_the_time_that_it_took(prepared, tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 23.0, 30.0, 34.0, 40.0, 45.0])  # begun and done
    for module in ("caching", "map_folder"):
        monkeypatch.setattr(f"defeat_cli.distillation.{module}.time.perf_counter", lambda: next(clock))
    looks_for(teacher(), prepared, tmp_path)
    assert looks_for(teacher(), prepared, tmp_path)[1].spared == 2 + 3 + 4 + 5


def test_maps_of_other_weights_another_network_precision_or_number_of_threads_are_not_found(prepared, tmp_path):
    assert number_of_looks(teacher(), prepared, tmp_path) == 4
    assert number_of_looks(teacher(), prepared, tmp_path) == 0
    assert number_of_looks(teacher(seed=2), prepared, tmp_path) == 4
    assert number_of_looks(teacher(), prepared, tmp_path, "backbone") == 4
    strided = teacher()
    next(m for m in strided.modules() if isinstance(m, torch.nn.Conv2d)).dilation = (2, 2)  # of the same weights
    assert number_of_looks(strided, prepared, tmp_path) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert number_of_looks(teacher(), prepared, tmp_path) == 4
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert number_of_looks(teacher(), prepared, tmp_path) == 4
    finally:
        torch.set_num_threads(before)
    assert number_of_looks(teacher(), prepared, tmp_path) == 0


@pytest.mark.parametrize("damage", [b"", b"not a file of torch", None])
def test_a_damaged_file_is_made_anew(prepared, tmp_path, damage):
    expected = looks_for(teacher(), prepared, tmp_path)[0]
    for file in tmp_path.glob("*/*.pt"):
        file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    found, _, looks = looks_for(teacher(), prepared, tmp_path)
    assert len(looks) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert number_of_looks(teacher(), prepared, tmp_path) == 0


def test_where_the_disk_has_no_room_nothing_is_written_and_all_goes_on(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(map_folder, "ROOM", 2**60)
    assert [number_of_looks(teacher(), prepared, tmp_path / "full") for _ in range(2)] == [4, 4]
    assert list(tmp_path.glob("full/*/*")) == []
    (tmp_path / "file").touch()  # in the place of a folder
    monkeypatch.undo()
    assert [number_of_looks(teacher(), prepared, tmp_path / "file") for _ in range(2)] == [4, 4]


def test_of_a_file_that_could_not_be_written_nothing_stays(prepared, tmp_path, monkeypatch):
    def save(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch, "save", save)
    assert number_of_looks(teacher(), prepared, tmp_path) == 4
    assert list(tmp_path.glob("*/*")) == []
