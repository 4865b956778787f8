// What the programs of this folder share: numbers, threads, and touching memory.
#ifndef BENCH_H
#define BENCH_H

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A stream of numbers, one a thread.
typedef struct {
    uint64_t state;
} numbers;

static inline uint64_t next(numbers *from) {
    uint64_t x = from->state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline size_t below(numbers *from, size_t limit) {
    return (size_t)(((next(from) >> 32) * (uint64_t)limit) >> 32);
}

static inline void *must(void *block) {
    if (!block) {
        fputs("no memory\n", stderr);
        exit(1);
    }
    return block;
}

// A block of which the first and the last word are written, as programs do.
static inline void *touched(size_t size) {
    char *block = must(malloc(size));
    block[0] = 1;
    block[size - 1] = 1;
    return block;
}

// Runs `work(argument of index)` on as many threads.
static inline void on_threads(int count, void *(*work)(void *), void *arguments, size_t stride) {
    pthread_t threads[64];
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, work, (char *)arguments + (size_t)i * stride)) exit(1);
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
}

// The first argument, or what is used without one: threads, or a factor for the work.
static inline int argument(int argc, char **argv, int otherwise) {
    return argc > 1 ? atoi(argv[1]) : otherwise;
}

#endif
