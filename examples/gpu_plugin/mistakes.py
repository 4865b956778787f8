"""What the plugin says to mistakes: loaded too late, from a path that is none, asked about devices that are not there,
given what is not its own. Needs a card and PyTorch.

    python3 examples/gpu_plugin/mistakes.py target/release/examples/libgpu_plugin.so
"""

import ctypes
import sys

import torch

from memory_pool_gpu import Plugin


def refused(error, says, call):
    """The error that a call raises; that it raises one, and what it says, is checked."""
    try:
        call()
    except error as found:
        assert says in str(found), found
        return found
    raise AssertionError(f"{call} was not refused")


def main(path):
    refused(OSError, "", lambda: Plugin(path + ".none"))
    cards = torch.cuda.device_count()
    plugin = Plugin(path)
    refused(RuntimeError, f"{cards}", lambda: plugin.stats(cards))
    refused(RuntimeError, "device 4096 is not there", lambda: plugin.trim(4096))

    # PyTorch has allocated: it is too late, and PyTorch goes on with its own allocator.
    before = torch.ones(1 << 20, device="cuda")
    print("too late:", refused(RuntimeError, "already initialized", plugin.use_in_torch))
    after = torch.ones(1 << 20, device="cuda")
    assert (before + after).sum().item() == 2 << 20
    # PyTorch has asked for the pool before it said no; nothing came from it.
    assert plugin.stats(0)["allocated"] == 0, plugin.stats(0)

    take = plugin.library.memory_pool_torch_alloc
    take.argtypes, take.restype = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    block = take(512, 0, None)
    assert block

    # A block that is not the pool's is left alone, and told; null is nothing.
    free = plugin.library.memory_pool_torch_free
    free.argtypes, free.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], None
    free(before.data_ptr(), before.nbytes, 0, None)
    said = plugin.library.memory_pool_last_error().decode()
    print("a foreign block:", said)
    assert "free for PyTorch" in said
    free(None, 0, 0, None)
    assert before.sum().item() == 1 << 20
    plugin.check(0)

    # No card has that much: null, and the error says why.
    assert take(1 << 50, 0, None) is None
    print("a pebibyte:", plugin.library.memory_pool_last_error().decode())
    assert take(-1, 0, None) is None and take(512, cards, None) is None
    free(block, 512, 0, None)
    assert plugin.stats(0)["allocated"] == 0, plugin.stats(0)
    print("every mistake was told, and nothing was harmed")


if __name__ == "__main__":
    main(sys.argv[1])
