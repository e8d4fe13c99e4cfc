from defeat_cli.text import counted, listed


def test_the_first_names_are_listed_and_the_others_counted():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed("abcdefghi") == "a, b, c, d, e, f, g, h and 1 more"
    assert listed(range(5), most=2) == "0, 1 and 3 more"
    assert listed([]) == ""


def test_a_number_takes_its_noun_in_the_right_form():
    assert [counted(number, "step") for number in (0, 1, 2, 118000)] == [
        "0 steps",
        "1 step",
        "2 steps",
        "118,000 steps",
    ]
    assert counted(1, "box", "boxes") == "1 box"
    assert counted(3, "box", "boxes") == "3 boxes"
