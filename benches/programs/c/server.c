// A server's threads, each with a table of live blocks of which a random one is replaced at a time; a thread
// that has served its share hands its table to a new thread, which frees what the old one allocated.
#include "bench.h"

enum { SLOTS = 1000, LIVES = 40, REQUESTS = 60000, LEAST = 10, MOST = 500 };

typedef struct {
    numbers from;
    int lives;
    char *slots[SLOTS];
} table;

static void *serve(void *argument) {
    table *mine = argument;
    for (int i = 0; i < REQUESTS; i++) {
        size_t at = below(&mine->from, SLOTS);
        free(mine->slots[at]);
        mine->slots[at] = touched(LEAST + below(&mine->from, MOST - LEAST));
    }
    if (--mine->lives > 0) {
        pthread_t heir;
        if (pthread_create(&heir, NULL, serve, mine)) exit(1);
        pthread_join(heir, NULL);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 4);
    table *tables = must(calloc((size_t)threads, sizeof(table)));
    for (int i = 0; i < threads; i++) tables[i] = (table){.from = {(uint64_t)i}, .lives = LIVES};
    on_threads(threads, serve, tables, sizeof(table));
    printf("%d\n", tables[0].lives);
}
