"""Distillation losses: numbers derived by hand, slow sums, and what must hold of their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import losses as oracle
from torch._subclasses.fake_tensor import FakeTensorMode

from defeat_cli.distillation.losses import imitation_loss, region_kl, region_kl_sigmoid
from defeat_cli.distillation.masks import box_masks, gaussian_masks

DIVERGENCES = pytest.mark.parametrize(
    ("loss", "slow"),
    [(region_kl, oracle.softmax_kl), (region_kl_sigmoid, oracle.sigmoid_kl)],
    ids=["softmax", "sigmoid"],
)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def gradients_of(terms, student):
    return [torch.autograd.grad(term, student, retain_graph=True)[0] for term in terms]


def assert_close(value, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-10)


class TestImitationLoss:
    def test_by_hand(self):
        # Two channels on 1 x 3 cells; differences (1, 2), (3, 0), (0, 2), so squares sum to 5, 9, 4. The first cell is
        # foreground: N_fg = 2 * 1, fg = 4 / (2 * 2) * 5 = 5. N_bg = 2 * 2, bg = 16 / (2 * 4) * (9 + 4) = 26.
        student = torch.tensor([[[[1.0, 3.0, 0.0]], [[2.0, 0.0, 2.0]]]])
        mask = torch.tensor([[[True, False, False]]])
        fg, bg = imitation_loss(student, torch.zeros_like(student), mask, 4.0, 16.0)
        assert (fg.item(), bg.item()) == (5.0, 26.0)

    def test_padding_by_hand(self):
        # The same with the last cell in the padding: N_bg = 2 * 1, bg = 16 / (2 * 2) * 9 = 36.
        student = torch.tensor([[[[1.0, 3.0, 0.0]], [[2.0, 0.0, 2.0]]]])
        mask = torch.tensor([[[True, False, False]]])
        valid = torch.tensor([[[True, True, False]]])
        fg, bg = imitation_loss(student, torch.zeros_like(student), mask, 4.0, 16.0, valid)
        assert (fg.item(), bg.item()) == (5.0, 36.0)

    def test_a_mask_in_parts_by_hand(self):
        # One channel, differences 2 and 4, M = 0.25 and 0.5. fg: N = 0.75, (0.25 * 4 + 0.5 * 16) / (2 * 0.75) = 6;
        # bg: N = 1.25, (0.75 * 4 + 0.5 * 16) / (2 * 1.25) = 4.4.
        student = torch.tensor([[[[2.0, 4.0]]]], dtype=torch.float64)
        mask = torch.tensor([[[0.25, 0.5]]], dtype=torch.float64)
        fg, bg = imitation_loss(student, torch.zeros_like(student), mask, 1.0, 1.0)
        assert_close(fg, 6.0)
        assert_close(bg, 4.4)

    @pytest.mark.parametrize("with_valid", [False, True], ids=["all valid", "padding"])
    @pytest.mark.parametrize("kind", ["random", "none", "all", "in parts", "boxes", "gaussian"])
    def test_equals_loops(self, kind, with_valid):
        student, teacher = normal(3, 4, 5, 6, seed=1).requires_grad_(), normal(3, 4, 5, 6, seed=2)
        generator = torch.Generator().manual_seed(3)
        boxes = [
            torch.tensor([[1.0, 2.0, 13.0, 9.0], [20.2, 16.1, 21.0, 17.0]], dtype=torch.float64),
            torch.zeros(0, 4, dtype=torch.float64),
            torch.tensor([[-9.0, 4.0, 40.0, 12.5]], dtype=torch.float64),
        ]
        mask = {
            "random": torch.rand(3, 5, 6, generator=generator) > 0.6,
            "none": torch.zeros(3, 5, 6, dtype=torch.bool),
            "all": torch.ones(3, 5, 6, dtype=torch.bool),
            "in parts": torch.rand(3, 5, 6, generator=generator, dtype=torch.float64),
            "boxes": box_masks(boxes, [(5, 6)], [4])[0],
            "gaussian": gaussian_masks(boxes, [(5, 6)], [4])[0],
        }[kind]
        valid = None
        if with_valid:
            valid = torch.zeros(3, 5, 6, dtype=torch.bool)
            valid[0, :4, :5] = valid[1, :5, :6] = valid[2, :2, :6] = True
        terms = imitation_loss(student, teacher, mask, 4.0, 16.0, valid)
        slow = oracle.imitation_loss(
            student.tolist(), teacher.tolist(), mask.tolist(), 4.0, 16.0, valid.tolist() if with_valid else None
        )
        for value, expected in zip([*terms, *gradients_of(terms, student)], slow, strict=True):
            assert_close(value, expected)

    def test_fg_only_and_bg_only_add_up_to_the_neck_term(self):
        student, teacher = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
        mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
        fg_only = imitation_loss(student, teacher, mask, 4.0, 0.0)
        bg_only = imitation_loss(student, teacher, mask, 0.0, 16.0)
        neck = imitation_loss(student, teacher, mask, 4.0, 16.0)
        assert fg_only[1] == bg_only[0] == 0
        assert fg_only[0] > 0
        assert bg_only[1] > 0
        assert sum(fg_only) + sum(bg_only) == sum(neck)

    def test_full_mask_is_half_the_mean_squared_error(self):
        student, teacher = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
        fg, bg = imitation_loss(student, teacher, torch.ones(2, 4, 4, dtype=torch.bool), 1.0, 1.0)
        assert_close(fg, torch.nn.functional.mse_loss(student, teacher) / 2)
        assert bg == 0

    @pytest.mark.parametrize("everything", ["foreground", "background", "padding"])
    def test_an_empty_group_is_zero_and_keeps_its_gradient(self, everything):
        student = normal(1, 2, 3, 3).requires_grad_()
        mask = torch.full((1, 3, 3), everything == "foreground")
        valid = torch.full((1, 3, 3), everything != "padding")
        terms = dict(
            zip(("foreground", "background"), imitation_loss(student, 0 * student, mask, 1, 1, valid), strict=True)
        )
        assert [name for name, term in terms.items() if term != 0] == ([] if everything == "padding" else [everything])
        for name, term in terms.items():
            (gradient,) = torch.autograd.grad(term, student, retain_graph=True)
            assert bool((gradient == 0).all()) == (name != everything)

    def test_gradcheck(self):
        student, teacher = normal(2, 3, 3, 4, seed=1).requires_grad_(), normal(2, 3, 3, 4, seed=2)
        mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        valid = torch.ones(2, 3, 4, dtype=torch.bool)
        valid[1, 2:] = False
        assert torch.autograd.gradcheck(lambda s: imitation_loss(s, teacher, mask, 4.0, 16.0, valid), student)

    def test_a_tiny_mask_is_weighted_like_any_other(self):
        # The mean over foreground does not depend on the mask's scale: 1e-30 of it gives the same.
        student, teacher = normal(1, 2, 3, 3, seed=1).float(), normal(1, 2, 3, 3, seed=2).float()
        mask = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0))
        fg, _ = imitation_loss(student, teacher, mask, 4.0, 16.0)
        tiny, _ = imitation_loss(student, teacher, mask * 1e-30, 4.0, 16.0)
        torch.testing.assert_close(tiny, fg)

    def test_the_teacher_gets_no_gradient(self):
        student, teacher = normal(1, 2, 3, 3, seed=1).requires_grad_(), normal(1, 2, 3, 3, seed=2).requires_grad_()
        sum(imitation_loss(student, teacher, torch.ones(1, 3, 3, dtype=torch.bool), 1.0, 1.0)).backward()
        assert student.grad is not None
        assert teacher.grad is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_features_are_computed_in_float32(self, dtype):
        # Squares of 300 overflow float16, and a sum over 4096 cells loses most of them in bfloat16.
        student = torch.full((1, 4, 64, 64), 300.0, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 64, 64, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            fg, _ = imitation_loss(student, torch.zeros_like(student), mask, 2.0, 1.0)
        assert fg.dtype == torch.float32
        assert fg.item() == 300.0**2
        fg.backward()
        assert student.grad.dtype == dtype

    def test_shapes_that_do_not_fit_are_refused(self):
        features, mask = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="do not describe the same cells"):
            imitation_loss(features, features[:, :1], mask, 1.0, 1.0)
        with pytest.raises(ValueError, match="do not describe the same cells"):
            imitation_loss(features, features, mask[:1], 1.0, 1.0)
        with pytest.raises(ValueError, match=r"valid \(2, 4, 1\)"):
            imitation_loss(features, features, mask, 1.0, 1.0, mask[..., :1])


class TestRegionKl:
    def test_softmax_by_hand(self):
        # Teacher (log 3, 0): 3/4, 1/4. Student (0, 0): 1/2, 1/2. KL = 3/4 log(3/2) + 1/4 log(1/2).
        teacher, student = double([[math.log(3), 0.0]]), double([[0.0, 0.0]])
        fg, bg = region_kl(student, teacher, torch.tensor([True]))
        assert_close(fg, 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert bg == 0

    def test_temperature_by_hand(self):
        # Teacher (2 log 3, 0) at temperature 2 is the one above: 4 times that KL. At temperature 1 it is 9/10, 1/10.
        teacher, student = double([[2 * math.log(3), 0.0]] * 2), double([[0.0, 0.0]] * 2)
        fg, bg = region_kl(student, teacher, torch.tensor([True, False]), temperature_fg=2.0)
        assert_close(fg, 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
        assert_close(bg, 0.9 * math.log(1.8) + 0.1 * math.log(0.2))

    def test_groups_and_weights_by_hand(self):
        # With a the KL of the first test: foreground regions a, 0 (mean a / 2), background a, a, 0 (mean 2a / 3).
        a = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        teacher = double([[math.log(3), 0.0], [0, 0], [math.log(3), 0.0], [0.0, math.log(3)], [1, 1]])
        foreground = torch.tensor([True, True, False, False, False])
        fg, bg = region_kl(torch.zeros_like(teacher), teacher, foreground, beta_fg=3.0, beta_bg=6.0)
        assert_close(fg, 3 * a / 2)
        assert_close(bg, 6 * 2 * a / 3)

    def test_sigmoid_by_hand(self):
        # Two classes, teacher 3/4 and 1/2, student 1/2 each: only the first differs, by the KL of 3/4, 1/4 to 1/2, 1/2.
        teacher, student = double([[math.log(3), 0.0]]), double([[0.0, 0.0]])
        fg, bg = region_kl_sigmoid(student, teacher, torch.tensor([True]))
        assert_close(fg, 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert bg == 0

    @DIVERGENCES
    @pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 2.0), (0.5, 3.0)])
    @pytest.mark.parametrize("group", ["mixed", "all foreground", "all background", "some ignored"])
    def test_equals_loops(self, loss, slow, temperatures, group):
        student, teacher = normal(9, 5, seed=1, scale=3.0).requires_grad_(), normal(9, 5, seed=2, scale=3.0)
        labels = {
            "mixed": [1, 0, 0, 3, 0, 0, 0, 2, 0],
            "all foreground": [1] * 9,
            "all background": [0] * 9,
            "some ignored": [1, -1, 0, -1, 0, 0, 4, -1, 2],
        }[group]
        labels = torch.tensor(labels)
        valid = labels >= 0 if group == "some ignored" else None
        terms = loss(student, teacher, labels > 0, 2.0, 3.0, *temperatures, valid=valid)
        found = list(zip(terms, gradients_of(terms, student), strict=True))
        for (value, gradient), chosen, beta, temperature in zip(
            found, (labels > 0, labels == 0), (2.0, 3.0), temperatures, strict=True
        ):
            expected, slopes = oracle.region_loss(
                slow, student.tolist(), teacher.tolist(), chosen.tolist(), beta, temperature
            )
            assert_close(value, expected)
            assert_close(gradient, slopes)

    @DIVERGENCES
    def test_equal_logits_give_zero(self, loss, slow):
        logits = normal(6, 4, scale=20.0).float().requires_grad_()
        terms = loss(logits, logits.detach(), torch.arange(6) < 2, temperature_fg=2.0)
        assert [term.item() for term in terms] == [0.0, 0.0]
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients_of(terms, logits))

    @DIVERGENCES
    @pytest.mark.parametrize("regions", [0, 3])
    @pytest.mark.parametrize("is_foreground", [False, True])
    def test_an_empty_group_is_zero_and_keeps_its_gradient(self, loss, slow, regions, is_foreground):
        student, teacher = normal(regions, 4, seed=1).requires_grad_(), normal(regions, 4, seed=2)
        terms = loss(student, teacher, torch.full((regions,), is_foreground))
        assert [bool(term != 0) for term in terms] == [regions > 0 and is_foreground, regions > 0 and not is_foreground]
        empty = terms[1 if is_foreground else 0]
        (gradient,) = torch.autograd.grad(empty, student)
        assert gradient.shape == student.shape
        assert not gradient.any()

    @DIVERGENCES
    def test_gradcheck(self, loss, slow):
        student, teacher = normal(5, 4, seed=1).requires_grad_(), normal(5, 4, seed=2)
        foreground = torch.tensor([True, False, True, False, False])
        assert torch.autograd.gradcheck(lambda s: loss(s, teacher, foreground, 2.0, 3.0, 2.0, 0.5), student)

    @DIVERGENCES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_logits(self, loss, slow, dtype):
        # Sure and opposite, sure and equal, and nearly equal logits; true values by the loop in Python's floats.
        levels = [-100.0, -99.0, 0.0, 30.0, 100.0]
        rows = [(s, t) for s in levels for t in levels]
        student = torch.tensor([[s, 0.0] for s, _ in rows], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[t, 0.0] for _, t in rows], dtype=dtype)
        for i, (s, t) in enumerate(rows):
            one = slice(i, i + 1)
            fg, _ = loss(student[one], teacher[one], torch.tensor([True]))
            (gradient,) = torch.autograd.grad(fg, student)
            expected, slopes = slow([s, 0.0], [t, 0.0], 1.0)
            assert math.isclose(fg.item(), expected, rel_tol=1e-5, abs_tol=1e-11), (s, t)
            torch.testing.assert_close(gradient[i], torch.tensor(slopes, dtype=dtype), rtol=1e-5, atol=1e-7)

    @DIVERGENCES
    def test_the_teacher_gets_no_gradient(self, loss, slow):
        student, teacher = normal(3, 4, seed=1).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
        sum(loss(student, teacher, torch.tensor([True, False, True]))).backward()
        assert student.grad is not None
        assert teacher.grad is None

    @DIVERGENCES
    def test_half_logits_are_computed_in_float32(self, loss, slow):
        student, teacher = normal(7, 4, seed=1).bfloat16(), normal(7, 4, seed=2).bfloat16()
        foreground = torch.arange(7) < 3
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(student, teacher, foreground)
        for term, expected in zip(terms, loss(student.float(), teacher.float(), foreground), strict=True):
            assert term.dtype == torch.float32
            assert term == expected

    @DIVERGENCES
    def test_shapes_that_do_not_fit_are_refused(self, loss, slow):
        with pytest.raises(ValueError, match="do not describe the same regions"):
            loss(torch.zeros(3, 4), torch.zeros(3, 1), torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match="do not describe the same regions"):
            loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(1, dtype=torch.bool))


def test_nothing_waits_for_the_device():
    # Fake tensors have no values: reading one, as `.item()` or a boolean index does, raises.
    with FakeTensorMode(allow_non_fake_inputs=False):
        features, mask = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 4, 4, dtype=torch.bool)
        sum(imitation_loss(features, torch.zeros(2, 3, 4, 4), mask, 1.0, 1.0, mask)).backward()
        logits, foreground = torch.zeros(5, 4, requires_grad=True), torch.zeros(5, dtype=torch.bool)
        for loss in (region_kl, region_kl_sigmoid):
            sum(loss(logits, torch.zeros(5, 4), foreground, 1, 1, 1, 2, valid=foreground)).backward()
