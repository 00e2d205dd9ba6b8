"""Imported first, gives its process a GPU that is none: tensors say that they are on one, and their numbers lie on the
CPU.

An operation on a CPU's tensor beside one of these is refused, as a GPU refuses it, and the operators of cuda/ run from
their own source (wkv/host.h). So everything around the kernels that a run does on a GPU is done where there is none.
"""

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
BOTH = ("aten::copy_", "aten::_to_copy")   # what goes from one device to the other
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
called: set[str] = set()                   # which of our own operators were


class OnGpu(torch.Tensor):
    """A tensor of this GPU. To torch it is on "pretend", a device of Python's making; who asks is told of a GPU."""

    device, is_cuda, is_cpu = DEVICE, True, False

    @staticmethod
    def __new__(cls, numbers, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="pretend:0", requires_grad=requires_grad)

    def __init__(self, numbers, requires_grad=False):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, *args, **(kwargs or {}))

    def tolist(self):
        return self.numbers.tolist()

    def numpy(self):
        raise TypeError("a GPU's tensor has no numpy array")

    def pin_memory(self):
        raise RuntimeError("only a CPU's tensor can be pinned")


def run(function, *args, **kwargs):
    """One operation; its results are where its tensors are, or where `device` says."""
    name = function.name()
    called.update([name] if function.namespace == "rwkv_nb" else ())
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = {id(x.numbers): x for x in tensors if isinstance(x, OnGpu)}
    others = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() and not (
        name in INDEXING and x.dtype in (torch.bool, torch.long))]   # a GPU takes these from a CPU
    if here and others and name not in BOTH:
        raise RuntimeError(f"{name} of tensors on a GPU and on a CPU: {[list(x.shape) for x in others]}")
    there = kwargs.get("device")
    if there is not None:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(numbers_of, (args, kwargs))
    if name == "aten::mm.dtype":   # a CPU has none
        function, args = torch.ops.aten.mm.default, [x.to(args[2]) for x in args[:2]]
    out = function(*args, **kwargs)
    on_cpu = not here if there is None else torch.device(there).type == "cpu"
    if on_cpu or name == "aten::copy_" and not isinstance(tensors[0], OnGpu):
        return out
    return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else here[id(x)] if id(x) in here else OnGpu(x), out)


def numbers_of(x):
    return x.numbers if isinstance(x, OnGpu) else x


class Module:
    """What torch asks a device of Python's making."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16]


def _begin():
    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, dispatch_key="PrivateUse1")
    for place, name in [(torch, n) for n in ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange",
                                             "as_tensor", "tensor")] + [(torch.Tensor, "to")]:
        setattr(place, name, _on(getattr(place, name), first=name in ("as_tensor", "tensor")))
    generator, save = torch.Generator, torch.save
    torch.Generator = type("Generator", (), {"__new__": lambda cls, device="cpu": generator()})
    torch.save = lambda what, *args, **kwargs: save(tree_map(numbers_of, what), *args, **kwargs)
    for name, answer in {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
                         "mem_get_info": (16 * 10**9, 24 * 10**9), "memory_reserved": 10**9, "init": None,
                         "max_memory_allocated": 10**9, "reset_peak_memory_stats": None, "set_device": None,
                         "get_device_name": "none", "get_device_capability": (9, 0), "empty_cache": None,
                         "synchronize": None, "is_bf16_supported": True}.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.backends.cuda.cublas_workspace_size = lambda: 2**25
    torch.Tensor.pin_memory = lambda self: self
    torch.inference_mode = lambda: torch.no_grad()
    return library   # what it holds ends with it


def _on(function, first):
    """function, for which "cuda" means this GPU. first: it makes no tensor there, so what it makes goes there."""
    def asked(x):
        is_it = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
        return torch.device("pretend", 0) if is_it else x

    def made(*args, **kwargs):
        args, device = [asked(x) for x in args], asked(kwargs.pop("device", None))
        if first and device is not None and not isinstance(args[0], OnGpu):
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs, **({} if device is None else {"device": device}))
    return made


_library = _begin()
