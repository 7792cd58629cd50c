"""Max unpooling against torch's, bit for bit; any index, duplicates, deterministic mode, derivatives."""

import pytest
import torch
from samples import error_inputs, layouts, same_bits, samples
from torch import Tensor
from torch.nn import functional as F

import fastseg
import fastseg.nn
from fastseg.ops import max_pool2d, max_unpool1d, max_unpool2d, max_unpool3d
from fastseg.ops.pool_indices import PoolIndices

OURS = {1: max_unpool1d, 2: max_unpool2d, 3: max_unpool3d}
THEIRS = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
HOSTILE = [-1, 16, 2**31, 2**32 + 3, -(2**63), 2**63 - 1]

pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # torch's own is the reference, and not deterministic


def unpool_module(dims: int, kwargs: dict):
    kwargs = {key: value for key, value in kwargs.items() if key != "output_size"}
    return getattr(fastseg.nn, f"MaxUnpool{dims}d")(**kwargs)


def compact(dims: int, indices: Tensor, kwargs: dict) -> PoolIndices:
    tuples = [v if isinstance(v, tuple) else (v,) * dims for v in (kwargs["kernel_size"], kwargs["stride"] or
              kwargs["kernel_size"], kwargs["padding"])]  # fmt: skip
    tuples = [v if len(v) == dims else v * dims for v in tuples]
    return PoolIndices.from_torch(indices, tuple(kwargs["output_size"])[-dims:], *tuples, (1,) * dims)


