// Batches of one size, freed in the order they came, in the reverse order, or shuffled.
#include "bench.h"

enum { MOST = 1600 };

static void *work(void *argument) {
    numbers from = {*(int *)argument};
    void *blocks[MOST];
    for (int round = 0; round < 6000; round++) {
        static const int counts[] = {25, 100, 400, MOST};
        size_t size = 16 + below(&from, 500);
        int count = counts[round % 4];
        for (int i = 0; i < count; i++) blocks[i] = touched(size);
        if (round % 3 == 0) {
            for (int i = 0; i < count; i++) free(blocks[i]);
        } else if (round % 3 == 1) {
            for (int i = count; i-- > 0;) free(blocks[i]);
        } else {
            for (int i = count - 1; i > 0; i--) {
                size_t other = below(&from, (size_t)i + 1);
                void *swapped = blocks[i];
                blocks[i] = blocks[other];
                blocks[other] = swapped;
            }
            for (int i = 0; i < count; i++) free(blocks[i]);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 1);
    int names[64];
    for (int i = 0; i < threads; i++) names[i] = i;
    on_threads(threads, work, names, sizeof(int));
    puts("done");
}
