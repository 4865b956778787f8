// Buffers that grow by realloc, by doubling and by small steps, with other allocations in between.
#include "bench.h"

int main(int argc, char **argv) {
    numbers from = {(uint64_t)argument(argc, argv, 1)};
    uint64_t sum = 0;
    for (int round = 0; round < 260; round++) {
        char *buffers[16] = {0};
        size_t sizes[16] = {0}, room[16] = {0};
        for (int step = 0; step < 30000; step++) {
            size_t at = below(&from, 16), more = 1 + below(&from, 100);
            if (sizes[at] + more > room[at]) {
                room[at] = at % 2 ? 2 * (sizes[at] + more) : sizes[at] + more + 500;
                buffers[at] = must(realloc(buffers[at], room[at]));
            }
            memset(buffers[at] + sizes[at], (int)step, more);
            sizes[at] += more;
        }
        for (int i = 0; i < 16; i++) {
            sum += (unsigned char)buffers[i][sizes[i] / 2];
            free(buffers[i]);
        }
    }
    printf("%llu\n", (unsigned long long)sum);
}
