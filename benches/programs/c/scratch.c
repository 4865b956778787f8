// Blocks of one thread's are freed by others, which go on with small blocks that they write to again and again:
// slow where two threads get neighbours on one cache line.
#include "bench.h"

enum { REPEAT = 4000, WRITES = 4000 };

static void *work(void *argument) {
    free(*(void **)argument);
    for (int i = 0; i < REPEAT; i++) {
        volatile char *block = must(malloc(8));
        for (int n = 0; n < WRITES; n++) block[n % 8]++;
        free((void *)block);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 4);
    void *first[64];
    for (int i = 0; i < threads; i++) first[i] = touched(8);
    on_threads(threads, work, first, sizeof(void *));
    puts("done");
}
