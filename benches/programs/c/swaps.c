// A buffer of blocks through which a window moves: what was allocated longest ago is freed first, with some
// blocks that outlive several windows.
#include "bench.h"

enum { WINDOW = 20000, STEPS = 3000000 };

static void *work(void *argument) {
    numbers from = {*(int *)argument};
    void **ring = must(calloc(WINDOW, sizeof(void *)));
    void **kept = must(calloc(WINDOW, sizeof(void *)));
    for (int step = 0; step < STEPS; step++) {
        int at = step % WINDOW;
        if (ring[at] && below(&from, 50) == 0) {
            size_t place = below(&from, WINDOW);
            free(kept[place]);
            kept[place] = ring[at];
        } else {
            free(ring[at]);
        }
        ring[at] = touched(8 + below(&from, (size_t)8 << below(&from, 8)));
    }
    for (int i = 0; i < WINDOW; i++) {
        free(ring[i]);
        free(kept[i]);
    }
    free(ring);
    free(kept);
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 2);
    int names[64];
    for (int i = 0; i < threads; i++) names[i] = i;
    on_threads(threads, work, names, sizeof(int));
    puts("done");
}
