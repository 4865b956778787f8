/* What a pair of allocation and free costs through the plugin's C interface, beside the driver's stream-ordered
 * allocator: one thread on one stream, then threads with a stream each.
 *
 *     cc -O2 -o pairs examples/gpu_plugin/pairs.c -ldl -lpthread
 *     ./pairs target/release/examples/libgpu_plugin.so
 *
 * With MEMORY_POOL_GPU_DRIVER=sim it runs without a card, on simulated streams, and measures the simulation. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void *(*alloc_fn)(intptr_t, int, void *);
typedef void (*free_fn)(void *, intptr_t, int, void *);

static alloc_fn take;
static free_fn give;
static int (*cu_alloc)(uint64_t *, size_t, void *);
static int (*cu_free)(uint64_t, void *);
static int (*stream_create)(void **, unsigned);
static int (*context_set)(void *);
static void *context;
static void *(*sim_stream)(int);

static void die(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        die(name);
    return found;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void *new_stream(void) {
    void *made = NULL;
    if (sim_stream)
        made = sim_stream(0);
    else if (context_set(context) || stream_create(&made, 1))
        die("no stream");
    return made;
}

static void plugin_pairs(size_t bytes, void *stream, int pairs) {
    for (int i = 0; i < pairs; i++)
        give(take((intptr_t)bytes, 0, stream), (intptr_t)bytes, 0, stream);
}

static void driver_pairs(size_t bytes, void *stream, int pairs) {
    for (int i = 0; i < pairs; i++) {
        uint64_t block = 0;
        if (cu_alloc(&block, bytes, stream) || cu_free(block, stream))
            die("the driver failed");
    }
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median of eleven runs, in nanoseconds a pair. */
static double median(void (*pairs)(size_t, void *, int), size_t bytes, void *stream) {
    double runs[11];
    int count = sim_stream ? 500 : 20000;
    pairs(bytes, stream, 100);
    for (int i = 0; i < 11; i++) {
        double start = now();
        pairs(bytes, stream, count);
        runs[i] = (now() - start) / count;
    }
    qsort(runs, 11, sizeof runs[0], ascending);
    return runs[5];
}

struct job {
    void (*pairs)(size_t, void *, int);
    int count;
    double ns;
    pthread_barrier_t *start;
};

static void *work(void *argument) {
    struct job *job = argument;
    void *stream = new_stream();
    job->pairs(1 << 20, stream, 10);
    pthread_barrier_wait(job->start);
    double start = now();
    job->pairs(1 << 20, stream, job->count);
    job->ns = (now() - start) / job->count;
    return NULL;
}

static double threads(void (*pairs)(size_t, void *, int), int count, int each) {
    pthread_t ids[16];
    struct job jobs[16];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, (unsigned)count);
    for (int i = 0; i < count; i++) {
        jobs[i] = (struct job){pairs, each, 0, &start};
        if (pthread_create(&ids[i], NULL, work, &jobs[i]))
            die("no thread");
    }
    double slowest = 0;
    for (int i = 0; i < count; i++) {
        pthread_join(ids[i], NULL);
        if (jobs[i].ns > slowest)
            slowest = jobs[i].ns;
    }
    return slowest;
}

int main(int argc, char **argv) {
    if (argc < 2)
        die("usage: pairs libgpu_plugin.so");
    void *plugin = dlopen(argv[1], RTLD_NOW);
    if (!plugin)
        die(dlerror());
    take = (alloc_fn)symbol(plugin, "memory_pool_torch_alloc");
    give = (free_fn)symbol(plugin, "memory_pool_torch_free");
    const char *driver = getenv("MEMORY_POOL_GPU_DRIVER");
    if (driver && !strcmp(driver, "sim")) {
        sim_stream = (void *(*)(int))symbol(plugin, "memory_pool_sim_stream_create");
    } else {
        void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
        if (!cuda)
            die(dlerror());
        int (*init)(unsigned) = (int (*)(unsigned))symbol(cuda, "cuInit");
        int (*retain)(void **, int) = (int (*)(void **, int))symbol(cuda, "cuDevicePrimaryCtxRetain");
        context_set = (int (*)(void *))symbol(cuda, "cuCtxSetCurrent");
        stream_create = (int (*)(void **, unsigned))symbol(cuda, "cuStreamCreate");
        cu_alloc = (int (*)(uint64_t *, size_t, void *))symbol(cuda, "cuMemAllocAsync");
        cu_free = (int (*)(uint64_t, void *))symbol(cuda, "cuMemFreeAsync");
        int (*pool_of)(void **, int) = (int (*)(void **, int))symbol(cuda, "cuDeviceGetDefaultMemPool");
        int (*pool_set)(void *, int, void *) = (int (*)(void *, int, void *))symbol(cuda, "cuMemPoolSetAttribute");
        void *pool = NULL;
        uint64_t keep = UINT64_MAX;
        /* 4: the bytes that the driver's pool keeps when the device is waited for. */
        if (init(0) || retain(&context, 0) || context_set(context) || pool_of(&pool, 0) || pool_set(pool, 4, &keep))
            die("no card");
    }
    void *own = new_stream();
    printf("nanoseconds a pair  %10s %10s %10s\n", "default", "own stream", "driver");
    size_t sizes[] = {512, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20};
    for (int i = 0; i < 6; i++) {
        double driver_ns = sim_stream ? 0 : median(driver_pairs, sizes[i], own);
        printf("%18zu  %10.1f %10.1f %10.1f\n", sizes[i], median(plugin_pairs, sizes[i], NULL),
               median(plugin_pairs, sizes[i], own), driver_ns);
    }
    for (int count = 2; count <= 16; count *= 2)
        printf("%2d threads, 1 MiB   %10s %10.1f %10.1f\n", count, "", threads(plugin_pairs, count, sim_stream ? 200 : 20000),
               sim_stream ? 0 : threads(driver_pairs, count, 2000));
    return 0;
}
