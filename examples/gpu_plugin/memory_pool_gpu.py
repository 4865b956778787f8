"""The GPU pool under PyTorch and CuPy, and its statistics, from Python.

    import memory_pool_gpu
    pool = memory_pool_gpu.Plugin("target/release/examples/libgpu_plugin.so")
    pool.use_in_torch()                      # before PyTorch allocates on a device
    cupy.cuda.set_allocator(pool.cupy_allocator().malloc)
    pool.stats(0)["peak_reserved"]

The pools are configured by MEMORY_POOL_GPU_* variables, read at the first allocation on a device.
"""

import ctypes
import json
import os

LEGACY_STREAM = 1
PER_THREAD_STREAM = 2


class Plugin:
    """One loaded library; all of a process's libraries of the same path are one."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.library = library = ctypes.CDLL(self.path)
        library.memory_pool_last_error.restype = ctypes.c_char_p
        library.memory_pool_gpu_stats_json.restype = ctypes.c_ssize_t
        library.memory_pool_gpu_stats_json.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
        library.memory_pool_gpu_trim.restype = ctypes.c_ssize_t
        library.memory_pool_torch_record_stream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.memory_pool_torch_memory_fraction.argtypes = [ctypes.c_double, ctypes.c_int]
        library.memory_pool_stream_ends.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self.torch_allocator = None

    def address(self, name):
        """The address of one of the library's functions."""
        return ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value

    def _checked(self, result):
        if result < 0:
            raise RuntimeError(self.library.memory_pool_last_error().decode())
        return result

    def use_in_torch(self):
        """Makes this PyTorch's allocator, with all of its hooks. PyTorch raises an error where it is too late."""
        import torch

        allocator = torch.cuda.memory.CUDAPluggableAllocator(
            self.path, "memory_pool_torch_alloc", "memory_pool_torch_free"
        )
        hooks = allocator.allocator()
        for setter, name in {
            "set_init_fn": "init",
            "set_reset_fn": "empty_cache",
            "set_memory_fraction_fn": "memory_fraction",
            "set_record_stream_fn": "record_stream",
            "set_begin_allocate_to_pool": "begin_pool",
            "set_end_allocate_to_pool_fn": "end_pool",
            "set_release_pool": "release_pool",
        }.items():
            getattr(hooks, setter)(self.address("memory_pool_torch_" + name))
        torch.cuda.memory.change_current_allocator(allocator)
        # PyTorch keeps no reference of its own to the Python object.
        self.torch_allocator = allocator
        return allocator

    def cupy_allocator(self, stream=LEGACY_STREAM):
        """CuPy's allocator for arrays whose work is ordered by one stream: its `ptr`, or the legacy default stream.
        With 0, arrays may be used on any stream, at the price of waiting for the device before memory is reused."""
        import cupy

        return cupy.cuda.memory.CFunctionAllocator(
            stream, self.address("memory_pool_cupy_malloc"), self.address("memory_pool_cupy_free"), self
        )

    def stats(self, device=0):
        """What the pool of a device did and holds: a dictionary of counts and bytes."""
        text = ctypes.create_string_buffer(4096)
        self._checked(self.library.memory_pool_gpu_stats_json(device, text, len(text)))
        return json.loads(text.value)

    def reset_peak(self, device=0):
        """Starts the peaks anew."""
        self._checked(self.library.memory_pool_gpu_reset_peak(device))

    def trim(self, device=0):
        """Gives idle memory back to the driver; returns the bytes."""
        return self._checked(self.library.memory_pool_gpu_trim(device))

    def check(self, device=0):
        """Walks every invariant of the pool; an error where one is broken."""
        self._checked(self.library.memory_pool_gpu_check(device))

    def stream_ends(self, stream, device=0):
        """To be called before a stream is destroyed: its handle may name another one after."""
        self._checked(self.library.memory_pool_stream_ends(device, stream))
