"""Muon against torch's own, which multiplies bfloat16, and against what orthogonal means."""

import pytest
import torch

from mllm.training.muon import Muon, orthogonal

SHAPES = [(24, 8), (8, 24), (24, 8), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for before, after in zip(matrices, orthogonal(matrices), strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        assert torch.allclose(left @ torch.diag((left.T @ after @ right.T).diag()) @ right, after, atol=1e-9)
        values = torch.linalg.svdvals(after)
        assert 0.5 < values.min() < values.max() < 1.3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 0.03)])
def test_steps_are_those_of_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    moved = []
    for make in (lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.01), lambda p: Muon(p, 0.1, 0.01, dtype=dtype)):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimiser = make(parameters)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimiser.step()
        moved.append([parameter.detach() - value for parameter, value in zip(parameters, start, strict=True)])
    for theirs, ours in zip(*moved, strict=True):
        assert (theirs - ours).norm() < tolerance * theirs.norm()


def test_a_matrix_without_a_gradient_stays():
    still, moves = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2, 3))
    moves.grad = torch.ones(2, 3)
    Muon([still, moves], 0.1, 0.5).step()
    assert torch.equal(still.detach(), torch.ones(2, 3))
    assert (moves < 1).all()