@pytest.mark.parametrize("variant", ["", "grad"])
@pytest.mark.parametrize("dims, every", [(1, 7), (2, 7), (3, 7), pytest.param(2, 1, marks=pytest.mark.long)])
def test_torch_samples(dims, every, variant, device):
    """Every seventh, as of max pooling."""
    found = samples(f"max_unpool{dims}d", variant, device=device)
    assert found
    for number, sample in enumerate(found[::every]):
        (indices,), kwargs = sample.args, sample.kwargs
        module = unpool_module(dims, kwargs)
        with fastseg.explain() as report:
            got = module(sample.input, indices, output_size=kwargs["output_size"])
        assert [d.path for d in report] == ["triton"]
        want = THEIRS[dims](sample.input, indices, **kwargs)
        same_bits(got, want)
        if number % 4 == 0:
            same_bits(module(sample.input, compact(dims, indices, kwargs), output_size=kwargs["output_size"]), want)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torch_samples_derivatives(dims, device):
    """gradcheck, gradgradcheck and forward mode on every third sample with distinct indices; of 2-D every seventh."""
    found = samples(f"max_unpool{dims}d", "grad", device=device, requires_grad=True)
    assert found
    for number, sample in enumerate(found[:: 7 if dims == 2 else 3]):
        (indices,), kwargs = sample.args, sample.kwargs
        for index in (indices,) if number % 4 else (indices, compact(dims, indices, kwargs)):
            f = lambda v, i=index, k=kwargs: OURS[dims](v, i, **k)
            assert torch.autograd.gradcheck(f, sample.input, check_forward_ad=True, fast_mode=True)
            assert torch.autograd.gradgradcheck(f, sample.input, fast_mode=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torch_error_inputs(dims):
    found = error_inputs(f"max_unpool{dims}d")
    assert found
    for error in found:
        with pytest.raises(error.error_type, match=error.error_regex):
            OURS[dims](error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


def test_errors_in_torchs_words(device):
    x = torch.rand(1, 2, 2, 2, device=device)
    i = torch.zeros(1, 2, 2, 2, dtype=torch.int64, device=device)
    for error, text, call in (
        (RuntimeError, "elements in indices should be type int64", lambda f: f(x, i.int(), 2)),
        (RuntimeError, "Expected shape of indices to be same as that of the input", lambda f: f(x, i[:, :1], 2)),
        (RuntimeError, "Expected input to have non-zero size for non-batch", lambda f: f(x[:, :0], i[:, :0], 2)),
        (NotImplementedError, "not implemented for", lambda f: f(x.int(), i, 2)),
        (
            ValueError,
            r"invalid output_size .* \(dim 0 must be between 2 and 6\)",
            lambda f: f(x, i, 2, None, 0, [9, 9]),
        ),
        (ValueError, "output_size should be a sequence containing 2 or 4", lambda f: f(x, i, 2, None, 0, [9])),
        (RuntimeError, "should be a 3d or 4d Tensor", lambda f: f(x[0, 0], i[0, 0], 2)),
        (ValueError, "output_size must contain non-negative spatial", lambda f: f(x, i, 2, None, 3)),
    ):
        for function in (max_unpool2d, F.max_unpool2d):
            with pytest.raises(error, match=text):
                call(function)
    with pytest.raises(ValueError, match='check_indices is \'never\'; use "async" or "sync"'):
        max_unpool2d(x, i, 2, check_indices="never")


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("geometry", [(2, 2, 0), (3, 2, 1), (2, 3, 0), ((3, 1), (1, 2), (1, 0))], ids=str)
def test_layouts_and_dtypes(geometry, last, device):
    """Values whose duplicates are equal, as a pooling's are; each layout as torch answers it; half types too."""
    x = torch.randn(2, 5, 9, 7, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values, indices = max_pool2d(x.to(dtype), *geometry, return_indices=True)
        codes = max_pool2d(x.to(dtype), *geometry, return_indices=True, index_format="compact")[1]
        for v in layouts(values):
            want = F.max_unpool2d(v, indices, *geometry, output_size=(9, 7))
            same_bits(max_unpool2d(v, indices, *geometry, output_size=(9, 7)), want)
            same_bits(max_unpool2d(v, codes, *geometry, output_size=(9, 7)), want)
        same_bits(max_unpool2d(values[0], indices[0], *geometry, output_size=(9, 7)), want[0])


@pytest.mark.parametrize("bad", HOSTILE)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_an_index_outside_is_an_error_and_never_followed(bad, last, device):
    """The checker behind the interpreter sees every access; the backward reads nothing for such a window."""
    fmt = torch.channels_last if last else torch.contiguous_format
    v = torch.randn(2, 3, 2, 2, device=device).contiguous(memory_format=fmt)
    indices = torch.tensor([[0, 2], [8, 10]], device=device).expand(2, 3, 2, 2).contiguous(memory_format=fmt)
    indices[1, 2, 1, 0] = bad
    for check in ("sync", "async") if device == "cpu" else ("sync",):
        with pytest.raises(
            RuntimeError, match=rf"Found an invalid max index: {bad} \(output volumes are of size 4x4\)"
        ):
            max_unpool2d(v, indices, 2, check_indices=check)
    from fastseg.ops.registered.pooling import Geometry, pick_op, unpool_op

    geometry = Geometry([4, 4], [2, 2], [2, 2], [2, 2], [0, 0], [1, 1])
    dy = torch.randn(2, 3, 4, 4, device=device).contiguous(memory_format=fmt)
    dx = pick_op(dy, indices, *geometry, 64, last)
    assert dx[1, 2, 1, 0] == 0 and torch.equal(dx[0], dy[0, :, ::2, ::2])
    y = unpool_op(v, indices, *geometry, 64, last, True, False)  # as the backward of pooling calls it
    want = torch.zeros_like(dy)
    want[:, :, ::2, ::2] = v
    want[1, 2, 2, 0] = 0
    assert torch.equal(y, want)


def test_codes_that_name_no_cell(device):
    """From a damaged file, say: codes past the window's last cell, or cells past the plane's edge, place nothing."""
    x = torch.randn(2, 3, 5, 5, device=device)
    values, indices = max_pool2d(x, 3, 2, 1, return_indices=True, index_format="compact")
    indices.codes.fill_(0xFF)  # tap 15 of 9
    assert not max_unpool2d(values, indices, 3, 2, 1, output_size=(5, 5)).any()
    assert (indices.to_torch() == -1).all()
    values, indices = max_pool2d(x, 2, ceil_mode=True, return_indices=True, index_format="compact")
    indices.codes.fill_(0xFF)  # the last cell of each window; of those at the right and lower edge it is outside
    y = max_unpool2d(values.requires_grad_(), indices, 2, output_size=(5, 5))
    assert torch.equal(y[..., 1::2, 1::2], values[..., :2, :2]) and (y != 0).sum() == (values[..., :2, :2] != 0).sum()
    y.sum().backward()
    assert torch.equal(values.grad[0, 0], torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]], device=device))


def test_indices_that_do_not_fit_their_codes(device):
    values, indices = max_pool2d(torch.randn(1, 4, 4, 4, device=device), 2, return_indices=True, index_format="compact")
    for codes in (indices.codes[:1], indices.codes.int(), indices.codes.repeat(1, 2)):
        object.__setattr__(indices, "codes", codes)  # what unpickling can do
        with pytest.raises(ValueError, match="which does not fit"):
            max_unpool2d(values, indices, 2)


