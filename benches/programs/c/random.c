// One thread, a table of a million places, sizes by a power law; every place is emptied or filled at random.
#include "bench.h"

enum { PLACES = 1 << 18, STEPS = 12000000 };

int main(int argc, char **argv) {
    numbers from = {(uint64_t)argument(argc, argv, 1)};
    char **places = must(calloc(PLACES, sizeof(char *)));
    uint64_t sum = 0;
    for (int step = 0; step < STEPS; step++) {
        // Low places more often than high ones.
        size_t at = below(&from, 1 + below(&from, PLACES));
        if (places[at]) {
            sum += (unsigned char)places[at][0];
            free(places[at]);
            places[at] = NULL;
        } else {
            places[at] = touched(1 + below(&from, (size_t)16 << below(&from, 7)));
        }
    }
    for (int i = 0; i < PLACES; i++) free(places[i]);
    free(places);
    printf("%llu\n", (unsigned long long)sum);
}
