"""RoI pooling's quick backward pass against torchvision's own, and one gradient worked out by hand."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from defeat_cli.detectors.pooling import RoIPool, pool_with_one_wait

SHAPES = {"0": (2, 3, 24, 32), "1": (2, 3, 12, 16), "2": (2, 3, 6, 8)}
SIZE = [(96, 128), (90, 120)]


def pools(dtype=torch.float32, size=7, points=2, levels=tuple(SHAPES)):
    """Both pools, and two sets of equal maps that want gradients."""
    torch.manual_seed(0)
    plain = MultiScaleRoIAlign(list(levels), size, points, canonical_scale=32, canonical_level=3)
    maps = [{name: torch.randn(SHAPES[name], dtype=dtype, requires_grad=True) for name in levels}]
    maps.append({name: level.detach().clone().requires_grad_() for name, level in maps[0].items()})
    return (plain, RoIPool.like(plain)), maps


def boxes(dtype=torch.float32):
    """Of all sizes, at the borders, beyond them, without area, and an image without any."""
    torch.manual_seed(1)
    corner, side = torch.rand(40, 2, dtype=dtype) * 120 - 10, torch.rand(40, 2, dtype=dtype).square() * 90
    edges = torch.tensor([[0, 0, 128, 96], [-40, -40, 200, 200], [5, 5, 5, 5], [128, 96, 140, 100]], dtype=dtype)
    return [torch.cat([edges, torch.cat([corner, corner + side], dim=1)]), torch.zeros(0, 4, dtype=dtype)]


@pytest.mark.parametrize("settings", [{}, {"size": 2, "points": 1}, {"points": 3, "levels": ("0",)}], ids=str)
def test_outputs_are_torchvisions_and_gradients_agree(settings):
    both, maps = pools(torch.float64, **settings)
    outputs = [pool(levels, boxes(torch.float64), SIZE) for pool, levels in zip(both, maps, strict=True)]
    assert torch.equal(*outputs)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for name in maps[0]:
        assert maps[0][name].grad.abs().sum() > 0
        torch.testing.assert_close(maps[1][name].grad, maps[0][name].grad, rtol=1e-12, atol=1e-12)


def test_in_single_precision_the_points_at_the_edges_are_the_same():
    both, maps = pools()
    edge = torch.tensor([[-8.0, -8.0, 20.0, 20.0], [100.0, 70.0, 132.0, 100.0]]).repeat(20, 1)
    edge = edge + torch.linspace(-2, 2, len(edge))[:, None]
    outputs = [pool(levels, [edge, edge[:3]], SIZE) for pool, levels in zip(both, maps, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for name in maps[0]:
        torch.testing.assert_close(maps[1][name].grad, maps[0][name].grad, rtol=1e-5, atol=1e-4)


def test_a_network_may_have_fewer_levels_than_the_pool_names():
    both, maps = pools(torch.float64)
    outputs = []
    for pool, levels in zip(both, maps, strict=True):
        del levels["2"]
        outputs.append(pool(levels, boxes(torch.float64), SIZE))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for name in maps[0]:
        torch.testing.assert_close(maps[1][name].grad, maps[0][name].grad, rtol=1e-12, atol=1e-12)


def test_a_gradient_by_hand():
    """One region of 4 x 4 cells, one bin, one point: it lies at (2, 2), on cell (2, 2) alone. Moved right by a quarter
    of a cell it takes 3/4 of that cell and 1/4 of the next."""
    for shift, expected in ((0.0, {(2, 2): 1.0}), (0.25, {(2, 2): 0.75, (2, 3): 0.25})):
        pool = RoIPool(["0"], 1, 1)
        level = torch.zeros(1, 1, 6, 6, requires_grad=True)
        pool({"0": level}, [torch.tensor([[shift, 0.0, 4.0 + shift, 4.0]])], [(6, 6)]).sum().backward()
        found = {tuple(cell): level.grad[0, 0][tuple(cell)].item() for cell in level.grad[0, 0].nonzero().tolist()}
        assert found == expected


def test_no_region_at_all_keeps_the_path_of_the_gradient():
    (_, pool), (levels, _) = pools()
    output = pool(levels, [torch.zeros(0, 4)] * 2, SIZE)
    assert output.shape == (0, 3, 7, 7)
    output.sum().backward()
    assert all(torch.equal(level.grad, torch.zeros_like(level)) for level in levels.values())


def test_gradients_do_not_depend_on_the_number_of_threads():
    gradients = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        (_, pool), (levels, _) = pools()
        pool(levels, boxes(), SIZE).square().sum().backward()
        gradients.append([level.grad for level in levels.values()])
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("most", [200.0, 20.0], ids=["all levels", "some levels have none"])
def test_pooling_with_one_wait_is_torchvisions_to_the_last_bit(most):
    """As it is on a GPU: all levels sorted and cut at once."""
    (pool, _), (maps, _) = pools()
    of_images = [box.clamp(max=most) for box in boxes()]
    expected = pool(maps, of_images, SIZE)
    found = pool_with_one_wait(pool, list(maps.values()), of_images)
    assert torch.equal(found, expected)
    weights = torch.rand_like(found)
    gradients = [torch.autograd.grad((pooled * weights).sum(), list(maps.values())) for pooled in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_level_that_a_detector_does_not_have_is_left_out():
    """torchvision's MobileNetV3 detector names four levels and has two."""
    maps = {name: torch.randn(SHAPES[name], requires_grad=True) for name in ("0", "1")} | {"pool": torch.zeros(1)}
    pool = RoIPool(["0", "1", "2", "3"], 7, 2)
    expected = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(maps, boxes(), SIZE)
    found = pool(maps, boxes(), SIZE)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert maps["0"].grad.isfinite().all()
