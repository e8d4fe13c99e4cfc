"""Which detections are right, and which images are shown."""

import torch

from defeat_cli.data.opening import open_split
from defeat_cli.pages.examples import Boxes, choose_examples, find_in, taken


def test_each_object_is_taken_once_by_the_best_detection_of_its_class():
    truth = Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), ["cat", "dog"])
    corners = torch.tensor(
        [
            [0.0, 0, 10, 8],  # IoU 80/100 with the cat
            [0, 0, 10, 10],  # the cat itself, but it is taken
            [20, 0, 30, 10],  # the dog's box, called a cat
            [20, 0, 30, 4.9],  # IoU 49/100 with the dog: too little
            [20, 0, 30, 5],  # IoU 50/100 is enough
        ]
    )
    assert taken(corners, ["cat", "cat", "cat", "dog", "dog"], truth) == [True, False, False, False, True]
    nothing = Boxes(torch.zeros(0, 4), [])
    assert taken(corners[:1], ["cat"], nothing) == [False]
    assert taken(corners[:0], [], truth) == []


class Finder(torch.nn.Module):
    """Finds the same two boxes in every image, one of them hardly."""

    classes = ("circle", "unknown")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def detect(self, images):
        boxes = torch.tensor([[1.0, 2, 30, 40], [0, 0, 5, 5]])
        return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.29]), "labels": torch.tensor([2, 1])} for _ in images]


def test_images_with_objects_are_chosen_and_what_is_hardly_found_is_left_out(shapes):
    data = open_split(shapes, "val", train=False)
    some = [index for index in range(6) if len(data[index].target["boxes"])]
    assert len(some) == 5
    examples = choose_examples(data, 3)
    assert [example.name for example in examples] == [data.file_name(some[i]) for i in (0, 1, 3)]
    found = find_in(examples, Finder())
    assert [boxes.names for boxes in found] == [["unknown"]] * 3
    assert found[0].corners.tolist() == [[1, 2, 30, 40]]
    assert found[0].right == [False]
    assert len(choose_examples(data, 100)) == 5
