"""Maps in files: what one process has computed, another finds, to the bit; and nothing that is of something else."""

import pytest
import torch
from tiny import batch, build

import defeat_cli
from defeat_cli.distillation import map_folder
from defeat_cli.distillation.caching import FeatureCache
from defeat_cli.distillation.map_folder import MapFolder, remove


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """However full the disk is that the tests run on."""
    monkeypatch.setattr(map_folder, "ROOM", 0)


@pytest.fixture
def prepared():
    return build().prepare(batch()[0])  # 64 x 64, 64 x 90 and 64 x 70


def teacher(seed=1):
    return build(seed=seed, fpn_channels=16).eval().requires_grad_(False)


def maps_from(folder, detector, prepared, place="neck"):
    """What a new cache on the folder gives; itself; and the batches that it has had the detector look at."""
    cache, looks = FeatureCache(2**30, place), []
    cache.folder = MapFolder(folder, detector, place)
    name = "features" if place == "neck" else "stages"
    real = getattr(detector, name)
    setattr(detector, name, lambda batch: looks.append(batch) or real(batch))
    return cache.maps(detector, prepared), cache, looks


def number_of_looks(folder, detector, prepared, place="neck"):
    return len(maps_from(folder, detector, prepared, place)[2])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("place", ["neck", "backbone"])
def test_a_second_process_finds_all_with_the_same_bits(prepared, tmp_path, place, dtype):
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        first, cache, looks = maps_from(tmp_path / "features", teacher(), prepared, place)
        second, other, none = maps_from(tmp_path / "features", teacher(), prepared, place)
    assert (len(looks), len(none)) == (4, 0)  # the last is padding
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert cache.bytes == other.bytes


def test_what_is_spared_is_the_time_of_computing_less_that_of_reading_and_writing(prepared, tmp_path, monkeypatch):
    # Of four looks each: looked for from 0 to 0.125, computed from 10 to 12, written from 20 to 20.5.
    ticks = iter([0, 0.125, 10, 12, 20, 20.5] * 4)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    first = maps_from(tmp_path, teacher(), prepared)[1]
    assert first.folder.take_spared() == -4 * 0.625
    assert first.folder.take_spared() == 0
    ticks = iter([30, 30.25] * 4)  # read
    assert maps_from(tmp_path, teacher(), prepared)[1].folder.take_spared() == 4 * (2 - 0.25)


def test_maps_of_other_weights_network_place_precision_threads_or_version_are_not_found(
    prepared, tmp_path, monkeypatch
):
    assert number_of_looks(tmp_path, teacher(), prepared) == 4
    assert number_of_looks(tmp_path, teacher(), prepared) == 0
    assert number_of_looks(tmp_path, teacher(seed=2), prepared) == 4
    assert number_of_looks(tmp_path, teacher(), prepared, "backbone") == 4
    dilated = teacher()
    next(m for m in dilated.modules() if isinstance(m, torch.nn.Conv2d)).dilation = (2, 2)  # of the same weights
    assert number_of_looks(tmp_path, dilated, prepared) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert number_of_looks(tmp_path, teacher(), prepared) == 4
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert number_of_looks(tmp_path, teacher(), prepared) == 4
    finally:
        torch.set_num_threads(before)
    with monkeypatch.context() as later:
        later.setattr(defeat_cli, "__version__", "99")
        assert number_of_looks(tmp_path, teacher(), prepared) == 4
    assert number_of_looks(tmp_path, teacher(), prepared) == 0


def flipped(content):
    """With one bit of the last map turned."""
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-100], lambda content: b""])
def test_a_damaged_file_is_made_anew(prepared, tmp_path, damage):
    expected = maps_from(tmp_path, teacher(), prepared)[0]
    for file in tmp_path.glob("*/*.pt"):
        file.write_bytes(damage(file.read_bytes()))
    found, _, looks = maps_from(tmp_path, teacher(), prepared)
    assert len(looks) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert number_of_looks(tmp_path, teacher(), prepared) == 0


def test_where_the_disk_has_no_room_nothing_is_written_and_all_goes_on(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(map_folder, "ROOM", 2**60)
    assert [number_of_looks(tmp_path / "full", teacher(), prepared) for _ in range(2)] == [4, 4]
    assert list(tmp_path.glob("full/*/*")) == []
    (tmp_path / "file").touch()  # in the place of a folder
    monkeypatch.setattr(map_folder, "ROOM", 0)
    assert [number_of_looks(tmp_path / "file", teacher(), prepared) for _ in range(2)] == [4, 4]


def test_of_a_file_that_could_not_be_written_nothing_stays(prepared, tmp_path, monkeypatch):
    def replace(temporary, file):
        assert temporary.stat().st_size > 0
        raise OSError("the disk is full")

    monkeypatch.setattr(map_folder.os, "replace", replace)
    assert number_of_looks(tmp_path, teacher(), prepared) == 4
    assert list(tmp_path.glob("*/*")) == []


def test_only_what_was_kept_is_removed(prepared, tmp_path):
    folder = tmp_path / "features"
    remove(folder)  # there is none
    maps_from(folder, teacher(), prepared)
    remove(folder)
    assert not folder.exists()
    for seed in (1, 2):
        maps_from(folder, teacher(seed), prepared)
    own = next(folder.glob("*"))  # the first one; the other goes all the same
    for path in (folder / "mine" / "mine.txt", own / "mine.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    remove(folder)
    assert sorted(path.name for path in folder.rglob("*")) == sorted(["mine", "mine.txt", own.name, "mine.txt"])
