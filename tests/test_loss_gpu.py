"""The GPU's kernel of the loss without a GPU: its own source on the CPU against the definition in float64."""

import pytest
import torch
from host_build import compile_on_host

from rwkv_nb.loss import MAX_LOGIT


@pytest.fixture(scope="module", autouse=True)
def operator(tmp_path_factory):
    torch.ops.load_library(compile_on_host(tmp_path_factory.mktemp("loss"), "loss_cuda.cpp", "loss_gpu.cu"))


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("M, V", [(1, 4), (3, 260), (2, 4096), (2, 8196)])  # fewer logits than threads, and more
def test_the_kernels_source_against_float64(M, V, dtype, far):
    logits, targets = (6 * torch.randn(M, V)).to(dtype), torch.randint(V, (M,))
    z = logits.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    squares = z.max(1).values.square()
    gradient, = torch.autograd.grad((ce + MAX_LOGIT / 2 * squares).sum(), z)
    before = logits.clone()
    for wanted in (False, True):
        sums = torch.ops.rwkv_nb.loss(logits, targets, MAX_LOGIT, wanted)
        torch.testing.assert_close(sums.double(), torch.stack([ce, squares], 1).detach(), rtol=1e-5, atol=1e-5)
        assert wanted or torch.equal(logits, before)
    assert (logits.double() - gradient).norm() <= far * gradient.norm()


def test_what_is_not_a_number_is_not_hidden():
    logits = torch.randn(2, 64)
    logits[1, 7] = torch.nan
    sums = torch.ops.rwkv_nb.loss(logits, torch.tensor([3, 3]), MAX_LOGIT, True)
    assert sums[0].isfinite().all() and not sums[1, 0].isfinite() and logits[1].isnan().all()
