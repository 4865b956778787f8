// Threads that keep some of what they allocate, swap some with whoever else is there, and end between rounds.
#include "bench.h"

enum { SHARED = 1000, ROUNDS = 25, BLOCKS = 60000 };
static void *shared_slots[SHARED];

static size_t some_size(numbers *from) {
    uint64_t r = next(from);
    if (r % 1000 == 0) return 8192 + (r >> 20) % 60000;
    if (r % 100 < 10) return 512 + (r >> 20) % 4000;
    return 8 + (r >> 20) % 250;
}

static void *work(void *argument) {
    numbers from = {*(int *)argument * 77u + 1};
    void **kept = must(malloc(BLOCKS * sizeof(void *)));
    size_t count = 0;
    for (int i = 0; i < BLOCKS; i++) {
        void *block = touched(some_size(&from));
        if (below(&from, 4) == 0) {
            free(__atomic_exchange_n(&shared_slots[below(&from, SHARED)], block, __ATOMIC_ACQ_REL));
        } else {
            kept[count++] = block;
        }
        if (count && below(&from, 3) == 0) {
            size_t at = below(&from, count);
            free(kept[at]);
            kept[at] = kept[--count];
        }
    }
    while (count) free(kept[--count]);
    free(kept);
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 4);
    int names[64];
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < threads; i++) names[i] = round * 64 + i;
        on_threads(threads, work, names, sizeof(int));
    }
    for (int i = 0; i < SHARED; i++) free(shared_slots[i]);
    puts("done");
}
