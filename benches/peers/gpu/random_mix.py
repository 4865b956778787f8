"""Traces of requests at random, after the shape of RMM's own benchmark: sizes evenly spread up to a largest, 73 of 100
steps allocate, any live block may be the next that is freed, and no more than 16,000 MiB live at once.

    python3 benches/peers/gpu/random_mix.py DIRECTORY      # random_4m.trace.gz and random_256m.trace.gz, for run.sh
"""

import gzip
import os
import random
import struct
import sys

STEPS, CAP = 100_000, 16_000 << 20


def steps(largest):
    choice = random.Random(1)
    held, live, made = [], 0, 0
    for _ in range(STEPS):
        size = choice.randint(1, largest)
        if live + size <= CAP and (not held or choice.random() < 0.73):
            yield 0, made, size
            held.append((made, size))
            made, live = made + 1, live + size
        else:
            at = choice.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            number, size = held.pop()
            live -= size
            yield 1, number, size


def main():
    for name, mib in {"random_4m": 4, "random_256m": 256}.items():
        with gzip.open(os.path.join(sys.argv[1], name + ".trace.gz"), "wb") as file:
            for kind, number, size in steps(mib << 20):
                file.write(struct.pack("<BBHIQ", kind, 0, 0, number, size))


if __name__ == "__main__":
    main()
