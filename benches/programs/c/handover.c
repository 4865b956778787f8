// Half of the threads allocate, the other half free: batches travel over a bounded queue. One thread alone does both in
// turns, a queue's length each.
#include "bench.h"

enum { BATCH = 120, WAITING = 64, BATCHES = 30000 };

typedef struct {
    void *blocks[BATCH];
} batch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static batch *queue[WAITING];
static int waiting, producers;

static batch *filled(numbers *from) {
    batch *full = must(malloc(sizeof(batch)));
    for (int i = 0; i < BATCH; i++) full->blocks[i] = touched(16 + below(from, 240));
    return full;
}

static void empty(batch *full) {
    for (int i = 0; i < BATCH; i++) free(full->blocks[i]);
    free(full);
}

static void *produce(void *argument) {
    numbers from = {*(int *)argument};
    for (int n = 0; n < BATCHES; n++) {
        batch *full = filled(&from);
        pthread_mutex_lock(&lock);
        while (waiting == WAITING) pthread_cond_wait(&changed, &lock);
        queue[waiting++] = full;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_lock(&lock);
    producers--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void *consume(void *argument) {
    (void)argument;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (waiting == 0 && producers > 0) pthread_cond_wait(&changed, &lock);
        batch *full = waiting ? queue[--waiting] : NULL;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
        if (!full) return NULL;
        empty(full);
    }
}

static void alone(void) {
    numbers from = {0};
    for (int n = 0; n < BATCHES; n++) {
        if (waiting == WAITING) {
            while (waiting) empty(queue[--waiting]);
        }
        queue[waiting++] = filled(&from);
    }
    while (waiting) empty(queue[--waiting]);
}

static void *either(void *argument) {
    return *(int *)argument % 2 ? consume(argument) : produce(argument);
}

int main(int argc, char **argv) {
    int threads = argument(argc, argv, 2);
    int names[64];
    for (int i = 0; i < threads; i++) names[i] = i;
    producers = (threads + 1) / 2;
    if (threads == 1) alone();
    else on_threads(threads, either, names, sizeof(int));
    puts("done");
}