def test_deterministic_mode_allows_it(device):
    """torch's own raises there, on a CPU too."""
    values, indices = max_pool2d(torch.randn(2, 3, 6, 6, device=device), 2, return_indices=True)
    want = F.max_unpool2d(values, indices, 2)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        F.max_unpool2d(values, indices, 2)
    assert torch.equal(max_unpool2d(values, indices, 2), want)
    with fastseg.reference():
        assert torch.equal(max_unpool2d(values, indices, 2), want)
        with pytest.raises(RuntimeError, match="Found an invalid max index: 99"):
            max_unpool2d(values, indices + 99 - indices[0, 0, 0, 0], 2)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_duplicates_the_last_wins_and_each_gets_the_gradient(last, device):
    fmt = torch.channels_last if last else torch.contiguous_format
    v = torch.arange(1.0, 25, device=device).view(2, 3, 2, 2).contiguous(memory_format=fmt).requires_grad_()
    indices = torch.full((2, 3, 2, 2), 5, device=device).contiguous(memory_format=fmt)  # of the first window a cell
    first = None
    for _ in range(20):
        y = max_unpool2d(v, indices, 2)
        first = y.detach() if first is None else first
        assert torch.equal(y, first)
    want = torch.zeros(2, 3, 4, 4, device=device)
    want[:, :, 1, 1] = v[:, :, 1, 1].detach()
    assert torch.equal(first, want)
    dy = torch.randn(2, 3, 4, 4, device=device)
    (dv,) = torch.autograd.grad(y, v, dy)
    assert torch.equal(dv, dy[:, :, 1:2, 1:2].expand(2, 3, 2, 2))


@pytest.mark.parametrize("index_format", ["int64", "compact"])
@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 1, 0)], ids=str)
def test_duplicates_of_overlapping_windows(geometry, index_format, device):
    """Neighbours that share their largest cell, with values of their own: the last in memory order is written."""
    x = torch.randint(0, 9, (2, 3, 6, 7), device=device).float().contiguous(memory_format=torch.channels_last)
    values, indices = max_pool2d(x, *geometry, return_indices=True, index_format=index_format)
    flat = indices if index_format == "int64" else indices.to_torch()
    assert flat[0, 0].unique().numel() < flat[0, 0].numel()
    v = torch.randn_like(values)
    want = torch.zeros(2, 3, 6 * 7)
    for n, c in ((n, c) for n in range(2) for c in range(3)):
        for cell, value in zip(flat[n, c].flatten().tolist(), v[n, c].flatten().tolist(), strict=True):
            want[n, c, cell] = value
    assert torch.equal(max_unpool2d(v, indices, *geometry, output_size=(6, 7)).cpu(), want.view(2, 3, 6, 7))


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
def test_indices_of_another_plane(last, device):
    """The FCN article's example, and a larger one: flat indices of a 4x4 plane read in one of 5x5."""
    x = torch.arange(1.0, 17, device=device).view(1, 1, 4, 4)
    values, indices = max_pool2d(x, 2, return_indices=True)
    y = max_unpool2d(values, indices, 2, output_size=torch.Size([1, 1, 5, 5]))
    want = torch.zeros(1, 1, 5, 5, device=device)
    want[0, 0, 1, 0], want[0, 0, 1, 2], want[0, 0, 2, 3], want[0, 0, 3, 0] = 6, 8, 14, 16
    assert torch.equal(y, want)
    fmt = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 6, 8, 12, device=device).contiguous(memory_format=fmt)
    values, indices = max_pool2d(x, 2, return_indices=True)
    codes = max_pool2d(x, 2, return_indices=True, index_format="compact")[1]
    for size in ((9, 13), (7, 13), (8, 11)):
        if int(indices.max()) < size[0] * size[1]:
            want = F.max_unpool2d(values, indices, 2, output_size=size)
            same_bits(max_unpool2d(values, indices, 2, output_size=size), want)
            same_bits(max_unpool2d(values, codes, 2, output_size=size), want)
            dy = torch.randn_like(want)
            v = values.clone().requires_grad_()
            (ours,) = torch.autograd.grad(max_unpool2d(v, indices, 2, output_size=size), v, dy)
            (theirs,) = torch.autograd.grad(F.max_unpool2d(v, indices, 2, output_size=size), v, dy)
            assert torch.equal(ours, theirs)


