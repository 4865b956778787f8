// Blocks of 5 to 25 MiB with random lifetimes, of which every page is written.
#include "bench.h"

enum { LIVE = 20, STEPS = 400 };

int main(int argc, char **argv) {
    numbers from = {(uint64_t)argument(argc, argv, 1)};
    char *live[LIVE] = {0};
    uint64_t sum = 0;
    for (int step = 0; step < STEPS; step++) {
        size_t at = below(&from, LIVE);
        if (live[at]) sum += (unsigned char)live[at][4096];
        free(live[at]);
        size_t size = ((size_t)5 << 20) + below(&from, (size_t)20 << 20);
        live[at] = must(malloc(size));
        for (size_t page = 0; page < size; page += 4096) live[at][page] = (char)step;
    }
    for (int i = 0; i < LIVE; i++) free(live[i]);
    printf("%llu\n", (unsigned long long)sum);
}
