from defeat_cli.text import counted, listed, out_of, spoken_size


def test_the_first_names_are_listed_and_the_others_counted():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed("abcdefghi") == "a, b, c, d, e, f, g, h and 1 more"
    assert listed(range(5), most=2) == "0, 1 and 3 more"
    assert listed([]) == ""


def test_one_thing_is_not_many():
    assert [counted(1, "step"), counted(1200, "step"), counted(0, "image")] == ["1 step", "1,200 steps", "0 images"]
    assert [counted(1, "class"), counted(3, "class")] == ["1 class", "3 classes"]
    assert [counted(n, "image has", "images have") for n in (1, 118000)] == ["1 image has", "118,000 images have"]


def test_a_part_of_many_has_its_own_verb():
    shares = [out_of(part, whole, "image", "is", "are") for part, whole in ((1, 1), (1, 3), (2, 3), (1200, 5000))]
    assert shares == ["1 of 1 image is", "1 of 3 images is", "2 of 3 images are", "1,200 of 5,000 images are"]


def test_sizes_are_rounded_up_to_mib_and_never_to_nothing():
    assert [spoken_size(n) for n in (0, 1, 2**20, 2**20 + 1)] == ["0 MiB", "1 MiB", "1 MiB", "2 MiB"]
    assert [spoken_size(n) for n in (2**30, 3 * 2**29)] == ["1.0 GiB", "1.5 GiB"]
