// Threads that allocate in bursts of sizes from 16 bytes to 16 KiB and put a part of it where the next thread
// will find and free it.
#include "bench.h"

enum { LOOPS = 1200, BURST = 400, MAILBOXES = 64 };
static void **mail[MAILBOXES];

static void *work(void *argument) {
    int self = *(int *)argument;
    numbers from = {(uint64_t)self + 9};
    for (int loop = 0; loop < LOOPS; loop++) {
        void **blocks = must(malloc(BURST * sizeof(void *)));
        for (int i = 0; i < BURST; i++) {
            // As many of each power of two.
            size_t most = (size_t)32 << below(&from, 10);
            blocks[i] = touched(most / 2 + below(&from, most / 2));
        }
        for (int i = 0; i < BURST; i += 2) {
            free(blocks[i]);
            blocks[i] = NULL;
        }
        void **found = __atomic_exchange_n(&mail[(self + 1) % MAILBOXES], blocks, __ATOMIC_ACQ_REL);
        if (!found) found = __atomic_exchange_n(&mail[self % MAILBOXES], NULL, __ATOMIC_ACQ_REL);
        if (found) {
            for (int i = 0; i < BURST; i++) free(found[i]);
            free(found);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 4);
    int names[64];
    for (int i = 0; i < threads; i++) names[i] = i;
    on_threads(threads, work, names, sizeof(int));
    puts("done");
}