def test_the_articles_examples(device):
    """torch's documentation and the articles that quote it."""
    line = torch.arange(1.0, 10, device=device).view(1, 1, 9)
    pool = fastseg.nn.MaxPool1d(2, stride=2, return_indices=True)
    unpool = fastseg.nn.MaxUnpool1d(2, stride=2)
    assert unpool(*pool(line[..., :8])).flatten().tolist() == [0, 2, 0, 4, 0, 6, 0, 8]
    assert unpool(*pool(line), output_size=line.size()).flatten().tolist() == [0, 2, 0, 4, 0, 6, 0, 8, 0]
    assert unpool(*pool(line)).flatten().tolist() == [0, 2, 0, 4, 0, 6, 0, 8]

    pool, unpool = fastseg.nn.MaxPool2d(2, stride=2, return_indices=True), fastseg.nn.MaxUnpool2d(2, stride=2)
    square = torch.arange(1.0, 17, device=device).view(1, 1, 4, 4)
    assert unpool(*pool(square)).flatten().tolist() == [0, 0, 0, 0, 0, 6, 0, 8, 0, 0, 0, 0, 0, 14, 0, 16]
    wide = torch.arange(1.0, 21, device=device).view(1, 1, 4, 5)
    want = [[0.0] * 5, [0, 7, 0, 9, 0], [0] * 5, [0, 17, 0, 19, 0]]
    assert unpool(*pool(wide), output_size=wide.size())[0, 0].tolist() == want

    tied = torch.ones(1, 1, 5, 5, device=device)  # ceil_mode: the windows at the edge have fewer cells
    pool = fastseg.nn.MaxPool2d(2, stride=2, return_indices=True, ceil_mode=True)
    values, indices = pool(tied)
    assert indices[0, 0].tolist() == [[0, 2, 4], [10, 12, 14], [20, 22, 24]]
    y = unpool(values, indices, output_size=tied.size())
    assert y[0, 0, ::2, ::2].all() and y.sum() == 9


def test_empty_batch(device):
    v = torch.zeros(0, 3, 2, 2, device=device, requires_grad=True)
    compact = max_pool2d(v.new_zeros(0, 3, 4, 4), 2, return_indices=True, index_format="compact")[1]
    assert max_unpool2d(v, compact, 2).shape == (0, 3, 4, 4)
    y = max_unpool2d(v, torch.zeros(0, 3, 2, 2, dtype=torch.int64, device=device), 2)
    assert y.shape == (0, 3, 4, 4)
    y.sum().backward()
    assert v.grad.shape == v.shape


def _outcome(unpool, *args) -> Tensor | type[Exception]:
    try:
        return unpool(*args)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_windows_that_are_none(dims):
    """Sizes of another number, zero and negative ones: torch's result, or its kind of error."""
    x = torch.rand((1, 1, *[2] * dims))
    index = torch.arange(2**dims).view(x.shape)
    refused = 0
    for kernel in (2, 0, -1, [1, 1], [2], [], [1] * (dims + 1)):
        for stride, padding in ((None, 0), (0, 0), (-1, 0), ([2, 2], 0), (2, -1), (2, [0, 0])):
            for size in (None, [4] * dims, [4, 4]):
                args = (x, index, kernel, stride, padding, size)
                got, want = _outcome(OURS[dims], *args), _outcome(THEIRS[dims], *args)
                same = isinstance(got, Tensor) and isinstance(want, Tensor) and torch.equal(got, want)
                assert same or got is want, args[2:]
                refused += not same
    assert refused > 20


def test_upstreams_input_check():
    x = torch.ones(1, 3, 1, 1, 1)
    with pytest.raises(RuntimeError, match="exactly three elements"):
        max_unpool3d(x, torch.zeros_like(x, dtype=torch.long), [1, 1])
    with pytest.raises(RuntimeError, match="strides should be greater than zero"):
        max_unpool3d(x, torch.zeros_like(x, dtype=torch.long), [1, 1, 1], [0, 0, 0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_empty_plane(deterministic):
    """Windows that lie in the padding alone: nothing to write, whatever the indices say."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    v = torch.randn(1, 2, 3, 2, requires_grad=True)
    y = max_unpool2d(v, torch.zeros(1, 2, 3, 2, dtype=torch.long), [1, 1], 1, 1)
    assert y.shape == (1, 2, 1, 0)
    v = torch.randn(2, 2, 2, 2)
    assert max_unpool3d(v, torch.ones(2, 2, 2, 2, dtype=torch.long), 1, 1, 1).shape == (2, 0, 0, 0)
